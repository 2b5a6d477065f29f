"""Code in completions: where it stands, and whether it passes a row's tests."""

import re
from collections.abc import Sequence

from l2t_trl.evaluation.sandbox import Job, shared_sandbox


THINK_CLOSE = "</think>"
PYTHON = ("python", "python3", "py")
# A fence with what it says of its block, the block, and the fence that closes it: a completion that was cut off has none.
BLOCK = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
# Wall time of a program and its tests where no benchmark says another.
TIME_S = 2.0


def extract_code(text: str, function: str | None = None) -> str | None:
    """
    Return the code block of a completion.

    Args:
        text (`str`):
            The completion. Only what stands behind the last `</think>` is read.
        function (`str`, *optional*):
            Function that is asked for: of several blocks the last that defines it counts, if one does. Models like to
            show how to call it in a block of its own.

    Returns:
        `str` or `None`: the last block that is marked as Python, or else the last without a mark; `None` if there is
        neither.
    """
    blocks = BLOCK.findall(text.rpartition(THINK_CLOSE)[2])
    found = [code for mark, code in blocks if mark.lower() in PYTHON] or [code for mark, code in blocks if not mark]
    if function is not None:
        found = [code for code in found if defines(code, function)] or found
    return found[-1] if found else None


def defines(code: str, function: str) -> bool:
    """Whether code has a definition of a function at its top level."""
    return re.search(rf"^(?:async[ \t]+)?def[ \t]+{re.escape(function)}\b", code, re.MULTILINE) is not None


def run_tests(texts: Sequence[str], tests: Sequence[str | None], time_s: float = TIME_S) -> list[bool | None]:
    """
    Run the code of completions against tests, several at a time.

    Args:
        texts (`Sequence[str]`):
            Completions. One without a code block is code as a whole.
        tests (`Sequence[str | None]`):
            Tests of each.
        time_s (`float`, *optional*, defaults to 2.0):
            Wall time of each.

    Returns:
        `list[bool | None]`: `None` where there are no tests, or none that are Python.

    Raises:
        UserError: if programs cannot be isolated on this machine.
    """
    verdicts: list[bool | None] = [None] * len(texts)
    rows = [row for row, test in enumerate(tests) if test and test.strip()]
    jobs = []
    for row in rows:
        code = extract_code(texts[row])
        program = texts[row].rpartition(THINK_CLOSE)[2] if code is None else code
        jobs.append(Job(program, tests[row], time_s=time_s))
    if jobs:
        for row, verdict in zip(rows, shared_sandbox().run_all(jobs), strict=True):
            verdicts[row] = verdict.passed
    return verdicts
