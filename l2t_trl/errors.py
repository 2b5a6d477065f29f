"""Errors that are shown as one message, without a traceback."""


class UserError(ValueError):
    """A mistake in what the user gave. The commands show its message alone and end with exit code 2."""


class RolloutError(RuntimeError):
    """
    Rollouts cannot go on: the server that makes them has gone, or cannot be given the new weights.

    All ranks raise it together. The commands show its message alone and end with exit code 1.
    """
