"""
How the predicted probability of the right answer grows along the tiny model's own completions.

Samples completions of held-out questions, closes each thought at the start and after every episode, appends the right
answer and reads its probability: one plain forward per cut, nothing shared, so that the numbers depend on none of the
library's scoring. Prints a table and draws docs/figures/correctness_curve.png.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from l2t_trl.data.arithmetic import is_necessary, make_dataset, question_numbers
from l2t_trl.scripts.base import episode_texts, sample


ROOT = Path(__file__).parent.parent
PROBE = "</think>\\boxed{"


def answer_log_probs(model, prefix_ids: list[int], answer_ids: list[int]) -> torch.Tensor:
    """Return the log-probability of each answer token after `prefix_ids`, shape `(A,)`, in nats."""
    input_ids = torch.tensor([prefix_ids + answer_ids])
    with torch.no_grad():
        logits = model(input_ids).logits[0, len(prefix_ids) - 1 : -1]  # (A, V)
    return logits.log_softmax(-1).gather(1, torch.tensor(answer_ids)[:, None])[:, 0]


def cuts(tokenizer, completion_ids: list[int]) -> list[int]:
    """
    Return the number of completion tokens before each cut: after the opening tag, then after every closed episode.
    """
    closers = {tokenizer.convert_tokens_to_ids(f"</episode_{i}>") for i in range(1, 31)}
    return [1] + [i + 1 for i, token in enumerate(completion_ids) if token in closers]


def measure(model, tokenizer, size: int, seed: int) -> list[dict]:
    """
    Return one record per cut: columns of the question, columns done, kind of episode, both probabilities and whether
    the answer came out right.
    """
    torch.manual_seed(seed)
    questions = make_dataset(size, seed, split="test")
    prompts = list(questions["prompt"])
    records = []
    for row, prompt, ids in zip(questions, prompts, sample(model, tokenizer, prompts, temperature=1.0), strict=True):
        text = tokenizer.decode(ids)
        prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        answer_ids = tokenizer.encode(row["answer"] + "}")
        num_columns = len(str(question_numbers(prompt[0]["content"])[0]))
        kinds = [None] + [is_necessary(episode) for episode in episode_texts(text)]
        num_done = 0
        for cut, kind in zip(cuts(tokenizer, ids), kinds, strict=False):
            num_done += kind is True
            log_probs = answer_log_probs(model, prompt_ids + ids[:cut] + tokenizer.encode(PROBE), answer_ids)
            records.append(
                {
                    "num_columns": num_columns,
                    "num_done": num_done,
                    "is_necessary": kind,
                    "per_token": log_probs.mean().exp().item(),
                    "joint": log_probs.sum().exp().item(),
                    "is_correct": "\\boxed{" + row["answer"] + "}" in text,
                }
            )
    return records


def gains(records: list[dict]) -> dict[bool, float]:
    """
    Return the mean change of the per-token probability over a necessary (True) and over a redundant (False) episode,
    right completions only.
    """
    changes = defaultdict(list)
    for before, after in zip(records, records[1:], strict=False):
        if after["is_necessary"] is not None and after["is_correct"]:
            changes[after["is_necessary"]].append(after["per_token"] - before["per_token"])
    return {kind: sum(values) / len(values) for kind, values in changes.items()}


def means(records: list[dict], is_correct: bool) -> dict[int, dict[int, tuple[float, float, int]]]:
    """
    Return `{num_columns: {num_done: (per_token, joint, number of cuts)}}` over the completions that end right, or
    wrong.
    """
    groups = defaultdict(list)
    for record in records:
        if record["is_correct"] == is_correct and record["num_done"] <= record["num_columns"]:
            groups[record["num_columns"], record["num_done"]].append(record)
    table = defaultdict(dict)
    for (num_columns, num_done), group in sorted(groups.items()):
        n = len(group)
        table[num_columns][num_done] = (
            sum(record["per_token"] for record in group) / n,
            sum(record["joint"] for record in group) / n,
            n,
        )
    return table


def draw(records: list[dict], path: Path) -> None:
    """Draw the curves: a line per number of columns, solid over right completions, dashed over wrong ones."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    colors = {2: "#0072b2", 3: "#d55e00", 4: "#009e73"}
    for axis, index, title in zip(axes, (0, 1), ("per token (geometric mean)", "joint (product)"), strict=True):
        for is_correct, style in ((True, "-"), (False, "--")):
            for num_columns, row in means(records, is_correct).items():
                axis.plot(
                    [num_done / num_columns for num_done in row],
                    [values[index] for values in row.values()],
                    style,
                    marker="o",
                    color=colors[num_columns],
                    label=f"{num_columns} columns, {'right' if is_correct else 'wrong'} completions",
                )
        axis.set(title=title, xlabel="share of the columns worked out", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("probability of the right answer")
    axes[1].legend(fontsize=8, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(
        description="Measure the answer's probability along completions of the tiny model."
    )
    parser.add_argument("--model_dir", default=str(ROOT / "l2t_trl" / "tiny" / "model"))
    parser.add_argument("--size", type=int, default=256, help="held-out questions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", default=str(ROOT / "docs" / "figures" / "correctness_curve.png"))
    args = parser.parse_args()
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(args.model_dir)
    model = AutoModelForCausalLM.from_pretrained(args.model_dir).eval()
    records = measure(model, tokenizer, args.size, args.seed)
    for is_correct in (True, False):
        print("completions that end right" if is_correct else "completions that end wrong")
        for num_columns, row in means(records, is_correct).items():
            for num_done, (per_token, joint, n) in row.items():
                print(
                    f"  {num_done} of {num_columns} columns: per token {per_token:.3f}, joint {joint:.3f} ({n} cuts)"
                )
    gain = gains(records)
    print(f"mean change per token: necessary episode {gain[True]:+.3f}, redundant episode {gain[False]:+.3f}")
    draw(records, Path(args.figure))


if __name__ == "__main__":
    main()
