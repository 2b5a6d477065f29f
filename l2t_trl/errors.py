"""Errors that are shown as one message, without a traceback."""


class UserError(ValueError):
    """A mistake in what the user gave. The commands show its message alone and end with exit code 2."""


class RolloutError(RuntimeError):
    """
    Rollouts cannot go on: the server that makes them has gone, or cannot be given the new weights.

    All ranks raise it together. The commands show its message alone and end with exit code 1.
    """


def one_line(error: BaseException) -> str:
    """Return what an error says, on one line and not too long to stand inside another message."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
