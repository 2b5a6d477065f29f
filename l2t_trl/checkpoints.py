"""What a checkpoint holds beside what transformers saves, written so that a kill at any moment leaves no half truth."""

import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


STATE_FILE = "l2t_state.safetensors"  # the same on all ranks, written by the first
RANK_FILE = "l2t_rank_{:0>5}.safetensors"  # each rank's own


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file that appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(path.name + ".new")
    # Batches are views of one tensor and share others, which safetensors would refuse.
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, staging)
    os.replace(staging, path)


def load_ranks(folder: Path) -> list[dict[str, torch.Tensor]]:
    """Every rank's own tensors, in the order of the ranks."""
    return [load_file(path) for path in sorted(folder.glob(RANK_FILE.format("?????")))]


def pack_batches(batches: list[dict]) -> dict[str, torch.Tensor]:
    """Tensors of a list of batches by `INDEX.NAME`; entries that are `None` are left out."""
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, batch in enumerate(batches)
        for name, value in batch.items()
        if value is not None
    }


def unpack_batches(tensors: dict[str, torch.Tensor]) -> list[dict]:
    """The list of batches that [`pack_batches`] has packed."""
    batches: dict[int, dict] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        batches.setdefault(int(index), {})[name] = value
    return [batches[index] for index in sorted(batches)]


def is_complete(folder: Path) -> bool:
    """
    Whether a checkpoint folder was written to its end: the trainer's state, which comes last on the first rank, can be
    read, and so can every rank's random state and the method's own.
    """
    try:
        json.loads((folder / "trainer_state.json").read_text())
        world_size = 1
        if (folder / STATE_FILE).exists():
            with safe_open(folder / STATE_FILE, "pt") as state:
                world_size = int(state.get_tensor("world_size"))
    except (OSError, ValueError, SafetensorError):
        return False
    if list(folder.glob("*.new")):
        return False
    names = ["rng_state.pth"] if world_size == 1 else [f"rng_state_{rank}.pth" for rank in range(world_size)]
    # With save_only_model there is no random state at all.
    return not list(folder.glob("rng_state*.pth")) or all((folder / name).exists() for name in names)


def last_complete_checkpoint(output_dir: str) -> tuple[Path | None, list[Path]]:
    """
    The last complete checkpoint of an output folder, and later ones that were cut off while they were written.

    Returns:
        `tuple[Path | None, list[Path]]`: `None` if there is none.
    """
    numbered = []
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
        if match and folder.is_dir():
            numbered.append((int(match[1]), folder))
    incomplete = []
    for _, folder in sorted(numbered, reverse=True):
        if is_complete(folder):
            return folder, incomplete
        incomplete.append(folder)
    return None, incomplete
