"""Learning to Think (L2T): a TRL trainer that pays each reasoning episode for what it adds to the right answer."""

import importlib


__version__ = "0.1.0"

_LAZY = {"L2TConfig": "l2t_config", "L2TTrainer": "l2t_trainer"}

__all__ = ["L2TConfig", "L2TTrainer", "__version__"]


def __getattr__(name: str):
    # Importing the package must not import torch: `l2t --help` answers at once.
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
