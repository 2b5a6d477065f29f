"""
The process that compares answers: requests on standard input, verdicts on standard output, one JSON line each.

It is started by [`l2t_trl.answer_pool`]. It must stay light (no torch): several run beside every trainer process.
"""

import functools
import json
import logging
import os
import signal
import sys
import warnings
from typing import Any


# A comparison that needs more is none, and would take the trainer's memory.
MEMORY_LIMIT_BYTES = 4 * 2**30


def compare(given: str, gold: str) -> bool | None:
    """
    Return whether `given` is the gold answer; `None` if the gold answer is not understood.

    Args:
        given (`str`): answer, LaTeX or plain, without `$` or box.
        gold (`str`): likewise.
    """
    from math_verify import verify

    parsed_gold = parse_answer(gold)
    if not parsed_gold:
        return None
    # The limit of time is the pool's: math-verify's own are alarms, which C code does not heed.
    return bool(verify(list(parsed_gold), list(parse_answer(given)), timeout_seconds=None))


@functools.lru_cache(maxsize=1024)
def parse_answer(answer: str) -> tuple:
    r"""Return what math-verify reads in `answer`, boxed, since unboxed LaTeX is misread: 11\sqrt2 becomes 11."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    config = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return tuple(parse(f"\\boxed{{{answer}}}", config, parsing_timeout=None))


def solve(request: dict[str, Any]) -> bool | None:
    """
    Return the verdict on one request.

    Args:
        request (`dict`): `gold` and `given` to compare them, `gold` alone to ask whether it is understood, or `task`
            (see [`l2t_trl.data.reasoning`]) and `given` to have the task's own verifier decide.
    """
    if "task" in request:
        from l2t_trl.data.reasoning import is_solved

        return is_solved(request["task"], request["given"])
    if "given" in request:
        return compare(request["given"], request["gold"])
    return bool(parse_answer(request["gold"]))


def main() -> int:
    """Answer requests until standard input ends."""
    # Ctrl-C goes to the whole group of processes; the pool ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Nothing else may write where the verdicts go.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    _limit_memory()
    import math_verify  # noqa: F401 - imported before the clock of the first request runs

    limit_s = int(sys.argv[1])
    _reply(replies, "ready")
    for line in sys.stdin:
        # Should the trainer have gone, this ends a comparison that does not: the kernel's default, not a handler.
        signal.alarm(limit_s)
        try:
            verdict = solve(json.loads(line))
        except (MemoryError, RecursionError):
            verdict = False
        signal.alarm(0)
        _reply(replies, verdict)
    return 0


def _reply(replies, value: Any):
    replies.write(json.dumps(value) + "\n")
    replies.flush()


def _limit_memory():
    try:
        import resource
    except ImportError:  # not on Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


if __name__ == "__main__":
    sys.exit(main())
