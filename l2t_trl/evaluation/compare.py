"""Trainings and evaluations side by side: what their output folders hold, and drawings of it."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from .figures import (
    CURVES,
    Bar,
    BudgetCurve,
    DepthCurve,
    colours_of,
    plot_bars,
    plot_budgets,
    plot_depths,
    plot_training,
)


METRICS, STATE, COMPLETIONS = "metrics.json", "trainer_state.json", "completions.jsonl"

# What every evaluation's numbers have.
NUMBERS = ("accuracy", "accuracy_interval", "mean_tokens", "tokens_per_correct", "truncated_share")


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


@dataclass(frozen=True)
class Drawing:
    """
    A file with a drawing.

    Attributes:
        path (`Path`): the PNG file.
        title (`str`): what it is of.
        section (`str`): benchmark that it is of; `""` for all of them, `"Training"` for training curves.
        caption (`str`): how it is to be read.
        description (`str`): what it shows, for readers who do not see it.
    """

    path: Path
    title: str
    section: str
    caption: str
    description: str


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
        results = [(label, _checked(file, content)) for file, content in contents if "benchmark" in content]
        if results:
            runs.append(Run(label, results=results))
        elif (path / METRICS).exists():
            runs.append(_training(label, *contents[0]))
        else:
            states = sorted(path.glob(f"checkpoint-*/{STATE}"), key=_step)
            if not states and next(path.glob(f"**/{COMPLETIONS}"), None):
                raise UserError(
                    f"RUN {folder}: its evaluation has not finished. Start the same l2t eval again: it goes on."
                )
            if not states:
                raise UserError(
                    f"RUN {folder}: holds neither a training ({METRICS}, or checkpoint-N/{STATE}) nor an evaluation "
                    f"(BENCHMARK/{METRICS})."
                )
            runs.append(Run(label, log=_read(states[-1])["log_history"]))
    return runs


def draw_runs(runs: Sequence[Run], output: Path) -> list[Drawing]:
    """
    Draw what runs have in common panels for: bars, depth and budget curves of each benchmark, training curves.

    Args:
        runs (`Sequence[Run]`):
            The runs.
        output (`Path`):
            Folder that gets the PNG files.

    Returns:
        `list[Drawing]`: a run has the same colour in all of them.
    """
    drawings: list[Drawing] = []

    def draw(name: str, title: str, section: str, caption: str, text: str, plot: Callable[[Path], Any]) -> None:
        path = output / f"{name}.png"
        if plot(path) is not False:
            drawings.append(Drawing(path, title, section, caption, text))

    results = [result for run in runs for result in run.results]
    colours = _colours(runs)
    bars = _bars(results)
    if bars:
        benchmarks = {result["benchmark"] for _, result in results}
        draw(
            "bars",
            "accuracy and length",
            next(iter(benchmarks)) if len(benchmarks) == 1 else "",
            "Accuracy (pass@1) with its 95 % interval, and mean length of a completion.",
            "Bars: " + "; ".join(map(_describe_bar, bars)) + ".",
            lambda path: plot_bars(path, bars, colours),
        )
    for benchmark in dict.fromkeys(result["benchmark"] for _, result in results):
        of_it = [(label, result) for label, result in results if result["benchmark"] == benchmark]
        file_name = re.sub(r"[^\w.-]+", "-", benchmark)
        depths = [_depth_curve(label, result) for label, result in of_it if _has_depths(result)]
        if depths:
            draw(
                f"depth-{file_name}",
                f"accuracy by depth, {benchmark}",
                benchmark,
                "Completions cut behind their k-th episode and asked for the answer: share of right answers Acc(k), "
                "share of right majorities of four answers maj@4(k), and tokens read up to there.",
                "Curves by number of episodes read: " + "; ".join(map(_describe_depth, depths)) + ".",
                lambda path, d=depths, b=benchmark: plot_depths(path, d, b, colours),
            )
        budgets = [_budget_curve(label, result) for label, result in of_it if _has_budgets(result)]
        if budgets:
            draw(
                f"budget-{file_name}",
                f"accuracy by token budget, {benchmark}",
                benchmark,
                "Share of completions that are correct and have ended within a token budget.",
                "Curves by token budget: " + "; ".join(map(_describe_budget, budgets)) + ".",
                lambda path, c=budgets, b=benchmark: plot_budgets(
                    path, c, f"Accuracy against token budget: {b}", colours
                ),
            )
    logs = {run.label: run.log for run in runs if run.log}
    if logs:
        draw(
            "training",
            "training curves",
            "Training",
            "Training curves, over the optimiser steps. J is the model's own probability of the correct answer, the "
            "gain of an episode what it adds to J.",
            "Training curves: " + "; ".join(f"{label}, {_describe_log(log)}" for label, log in logs.items()) + ".",
            lambda path: plot_training(path, logs, colours),
        )
    return drawings


def _labels(folders: Sequence[str]) -> list[str]:
    """Return the last parts of the paths, as many as it takes to tell them apart."""
    parts = [Path(folder).absolute().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise UserError("RUN: the same folder is given twice.")
    length = 1
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    return ["/".join(part[-length:]) for part in parts]


def _colours(runs: Sequence[Run]) -> dict[str, str]:
    """Colours of all that is drawn; a training's curves have that of its model after it."""
    owners = {run.label: run.results[-1][0] if run.results else run.label for run in runs}
    colours = colours_of(
        [label for run in runs for label in [*(label for label, _ in run.results), owners[run.label]]]
    )
    return colours | {label: colours[owner] for label, owner in owners.items()}


def _training(label: str, file: Path, metrics: dict[str, Any]) -> Run:
    """A training: its log, and its evaluations before and after."""
    config = metrics.get("config", {})
    benchmark = config.get("test_dataset_name") or config.get("dataset_name") or "test questions"
    run = Run(label, log=metrics.get("log", []))
    curve = metrics.get("accuracy_at_budget")
    for when in ("before", "after"):
        if when in metrics:
            result = _checked(file, metrics[when]) | {"benchmark": benchmark}
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


def _describe_bar(bar: Bar) -> str:
    return f"{bar.label}, {bar.group}: {100 * bar.accuracy:.1f} % correct, {bar.tokens:.0f} tokens"


def _describe_depth(curve: DepthCurve) -> str:
    first, last = (f"{100 * curve.accuracy[k]:.1f} % correct at {curve.episodes[k]}" for k in (0, -1))
    return f"{curve.label}, {first}, {last}"


def _describe_budget(curve: BudgetCurve) -> str:
    return f"{curve.label}, {100 * curve.shares[-1]:.1f} % correct within {curve.budgets[-1]} tokens"


def _describe_log(log: Sequence[dict[str, Any]]) -> str:
    """First and last value of each curve."""
    parts = []
    for key, title, unit, factor in CURVES:
        values = [entry[key] for entry in log if isinstance(entry.get(key), int | float)]
        if values:
            parts.append(f"{title.lower()} from {factor * values[0]:.3g} to {factor * values[-1]:.3g} ({unit})")
    return ", ".join(parts)


def _checked(file: Path, numbers: Any) -> dict[str, Any]:
    lacking = [name for name in NUMBERS if not isinstance(numbers, dict) or name not in numbers]
    if lacking:
        raise UserError(f"{file} is not what a training or an evaluation writes: it lacks {', '.join(lacking)}.")
    return numbers


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
