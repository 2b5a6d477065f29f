"""
Whether a completion's final answer is the gold answer.

Equal texts and whole numbers are told here and at once. All else goes to math-verify, in worker processes with a limit
of time ([`l2t_trl.answer_pool`]), so that no answer can hang training.
"""

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any


THINK_CLOSE = "</think>"
BOXED = "\\boxed"
# Python refuses to convert longer ones, and no answer is.
MAX_DIGITS = 1000
_DECIMAL = r"[+-]?(?:0|[1-9]\d*|[1-9]\d{0,2}(?:,\d{3})+)?(?:\.\d*)?"
# A decimal number, a/b, \frac{a}{b} or \frac12, and a percent sign.
NUMBER = re.compile(
    rf"(?P<sign>[+-]?)(?:\\t?frac(?P<top>{{{_DECIMAL}}}|\d)(?P<bottom>{{{_DECIMAL}}}|\d)|(?P<over>{_DECIMAL})"
    rf"(?:/(?P<under>{_DECIMAL}))?)(?P<percent>\\?%)?"
)
# What numbers stand between in tuples, sets and intervals.
SEPARATOR = re.compile(r"(\\[{}]|[(),\[\]])")
# Decimals to which math-verify compares numbers.
DECIMALS = 6
# A double holds no more.
MAX_NUMBER_LENGTH = 300
# GSM8K's and verl's mark of the answer.
HASH_ANSWER = re.compile(r"^.*####[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
# Words are written with or without it, and it holds more or less of the answer.
TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\{([^{}]*)\}")


def boxed_answer(text: str) -> str | None:
    r"""
    Return what the last closed `\boxed{}` behind the last `</think>` holds, or `None`.

    Text without `</think>` is searched as a whole. A box that was begun and never closed does not count, nor does an
    earlier one then: the model was about to say something else.
    """
    return last_box(text.rpartition(THINK_CLOSE)[2])


def last_box(text: str) -> str | None:
    r"""Return what the last `\boxed{}` of `text` holds, or `None` without one or if it is never closed."""
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


def final_answer(text: str) -> str | None:
    r"""
    Return the final answer of a completion, or `None`: the last `\boxed{}` behind the last `</think>`
    ([`boxed_answer`]) or, where nothing was boxed, what follows the last `####` on its line.
    """
    conclusion = text.rpartition(THINK_CLOSE)[2]
    if BOXED in conclusion:
        return boxed_answer(conclusion)
    marked = HASH_ANSWER.findall(conclusion)
    return marked[-1] if marked else None


def judge_texts(
    texts: Sequence[str],
    golds: Sequence[str | Sequence[str]],
    tasks: Sequence[str | None] | None = None,
) -> list[bool | None]:
    """
    Return for each completion whether its final answer is right.

    Args:
        texts (`Sequence[str]`):
            Completions.
        golds (`Sequence[str | Sequence[str]]`):
            Gold answer of each, LaTeX without `$` or plain; or several, of which one must be met.
        tasks (`Sequence[str | None]`, *optional*):
            For answers that are not unique: the task whose own verifier decides, see [`l2t_trl.data.reasoning`].

    Returns:
        `list[bool | None]`: `None` where no gold answer is given, or none is either met literally or understood.
        `False`, too, where the comparison took too long (counted, see [`counts`]).
    """
    from l2t_trl.answer_pool import shared_pool

    tasks = tasks or [None] * len(texts)
    verdicts: list[bool | None] = []
    requests: dict[str, dict[str, Any]] = {}
    open_rows: dict[int, list[str]] = {}
    for row, (text, accepted, task) in enumerate(zip(texts, golds, tasks, strict=True)):
        accepted = accepted_golds(accepted)
        given = final_answer(text)
        verdict, undecided = _judge_at_once(given, accepted)
        verdicts.append(verdict)
        if verdict is True or not given:
            continue
        if task is not None:
            row_requests = [{"task": task, "given": given}]
        else:
            row_requests = [comparison(given, gold) for gold in undecided]
        if row_requests:
            # The completions of a group often agree: what is equal is asked once.
            keys = [repr(request) for request in row_requests]
            requests.update(zip(keys, row_requests, strict=True))
            open_rows[row] = keys
    if not requests:
        return verdicts

    answers = dict(zip(requests, shared_pool().ask(list(requests.values())), strict=True))
    for row, keys in open_rows.items():
        found = [answers[key] for key in keys]
        if True in found:
            verdicts[row] = True
        elif False in found:
            verdicts[row] = False
    return verdicts


def understood(golds: Sequence[str]) -> list[bool]:
    """Return for each gold answer whether it can be compared with anything but the same text."""
    from l2t_trl.answer_pool import shared_pool

    verdicts = [_whole_number(gold) is not None for gold in golds]
    rows = [row for row, verdict in enumerate(verdicts) if not verdict and golds[row].strip()]
    if rows:
        requests = [{"gold": _spell_out(golds[row].strip())} for row in rows]
        for row, verdict in zip(rows, shared_pool().ask(requests), strict=True):
            verdicts[row] = bool(verdict)
    return verdicts


def comparison(given: str, gold: str) -> dict[str, str]:
    """Return the request by which the pool compares two answers."""
    return {"given": _spell_out(given), "gold": _spell_out(gold)}


def accepted_golds(gold: str | Sequence[str] | None) -> list[str]:
    """Return the gold answers that are accepted, stripped, without empty ones."""
    several = [gold] if gold is None or isinstance(gold, str | int | float) else gold
    return [text for text in (str(one).strip() for one in several if one is not None) if text]


def answer_key(answer: str) -> str:
    r"""
    Return a text that answers share which are equal at a glance: white space and the notation of numbers aside.

    `0.5`, `1/2`, `\frac{1}{2}` and `50\%` are one, alone or in a tuple, set or interval; decimals are compared to as many
    places as math-verify has. Roots, powers and symbols are as they are written. It takes microseconds and is the same
    everywhere, which a comparison within a limit of time is not.
    """
    whole = _whole_number(answer)
    if whole is not None:
        return str(whole)
    text = _normalise(answer)
    # As a whole first: the commas of thousands separate nothing.
    parts = [text] if NUMBER.fullmatch(text) else SEPARATOR.split(text)
    return "".join(_number_key(part) for part in parts)


def counts() -> dict[str, int]:
    """Return how many comparisons of this process were given up so far: `timed_out` and `crashed`."""
    from l2t_trl.answer_pool import shared_pool

    pool = shared_pool()
    return {"timed_out": pool.timed_out, "crashed": pool.crashed}


def _judge_at_once(given: str | None, accepted: list[str]) -> tuple[bool | None, list[str]]:
    """Return the verdict as far as texts and whole numbers tell, and the golds that are left to math-verify."""
    if not accepted:
        return None, []
    if not given:
        return False, []
    undecided = []
    for gold in accepted:
        if _normalise(given) == _normalise(gold):
            return True, []
        numbers = _whole_number(given), _whole_number(gold)
        if None in numbers:
            undecided.append(gold)
        elif numbers[0] == numbers[1]:
            return True, []
    return (None if len(undecided) == len(accepted) else False), undecided


def _number_key(text: str) -> str:
    """Return a text that equal numbers share; what is no number stays as it is."""
    value = _number(text)
    if value is None:
        return text
    # As many places more as a small number has zeros behind its point.
    zeros = -math.floor(math.log10(abs(value))) - 1 if value else 0
    return str(round(value, DECIMALS + max(0, zeros)))


def _number(text: str) -> Fraction | None:
    match = NUMBER.fullmatch(text.removeprefix("\\$")) if len(text) <= MAX_NUMBER_LENGTH else None
    if match is None:
        return None
    top, bottom = (match["top"], match["bottom"]) if match["top"] else (match["over"], match["under"])
    try:
        over, under = (
            Fraction(part.strip("{}").replace(",", "")) for part in (top, "1" if bottom is None else bottom)
        )
        value = over / under / (100 if match["percent"] else 1)
    except (ValueError, ZeroDivisionError):  # no digit at all, as in "." and "-", or a denominator of 0
        return None
    return -value if match["sign"] == "-" else value


def _spell_out(answer: str) -> str:
    r"""Write 4.5e33, in which math-verify sees Euler's number, as 4.5 \times 10^{33}."""
    return re.sub(r"^([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d+)$", r"\1 \\times 10^{\2}", answer)


def _normalise(answer: str) -> str:
    answer = TEXT_COMMAND.sub(r"\1", answer).strip().strip("$").strip().removesuffix(".")
    return re.sub(r"\s+|\\[!,;: ]|\\left(?![a-z])|\\right(?![a-z])", "", answer).replace("\\dfrac", "\\frac")


def _whole_number(answer: str) -> int | None:
    answer = answer.strip().removeprefix("\\$").strip("$").strip()
    if len(answer) > MAX_DIGITS:
        return None
    # Commas only where thousands have them, so that the pair 1,2 is not 12.
    if re.fullmatch(r"[+-]?(\d+|\d{1,3}(,\d{3})+)(\.0*)?", answer) is None:
        return None
    return int(answer.replace(",", "").split(".")[0])
