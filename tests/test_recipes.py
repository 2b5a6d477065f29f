"""Every recipe parses strictly, says what it is, and has its control."""

import argparse
import dataclasses
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from trl import GRPOConfig

from l2t_trl import L2TConfig
from l2t_trl.memory import GIB
from l2t_trl.parsing import parse
from l2t_trl.scripts import plan


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
HEADER = ("Purpose", "Hardware", "Batch", "Memory", "Measured", "Expected", "Paper")

name_of = lambda path: str(path.relative_to(ROOT / "recipes"))  # noqa: E731
all_recipes = pytest.mark.parametrize("path", RECIPES, ids=name_of)


def header_of(path: Path) -> dict[str, str]:
    return dict(line.removeprefix("# ").split(": ", 1) for line in path.read_text().splitlines()[: len(HEADER)])


def processes_of(header: dict[str, str]) -> int:
    return int(re.search(r"(\d+) process", header["Hardware"])[1])


def test_there_are_recipes_and_each_lies_at_model_method_data():
    assert len(RECIPES) >= 22
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
def test_recipe_tells_purpose_hardware_batch_memory_time_and_source(path):
    lines = path.read_text().splitlines()
    assert [line.split(":")[0].removeprefix("# ") for line in lines[: len(HEADER)]] == list(HEADER)
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


@all_recipes
def test_header_gives_the_memory_that_the_plan_gives(path):
    header = header_of(path)
    claimed, room, options = re.fullmatch(
        r"([\d.]+) of ([\d.]+) GiB(?: per GPU)? \(l2t plan (.*)\)\.", header["Memory"]
    ).groups()
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    verdict = plan.judge(plan.request_of(parser.parse_args(["--config", str(path), *options.split()])))
    assert f"{verdict.plan.peak / GIB:.1f}" == claimed
    assert verdict.setup.device_bytes == float(room) * GIB
    # Only remarks on vLLM's room are good news.
    assert verdict.fits and all("sequences of" in remark for remark in verdict.remarks)
    # What is planned is what the hardware line has started.
    launched = re.search(r"--accelerate_config \w+", header["Hardware"])
    assert (launched[0] in options) if launched else "--accelerate_config" not in options
    assert f"--gpus {processes_of(header)}x" in options


@all_recipes
def test_batch_is_what_the_header_says(path):
    header = header_of(path)
    training = parse(["--config", str(path), "--use_cpu", "true"]).training
    completions = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes_of(header)
    assert f"{completions} completions" in header["Batch"]
    assert completions % training.num_generations == 0
    tokens = completions * training.max_completion_length
    assert f"{tokens:,} tokens" in header["Batch"] or f"{tokens / 1e6:.1f} million tokens" in header["Batch"]


def test_authors_example_has_their_values():
    path = ROOT / "recipes/Qwen2.5-3B-Instruct/l2t/gsm8k.yaml"
    training = parse(["--config", str(path), "--use_cpu", "true"]).training
    assert (training.num_generations, training.max_prompt_length, training.max_completion_length) == (12, 512, 2048)
    assert (training.learning_rate, training.beta, training.num_train_epochs) == (1e-6, 0.001, 5)
    assert (training.process_reward_coef, training.compression_coef, training.max_episodes) == (0.8, 0.6, 30)
    # 2 questions per generation, one optimiser step per question, on 4 processes.
    assert training.generation_batch_size == 24
    assert 4 * training.per_device_train_batch_size * training.gradient_accumulation_steps == 12


PAPER = {
    "DeepScaleR-1.5B-Preview": "aime-919",
    "DeepSeek-R1-Distill-Qwen-1.5B": "numinamath-4k",
    "DeepSeek-R1-Distill-Qwen-7B": "numinamath-4k",
    "Qwen2-7B-Instruct": "python-functions",
}


@pytest.mark.parametrize("model, data", PAPER.items())
def test_recipes_of_the_papers_models_have_its_values(model, data):
    path = ROOT / "recipes" / model / "l2t" / f"{data}.yaml"
    configuration = parse(["--config", str(path), "--use_cpu", "true"])
    script, training = configuration.script, configuration.training
    assert script.dataset_name == data
    assert (training.max_prompt_length, training.max_completion_length) == (4096, 16384)
    assert (training.learning_rate, training.weight_decay, training.warmup_steps) == (1e-6, 0.01, 0.1)
    assert training.lr_scheduler_type == "cosine" and training.bf16 and training.use_vllm
    assert 8 * training.per_device_train_batch_size * training.gradient_accumulation_steps == 256
    assert training.proxy_rank_ratio == (0.005 if "7B" in model else 0.05)
    is_code = data == "python-functions"
    assert script.reward_funcs == (["code"] if is_code else ["accuracy"])
    assert training.correctness_estimator == ("rollout" if is_code else "answer_likelihood")
    # R1's models get no system prompt and think in paragraphs; the others are asked for episodes.
    is_r1 = model.startswith("Deep")
    assert (script.system_prompt is None) == is_r1
    assert training.episode_format == ("auto" if is_r1 else "tags")
    assert training.temperature == (0.6 if is_r1 else 1.0)


def test_readme_lists_every_recipe_with_its_status():
    text = (ROOT / "README.md").read_text().split("## Recipes")[1].split("\n## ")[0]
    for path in RECIPES:
        (line,) = [line for line in text.splitlines() if f"(recipes/{name_of(path)})" in line]
        was_run = header_of(path)["Measured"] != "not run yet."
        assert ("| run" in line) == was_run or "control not run yet" in line, name_of(path)


def test_all_models_but_tiny_have_gsm8k():
    models = {path.relative_to(ROOT / "recipes").parts[0] for path in RECIPES}
    assert models == {*PAPER, "Qwen2.5-3B-Instruct", "SmolLM2-135M-Instruct", "tiny"}
    for model in models - {"tiny"}:
        assert (ROOT / "recipes" / model / "l2t" / "gsm8k.yaml").is_file()


# The Makefile


def make(*words: str) -> subprocess.CompletedProcess:
    # PYTHON said: else every call looks for one.
    return run_make("-n", *words, "PYTHON=python3")


def run_make(*words: str) -> subprocess.CompletedProcess:
    # As from a shell, also where `make test` runs this.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    return subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True, env=environment)


def makefile_table() -> dict[str, list[str]]:
    """Data sets of each MODEL, as `make help` shows them."""
    shown = run_make("help").stdout
    rows = [re.split(r" {2,}", line.strip()) for line in shown.split("MODEL=")[-1].splitlines()[1:]]
    return {row[0]: row[2].split() for row in rows}


def test_every_recipe_can_be_made_and_every_combination_has_a_recipe():
    made, table = set(), makefile_table()
    for model, data_sets in table.items():
        for data in data_sets:
            for method in ("l2t", "grpo"):
                words = [f"MODEL={model}", f"DATA={data}", f"METHOD={method}"]
                result = make("train", *words, "MODEL_PATH=/some/folder", "ARGS=--seed 3")
                assert result.returncode == 0, result.stderr
                (line,) = [line for line in result.stdout.splitlines() if "l2t train" in line]
                assert line.endswith('--model_name_or_path "/some/folder" --seed 3')
                recipe = ROOT / line.split("--config ")[1].split()[0]
                assert (recipe.parent.name, recipe.stem) == (method, data)
                # It starts as many processes as the recipe says, and takes rollouts from vLLM.
                launch = re.search(r"--accelerate_config [\w -]+", header_of(recipe)["Hardware"])
                assert (f" {launch[0]} --model" in line) if launch else "--accelerate_config" not in line
                assert "--use_vllm true" in line
                made.add(recipe)
    assert made == set(RECIPES)


def test_default_data_are_the_papers():
    table = makefile_table()
    defaults = {model: data[0] for model, data in table.items()}
    assert defaults == {
        "tiny": "arithmetic",
        "smollm2": "gsm8k",
        "qwen": "gsm8k",
        "qwen2-7b": "python-functions",
        "r1-1.5b": "numinamath-4k",
        "r1-7b": "numinamath-4k",
        "deepscaler": "aime-919",
    }
    for model, data in defaults.items():
        assert f"/l2t/{data}.yaml" in make("train", f"MODEL={model}").stdout


@pytest.mark.parametrize(
    "words, message",
    [
        (["MODEL=gpt"], "MODEL=gpt is none of: tiny smollm2 qwen qwen2-7b r1-1.5b r1-7b deepscaler"),
        (["MODEL=r1-7b", "DATA=aime-919"], "DATA=aime-919 is none of: numinamath-4k gsm8k"),
        (["METHOD=ppo"], "METHOD=ppo is none of: l2t grpo"),
        (["VLLM=yes"], "VLLM=yes is none of: 0 1"),
    ],
)
def test_makefile_says_what_there_is(words, message):
    result = make("train", *words)
    assert result.returncode == 2 and result.stdout == ""
    assert message in result.stderr


def test_vllm_and_launcher_can_be_chosen():
    line = make("train", "MODEL=qwen", "VLLM=0", "ACCELERATE=").stdout.splitlines()[-1]
    assert line.endswith("gsm8k.yaml --use_vllm false ")
    assert "--use_vllm true" in make("train", "VLLM=1").stdout.splitlines()[-1]
