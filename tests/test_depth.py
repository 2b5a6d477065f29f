"""Depth and budget curves of made-up completions by hand."""

import pytest

from l2t_trl.data.benchmarks import Benchmark
from l2t_trl.episodes import token_bytes
from l2t_trl.evaluation import EvaluatedCompletion, Evaluation
from l2t_trl.evaluation.benchmark_run import Sampling, Task, budget_curve
from l2t_trl.evaluation.depth import Asking, accuracy_when_asked, ask_answers, depth_curve, find_cuts, first_answer


PROBE = "\\boxed{"


def line(id, tokens, is_correct, is_truncated=False):
    return {"id": id, "sample": 0, "tokens": tokens, "is_correct": is_correct, "is_truncated": is_truncated}


def asked(id, episodes, answers, gold):
    verdicts = [answer == gold for answer in answers]
    return {
        "id": id,
        "sample": 0,
        "episodes": episodes,
        "answers": [f"{answer}}}" for answer in answers],
        "verdicts": verdicts,
    }


# a has two episodes of 10 and 15 tokens and is right after 30; b has one of 12 and is wrong after 20.
LINES = [line("a", 30, True), line("b", 20, False)]
CUTS = [[0, 10, 25], [0, 12]]
ANSWERS = [
    asked("a", 0, [9, 9, 8, 8], gold=7),  # Acc 0, maj 0
    asked("a", 1, [7, 7, 7, 8], gold=7),  # Acc 3/4, maj 1
    asked("a", 2, [7, 7, 7, 7], gold=7),  # Acc 1, maj 1
    asked("b", 0, [4, 5, 5, 6], gold=4),  # Acc 1/4, maj 0
    asked("b", 1, [4, 4, 5, 5], gold=4),  # Acc 1/2, maj a tie
]


def test_depth_curve_by_hand():
    curve = depth_curve(LINES, CUTS, ANSWERS, PROBE)
    assert curve == {
        "episodes": [0, 1, 2],
        # At depth 2, b is whole, and wrong.
        "accuracy": [(0 + 1 / 4) / 2, (3 / 4 + 1 / 2) / 2, (1 + 0) / 2],
        "majority": [0, (1 + 1 / 2) / 2, (1 + 0) / 2],
        "tokens": [0, (10 + 12) / 2, (25 + 20) / 2],
        "num_cut": [2, 2, 1],
        "num_completions": 2,
    }


def test_order_of_the_stored_answers_does_not_matter():
    assert depth_curve(LINES, CUTS, ANSWERS[::-1], PROBE) == depth_curve(LINES, CUTS, ANSWERS, PROBE)


def test_completions_that_cannot_be_judged_are_left_out_of_the_depth_curve():
    lines = [LINES[0], line("b", 20, None)]
    curve = depth_curve(lines, CUTS, ANSWERS, PROBE)
    assert curve["accuracy"] == [0, 3 / 4, 1]
    assert curve["num_completions"] == 1
    assert depth_curve([lines[1]], [CUTS[1]], ANSWERS, PROBE)["episodes"] == []


def test_accuracy_when_asked_by_hand():
    budgets = [0, 9, 10, 12, 20, 25, 30]
    # 10: a's first episode fits; 12: b's as well; 20: b has ended, wrong; 25: a's second; 30: a has ended, right.
    expected = [1 / 8, 1 / 8, (3 / 4 + 1 / 4) / 2, (3 / 4 + 1 / 2) / 2, (3 / 4 + 0) / 2, (1 + 0) / 2, (1 + 0) / 2]
    assert accuracy_when_asked(LINES, CUTS, ANSWERS, PROBE, budgets) == expected
    # Cut off at 20, b has given no answer, so that it is asked there as well.
    cut_off = [LINES[0], line("b", 20, False, is_truncated=True)]
    assert accuracy_when_asked(cut_off, CUTS, ANSWERS, PROBE, [20]) == [(3 / 4 + 1 / 2) / 2]


def test_budget_curve_by_hand():
    completions = [
        EvaluatedCompletion(0, None, "", 2, True, False),
        EvaluatedCompletion(1, None, "", 3, True, True),
        EvaluatedCompletion(2, None, "", 3, False, False),
        EvaluatedCompletion(3, None, "", 1, None, False),
    ]
    # Of three that can be judged one is right and ends, at 2 tokens.
    assert budget_curve(Evaluation(completions, 3)) == {"budgets": [0, 1, 2, 3], "accuracy": [0, 0, 1 / 3, 1 / 3]}


def test_cuts_lie_behind_the_episodes(tiny_tokenizer):
    texts = ["<think><episode_1>ab</episode_1><episode_2>c</episode_2></think>\\boxed{5}", "no reasoning"]
    lines = [{"ids": tiny_tokenizer(text)["input_ids"]} for text in texts]
    cuts = find_cuts(lines, token_bytes(tiny_tokenizer), "tags", 30)
    # <think> <episode_1> a b </episode_1> are 5 tokens, <episode_2> c </episode_2> 3 more; text is an episode.
    assert cuts == [[0, 5, 8], [0, len(lines[1]["ids"])]]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("4}. Or \\boxed{5}", "4}"),
        ("\\frac{1}{2}} and so on", "\\frac{1}{2}}"),
        ("4 and never closed", "4 and never closed"),
        ("", ""),
    ],
)
def test_the_first_answer_counts(text, answer):
    assert first_answer(PROBE, text) == answer


@pytest.mark.parametrize(
    ("shares_prefixes", "order"),
    [
        # b's cut completion is the longer one; its cuts come first, and of each the longest.
        (True, [("b", 30), ("b", 4), ("b", 0), ("a", 25), ("a", 10), ("a", 0)]),
        (False, [("b", 30), ("a", 25), ("a", 10), ("b", 4), ("a", 0), ("b", 0)]),
    ],
)
def test_cuts_stand_beside_those_that_share_what_is_read_or_those_of_like_length(
    tmp_path, tiny_tokenizer, shares_prefixes, order
):
    """A model that answers 0 everywhere, and notes what it is asked."""
    prompts = {"a": [1, 2], "b": [3]}
    rows = [{"id": id, "question": id, "answer": "0"} for id in prompts]
    benchmark = Benchmark("made-up", 2, lambda: rows, lambda texts, rows: [text.endswith("0}") for text in texts])
    lines = [{"id": "a", "sample": 0, "ids": [5] * 30}, {"id": "b", "sample": 0, "ids": [6] * 40}]
    answer = tiny_tokenizer("0}", add_special_tokens=False)["input_ids"]
    asked = []

    class Engine:
        def complete(self, prompts, seeds, max_tokens, temperature, top_p):
            asked.extend(prompts)
            assert len(set(seeds)) == len(seeds)
            return [answer for _ in prompts]

    answers = ask_answers(
        Task(benchmark, rows, list(prompts.values())),
        lines,
        [[0, 10, 25], [0, 4, 30]],
        tiny_tokenizer,
        Engine,
        Sampling(1, 40, 1.0, 1.0, 0, batch_size=4),
        Asking(PROBE, "auto", 3, 2, 4),
        tmp_path,
        shares_prefixes,
    )
    probe = tiny_tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    token = {"a": 5, "b": 6}
    # Two answers are asked for at each cut.
    assert asked == [[*prompts[id], *[token[id]] * cut, *probe] for id, cut in order for _ in range(2)]
    assert all(line["verdicts"] == [True, True] and line["answers"] == ["0}", "0}"] for line in answers)
