"""Drawings of trainings and evaluations, of one or of several side by side. matplotlib waits for a call."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Panels of the training curves: key in the log, title, unit, factor from the logged unit to the one shown.
CURVES = (
    ("reward", "Outcome reward", "mean reward", 1),
    ("rewards/accuracy/mean", "Accuracy of the rollouts", "% correct", 100),
    ("completions/mean_length", "Completion length", "tokens per completion", 1),
    ("l2t/episodes/mean", "Episodes", "episodes per completion", 1),
    ("l2t/fitting_gain/mean", "Fitting gain", "gain in J per episode", 1),
    ("l2t/compression_penalty/mean", "Compression penalty", "penalty per episode", 1),
)
# Steps from which on a running mean is drawn over the steps.
LONG_RUN = 16
# Points of the accuracy against the budget.
NUM_BUDGETS = 200
# Okabe and Ito's, told apart by colour-blind readers as well; the pale yellow is left out.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
ONLY_COLOUR = COLOURS[1]
GREY = "#8a8a8a"
LABEL_GAP = 13.0  # points between the labels of two curves


@dataclass(frozen=True)
class BudgetCurve:
    """
    Accuracy against the token budget.

    Attributes:
        label (`str`): whose it is.
        budgets (`Sequence[int]`), shares (`Sequence[float]`): budgets in tokens, and the share that is correct and ends
            within each.
        mean_tokens (`float`): mean length of a completion.
        asked (`Sequence[float]`, *optional*): accuracy if the answer is asked for where the budget ends.
    """

    label: str
    budgets: Sequence[int]
    shares: Sequence[float]
    mean_tokens: float
    asked: Sequence[float] | None = None


@dataclass(frozen=True)
class DepthCurve:
    """
    Accuracy against the number of episodes that are read.

    Attributes:
        label (`str`): whose it is.
        episodes (`Sequence[int]`): k.
        accuracy (`Sequence[float]`), majority (`Sequence[float]`): Acc(k) and maj@4(k), shares.
        tokens (`Sequence[float]`): T(k).
        whole (`float`): accuracy of the whole completions.
    """

    label: str
    episodes: Sequence[int]
    accuracy: Sequence[float]
    majority: Sequence[float]
    tokens: Sequence[float]
    whole: float


@dataclass(frozen=True)
class Bar:
    """
    One model on one benchmark.

    Attributes:
        label (`str`), group (`str`): the model's and the benchmark's name.
        accuracy (`float`): a share.
        interval (`tuple[float, float]`): its 95 % interval.
        tokens (`float`): mean length of a completion.
    """

    label: str
    group: str
    accuracy: float
    interval: tuple[float, float]
    tokens: float


def budgets_up_to(longest: int) -> list[int]:
    """Return the token budgets at which a curve is drawn, from none to one that fits the longest completion."""
    step = max(1, math.ceil(longest / NUM_BUDGETS))
    return list(range(0, longest + step, step))


def plot_training(path: Path, logs: dict[str, Sequence[dict[str, Any]]]) -> bool:
    """Plot the training curves that the runs' logs hold, by label; return whether they held any."""
    panels = [
        (title, unit, {label: _series(log, key, factor) for label, log in logs.items()})
        for key, title, unit, factor in CURVES
    ]
    panels = [(title, unit, runs) for title, unit, runs in panels if any(steps for steps, _ in runs.values())]
    if not panels:
        return False
    colours = _colours(list(logs))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = _figure(rows, columns, 4.0 * columns, 2.9 * rows + (0.35 if len(logs) > 1 else 0))
    has_means = False
    for axis, (title, unit, runs) in zip(axes, panels, strict=False):
        for label, (steps, values) in runs.items():
            if steps:
                has_means |= _draw_run(axis, steps, values, colours[label])
        everything = [value for _, values in runs.values() for value in values]
        if min(everything) < 0 < max(everything):
            axis.axhline(0, color=GREY, linewidth=0.8)
        _name(axis, title, "optimiser step", unit)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    if len(logs) > 1:
        _legend(figure, colours)
    if has_means:
        figure.supxlabel("pale: each step; dark: running mean", x=0.995, ha="right", fontsize=8.5, color="#606060")
    _save(figure, path)
    return True


def plot_budgets(path: Path, curves: Sequence[BudgetCurve], title: str = "Accuracy against token budget") -> None:
    """Plot the share of completions that are correct within a token budget (paper Fig. 3)."""
    colours = _colours([curve.label for curve in curves])
    # The names stand to the right of the curves.
    figure, (axis,) = _figure(1, 1, 6.4 + 0.09 * max([0, *(len(curve.label) - 8 for curve in curves)]), 4.2)
    longest = max((curve.budgets[-1] for curve in curves), default=1)
    for curve in curves:
        colour = colours[curve.label]
        # A curve that ends early has said all: the longest of its completions fits.
        budgets, shares = [*curve.budgets, longest], [*curve.shares, curve.shares[-1]]
        axis.step(budgets, _percents(shares), where="post", color=colour, linewidth=2)
        if curve.asked is not None:
            asked = [*curve.asked, curve.asked[-1]]
            axis.step(budgets, _percents(asked), where="post", color=colour, linewidth=1.4, linestyle=(0, (4, 2)))
        axis.plot([curve.mean_tokens] * 2, [0, 0.04], color=colour, linewidth=3, transform=axis.get_xaxis_transform())
    axis.set_xlim(0, longest)
    # Without a correct answer the scale would be of rounding errors.
    axis.set_ylim(0, max(1.0, axis.get_ylim()[1]))
    _label_ends(axis, longest, [(curve.label, 100 * curve.shares[-1], colours[curve.label]) for curve in curves])
    _name(
        axis,
        title,
        "token budget (tokens per completion; marks: mean length)",
        "correct within the budget (%)",
    )
    if any(curve.asked is not None for curve in curves):
        _styles(figure, {"ended within the budget": "-", "asked for the answer where the budget ends": (0, (4, 2))})
    _save(figure, path)


def plot_depths(path: Path, curves: Sequence[DepthCurve], title: str = "") -> None:
    """Plot accuracy, maj@4 and tokens against the number of episodes that are read (paper Fig. 1, 6)."""
    colours = _colours([curve.label for curve in curves])
    figure, (accuracy, tokens) = _figure(1, 2, 9.6, 4.4)
    for curve in curves:
        colour, is_point = colours[curve.label], len(curve.episodes) == 1
        style = {"color": colour, "marker": "o", "markersize": 3.5 if not is_point else 6}
        accuracy.plot(curve.episodes, _percents(curve.accuracy), linewidth=2, **style)
        accuracy.plot(curve.episodes, _percents(curve.majority), linewidth=1.4, linestyle=(0, (4, 2)), color=colour)
        accuracy.axhline(100 * curve.whole, color=colour, linewidth=1.0, linestyle=(0, (1, 2)))
        tokens.plot(curve.episodes, curve.tokens, linewidth=2, **style)
    for axis in (accuracy, tokens):
        axis.set_ylim(0, max(1.0, axis.get_ylim()[1]))
        axis.xaxis.get_major_locator().set_params(integer=True)
    where = f": {title}" if title else ""
    _name(accuracy, f"Accuracy by depth{where}", "episodes read, k", "correct answers (%)")
    _name(tokens, f"Tokens by depth{where}", "episodes read, k", "tokens read, T(k), mean")
    _styles(figure, {"Acc(k)": "-", "maj@4(k)": (0, (4, 2)), "whole completions": (0, (1, 2))}, colours)
    _save(figure, path)


def plot_bars(path: Path, bars: Sequence[Bar]) -> None:
    """Plot accuracy and tokens by benchmark and model (paper Fig. 2)."""
    labels, groups = (list(dict.fromkeys(getattr(bar, name) for bar in bars)) for name in ("label", "group"))
    colours = _colours(labels)
    width = 0.8 / len(labels)
    size = min(14.0, max(4.4, 0.8 + len(groups) * (0.4 + 0.5 * len(labels))))
    # Side by side as long as that is still readable, else one above the other.
    rows, columns = (1, 2) if size <= 7 else (2, 1)
    figure, axes = _figure(rows, columns, columns * size, 3.9 * rows)
    for bar in bars:
        # Those that a benchmark has stand around its name.
        there = [label for label in labels if any((one.label, one.group) == (label, bar.group) for one in bars)]
        place = groups.index(bar.group) + (there.index(bar.label) - (len(there) - 1) / 2) * width
        error = [[100 * (bar.accuracy - bar.interval[0])], [100 * (bar.interval[1] - bar.accuracy)]]
        values = ((100 * bar.accuracy, error, 100 * bar.interval[1]), (bar.tokens, None, bar.tokens))
        for axis, (value, spread, top) in zip(axes, values, strict=True):
            axis.bar(place, value, 0.9 * width, color=colours[bar.label], yerr=spread, capsize=2.5, ecolor="#404040")
            axis.annotate(
                f"{value:.1f}" if value < 1000 else f"{value:,.0f}",
                (place, top),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    for axis in axes:
        axis.set_xticks(range(len(groups)), groups)
        axis.set_xlim(-0.6, len(groups) - 0.4)
        axis.margins(y=0.12)
        axis.set_ylim(0, max(1.0, axis.get_ylim()[1]))
    _name(axes[0], "Accuracy", "", "pass@1 (%), 95 % interval")
    _name(axes[1], "Length", "", "mean tokens per completion")
    if len(labels) > 1:
        _legend(figure, colours)
    _save(figure, path)


def _draw_run(axis: "Axes", steps: Sequence[float], values: Sequence[float], colour: str) -> bool:
    """Draw one run's curve; return whether a running mean was drawn over it."""
    is_long = len(values) >= LONG_RUN
    axis.plot(steps, values, color=colour, linewidth=1.0 if is_long else 1.8, alpha=0.3 if is_long else 1.0)
    if len(values) == 1:
        axis.plot(steps, values, "o", color=colour)
    if is_long:
        axis.plot(steps, _running_mean(values), color=colour, linewidth=1.8)
    return is_long


def _label_ends(axis: "Axes", x: float, ends: Sequence[tuple[str, float, str]]) -> None:
    """Write name and value behind the ends of curves, moved apart where they would meet."""
    points = axis.get_window_extent().height * 72 / axis.figure.dpi / max(axis.get_ylim()[1], 1e-9)
    ends = sorted(ends, key=lambda end: end[1])
    places = spread([points * value for _, value, _ in ends], LABEL_GAP)
    for (label, value, colour), place in zip(ends, places, strict=True):
        axis.annotate(
            f"{label}: {value:.1f} %",
            (x, value),
            xytext=(6, place - points * value),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
            annotation_clip=False,
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Return ascending places moved as little as possible (in squares) so that neighbours are `gap` apart at least."""
    # Without the gaps it is a regression to ascending values: what would descend shares its mean.
    blocks: list[list[float]] = []
    for index, place in enumerate(places):
        blocks.append([place - gap * index])
        while len(blocks) > 1 and sum(blocks[-2]) / len(blocks[-2]) > sum(blocks[-1]) / len(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    moved = [sum(block) / len(block) for block in blocks for _ in block]
    return [place + gap * index for index, place in enumerate(moved)]


def _figure(rows: int, columns: int, width: float, height: float) -> tuple["Figure", list["Axes"]]:
    # A figure of its own, not pyplot's: no display is asked for and no global state is left behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.07)
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=9)
    return figure, axes


def _name(axis: "Axes", title: str, x: str, y: str) -> None:
    axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    axis.set_xlabel(x)
    axis.set_ylabel(y)


def _colours(labels: Sequence[str]) -> dict[str, str]:
    """Return a colour for every label; the palette begins anew where it ends."""
    if len(labels) == 1:
        return {labels[0]: ONLY_COLOUR}
    return {label: COLOURS[index % len(COLOURS)] for index, label in enumerate(labels)}


def _legend(figure: "Figure", colours: dict[str, str]) -> None:
    _styles(figure, {}, colours)


def _styles(figure: "Figure", styles: dict[str, Any], colours: dict[str, str] | None = None) -> None:
    """Write above the panels what colours and kinds of lines stand for."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, linewidth=3, label=label) for label, colour in (colours or {}).items()]
    handles += [Line2D([], [], color="#404040", linestyle=style, label=label) for label, style in styles.items()]
    # Characters that a line has room for, each entry's line and margin counted as eight.
    room, longest = 12 * figure.get_figwidth(), max(len(handle.get_label()) for handle in handles) + 8
    is_one_line = sum(len(handle.get_label()) + 8 for handle in handles) <= room
    columns = len(handles) if is_one_line else max(1, int(room / longest))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=9)


def _save(figure: "Figure", path: Path) -> None:
    # No date or version inside, so that the same run gives the same file.
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})


def _percents(shares: Sequence[float]) -> list[float]:
    return [100 * share for share in shares]


def _series(log_history: Sequence[dict[str, Any]], key: str, factor: float) -> tuple[list[float], list[float]]:
    """Return the steps and values of a key, what is not finite left out."""
    points = [
        (entry["step"], factor * entry[key])
        for entry in log_history
        if "step" in entry and isinstance(entry.get(key), int | float) and math.isfinite(entry[key])
    ]
    return [step for step, _ in points], [value for _, value in points]


def _running_mean(values: Sequence[float]) -> list[float]:
    """Return the mean over a window of a tenth of the values around each; shorter at the ends, never shifted."""
    half = max(1, len(values) // 20)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
