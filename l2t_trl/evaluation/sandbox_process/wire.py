"""
Messages and values between processes that do not trust each other.

Values travel as JSON with tags, which can build nothing but plain data: neither pickle nor marshal is safe to read.
"""

import json
import os
from collections import deque
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any


# A longer message is none: what a program returns is held in memory once more by who reads it.
MAX_MESSAGE_BYTES = 16 << 20
# Iterators are read to their end, or up to here.
MAX_ITEMS = 1_000_000

# Types without a form of their own in JSON: what to send, and how to make the value of it again.
PARTS: dict[type, tuple[Callable[[Any], list], Callable[..., Any]]] = {
    complex: (lambda value: [value.real, value.imag], complex),
    bytes: (lambda value: [value.hex()], bytes.fromhex),
    bytearray: (lambda value: [value.hex()], bytearray.fromhex),
    range: (lambda value: [value.start, value.stop, value.step], range),
    Decimal: (lambda value: [str(value)], Decimal),
    Fraction: (lambda value: [value.numerator, value.denominator], Fraction),
    # datetime is a date, so it comes first.
    datetime: (lambda value: [value.isoformat()], datetime.fromisoformat),
    date: (lambda value: [value.isoformat()], date.fromisoformat),
    time: (lambda value: [value.isoformat()], time.fromisoformat),
    timedelta: (lambda value: [value.days, value.seconds, value.microseconds], timedelta),
}
SEQUENCES: dict[type, Callable[[list], Any]] = {
    list: list,
    tuple: tuple,
    set: set,
    frozenset: frozenset,
    deque: deque,
    # Views of a dictionary, equal to the originals' in all that can be asked of them.
    type({}.keys()): lambda items: dict.fromkeys(items).keys(),
    type({}.values()): lambda items: dict(enumerate(items)).values(),
    type({}.items()): lambda items: dict(items).items(),
}
BY_NAME = {kind.__name__: make for kind, make in SEQUENCES.items()}
PARTS_BY_NAME = {kind.__name__: make for kind, (_, make) in PARTS.items()}


class WireError(Exception):
    """What came is no message."""


def send(fd: int, message: Any) -> None:
    """Write one message: its length in four bytes, then JSON."""
    data = json.dumps(message).encode()
    data = len(data).to_bytes(4, "big") + data
    while data:
        data = data[os.write(fd, data) :]


def receive(fd: int) -> Any | None:
    """
    Read one message.

    Returns:
        The message, or `None` if the other side has gone.

    Raises:
        WireError: if it is too long or not JSON.
    """
    header = _read(fd, 4)
    if header is None:
        return None
    length = int.from_bytes(header, "big")
    if length > MAX_MESSAGE_BYTES:
        raise WireError(f"a message of {length} bytes, more than {MAX_MESSAGE_BYTES}")
    data = _read(fd, length)
    if data is None:
        return None
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WireError(f"not a message: {error}") from error


def _read(fd: int, length: int) -> bytes | None:
    chunks = []
    while length:
        chunk = os.read(fd, min(length, 1 << 20))
        if not chunk:
            return None
        chunks.append(chunk)
        length -= len(chunk)
    return b"".join(chunks)


def encode(value: Any, keep: Callable[[Any], int]) -> Any:
    """
    Return the JSON form of a value.

    Args:
        value (`Any`):
            Plain data of any depth. Subclasses become what they derive from (a `Counter` a `dict`), iterators a list
            of what they yield.
        keep (`Callable[[Any], int]`):
            Called with whatever else there is; the other side gets the number that it returns, to refer to it.
    """
    if value is None or isinstance(value, bool | str):
        return value if isinstance(value, bool) or value is None else str.__str__(value)
    if isinstance(value, int):
        return int.__pos__(value)
    if isinstance(value, float):
        return float.__pos__(value)
    if isinstance(value, dict):
        return ["dict", [[encode(key, keep), encode(item, keep)] for key, item in dict.items(value)]]
    for kind in SEQUENCES:
        if isinstance(value, kind):
            return [kind.__name__, [encode(item, keep) for item in kind.__iter__(value)]]
    for kind, (parts, _) in PARTS.items():
        if isinstance(value, kind):
            return [kind.__name__, parts(value)]
    if hasattr(type(value), "__next__"):
        items = [encode(item, keep) for item, _ in zip(value, range(MAX_ITEMS), strict=False)]
        return ["iterator", items]
    return ["object", keep(value)]


def decode(form: Any, refer: Callable[[int], Any]) -> Any:
    """
    Return the value of a JSON form.

    Args:
        form (`Any`):
            What [`encode`] returned.
        refer (`Callable[[int], Any]`):
            Returns what stands for the object of a number.

    Raises:
        WireError: if it is no such form.
    """
    if not isinstance(form, list | dict):
        return form
    try:
        tag, content = form
        if tag == "dict":
            return {decode(key, refer): decode(item, refer) for key, item in content}
        if tag == "iterator":
            return iter([decode(item, refer) for item in content])
        if tag == "object":
            return refer(content)
        if tag in BY_NAME:
            return BY_NAME[tag]([decode(item, refer) for item in content])
        return PARTS_BY_NAME[tag](*content)
    except (TypeError, ValueError, KeyError, ArithmeticError, IndexError) as error:
        raise WireError(f"no value: {error}") from error
