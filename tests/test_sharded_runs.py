"""Runs under several processes and ZeRO stages give the numbers of one process (`sharded_run.py` is what is run)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from l2t_trl.checkpoints import last_complete_checkpoint


TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "accelerate_configs"
RUNS = {
    "adaptation": {},
    "gradient": {"parameter_update": "gradient"},
    "drift": {"parameter_update": "drift"},
    "lora": {"parameter_update": "gradient", "lora": True},
    "grpo": {"method": "grpo", "process_reward_coef": 0, "advantage_form": "sequence"},
}
# Relative to the largest number of the single-process run.
TOLERANCE = 1e-4


def start(folder, output, runs, config=None, num_processes=1, options=(), timeout=600):
    """Run and return the finished process, its output in `stdout`."""
    command = [str(TESTS / "sharded_run.py"), "--model", str(folder), "--output", str(output)]
    command += ["--runs", json.dumps(runs)]
    if config is not None:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
        command = [*launcher, "--num_processes", str(num_processes), "--main_process_port", "0", *options, *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.run(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        env=environment,
        check=False,
    )


def results(output: Path, name: str):
    record = json.loads((output / name / "record.json").read_text())
    return record, load_file(output / name / "weights.safetensors")


def padded(rows: list[list[float]], width: int) -> torch.Tensor:
    return torch.tensor([row + [0.0] * (width - len(row)) for row in rows], dtype=torch.float64)


def difference(theirs: list, ours: list) -> float:
    """Largest difference of two lists of tables, relative to the largest entry of the first."""
    assert len(theirs) == len(ours) > 0
    worst = 0.0
    for first, second in zip(theirs, ours, strict=True):
        width = max(len(row) for row in first + second)
        first, second = padded(first, width), padded(second, width)
        worst = max(worst, ((first - second).abs().max() / first.abs().max().clamp(min=1e-30)).item())
    return worst


def weight_difference(theirs: dict, ours: dict) -> float:
    assert theirs.keys() == ours.keys()
    return max((theirs[name] - ours[name]).abs().max().item() for name in theirs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_folder, tiny_tokenizer):
    """A model whose probabilities are far from uniform, or gains would be differences of almost equal numbers."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tiny_folder, initializer_range=0.15)
    path = tmp_path_factory.mktemp("models") / "decided"
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def single(tmp_path_factory, folder):
    output = tmp_path_factory.mktemp("single")
    finished = start(folder, output, RUNS)
    assert finished.returncode == 0, finished.stdout[-3000:]
    return output


OFFLOAD = ("--offload_optimizer_device", "cpu", "--offload_param_device", "cpu")


@pytest.mark.parametrize(
    ("config", "num_processes", "options"),
    [
        ("cpu", 2, ()),
        ("cpu_zero2", 2, ("--zero_stage", "1")),
        ("cpu_zero2", 2, ()),
        ("cpu_zero3", 2, ()),
        ("cpu_zero3", 2, OFFLOAD),
        ("cpu_zero3", 1, ()),
        ("cpu_zero3", 4, ()),
    ],
    ids=["ddp", "zero1", "zero2", "zero3", "zero3 offload", "zero3 alone", "zero3 by four"],
)
def test_every_arrangement_equals_one_process(tmp_path, folder, single, config, num_processes, options):
    finished = start(folder, tmp_path, RUNS, config, num_processes, options)
    assert finished.returncode == 0, finished.stdout[-3000:]
    grpo = weight_difference(results(single, "grpo")[1], results(tmp_path, "grpo")[1])
    for name in RUNS:
        if name == "grpo":
            continue
        record, weights = results(tmp_path, name)
        expected, expected_weights = results(single, name)
        assert any(any(row) for step in expected["penalties"][1:] for row in step), name
        assert max(abs(gain) for row in expected["gains"][0] for gain in row) > 1e-3
        for key in ("advantages", "gains", "penalties"):
            assert difference(expected[key], record[key]) < TOLERANCE, (name, key)
        # Adam turns the last bits of a small gradient into a step of the learning rate's size, under GRPO as well.
        assert weight_difference(expected_weights, weights) < 3 * max(grpo, 1e-5), name


def test_a_rank_that_raises_ends_the_job_with_its_message(tmp_path, folder):
    finished = start(folder, tmp_path, {"broken": {"fail_on_rank": 1}}, "cpu_zero3", 2, timeout=120)
    assert finished.returncode != 0
    assert "made up: this rank cannot score" in finished.stdout


def test_zero3_gathers_nothing_outside_the_model_and_its_tail(tmp_path, folder):
    """Every explicit gather is recorded: one for the tail per scoring pass, and one per weight of the proxy at start."""
    runs = {name: RUNS[name] | {"records_gathers": True} for name in ("gradient", "drift")}
    finished = start(folder, tmp_path, runs, "cpu_zero3", 2)
    assert finished.returncode == 0, finished.stdout[-3000:]
    for name in runs:
        gathers = results(tmp_path, name)[0]["gathers"]
        proxies, passes = gathers[:3], gathers[3:]
        assert [len(one) for one in proxies] == [1, 1, 1]
        # The check before the first step and three scoring passes: three weights of the MLP, norm, lm_head.
        assert [len(one) for one in passes] == [5] * 4


# Two steps on every rollout, so that a checkpoint after the first holds completions that the second trains on.
SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "num_iterations": 2, "learning_rate": 1e-4}
UPDATES = ("adaptation", "gradient", "drift")


def saving(name: str) -> dict:
    return SAVING | (RUNS["grpo"] if name == "grpo" else {"parameter_update": name})


def resumed(output: Path, name: str, step: int, **settings) -> dict:
    return {name: saving(name) | settings | {"resume": str(output / name / f"checkpoint-{step}")}}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, folder):
    """Runs with a checkpoint after every step, made once for each arrangement."""
    outputs = {}

    def run(config, num_processes):
        if (config, num_processes) not in outputs:
            output = tmp_path_factory.mktemp("unbroken")
            runs = {name: saving(name) for name in (*UPDATES, "grpo")}
            finished = start(folder, output, runs, config, num_processes)
            assert finished.returncode == 0, finished.stdout[-3000:]
            outputs[config, num_processes] = output
        return outputs[config, num_processes]

    return run


def rest(output: Path, name: str, step: int) -> dict:
    """What a run recorded from a step on: a rollout every other step."""
    record, _ = results(output, name)
    return {key: record[key][(step + 1) // 2 :] for key in ("advantages", "gains", "penalties")}


@pytest.mark.parametrize(
    ("config", "num_processes"),
    [(None, 1), ("cpu", 2), ("cpu_zero2", 2), ("cpu_zero3", 2)],
    ids=["alone", "ddp", "zero2", "zero3"],
)
def test_a_resumed_run_equals_an_unbroken_one_bitwise(tmp_path, folder, unbroken, config, num_processes):
    before = unbroken(config, num_processes)
    again, steps = {}, dict(zip(UPDATES, (1, 3, 1), strict=True))
    for name, step in steps.items():
        again |= resumed(before, name, step)
    finished = start(folder, tmp_path, again, config, num_processes)
    assert finished.returncode == 0, finished.stdout[-3000:]
    for name, step in steps.items():
        assert rest(before, name, step) == rest(tmp_path, name, 0), name
        assert weight_difference(results(before, name)[1], results(tmp_path, name)[1]) == 0.0, name


@pytest.mark.parametrize(
    ("before", "after", "settings"),
    [
        ((None, 1), ("cpu", 2), {}),
        # As many completions per process as before, so that one step is made of two backward passes instead of one.
        (("cpu", 2), (None, 1), {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
    ],
    ids=["one to two", "two to one"],
)
def test_another_number_of_processes_goes_on_alike_between_rollouts(
    tmp_path, folder, unbroken, before, after, settings
):
    saved, names = unbroken(*before), (*UPDATES, "grpo")
    again = {}
    for name in names:
        again |= resumed(saved, name, 2, **settings)
    finished = start(folder, tmp_path, again, *after)
    assert finished.returncode == 0, finished.stdout[-3000:]
    grpo = weight_difference(results(saved, "grpo")[1], results(tmp_path, "grpo")[1])
    for name in UPDATES:
        expected, record = rest(saved, name, 2), rest(tmp_path, name, 0)
        assert any(any(row) for row in expected["penalties"][0]), name
        for key in expected:
            assert difference(expected[key], record[key]) < TOLERANCE, (name, key)
        weights = weight_difference(results(saved, name)[1], results(tmp_path, name)[1])
        assert weights < 3 * max(grpo, 1e-5), name


def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(tmp_path, folder):
    runs = {"drift": saving("drift")}
    assert start(folder, tmp_path / "unbroken", runs).returncode == 0
    killed = {"drift": runs["drift"] | {"killed_in_save": 3}}
    assert start(folder, tmp_path / "killed", killed).returncode == -9
    last, incomplete = last_complete_checkpoint(str(tmp_path / "killed" / "drift"))
    assert (last.name, [one.name for one in incomplete]) == ("checkpoint-2", ["checkpoint-3"])
    finished = start(folder, tmp_path / "resumed", resumed(tmp_path / "killed", "drift", 2))
    assert finished.returncode == 0, finished.stdout[-3000:]
    assert (
        weight_difference(results(tmp_path / "unbroken", "drift")[1], results(tmp_path / "resumed", "drift")[1]) == 0.0
    )


def test_another_number_of_shards_is_refused(tmp_path, folder):
    runs = {"drift": saving("drift") | {"max_steps": 1}}
    assert start(folder, tmp_path / "two", runs, "cpu_zero3", 2).returncode == 0
    finished = start(folder, tmp_path / "one", resumed(tmp_path / "two", "drift", 1), "cpu_zero3", 1)
    assert finished.returncode != 0
    assert "holds DeepSpeed's shards for num_processes 2, got 1. Set num_processes to 2" in finished.stdout
