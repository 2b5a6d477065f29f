"""Trainings and evaluations side by side: what their output folders hold, as drawings and as one page."""

import base64
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from ..errors import UserError
from .figures import Bar, BudgetCurve, DepthCurve, plot_bars, plot_budgets, plot_depths, plot_training
from .page import document


METRICS, STATE = "metrics.json", "trainer_state.json"

_STYLE = """\
figure { margin: 1.6rem 0; }
figure img { display: block; max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: .4rem; }
figcaption { color: var(--dim); font-size: .9rem; margin-top: .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }"""


@dataclass
class Run:
    """
    What an output folder holds.

    Attributes:
        label (`str`): name of the run.
        log (`list[dict[str, Any]]`): a training's log; empty for an evaluation.
        results (`list[tuple[str, dict[str, Any]]]`): label and numbers of each evaluation, these with `benchmark`.
    """

    label: str
    log: list[dict[str, Any]] = field(default_factory=list)
    results: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


def read_runs(folders: Sequence[str]) -> list[Run]:
    """
    Read output folders of trainings and evaluations.

    Args:
        folders (`Sequence[str]`):
            Folders that `l2t train` wrote (`metrics.json`, or the last `checkpoint-N/trainer_state.json`), or `l2t eval`
            (a folder per benchmark).

    Returns:
        `list[Run]`: named by the last parts of the paths, as many as it takes to tell them apart.

    Raises:
        UserError: if a folder holds neither, or a file in it is damaged.
    """
    runs = []
    for folder, label in zip(folders, _labels(folders), strict=True):
        path = Path(folder)
        if not path.is_dir():
            raise UserError(f"RUN {folder}: no such folder.")
        files = [path / METRICS] if (path / METRICS).exists() else sorted(path.glob(f"*/{METRICS}"))
        contents = [(file, _read(file)) for file in files]
        results = [(label, content) for _, content in contents if "benchmark" in content]
        if results:
            runs.append(Run(label, results=results))
        elif (path / METRICS).exists():
            runs.append(_training(label, contents[0][1]))
        else:
            states = sorted(path.glob(f"checkpoint-*/{STATE}"), key=_step)
            if not states:
                raise UserError(
                    f"RUN {folder}: holds neither a training ({METRICS}, or checkpoint-N/{STATE}) nor an evaluation "
                    f"(BENCHMARK/{METRICS})."
                )
            runs.append(Run(label, log=_read(states[-1])["log_history"]))
    return runs


def draw_runs(runs: Sequence[Run], output: Path) -> list[tuple[Path, str]]:
    """
    Draw what runs have in common panels for: training curves, bars, depth and budget curves of each benchmark.

    Args:
        runs (`Sequence[Run]`):
            The runs.
        output (`Path`):
            Folder that gets the PNG files.

    Returns:
        `list[tuple[Path, str]]`: the files, and what each shows.
    """
    drawings: list[tuple[Path, str]] = []

    def draw(name: str, caption: str, plot: Callable[[Path], Any]) -> None:
        path = output / f"{name}.png"
        if plot(path) is not False:
            drawings.append((path, caption))

    results = [result for run in runs for result in run.results]
    bars = _bars(results)
    if bars:
        draw("bars", "Accuracy and length by benchmark and model.", lambda path: plot_bars(path, bars))
    for benchmark in dict.fromkeys(result["benchmark"] for _, result in results):
        of_it = [(label, result) for label, result in results if result["benchmark"] == benchmark]
        file_name = re.sub(r"[^\w.-]+", "-", benchmark)
        depths = [_depth_curve(label, result) for label, result in of_it if _has_depths(result)]
        if depths:
            caption = f"{benchmark}: completions cut behind their k-th episode and asked for the answer."
            draw(f"depth-{file_name}", caption, lambda path, d=depths, b=benchmark: plot_depths(path, d, b))
        budgets = [_budget_curve(label, result) for label, result in of_it if _has_budgets(result)]
        if budgets:
            caption = f"{benchmark}: share of completions that are correct within a token budget."
            title = f"Accuracy against token budget: {benchmark}"
            draw(f"budget-{file_name}", caption, lambda path, c=budgets, t=title: plot_budgets(path, c, t))
    logs = {run.label: run.log for run in runs if run.log}
    if logs:
        draw("training", "Training curves.", lambda path: plot_training(path, logs))
    return drawings


def page_of(runs: Sequence[Run], drawings: Sequence[tuple[Path, str]]) -> str:
    """Return one self-contained HTML page with the results as a table, and the drawings."""
    parts = [f'<p class="dim">{escape(", ".join(run.label for run in runs))}</p>']
    rows = [_row(label, result) for run in runs for label, result in run.results]
    if rows:
        heads = (
            "benchmark",
            "run",
            "accuracy, %",
            "95 % interval",
            "tokens",
            "tokens per correct answer",
            "cut off, %",
        )
        parts.append('<div class="wide"><table>' + _table_row("th", heads) + "".join(rows) + "</table></div>")
    for path, caption in drawings:
        data = base64.b64encode(path.read_bytes()).decode()
        text = escape(caption)
        parts.append(
            f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
        )
    return document("Runs side by side", "\n".join(parts), _STYLE, with_images=True)


def _labels(folders: Sequence[str]) -> list[str]:
    """Return the last parts of the paths, as many as it takes to tell them apart."""
    parts = [Path(folder).absolute().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise UserError("RUN: the same folder is given twice.")
    length = 1
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    return ["/".join(part[-length:]) for part in parts]


def _training(label: str, metrics: dict[str, Any]) -> Run:
    """A training: its log, and its evaluations before and after."""
    config = metrics.get("config", {})
    benchmark = config.get("test_dataset_name") or config.get("dataset_name") or "test questions"
    run = Run(label, log=metrics.get("log", []))
    curve = metrics.get("accuracy_at_budget")
    for when in ("before", "after"):
        if when in metrics:
            result = metrics[when] | {"benchmark": benchmark}
            if curve is not None:
                result["budget_curve"] = {"budgets": curve["budgets"], "accuracy": curve[when]}
            run.results.append((f"{label}, {when}", result))
    return run


def _bars(results: Sequence[tuple[str, dict[str, Any]]]) -> list[Bar]:
    """Bars by benchmark; where there is but one, by its tiers as well."""
    is_single = len({result["benchmark"] for _, result in results}) == 1
    parts = []
    for label, result in results:
        parts.append((label, result["benchmark"], result))
        if is_single:
            parts += [(label, f"tier {tier}", part) for tier, part in result.get("tiers", {}).items()]
    return [
        Bar(label, group, part["accuracy"], tuple(part["accuracy_interval"]), part["mean_tokens"])
        for label, group, part in parts
        if part["accuracy"] is not None
    ]


def _has_depths(result: dict[str, Any]) -> bool:
    return bool(result.get("depth_curve", {}).get("episodes"))


def _has_budgets(result: dict[str, Any]) -> bool:
    return "budget_curve" in result and None not in result["budget_curve"]["accuracy"]


def _depth_curve(label: str, result: dict[str, Any]) -> DepthCurve:
    curve = result["depth_curve"]
    columns = (curve[name] for name in ("episodes", "accuracy", "majority", "tokens"))
    return DepthCurve(label, *columns, whole=result["accuracy"])


def _budget_curve(label: str, result: dict[str, Any]) -> BudgetCurve:
    curve = result["budget_curve"]
    return BudgetCurve(
        label, curve["budgets"], curve["accuracy"], result["mean_tokens"], curve.get("accuracy_when_asked")
    )


def _row(label: str, result: dict[str, Any]) -> str:
    interval = result["accuracy_interval"]
    cells = (
        result["benchmark"],
        label,
        _number(result["accuracy"], 100),
        "-" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}",
        _number(result["mean_tokens"]),
        _number(result["tokens_per_correct"]),
        _number(result["truncated_share"], 100),
    )
    return _table_row("td", cells)


def _table_row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"


def _number(value: float | None, factor: float = 1) -> str:
    return "-" if value is None else f"{factor * value:.1f}"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not what a training or an evaluation writes.")
    return content


def _step(state: Path) -> int:
    number = state.parent.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
