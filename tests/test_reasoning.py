"""Tasks of reasoning-gym, where it is installed."""

import sys

import pytest

from l2t_trl.data.loading import load_rows
from l2t_trl.errors import UserError
from l2t_trl.rewards import accuracy
from l2t_trl.scripts.train import L2TScriptArguments
from trainers import loading_settings


def test_missing_package_is_named(monkeypatch):
    from l2t_trl.data import reasoning

    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match="need the package reasoning-gym .*: pip install reasoning-gym"):
        reasoning.make_rows("reasoning_gym:chain_sum", 4, 0, None, "train")


@pytest.fixture
def reasoning():
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    from l2t_trl.data import reasoning

    return reasoning


def test_rows_follow_the_seed_and_splits_have_none_in_common(reasoning):
    make = lambda seed, split: reasoning.make_rows("reasoning_gym:gcd", 40, seed, None, split)  # noqa: E731
    rows, test = make(1, "train"), make(0, "test")
    assert rows == make(1, "train") and len({row["question"] for row in rows}) == 40
    questions = {row["question"] for row in rows}
    assert questions != {row["question"] for row in make(2, "train")}
    assert not {row["question"] for row in test} & (questions | {row["question"] for row in make(2, "train")})
    assert rows[0].keys() == {"id", "question", "answer", "reasoning_task", "tier"}


def test_tiers_are_levels_of_the_curriculum(reasoning):
    rows = reasoning.make_rows("reasoning_gym:chain_sum", 40, 0, [1, 4], "train")
    assert [row["tier"] for row in rows[:4]] == [1, 4, 1, 4]
    # Level 0: two terms of one digit; level 3: five of four.
    for row in rows:
        numbers = [int(word) for word in row["question"].replace("=", "").split() if word.isdigit()]
        assert len(numbers) == {1: 2, 4: 5}[row["tier"]]
        assert all(len(str(number)) <= {1: 1, 4: 4}[row["tier"]] for number in numbers)
    assert reasoning.available_tiers("gsm_symbolic") == ()
    with pytest.raises(UserError, match=r"got tiers=\[1\]; it has no tiers"):
        reasoning.make_rows("reasoning_gym:gsm_symbolic", 4, 0, [1], "train")


def test_gold_answers_solve_their_tasks_by_the_reward(reasoning):
    for name in ("chain_sum", "fraction_simplification", "polynomial_equations", "word_sorting"):
        rows = reasoning.make_rows(f"reasoning_gym:{name}", 6, 0, None, "train")
        columns = {column: [row[column] for row in rows] for column in ("answer", "reasoning_task")}
        texts = [f"<think>12</think> \\boxed{{{answer}}}" for answer in columns["answer"]]
        assert accuracy(texts, **columns) == [1.0] * 6
        assert accuracy(["\\boxed{no such answer}"] * 6, **columns) == [0.0] * 6


def test_answers_other_than_the_gold_text_count_if_the_task_takes_them(reasoning):
    # Of a board of four with all queens taken away there are two.
    boards = {"_ _ Q _\nQ _ _ _\n_ _ _ Q\n_ Q _ _", "_ Q _ _\n_ _ _ Q\nQ _ _ _\n_ _ Q _"}
    is_solved = reasoning.is_solved
    rows = reasoning.make_rows("reasoning_gym:n_queens", 4, 0, [1], "train")
    both = [row for row in rows if all(is_solved(row["reasoning_task"], board) for board in boards)]
    assert both and all(row["answer"] in boards for row in rows)
    other = boards - {both[0]["answer"]}
    columns = {column: [both[0][column]] for column in ("answer", "reasoning_task")}
    assert accuracy([f"\\boxed{{{other.pop()}}}"], **columns) == [1.0]
    assert accuracy(["\\boxed{_ _ Q _}"], **columns) == [0.0]
    # 0.01 for a wrong number is no success.
    (row,) = reasoning.make_rows("reasoning_gym:gsm_symbolic", 1, 0, None, "train")
    assert is_solved(row["reasoning_task"], str(int(row["answer"]) + 1)) is False


def test_task_that_cannot_be_made_again_is_not_judged(reasoning):
    (row,) = reasoning.make_rows("reasoning_gym:chain_sum", 1, 0, [1], "train")
    assert reasoning.is_solved(row["reasoning_task"] + "0", row["answer"]) is None
    with pytest.raises(UserError, match="makes other questions of this task in every process"):
        reasoning.task_name("reasoning_gym:ransom_note")


def test_unknown_task_is_answered_with_the_nearest(reasoning):
    with pytest.raises(UserError, match="has no task 'chain_sun'. Did you mean chain_sum"):
        reasoning.make_rows("reasoning_gym:chain_sun", 4, 0, None, "train")


def test_world_that_is_too_small(reasoning):
    with pytest.raises(UserError, match=r"makes only \d+ different train questions, 300 are wanted"):
        reasoning.make_rows("reasoning_gym:chain_sum", 300, 0, [1], "train")


def test_training_rows(reasoning, tiny_tokenizer):
    args = loading_settings(seed=5)
    script = L2TScriptArguments(dataset_name="reasoning_gym:chain_sum", train_size=8, test_size=4, instruction="Box.")
    train, test = load_rows(script, args, tiny_tokenizer)
    assert (len(train), len(test)) == (8, 4)
    assert set(train["tier"]) == {1, 2, 3, 4} and train[0]["prompt"][0]["content"].endswith("\nBox.")
    assert all(task.startswith("chain_sum/") for task in train["reasoning_task"])
