"""The world of column additions: its arithmetic, its errors, its splits."""

import itertools
import random
import re

import pytest

from l2t_trl.data.arithmetic import (
    COLUMN_NAMES,
    TIERS,
    draw_trace,
    is_necessary,
    make_dataset,
    make_traces,
    question_numbers,
    question_text,
    split_of,
    trace_text,
)


RECORDED_QUESTIONS = ["Add 20+46", "Add 351+975", "Add 394+350+314", "Add 60+55+16+10+16"]
RECORDED_TRACE = (
    "<think><episode_1>hmm let me see</episode_1><episode_2>units 3+4=7</episode_2>"
    "<episode_3>tens 6+8=14+0=14</episode_3><episode_4>read 63+84</episode_4>"
    "<episode_5>check 6+8=14+0=14</episode_5><episode_6>read 63+84</episode_6></think>\\boxed{147}"
)


def traces(size=400, seed=0, **kwargs):
    return list(make_traces(size, seed, **kwargs))


def text_of(row):
    return row["completion"][0]["content"]


def episodes_of(row):
    return re.findall(r"<episode_\d+>(.*?)</episode_\d+>", text_of(row))


def boxed(row):
    return re.search(r"</think>\\boxed\{(\d+)\}$", text_of(row))[1]


def columns_of(row):
    """Return (name, terms, totals) of every necessary episode, one total per addition."""
    columns = []
    for text in filter(is_necessary, episodes_of(row)):
        name, first, additions = re.fullmatch(r"(\w+) (\d)((?:\+\d=\d+)+)", text).groups()
        pairs = [(int(term), int(total)) for term, total in re.findall(r"\+(\d)=(\d+)", additions)]
        columns.append((name, [int(first), *(term for term, _ in pairs)], [total for _, total in pairs]))
    return columns


def running_totals(terms):
    return list(itertools.accumulate(terms))[1:]


def test_minimal_trace_by_hand():
    # 47 + 85: units 7 + 5 = 12, write 2 and carry 1; tens 4 + 8 = 12, + 1 = 13, so 132.
    trace = draw_trace(random.Random(0), [47, 85], redundancy=0.0, wrong_step_probability=0.0)
    assert trace_text(trace) == (
        "<think><episode_1>units 7+5=12</episode_1><episode_2>tens 4+8=12+1=13</episode_2></think>\\boxed{132}"
    )
    assert trace.is_correct


def test_zero_carry_and_inner_zero_by_hand():
    # 102 + 205: 2 + 5 = 7 and carry 0; 0 + 0 + 0 = 0; 1 + 2 + 0 = 3, so 307.
    trace = draw_trace(random.Random(0), [102, 205], redundancy=0.0, wrong_step_probability=0.0)
    assert [episode.text for episode in trace.episodes] == ["units 2+5=7", "tens 0+0=0+0=0", "hundreds 1+2=3+0=3"]
    assert trace.answer == "307"


def test_question_round_trip():
    assert question_text([47, 85]) == "Add 47+85"
    assert question_numbers("Add 47+85") == [47, 85]


def test_correct_traces_have_right_columns_and_answer():
    checked = 0
    for row in traces(redundancy=0.5, wrong_step_probability=0.3):
        numbers = question_numbers(row["prompt"][0]["content"])
        assert row["answer"] == str(sum(numbers))
        assert row["is_correct"] == (boxed(row) == row["answer"])
        if not row["is_correct"]:
            continue
        checked += 1
        carry = 0
        columns = columns_of(row)
        assert [name for name, _, _ in columns] == list(COLUMN_NAMES[: len(str(numbers[0]))])
        for place, (_, terms, totals) in enumerate(columns):
            digits = [number // 10**place % 10 for number in numbers]
            assert terms == (digits + [carry] if place else digits)
            assert totals == running_totals(terms)
            carry = totals[-1] // 10
    assert checked > 100


def test_answer_digits_are_fixed_one_column_at_a_time():
    for row in traces(redundancy=0.5, wrong_step_probability=0.3):
        totals = [totals[-1] for _, _, totals in columns_of(row)]
        digits = "".join(str(total % 10) for total in totals[:-1])
        assert boxed(row) == str(totals[-1]) + digits[::-1]


def test_wrong_steps_propagate():
    wrong = [row for row in traces(wrong_step_probability=1.0)]
    # At probability 1 the first column already goes wrong, and one error is all a trace gets.
    assert not any(row["is_correct"] for row in wrong)
    for row in wrong:
        (_, terms, totals), *later = columns_of(row)
        # One addition is off, by a digit or by a carry, and the additions after it go on from there.
        slips = [total - right for total, right in zip(totals, running_totals(terms), strict=True)]
        assert abs(slips[-1]) in (1, 10)
        assert set(slips) <= {0, slips[-1]} and slips == sorted(slips, key=abs)
        carry = totals[-1] // 10
        for _, terms, totals in later:
            assert terms[-1] == carry and totals == running_totals(terms)
            carry = totals[-1] // 10


def test_wrong_carries_occur():
    # Beside wrong sums, some traces carry a wrong digit into a column that then adds up.
    kinds = set()
    for row in traces(wrong_step_probability=0.3):
        carry = None
        for _, terms, totals in columns_of(row):
            kinds.add(("sum", totals != running_totals(terms)))
            kinds.add(("carry", carry is not None and terms[-1] != carry))
            carry = totals[-1] // 10
    assert {("sum", True), ("carry", True)} <= kinds


def test_share_of_correct_traces():
    # Tier 1 has 2 columns: 0.9 squared is 0.81 of the traces correct; three standard errors of 600 draws are 0.048.
    share = sum(row["is_correct"] for row in traces(600, tiers=(1,), wrong_step_probability=0.1)) / 600
    assert abs(share - 0.81) < 0.048


def test_redundant_episodes_tell_nothing_new():
    seen = set()
    for row in traces():
        numbers = question_numbers(row["prompt"][0]["content"])
        last_column, fixed = None, ""
        for text in episodes_of(row):
            kind, _, rest = text.partition(" ")
            seen.add(kind)
            if is_necessary(text):
                last_column = rest
                fixed = rest[-1] + fixed
            elif kind == "check":
                assert rest == last_column
            elif kind == "so":
                # The last total is written in full, so the restated digits end in those fixed one by one.
                assert rest.removeprefix("far ").endswith(fixed)
            elif kind == "read":
                assert rest == "+".join(map(str, numbers))
            else:
                assert text == "hmm let me see"
    assert seen == {"check", "so", "read", "hmm", *COLUMN_NAMES}


def test_format():
    for row in traces(100):
        episodes = episodes_of(row)
        body = "".join(f"<episode_{i}>{text}</episode_{i}>" for i, text in enumerate(episodes, start=1))
        assert text_of(row) == f"<think>{body}</think>\\boxed{{{boxed(row)}}}"
        assert 2 <= len(episodes) <= 30


def test_mean_trace_is_about_twice_the_minimal_one():
    # Length without the digits of tag numbers and with words as one: close to tokens.
    def length(rows):
        return sum(len(re.findall(r"</?\w+>|[a-z]+|[^a-z<>]", text_of(row))) for row in rows)

    ratio = length(traces(800, seed=1)) / length(traces(800, seed=1, redundancy=0.0))
    assert 1.8 < ratio < 2.3


def test_tiers_differ():
    minimal = {tier: traces(100, tiers=(tier,), redundancy=0.0, wrong_step_probability=0.0) for tier in TIERS}
    terms = {tier: sum(len(t) for row in rows for _, t, _ in columns_of(row)) / 100 for tier, rows in minimal.items()}
    assert terms[1] < terms[2] < terms[3] < terms[4]
    for tier, rows in minimal.items():
        for row in rows:
            numbers = question_numbers(row["prompt"][0]["content"])
            assert (len(numbers), len(str(numbers[0]))) in TIERS[tier]
            assert len({len(str(number)) for number in numbers}) == 1
    assert [row["tier"] for row in make_dataset(6, 0, tiers=(4, 2))] == [4, 2, 4, 2, 4, 2]


def test_dataset_rows():
    rows = list(make_dataset(8, 3))
    for row in rows:
        (message,) = row["prompt"]
        assert message["role"] == "user"
        assert row["answer"] == str(sum(question_numbers(message["content"])))
    assert [row["tier"] for row in rows] == [1, 2, 3, 4, 1, 2, 3, 4]


def test_deterministic():
    assert list(make_dataset(40, 5)) == list(make_dataset(40, 5)) != list(make_dataset(40, 6))
    assert traces(40, 5) == traces(40, 5) != traces(40, 6)
    # Recorded: equal seeds give equal rows on every platform and in every process.
    assert [row["prompt"][0]["content"] for row in make_dataset(4, 0)] == RECORDED_QUESTIONS
    assert text_of(traces(1, 0)[0]) == RECORDED_TRACE


def test_splits_are_disjoint():
    def questions(split):
        sets = (make_dataset(2000, 0, split=split), make_traces(2000, 1, split=split))
        return {tuple(sorted(question_numbers(row["prompt"][0]["content"]))) for rows in sets for row in rows}

    train, test = questions("train"), questions("test")
    assert train and test and not train & test
    assert all(split_of(list(numbers)) == "train" for numbers in train)
    # The order of the numbers does not matter.
    assert split_of([47, 85, 12]) == split_of([12, 85, 47])


def test_one_question_in_ten_is_held_out():
    rng = random.Random(0)
    drawn = [[rng.randrange(1000) for _ in range(3)] for _ in range(4000)]
    share = sum(split_of(numbers) == "test" for numbers in drawn) / len(drawn)
    # Three standard errors: 3 * sqrt(0.1 * 0.9 / 4000) = 0.014.
    assert abs(share - 0.1) < 0.014


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"size": 0}, "got size=0; set at least 1"),
        ({"tiers": ()}, r"got tiers=\(\); set"),
        ({"tiers": (5,)}, r"got tiers=\(5,\); set"),
        ({"split": "dev"}, "got split='dev'; set one of"),
        ({"redundancy": 1.0}, "got redundancy=1.0; set"),
        ({"wrong_step_probability": -0.1}, "got wrong_step_probability=-0.1; set"),
    ],
)
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_traces(**{"size": 4, "seed": 0} | kwargs)
