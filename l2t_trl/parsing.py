"""
Strict reading of `l2t train`'s settings.

TRL's parser makes a file's values the defaults of argparse, which converts only defaults that are strings and never
checks their choices. So the file is checked here against the dataclasses before the parser sees it.
"""

import dataclasses
import difflib
import enum
import os
import re
import types
import typing
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from trl import ModelConfig, TrlParser

from l2t_trl.errors import UserError
from l2t_trl.l2t_config import L2TConfig
from l2t_trl.scripts.train import L2TScriptArguments, LaunchArguments


CLASSES = (L2TScriptArguments, L2TConfig, ModelConfig, LaunchArguments)


@dataclass
class Configuration:
    """
    A resolved configuration.

    Parameters:
        script ([`~l2t_trl.scripts.train.L2TScriptArguments`]):
            Data, rewards and evaluation.
        training ([`L2TConfig`]):
            Settings of the trainer.
        model (`trl.ModelConfig`):
            Model and adapters.
        launch ([`~l2t_trl.scripts.train.LaunchArguments`]):
            How the script is started.
        given (`dict[str, Any]`):
            Value of every setting as it was given, before the classes derive settings from each other.
        environment (`dict[str, str]`):
            Environment variables that the file sets.
    """

    script: L2TScriptArguments
    training: L2TConfig
    model: ModelConfig
    launch: LaunchArguments
    given: dict[str, Any]
    environment: dict[str, str]


class StrictParser(TrlParser):
    """`TrlParser` that raises a [`UserError`] for a mistake instead of printing its usage and exiting."""

    def __init__(self):
        super().__init__(CLASSES, prog="l2t train", add_help=False, allow_abbrev=False)

    def error(self, message: str):
        raise UserError(f"command line: {message}")


def parse(argv: list[str]) -> Configuration:
    """
    Read the settings from the command line and the file that `--config` names.

    Args:
        argv (`list[str]`):
            Arguments of `l2t train`. They override the file.

    Returns:
        [`Configuration`]

    Raises:
        UserError: for an unknown setting or a value that its field does not take; names the file and the key.
    """
    argv, path = _take_config(list(argv))
    entries = {} if path is None else read_file(path)
    environment = entries.pop("env", (0, {}))[1]
    os.environ.update(environment)

    parser = StrictParser()
    parser.set_defaults_with_config(**{key: value for key, (_, value) in entries.items()})
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(_unknown_argument(unknown[0]))
    given = vars(namespace)

    instances = []
    for cls in CLASSES:
        values = {field.name: given[field.name] for field in dataclasses.fields(cls) if field.init}
        if cls is L2TConfig and given["bf16"] is None and not torch.accelerator.is_available():
            # TRL's default is bf16 on every machine, which transformers then refuses on one without an accelerator.
            values["bf16"] = False
        try:
            instances.append(cls(**values))
        except ValueError as error:
            raise UserError(_locate(str(error), path, entries, argv)) from error
    configuration = Configuration(*instances, given=given, environment=environment)
    _check_launch(configuration.launch)
    return configuration


def read_file(path: str) -> dict[str, tuple[int, Any]]:
    """
    Read a configuration file and check every entry against the field that it sets.

    Args:
        path (`str`):
            YAML file with one mapping.

    Returns:
        `dict[str, tuple[int, Any]]`: line and value of each key.

    Raises:
        UserError: naming file, line and key.
    """
    try:
        with open(path, encoding="utf-8") as file:
            root = yaml.compose(file, Loader=yaml.SafeLoader)
            loader = yaml.SafeLoader("")
            if not isinstance(root, yaml.MappingNode):
                raise UserError(f"{path}: must hold one YAML mapping of settings.")
            entries = {}
            for key_node, value_node in root.value:
                key, line = key_node.value, key_node.start_mark.line + 1
                if key in entries:
                    raise UserError(f"{path}:{line}: {key} is set twice (first in line {entries[key][0]}).")
                entries[key] = (line, loader.construct_object(value_node, deep=True))
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config file {path} is not a text file in UTF-8.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error

    checkers = field_types()
    for key, (line, value) in entries.items():
        where = f"{path}:{line}: {key}"
        if key == "env":
            if not isinstance(value, dict):
                raise UserError(f"{where} must be a mapping of environment variables.")
            entries[key] = (line, {str(name): str(text) for name, text in value.items()})
        elif key not in checkers:
            raise UserError(f"{where} is not a setting{_suggestion(key)}.")
        else:
            hint, choices = checkers[key]
            try:
                converted = convert(value, hint)
            except ValueError:
                raise UserError(f"{where} must be {_describe(hint, choices)}, got {value!r}.") from None
            if choices is not None and converted not in choices:
                raise UserError(f"{where} must be {_describe(hint, choices)}, got {value!r}.")
            entries[key] = (line, converted)
    return entries


def field_types() -> dict[str, tuple[Any, tuple | None]]:
    """Return type and, where there are any, choices of every setting."""
    fields = {}
    for cls in CLASSES:
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.init:
                choices = field.metadata.get("choices")
                fields[field.name] = (hints[field.name], tuple(choices) if choices is not None else None)
    return fields


def convert(value: Any, hint: Any) -> Any:
    """
    Return `value` as the type `hint` has it.

    Texts that spell a number or a truth value become one, as on the command line: YAML reads 1e-6 as a text. Whole
    numbers become floats where the field is one, and a single value a list of one.

    Raises:
        ValueError: if the type does not take the value.
    """
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, typing.get_args(hint))
    if hint is Any:
        return value
    if hint is type(None):
        if value is None:
            return None
    elif origin is typing.Literal:
        if value in typing.get_args(hint) and not isinstance(value, bool):
            return value
    elif isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value).value
    elif origin is list or hint is list:
        (inner,) = typing.get_args(hint) or (Any,)
        if not isinstance(value, dict) and value is not None:
            return [convert(item, inner) for item in (value if isinstance(value, list) else [value])]
    elif origin is dict or hint is dict:
        if isinstance(value, dict):
            return value
    elif hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif hint in (int, float):
        if isinstance(value, hint | int | str) and not isinstance(value, bool):
            return hint(value)
    elif hint is str and isinstance(value, str):
        return value
    raise ValueError(f"{value!r} is no {hint}")


def _convert_union(value: Any, hints: tuple) -> Any:
    if value is None:
        if type(None) in hints:
            return None
        raise ValueError("no value")
    # An enum beside str says which texts there are.
    if any(isinstance(hint, type) and issubclass(hint, enum.Enum) for hint in hints):
        hints = tuple(hint for hint in hints if hint is not str)
    # A text stays a text and a list a list where both are allowed.
    for hint in sorted(hints, key=lambda hint: not _is_instance(value, hint)):
        try:
            return convert(value, hint)
        except ValueError:
            continue
    raise ValueError(f"{value!r} fits none of {hints}")


def _is_instance(value: Any, hint: Any) -> bool:
    plain = typing.get_origin(hint) or hint
    return isinstance(plain, type) and isinstance(value, plain)


def _describe(hint: Any, choices: tuple | None) -> str:
    if choices is not None:
        return f"one of {', '.join(map(str, choices))}"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if any(isinstance(part, type) and issubclass(part, enum.Enum) for part in arguments):
            arguments = tuple(part for part in arguments if part is not str)
        return " or ".join(_describe(part, None) for part in arguments)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return f"one of {', '.join(str(member.value) for member in hint)}"
    if origin is list:
        return f"a list (each: {_describe(arguments[0], None)})"
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        type(None): "null",
        dict: "a mapping",
    }
    return names.get(origin or hint, str(hint))


def _take_config(argv: list[str]) -> tuple[list[str], str | None]:
    """Split `--config FILE` off."""
    for index, word in enumerate(argv):
        if word.startswith("--config="):
            return argv[:index] + argv[index + 1 :], word.removeprefix("--config=")
        if word == "--config":
            if index + 1 == len(argv):
                raise UserError("--config needs a file.")
            return argv[:index] + argv[index + 2 :], argv[index + 1]
    return argv, None


def _unknown_argument(word: str) -> str:
    if not word.startswith("-"):
        return f"unexpected argument {word!r}: every setting is written --name value."
    name = word.lstrip("-").split("=")[0].replace("-", "_")
    return f"command line: --{name} is not a setting{_suggestion(name)}."


def _suggestion(key: str) -> str:
    close = difflib.get_close_matches(str(key), [*field_types(), "env"], n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _locate(message: str, path: str | None, entries: dict[str, tuple[int, Any]], argv: list[str]) -> str:
    """Put in front of `message` where the first setting that it names was given: in the file or on the command line."""
    on_command_line = {word.lstrip("-").split("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    places = {name: "command line" for name in on_command_line}
    places |= {name: f"{path}:{line}" for name, (line, _) in entries.items() if name not in on_command_line}
    for word in re.findall(r"\w+", message):
        if word in places:
            return f"{places[word]}: {message}"
    return message if path is None else f"{path}: {message}"


def _check_launch(launch: LaunchArguments):
    from l2t_trl.launch import LAUNCHER_OVERRIDES, find_accelerate_config

    if launch.accelerate_config is not None:
        find_accelerate_config(launch.accelerate_config)
        return
    for name in LAUNCHER_OVERRIDES:
        if getattr(launch, name) is not None:
            raise UserError(f"{name} is the launcher's: set accelerate_config, too.")


def dump_configuration(configuration: Configuration) -> str:
    """
    Return a YAML file that yields the same configuration.

    The settings of L2T and of the script are all in it, the others where they differ from their default.
    """
    lines = []
    if configuration.environment:
        lines += ["# Environment", yaml.safe_dump({"env": configuration.environment}).rstrip(), ""]
    baseline = vars(StrictParser().parse_args([]))
    inherited = {field.name for field in dataclasses.fields(L2TConfig.__mro__[1])}
    own = [field for field in dataclasses.fields(L2TConfig) if field.name not in inherited]
    others = [field for field in dataclasses.fields(L2TConfig) if field.name in inherited]
    sections = (
        ("Script", dataclasses.fields(L2TScriptArguments), True),
        ("L2T", own, True),
        ("Model, where it differs from the default", dataclasses.fields(ModelConfig), False),
        ("GRPO and training, where they differ from the default", others, False),
    )
    for title, fields, is_complete in sections:
        values = {}
        for field in fields:
            if field.init:
                value = configuration.given[field.name]
                if is_complete or value != baseline[field.name]:
                    values[field.name] = value.value if isinstance(value, enum.Enum) else value
        if values:
            text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
            lines += [f"# {title}", text.rstrip(), ""]
    return "\n".join(lines)
