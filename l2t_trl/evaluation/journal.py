"""
Results that are written as they come, and gone on with after the process was killed.

What is to be done is a list in a fixed order, done in batches. The file holds one JSON line per item, in that order, so
it is always the beginning of a finished file, but for what a killed process left of its last batch: that is cut off
and done again. Batches are therefore the same whether a run was interrupted or not.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import write_whole


class Journal:
    """
    The file of results, open for more. A context manager: while it is open, no other process may write to it.

    Args:
        path (`Path`):
            JSON lines file; made if missing.
        keys (`Sequence[dict[str, Any]]`):
            What is to be done, in order: the fields by which each line says which item it belongs to.
        batch_size (`int`):
            Items that are done, and written, together.
        compact (`Callable`, *optional*):
            Makes of a line what is kept of it in memory.

    Attributes:
        done (`list[dict[str, Any]]`):
            Lines of all whole batches, as `compact` makes them.

    Raises:
        UserError: if the file cannot be used: another process writes to it, it is damaged, or it belongs to another
            list.
    """

    def __init__(
        self,
        path: Path,
        keys: Sequence[dict[str, Any]],
        batch_size: int,
        compact: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ):
        self.path, self.keys, self.batch_size, self.compact = path, keys, batch_size, compact
        self.done: list[dict[str, Any]] = []

    def __enter__(self) -> "Journal":
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}). Set another --output.") from error
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"{self.path}: another evaluation is writing to it; set another --output.") from error
            self._read()
        except UserError:
            os.close(self._file)
            raise
        return self

    def __exit__(self, *_) -> None:
        os.close(self._file)

    @property
    def batches(self) -> list[Sequence[dict[str, Any]]]:
        """Keys of the batches that are left."""
        return [self.keys[i : i + self.batch_size] for i in range(len(self.done), len(self.keys), self.batch_size)]

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        """
        Append the lines of the next batch.

        Raises:
            UserError: if they cannot be written, a full disk for one; what was there before stays whole.
        """
        data = memoryview("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        try:
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self._end)
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}). The {len(self.done)} of {len(self.keys)} lines "
                "before are kept: make room, and start the same command again to go on from there."
            ) from error
        self._end = os.lseek(self._file, 0, os.SEEK_CUR)
        self.done += map(self.compact, lines)

    def _read(self) -> None:
        ends = [0]
        with open(self._file, "rb", closefd=False) as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{self.path}:{number} is damaged ({error}). Set another --output.") from error
                is_one = isinstance(record, dict) and number <= len(self.keys)
                if not is_one or any(record.get(name) != value for name, value in self.keys[number - 1].items()):
                    raise UserError(f"{self.path}:{number} belongs to another evaluation. Set another --output.")
                self.done.append(self.compact(record))
                ends.append(ends[-1] + len(line))
        if len(self.done) < len(self.keys):
            del self.done[len(self.done) // self.batch_size * self.batch_size :]
        self._end = ends[len(self.done)]
        os.ftruncate(self._file, self._end)
        os.lseek(self._file, self._end, os.SEEK_SET)


def keep_settings(path: Path, settings: dict[str, Any]) -> None:
    """
    Write the settings of an evaluation beside its results, or check that they are those of the results there.

    Raises:
        UserError: naming what differs, or if the file cannot be written or read.
    """
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(before, dict):
                raise ValueError("it holds no settings")
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}). Set another --output.") from error
        differing = [
            f"{name} is {json.dumps(settings.get(name))}, there it is {json.dumps(before.get(name))}"
            for name in dict.fromkeys([*settings, *before])
            if settings.get(name) != before.get(name)
        ]
        if differing:
            raise UserError(
                f"{path.parent} holds results with other settings: {'; '.join(differing)}. Set the same, or another "
                "--output."
            )
        return
    write_result(path, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")


def write_result(path: Path, text: str) -> None:
    """
    Write a file of the output whole or not at all, its folder too.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}). Make room, or set another --output.") from error


def fingerprint(parts: Iterable[bytes]) -> str:
    """Return a short text that differs where the parts do."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return digest.hexdigest()[:16]
