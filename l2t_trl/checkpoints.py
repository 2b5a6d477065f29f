"""What a checkpoint holds beside what transformers saves, written so that a kill at any moment leaves no half truth."""

import json
import math
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from l2t_trl.compression import CompressionPenalty
from l2t_trl.errors import UserError, one_line


STATE_FILE = "l2t_state.safetensors"  # the same on all ranks, written by the first
RANK_FILE = "l2t_rank_{:0>5}.safetensors"  # each rank's own
# Beside the number of processes, what the shape of a rank's pending completions depends on.
ROLLOUT_SETTINGS = ("steps_per_generation", "per_device_train_batch_size")
# What STATE_FILE holds beside the bases `u.*` and `v.*`, and what it may hold.
ENTRIES = (
    *(f"penalty.{name}" for name in CompressionPenalty.STATE),
    *("bases_step", "step", "world_size", *ROLLOUT_SETTINGS, "has_pending"),
)
OPTIONAL_ENTRIES = ("last_gradient",)
START_ANEW = "start anew from these weights by model_name_or_path"


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file that appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(path.name + ".new")
    # Batches are views of one tensor and share others, which safetensors would refuse.
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, staging)
    os.replace(staging, path)


def load_ranks(folder: Path, world_size: int) -> list[dict[str, torch.Tensor]]:
    """
    Every rank's own tensors, in the order of the ranks; nothing for a rank that has saved none.

    An earlier run of more processes may have left further files in the folder, which are not read.
    """
    paths = [folder / RANK_FILE.format(rank) for rank in range(world_size)]
    return [load_file(path) if path.exists() else {} for path in paths]


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
        world_size = None
        if (folder / STATE_FILE).exists():
            with safe_open(folder / STATE_FILE, "pt") as state:
                # Not in those of old versions, which are whole all the same, and refused where one would go on.
                if "world_size" in state.keys():
                    world_size = int(state.get_tensor("world_size"))
    except (OSError, ValueError, SafetensorError):
        return False
    if list(folder.glob("*.new")):
        return False
    found = {path.name for path in folder.glob("rng_state*.pth")}
    if world_size is None:
        world_size = _num_shards(folder) or len(found)
    names = ["rng_state.pth"] if world_size == 1 else [f"rng_state_{rank}.pth" for rank in range(world_size)]
    # With save_only_model there is no random state at all.
    return not found or found.issuperset(names)


def check_resumable(folder: Path, args) -> None:
    """
    Refuse a checkpoint that a run of these settings cannot go on from; reads two small things and loads nothing.

    Args:
        folder (`Path`): the checkpoint.
        args ([`L2TConfig`]): settings of the run that is to go on.

    Raises:
        UserError: if the optimiser's state is sharded otherwise, if another version of this package has saved other things
            than are needed here, or if completions are left that this run cannot use.
    """
    is_sharded, uses_deepspeed = any(folder.glob("global_step*")), args.deepspeed_plugin is not None
    if is_sharded != uses_deepspeed:
        saved, got = ("with", "without") if is_sharded else ("without", "with")
        raise UserError(
            f"{folder} was saved {saved} DeepSpeed's optimiser state, got a run {got} DeepSpeed. Set accelerate_config "
            f"as it was then, or {START_ANEW}."
        )
    saved = _read_state(folder)
    # Plain GRPO has saved nothing but the shards themselves.
    num_shards = _num_shards(folder) if saved is None else saved["world_size"]
    is_split_anew = is_sharded and num_shards not in (None, args.world_size)
    if is_split_anew and not _is_universal(args.deepspeed_plugin):
        raise UserError(
            f"{folder} holds DeepSpeed's shards for num_processes {num_shards}, got {args.world_size}. Set "
            f"num_processes to {num_shards}, or {START_ANEW}."
        )
    if saved is None:
        return
    has_pending = saved.pop("has_pending")
    now = {"world_size": args.world_size} | {name: getattr(args, name) for name in ROLLOUT_SETTINGS}
    if has_pending and saved != now:
        saved["num_processes"], now["num_processes"] = saved.pop("world_size"), now.pop("world_size")
        changed = [name for name in now if saved[name] != now[name]]
        then, got = (", ".join(f"{name} {values[name]}" for name in changed) for values in (saved, now))
        rollout = args.steps_per_generation * args.num_iterations
        every = math.lcm(rollout, args.gradient_accumulation_steps) // args.gradient_accumulation_steps
        raise UserError(
            f"{folder} holds completions that are still to be trained on with {then}, got {got}. Set what it was, or "
            f"resume from a checkpoint that ends a rollout: every {every} steps there is one."
        )


def _read_state(folder: Path) -> dict[str, int] | None:
    """
    Return what a checkpoint's rollouts depend on and whether completions are left, or `None` for one of plain GRPO.

    Raises:
        UserError: if the file lacks an entry, has one that is not known, or cannot be read.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as state:
            names = set(state.keys())
            missing = [name for name in ENTRIES if name not in names]
            if not missing and int(state.get_tensor("bases_step")) >= 0:
                missing = _missing_bases(names)
            unknown = sorted(name for name in names if not _is_known(name))
            if unknown:
                raise UserError(
                    f"{folder} has {', '.join(unknown)} in {STATE_FILE}, which this version of l2t_trl does not know: a "
                    f"newer one has saved it. Update l2t_trl, or {START_ANEW}."
                )
            if missing:
                raise UserError(
                    f"{folder} has no {', '.join(missing)} in {STATE_FILE}, without which this version of l2t_trl cannot go "
                    f"on: an older one has saved it. Go on with that one, or {START_ANEW}."
                )
            return {name: int(state.get_tensor(name)) for name in ("world_size", *ROLLOUT_SETTINGS, "has_pending")}
    except SafetensorError as error:
        raise UserError(
            f"{path} cannot be read ({one_line(error)}). Resume from another checkpoint, or {START_ANEW}."
        ) from error


def _is_known(name: str) -> bool:
    return name in (*ENTRIES, *OPTIONAL_ENTRIES) or name.startswith(("u.", "v."))


def _missing_bases(names: set[str]) -> list[str]:
    """Names of the bases' second halves that are not there; `u.*` stands for all where there are none."""
    modules = {name[2:] for name in names if name.startswith(("u.", "v."))}
    return sorted({f"{half}.{module}" for half in "uv" for module in modules or "*"} - names)


def _num_shards(folder: Path) -> int | None:
    """Number of processes whose shard of the optimiser DeepSpeed has saved; `None` if it has sharded nothing."""
    latest = folder / "latest"
    tag = latest.read_text().strip() if latest.is_file() else "global_step*"
    shards = (re.search(r"zero_pp_rank_(\d+)_", path.name) for path in folder.glob(f"{tag}/*_optim_states.pt"))
    return len({match[1] for match in shards if match}) or None


def _is_universal(deepspeed_plugin) -> bool:
    """Whether DeepSpeed was told to read its universal format, which fits any number of processes."""
    return bool(deepspeed_plugin.deepspeed_config.get("checkpoint", {}).get("load_universal"))


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
