"""
Procedural tasks of the optional package reasoning-gym, each with a verifier of its own.

A row's column `reasoning_task` is the text `<name>/<tier>/<seed>/<number>/<checksum>`, from which the task is made anew
where its verifier is wanted.
"""

import functools
import zlib
from collections.abc import Sequence
from typing import Any

from l2t_trl.data.generated import REASONING
from l2t_trl.data.registry import nearest
from l2t_trl.errors import UserError


TIERS = (1, 2, 3, 4)
# Questions that a seed has. Some generators make a list of that length first.
SIZE = 200_000
# reasoning-gym adds seed and number of a question: so far apart, those of two seeds do not overlap.
SEED_STRIDE = 1_000_000
# As in the arithmetic world, one question in ten is held out.
TEST_SHARE_INVERSE = 10
# Tasks that draw from sets of texts, which every Python process orders in its own way (seen in reasoning-gym 0.1.25).
NOT_REPRODUCIBLE = ("isomorphic_strings", "polynomial_multiplication", "ransom_note")
# Questions tried for each that is wanted, before it is said that there are no more.
MAX_TRIES = 100


def task_name(name: str) -> str:
    """
    Return NAME of `reasoning_gym:NAME`.

    Raises:
        UserError: if the package is not installed or has no such task.
    """
    names = _package().factory.DATASETS
    task = name.removeprefix(REASONING).removeprefix(":")
    # NAME is what lists of data sets show.
    if task in ("", "NAME"):
        raise UserError(f"{name}: name a task, as in {REASONING}:chain_sum. There are {', '.join(sorted(names))}.")
    if task not in names:
        raise UserError(f"{name}: reasoning-gym has no task {task!r}.{nearest(task, names)}")
    if task in NOT_REPRODUCIBLE:
        raise UserError(
            f"{name}: reasoning-gym makes other questions of this task in every process, so that answers could not be "
            "judged. Take another task."
        )
    return task


def make_rows(
    name: str, size: int, seed: int, tiers: Sequence[int] | None, split: str, is_exact: bool = True
) -> list[dict[str, Any]]:
    """
    Make questions, the tiers in turn.

    Args:
        name (`str`):
            `reasoning_gym:NAME`.
        size (`int`):
            Number of questions; all differ.
        seed (`int`):
            Equal seeds give equal rows.
        tiers (`Sequence[int]`, *optional*):
            Tiers among 1 to 4: tier k is level k - 1 of the task's curriculum. By default those that it has; a task
            without curriculum has rows without tier.
        split (`str`):
            `"train"` or `"test"`; a question belongs to one of them, whatever the seed.
        is_exact (`bool`, *optional*, defaults to `True`):
            Whether fewer questions than `size` are a mistake.

    Returns:
        `list[dict]`: rows with `id`, `question`, `answer`, `reasoning_task` and, where there are tiers, `tier`.

    Raises:
        UserError: if the package is missing, the task unknown, or does not make that many questions.
    """
    task = task_name(name)
    has = available_tiers(task)
    if tiers and not set(tiers) <= set(has):
        raise UserError(f"{name}: got tiers={list(tiers)}; it has {list(has) or 'no tiers'}.")
    levels = [str(tier) for tier in tiers or has] or ["-"]
    rows: dict[str, dict[str, Any]] = {}
    for index in range(min(SIZE, MAX_TRIES * max(size, 50))):
        level = levels[len(rows) % len(levels)]
        entry = _entry(task, level, seed, index)
        if entry is None or entry["question"] in rows:
            continue
        checksum = zlib.crc32(entry["question"].encode())
        if (checksum % TEST_SHARE_INVERSE == 0) != (split == "test"):
            continue
        key = f"{task}/{level}/{seed}/{index}/{checksum}"
        row = {"id": key, "question": entry["question"], "answer": entry["answer"], "reasoning_task": key}
        rows[row["question"]] = row if level == "-" else {**row, "tier": int(level)}
        if len(rows) == size:
            return list(rows.values())
    if rows and not is_exact:
        return list(rows.values())
    raise UserError(
        f"{name} makes only {len(rows)} different {split} questions, {size} are wanted; set a smaller {split}_size."
    )


def available_tiers(task: str) -> tuple[int, ...]:
    """Return the tiers of a task: as many as its curriculum has levels, 4 at most; none without a curriculum."""
    curricula = _package().factory.CURRICULA
    if task not in curricula:
        return ()
    attributes = curricula[task]().attributes.values()
    return TIERS[: max((len(attribute.levels) for attribute in attributes), default=0)]


def is_solved(key: str, given: str) -> bool | None:
    """
    Return whether `given` solves a task, by its own verifier, which must give the full score.

    Args:
        key (`str`): value of the column `reasoning_task`.
        given (`str`): the answer alone; some verifiers read the first number that they find.

    Returns:
        `bool` or `None`: `None` if the task cannot be made anew as it was.
    """
    task, level, seed, index, checksum = key.split("/")
    entry = _entry(task, level, int(seed), int(index))
    if entry is None or zlib.crc32(entry["question"].encode()) != int(checksum):
        return None
    return float(_dataset(task, level, int(seed)).score_answer(given, entry)) == 1.0


def _entry(task: str, level: str, seed: int, index: int) -> dict[str, Any] | None:
    """Return one question of a task, or `None` if the generator finds none for this number."""
    dataset = _dataset(task, level, seed)
    try:
        return dataset[index]
    except (ValueError, AssertionError, RuntimeError):
        return None


@functools.lru_cache(maxsize=64)
def _dataset(task: str, level: str, seed: int):
    package = _package()
    settings = {}
    try:
        if level != "-":
            from reasoning_gym.coaching.base_curriculum import DefaultCurriculumContext, RangeAttributeMode

            curriculum = package.factory.CURRICULA[task]()
            curriculum.set_global_level(int(level) - 1)
            # Of that level alone; by default easier ones would be mixed in.
            context = DefaultCurriculumContext(mode=RangeAttributeMode.UPPER_BOUND)
            settings = dict(vars(curriculum.generate_configuration(context=context)))
        return package.create_dataset(task, **{**settings, "seed": seed * SEED_STRIDE, "size": SIZE})
    except (ValueError, AssertionError, TypeError) as error:
        raise UserError(f"{REASONING}:{task}: reasoning-gym cannot make tier {level} of it ({error}).") from error


def _package():
    try:
        import reasoning_gym
        import reasoning_gym.factory
    except ImportError as error:
        raise UserError(
            f"{REASONING} tasks need the package reasoning-gym ({error}): pip install reasoning-gym."
        ) from error
    return reasoning_gym
