"""
Make the tiny base model from nothing: tokenizer, weights, supervised fine-tuning on over-thinking traces of additions.

The result is an ordinary model folder. It knows the arithmetic well enough to answer most questions when it decodes
greedily, and it imitates the redundant episodes and the wrong steps of its traces when it samples: what reinforcement
learning is to remove.
"""

import argparse
import json
import random
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.arithmetic import (
    REDUNDANCY,
    TIERS,
    WRONG_STEP_PROBABILITY,
    draw_numbers,
    draw_trace,
    episodes_text,
    is_necessary,
    make_dataset,
    question_numbers,
    question_text,
    trace_text,
)


if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM, Qwen2Tokenizer


MAX_EPISODES = 30

# The whole content of every message is kept, the thought of an assistant message included; no system prompt is added.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}\n"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "{{ '<|im_start|>assistant\\n' }}\n"
    "{%- endif -%}\n"
)

# Rows of one optimiser step. Traces teach the format and the choice of the next episode; drills teach single column
# sums (without them the format is learned and the sums are not); answers teach what a thought, whole or cut off, has
# settled. A drill and an answer row are filled up to about the length of a trace.
TRACES_PER_STEP = 14
DRILLS_PER_STEP = 5
ANSWERS_PER_STEP = 11
BATCH_SIZE = TRACES_PER_STEP + DRILLS_PER_STEP + ANSWERS_PER_STEP
FILLED_TOKENS = 160
CUT_SHARE = 0.7

HEAD_WIDTH = 32

# Above the longest trace of the hardest tier.
MAX_NEW_TOKENS = 320
EVALUATION_BATCH_SIZE = 128


def build_tokenizer(seed: int = 0) -> "Qwen2Tokenizer":
    """
    Build the tokenizer: byte-level BPE behind Qwen's pre-tokenizer, its merges trained on the words of the traces.

    It is a `Qwen2Tokenizer` proper, since `AutoTokenizer` makes one out of any folder with a Qwen2 configuration,
    whatever class was saved there. The tags of the episodes and of the thought are ordinary added tokens, not special
    ones: decoding without special tokens keeps them.
    """
    from tokenizers import AddedToken, Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    rng = random.Random(f"tokenizer {seed}")
    texts = ["user\nassistant\nsystem\n"] * 2
    for _ in range(500):
        for tier in TIERS:
            numbers = draw_numbers(rng, tier, "train")
            trace = draw_trace(rng, numbers, REDUNDANCY, WRONG_STEP_PROBABILITY)
            texts += [question_text(numbers), "\\boxed{" + trace.answer + "}"]
            texts += [episode.text for episode in trace.episodes]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    # 256 bytes and every merge that occurs twice: all words of the traces, and no digits, which Qwen's pre-tokenizer
    # keeps apart.
    trainer = trainers.BpeTrainer(
        vocab_size=512, min_frequency=2, initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    trained = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        model_max_length=1024,
    )
    tags = ["<think>", "</think>"]
    for i in range(1, MAX_EPISODES + 1):
        tags += [f"<episode_{i}>", f"</episode_{i}>"]
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in tags])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: "Qwen2Tokenizer", width: int, num_layers: int, seed: int) -> "Qwen2ForCausalLM":
    """
    Build the untrained model.

    The wide initialisation and the untied embeddings are what lets so small a model learn the sums: with the usual
    0.02 and tied embeddings it learns the format alone.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=num_layers,
            num_attention_heads=width // HEAD_WIDTH,
            num_key_value_heads=width // HEAD_WIDTH // 2,
            max_position_embeddings=1024,
            initializer_range=0.1,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _prompt_ids(tokenizer: "Qwen2Tokenizer", numbers: list[int]) -> list[int]:
    messages = [{"role": "user", "content": question_text(numbers)}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def _masked_row(masked_ids: list[int], trained_ids: list[int]) -> dict[str, list[int]]:
    return {"input_ids": masked_ids + trained_ids, "labels": [-100] * len(masked_ids) + trained_ids}


def trace_row(tokenizer: "Qwen2Tokenizer", rng: random.Random, tier: int) -> dict[str, list[int]]:
    """Return a question and a drawn trace; loss on the trace."""
    numbers = draw_numbers(rng, tier, "train")
    trace = draw_trace(rng, numbers, REDUNDANCY, WRONG_STEP_PROBABILITY)
    return _masked_row(_prompt_ids(tokenizer, numbers), tokenizer.encode(trace_text(trace)) + [tokenizer.eos_token_id])


def answer_row(tokenizer: "Qwen2Tokenizer", rng: random.Random) -> dict[str, list[int]]:
    """
    Return questions with right traces, most of them closed before their end; loss on the right answers alone.

    They teach what is known of an answer so far, digit by digit, so that the answer's probability at a cut means
    something. They never teach to close early, because the closing tag carries no loss.
    """
    row = {"input_ids": [], "labels": []}
    while len(row["input_ids"]) < FILLED_TOKENS:
        numbers = draw_numbers(rng, rng.choice(list(TIERS)), "train")
        episodes = draw_trace(rng, numbers, REDUNDANCY, wrong_step_probability=0.0).episodes
        end = rng.randrange(len(episodes)) if rng.random() < CUT_SHARE else len(episodes)
        thought = episodes_text(episodes[:end]) + "</think>\\boxed{"
        one = _masked_row(
            _prompt_ids(tokenizer, numbers) + tokenizer.encode(thought), tokenizer.encode(f"{sum(numbers)}}}")
        )
        row = {key: row[key] + one[key] for key in row}
    return row


def drill_row(tokenizer: "Qwen2Tokenizer", rng: random.Random) -> dict[str, list[int]]:
    """Return a row of column sums such as `7+8=15+6=21`, all right; loss on the totals alone."""
    input_ids, labels = [], []
    while len(input_ids) < FILLED_TOKENS:
        total = rng.randrange(10)
        input_ids += tokenizer.encode(f" {total}")
        labels += [-100] * (len(input_ids) - len(labels))
        for _ in range(rng.randint(1, 6)):
            term = rng.randrange(10)
            total += term
            row = _masked_row(tokenizer.encode(f"+{term}="), tokenizer.encode(str(total)))
            input_ids += row["input_ids"]
            labels += row["labels"]
    return {"input_ids": input_ids, "labels": labels}


def make_rows(tokenizer: "Qwen2Tokenizer", num_steps: int, seed: int) -> list[dict[str, list[int]]]:
    """Return the rows of all steps in order, `BATCH_SIZE` each, every step with the same mixture."""
    rng = random.Random(f"base {seed}")
    tiers = list(TIERS)
    rows = []
    for _ in range(num_steps):
        rows += [trace_row(tokenizer, rng, tiers[i % len(tiers)]) for i in range(TRACES_PER_STEP)]
        rows += [drill_row(tokenizer, rng) for _ in range(DRILLS_PER_STEP)]
        rows += [answer_row(tokenizer, rng) for _ in range(ANSWERS_PER_STEP)]
    return rows


def train(
    model: "Qwen2ForCausalLM", tokenizer: "Qwen2Tokenizer", num_steps: int, learning_rate: float, seed: int
) -> None:
    """Fine-tune `model` in place on `num_steps` batches."""
    import tempfile

    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=scratch,
                max_steps=num_steps,
                per_device_train_batch_size=BATCH_SIZE,
                # The rows come in the order of the steps, each step with its mixture.
                train_sampling_strategy="sequential",
                # The rows are ids with labels already: drills and answers put loss on a few tokens only.
                dataset_kwargs={"skip_prepare_dataset": True},
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=min(50, num_steps // 10),
                adam_beta2=0.98,
                weight_decay=0.01,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                logging_steps=25,
                save_strategy="no",
                report_to="none",
                seed=seed,
            ),
            train_dataset=Dataset.from_list(make_rows(tokenizer, num_steps, seed)),
            processing_class=tokenizer,
        )
        trainer.train()
    # The trainer turns the cache off in the configuration, which would be saved with the model.
    model.config.use_cache = True


def save(model: "Qwen2ForCausalLM", tokenizer: "Qwen2Tokenizer", output_dir: str | Path) -> None:
    """Write the model folder; an old one at the same path gives way only when the new one is complete."""
    output_dir = Path(output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    staging = output_dir.with_name(output_dir.name + ".new")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    # safetensors writes for the owner alone; an installed package is read by others.
    (staging / "model.safetensors").chmod(0o644)
    shutil.rmtree(output_dir, ignore_errors=True)
    staging.rename(output_dir)


def sample(
    model: "Qwen2ForCausalLM", tokenizer: "Qwen2Tokenizer", prompts: list[list[dict[str, str]]], temperature: float
) -> list[list[int]]:
    """Return one completion per prompt as token ids, end-of-turn token included; temperature 0 decodes greedily."""
    import torch

    completions = []
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    for start in range(0, len(prompts), EVALUATION_BATCH_SIZE):
        batch = tokenizer.apply_chat_template(
            prompts[start : start + EVALUATION_BATCH_SIZE],
            add_generation_prompt=True,
            padding=True,
            tokenizer_kwargs={"padding_side": "left"},
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad():
            output = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, **how)
        for ids in output[:, batch["input_ids"].shape[1] :].tolist():
            end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
            completions.append(ids[:end])
    return completions


def episode_texts(text: str) -> list[str]:
    """Return the texts between the tags of well-formed episodes."""
    return [match[2] for match in re.finditer(r"<episode_(\d+)>([^<]*)</episode_\1>", text)]


def is_well_formed(text: str) -> bool:
    """Return whether `text`, with its end-of-turn token, has ordered episodes, a closed thought and a boxed number."""
    match = re.fullmatch(r"<think>(.*)</think>\\boxed\{\d+\}<\|im_end\|>", text, re.DOTALL)
    if match is None:
        return False
    tagged = (f"<episode_{i}>{episode}</episode_{i}>" for i, episode in enumerate(episode_texts(text), start=1))
    return match[1] == "".join(tagged)


def evaluate(
    model: "Qwen2ForCausalLM", tokenizer: "Qwen2Tokenizer", size: int, seed: int, temperature: float
) -> list[dict[str, float]]:
    """
    Measure the model on held-out questions.

    Returns:
        `list[dict[str, float]]`: one row per tier and one for all (`tier` 0), with the shares `accuracy` and
        `well_formed` of the completions, their mean number of `tokens`, the share `necessary` of those tokens outside
        redundant episodes, and `minimal`, the mean number of tokens that the questions need.
    """
    import torch

    torch.manual_seed(seed)
    model.eval()
    questions = make_dataset(size, seed, split="test")
    completions = sample(model, tokenizer, list(questions["prompt"]), temperature)
    measured = []
    for row, ids in zip(questions, completions, strict=True):
        text = tokenizer.decode(ids)
        redundant = [episode for episode in episode_texts(text) if not is_necessary(episode)]
        shortest = draw_trace(random.Random(0), question_numbers(row["prompt"][0]["content"]), 0.0, 0.0)
        measured.append(
            {
                "tier": row["tier"],
                "accuracy": text.endswith("\\boxed{" + row["answer"] + "}<|im_end|>"),
                "well_formed": is_well_formed(text),
                "tokens": len(ids),
                "necessary": len(ids) - sum(len(tokenizer.encode(episode)) + 2 for episode in redundant),
                "minimal": len(tokenizer.encode(trace_text(shortest))) + 1,
            }
        )
    summary = []
    for tier in [*TIERS, 0]:
        chosen = [one for one in measured if tier in (0, one["tier"])]
        means = {key: sum(one[key] for one in chosen) / len(chosen) for key in chosen[0]}
        summary.append(means | {"tier": tier, "necessary": means["necessary"] / means["tokens"]})
    return summary


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(description="Make the tiny base model from nothing.")
    parser.add_argument("--output_dir", default=str(Path(__file__).parent.parent / "tiny" / "model"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_steps", type=int, default=1100)
    parser.add_argument("--learning_rate", type=float, default=2.0e-3)
    parser.add_argument("--width", type=int, default=128, help=f"hidden width, a multiple of {2 * HEAD_WIDTH}")
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--eval_size", type=int, default=512, help="held-out questions measured at the end; 0: none")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Build, train, save and measure the model."""
    args = make_parser().parse_args(argv)
    if args.width < 2 * HEAD_WIDTH or args.width % (2 * HEAD_WIDTH):
        raise ValueError(f"got --width {args.width}; set a multiple of {2 * HEAD_WIDTH}")
    if args.eval_size != 0 and args.eval_size < len(TIERS):
        raise ValueError(f"got --eval_size {args.eval_size}; set 0 or at least {len(TIERS)}, one question per tier")
    import torch

    # The order of a parallel sum depends on the number of threads, and with it the last bits of the weights.
    torch.set_num_threads(2)
    tokenizer = build_tokenizer(args.seed)
    model = build_model(tokenizer, args.width, args.num_layers, args.seed)
    train(model, tokenizer, args.max_steps, args.learning_rate, args.seed)
    save(model, tokenizer, args.output_dir)
    print(f"{model.num_parameters()} parameters, {len(tokenizer)} tokens, saved to {args.output_dir}")  # noqa: T201
    for temperature in (1.0, 0.0) if args.eval_size else ():
        for row in evaluate(model, tokenizer, args.eval_size, args.seed, temperature):
            tier = f"tier {row['tier']}" if row["tier"] else "all   "
            print(  # noqa: T201
                f"temperature {temperature:g} {tier}: accuracy {row['accuracy']:.3f}, {row['tokens']:.1f} tokens, "
                f"{row['minimal']:.1f} needed, share of necessary tokens {row['necessary']:.2f}, "
                f"well-formed {row['well_formed']:.3f}"
            )


if __name__ == "__main__":
    main()
