"""pass@k and maj@k by hand, and against counting every choice of samples."""

import itertools
from collections import Counter

import pytest

from l2t_trl.evaluation import EvaluatedCompletion, Evaluation
from l2t_trl.evaluation.voting import RIGHT, majority_at_k, pass_at_k, sizes_up_to, vote_of


def literal_majority(votes, k):
    """Count the majority of every choice of k samples."""
    total = 0.0
    choices = list(itertools.combinations(votes, k))
    for choice in choices:
        counts = Counter(vote for vote in choice if vote is not None)
        best = max(counts.values(), default=0)
        winners = [vote for vote, count in counts.items() if count == best]
        total += (RIGHT in winners) / max(1, len(winners))
    return total / len(choices)


def test_pass_at_k_by_hand():
    # Of the 6 pairs of 4 samples, 3 hold the only right one.
    assert pass_at_k(4, 1, 2) == 3 / 6
    # Of the 10 triples of 5 samples, 1 misses both right ones.
    assert pass_at_k(5, 2, 3) == pytest.approx(9 / 10)
    assert pass_at_k(3, 2, 2) == 1
    assert pass_at_k(3, 0, 3) == 0
    assert pass_at_k(20, 7, 1) == pytest.approx(7 / 20)


def test_majority_of_all_samples_by_hand():
    assert majority_at_k([RIGHT, RIGHT, "5"], 3) == 1
    assert majority_at_k([RIGHT, "5", "5"], 3) == 0
    # Ties: one of two, one of three, two pairs.
    assert majority_at_k([RIGHT, "5"], 2) == 1 / 2
    assert majority_at_k([RIGHT, "5", "6"], 3) == pytest.approx(1 / 3)
    assert majority_at_k([RIGHT, "5", RIGHT, "5"], 4) == 1 / 2
    # No answer is no vote.
    assert majority_at_k([RIGHT, None, None], 3) == 1
    assert majority_at_k([None, None], 2) == 0


def test_majority_of_some_samples_by_hand():
    # Pairs of R R 5 5: RR is right, 55 is wrong, the four R5 are half right.
    assert majority_at_k([RIGHT, RIGHT, "5", "5"], 2) == pytest.approx((1 + 4 / 2) / 6)
    # Pairs of R 5 and no answer: R5 is half right, R and 5 alone are right and wrong.
    assert majority_at_k([RIGHT, "5", None], 2) == pytest.approx((1 / 2 + 1) / 3)
    assert majority_at_k([RIGHT, "5", "6", None], 1) == 1 / 4


@pytest.mark.parametrize(
    "votes",
    [
        [RIGHT] * 3 + ["5"] * 2 + ["6"] * 2 + [None],
        [RIGHT] + ["5", "6", "7", "8"],
        ["5"] * 3 + [None] * 2,
        [RIGHT] * 2 + [None] * 4 + ["5"] * 2,
        [RIGHT] * 4,
    ],
)
def test_majority_agrees_with_counting_every_choice(votes):
    for k in range(1, len(votes) + 1):
        assert majority_at_k(votes, k) == pytest.approx(literal_majority(votes, k)), k


@pytest.mark.parametrize("k", [0, 3])
def test_k_beyond_the_samples_is_refused(k):
    with pytest.raises(ValueError, match="between 1 and the 2 samples"):
        pass_at_k(2, 1, k)
    with pytest.raises(ValueError, match="between 1 and the 2 samples"):
        majority_at_k([RIGHT, "5"], k)


def test_right_answers_are_one_vote_and_wrong_ones_go_by_value_or_text():
    assert vote_of("1/2", True) == vote_of("0.5", True) == RIGHT
    assert vote_of("1,000", False) == vote_of("1000.0", False) == "1000"
    assert vote_of("\\dfrac{1}{3}", False) == vote_of(" \\frac{1}{ 3}", False)
    assert vote_of("5", False) != vote_of("6", False)
    assert vote_of("1/2", False) == vote_of("\\frac{1}{2}", False) == vote_of("0.5", False)
    assert vote_of("\\sqrt{4}", False) != vote_of("2", False)
    assert vote_of(None, False) is None


def test_sizes_are_powers_of_two_and_all():
    assert sizes_up_to(1) == [1]
    assert sizes_up_to(4) == [1, 2, 4]
    assert sizes_up_to(20) == [1, 2, 4, 8, 16, 20]


def completion(question, answer, is_correct):
    return EvaluatedCompletion(question, None, f"so \\boxed{{{answer}}}", 10, is_correct, False)


def test_a_wrong_majority_in_several_notations_is_one():
    answers = ("3", "3", "1/2", "\\frac{1}{2}", "0.5")
    evaluation = Evaluation([completion(0, answer, answer == "3") for answer in answers], 50, num_samples=5)
    # By text, the two right answers would win against three single ones.
    assert evaluation.majority_at(5) == 0


def test_an_evaluations_means_over_its_questions():
    evaluation = Evaluation(
        [
            *(completion(0, answer, answer == 4) for answer in (4, 4, 5)),
            *(completion(1, answer, answer == 7) for answer in (7, 8, 8)),
            # Cannot be judged but for one: too few for pairs.
            completion(2, 1, True),
            completion(2, 1, None),
        ],
        max_new_tokens=50,
        num_samples=3,
    )
    # Question 0: every pair has a right one; question 1: 2 of 3 pairs.
    assert evaluation.pass_at(2) == pytest.approx((1 + 2 / 3) / 2)
    assert evaluation.majority_at(3) == (1 + 0) / 2
    assert evaluation.pass_at(1) == pytest.approx((2 / 3 + 1 / 3 + 1) / 3)
    assert evaluation.pass_at(4) is evaluation.majority_at(4) is None
