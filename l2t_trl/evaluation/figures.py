"""Drawings of trainings and evaluations, of one or of several side by side. matplotlib waits for a call."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_whole


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
# Okabe and Ito's, told apart by colour-blind readers as well; the pale yellow is left out. Behind them four dark ones
# of Tol's, for more runs than those are.
COLOURS = (
    *("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000"),
    *("#332288", "#999933", "#882255", "#661100"),
)
ONLY_COLOUR = COLOURS[1]
# Inches of a panel of the training curves, as many as stand side by side on a page at their own size.
PANEL_WIDTH, PANEL_HEIGHT = 3.3, 2.6
MAX_WIDTH = 10.0  # inches
DOTS_PER_INCH = 150
# Narrower bars have their numbers upright.
NARROW_BAR = 0.36  # inches
MAJORITY_STYLE = {
    "linewidth": 1.2,
    "linestyle": (0, (4, 2)),
    "marker": "D",
    "markersize": 6.5,
    "markerfacecolor": "none",
    "markeredgewidth": 0.9,
}
GREY = "#8a8a8a"
LABEL_GAP = 13.0  # points between the labels of two curves
MAX_NAME_BESIDE = 28  # characters of a name beside its curve


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


def colours_of(labels: Sequence[str]) -> dict[str, str]:
    """Return a colour for every label; the palette begins anew where it ends."""
    labels = list(dict.fromkeys(labels))
    if len(labels) == 1:
        return {labels[0]: ONLY_COLOUR}
    return {label: COLOURS[index % len(COLOURS)] for index, label in enumerate(labels)}


def plot_training(
    path: Path, logs: dict[str, Sequence[dict[str, Any]]], colours: dict[str, str] | None = None
) -> bool:
    """Plot the training curves that the runs' logs hold, by label (`""` for none); return whether they held any."""
    panels = [
        (title, unit, {label: _series(log, key, factor) for label, log in logs.items()})
        for key, title, unit, factor in CURVES
    ]
    panels = [(title, unit, runs) for title, unit, runs in panels if any(steps for steps, _ in runs.values())]
    if not panels:
        return False
    colours = colours or colours_of(list(logs))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    height = PANEL_HEIGHT * rows + (0.35 if any(logs) else 0)
    figure, axes = _figure(rows, columns, PANEL_WIDTH * columns, height)
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
    if any(logs):
        _styles(figure, {}, {label: colours[label] for label in logs})
    if has_means:
        figure.supxlabel("pale: each step; dark: running mean", x=0.995, ha="right", fontsize=8.5, color="#606060")
    _save(figure, path)
    return True


def plot_budgets(
    path: Path,
    curves: Sequence[BudgetCurve],
    title: str = "Accuracy against token budget",
    colours: dict[str, str] | None = None,
) -> None:
    """Plot the share of completions that are correct within a token budget (paper Fig. 3)."""
    colours = colours or colours_of([curve.label for curve in curves])
    # The names stand to the right of the curves, long ones above them.
    longest_name = max((len(curve.label) for curve in curves), default=0)
    is_beside = longest_name <= MAX_NAME_BESIDE
    figure, (axis,) = _figure(1, 1, 6.4 + (0.09 * max(0, longest_name - 8) if is_beside else 0), 4.2)
    longest = max((curve.budgets[-1] for curve in curves), default=1)
    for curve in curves:
        colour = colours[curve.label]
        # A curve that ends early has said all: the longest of its completions fits.
        budgets, shares = [*curve.budgets, longest], [*curve.shares, curve.shares[-1]]
        axis.step(budgets, _percents(shares), where="post", color=colour, linewidth=2)
        if curve.asked is not None:
            asked = [*curve.asked, curve.asked[-1]]
            axis.step(budgets, _percents(asked), where="post", color=colour, linewidth=1.4, linestyle=(0, (4, 2)))
        # On the curve, so that it is seen whose it is.
        at_mean = [share for budget, share in zip(budgets, shares, strict=True) if budget <= curve.mean_tokens][-1]
        dot = {"markersize": 7, "markeredgecolor": "white", "zorder": 3, "clip_on": False}
        axis.plot(curve.mean_tokens, 100 * at_mean, "o", color=colour, **dot)
    axis.set_xlim(0, longest)
    # Without a correct answer the scale would be of rounding errors.
    axis.set_ylim(0, max(1.0, axis.get_ylim()[1]))
    ends = [(100 * curve.shares[-1], colours[curve.label], curve.label) for curve in curves]
    _label_ends(
        axis, longest, [(f"{name}: {end:.1f} %" if is_beside else f"{end:.1f} %", end, ink) for end, ink, name in ends]
    )
    axis.xaxis.set_major_formatter("{x:,.0f}")
    _name(
        axis,
        title,
        "token budget (tokens per completion; dots: mean length)",
        "correct within the budget (%)",
    )
    styles = {"ended within the budget": {}, "asked for the answer where the budget ends": {"linestyle": (0, (4, 2))}}
    has_asked = any(curve.asked is not None for curve in curves)
    names = {} if is_beside else {curve.label: colours[curve.label] for curve in curves}
    if has_asked or names:
        _styles(figure, styles if has_asked else {}, names)
    _save(figure, path)


def plot_depths(
    path: Path, curves: Sequence[DepthCurve], title: str = "", colours: dict[str, str] | None = None
) -> None:
    """Plot accuracy, maj@4 and tokens against the number of episodes that are read (paper Fig. 1, 6)."""
    colours = colours or colours_of([curve.label for curve in curves])
    figure, (accuracy, tokens) = _figure(1, 2, MAX_WIDTH, 4.2)
    for curve in curves:
        colour, is_point = colours[curve.label], len(curve.episodes) == 1
        style = {"color": colour, "marker": "o", "markersize": 3.5 if not is_point else 6}
        accuracy.plot(curve.episodes, _percents(curve.accuracy), linewidth=2, **style)
        # Around the dots, so that it is seen where both are the same.
        accuracy.plot(curve.episodes, _percents(curve.majority), **MAJORITY_STYLE, color=colour)
        accuracy.axhline(100 * curve.whole, color=colour, linewidth=1.0, linestyle=(0, (1, 2)))
        tokens.plot(curve.episodes, curve.tokens, linewidth=2, **style)
    for axis in (accuracy, tokens):
        axis.set_ylim(0, max(1.0, axis.get_ylim()[1]))
        axis.xaxis.get_major_locator().set_params(integer=True)
    tokens.yaxis.set_major_formatter("{x:,.0f}")
    where = f": {title}" if title else ""
    _name(accuracy, f"Accuracy by depth{where}", "episodes read, k", "correct answers (%)")
    _name(tokens, f"Tokens by depth{where}", "episodes read, k", "tokens read, T(k), mean")
    styles = {"Acc(k)": {"marker": "o", "markersize": 3.5}, "maj@4(k)": MAJORITY_STYLE}
    styles |= {"whole completions": {"linestyle": (0, (1, 2))}}
    _styles(figure, styles, {curve.label: colours[curve.label] for curve in curves})
    _save(figure, path)


def plot_bars(path: Path, bars: Sequence[Bar], colours: dict[str, str] | None = None) -> None:
    """Plot accuracy and tokens by benchmark and model (paper Fig. 2)."""
    labels, groups = (list(dict.fromkeys(getattr(bar, name) for bar in bars)) for name in ("label", "group"))
    colours = colours or colours_of(labels)
    width = 0.8 / len(labels)
    size = min(MAX_WIDTH, max(4.4, 0.8 + len(groups) * (0.4 + 0.5 * len(labels))))
    # Side by side as long as that is still readable, else one above the other.
    rows, columns = (1, 2) if 2 * size <= MAX_WIDTH else (2, 1)
    figure, axes = _figure(rows, columns, columns * size, 3.6 * rows)
    is_narrow = (size - 0.8) / (len(groups) + 0.2) * width < NARROW_BAR
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
                xytext=(0, 5 if is_narrow else 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                rotation=90 if is_narrow else 0,
            )
    # Names that would run into each other are written aslant.
    slant = {"rotation": 20, "ha": "right"} if 0.09 * sum(len(group) + 2 for group in groups) > size - 0.8 else {}
    for axis in axes:
        axis.set_xticks(range(len(groups)), groups, **slant)
        axis.set_xlim(-0.6, len(groups) - 0.4)
        axis.margins(y=0.2 if is_narrow else 0.12)
        axis.set_ylim(0, max(1.0, axis.get_ylim()[1]))
    # Room above for the numbers, but no shares above all.
    axes[0].set_yticks([tick for tick in axes[0].get_yticks() if tick <= 100])
    axes[1].yaxis.set_major_formatter("{x:,.0f}")
    _name(axes[0], "Accuracy", "", "pass@1 (%), 95 % interval")
    _name(axes[1], "Length", "", "mean tokens per completion")
    if any(labels):
        _styles(figure, {}, {label: colours[label] for label in labels})
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
    """Write a text behind the end of each curve, in its colour, moved apart where they would meet."""
    points = axis.get_window_extent().height * 72 / axis.figure.dpi / max(axis.get_ylim()[1], 1e-9)
    ends = sorted(ends, key=lambda end: end[1])
    places = spread([points * value for _, value, _ in ends], LABEL_GAP)
    for (label, value, colour), place in zip(ends, places, strict=True):
        axis.annotate(
            label,
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


def _styles(figure: "Figure", styles: dict[str, dict[str, Any]], colours: dict[str, str] | None = None) -> None:
    """Write above the panels what colours and kinds of lines stand for."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, linewidth=3, label=label) for label, colour in (colours or {}).items()]
    handles += [Line2D([], [], color="#404040", label=label, **style) for label, style in styles.items()]
    # Characters that a line has room for, each entry's line and margin counted as eight.
    room, longest = 12 * figure.get_figwidth(), max(len(handle.get_label()) for handle in handles) + 8
    is_one_line = sum(len(handle.get_label()) + 8 for handle in handles) <= room
    columns = len(handles) if is_one_line else max(1, int(room / longest))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=9)


def _save(figure: "Figure", path: Path) -> None:
    # No date or version inside, so that the same run gives the same file.
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DOTS_PER_INCH, facecolor="white", metadata={"Software": None})
    write_whole(path, content.getvalue())


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
