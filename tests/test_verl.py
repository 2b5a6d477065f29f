"""verl's layout, written and read."""

import json

import pytest
from datasets import load_dataset

from l2t_trl.cli import main
from l2t_trl.data.loading import load_rows
from l2t_trl.data.verl import L2T_SYSTEM_PROMPT, from_verl, is_verl, to_verl
from l2t_trl.errors import UserError
from l2t_trl.scripts.train import L2TScriptArguments
from trainers import loading_settings


SOLUTION = "He has 2,000 + 125 = <<2000+125=2125>>2,125.\n#### 2,125"
QUESTION = "How many clips?"


@pytest.fixture
def args():
    return loading_settings()


@pytest.fixture
def gsm8k(tmp_path, monkeypatch):
    """A data root with a GSM8K of two training rows and one test row."""
    folder = tmp_path / "root" / "openai" / "gsm8k" / "main"
    folder.mkdir(parents=True)
    rows = [{"question": QUESTION, "answer": SOLUTION}, {"question": "How cold?", "answer": "Very.\n#### -3"}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.jsonl").write_text(json.dumps(rows[1]) + "\n")
    monkeypatch.setenv("L2T_DATA_ROOT", str(tmp_path / "root"))


def write_parquet(path, rows):
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet(str(path))
    return str(path)


def test_row_as_verl_writes_it():
    row = to_verl(QUESTION, "2125", SOLUTION, "openai/gsm8k", "train", 7)
    assert list(row) == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    assert row == {
        "data_source": "openai/gsm8k",
        "prompt": [
            {
                "role": "user",
                "content": 'How many clips? Let\'s think step by step and output the final answer after "####".',
            }
        ],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "2125"},
        "extra_info": {"split": "train", "index": 7, "answer": SOLUTION, "question": QUESTION},
    }


def test_row_as_the_authors_write_it():
    row = to_verl(QUESTION, "2125", SOLUTION, "openai/gsm8k", "train", 7, form="l2t")
    system, user = row["prompt"]
    assert system == {"role": "system", "content": L2T_SYSTEM_PROMPT}
    for word in ("<think>", "</think>", "<episode_1>", "</episode_1>"):
        assert word in L2T_SYSTEM_PROMPT
    assert user["content"] == ('How many clips? Please reason step by step, and output the final answer after "####".')
    rest = to_verl(QUESTION, "2125", SOLUTION, "openai/gsm8k", "train", 7)
    assert {key: row[key] for key in row if key != "prompt"} == {key: rest[key] for key in rest if key != "prompt"}
    own = to_verl(QUESTION, "2125", SOLUTION, "openai/gsm8k", "train", 7, form="l2t", system_prompt="Think.")
    assert own["prompt"][0]["content"] == "Think."


def test_other_sets_ask_for_a_box():
    for form in ("verl", "l2t"):
        row = to_verl("Q?", "1", "1", "math-ai/amc23", "test", 0, form)
        assert "\\boxed{}" in row["prompt"][-1]["content"] and "####" not in row["prompt"][-1]["content"]


def test_files_of_gsm8k(gsm8k, tmp_path, capsys):
    assert main(["data", "to-verl", "gsm8k", "--output", str(tmp_path / "out")]) == 0
    train = load_dataset("parquet", data_files=str(tmp_path / "out/gsm8k/train.parquet"), split="train")
    assert train.column_names == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    assert train[0] == to_verl(QUESTION, "2125", SOLUTION, "openai/gsm8k", "train", 0)
    assert [row["extra_info"]["index"] for row in train] == [0, 1]
    assert len(load_dataset("parquet", data_files=str(tmp_path / "out/gsm8k/test.parquet"), split="train")) == 1
    assert f"2 rows: {tmp_path}/out/gsm8k/train.parquet" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["verl", "l2t"])
def test_round_trip(gsm8k, tmp_path, args, tiny_tokenizer, form):
    assert main(["data", "to-verl", "gsm8k", "--output", str(tmp_path), "--form", form]) == 0
    script = L2TScriptArguments(dataset_name=str(tmp_path / "gsm8k"))
    train, test = load_rows(script, args, tiny_tokenizer)
    assert (len(train), len(test)) == (2, 1)
    expected = to_verl(QUESTION, "2125", SOLUTION, "openai/gsm8k", "train", 0, form)
    assert train[0]["prompt"] == expected["prompt"]
    assert train["answer"][:] == ["2125", "-3"]
    assert set(train["data_source"]) == {"openai/gsm8k"}
    # The file alone, too.
    script = L2TScriptArguments(dataset_name=str(tmp_path / "gsm8k" / "train.parquet"))
    assert load_rows(script, args, tiny_tokenizer)[0]["answer"][:] == ["2125", "-3"]


def test_round_trip_of_several_golds(tmp_path, monkeypatch, args, tiny_tokenizer):
    rows = [
        {"ID": "1983-1", "Year": 1983, "Question": "A?", "Answer": "60"},
        {"ID": "2022-II-8", "Year": 2022, "Question": "B?", "Answer": "080 or 081 (both were accepted)"},
    ]
    folder = tmp_path / "di-zhang-fdu" / "AIME_1983_2024"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("L2T_DATA_ROOT", str(tmp_path))
    assert main(["data", "to-verl", "aime-919", "--output", str(tmp_path)]) == 0
    train, _ = load_rows(L2TScriptArguments(dataset_name=str(tmp_path / "aime-919")), args, tiny_tokenizer)
    assert train["answer"][:] == ["60", "080"]
    assert train["accepted_answers"][:] == [["60"], ["080", "081"]]
    straight, _ = load_rows(L2TScriptArguments(dataset_name="aime-919"), args, tiny_tokenizer)
    assert straight["accepted_answers"][:] == [None, ["080", "081"]]
    raw, _ = load_rows(L2TScriptArguments(dataset_name="di-zhang-fdu/AIME_1983_2024"), args, tiny_tokenizer)
    assert raw["answer"][:] == ["60", "080"] and raw["accepted_answers"][1] == ["080", "081"]


def test_tiers_and_verifiers_are_kept(tmp_path, args, tiny_tokenizer):
    rows = [
        {"question": "A?", "answer": "1", "tier": 2, "reasoning_task": "countdown"},
        {"question": "B?", "answer": "2", "tier": None, "reasoning_task": None},
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "to-verl", str(tmp_path / "mine.jsonl"), "--output", str(tmp_path)]) == 0
    file = tmp_path / "mine" / "train.parquet"
    written = load_dataset("parquet", data_files=str(file), split="train")
    assert [row["tier"] for row in written["extra_info"]] == [2, None]
    train, _ = load_rows(L2TScriptArguments(dataset_name=str(file)), args, tiny_tokenizer)
    assert train["tier"][:] == [2, None] and train["reasoning_task"][:] == ["countdown", None]


def test_system_prompt_and_instruction_of_the_run_come_on_top(tmp_path, args, tiny_tokenizer):
    path = write_parquet(tmp_path / "rows.parquet", [to_verl("Q?", "1", "1", "math-ai/amc23", "test", 0)])
    script = L2TScriptArguments(dataset_name=path, system_prompt="Be brief.", instruction="Box it.")
    train, _ = load_rows(script, args, tiny_tokenizer)
    system, user = train[0]["prompt"]
    assert system["content"] == "Be brief." and user["content"].endswith("\nBox it.")


@pytest.mark.parametrize(
    ("truth", "extra_info", "answer", "several"),
    [
        ("7", {}, "7", None),
        (7, None, "7", None),
        (7.0, {}, "7", None),
        (["7", "8"], {}, "7", ["7", "8"]),
        ([], {}, None, None),
        (None, {}, None, None),
        ("7", {"accepted_answers": ["7", "8"]}, "7", ["7", "8"]),
    ],
)
def test_golds_of_other_files(truth, extra_info, answer, several):
    row = {"prompt": "Q?", "reward_model": {"ground_truth": truth}, "extra_info": extra_info, "ability": "math"}
    expected = {"prompt": "Q?", "ability": "math", "answer": answer}
    assert from_verl(row) == (expected | {"accepted_answers": several} if several else expected)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q?"},
        {"prompt": "Q?", "reward_model": "rule"},
        {"prompt": "Q?", "reward_model": {"style": "rule"}},
        {"question": "Q?", "reward_model": {"ground_truth": "1"}},
    ],
)
def test_rows_that_are_not_in_verls_layout(row):
    assert not is_verl([row])
    assert not is_verl([{"prompt": "Q?", "reward_model": {"ground_truth": "1"}}, row])


def test_parquet_that_is_neither_is_refused(tmp_path, args, tiny_tokenizer):
    path = write_parquet(tmp_path / "rows.parquet", [{"prompt": "Q?", "reward_model": {"style": "rule"}}])
    with pytest.raises(UserError) as caught:
        load_rows(L2TScriptArguments(dataset_name=path), args, tiny_tokenizer)
    assert str(caught.value).endswith(
        "rows.parquet: no column 'answer' (answer_column); its columns are prompt, reward_model. "
        "Nor is it in verl's layout (prompt, and reward_model with ground_truth)."
    )


def test_rows_that_a_verl_file_has_beside_verls_are_named(tmp_path, args, tiny_tokenizer, capsys):
    rows = [to_verl("Q?", "1", "1", "math-ai/amc23", "test", index) for index in range(3)]
    rows[1]["reward_model"] = None
    path = write_parquet(tmp_path / "rows.parquet", rows)
    with pytest.raises(UserError, match=r"Only a part .* but not 1 \(row 1\)\.$"):
        load_rows(L2TScriptArguments(dataset_name=path), args, tiny_tokenizer)
    assert main(["data", "show", path]) == 2
    assert "but not 1 (row 1)." in capsys.readouterr().err


def test_columns_that_the_user_names_come_before_verls_layout(tmp_path, args, tiny_tokenizer):
    row = to_verl("Q?", "1", "1", "math-ai/amc23", "test", 0) | {"mine": "own question", "gold": "5"}
    path = write_parquet(tmp_path / "rows.parquet", [row])
    args.answer_column = "gold"
    train, _ = load_rows(L2TScriptArguments(dataset_name=path, question_column="mine"), args, tiny_tokenizer)
    assert train[0]["prompt"][-1]["content"] == "own question" and train[0]["answer"] == "5"


def test_missing_gold_is_a_bad_row(tmp_path, args, tiny_tokenizer):
    rows = [to_verl("Q?", "1", "1", "math-ai/amc23", "test", index) for index in range(2)]
    rows[1]["reward_model"]["ground_truth"] = None
    path = write_parquet(tmp_path / "rows.parquet", rows)
    with pytest.raises(UserError, match=r"answer is null: 1 \(row 1\)"):
        load_rows(L2TScriptArguments(dataset_name=path), args, tiny_tokenizer)


def test_what_has_no_place_in_verls_layout_is_refused(tmp_path, capsys):
    own = write_parquet(tmp_path / "own.parquet", [to_verl("Q?", "1", "1", "math-ai/amc23", "train", 0)])
    code = tmp_path / "code.jsonl"
    code.write_text(json.dumps({"question": "Write f.", "tests": "assert f() == 1"}) + "\n")
    for path, message in ((own, "is in verl's layout already"), (code, "row 0 has tests in place of an answer")):
        assert main(["data", "to-verl", str(path), "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.parquet"))
