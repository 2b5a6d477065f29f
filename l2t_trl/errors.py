"""Errors that are the user's to mend."""


class UserError(ValueError):
    """A mistake in what the user gave. The commands show its message alone and end with exit code 2."""
