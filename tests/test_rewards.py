"""Outcome rewards, by hand."""

import threading

import pytest

from l2t_trl.errors import UserError
from l2t_trl.rewards import accuracy, episode_format, final_answer, get_reward_funcs


CASES = [
    # (completion, gold, reward)
    ("<think>6 * 7</think> The answer is \\boxed{42}", "42", 1.0),
    ("<think>6 * 7</think> The answer is \\boxed{43}", "42", 0.0),
    # The last of two boxes counts, near or far, right or wrong.
    ("\\boxed{41} wait, \\boxed{42}", "42", 1.0),
    ("\\boxed{42} wait, \\boxed{41}", "42", 0.0),
    # Only what stands behind the last </think> is the answer.
    ("<think>\\boxed{42}</think> so it is 42", "42", 0.0),
    ("<think>\\boxed{41}</think> hm </think> \\boxed{42}", "42", 1.0),
    ("<think>no end \\boxed{42}", "42", 1.0),
    # Nothing boxed, nothing closed, nothing there.
    ("The answer is 42", "42", 0.0),
    ("\\boxed{42", "42", 0.0),
    ("\\boxed{42} or rather \\boxed{4", "42", 0.0),
    ("\\boxed{}", "42", 0.0),
    ("\\boxed 42", "42", 0.0),
    ("", "42", 0.0),
    # verl's and GSM8K's mark, where nothing is boxed.
    ("<think>x</think> so\n#### 42", "42", 1.0),
    ("#### 41\n#### 42 ", "42", 1.0),
    ("#### 42\n#### 41", "42", 0.0),
    ("<think>#### 42</think> so it is", "42", 0.0),
    ("\\boxed{41}\n#### 42", "42", 0.0),
    # Numbers.
    ("\\boxed{0.5}", "1/2", 1.0),
    ("\\boxed{\\frac{1}{2}}", "0.5", 1.0),
    ("\\boxed{\\frac12}", "0.5", 1.0),
    ("\\boxed{0.33}", "1/3", 0.0),
    ("\\boxed{2,125}", "2125", 1.0),
    ("\\boxed{2125}", "2,125", 1.0),
    ("\\boxed{25}", "025", 1.0),
    ("\\boxed{073}", "73", 1.0),
    ("\\boxed{27.0}", "27", 1.0),
    ("\\boxed{3.}", "3", 1.0),
    ("\\boxed{-3}", "3", 0.0),
    ("\\boxed{$18}", "18", 1.0),
    ("\\boxed{50\\%}", "0.5", 1.0),
    ("\\boxed{1,2}", "12", 0.0),
    ("\\boxed{425}", "42", 0.0),
    ("\\boxed{4.5 \\times 10^{33}}", "4.5e33", 1.0),
    ("\\boxed{72 \\text{ clips}}", "72", 1.0),
    ("\\boxed{x = 5}", "5", 1.0),
    # LaTeX, the gold answer as it stands in MATH500 and Minerva: unwrapped.
    ("\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}", "( 3, \\frac{\\pi}{2})", 1.0),
    ("\\boxed{(3, \\pi)}", "\\left( 3, \\frac{\\pi}{2} \\right)", 0.0),
    ("\\boxed{11\\sqrt{2}}", "11\\sqrt2", 1.0),
    ("\\boxed{11}", "11\\sqrt2", 0.0),
    ("\\boxed{p-q}", "p - q", 1.0),
    ("\\boxed{q-p}", "p - q", 0.0),
    ("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}", 1.0),
    ("\\boxed{\\{1, 2\\}}", "\\{2, 1\\}", 1.0),
    ("\\boxed{(-\\infty,2)}", "(-\\infty, 2)", 1.0),
]


@pytest.mark.parametrize(("completion", "gold", "reward"), CASES)
def test_accuracy(completion, gold, reward):
    assert accuracy([completion], [gold]) == [reward]


def test_accuracy_reads_chat_messages_and_takes_what_the_trainer_passes():
    chat = [{"role": "assistant", "content": "<think>x</think>\\boxed{7}"}]
    kwargs = {"prompts": ["a", "b"], "completion_ids": [[1], [2]], "trainer_state": None}
    assert accuracy(completions=[chat, [{"role": "assistant", "content": "7"}]], answer=["7", "7"], **kwargs) == [
        1.0,
        0.0,
    ]


def test_accuracy_is_the_same_off_the_main_thread():
    # math-verify's time limits are signals and raise in other threads.
    results = []
    completions, golds, rewards = zip(*CASES, strict=True)
    thread = threading.Thread(target=lambda: results.extend(accuracy(list(completions), list(golds))))
    thread.start()
    thread.join()
    assert results == list(rewards)


def test_gold_that_nothing_understands_gives_none():
    assert accuracy(["\\boxed{5}", "no box"], ["", " "]) == [None, None]
    # math-verify reads nothing in an empty text; the same LaTeX still meets it.
    assert accuracy(["\\boxed{5}", "\\boxed{\\text{}}", "no box"], ["\\text{}"] * 3) == [None, 1.0, 0.0]


def test_accuracy_takes_all_accepted_answers():
    golds, several = ["080", "7"], [["080", "081"], None]
    assert accuracy(["\\boxed{81}", "\\boxed{81}"], golds, accepted_answers=several) == [1.0, 0.0]
    assert accuracy(["\\boxed{080}", "\\boxed{7}"], golds, accepted_answers=several) == [1.0, 1.0]
    assert accuracy(["\\boxed{82}"], golds[:1], accepted_answers=several[:1]) == [0.0]


def test_accuracy_reports_what_took_too_long(monkeypatch):
    from l2t_trl import answer_pool

    pool = answer_pool.AnswerPool(1, time_limit_s=3)
    monkeypatch.setattr(answer_pool, "_shared", pool)
    logged = []
    assert accuracy(["\\boxed{2}"], ["2"], log_metric=lambda *pair: logged.append(pair)) == [1.0]
    assert logged == []
    hanging = "\\boxed{9^{9^{9^{9}}}}"
    assert accuracy([hanging], ["7^{8^{9}}"], log_metric=lambda *pair: logged.append(pair)) == [0.0]
    assert logged == [("answers/timed_out", 1)]
    pool.close()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{\\frac{a}{b}}", "\\frac{a}{b}"),
        ("\\boxed {7}", "7"),
        ("\\boxed{\\{1\\}}", "\\{1\\}"),
        ("\\boxed{a \\boxed{b}}", "b"),
        ("\\boxed{1} then text", "1"),
        ("\\boxed{\\{}", "\\{"),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "thirds"),
    [
        ("<think><episode_1>a</episode_1><episode_2>b</episode_2></think>\\boxed{1}", 3),
        ("<episode_1>a</episode_1></think>\\boxed{1}", 3),
        ("<episode_1>a</episode_1></think>1", 2),
        ("<episode_1>a</episode_1>\\boxed{1}", 2),
        ("<episode_2>a</episode_2></think>\\boxed{1}", 2),
        ("<episode_1>a<episode_2>b</episode_1></episode_2></think>\\boxed{1}", 2),
        ("<episode_1>a</think>\\boxed{1}", 2),
        ("</think><episode_1>a</episode_1>\\boxed{1}", 2),
        ("a</think>\\boxed{1}", 2),
        ("a</think>b</think>\\boxed{1}", 1),
        ("a\\boxed{1}", 1),
        ("a", 0),
        ("", 0),
    ],
)
def test_episode_format(text, thirds):
    assert episode_format([text, [{"role": "assistant", "content": text}]]) == pytest.approx([thirds / 3] * 2)


def test_reward_functions_by_name_and_by_path():
    from trl.rewards import think_format_reward

    names = ["accuracy", "format", "trl.rewards.think_format_reward"]
    assert get_reward_funcs(names) == [accuracy, episode_format, think_format_reward]


def test_reward_function_of_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "my_l2t_rewards.py").write_text(
        "def short(completions, **kwargs):\n    return [1.0] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (function,) = get_reward_funcs(["my_l2t_rewards.short"])
    assert function(["a", "b"]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("acuracy", "'acuracy' is none of accuracy, format, code, nor a dotted path"),
        ("no_such_module.reward", "no_such_module.reward cannot be imported"),
        ("l2t_trl.rewards.no_such_function", "l2t_trl.rewards.no_such_function cannot be imported"),
        ("l2t_trl.rewards.REWARDS", "l2t_trl.rewards.REWARDS is not a function"),
    ],
)
def test_unknown_reward_function(name, expected):
    with pytest.raises(UserError, match="reward_funcs: ") as caught:
        get_reward_funcs([name])
    assert expected in str(caught.value)
