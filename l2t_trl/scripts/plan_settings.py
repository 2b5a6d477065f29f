"""Settings of a recipe, read and checked by their declarations alone: nothing heavy is imported."""

import ast
import difflib
import math
from collections.abc import Callable
from typing import Any

from l2t_trl.errors import UserError
from l2t_trl.fields import Field


WORDS = {"true": "True", "false": "False", "null": "None"}
# What is true of numbers that a plan reckons with, and how to say so.
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "vllm_gpu_memory_utilization": (lambda value: 0 < value <= 1, "a share of the GPU, above 0 and at most 1"),
    "beta": (lambda value: 0 <= value < math.inf, "a number, 0 or larger"),
    "learning_rate": (lambda value: 0 <= value < math.inf, "a number, 0 or larger"),
}
NUMBER = (lambda value: not math.isnan(value), "a number")


def read_settings(path: str, overrides: list[str]) -> dict[str, Any]:
    """
    Return every setting's value: the default, that of the recipe, or that of `overrides` (`"key=value"`).

    Raises:
        UserError: if the recipe cannot be read, a key is no setting, or a value is not what its setting takes.
    """
    from l2t_trl.scripts.train import setting_sections

    fields: dict[str, Field] = {}
    for _, section in setting_sections():
        for item in section:
            fields.setdefault(item.name, item)
    given = dict(read_yaml(path))
    given.pop("env", None)
    for entry in overrides:
        key, mark, value = entry.partition("=")
        if not mark:
            raise UserError(f"--set takes KEY=VALUE, got {entry!r}.")
        given[key] = _literal(WORDS.get(value.lower(), value), value)
    for key, value in given.items():
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise UserError(f"{path}: {key} is not a setting{hint}.")
        given[key] = _checked(fields[key], value)
    return {name: _literal(item.default) for name, item in fields.items()} | given


def whole(settings: dict[str, Any], name: str) -> int:
    """
    Return a setting that must be a whole number from 1.

    Raises:
        UserError: if it is none.
    """
    value = settings[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name} must be a whole number, 1 or larger, got {value!r}.")
    return value


def read_yaml(path: str) -> dict[str, Any]:
    """
    Return the mapping in a YAML file.

    Raises:
        UserError: if it cannot be read or holds none.
    """
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold one YAML mapping of settings.")
    return content


def _checked(field: Field, value: Any) -> Any:
    """Return a value as its declaration wants it, as far as that says: switches, numbers and choices."""
    declared = set(field.type.split(" | "))
    types = declared - {"None"}
    if value is None and ("None" in declared or not types <= {"bool", "float"}):
        return None
    if types == {"bool"} and not isinstance(value, bool):
        raise UserError(f"{field.name} must be true or false, got {value!r}.")
    if types == {"float"}:
        is_valid, wanted = RANGES.get(field.name, NUMBER)
        number = _number(value)
        if not is_valid(number):
            raise UserError(f"{field.name} must be {wanted}, got {value!r}.")
        return number
    choices = [] if " | " in field.type else field.type.split("|")
    if len(choices) > 1 and value not in choices:
        raise UserError(f"{field.name} must be one of {', '.join(choices)}, got {value!r}.")
    return value


def _number(value: Any) -> float:
    """Return a number, also one that YAML takes for text (1e-6); NaN for what is none."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan


def _literal(text: str, otherwise: Any = None) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return otherwise
