"""`l2t plot`: what it reads, and what it draws."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from l2t_trl.cli import main
from l2t_trl.evaluation import write_report
from l2t_trl.evaluation.compare import read_runs
from l2t_trl.evaluation.figures import spread
from test_report import AFTER, BEFORE, CONFIG, HOSTILE, Page, is_drawn, log_history


NUMBERS = {
    "num_questions": 4,
    "num_unjudged": 0,
    "accuracy": 0.5,
    "accuracy_interval": [0.2, 0.8],
    "mean_tokens": 12.0,
    "median_tokens": 11.0,
    "tokens_per_correct": 24.0,
    "truncated_share": 0.0,
}
DEPTH = {"episodes": [0, 1, 2], "accuracy": [0.0, 0.4, 0.5], "majority": [0.0, 0.5, 0.5], "tokens": [0.0, 6.0, 10.0]}
BUDGET = {"budgets": [0, 10, 20], "accuracy": [0.0, 0.25, 0.5], "accuracy_when_asked": [0.0, 0.5, 0.5]}


def write_evaluation(folder, benchmark="gsm8k", **changes):
    (folder / benchmark).mkdir(parents=True)
    result = NUMBERS | {"benchmark": benchmark, "tiers": {}, "depth_curve": DEPTH, "budget_curve": BUDGET} | changes
    (folder / benchmark / "metrics.json").write_text(json.dumps(result))
    return str(folder)


def write_training(folder, with_report=True):
    folder.mkdir(parents=True)
    if with_report:
        write_report(folder, BEFORE, AFTER, log_history(), CONFIG | {"dataset_name": "arithmetic"})
    else:
        for step in (5, 20, 10):
            (folder / f"checkpoint-{step}").mkdir()
            state = {"log_history": log_history(num_steps=step)}
            (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    return str(folder)


def test_everything_that_runs_hold_is_drawn(tmp_path, capsys):
    runs = [write_evaluation(tmp_path / "base"), write_evaluation(tmp_path / "l2t", accuracy=0.75)]
    runs += [write_training(tmp_path / "one"), write_training(tmp_path / "two", with_report=False)]
    capsys.readouterr()
    assert main(["plot", *runs, "--output", str(tmp_path / "plots")]) == 0
    names = ["bars.png", "depth-gsm8k.png", "budget-gsm8k.png", "budget-arithmetic.png", "training.png", "index.html"]
    assert capsys.readouterr().out.split() == [str(tmp_path / "plots" / name) for name in names]
    assert all(is_drawn(tmp_path / "plots" / name) for name in names[:-1])


def test_page_is_self_contained_and_holds_the_drawings(tmp_path):
    runs = [write_evaluation(tmp_path / "base", benchmark=HOSTILE.replace("/", "")), write_training(tmp_path / "one")]
    assert main(["plot", *runs, "--output", str(tmp_path / "plots")]) == 0
    html = (tmp_path / "plots" / "index.html").read_text()
    page = Page(html)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    sources = [value for _, name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == len(list((tmp_path / "plots").glob("*.png"))) == page.tags.count("img")
    for source in sources:
        assert source.startswith("data:image/png;base64,")
        Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).verify()
    assert "url(" not in html and "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in html
    # What is measured stands in the table: accuracy, interval, tokens, per correct answer, cut off.
    assert "<td>base</td><td>50.0</td><td>20.0 to 80.0</td><td>12.0</td><td>24.0</td><td>0.0</td>" in html
    assert "<td>arithmetic</td><td>one, after</td><td>75.0</td>" in html


def test_a_training_is_read_from_its_report_or_its_last_checkpoint(tmp_path):
    report, state = read_runs([write_training(tmp_path / "a"), write_training(tmp_path / "b", with_report=False)])
    assert [label for label, _ in report.results] == ["a, before", "a, after"]
    assert report.results[1][1]["accuracy"] == AFTER.accuracy
    assert report.results[1][1]["budget_curve"]["accuracy"][-1] == AFTER.accuracy
    assert max(entry["step"] for entry in report.log) == max(entry["step"] for entry in state.log) == 20
    assert state.results == []


def test_an_evaluation_is_read_as_a_whole_or_by_benchmark(tmp_path):
    folder = write_evaluation(tmp_path / "model")
    write_evaluation(tmp_path / "model", benchmark="math500")
    (whole,) = read_runs([folder])
    assert [result["benchmark"] for _, result in whole.results] == ["gsm8k", "math500"]
    (one,) = read_runs([f"{folder}/math500"])
    assert [result["benchmark"] for _, result in one.results] == ["math500"]


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    runs = read_runs([write_evaluation(tmp_path / name / "eval") for name in ("x", "y")])
    assert [run.label for run in runs] == ["x/eval", "y/eval"]
    (run,) = read_runs([str(tmp_path / "x" / "eval")])
    assert run.label == "eval"


def test_numbers_that_are_undefined_are_left_out(tmp_path):
    nothing = {"accuracy": None, "accuracy_interval": None, "tokens_per_correct": None}
    nothing |= {"budget_curve": {"budgets": [0], "accuracy": [None]}, "depth_curve": DEPTH | {"episodes": []}}
    runs = [write_evaluation(tmp_path / "a", **nothing), write_evaluation(tmp_path / "b")]
    assert main(["plot", *runs, "--output", str(tmp_path / "plots")]) == 0
    assert "<td>a</td><td>-</td><td>-</td><td>12.0</td><td>-</td>" in (tmp_path / "plots" / "index.html").read_text()
    assert main(["plot", runs[0], "--output", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such folder"), ("", "holds neither a training"), ("{", "cannot be read"), ("[]", "is not what")],
)
def test_folders_that_hold_nothing_are_named(tmp_path, capsys, content, message):
    folder = tmp_path / "run"
    if content is not None:
        folder.mkdir()
    if content:
        (folder / "metrics.json").write_text(content)
    assert main(["plot", str(folder), "--output", str(tmp_path / "plots")]) == 2
    error = capsys.readouterr().err
    assert message in error and str(folder) in error
    assert not (tmp_path / "plots").exists()


def test_one_folder_twice_is_refused(tmp_path, capsys):
    folder = write_evaluation(tmp_path / "run")
    assert main(["plot", folder, folder, "--output", str(tmp_path / "plots")]) == 2
    assert "given twice" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    folder = write_evaluation(tmp_path / "run")
    assert main(["plot", folder, "--output", str(tmp_path / "file")]) == 2
    assert re.search("--output .*file: cannot be written", capsys.readouterr().err)


def test_labels_are_spread_by_hand():
    assert spread([0, 100, 200], 13) == [0, 100, 200]
    assert spread([50, 50], 10) == [45, 55]
    # The first two share their mean, 4.5; the third is far enough.
    assert spread([4, 5, 30], 10) == [-0.5, 9.5, 30]
    moved = spread([0, 1, 2, 3], 10)
    assert np.allclose(np.diff(moved), 10) and np.isclose(np.mean(moved), 1.5)
    assert spread([], 10) == []
