"""From files and names to checked rows."""

import json
import logging

import pytest
from datasets import Dataset

from l2t_trl.data.checks import check_rows
from l2t_trl.data.loading import load_rows, read_rows
from l2t_trl.data.registry import gsm8k_answer
from l2t_trl.errors import UserError
from l2t_trl.scripts.train import L2TScriptArguments
from trainers import loading_settings


GSM8K_ROWS = [
    {"question": "How many clips?", "answer": "48/2 = <<48/2=24>>24\n48+24 = 72\n#### 72"},
    {"question": "How far?", "answer": "Much.\n#### 2,125"},
    {"question": "How cold?", "answer": "Very.\n#### -3"},
]


@pytest.fixture
def args():
    """The trainer's settings that loading reads."""
    return loading_settings(max_prompt_length=4096)


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(count):
    return [{"question": f"{k} + 0?", "answer": str(k)} for k in range(count)]


# Sources


def test_gsm8k_answer():
    assert [gsm8k_answer(row["answer"]) for row in GSM8K_ROWS] == ["72", "2125", "-3"]
    assert gsm8k_answer("no mark") is None


def test_known_data_set_under_the_data_root(tmp_path, monkeypatch, args, tiny_tokenizer):
    write_rows(tmp_path / "openai/gsm8k/main/train.jsonl", GSM8K_ROWS)
    write_rows(tmp_path / "openai/gsm8k/main/test.jsonl", GSM8K_ROWS[:1])
    monkeypatch.setenv("L2T_DATA_ROOT", str(tmp_path))
    script = L2TScriptArguments(dataset_name="openai/gsm8k", system_prompt="Be brief.", instruction="Box it.")
    train, test = load_rows(script, args, tiny_tokenizer)
    assert train["answer"][:] == ["72", "2125", "-3"]
    assert train[0]["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many clips?\nBox it."},
    ]
    assert len(test) == 1


@pytest.mark.parametrize(
    ("name", "split", "row", "question", "answer"),
    [
        ("HuggingFaceH4/MATH-500", "test", {"problem": "P?", "answer": "\\frac12", "level": 2}, "P?", "\\frac12"),
        ("HuggingFaceH4/aime_2024", "train", {"problem": "P?", "answer": "025", "id": 60}, "P?", "025"),
        # AMC's answers are floats.
        ("math-ai/amc23", "test", {"question": "P?", "answer": 27.0, "id": 0}, "P?", "27"),
        ("math-ai/minervamath", "test", {"question": "P?", "answer": "7e37"}, "P?", "7e37"),
        ("di-zhang-fdu/AIME_1983_2024", "train", {"Question": "P?", "Answer": "60", "Year": 1983}, "P?", "60"),
    ],
)
def test_known_benchmarks(tmp_path, monkeypatch, args, tiny_tokenizer, name, split, row, question, answer):
    write_rows(tmp_path / name / f"{split}.jsonl", [row])
    monkeypatch.setenv("L2T_DATA_ROOT", str(tmp_path))
    train, test = load_rows(L2TScriptArguments(dataset_name=name, dataset_train_split=split), args, tiny_tokenizer)
    assert train[0]["prompt"] == [{"role": "user", "content": question}]
    assert train[0]["answer"] == answer


def test_missing_folder_under_the_data_root_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("L2T_DATA_ROOT", str(tmp_path))
    with pytest.raises(
        UserError, match=f"L2T_DATA_ROOT is set to {tmp_path}, but there is no folder .*openai/gsm8k/main"
    ):
        read_rows("openai/gsm8k", None, "train")


def test_offline_error_tells_of_the_data_root(monkeypatch):
    monkeypatch.delenv("L2T_DATA_ROOT", raising=False)
    with pytest.raises(UserError, match=r"set L2T_DATA_ROOT to a folder that holds openai/gsm8k/main/train\.jsonl"):
        read_rows("openai/gsm8k", None, "train")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_local_files(tmp_path, args, tiny_tokenizer, kind):
    rows = [{"task": "1 + 1?", "solution": "2", "level": 1}, {"task": "2 + 2?", "solution": "4", "level": 2}]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_rows(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        getattr(Dataset.from_list(rows), f"to_{kind}")(str(path))
    args.answer_column = "solution"
    train, test = load_rows(L2TScriptArguments(dataset_name=str(path), question_column="task"), args, tiny_tokenizer)
    assert test is None
    assert train[1]["prompt"] == [{"role": "user", "content": "2 + 2?"}]
    # For the reward and for the trainer, whatever it calls its column.
    assert train["answer"][:] == train["solution"][:] == ["2", "4"]
    assert [int(level) for level in train["level"]] == [1, 2]


def test_folder_with_a_file_per_split(tmp_path, args, tiny_tokenizer):
    write_rows(tmp_path / "train.jsonl", numbered(5))
    write_rows(tmp_path / "test.jsonl", numbered(2))
    train, test = load_rows(L2TScriptArguments(dataset_name=str(tmp_path)), args, tiny_tokenizer)
    assert (len(train), len(test)) == (5, 2)


def test_prompts_may_be_chats_and_tokenizers_may_lack_a_template(tmp_path, args, tiny_tokenizer):
    from copy import deepcopy

    chat = [{"role": "user", "content": "1 + 1?"}]
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": chat, "answer": 2}])
    script = L2TScriptArguments(dataset_name=path, system_prompt="Be brief.", instruction="Box it.")
    train, _ = load_rows(script, args, tiny_tokenizer)
    assert train[0]["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?\nBox it."},
    ]
    assert train[0]["answer"] == "2"

    plain = deepcopy(tiny_tokenizer)
    plain.chat_template = None
    script.dataset_name = write_rows(tmp_path / "plain.jsonl", numbered(1))
    train, _ = load_rows(script, args, plain)
    assert train[0]["prompt"] == "Be brief.\n\n0 + 0?\nBox it."


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rows.jsonl", '{"question": "a", "answer": "b"}\n{oops\n', r"rows\.jsonl:2: not valid JSON"),
        ("rows.jsonl", "[1, 2]\n", r"rows\.jsonl: every row must be a JSON object"),
        ("rows.json", "{", r"rows\.json: not valid JSON"),
        ("rows.jsonl", "", r"rows\.jsonl: the data set has no rows"),
        ("rows.parquet", "no parquet", r"rows\.parquet: not a Parquet file"),
        ("rows.txt", "a", r"rows\.txt: only \.jsonl, \.json, \.csv, \.parquet files can be read"),
        (
            "rows.jsonl",
            '{"question": "a", "gold": "b"}\n',
            r"no column 'answer' \(answer_column\); its columns are question, gold",
        ),
        (
            "rows.jsonl",
            '{"q": "a", "answer": "b"}\n',
            r"no column 'question' \(question_column\); its columns are q, answer",
        ),
    ],
)
def test_unusable_file(tmp_path, args, tiny_tokenizer, name, content, expected):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=expected):
        load_rows(L2TScriptArguments(dataset_name=str(path)), args, tiny_tokenizer)


def test_missing_file_and_missing_split(tmp_path, args, tiny_tokenizer):
    with pytest.raises(UserError, match=r"no\.jsonl: no such file"):
        read_rows(str(tmp_path / "no.jsonl"), None, "train")
    with pytest.raises(UserError, match="has no file <split>.jsonl"):
        read_rows(str(tmp_path), None, "train")
    write_rows(tmp_path / "test.jsonl", numbered(2))
    with pytest.raises(UserError, match="has no split 'train'"):
        load_rows(L2TScriptArguments(dataset_name=str(tmp_path)), args, tiny_tokenizer)


# Sizes and splits


def test_train_rows_follow_the_seed_and_test_rows_do_not(tmp_path, args, tiny_tokenizer):
    write_rows(tmp_path / "train.jsonl", numbered(50))
    write_rows(tmp_path / "test.jsonl", numbered(50))
    script = L2TScriptArguments(dataset_name=str(tmp_path), train_size=10, test_size=10)
    drawn = {}
    for seed in (0, 1):
        args.seed = seed
        train, test = load_rows(script, args, tiny_tokenizer)
        drawn[seed] = (train["answer"][:], test["answer"][:])
        assert len(set(train["answer"])) == len(set(test["answer"])) == 10
    assert drawn[0][0] != drawn[1][0]
    assert drawn[0][1] == drawn[1][1]


def test_rows_are_held_out_where_there_is_no_test_split(tmp_path, args, tiny_tokenizer):
    path = write_rows(tmp_path / "rows.jsonl", numbered(20))
    train, test = load_rows(L2TScriptArguments(dataset_name=path, test_size=5), args, tiny_tokenizer)
    assert len(test) == 5
    assert sorted([*train["answer"], *test["answer"]], key=int) == [str(k) for k in range(20)]
    with pytest.raises(UserError, match="test_size=20 leaves none of the 20 rows to train on"):
        load_rows(L2TScriptArguments(dataset_name=path, test_size=20), args, tiny_tokenizer)


def test_other_data_set_to_test_on(tmp_path, args, tiny_tokenizer):
    train_path = write_rows(tmp_path / "rows.jsonl", numbered(4))
    write_rows(tmp_path / "bench" / "test.jsonl", numbered(3))
    script = L2TScriptArguments(dataset_name=train_path, test_dataset_name=str(tmp_path / "bench"), test_size=2)
    train, test = load_rows(script, args, tiny_tokenizer)
    assert (len(train), len(test)) == (4, 2)


def test_arithmetic_world(args, tiny_tokenizer):
    script = L2TScriptArguments(train_size=12, test_size=6, tiers=[1, 2])
    train, test = load_rows(script, args, tiny_tokenizer)
    assert (len(train), len(test)) == (12, 6)
    assert set(train["tier"]) == {1, 2}
    assert train[0]["prompt"][-1]["role"] == "user" and train[0]["answer"].isdigit()


# Row checks


def rows_of(prompts, answers, column="answer"):
    return Dataset.from_dict({"prompt": prompts, column: answers})


def test_good_rows_pass_unchanged(tiny_tokenizer):
    dataset = rows_of(["a", "b"], ["1", "2"])
    assert check_rows(dataset, tiny_tokenizer, "answer", 10, "stop") is dataset


@pytest.mark.parametrize(
    ("prompts", "answers", "reason"),
    [
        (["a", ""], ["1", "2"], "empty prompt: 1 (row 1)"),
        (["a", " \n"], ["1", "2"], "empty prompt: 1 (row 1)"),
        (["a", None], ["1", "2"], "prompt is neither text nor a list of chat messages: 1 (row 1)"),
        (["a", "b"], ["1", None], "answer is null: 1 (row 1)"),
        (["a", "b"], ["1", "  "], "answer is empty: 1 (row 1)"),
        (["a", "b"], [1, 2], "answer is not text but int: 2 (rows 0, 1)"),
        (["a", "b" * 11], ["1", "2"], "prompt longer than max_prompt_length=10 tokens: 1 (row 1)"),
    ],
)
def test_bad_row_stops_with_its_number(tiny_tokenizer, prompts, answers, reason):
    with pytest.raises(ValueError) as caught:
        check_rows(rows_of(prompts, answers), tiny_tokenizer, "answer", 10, "stop")
    assert reason in str(caught.value)
    assert "on_bad_row='drop'" in str(caught.value)


def test_empty_chats_are_empty_prompts(tiny_tokenizer):
    chats = [
        [{"role": "user", "content": "a"}],
        [{"role": "user", "content": ""}],
        [{"role": "system", "content": "Be brief."}],
    ]
    with pytest.raises(ValueError, match=r"empty prompt: 2 \(rows 1, 2\)"):
        check_rows(rows_of(chats, ["1", "2", "3"]), tiny_tokenizer, "answer")


def test_chat_template_counts_towards_the_length(tiny_tokenizer):
    chats = rows_of([[{"role": "user", "content": "12345"}]], ["1"])
    # <|im_start|>user\n12345<|im_end|>\n<|im_start|>assistant\n: 6 + 5 + 2 + 11 tokens.
    assert len(check_rows(chats, tiny_tokenizer, "answer", 24)) == 1
    with pytest.raises(ValueError, match="longer than max_prompt_length=23"):
        check_rows(chats, tiny_tokenizer, "answer", 23)


def test_answer_without_tokens():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    digits = Tokenizer(models.BPE({str(digit): digit for digit in range(10)}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=digits)
    with pytest.raises(ValueError, match=r"answer has no token: 1 \(row 1\)"):
        check_rows(rows_of(["1", "2"], ["3", "x"]), tokenizer, "answer")


def test_dropping_says_how_many_and_which(tiny_tokenizer, caplog):
    dataset = rows_of(["a", "", "c", "d"], ["1", "2", None, "4"])
    with caplog.at_level(logging.WARNING, logger="l2t_trl"):
        kept = check_rows(dataset, tiny_tokenizer, "answer", None, "drop")
    assert kept["answer"][:] == ["1", "4"]
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == ("Dropped 2 of 4 rows (counted from 0). empty prompt: 1 (row 1); answer is null: 1 (row 2).")


def test_only_the_first_ten_rows_are_listed(tiny_tokenizer):
    with pytest.raises(ValueError, match=r"empty prompt: 12 \(rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more\)"):
        check_rows(rows_of([""] * 12 + ["a"], ["1"] * 13), tiny_tokenizer, "answer")


def test_rows_are_counted_across_batches(tiny_tokenizer):
    prompts = ["a"] * 2500
    prompts[2100] = ""
    with pytest.raises(ValueError, match=r"empty prompt: 1 \(row 2100\)"):
        check_rows(rows_of(prompts, ["1"] * 2500), tiny_tokenizer, "answer")


def test_nothing_left_is_an_error(tiny_tokenizer):
    with pytest.raises(ValueError, match="All 2 rows were dropped"):
        check_rows(rows_of(["", ""], ["1", "2"]), tiny_tokenizer, "answer", None, "drop")
    with pytest.raises(ValueError, match="has no rows"):
        check_rows(rows_of([], []), tiny_tokenizer, "answer")


def test_missing_column_is_named(tiny_tokenizer):
    with pytest.raises(ValueError, match="no column 'answer'; its columns are prompt, gold"):
        check_rows(rows_of(["a"], ["1"], column="gold"), tiny_tokenizer, "answer")


def test_streamed_data_passes(tiny_tokenizer):
    stream = rows_of(["a"], ["1"]).to_iterable_dataset()
    assert check_rows(stream, tiny_tokenizer, "answer") is stream


def test_many_rows_are_checked_quickly(tiny_tokenizer):
    import time

    dataset = rows_of(["What is 1 + 1?" * 5] * 20_000, ["2"] * 20_000)
    start = time.process_time()
    check_rows(dataset, tiny_tokenizer, "answer", 4096)
    # Measured: 0.5 s of processor time; one row at a time takes ten times that.
    assert time.process_time() - start < 4


def test_rows_without_answers_are_for_continuations_alone(tmp_path, args, tiny_tokenizer):
    path = write_rows(tmp_path / "code.jsonl", [{"question": f"Task {k}", "tests": "assert f()"} for k in range(4)])
    script_args = L2TScriptArguments(dataset_name=path, eval_before_after=False)
    with pytest.raises(UserError, match=r"no column 'answer' \(answer_column\)"):
        load_rows(script_args, args, tiny_tokenizer)
    args.correctness_estimator = "rollout"
    rows, _ = load_rows(script_args, args, tiny_tokenizer)
    assert rows.column_names == ["prompt", "tests"] and len(rows) == 4
    # What is evaluated is compared with answers.
    with pytest.raises(UserError, match=r"no column 'answer' \(answer_column\)"):
        load_rows(L2TScriptArguments(dataset_name=path), args, tiny_tokenizer)
