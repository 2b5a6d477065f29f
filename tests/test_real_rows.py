"""The real rows of the benchmarks, where they are at hand."""

import os
from pathlib import Path

import pytest

from l2t_trl.answer_pool import AnswerPool, shared_pool
from l2t_trl.answers import comparison, judge_texts, understood
from l2t_trl.data.benchmarks import get_benchmark
from l2t_trl.data.loading import read_rows, read_split
from l2t_trl.data.registry import ACCEPTED, SOURCES
from l2t_trl.data.resolving import resolve_split


FOLDER = Path(os.environ.get("L2T_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no benchmark rows in {FOLDER}; L2T_TEST_DATA names another folder"
)
HERE = ("aime24", "amc23", "math500", "minerva", "gsm8k")


@pytest.fixture(autouse=True)
def real_data(monkeypatch):
    monkeypatch.setenv("L2T_DATA_ROOT", str(FOLDER))


def gold_of(rows, part):
    return next(row["answer"] for row in rows if part in row["question"])


@pytest.mark.parametrize("name", HERE)
def test_benchmarks_have_their_rows(name):
    rows = get_benchmark(name).load()
    assert len(rows) == get_benchmark(name).num_rows
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(row["question"].strip() and row["answer"] for row in rows)


@pytest.mark.parametrize("name", HERE)
def test_golds_are_understood_and_meet_themselves(name):
    rows = get_benchmark(name).load()
    golds = [row["answer"] for row in rows]
    assert all(understood(golds))
    assert judge_texts([f"<think>?</think> \\boxed{{{gold}}}" for gold in golds], golds) == [True] * len(golds)
    if name != "gsm8k":
        # By math-verify, too, not because the texts are the same.
        assert shared_pool().ask([comparison(gold, gold) for gold in golds]) == [True] * len(golds)


def test_gsm8k_never_starts_a_process(monkeypatch):
    from l2t_trl import answer_pool

    pool = AnswerPool(2)
    monkeypatch.setattr(answer_pool, "_shared", pool)
    for split in ("train", "test"):
        rows = read_split("gsm8k", None, split)
        golds = [row["answer"] for row in rows]
        wrong = [str(int(gold) + 1) for gold in golds]
        assert judge_texts([f"\\boxed{{{gold}}}" for gold in golds], golds) == [True] * len(golds)
        assert judge_texts([f"\\boxed{{{answer}}}" for answer in wrong], golds) == [False] * len(golds)
    assert pool.num_workers == 0


def test_gsm8k_golds_have_lost_their_commas():
    for split, with_commas in (("train", 79), ("test", 14)):
        raw = read_rows("openai/gsm8k", None, split)
        commas = [index for index, row in enumerate(raw) if "," in row["answer"].rpartition("####")[2]]
        assert len(commas) == with_commas
        golds = [row["answer"] for row in read_split("gsm8k", None, split)]
        assert not any("," in gold for gold in golds)
        for index in commas:
            written = raw[index]["answer"].rpartition("####")[2].strip()
            assert judge_texts([f"\\boxed{{{written}}}"], [golds[index]]) == [True]


def test_aime_919():
    loaded = resolve_split(SOURCES["aime-919"], "train")
    rows = loaded.rows
    assert len(rows) == 919 and loaded.notes == ["919 of 933 rows kept; left out: 14 Year 2024 or later."]
    assert {row["Year"] for row in rows} == set(range(1983, 2024))
    assert all(row["answer"].isdigit() for row in rows) and all(understood([row["answer"] for row in rows]))
    (both,) = [row for row in rows if ACCEPTED in row]
    assert both["id"] == "2022-II-8"
    verdicts = judge_texts([f"\\boxed{{{x}}}" for x in ("80", "080", "81", "081", "82")], [both[ACCEPTED]] * 5)
    assert verdicts == [True, True, True, True, False]


def test_leading_zeros_of_aime24_do_not_matter():
    golds = [row["answer"] for row in get_benchmark("aime24").load()]
    padded = [gold for gold in golds if gold.startswith("0")]
    assert padded
    assert judge_texts([f"\\boxed{{{int(gold)}}}" for gold in padded], padded) == [True] * len(padded)


def test_amc_golds_are_whole_numbers():
    assert all(row["answer"].lstrip("-").isdigit() for row in get_benchmark("amc23").load())


def test_scientific_notation_of_minerva():
    golds = [row["answer"] for row in get_benchmark("minerva").load()]
    scientific = [gold for gold in golds if gold.replace("e", "").replace(".", "").isdigit() and "e" in gold]
    assert "7e37" in scientific and len(scientific) == 35
    written = ["{} \\times 10^{{{}}}".format(*gold.split("e")) for gold in scientific]
    assert judge_texts([f"\\boxed{{{answer}}}" for answer in written], scientific) == [True] * len(scientific)
    # Another exponent is another number.
    assert judge_texts([f"\\boxed{{{answer[:-1]}0}}}}" for answer in written[:1]], scientific[:1]) == [False]


def test_math500_keeps_subject_and_level():
    rows = get_benchmark("math500").load()
    levels = [sum(row["level"] == level for row in rows) for level in range(1, 6)]
    assert levels == [43, 90, 105, 128, 134]
    assert rows[0]["id"] == "test/precalculus/807.json" and rows[0]["subject"] == "precalculus"


def test_the_919_share_no_question_with_aime24_and_eight_with_math500():
    from l2t_trl.data.resolving import benchmark_overlap

    overlap = benchmark_overlap([])
    found = {row["id"]: overlap.find(row["question"]) for row in read_split("aime-919", None, "train")}
    found = {name: benchmark for name, benchmark in found.items() if benchmark}
    # MATH, from which MATH500 is drawn, holds questions of the AIME. These were read one by one.
    assert sorted(found) == [
        "1983-2",
        "2001-II-3",
        "2002-I-12",
        "2006-II-5",
        "2010-I-6",
        "2015-II-6",
        "2016-I-10",
        "2017-II-7",
    ]
    assert set(found.values()) == {"math500"}
