"""What a run leaves behind: table, strict JSON, plots, sections of the model card, and the page of scored episodes."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from l2t_trl.evaluation import EvaluatedCompletion, Evaluation, model_card_sections, render_page, write_report
from l2t_trl.evaluation.report import results_table


CONFIG = {"process_reward_coef": 0.8, "compression_coef": 0.6, "learning_rate": 1e-4, "seed": 7, "proxy_modules": None}


def evaluation(rows, seed=0):
    """Rows: tier, is_correct, tokens, is_truncated."""
    completions = [
        EvaluatedCompletion(question, tier, "text", tokens, is_correct, is_truncated)
        for question, (tier, is_correct, tokens, is_truncated) in enumerate(rows)
    ]
    return Evaluation(completions, max_new_tokens=100, seed=seed)


BEFORE = evaluation([(1, True, 40, False), (1, False, 60, False), (2, False, 100, True), (2, True, 80, False)], seed=3)
AFTER = evaluation([(1, True, 20, False), (1, True, 30, False), (2, False, 70, False), (2, True, 50, False)], seed=3)


def log_history(num_steps=20, with_l2t=True):
    entries = []
    for step in range(1, num_steps + 1):
        entry = {
            "step": step,
            "reward": 0.5 + step / 100,
            "rewards/accuracy/mean": 0.5 + step / 100,
            "completions/mean_length": 100.0 - step,
            "frac_bad": math.nan,
        }
        if with_l2t:
            entry |= {
                "l2t/episodes/mean": 5.0,
                "l2t/fitting_gain/mean": math.nan if step == 3 else 0.1,
                "l2t/compression_penalty/mean": 0.2,
            }
        entries.append(entry)
    return [*entries, {"step": num_steps, "train_runtime": 12.5, "when": math.inf}]


def is_drawn(path):
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return min(pixels.shape[:2]) > 300 and (pixels.min(axis=2) < 200).mean() > 0.005


def test_table_by_hand():
    lines = results_table(BEFORE, AFTER).splitlines()
    rows = {line[:6].strip(): line[6:].split() for line in lines if re.match("tier|all", line)}
    # Tokens per completion 50 and 25; per correct answer 100 / 1 and 50 / 2.
    assert rows["tier 1"] == ["50.0", "100.0", "+50.0", "50.0", "25.0", "0.50x", "100.0", "25.0", "0.25x"]
    assert rows["tier 2"] == ["50.0", "50.0", "+0.0", "90.0", "60.0", "0.67x", "180.0", "120.0", "0.67x"]
    assert rows["all"] == ["50.0", "75.0", "+25.0", "70.0", "42.5", "0.61x", "140.0", "56.7", "0.40x"]
    assert "Cut off at 100 tokens: 25.0 % before, 0.0 % after." in lines


def test_table_without_a_correct_answer():
    nothing = evaluation([(None, False, 10, False)])
    (row,) = [line.split() for line in results_table(nothing, nothing).splitlines() if line.startswith("all")]
    assert row == ["all", "0.0", "0.0", "+0.0", "10.0", "10.0", "1.00x", "-", "-", "-"]


def test_report_prints_the_table_and_writes_the_files(tmp_path, capsys):
    paths = write_report(tmp_path / "new" / "run", BEFORE, AFTER, log_history(), CONFIG)
    assert results_table(BEFORE, AFTER) in capsys.readouterr().out
    names = [str(path.relative_to(tmp_path / "new" / "run")) for path in paths]
    assert names == ["metrics.json", "plots/training.png", "plots/accuracy_at_budget.png"]
    assert is_drawn(paths[1]) and is_drawn(paths[2])


def test_metrics_are_strict_json(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    (path, *_) = write_report(tmp_path, BEFORE, AFTER, log_history(), CONFIG)
    metrics = json.loads(path.read_text(), parse_constant=refuse)
    assert metrics["before"]["accuracy"] == 0.5
    assert metrics["after"]["tiers"]["1"]["accuracy"] == 1.0
    assert metrics["relative_tokens"] == pytest.approx(42.5 / 70)
    assert metrics["log"][0]["frac_bad"] is None
    assert metrics["log"][-1]["when"] is None
    assert metrics["config"] == CONFIG
    curve = metrics["accuracy_at_budget"]
    at = dict(zip(curve["budgets"], zip(curve["before"], curve["after"], strict=True), strict=True))
    assert at[20] == (0, 0.25)
    assert at[100] == (0.5, 0.75)


def test_settings_are_read_from_a_trainers_configuration(tmp_path):
    from l2t_trl import L2TConfig

    config = L2TConfig(output_dir=str(tmp_path), compression_coef=0.3, use_cpu=True, bf16=False, report_to="none")
    (path, *_) = write_report(tmp_path, BEFORE, AFTER, [], config)
    recipe = json.loads(path.read_text())["config"]
    assert (recipe["compression_coef"], recipe["advantage_form"], recipe["seed"]) == (0.3, "paper", 42)
    assert "| `compression_coef` | `0.3` |" in model_card_sections(BEFORE, AFTER, config)


@pytest.mark.parametrize("method", ["l2t", "grpo"])
def test_settings_may_come_in_sections(method):
    config = {"script": {"method": method, "dataset_name": "arithmetic"}, "training": CONFIG}
    text = model_card_sections(BEFORE, AFTER, config)
    assert f"| `method` | `{method}` |" in text
    assert "| `learning_rate` | `0.0001` |" in text
    assert "Training: 7." in text
    # The control has no such reward, whatever its configuration says.
    assert ("process_reward_coef" in text) == (method == "l2t")


def test_keys_that_the_log_lacks_are_left_out(tmp_path):
    size = {}
    for name, history in (("l2t", log_history()), ("grpo", log_history(with_l2t=False)), ("none", [{"step": 1}])):
        paths = write_report(tmp_path / name, BEFORE, AFTER, history, CONFIG)
        curves = tmp_path / name / "plots" / "training.png"
        assert curves.exists() == (curves in paths) == (name != "none")
        size[name] = Image.open(curves).size if curves.exists() else None
    # Six panels in two rows, three in one.
    assert size["l2t"][0] == size["grpo"][0] and size["l2t"][1] == 2 * size["grpo"][1]


def test_values_that_are_not_finite_are_left_out_of_the_curves(tmp_path):
    histories = {name: log_history() for name in ("nan", "missing")}
    histories["nan"][5]["reward"] = math.nan
    del histories["missing"][5]["reward"]
    plots = {name: write_report(tmp_path / name, BEFORE, AFTER, log, CONFIG)[1] for name, log in histories.items()}
    assert plots["nan"].read_bytes() == plots["missing"].read_bytes()


def test_one_step_can_be_plotted(tmp_path):
    paths = write_report(tmp_path, BEFORE, AFTER, log_history(num_steps=1), CONFIG)
    assert all(is_drawn(path) for path in paths[1:])


def test_same_run_same_plots(tmp_path):
    first = write_report(tmp_path / "a", BEFORE, AFTER, log_history(), CONFIG)
    second = write_report(tmp_path / "b", BEFORE, AFTER, log_history(), CONFIG)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_model_card_sections():
    text = model_card_sections(BEFORE, AFTER, CONFIG)
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Results",
        "## Recipe",
        "## Seeds",
        "## Known limits",
    ]
    (row,) = [line for line in text.splitlines() if line.startswith("| all")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3:] == ["70.0", "42.5", "0.61x", "140.0", "56.7"]
    assert cells[1].startswith("50.0 % [15.0 to 85.0]")  # Wilson's interval for 2 of 4
    assert "| `learning_rate` | `0.0001` |" in text
    assert "Training: 7. Evaluation: 3 before, 3 after." in text
    assert "25.0 % of the completions before training and 0.0 % after" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    header = tables.index("|---|---|---|---|---|---|---|---|")
    assert {line.count("|") for line in tables[: header + 4]} == {9}


# ----- the page -----


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'"


def scored(text="<episode_1>2+2=4</episode_1>", episode_reward=0.4, **changes):
    episode = {
        "start": 0,
        "end": 6,
        "text": text,
        "correctness": 0.75,
        "gain": 0.5,
        "information": 12.0,
        "penalty": 0.125,
        "reward": episode_reward,
        "is_answer": False,
    }
    answer = episode | {"start": 6, "end": 9, "text": "the answer", "gain": 0.0, "reward": -0.2, "is_answer": True}
    row = {
        "prompt": [{"role": "user", "content": "2+2?"}],
        "completion": text,
        "answer": "4",
        "correctness_before": 0.25,
        "episodes": [episode, answer],
        "outcome": 1,
        "reward": 1.16,
    }
    return row | changes


class Page(HTMLParser):
    """Collects tags, the text of every episode without its tooltip, and the style of each."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.texts, self.styles, self.stack = [], [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        attrs = dict(attrs)
        if tag in ("meta", "br", "line", "circle", "polyline"):
            return
        self.stack.append(attrs.get("class"))
        if attrs.get("class") == "ep":
            self.texts.append("")
            self.styles.append(attrs["style"])

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        if tag not in ("circle", "polyline", "line"):
            self.stack.pop()

    def handle_data(self, data):
        if self.stack and self.stack[-1] == "ep":
            self.texts[-1] += data


def test_page_is_inert_and_self_contained():
    row = scored(text=HOSTILE, prompt=HOSTILE, answer=HOSTILE)
    page = Page(render_page([row], HOSTILE))
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert not [item for item in page.attributes if item[1].startswith("on") or item[1] in ("src", "href")]
    assert page.texts[0] == HOSTILE
    html = render_page([row], "title")
    assert "url(" not in html and "@import" not in html
    assert "default-src 'none'" in html


def test_page_keeps_dollar_signs_and_line_breaks():
    page = Page(render_page([scored(text="costs $title and $5\n\n  indented")], "$summary"))
    assert page.texts[0] == "costs $title and $5\n\n  indented"


def test_page_colours_by_sign_and_size():
    page = Page(
        render_page([scored(episode_reward=0.4), scored(episode_reward=-0.1), scored(episode_reward=0.0)], "title")
    )
    opacities = [(style.split("(")[1].split(",")[0], float(style.rstrip(")").split(",")[-1])) for style in page.styles]
    gain, answer, loss, _, zero, _ = opacities
    assert gain[0] != loss[0] and gain[0] == zero[0] and loss[0] == answer[0]
    # Rewards 0.4, -0.2, -0.1 and 0, relative to the largest.
    assert gain[1] == pytest.approx(2 * answer[1]) == pytest.approx(4 * loss[1])
    assert zero[1] == 0


def test_page_colours_are_not_set_by_an_outlier():
    # 100 spans, the 95th by size has 0.2: full strength for it and for the outlier alike.
    rows = [scored(episode_reward=0.1) for _ in range(49)] + [scored(episode_reward=9.0)]
    html = render_page(rows, "title")
    opacities = [float(style.rstrip(")").split(",")[-1]) for style in Page(html).styles]
    assert opacities[0] == pytest.approx(opacities[1] / 2) == pytest.approx(opacities[-2] / 2)
    assert "+0.200 or more" in html


def test_page_shows_the_numbers():
    html = render_page([scored(), scored(outcome=0), scored(outcome=None, reward=None)], "title")
    assert "3 completions, 1 correct, 6 spans" in html
    for badge in ("correct", "wrong", "not judged"):
        assert f'<span class="badge">{badge}</span>' in html
    for name, value in (("gain", "0.500"), ("penalty", "0.125"), ("information", "12.000"), ("correctness", "0.750")):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in html
    assert "answer span" in html
    # J before and after the only episode; the answer span adds no point.
    assert re.findall(r"J after \d episodes: [\d.]+", html)[:2] == [
        "J after 0 episodes: 0.2500",
        "J after 1 episodes: 0.7500",
    ]
    assert html.count("<svg") == 3 and html.count("<circle") == 6


def test_page_of_empty_completions():
    html = render_page([scored(episodes=[], completion="")], "title")
    assert "<i>empty</i>" in html
    assert html.count("<circle") == 1
    assert "0 completions" in render_page([], "title")
