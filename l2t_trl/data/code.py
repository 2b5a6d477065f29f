"""Rows with tests in place of answers, as MBPP has them."""

import ast
import logging
from collections.abc import Sequence
from typing import Any

from l2t_trl.data.checks import list_rows
from l2t_trl.errors import UserError


logger = logging.getLogger(__name__)

TESTS, TEST_LIST = "tests", "test_list"
# Code that runs before the tests: MBPP's, and that of its sanitized part.
SETUP = ("test_setup_code", "test_imports")
# What MBPP asks, in either part.
TASK_COLUMNS = ("text", "prompt")
QUESTION = "{task}\nYour code should pass these tests:\n\n{tests}"


def has_tests(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether a row has tests."""
    return any(column in row for row in rows for column in (TESTS, TEST_LIST))


def with_tests(rows: Sequence[dict[str, Any]], name: str, on_bad_row: str) -> list[dict[str, Any]]:
    """
    Give rows the text column `tests`, and where tests come as MBPP's list a `question` that shows them.

    The function's name stands in MBPP's tests alone, so that the model has to see them.

    Args:
        rows (`Sequence[dict[str, Any]]`):
            Rows with `tests`, or with `test_list`.
        name (`str`):
            Name of the data set.
        on_bad_row (`str`):
            `"stop"` or `"drop"`: what to do if tests are not Python.

    Returns:
        `list[dict[str, Any]]`

    Raises:
        UserError: if rows have tests that are not Python; names them.
    """
    converted = [row_with_tests(row) for row in rows]
    bad = [index for index, row in enumerate(converted) if not is_python(row[TESTS])]
    if not bad:
        return converted
    if on_bad_row == "stop":
        raise UserError(
            f"{name}: {len(bad)} of {len(converted)} rows have tests that are not Python (counted from 0): "
            f"{list_rows(bad)}. Mend them, or set on_bad_row='drop' to leave them out."
        )
    logger.warning("%s: dropped %d rows whose tests are not Python: %s.", name, len(bad), list_rows(bad))
    return [row for index, row in enumerate(converted) if index not in set(bad)]


def is_python(tests: str | None) -> bool:
    """Whether tests can be read; a row without tests has nothing to read."""
    try:
        ast.parse(tests or "")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def row_with_tests(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the text column `tests`, see [`with_tests`]; whether they are Python is not looked at."""
    listed = row.get(TEST_LIST)
    if not isinstance(listed, list):
        tests = row.get(TESTS)
        return {**row, TESTS: "\n".join(map(str, tests)) if isinstance(tests, list) else tests}
    shown = "\n".join(map(str, listed))
    setup = [row.get(column) or "" for column in SETUP]
    setup = ["\n".join(part) if isinstance(part, list) else str(part) for part in setup]
    row = {**row, TESTS: "\n".join([*filter(None, setup), shown])}
    task = next((row[column] for column in TASK_COLUMNS if isinstance(row.get(column), str)), None)
    if task is not None and "question" not in row:
        row["question"] = QUESTION.format(task=task, tests=shown)
    return row
