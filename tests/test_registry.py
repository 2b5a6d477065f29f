"""Data sets that are known by name: their golds, tiers, filters, and what is wrong with them."""

import json
import logging

import pytest

from l2t_trl.data.benchmarks import BENCHMARKS, get_benchmark
from l2t_trl.data.decontamination import Overlap
from l2t_trl.data.generated import find_generated, generate_rows
from l2t_trl.data.loading import read_rows, read_split
from l2t_trl.data.registry import (
    BY_HUB_ID,
    SOURCES,
    aime_golds,
    all_names,
    omni_math_tier,
    plain_gold,
    without_boxed_answer,
)
from l2t_trl.data.resolving import resolve_split
from l2t_trl.errors import UserError


@pytest.fixture
def data_root(tmp_path, monkeypatch):
    """Write rows into a data root: `write(hub_id, split, rows)`."""
    monkeypatch.setenv("L2T_DATA_ROOT", str(tmp_path))

    def write(path, rows):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("".join(json.dumps(row) + "\n" for row in rows))

    return write


# What entries mean


def test_names_and_hub_ids_tell_the_sets_apart():
    assert len(BY_HUB_ID) == len(SOURCES)
    assert {name for name, source in SOURCES.items() if source.is_benchmark} <= set(BENCHMARKS)
    for name, source in SOURCES.items():
        if source.is_benchmark:
            assert BENCHMARKS[name].num_rows == source.splits["test"][1]


def test_generated_sets_are_found_by_one_look_up():
    assert [find_generated(name).name for name in ("arithmetic", "python-functions", "reasoning_gym:chain_sum")] == [
        "arithmetic",
        "python-functions",
        "reasoning_gym",
    ]
    assert find_generated("humaneval").is_for_eval_only
    # Neither a task of what has none, nor what is read.
    for name in ("arithmetic:x", "gsm8k", "no/such", "./arithmetic"):
        assert find_generated(name) is None
    assert all_names() == [*SOURCES, "arithmetic", "python-functions", "reasoning_gym:NAME"]


@pytest.mark.parametrize("name", ["arithmetic", "python-functions", "reasoning_gym:chain_sum"])
def test_generated_rows_follow_split_size_and_seed(name):
    pytest.importorskip("reasoning_gym")
    rows = generate_rows(name, "train", 6, 3, None)
    assert len(rows) == 6 and rows == generate_rows(name, "train", 6, 3, None)
    assert rows != generate_rows(name, "train", 6, 4, None) and rows != generate_rows(name, "test", 6, 3, None)
    # By default as many as there are, if these are fewer.
    expected = {"arithmetic": 200, "python-functions": 128, "reasoning_gym:chain_sum": 104}
    assert len(generate_rows(name, "test", None, 0, None)) == expected[name]
    assert generate_rows(name, "validation", 6, 3, None) is None


@pytest.mark.parametrize(
    ("name", "size", "tiers", "message"),
    [
        ("arithmetic", 4, [5], r"arithmetic: got tiers=\(5,\); set a non-empty choice of \(1, 2, 3, 4\)\."),
        ("python-functions", 100_000, None, "python-functions: got size=100000; set less, there are about"),
    ],
)
def test_rows_that_cannot_be_made_are_a_mistake_of_the_user(name, size, tiers, message):
    with pytest.raises(UserError, match=message):
        generate_rows(name, "test", size, 0, tiers)


@pytest.mark.parametrize(
    ("answer", "golds"),
    [
        ("080 or 081 (both were accepted)", ["080", "081"]),
        ("073", "073"),
        (60, "60"),
        (None, None),
    ],
)
def test_aime_golds(answer, golds):
    assert aime_golds(answer) == golds


@pytest.mark.parametrize(
    ("value", "gold"), [(27.0, "27"), (-1.0, "-1"), (0.5, "0.5"), (3, "3"), (" 7 ", "7"), (None, None), (True, None)]
)
def test_plain_gold(value, gold):
    assert plain_gold(value) == gold


@pytest.mark.parametrize(
    ("difficulty", "tier"),
    [(1.0, 1), (4.0, 1), (4.25, 2), (5.0, 2), (5.25, 3), (6.0, 3), (6.5, 4), (9.5, 4), (None, None)],
)
def test_omni_math_tiers(difficulty, tier):
    assert omni_math_tier({"difficulty": difficulty}) == tier


@pytest.mark.parametrize(
    ("problem", "solution", "reason"),
    [
        ("What is 1 + 1?", "\\boxed{1} no, \\boxed{2}", None),
        ("What is 1 + 1?", "It is 2.", "no \\boxed answer"),
        ("What is 1 + 1?", "It is \\boxed{}.", "no \\boxed answer"),
        ("What is 1 + 1?", "It is \\boxed{2", "no \\boxed answer"),
        ("Prove that 1 + 1 = 2.", "\\boxed{}", "a proof"),
        ("Show that $n$ is even and find it.", "\\boxed{2}", "a proof"),
        ("The show begins at 8. When is noon?", "\\boxed{12}", None),
        (None, None, "no \\boxed answer"),
    ],
)
def test_rows_of_numinamath_that_are_left_out(problem, solution, reason):
    assert without_boxed_answer({"problem": problem, "solution": solution}) == reason


# Resemblance


def test_resemblance_by_hand():
    # Runs of 2 words: first has ab bc cd de, second xy; third bc cd.
    overlap = Overlap({"first": ["a b c d e"], "second": ["x y"], "third": ["B, c $d$", "q"]}, ngram_words=2)
    # The same words, whatever their case, spaces and signs; too short for a run, too.
    assert overlap.find("X,  $y$!") == "second"
    assert overlap.find("Q?") == "third"
    # Half of the runs: ab bc of four.
    assert overlap.find("z a b c z") == "first"
    assert overlap.find("d e z a b") == "first"
    # One of four.
    assert overlap.find("z a b z d z") is None
    # One of third's two; of first's, only a quarter.
    assert overlap.find("z c d z") == "third"
    assert overlap.find("a q c") is None
    assert overlap.find("") is None


def test_a_phrase_of_many_questions_is_no_resemblance():
    phrase = "where m and n are relatively prime positive integers find m n"
    asked = "the probability that two numbers drawn from a hat have a sum that is a square is m over n"
    overlap = Overlap({"aime24": [f"{asked} {phrase}"]})
    assert overlap.find(f"A circle of radius one meets a line so that its area is m over n {phrase}") is None
    assert overlap.find(f"{asked}. What is m?") == "aime24"


# Resolving


def test_the_919_leave_out_the_year_that_is_evaluated_on(data_root):
    rows = [
        {"ID": "1983-1", "Year": 1983, "Question": "A?", "Answer": "60"},
        {"ID": "2022-II-8", "Year": 2022, "Question": "B?", "Answer": "080 or 081 (both were accepted)"},
        {"ID": "2023-I-1", "Year": 2023, "Question": "C?", "Answer": "191"},
        {"ID": "2024-II-1", "Year": 2024, "Question": "D?", "Answer": "73"},
    ]
    data_root("di-zhang-fdu/AIME_1983_2024/train.jsonl", rows)
    loaded = resolve_split(SOURCES["aime-919"], "train")
    assert loaded.rows == [
        {"id": "1983-1", "question": "A?", "answer": "60", "Year": 1983},
        {
            "id": "2022-II-8",
            "question": "B?",
            "answer": "080",
            "accepted_answers": ["080", "081"],
            "Year": 2022,
        },
        {"id": "2023-I-1", "question": "C?", "answer": "191", "Year": 2023},
    ]
    assert loaded.notes == [
        "3 of 4 rows kept; left out: 1 Year 2024 or later.",
        "3 rows, where 919 were expected.",
    ]
    # By its Hub id the data set is what it is.
    assert len(read_rows("di-zhang-fdu/AIME_1983_2024", None, "train")) == 4


def test_numinamath_is_drawn_filtered_and_decontaminated(data_root):
    shared = "one two three four five six seven eight nine ten eleven twelve"
    data_root("math-ai/amc23/test.jsonl", [{"id": 0, "question": f"Begin {shared} end", "answer": 1.0}])
    solved = [
        {"problem": f"What is {k} plus {k}?", "solution": f"\\boxed{{{2 * k}}}", "source": "s"} for k in range(9)
    ]
    others = [
        {"problem": "Prove that it is.", "solution": "\\boxed{1}", "source": "s"},
        {"problem": "No box?", "solution": "5", "source": "s"},
        {"problem": f"Other {shared} words", "solution": "\\boxed{1}", "source": "s"},
        {"problem": "what is 3 plus 3 ?", "solution": "\\boxed{6}", "source": "s"},
        {"problem": "Empty?", "solution": "\\boxed{\\text{}}", "source": "s"},
    ]
    data_root("AI-MO/NuminaMath-CoT/train.jsonl", solved + others)
    rows, notes = resolve_split(SOURCES["numinamath-4k"], "train")
    assert sorted(row["answer"] for row in rows) == [str(2 * k) for k in (0, 5, 6, 7, 8, 1, 2, 3, 4)]
    # Drawn in an order of its own, the same each time.
    assert [row["id"] for row in rows] != sorted(row["id"] for row in rows)
    assert rows == resolve_split(SOURCES["numinamath-4k"], "train").rows
    assert notes[0].startswith("9 of 14 rows kept; left out: ")
    for reason in (
        "1 a proof",
        "1 no \\boxed answer",
        "1 like a question of amc23",
        "1 a repetition",
        "1 with an answer that math-verify does not understand",
    ):
        assert reason in notes[0]
    assert notes[1] == "compared with amc23."
    assert notes[2].startswith("not compared with aime24, aime25, math500, minerva, omni-math, gsm8k, which")


def test_a_draw_stops_when_it_has_enough(data_root):
    import dataclasses

    rows = [{"problem": f"{k}?", "solution": f"\\boxed{{{k}}}", "source": "s"} for k in range(100)]
    data_root("AI-MO/NuminaMath-CoT/train.jsonl", rows)
    source = dataclasses.replace(SOURCES["numinamath-4k"], sample=10, is_decontaminated=False)
    loaded = resolve_split(source, "train")
    assert len(loaded.rows) == 10
    assert loaded.notes[0] == "10 of 16 rows kept; left out: 6 more than needed."


def test_deepscaler_leaves_out_rows_without_answer(data_root):
    rows = [{"problem": "A?", "answer": "1", "solution": ""}, {"problem": "B?", "answer": "", "solution": ""}]
    data_root("agentica-org/DeepScaleR-Preview-Dataset/train.jsonl", rows)
    rows, notes = resolve_split(SOURCES["deepscaler"], "train")
    assert [row["question"] for row in rows] == ["A?"]
    assert notes[0] == "1 of 2 rows kept; left out: 1 no answer."


def test_benchmark_rows_have_tiers_and_are_judged(data_root, caplog):
    rows = [
        {"problem": "A?", "answer": "\\frac{1}{2}", "difficulty": 4.0, "source": "s", "domain": ["d"]},
        {"problem": "B?", "answer": "7", "difficulty": 4.5, "source": "s", "domain": ["d"]},
    ]
    data_root("KbsdJames/Omni-MATH/test.jsonl", rows)
    with caplog.at_level(logging.WARNING, logger="l2t_trl"):
        first, second = get_benchmark("omni-math").load()
    assert [first["tier"], second["tier"]] == [1, 2] and first["id"] == "0"
    assert "omni-math: 2 rows, where 4428 were expected." in caplog.text
    judge = get_benchmark("omni-math").judge
    rows = [first, second, second | {"answer": None}, second | {"accepted_answers": ["7", "8"]}]
    assert judge(["\\boxed{0.5}", *["\\boxed{8}"] * 3], rows) == [True, False, None, True]


# What is wrong


def test_unknown_names_are_answered_with_the_nearest(data_root):
    with pytest.raises(UserError, match="'aime-918' is no known data set. Did you mean aime-919"):
        read_split("aime-918", None, "train")
    with pytest.raises(UserError, match="'math50' is no benchmark. Did you mean math500"):
        get_benchmark("math50")


def test_unknown_name_without_a_data_root(monkeypatch):
    monkeypatch.delenv("L2T_DATA_ROOT", raising=False)
    with pytest.raises(UserError, match="'deepscalr' is no known data set. Did you mean deepscaler"):
        read_split("deepscalr", None, "train")


def test_folders_of_the_data_root_may_lack_an_owner(data_root):
    data_root("mine/train.jsonl", [{"question": "A?", "answer": "1"}])
    assert len(read_split("mine", None, "train")) == 1


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "amc23: math-ai/amc23 has no rows in its split 'test'"),
        ([{"id": 0, "q": "A?", "answer": 1.0}], "math-ai/amc23 has no column 'question'; it has id, q, answer"),
        (
            [{"id": 0, "question": "A?", "answer": 1.0}, {"id": 1, "question": None, "answer": 1.0}],
            r"row 1 \(counted from 0\) of math-ai/amc23 has no text in 'question'",
        ),
        (
            [{"id": 5, "question": "A?", "answer": 1.0}, {"id": 5, "question": "B?", "answer": 1.0}],
            "id '5' is that of two rows of math-ai/amc23, 0 and 1",
        ),
    ],
)
def test_unusable_benchmark(data_root, rows, expected):
    data_root("math-ai/amc23/test.jsonl", rows)
    with pytest.raises(UserError, match=expected):
        get_benchmark("amc23").load()


def test_split_that_a_known_set_lacks(data_root):
    assert resolve_split(SOURCES["math500"], "train") is None
    with pytest.raises(UserError, match="HuggingFaceH4/MATH-500 has no split 'test'"):
        data_root("HuggingFaceH4/MATH-500/train.jsonl", [{"problem": "A?", "answer": "1"}])
        resolve_split(SOURCES["math500"], "test")
