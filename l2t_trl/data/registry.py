"""The data sets that are known by name: where they lie, what their columns mean, and which rows are left out."""

import difflib
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from l2t_trl.answers import last_box
from l2t_trl.data.generated import GENERATED
from l2t_trl.errors import UserError


# Column with all right answers of a question that has several; `answer` is the first.
ACCEPTED = "accepted_answers"
# The quartiles of the difficulty of all 4,428 rows of Omni-MATH: tier 1 is what is not above 4.
OMNI_MATH_EDGES = (4, 5, 6)
# The first AIME that models are evaluated on.
FIRST_HELD_OUT_YEAR = 2024
PROOF = re.compile(r"\b(prove|show|demonstrate|verify)\s+that\b|\bprove\b", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """
    A data set of questions with gold answers, or with tests as MBPP has them.

    Attributes:
        name (`str`): short name.
        hub_id (`str`): its repository on the Hub, and its folder under `L2T_DATA_ROOT`.
        question (`str`): column of the question.
        answer (`str`, *optional*): column from which `golds` takes the gold answer; `None` where rows have tests instead
            ([`l2t_trl.data.code`], which makes a column `question` that shows them).
        splits (`Mapping[str, tuple[str, int]]`): for each split, the Hub's name of it and its number of rows.
        licence (`str`): as the data set's card has it; `"not stated"` where it has none.
        config (`str`, *optional*): configuration on the Hub.
        golds (`Callable[[Any], str | list[str] | None]`): gold answer, or all accepted ones, from the answer column.
        id_column (`str`, *optional*): column that tells the rows apart; by default their number does.
        extra (`tuple[str, ...]`): columns that resolved rows keep.
        tier (`Callable[[Mapping], int | None]`, *optional*): difficulty tier of a row.
        refuse (`Callable[[Mapping], str | None]`): why a row is left out, if it is.
        sample (`int`, *optional*): rows that are drawn, the same ones each time, rather than all.
        is_decontaminated (`bool`): whether rows that resemble a question of a benchmark are left out.
        is_benchmark (`bool`): whether models are evaluated on it.
    """

    name: str
    hub_id: str
    question: str
    answer: str | None
    splits: Mapping[str, tuple[str, int]]
    licence: str
    config: str | None = None
    golds: Callable[[Any], str | list[str] | None] = field(default=lambda value: plain_gold(value))
    id_column: str | None = None
    extra: tuple[str, ...] = ()
    tier: Callable[[Mapping[str, Any]], int | None] | None = None
    refuse: Callable[[Mapping[str, Any]], str | None] = field(default=lambda row: None)
    sample: int | None = None
    is_decontaminated: bool = False
    is_benchmark: bool = False


def plain_gold(value: Any) -> str | None:
    """Return a gold answer as text; AMC's are whole numbers kept as 27.0."""
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def gsm8k_answer(solution: str) -> str | None:
    """Return the number behind the last `####` of a GSM8K solution without thousands commas, or `None` without one."""
    _, mark, answer = str(solution).rpartition("####")
    return answer.strip().replace(",", "") if mark else None


def aime_golds(answer: Any) -> str | list[str] | None:
    """Return the gold answer of an AIME question; of 2022-II-8, "080 or 081 (both were accepted)", the two."""
    text = plain_gold(answer)
    both = re.fullmatch(r"(\d+) or (\d+)\b.*", text or "")
    return list(both.groups()) if both else text


def omni_math_tier(row: Mapping[str, Any]) -> int | None:
    """Return the tier, 1 to 4, of a row of Omni-MATH: up to difficulty 4, up to 5, up to 6, above."""
    difficulty = row.get("difficulty")
    return None if difficulty is None else bisect_left(OMNI_MATH_EDGES, float(difficulty)) + 1


def after_held_out_year(row: Mapping[str, Any]) -> str | None:
    """Refuse questions of the AIME that models are evaluated on."""
    return f"Year {FIRST_HELD_OUT_YEAR} or later" if int(row["Year"]) >= FIRST_HELD_OUT_YEAR else None


def without_answer(row: Mapping[str, Any]) -> str | None:
    """Refuse rows whose answer is missing or empty."""
    return None if plain_gold(row["answer"]) else "no answer"


def without_boxed_answer(row: Mapping[str, Any]) -> str | None:
    r"""Refuse proofs and rows of NuminaMath whose solution ends in no `\boxed{}`, which holds the answer."""
    if PROOF.search(row["problem"] or ""):
        return "a proof"
    return None if last_box(row["solution"] or "") else "no \\boxed answer"


# What one entry says is said by its data set's card, unless a comment has another source.
SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "aime24",
            "HuggingFaceH4/aime_2024",
            "problem",
            "answer",
            {"test": ("train", 30)},
            "not stated",
            id_column="id",
            is_benchmark=True,
        ),
        Source(
            "aime25",
            "math-ai/aime25",
            "problem",
            "answer",
            {"test": ("test", 30)},
            "not stated",
            id_column="id",
            is_benchmark=True,
        ),
        Source(
            "amc23",
            "math-ai/amc23",
            "question",
            "answer",
            {"test": ("test", 40)},
            "not stated",
            id_column="id",
            is_benchmark=True,
        ),
        Source(
            "math500",
            "HuggingFaceH4/MATH-500",
            "problem",
            "answer",
            {"test": ("test", 500)},
            "MIT (of MATH)",
            id_column="unique_id",
            extra=("subject", "level"),
            is_benchmark=True,
        ),
        Source(
            "minerva",
            "math-ai/minervamath",
            "question",
            "answer",
            {"test": ("test", 272)},
            "not stated (MIT OpenCourseWare)",
            is_benchmark=True,
        ),
        Source(
            "omni-math",
            "KbsdJames/Omni-MATH",
            "problem",
            "answer",
            {"test": ("test", 4428)},
            "Apache-2.0",
            extra=("difficulty", "source"),
            tier=omni_math_tier,
            is_benchmark=True,
        ),
        Source(
            "gsm8k",
            "openai/gsm8k",
            "question",
            "answer",
            {"train": ("train", 7473), "test": ("test", 1319)},
            "MIT",
            config="main",
            golds=gsm8k_answer,
            is_benchmark=True,
        ),
        # The paper's 919 questions; its "1989-2023" is a slip, 1983 to 2023 has that number.
        Source(
            "aime-919",
            "di-zhang-fdu/AIME_1983_2024",
            "Question",
            "Answer",
            {"train": ("train", 919)},
            "MIT",
            golds=aime_golds,
            id_column="ID",
            extra=("Year",),
            refuse=after_held_out_year,
        ),
        # The paper says "a random sample", with neither seed nor filter: these are ours.
        Source(
            "numinamath-4k",
            "AI-MO/NuminaMath-CoT",
            "problem",
            "solution",
            {"train": ("train", 4000)},
            "Apache-2.0",
            golds=lambda solution: last_box(str(solution or "")),
            extra=("source",),
            refuse=without_boxed_answer,
            sample=4000,
            is_decontaminated=True,
        ),
        # 6 of its 40,315 rows have no answer.
        Source(
            "deepscaler",
            "agentica-org/DeepScaleR-Preview-Dataset",
            "problem",
            "answer",
            {"train": ("train", 40309)},
            "MIT",
            refuse=without_answer,
        ),
        # Its counts are those of the configuration "full"; "sanitized" has 120 and 257 of the rows.
        Source(
            "mbpp",
            "google-research-datasets/mbpp",
            "question",
            None,
            {"train": ("train", 374), "test": ("test", 500)},
            "CC-BY-4.0",
            config="full",
            id_column="task_id",
            extra=("code",),
        ),
    )
}
BY_HUB_ID = {source.hub_id: source for source in SOURCES.values()}
# Configurations on the Hub where none is asked for.
HUB_CONFIGS = {source.hub_id: source.config for source in SOURCES.values()}


def all_names() -> list[str]:
    """Return the names that `--dataset_name` takes beside paths and Hub ids."""
    return [*SOURCES, *(one.label for one in GENERATED.values() if not one.is_for_eval_only)]


def nearest(name: str, names) -> str:
    """Return a sentence that names the nearest of `names`, or nothing if none is near."""
    close = difflib.get_close_matches(name.lower(), list(names), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def unknown_name(name: str) -> UserError:
    """Return the error for a name that is neither ours nor a path."""
    return UserError(
        f"{name!r} is no known data set.{nearest(name, [*SOURCES, *GENERATED])} Known are {', '.join(all_names())}; "
        "beside these a Hub id (owner/name) or a path can be given."
    )
