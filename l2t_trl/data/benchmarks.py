"""The benchmarks that models are evaluated on, by name."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from l2t_trl.data import humaneval
from l2t_trl.errors import UserError


BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Benchmark:
    """
    A set of questions and how their completions are judged.

    Attributes:
        name (`str`): as users write it.
        num_rows (`int`): number of questions.
        load (`Callable[[], Sequence[dict]]`): reads the rows, from the Hub or `L2T_DATA_ROOT`, each with `id` (text),
            `question`, `answer` (text, `None` for code) and, where the benchmark has tiers, `tier`.
        judge (`Callable[[str, dict], bool | None]`): whether a completion of a row is right; `None` if it cannot be told.
        instruction (`str`): text appended to every question behind a line break.
    """

    name: str
    num_rows: int
    load: Callable[[], Sequence[dict[str, Any]]]
    judge: Callable[[str, dict[str, Any]], bool | None]
    instruction: str = BOXED_INSTRUCTION


def _load(hub_id: str, config: str | None, split: str) -> Callable[[], list[dict[str, Any]]]:
    def load() -> list[dict[str, Any]]:
        from l2t_trl.data.loading import SOURCES, read_rows

        rows = read_rows(hub_id, config, split)
        if rows is None:
            raise UserError(f"{hub_id} has no split {split!r}.")
        source = SOURCES[hub_id]
        return [
            {"id": str(index), "question": row[source.question], "answer": source.extract(str(row[source.answer]))}
            for index, row in enumerate(rows)
        ]

    return load


def judge_answer(text: str, row: dict[str, Any]) -> bool | None:
    """Whether the final answer of a completion is the gold answer of its row."""
    from l2t_trl.rewards import accuracy

    (verdict,) = accuracy([text], [row["answer"]])
    return None if verdict is None else verdict == 1.0


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("aime24", 30, _load("HuggingFaceH4/aime_2024", None, "train"), judge_answer),
        Benchmark("amc23", 40, _load("math-ai/amc23", None, "test"), judge_answer),
        Benchmark("math500", 500, _load("HuggingFaceH4/MATH-500", None, "test"), judge_answer),
        Benchmark("minerva", 272, _load("math-ai/minervamath", None, "test"), judge_answer),
        Benchmark("gsm8k", 1319, _load("openai/gsm8k", "main", "test"), judge_answer),
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
