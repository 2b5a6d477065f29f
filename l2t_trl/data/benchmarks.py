"""The benchmarks that models are evaluated on, by name."""

import difflib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from l2t_trl.data import humaneval
from l2t_trl.data.registry import ACCEPTED, SOURCES
from l2t_trl.errors import UserError


logger = logging.getLogger(__name__)

BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

ARITHMETIC_ROWS = 300


@dataclass(frozen=True)
class Benchmark:
    """
    A set of questions and how their completions are judged.

    Attributes:
        name (`str`): as users write it.
        num_rows (`int`): number of questions.
        load (`Callable[[], Sequence[dict]]`): reads the rows, from the Hub or `L2T_DATA_ROOT`, each with `id` (text),
            `question`, `answer` (text, `None` for code) and, where there are any, `accepted_answers` and `tier`.
        judge (`Callable[[Sequence[str], Sequence[dict]], list[bool | None]]`): whether completions are right, each with
            its row; `None` if it cannot be told. Several at a time are judged side by side.
        instruction (`str`): text appended to every question behind a line break.
    """

    name: str
    num_rows: int
    load: Callable[[], Sequence[dict[str, Any]]]
    judge: Callable[[Sequence[str], Sequence[dict[str, Any]]], list[bool | None]]
    instruction: str = BOXED_INSTRUCTION


def _load(name: str) -> Callable[[], list[dict[str, Any]]]:
    def load() -> list[dict[str, Any]]:
        from l2t_trl.data.resolving import resolve_split

        loaded = resolve_split(SOURCES[name], "test")
        for note in loaded.notes:
            logger.warning("%s: %s", name, note)
        return loaded.rows

    return load


def load_arithmetic() -> list[dict[str, Any]]:
    """Return held-out questions of the arithmetic world, those that the tiny recipe is measured on."""
    from l2t_trl.data.arithmetic import make_dataset
    from l2t_trl.data.loading import TEST_SEED

    return [
        {"id": str(index), "question": row["prompt"][0]["content"], "answer": row["answer"], "tier": row["tier"]}
        for index, row in enumerate(make_dataset(ARITHMETIC_ROWS, TEST_SEED, split="test"))
    ]


def judge_answers(texts: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[bool | None]:
    """Return for each completion whether its final answer is the gold answer of its row."""
    from l2t_trl.answers import judge_texts

    golds = [row.get(ACCEPTED) or row["answer"] or "" for row in rows]
    return judge_texts(texts, golds, [row.get("reasoning_task") for row in rows])


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("aime24", 30, _load("aime24"), judge_answers),
        Benchmark("aime25", 30, _load("aime25"), judge_answers),
        Benchmark("amc23", 40, _load("amc23"), judge_answers),
        Benchmark("math500", 500, _load("math500"), judge_answers),
        Benchmark("minerva", 272, _load("minerva"), judge_answers),
        Benchmark("omni-math", 4428, _load("omni-math"), judge_answers),
        Benchmark("gsm8k", 1319, _load("gsm8k"), judge_answers),
        Benchmark("arithmetic", ARITHMETIC_ROWS, load_arithmetic, judge_answers, instruction=""),
        Benchmark("humaneval", humaneval.NUM_ROWS, humaneval.load, humaneval.judge, humaneval.INSTRUCTION),
    )
}


def get_benchmark(name: str) -> Benchmark:
    """
    Return the benchmark of a name.

    Raises:
        UserError: if there is none; names the nearest.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    close = difflib.get_close_matches(name.lower(), BENCHMARKS, n=1, cutoff=0.3)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise UserError(f"{name!r} is no benchmark.{hint} There are {', '.join(BENCHMARKS)}.")
