"""`l2t plot`: what it reads, and what it draws."""

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from l2t_trl.cli import main
from l2t_trl.evaluation import write_report
from l2t_trl.evaluation.compare import read_runs
from l2t_trl.evaluation.figures import COLOURS, spread
from test_report import AFTER, BEFORE, CONFIG, HOSTILE, Page, is_drawn, log_history


NUMBERS = {
    "num_questions": 4,
    "num_completions": 8,
    "num_unjudged": 0,
    "accuracy": 0.5,
    "accuracy_interval": [0.2, 0.8],
    "mean_tokens": 12.0,
    "median_tokens": 11.0,
    "tokens_per_correct": 24.0,
    "truncated_share": 0.0,
    "pass_at": {"1": 0.5, "2": 0.625},
    "majority_at": {"1": 0.5, "2": None},
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
    # What is measured stands in the table.
    assert cells_of(html, "base") == ["4", "2", "50.0", "20.0 to 80.0", "62.5 (2)", "-", "12.0", "11.0", "24.0", "0.0"]
    assert cells_of(html, "one, after")[:3] == ["4", "1", "75.0"]


def cells_of(html, run):
    """The cells of the first line of a run."""
    line = re.search(rf'<tr><th scope="row">{re.escape(run)}</th>(.*?)</tr>', html)[1]
    return re.findall("<td>(.*?)</td>", line)


def test_page_says_what_its_drawings_show_in_their_own_size(tmp_path):
    runs = [write_evaluation(tmp_path / "base"), write_training(tmp_path / "one")]
    assert main(["plot", *runs, "--output", str(tmp_path / "plots")]) == 0
    html = (tmp_path / "plots" / "index.html").read_text()
    images = [dict(attributes) for attributes in image_attributes(html)]
    for image in images:
        pixels = Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))).size
        # 150 dots to an inch in the file, 96 on a page: letters have one size in all drawings.
        assert (int(image["width"]), int(image["height"])) == tuple(round(size * 96 / 150) for size in pixels)
        assert int(image["width"]) <= 960
    texts = " ".join(image["alt"] for image in images)
    assert "base, gsm8k: 50.0 % correct, 12 tokens" in texts
    assert "base, 0.0 % correct at 0, 50.0 % correct at 2" in texts
    assert "base, 50.0 % correct within 20 tokens" in texts
    assert "one, outcome reward from 0.51 to 0.7 (mean reward)" in texts


def image_attributes(html):
    found = []
    for tag, name, value in Page(html).attributes:
        if tag == "img" and name == "alt":
            found.append([])
        if tag == "img":
            found[-1].append((name, value))
    return found


def test_tiers_stand_in_a_table_of_their_own(tmp_path):
    run = write_evaluation(tmp_path / "base", tiers={"1": NUMBERS | {"accuracy": 0.75}, "2": NUMBERS})
    assert main(["plot", run, "--output", str(tmp_path / "plots")]) == 0
    html = (tmp_path / "plots" / "index.html").read_text().partition("By difficulty tier")[2]
    assert [name for name in re.findall("<span>(.*?)</span>", html)] == ["gsm8k, tier 1", "gsm8k, tier 2"]
    assert cells_of(html, "base")[2] == "75.0"


def test_a_run_has_one_colour_in_all_drawings(tmp_path):
    """Alone in a drawing, it would have another."""
    runs = [write_evaluation(tmp_path / name) for name in ("a", "b", "c")]
    write_evaluation(tmp_path / "c", benchmark="math500")
    runs.append(write_training(tmp_path / "one"))
    assert main(["plot", *runs, "--output", str(tmp_path / "plots")]) == 0
    for name in ("bars", "depth-math500", "budget-math500"):
        assert has_colour(tmp_path / "plots" / f"{name}.png", COLOURS[2])
    assert not has_colour(tmp_path / "plots" / "budget-math500.png", COLOURS[0])
    # The curves of a training have the colour of its model after it; that before it comes first.
    assert has_colour(tmp_path / "plots" / "budget-arithmetic.png", COLOURS[3])
    assert has_colour(tmp_path / "plots" / "training.png", COLOURS[4])


def has_colour(path, colour):
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return (pixels == wanted).all(axis=1).sum() > 50


def test_equal_curves_and_many_long_names_are_drawn(tmp_path):
    name = "a-name-that-is-far-too-long-to-stand-beside-its-curve-{}"
    runs = [write_evaluation(tmp_path / name.format(number)) for number in range(9)]
    for benchmark in ("aime24", "aime25", "amc23", "math500", "minerva", "omni-math"):
        for run in runs:
            write_evaluation(Path(run), benchmark=benchmark, depth_curve={"episodes": []})
    assert main(["plot", *runs, "--output", str(tmp_path / "plots")]) == 0
    for path in (tmp_path / "plots").glob("*.png"):
        assert is_drawn(path) and Image.open(path).size[0] <= 1500


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
    cells = cells_of((tmp_path / "plots" / "index.html").read_text(), "a")
    assert cells[2:4] == ["-", "-"] and cells[6:9] == ["12.0", "11.0", "-"]
    assert main(["plot", runs[0], "--output", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such folder"),
        ("", "holds neither a training"),
        ("{", "cannot be read"),
        ("[]", "is not what"),
        ('{"benchmark": "x", "accuracy": 1}', "it lacks accuracy_interval, mean_tokens, tokens_per_correct"),
        ('{"before": {"accuracy": 1}}', "it lacks accuracy_interval, mean_tokens, tokens_per_correct"),
        ('{"before": 1}', "it lacks accuracy, accuracy_interval"),
    ],
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


def test_an_evaluation_that_has_not_finished_is_named(tmp_path, capsys):
    (tmp_path / "run" / "gsm8k").mkdir(parents=True)
    (tmp_path / "run" / "gsm8k" / "completions.jsonl").write_text("")
    assert main(["plot", str(tmp_path / "run"), "--output", str(tmp_path / "plots")]) == 2
    assert "has not finished. Start the same l2t eval again" in capsys.readouterr().err


def test_a_full_disk_leaves_no_half_drawing(tmp_path):
    run = write_evaluation(tmp_path / "run")
    # No file may grow beyond 4,000 bytes: what a full disk does, but with another number of the error.
    code = f"""
import resource, sys
from l2t_trl.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
sys.exit(main(["plot", {run!r}, "--output", {str(tmp_path / "plots")!r}]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2 and "cannot be written" in result.stderr, result.stderr
    assert not list((tmp_path / "plots").iterdir())


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
