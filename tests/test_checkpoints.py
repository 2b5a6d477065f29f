"""What a checkpoint holds, and how a half-written one is told from a whole one."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from l2t_trl.checkpoints import (
    ENTRIES,
    RANK_FILE,
    STATE_FILE,
    check_resumable,
    is_complete,
    last_complete_checkpoint,
    load_ranks,
    pack_batches,
    save_tensors,
    unpack_batches,
)
from l2t_trl.errors import UserError


def write_checkpoint(folder, world_size=1, is_sharded=False, has_pending=False):
    folder.mkdir(parents=True)
    state = dict.fromkeys(ENTRIES, 0) | {"world_size": world_size, "steps_per_generation": 2}
    state |= {"per_device_train_batch_size": 4, "has_pending": has_pending}
    state |= {f"{half}.mlp.{name}": 0 for half in "uv" for name in ("up", "down")}
    save_tensors(folder / STATE_FILE, {name: torch.tensor(value) for name, value in state.items()})
    if is_sharded:
        (folder / "latest").write_text("global_step3")
        (folder / "global_step3").mkdir()
        for rank in range(world_size):
            name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            (folder / "global_step3" / name).write_bytes(b"state")
    names = ["rng_state.pth"] if world_size == 1 else [f"rng_state_{rank}.pth" for rank in range(world_size)]
    for name in names:
        (folder / name).write_bytes(b"state")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    return folder


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_whole_checkpoint_is_complete(tmp_path, world_size):
    assert is_complete(write_checkpoint(tmp_path / "checkpoint-1", world_size))


def grpo(folder):
    """A checkpoint of plain GRPO, which has no state of ours."""
    (folder / STATE_FILE).unlink()
    return folder


def rewrite(folder, without=(), **others):
    state = load_file(folder / STATE_FILE)
    kept = {name: value for name, value in state.items() if name not in without}
    save_tensors(folder / STATE_FILE, kept | {name: torch.tensor(value) for name, value in others.items()})
    return folder


@pytest.mark.parametrize(("world_size", "is_sharded"), [(1, False), (2, False), (2, True)])
def test_a_checkpoint_of_grpo_is_complete(tmp_path, world_size, is_sharded):
    folder = grpo(write_checkpoint(tmp_path / "checkpoint-1", world_size, is_sharded))
    assert is_complete(folder)
    if world_size == 2:
        (folder / f"rng_state_{0 if not is_sharded else 1}.pth").unlink()
        assert not is_complete(folder)


def test_a_checkpoint_of_an_old_version_is_complete(tmp_path):
    # It is found, so that it can be refused, rather than passed over.
    folder = rewrite(write_checkpoint(tmp_path / "checkpoint-1", world_size=2), without=["world_size"])
    assert is_complete(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "trainer_state.json").unlink(),
        lambda folder: (folder / "trainer_state.json").write_text('{"global_step"'),
        lambda folder: (folder / STATE_FILE).write_bytes(b"\x10"),
        lambda folder: (folder / "rng_state_1.pth").unlink(),
        lambda folder: (folder / (RANK_FILE.format(1) + ".new")).write_bytes(b""),
    ],
    ids=["no state", "cut state", "cut tensors", "a rank's random state", "a rank's file under way"],
)
def test_a_cut_off_checkpoint_is_not(tmp_path, damage):
    folder = write_checkpoint(tmp_path / "checkpoint-1", world_size=2)
    damage(folder)
    assert not is_complete(folder)


def test_the_last_complete_checkpoint_is_found(tmp_path):
    for step in (2, 10, 9):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-10" / "trainer_state.json").unlink()
    folder, incomplete = last_complete_checkpoint(str(tmp_path))
    assert (folder.name, [one.name for one in incomplete]) == ("checkpoint-9", ["checkpoint-10"])
    assert last_complete_checkpoint(str(tmp_path / "nothing")) == (None, [])


def test_tensors_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a" / STATE_FILE
    save_tensors(path, {"x": torch.ones(2)})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("l2t_trl.checkpoints.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_tensors(path, {"x": torch.zeros(2)})
    monkeypatch.undo()
    save_tensors(path.with_name(RANK_FILE.format(3)), {"y": torch.ones(1)})
    save_tensors(path.with_name(RANK_FILE.format(0)), {"y": torch.zeros(1)})
    assert [one.get("y") for one in load_ranks(path.parent, 4)] == [torch.zeros(1), None, None, torch.ones(1)]
    assert len(list(path.parent.iterdir())) == 3


def test_files_of_more_processes_than_have_saved_are_not_read(tmp_path):
    for rank in range(3):
        save_tensors(tmp_path / RANK_FILE.format(rank), {"y": torch.tensor(rank)})
    assert [one["y"].item() for one in load_ranks(tmp_path, 2)] == [0, 1]


DEEPSPEED = SimpleNamespace(deepspeed_config={})
UNIVERSAL = SimpleNamespace(deepspeed_config={"checkpoint": {"load_universal": True}})


def settings(world_size, deepspeed_plugin=None, **others) -> SimpleNamespace:
    defaults = {
        "steps_per_generation": 2,
        "per_device_train_batch_size": 4,
        "num_iterations": 3,
        "gradient_accumulation_steps": 2,
    }
    return SimpleNamespace(world_size=world_size, deepspeed_plugin=deepspeed_plugin, **defaults | others)


@pytest.mark.parametrize(
    ("is_sharded", "has_pending", "args"),
    [
        (False, False, settings(1)),
        (False, False, settings(4, per_device_train_batch_size=2)),
        (False, True, settings(2)),
        (True, True, settings(2, DEEPSPEED)),
        (True, False, settings(4, UNIVERSAL)),
    ],
)
def test_a_checkpoint_that_fits_is_resumed(tmp_path, is_sharded, has_pending, args):
    check_resumable(write_checkpoint(tmp_path / "checkpoint-3", 2, is_sharded, has_pending), args)


@pytest.mark.parametrize(
    ("is_sharded", "has_pending", "args", "message"),
    [
        (True, False, settings(4, DEEPSPEED), "num_processes 2, got 4. Set num_processes to 2, or start anew"),
        (True, False, settings(2), "saved with DeepSpeed's optimiser state, got a run without DeepSpeed."),
        (False, False, settings(2, DEEPSPEED), "saved without DeepSpeed's optimiser state, got a run with DeepSpeed."),
        (False, True, settings(1), "with num_processes 2, got num_processes 1. Set what it was"),
        (False, True, settings(1), "every 3 steps"),
        (False, True, settings(1, gradient_accumulation_steps=4), "every 3 steps"),
        (False, True, settings(1, gradient_accumulation_steps=1), "every 6 steps"),
        (True, True, settings(4, UNIVERSAL), "with num_processes 2, got num_processes 4."),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, is_sharded, has_pending, args, message):
    folder = write_checkpoint(tmp_path / "checkpoint-3", 2, is_sharded, has_pending)
    with pytest.raises(ValueError, match=f"{re.escape(str(folder))} .*{re.escape(message)}"):
        check_resumable(folder, args)


@pytest.mark.parametrize(
    ("without", "others", "message"),
    [
        (
            ["steps_per_generation", "per_device_train_batch_size", "has_pending"],
            {},
            "has no steps_per_generation, per_device_train_batch_size, has_pending in l2t_state.safetensors, without "
            "which this version of l2t_trl cannot go on: an older one has saved it. Go on with that one, or start anew",
        ),
        (["world_size", "step"], {}, "has no step, world_size in"),
        (["penalty.gain_sum"], {}, "has no penalty.gain_sum in"),
        (["v.mlp.up"], {}, "has no v.mlp.up in"),
        ([f"{half}.mlp.{name}" for half in "uv" for name in ("up", "down")], {}, "has no u.*, v.* in"),
        (
            [],
            {"momentum": 1, "penalty.new_sum": 2},
            "has momentum, penalty.new_sum in l2t_state.safetensors, which this version of l2t_trl does not know: a newer "
            "one has saved it. Update l2t_trl, or start anew from these weights by model_name_or_path.",
        ),
    ],
)
def test_a_checkpoint_of_another_version_is_refused_at_once(tmp_path, without, others, message):
    folder = rewrite(write_checkpoint(tmp_path / "checkpoint-3"), without, **others)
    with pytest.raises(UserError, match=f"{re.escape(str(folder))} {re.escape(message)}"):
        check_resumable(folder, settings(1))


def test_what_a_checkpoint_may_lack_or_have(tmp_path):
    folder = rewrite(write_checkpoint(tmp_path / "a"), last_gradient=1.0)
    check_resumable(folder, settings(1))
    # Saved before anything was scored: without bases.
    bases = [f"{half}.mlp.{name}" for half in "uv" for name in ("up", "down")]
    check_resumable(rewrite(folder, bases, bases_step=-1), settings(1))


def test_a_damaged_state_is_named(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint-3")
    (folder / STATE_FILE).write_bytes(b"\x10")
    with pytest.raises(
        UserError, match=r"l2t_state.safetensors cannot be read \(.*\). Resume from another checkpoint"
    ):
        check_resumable(folder, settings(1))


def test_shards_of_plain_grpo_fit_as_many_processes_as_have_saved_them(tmp_path):
    folder = grpo(write_checkpoint(tmp_path / "checkpoint-3", 2, is_sharded=True))
    # Of an earlier save under another tag.
    (folder / "global_step2").mkdir()
    (folder / "global_step2" / "bf16_zero_pp_rank_7_mp_rank_00_optim_states.pt").write_bytes(b"state")
    check_resumable(folder, settings(2, DEEPSPEED))
    check_resumable(folder, settings(4, UNIVERSAL))
    for world_size in (1, 4):
        with pytest.raises(
            UserError, match=f"for num_processes 2, got {world_size}. Set num_processes to 2, or start"
        ):
            check_resumable(folder, settings(world_size, DEEPSPEED))
    # Without ZeRO nothing is sharded, and any number fits.
    for path in folder.glob("global_step*/*"):
        path.rename(path.with_name("mp_rank_00_model_states.pt"))
    check_resumable(folder, settings(4, DEEPSPEED))


def test_tensors_that_share_memory_are_written(tmp_path):
    whole = torch.arange(6).view(2, 3)
    save_tensors(tmp_path / STATE_FILE, {"whole": whole, "same": whole, "part": whole[1:], "column": whole[:, 1]})
    loaded = load_file(tmp_path / STATE_FILE)
    assert loaded["same"].tolist() == whole.tolist()
    assert (loaded["part"].tolist(), loaded["column"].tolist()) == ([[3, 4, 5]], [1, 4])


def test_batches_survive_packing():
    batches = [{"ids": torch.arange(4).view(2, 2), "mask": None, "count": torch.tensor(3)} for _ in range(11)]
    for index, batch in enumerate(batches):
        batch["ids"] = batch["ids"] + index
    restored = unpack_batches(pack_batches(batches))
    assert [batch["ids"].tolist() for batch in restored] == [batch["ids"].tolist() for batch in batches]
    assert all(batch.keys() == {"ids", "count"} for batch in restored)
