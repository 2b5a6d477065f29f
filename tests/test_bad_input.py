"""Mistakes of a user, through the command: one message that says what is wrong, exit code 2, and no training."""

import json
import os
import shutil

import pytest

from l2t_trl.cli import main


@pytest.fixture
def train_error(tiny_folder, tmp_path, capsys, monkeypatch):
    """Run `l2t train` with a usable setting for all but what is given, and return its one error message."""
    import trl

    def no_training(*args, **kwargs):
        raise AssertionError("training started")

    monkeypatch.setattr(trl.GRPOTrainer, "train", no_training)

    def run(rows=None, **settings) -> str:
        rows = [{"question": f"{k} + 1?", "answer": str(k + 1)} for k in range(4)] if rows is None else rows
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {
            "model_name_or_path": str(tiny_folder),
            "dataset_name": str(data),
            "output_dir": str(tmp_path / "out"),
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "num_generations": 2,
            "per_device_train_batch_size": 2,
        } | settings
        argv = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        assert main(["train", *argv]) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith("l2t train: error: ")
        return message

    return run


def test_usable_settings_reach_training(train_error):
    # Without this, every other test here could pass for a wrong reason.
    with pytest.raises(AssertionError, match="training started"):
        train_error()


GOOD = {"question": "1 + 1?", "answer": "2"}


@pytest.mark.parametrize(
    ("rows", "settings", "expected"),
    [
        ([{"question": "a", "gold": "1"}], {}, "no column 'answer' (answer_column); its columns are question, gold."),
        (
            [GOOD, {"question": "", "answer": "1"}],
            {},
            "1 of 2 rows cannot be used (counted from 0). empty prompt: 1 (row 1).",
        ),
        ([GOOD, {"question": None, "answer": "1"}], {}, "empty prompt: 1 (row 1)"),
        ([GOOD, {"question": "a", "answer": None}], {}, "answer is null: 1 (row 1)"),
        ([GOOD, {"question": "a", "answer": " "}], {}, "answer is empty: 1 (row 1)"),
        (
            [GOOD, {"question": "a" * 200, "answer": "1"}],
            {"max_prompt_length": 100},
            "longer than max_prompt_length=100",
        ),
        ([{"question": "", "answer": "1"}], {"on_bad_row": "drop"}, "All 1 rows were dropped, none is left."),
        ([], {}, "the data set has no rows."),
    ],
)
def test_bad_rows(train_error, rows, settings, expected):
    message = train_error(rows, **settings)
    assert "rows.jsonl: " in message and expected in message


def test_missing_data_file(train_error, tmp_path):
    assert "no.jsonl: no such file" in train_error(dataset_name=str(tmp_path / "no.jsonl"))


def test_missing_model(train_error):
    assert "model_name_or_path /no/such/model: no such folder." in train_error(model_name_or_path="/no/such/model")


def test_damaged_weights(train_error, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"weights file {weights} is damaged or incomplete" in train_error(model_name_or_path=str(folder))


def test_output_folder_under_a_file(train_error, tmp_path):
    (tmp_path / "file").write_text("")
    message = train_error(output_dir=str(tmp_path / "file" / "out"))
    assert "file/out cannot be written: Not a directory. Set another output_dir." in message


def test_read_only_output_folder(train_error, tmp_path):
    if os.geteuid() == 0:
        # Root may write anywhere but into the kernel's file systems.
        folder = "/proc/self/l2t-out"
    else:
        folder = tmp_path / "read-only"
        folder.mkdir(mode=0o555)
    assert f"output_dir {folder} cannot be written" in train_error(output_dir=str(folder))


def test_checkpoint_that_is_none(train_error, tmp_path):
    message = train_error(resume_from_checkpoint=str(tmp_path))
    assert f"resume_from_checkpoint {tmp_path} is not a checkpoint folder" in message


def test_checkpoint_of_other_shards(train_error, tmp_path):
    (tmp_path / "global_step3").mkdir()
    (tmp_path / "trainer_state.json").write_text("{}")
    message = train_error(resume_from_checkpoint=str(tmp_path), model_name_or_path="neither/here")
    assert f"{tmp_path} was saved with DeepSpeed's optimiser state, got a run without DeepSpeed" in message


def test_unknown_reward(train_error):
    assert "reward_funcs: 'acuracy' is none of accuracy, format" in train_error(reward_funcs="acuracy")


def test_module_pattern_that_matches_nothing(train_error):
    assert "no_such_module" in train_error(proxy_modules="no_such_module")


def test_vllm_that_is_not_installed(train_error, monkeypatch):
    from trl import import_utils

    monkeypatch.setattr(import_utils, "is_vllm_available", lambda: False)
    assert "vLLM is not installed" in train_error(use_vllm=True)


@pytest.mark.parametrize(("name", "value"), [("max_episodes", 0), ("proxy_rank_ratio", 0), ("proxy_rank_ratio", 1.5)])
def test_values_out_of_range(train_error, name, value):
    assert f"command line: {name} must be" in train_error(**{name: value})
