"""`l2t train` from recipe to report, on random-weight models of the recipes' architecture."""

import json
from pathlib import Path

import pytest

from l2t_trl.cli import main
from l2t_trl.progress import step_line


ROOT = Path(__file__).parents[1]


@pytest.fixture
def run_recipe(tiny_folder, tmp_path, monkeypatch):
    """Run a recipe on the CPU with the tiny model, made-up GSM8K rows and few tokens; return the output folder."""
    folder = tmp_path / "data" / "openai" / "gsm8k" / "main"
    folder.mkdir(parents=True)
    rows = [{"question": f"What is {k} plus 1?", "answer": f"{k} + 1 = {k + 1}\n#### {k + 1}"} for k in range(80)]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("L2T_DATA_ROOT", str(tmp_path / "data"))

    def run(recipe: str, **settings) -> Path:
        settings = {
            "model_name_or_path": str(tiny_folder),
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "use_vllm": False,
            "bf16": False,
            "dtype": "float32",
            "max_prompt_length": 2048,
            "max_completion_length": 8,
            "max_steps": 1,
            "test_size": 2,
        } | settings
        argv = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        assert main(["train", "--config", str(ROOT / "recipes" / recipe), *argv]) == 0
        return Path(settings["output_dir"])

    return run


def log_of(output: Path) -> list[dict]:
    return json.loads((output / "metrics.json").read_text())["log"]


@pytest.mark.parametrize("method", ["l2t", "grpo"])
def test_qwen_recipe_trains_and_reports(run_recipe, capsys, method):
    from transformers import AutoModelForCausalLM

    output = run_recipe(f"Qwen2.5-3B-Instruct/{method}/gsm8k.yaml")
    text = capsys.readouterr().out
    assert "Data: openai/gsm8k, 80 rows to train on, 2 to evaluate on." in text
    assert "accuracy, % correct" in text and "tokens per completion" in text
    assert text.rstrip().endswith(str(output))
    AutoModelForCausalLM.from_pretrained(output)
    assert (output / "plots" / "accuracy_at_budget.png").is_file()
    card = (output / "README.md").read_text()
    assert "## Results" in card and "`openai/gsm8k`" in card
    assert f"trained with {method.upper()}" in card and "None" not in card.split("## Citations")[0]
    keys = {key for entry in log_of(output) for key in entry}
    assert ("l2t/fitting_gain/mean" in keys) == (method == "l2t")


def test_smollm2_recipe_trains_an_adapter(run_recipe):
    output = run_recipe("SmolLM2-135M-Instruct/l2t/gsm8k.yaml")
    assert (output / "adapter_model.safetensors").is_file()


def test_interrupted_run_goes_on_from_its_last_checkpoint(run_recipe):
    recipe, settings = (
        "tiny/l2t/arithmetic.yaml",
        {"per_device_train_batch_size": 8, "train_size": 16, "eval_samples": 1},
    )
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_before_after": False}
    # Without a checkpoint, auto starts from the beginning.
    output = run_recipe(recipe, **settings, **saving, max_steps=1, resume_from_checkpoint="auto")
    assert (output / "checkpoint-1").is_dir()
    assert not (output / "metrics.json").exists()
    run_recipe(recipe, **settings, max_steps=2, resume_from_checkpoint="auto")
    # The log goes on: step 1 comes from the checkpoint, and only step 2 was made now.
    assert [entry["step"] for entry in log_of(output) if "reward" in entry] == [1, 2]


def test_step_line_tells_what_is_there():
    logs = {"reward": 0.5, "completions/mean_length": 81.25, "l2t/fitting_gain/mean": 0.0216, "loss": 1.0}
    assert step_line(3, 80, logs) == "step  3/80  reward 0.500  tokens 81.2  gain +0.022"
    assert step_line(80, 80, {"train_runtime": 3.0}) == ""
