"""Weights on their way from the trainer to a server: safetensors files in a folder that both see."""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from l2t_trl.errors import RolloutError


_FILE_BYTES = 2 * 2**30  # what is held in memory at a time
_PREFIX = "l2t-weights-"


class WeightFolder:
    """
    Numbered folders of weights below one that trainer and server share, of which only the last complete one is kept.

    Args:
        root (`Path`): the shared folder; made if there is none. What other runs left in it is removed.

    Raises:
        ValueError: if nothing can be written there.
    """

    def __init__(self, root: Path):
        self.root, self.current = root.absolute(), None
        self._number, self._pending, self._pending_bytes, self._num_files = 0, {}, 0, 0
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.drop_others()
            self._new.mkdir()
            (self._new / "writable").write_bytes(b"")
            self.drop_others()
        except OSError as error:
            raise ValueError(f"weight_sync_dir {root} cannot be written ({error.strerror}). Set another.") from error

    @property
    def _new(self) -> Path:
        return self.root / f"{_PREFIX}{self._number}.new"

    def start(self) -> None:
        """Begin a new set of weights."""
        self._number += 1
        self._pending, self._pending_bytes, self._num_files = {}, 0, 0
        self._guarded(lambda: self._new.mkdir())

    def add(self, name: str, value: torch.Tensor) -> None:
        """Add one tensor under its name in the checkpoint."""
        self._pending[name] = value.detach().to("cpu", copy=True).contiguous()
        self._pending_bytes += self._pending[name].nbytes
        if self._pending_bytes >= _FILE_BYTES:
            self._guarded(self._flush)

    def finish(self) -> Path:
        """Complete the set and return its folder; the one before it is still there until [`drop_others`]."""

        def move() -> Path:
            if self._pending:
                self._flush()
            return self._new.rename(self._new.with_suffix(""))

        self.current = self._guarded(move)
        return self.current

    def drop_others(self) -> None:
        """Remove every set but the current one."""
        for folder in self.root.glob(f"{_PREFIX}*"):
            if folder != self.current:
                shutil.rmtree(folder)

    def _flush(self) -> None:
        self._num_files += 1
        save_file(self._pending, self._new / f"model-{self._num_files:05}.safetensors")
        self._pending, self._pending_bytes = {}, 0

    def _guarded(self, write):
        try:
            return write()
        # safetensors has an error of its own for a disk that is full.
        except (OSError, SafetensorError) as error:
            self._pending = {}
            shutil.rmtree(self._new, ignore_errors=True)
            raise RolloutError(
                f"The weights could not be written to weight_sync_dir {self.root} ({error}). Make room there, or set "
                "another folder."
            ) from error
