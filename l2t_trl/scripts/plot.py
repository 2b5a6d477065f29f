"""`l2t plot`."""


def add_arguments(parser):
    """Stub."""
