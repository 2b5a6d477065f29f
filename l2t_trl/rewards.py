"""Outcome rewards that TRL lacks. Their signatures are those of TRL's `reward_funcs`."""

import importlib
import os
import re
import sys
from collections.abc import Callable

from l2t_trl.answers import THINK_CLOSE, boxed_answer, counts, judge_texts
from l2t_trl.answers import answer_key as answer_key
from l2t_trl.answers import final_answer as final_answer
from l2t_trl.errors import UserError


# Columns of a data set that `accuracy` reads.
ANSWER_COLUMNS = ("answer", "accepted_answers", "reasoning_task")


def accuracy(
    completions: list,
    answer: list[str],
    accepted_answers: list[list[str] | None] | None = None,
    reasoning_task: list[str | None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs,
) -> list[float | None]:
    r"""
    1 for completions whose final answer is the gold answer, else 0.

    The final answer is the last `\boxed{}` behind the last `</think>`, or of the whole text if there is no `</think>`;
    where nothing is boxed, what follows the last `####`. [`l2t_trl.answers`] compares the two.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Texts or chat messages.
        answer (`list[str]`):
            Gold answers, as text or LaTeX without `$`.
        accepted_answers (`list[list[str] | None]`, *optional*):
            Where a question has several right answers: all of them.
        reasoning_task (`list[str | None]`, *optional*):
            Where right answers cannot be listed: the reasoning-gym task whose verifier decides.
        log_metric (`Callable`, *optional*):
            TRL's; told how many comparisons of this call took too long or failed, if any did.

    Returns:
        `list[float | None]`: `None` where the gold answer is empty, or neither met literally nor understood.
    """
    golds = answer
    if accepted_answers is not None:
        golds = [several or gold for gold, several in zip(answer, accepted_answers, strict=True)]
    before = counts()
    verdicts = judge_texts([_text(completion) for completion in completions], golds, reasoning_task)
    if log_metric is not None:
        for name, count in counts().items():
            if count > before[name]:
                log_metric(f"answers/{name}", count - before[name])
    return [None if verdict is None else float(verdict) for verdict in verdicts]


def episode_format(completions: list, **kwargs) -> list[float]:
    r"""
    Share, in thirds, of the form that is kept: `</think>` once; `<episode_k>` tags opened and closed in order from 1;
    a closed `\boxed{}` behind the thinking. For a warm start; it does not look at the answer.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Texts or chat messages.

    Returns:
        `list[float]`
    """
    return [_format_share(_text(completion)) for completion in completions]


def code(completions: list, tests: list[str | None] | None = None, **kwargs) -> list[float | None]:
    """
    1 for completions whose code passes its row's tests, else 0.

    The code is that of the last Python block behind the last `</think>`, or all that stands there. It runs in the
    sandbox, several programs at a time (docs/sandbox.md).

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Texts or chat messages.
        tests (`list[str | None]`, *optional*):
            Python that raises an error if the code is wrong.

    Returns:
        `list[float | None]`: `None` where a row has no tests, or none that are Python.

    Raises:
        UserError: if programs cannot be isolated on this machine.
    """
    from l2t_trl.evaluation.code import run_tests

    verdicts = run_tests([_text(completion) for completion in completions], tests or [None] * len(completions))
    return [None if verdict is None else float(verdict) for verdict in verdicts]


REWARDS = {"accuracy": accuracy, "format": episode_format, "code": code}


def get_reward_funcs(names: list[str]) -> list[Callable]:
    """
    Return the reward functions that `names` name.

    Args:
        names (`list[str]`):
            Names of [`REWARDS`], or dotted paths of functions, looked up in the working folder, too.

    Raises:
        UserError: if there is no such function.
    """
    functions = []
    for name in names:
        if name in REWARDS:
            functions.append(REWARDS[name])
            continue
        module_name, _, function_name = name.rpartition(".")
        if not module_name:
            raise UserError(
                f"reward_funcs: {name!r} is none of {', '.join(REWARDS)}, nor a dotted path to a function."
            )
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            function = getattr(importlib.import_module(module_name), function_name)
        except (ImportError, AttributeError) as error:
            raise UserError(f"reward_funcs: {name} cannot be imported ({error}).") from error
        if not callable(function):
            raise UserError(f"reward_funcs: {name} is not a function.")
        functions.append(function)
    return functions


def _format_share(text: str) -> float:
    thinking, mark, conclusion = text.partition(THINK_CLOSE)
    is_closed = bool(mark) and THINK_CLOSE not in conclusion
    tags = re.findall(r"<(/?)episode_(\d+)>", text)
    ordered = [tag for k in range(1, len(tags) // 2 + 1) for tag in (("", str(k)), ("/", str(k)))]
    is_ordered = bool(tags) and tags == ordered and len(re.findall(r"</?episode_\d+>", thinking)) == len(tags)
    is_boxed = boxed_answer(text) is not None
    return (is_closed + is_ordered + is_boxed) / 3


def _text(completion: str | list[dict]) -> str:
    if isinstance(completion, str):
        return completion
    return "".join(message.get("content") or "" for message in completion)
