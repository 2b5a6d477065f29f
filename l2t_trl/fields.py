"""
What a configuration class declares, read from its source.

Importing TRL's and transformers' classes takes seconds, since torch comes along; `l2t train --help` lists their fields
without it.
"""

import ast
import importlib.util
import os
from pathlib import Path
from typing import NamedTuple


class Field(NamedTuple):
    """One setting: name, type (or choices, split by |) and default as written in the source, and help text."""

    name: str
    type: str
    default: str
    help: str


def read_fields(path: str | os.PathLike, class_name: str) -> list[Field]:
    """
    Return the settings that a dataclass declares itself, without importing it.

    Args:
        path (`str` or `os.PathLike`):
            Python file with the class.
        class_name (`str`):
            Name of the dataclass. What it inherits is not listed, nor are fields with `init=False`.

    Returns:
        `list[Field]`: in the order of the source.
    """
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    declaration = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    fields = []
    for statement in declaration.body:
        if not isinstance(statement, ast.AnnAssign):
            continue
        # Fields without the call `field(...)` are plain class attributes or carry no help text.
        keywords = (
            {word.arg: word.value for word in statement.value.keywords}
            if isinstance(statement.value, ast.Call)
            else {"default": statement.value}
        )
        if "init" in keywords or "ClassVar" in ast.unparse(statement.annotation):
            continue
        default = keywords.get("default", keywords.get("default_factory"))
        metadata = _metadata(keywords.get("metadata"))
        fields.append(
            Field(
                name=statement.target.id,
                type=_type_text(statement.annotation, metadata),
                default="" if default is None else ast.unparse(default),
                # argparse wants a doubled percent sign.
                help=" ".join(metadata.get("help", "").replace("%%", "%").split()),
            )
        )
    return fields


def module_path(package: str, *parts: str) -> Path:
    """Return the path of a file inside an installed package, without importing the package."""
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0], *parts)


def _type_text(annotation: ast.expr, metadata: dict) -> str:
    """Return the choices where a field has some, else its type."""
    if "choices" in metadata:
        return "|".join(map(str, metadata["choices"]))
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        return "|".join(map(str, ast.literal_eval(annotation.slice)))
    return ast.unparse(annotation)


def _metadata(node: ast.expr | None) -> dict:
    """Return those entries of a field's metadata that are literals."""
    if not isinstance(node, ast.Dict):
        return {}
    entries = {}
    for key, value in zip(node.keys, node.values, strict=True):
        try:
            entries[ast.literal_eval(key)] = ast.literal_eval(value)
        except ValueError:
            continue
    return entries
