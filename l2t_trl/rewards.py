"""Outcome rewards that TRL lacks. Their signatures are those of TRL's `reward_funcs`."""

import importlib
import logging
import os
import re
import sys
import threading
from collections.abc import Callable

from l2t_trl.errors import UserError


# Whole seconds: math-verify sets an alarm, and a fraction makes it give up at once.
MATH_VERIFY_TIMEOUT_S = 5

THINK_CLOSE = "</think>"
BOXED = "\\boxed"


def accuracy(completions: list, answer: list[str], **kwargs) -> list[float | None]:
    r"""
    1 for completions whose final answer is the gold answer, else 0.

    The final answer is the last `\boxed{}` behind the last `</think>`, or of the whole text if there is no `</think>`.
    Equal texts and equal whole numbers are told at once; all else is left to math-verify.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Texts or chat messages.
        answer (`list[str]`):
            Gold answers, as text or LaTeX without `$`.

    Returns:
        `list[float | None]`: `None` where the gold answer is empty, or neither met literally nor understood.
    """
    return [_is_correct(_text(completion), gold) for completion, gold in zip(completions, answer, strict=True)]


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


def final_answer(text: str) -> str | None:
    r"""
    Return what the last closed `\boxed{}` behind the last `</think>` holds, or `None`.

    Text without `</think>` is searched as a whole. A box that was begun and never closed does not count, nor does an
    earlier one then: the model was about to say something else.
    """
    text = text.rpartition(THINK_CLOSE)[2]
    start = text.rfind(BOXED)
    if start < 0:
        return None
    brace = re.compile(r"\s*\{").match(text, start + len(BOXED))
    if brace is None:
        return None
    depth = 0
    for position in range(brace.end() - 1, len(text)):
        # An escaped brace is a brace of the answer, not of the box.
        if text[position] in "{}" and text[position - 1] != "\\":
            depth += 1 if text[position] == "{" else -1
            if depth == 0:
                return text[brace.end() : position].strip()
    return None


def _is_correct(text: str, gold: str) -> float | None:
    gold = str(gold).strip()
    if not gold:
        return None
    given = final_answer(text)
    if not given:
        return 0.0
    if _normalise(given) == _normalise(gold):
        return 1.0
    numbers = _whole_number(given), _whole_number(gold)
    if None not in numbers:
        return float(numbers[0] == numbers[1])
    return _math_verify(given, gold)


def _math_verify(given: str, gold: str) -> float | None:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # math-verify's time limits are signals, which only the main thread can set.
    timeout = MATH_VERIFY_TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
    config = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    # Unboxed LaTeX is not read as LaTeX: 11\sqrt2 becomes 11.
    parsed_gold = parse(f"\\boxed{{{_spell_out(gold)}}}", config, parsing_timeout=timeout)
    if not parsed_gold:
        return None
    parsed_given = parse(f"\\boxed{{{_spell_out(given)}}}", config, parsing_timeout=timeout)
    return float(verify(parsed_gold, parsed_given, timeout_seconds=timeout))


def _spell_out(answer: str) -> str:
    r"""Write 4.5e33, in which math-verify sees Euler's number, as 4.5 \times 10^{33}."""
    return re.sub(r"^([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d+)$", r"\1 \\times 10^{\2}", answer)


def _normalise(answer: str) -> str:
    answer = answer.strip().strip("$").strip().removesuffix(".")
    return re.sub(r"\s+|\\[!,;: ]|\\left(?![a-z])|\\right(?![a-z])", "", answer).replace("\\dfrac", "\\frac")


def _whole_number(answer: str) -> int | None:
    answer = answer.strip().strip("$").strip()
    # Commas only where thousands have them, so that the pair 1,2 is not 12.
    if re.fullmatch(r"[+-]?(\d+|\d{1,3}(,\d{3})+)(\.0*)?", answer) is None:
        return None
    return int(answer.replace(",", "").split(".")[0])


def _format_share(text: str) -> float:
    thinking, mark, conclusion = text.partition(THINK_CLOSE)
    is_closed = bool(mark) and THINK_CLOSE not in conclusion
    tags = re.findall(r"<(/?)episode_(\d+)>", text)
    ordered = [tag for k in range(1, len(tags) // 2 + 1) for tag in (("", str(k)), ("/", str(k)))]
    is_ordered = bool(tags) and tags == ordered and len(re.findall(r"</?episode_\d+>", thinking)) == len(tags)
    is_boxed = final_answer(text) is not None
    return (is_closed + is_ordered + is_boxed) / 3


def _text(completion: str | list[dict]) -> str:
    if isinstance(completion, str):
        return completion
    return "".join(message.get("content") or "" for message in completion)


# In a thread other than the main one, math-verify would warn at every call that it has no time limit.
logging.getLogger("math_verify.parser").addFilter(lambda record: "Timeout is disabled" not in record.getMessage())
logging.getLogger("math_verify.grader").addFilter(lambda record: "Timeout is disabled" not in record.getMessage())
