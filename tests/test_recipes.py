"""Every recipe parses strictly, says what it is, and has its control."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from trl import GRPOConfig

from l2t_trl import L2TConfig
from l2t_trl.parsing import parse


ROOT = Path(__file__).parents[1]
RECIPES = sorted(ROOT.glob("recipes/**/*.yaml"))
# Fields of L2TConfig that say what the data is, not what L2T does with it.
DATA_FIELDS = {"answer_column", "max_prompt_length", "on_bad_row"}
L2T_KEYS = (
    {field.name for field in dataclasses.fields(L2TConfig)}
    - {field.name for field in dataclasses.fields(GRPOConfig)}
    - DATA_FIELDS
)
# Settings that only differ because the two runs must not overwrite each other.
PAIR_KEYS = {"method", "output_dir", "run_name"}
HEADER = ("Purpose", "Hardware", "Batch", "Measured", "Expected", "Paper")

name_of = lambda path: str(path.relative_to(ROOT / "recipes"))  # noqa: E731
all_recipes = pytest.mark.parametrize("path", RECIPES, ids=name_of)


def test_there_are_recipes_and_each_lies_at_model_method_data():
    assert len(RECIPES) >= 6
    for path in RECIPES:
        model, method, data = path.relative_to(ROOT / "recipes").parts
        assert method in ("l2t", "grpo")


@all_recipes
def test_recipe_parses_strictly(path):
    # use_cpu: transformers refuses bf16 without a GPU otherwise.
    configuration = parse(["--config", str(path), "--use_cpu", "true"])
    model, method, _ = path.relative_to(ROOT / "recipes").parts
    assert configuration.script.method == method
    assert method in configuration.training.output_dir and model in configuration.training.output_dir
    assert configuration.training.run_name == Path(configuration.training.output_dir).name


@all_recipes
def test_recipe_tells_purpose_hardware_batch_time_and_source(path):
    lines = path.read_text().splitlines()
    assert [line.split(":")[0].removeprefix("# ") for line in lines[:6]] == list(HEADER)
    # Every key ends in where its value comes from, or stands under a comment that says it.
    settings = yaml.safe_load(path.read_text())
    for number, line in enumerate(lines):
        key = re.match(r"([a-z_0-9]+):", line)
        if key and key[1] not in {*PAIR_KEYS}:
            assert "  # " in line or lines[number - 1].startswith("# "), f"{key[1]} has no source"
            assert key[1] in settings


@all_recipes
def test_recipe_holds_only_what_differs_from_the_defaults_or_says_why(path):
    configuration = parse(["--config", str(path), "--use_cpu", "true"])
    defaults = {
        field.name: field.default
        for part in (configuration.script, configuration.training, configuration.model)
        for field in dataclasses.fields(part)
    }
    lines = {line.split(":")[0]: line for line in path.read_text().splitlines() if re.match(r"[a-z_0-9]+:", line)}
    for key, value in yaml.safe_load(path.read_text()).items():
        if key not in PAIR_KEYS and value == defaults.get(key):
            assert re.search(r"#.*(default|off unless asked|stated|paper|official)", lines[key]), (
                f"{key} is the default"
            )


@all_recipes
def test_nothing_is_uploaded_or_reported_unasked(path):
    configuration = parse(["--config", str(path), "--use_cpu", "true"])
    assert configuration.training.push_to_hub is False
    assert configuration.training.report_to == []


@all_recipes
def test_l2t_recipe_and_its_control_differ_in_the_method_alone(path):
    other = ROOT / "recipes" / path.relative_to(ROOT / "recipes").parts[0]
    other = other / ("grpo" if path.parent.name == "l2t" else "l2t") / path.name
    assert other.is_file(), f"{path} has no counterpart"
    ours, theirs = yaml.safe_load(path.read_text()), yaml.safe_load(other.read_text())
    differing = {key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)}
    assert PAIR_KEYS <= differing <= PAIR_KEYS | L2T_KEYS
    grpo = ours if path.parent.name == "grpo" else theirs
    assert not L2T_KEYS & set(grpo)


def test_authors_example_has_their_values():
    training = parse(
        ["--config", str(ROOT / "recipes/Qwen2.5-3B-Instruct/l2t/gsm8k.yaml"), "--use_cpu", "true"]
    ).training
    assert (training.num_generations, training.max_prompt_length, training.max_completion_length) == (12, 512, 2048)
    assert (training.learning_rate, training.beta, training.num_train_epochs) == (1e-6, 0.001, 5)
    assert (training.process_reward_coef, training.compression_coef, training.max_episodes) == (0.8, 0.6, 30)
    # 2 questions per generation, one optimiser step per question.
    assert training.generation_batch_size == 24
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 12


@pytest.mark.parametrize("model", ["tiny", "smollm2", "qwen"])
@pytest.mark.parametrize("method", ["l2t", "grpo"])
def test_makefile_knows_the_recipes(model, method):
    import subprocess

    command = ["make", "-n", "train", f"MODEL={model}", f"METHOD={method}", "MODEL_PATH=/some/folder", "ARGS=--seed 3"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    line = next(line for line in result.stdout.splitlines() if "l2t train" in line)
    recipe = ROOT / line.split("--config ")[1].split()[0]
    assert recipe in RECIPES and recipe.parent.name == method
    assert line.endswith('--model_name_or_path "/some/folder" --seed 3')


def test_makefile_refuses_an_unknown_model():
    import subprocess

    result = subprocess.run(["make", "-n", "train", "MODEL=gpt"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "MODEL=gpt is none of: tiny smollm2 qwen" in result.stderr
