"""A model on a benchmark: completions that are written as they come, and the numbers that follow from them."""

import hashlib
import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .evaluate import EvaluatedCompletion, Evaluation
from .figures import budgets_up_to
from .journal import Journal, fingerprint
from .sampling import tokenize
from .voting import sizes_up_to


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data.benchmarks import Benchmark
    from .engines import Engine


COMPLETIONS = "completions.jsonl"
# Places of a weights file that its fingerprint is taken from, and bytes at each: enough to tell two trainings apart.
SAMPLED_PLACES, SAMPLED_BYTES = 64, 2**16


@dataclass(frozen=True)
class Sampling:
    """
    How completions are sampled.

    Attributes:
        samples (`int`): completions per question.
        max_tokens (`int`): longest completion.
        temperature (`float`): 0 decodes greedily.
        top_p (`float`): share of the probability that is sampled from.
        seed (`int`): seed of all random numbers.
        batch_size (`int`): completions that are made, judged and written together.
    """

    samples: int
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    batch_size: int


@dataclass(frozen=True)
class Task:
    """
    The questions of a benchmark as a model sees them.

    Attributes:
        benchmark ([`~l2t_trl.data.benchmarks.Benchmark`]): the benchmark.
        rows (`list[dict[str, Any]]`): its rows, or the first of them.
        prompts (`list[list[int]]`): token ids of each.
    """

    benchmark: "Benchmark"
    rows: list[dict[str, Any]]
    prompts: list[list[int]]

    @property
    def name(self) -> str:
        """Name of the benchmark."""
        return self.benchmark.name

    @property
    def has_answers(self) -> bool:
        """Whether its questions have answers in words, which can be asked for and voted on."""
        return all(row["answer"] is not None for row in self.rows)

    def fingerprint(self) -> str:
        """Return a text that differs where questions, answers or prompts do."""
        return fingerprint(
            json.dumps([row, ids], default=str).encode() for row, ids in zip(self.rows, self.prompts, strict=True)
        )


def prepare(
    benchmark: "Benchmark",
    tokenizer: "PreTrainedTokenizerBase",
    limit: int | None = None,
    system_prompt: str | None = None,
    instruction: str | None = None,
) -> Task:
    """
    Read a benchmark's rows and make their prompts.

    Args:
        benchmark ([`~l2t_trl.data.benchmarks.Benchmark`]):
            The benchmark.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's; without a chat template the prompts are plain texts.
        limit (`int`, *optional*):
            Only so many rows, the first ones.
        system_prompt (`str`, *optional*):
            System message in front of every question.
        instruction (`str`, *optional*):
            Text behind every question instead of the benchmark's.

    Returns:
        [`Task`]

    Raises:
        UserError: if the rows cannot be had, or two have one id.
    """
    from types import SimpleNamespace

    from ..data.loading import make_prompt

    rows = list(benchmark.load())
    if len({row["id"] for row in rows}) < len(rows):
        raise UserError(f"benchmark {benchmark.name}: two rows have the same id.")
    rows = rows[:limit]
    instruction = benchmark.instruction if instruction is None else instruction
    texts = SimpleNamespace(system_prompt=system_prompt, instruction=instruction)
    is_chat = tokenizer.chat_template is not None
    prompts = [tokenize(tokenizer, make_prompt(row["question"], texts, is_chat)) for row in rows]
    return Task(benchmark, rows, prompts)


def sample_task(
    task: Task, tokenizer: "PreTrainedTokenizerBase", engine: Callable[[], "Engine"], sampling: Sampling, folder: Path
) -> list[dict[str, Any]]:
    """
    Sample and judge completions of every question, as far as the folder does not hold them yet.

    Args:
        task ([`Task`]):
            The questions.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        engine (`Callable[[], Engine]`):
            Gives the engine, which is asked for only where something is left to do.
        sampling ([`Sampling`]):
            How to sample.
        folder (`Path`):
            Holds `completions.jsonl`: a line per completion with `id`, `sample`, `text`, `ids`, `tokens` (their
            number), `is_truncated` and `is_correct` (`null` if it cannot be told).

    Returns:
        `list[dict[str, Any]]`: the lines.

    Raises:
        UserError: if the file cannot be used or written.
    """
    from tqdm.auto import tqdm

    index_of = {row["id"]: index for index, row in enumerate(task.rows)}
    # Longest prompts first: batches hold prompts of like length, and what does not fit in memory fails at once.
    order = sorted(range(len(task.rows)), key=lambda index: -len(task.prompts[index]))
    keys = [{"id": task.rows[index]["id"], "sample": sample} for index in order for sample in range(sampling.samples)]
    with (
        Journal(folder / COMPLETIONS, keys, sampling.batch_size, _compact) as journal,
        tqdm(total=len(keys), initial=len(journal.done), desc=task.name, unit="completion", dynamic_ncols=True) as bar,
    ):
        tally = _Tally(journal.done)
        for batch in journal.batches:
            indices = [index_of[key["id"]] for key in batch]
            completions = engine().complete(
                [task.prompts[index] for index in indices],
                [seed_of(sampling.seed, task.name, key["id"], key["sample"]) for key in batch],
                sampling.max_tokens,
                sampling.temperature,
                sampling.top_p,
            )
            texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
            verdicts = task.benchmark.judge(texts, [task.rows[index] for index in indices])
            lines = [
                key
                | {
                    "text": text,
                    "tokens": len(ids),
                    "is_truncated": ids[-1] not in engine().end_ids,
                    "is_correct": verdict,
                    "ids": ids,
                }
                for key, ids, text, verdict in zip(batch, completions, texts, verdicts, strict=True)
            ]
            journal.add(lines)
            tally.add(lines)
            bar.update(len(batch))
            bar.set_postfix(tally.shown())
        return journal.done


def _compact(line: dict[str, Any]) -> dict[str, Any]:
    """Return a line as it is kept in memory: 4 bytes per token, where a list of numbers takes ten times as much."""
    return line | {"ids": array("i", line["ids"])}


class _Tally:
    """What the progress bar shows, added up as lines come."""

    def __init__(self, lines: Sequence[dict[str, Any]]):
        self.lines = self.tokens = self.judged = self.right = 0
        self.add(lines)

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        self.lines += len(lines)
        self.tokens += sum(line["tokens"] for line in lines)
        self.judged += sum(line["is_correct"] is not None for line in lines)
        self.right += sum(line["is_correct"] is True for line in lines)

    def shown(self) -> dict[str, str]:
        return {
            "accuracy": f"{self.right / self.judged:.3f}" if self.judged else "-",
            "tokens": f"{self.tokens / self.lines:.0f}",
        }


def evaluation_of(task: Task, lines: Sequence[dict[str, Any]], sampling: Sampling) -> Evaluation:
    """Return the evaluation that stored completions make up."""
    index_of = {row["id"]: index for index, row in enumerate(task.rows)}
    completions = [
        EvaluatedCompletion(
            question=index_of[line["id"]],
            tier=task.rows[index_of[line["id"]]].get("tier"),
            text=line["text"],
            tokens=line["tokens"],
            is_correct=line["is_correct"],
            is_truncated=line["is_truncated"],
        )
        for line in lines
    ]
    # Python's sort is stable, so the samples of a question keep their order.
    completions.sort(key=lambda one: one.question)
    how = (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.samples, sampling.seed)
    return Evaluation(completions, *how)


def metrics_of(evaluation: Evaluation, has_answers: bool) -> dict[str, Any]:
    """
    Return an evaluation's numbers, of all questions and by tier, as JSON can hold them.

    Args:
        evaluation ([`Evaluation`]):
            The judged completions.
        has_answers (`bool`):
            Whether answers can be voted on.
    """

    def numbers(part: Evaluation) -> dict[str, Any]:
        sizes = sizes_up_to(evaluation.num_samples)
        return part.summary() | {
            "pass_at": {str(k): part.pass_at(k) for k in sizes},
            "majority_at": {str(k): part.majority_at(k) for k in sizes} if has_answers else {},
        }

    tiers = {str(tier): numbers(part) for tier, part in evaluation.tiers().items()}
    return numbers(evaluation) | {"tiers": tiers}


def budget_curve(evaluation: Evaluation) -> dict[str, Any]:
    """Return the share of completions that are correct and end within a token budget, by budget."""
    budgets = budgets_up_to(max(one.tokens for one in evaluation.completions))
    return {"budgets": budgets, "accuracy": evaluation.accuracy_at_budget(budgets)}


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """
    Return a Markdown table, one line per benchmark and tier.

    Args:
        results (`Sequence[dict[str, Any]]`):
            What `metrics.json` of each benchmark holds.
    """
    lines = [
        "| benchmark | questions | samples | pass@1, % (95 % interval) | pass@k, % | maj@k, % | tokens, mean | median "
        "| tokens per correct answer | truncated, % |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        parts = [(result["benchmark"], result)]
        parts += [(f"{result['benchmark']}, tier {tier}", part) for tier, part in result["tiers"].items()]
        lines += [_table_line(name, part, result["settings"]["samples"]) for name, part in parts]
    notes = [
        f"{result['benchmark']}: {result['num_unjudged']} completions could not be judged and are left out."
        for result in results
        if result["num_unjudged"]
    ]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def seed_of(*parts: Any) -> int:
    """Return a seed of 63 bits that depends on all parts, on every machine alike."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8]) >> 1


def model_fingerprint(path: str) -> str | None:
    """Return a text that differs where two local models do, from their settings and samples of their weights."""
    if not Path(path).is_dir():
        return None

    def parts():
        for file in sorted(Path(path).iterdir()):
            if file.suffix == ".safetensors":
                size = file.stat().st_size
                with open(file, "rb") as data:
                    for place in range(SAMPLED_PLACES):
                        data.seek(size * place // SAMPLED_PLACES)
                        yield data.read(SAMPLED_BYTES)
            elif file.name in ("config.json", "adapter_config.json", "tokenizer.json", "chat_template.jinja"):
                yield file.read_bytes()

    return fingerprint(parts())


def settings_of(sampling: Sampling, task: Task, **others: Any) -> dict[str, Any]:
    """Return everything that the completions depend on."""
    return (
        others | {"benchmark": task.name, "questions": len(task.rows), "data": task.fingerprint()} | asdict(sampling)
    )


def _table_line(name: str, part: dict[str, Any], samples: int) -> str:
    interval = part["accuracy_interval"]
    shown = "" if interval is None else f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
    k = str(samples)
    cells = [
        name,
        str(part["num_questions"]),
        k,
        _percent(part["accuracy"]) + shown,
        f"{_percent(part['pass_at'][k])} (k = {k})",
        f"{_percent(part['majority_at'][k])} (k = {k})" if part["majority_at"] else "-",
        f"{part['mean_tokens']:.1f}",
        f"{part['median_tokens']:.1f}",
        "-" if part["tokens_per_correct"] is None else f"{part['tokens_per_correct']:.1f}",
        _percent(part["truncated_share"]),
    ]
    return f"| {' | '.join(cells)} |"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
