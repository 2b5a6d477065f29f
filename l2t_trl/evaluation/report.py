"""What training changed: a table for the terminal, `metrics.json`, plots, and sections for the model card."""

import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .evaluate import Evaluation


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from trl import GRPOConfig


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
# Settings told in the model card, where the configuration has them: L2T's own, and those of any run.
L2T_RECIPE = (
    "process_reward_coef",
    "compression_coef",
    "advantage_form",
    "token_credit",
    "episode_format",
    "max_episodes",
    "answer_likelihood",
    "proxy_modules",
    "proxy_rank_ratio",
    "fisher_damping",
    "fisher_ema",
    "parameter_update",
    "penalty_unit",
)
RECIPE = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_generations",
    "num_iterations",
    "max_completion_length",
    "temperature",
    "beta",
    "loss_type",
    "scale_rewards",
    "seed",
)
# Points of the accuracy against the budget.
NUM_BUDGETS = 200

BEFORE_COLOUR, AFTER_COLOUR = "#d55e00", "#0072b2"  # told apart by colour-blind readers as well
GREY = "#8a8a8a"


def write_report(
    output_dir: str | Path,
    before: Evaluation,
    after: Evaluation,
    log_history: Sequence[dict[str, Any]],
    config: "GRPOConfig | dict[str, Any]",
) -> list[Path]:
    """
    Print the table of before and after, and write `metrics.json` and the plots.

    Args:
        output_dir (`str` or `Path`):
            Folder that gets `metrics.json` and `plots/`; made if missing.
        before ([`Evaluation`]), after ([`Evaluation`]):
            The same questions before and after training.
        log_history (`Sequence[dict[str, Any]]`):
            The trainer's log (`trainer.state.log_history`). Curves whose keys it lacks are left out.
        config ([`L2TConfig`], [`~trl.GRPOConfig`] or `dict`):
            Settings of the run; a dictionary may hold them in sections.

    Returns:
        `list[Path]`: the files written.
    """
    output_dir = Path(output_dir)
    (output_dir / "plots").mkdir(parents=True, exist_ok=True)
    sys.stdout.write(f"\n{results_table(before, after)}\n")
    sys.stdout.flush()
    budgets = _budgets(before, after)
    metrics = {
        "before": before.to_dict(),
        "after": after.to_dict(),
        "relative_tokens": _ratio(after.mean_tokens, before.mean_tokens),
        "accuracy_at_budget": {
            "budgets": budgets,
            "before": before.accuracy_at_budget(budgets),
            "after": after.accuracy_at_budget(budgets),
        },
        "config": _settings(config),
        "log": list(log_history),
    }
    paths = [output_dir / "metrics.json"]
    write_atomically(paths[0], json.dumps(_strict(metrics), indent=1, allow_nan=False) + "\n")
    curves = output_dir / "plots" / "training.png"
    if plot_training(curves, log_history):
        paths.append(curves)
    paths.append(output_dir / "plots" / "accuracy_at_budget.png")
    plot_accuracy_at_budget(paths[-1], before, after)
    return paths


def results_table(before: Evaluation, after: Evaluation) -> str:
    """Return the table of before and after as plain text, one line per tier and one for all."""
    rows = [("", "before", "after", "change", "before", "after", "relative", "before", "after", "relative")]
    for name, old, new in _pairs(before, after):
        rows.append(
            (
                name,
                _percent(old.accuracy),
                _percent(new.accuracy),
                _change(new.accuracy, old.accuracy),
                _number(old.mean_tokens),
                _number(new.mean_tokens),
                _relative(new.mean_tokens, old.mean_tokens),
                _number(old.tokens_per_correct),
                _number(new.tokens_per_correct),
                _relative(new.tokens_per_correct, old.tokens_per_correct),
            )
        )
    first = max(len(row[0]) for row in rows)
    # Three columns of numbers under each heading.
    width = 9
    headings = ("accuracy, % correct", "tokens per completion", "tokens per correct answer")
    lines = [" " * first + "".join(f"  {heading:>{3 * width}}" for heading in headings)]
    for row in rows:
        cells = [f"{cell:>{width}}" for cell in row[1:]]
        lines.append(f"{row[0]:<{first}}" + "".join("  " + "".join(cells[i : i + 3]) for i in (0, 3, 6)))
    rule = "-" * max(len(line.rstrip()) for line in lines)
    lines.insert(2, rule)
    if len(lines) > 4:
        lines.insert(-1, rule)
    notes = [
        f"95 % intervals of the accuracy: {_interval(before)} before, {_interval(after)} after "
        f"({len({one.question for one in after.completions})} questions, {len(after.completions)} completions)."
    ]
    if before.truncated_share or after.truncated_share:
        notes.append(
            f"Cut off at {after.max_new_tokens} tokens: {_percent(before.truncated_share)} % before, "
            f"{_percent(after.truncated_share)} % after."
        )
    return "\n".join(line.rstrip() for line in [*lines, "", *notes]) + "\n"


def model_card_sections(before: Evaluation, after: Evaluation, config: "GRPOConfig | dict[str, Any]") -> str:
    """Return sections for a model card in Markdown: results, recipe, seeds, known limits."""
    recipe = _recipe(config)
    lines = [
        "## Results",
        "",
        f"{len({one.question for one in after.completions})} held-out questions, {after.num_samples} "
        f"completion{'s' if after.num_samples > 1 else ''} each, temperature {after.temperature:g}, "
        f"top-p {after.top_p:g}, at most {after.max_new_tokens} tokens. In brackets: 95 % confidence intervals.",
        "",
        "| | accuracy before | accuracy after | tokens before | tokens after | relative "
        "| tokens per correct answer before | after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, old, new in _pairs(before, after):
        cells = (
            f"{_percent(old.accuracy)} % [{_interval(old)}]",
            f"{_percent(new.accuracy)} % [{_interval(new)}]",
            _number(old.mean_tokens),
            _number(new.mean_tokens),
            _relative(new.mean_tokens, old.mean_tokens),
            _number(old.tokens_per_correct),
            _number(new.tokens_per_correct),
        )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "## Recipe", "", "| setting | value |", "|---|---|"]
    lines += [f"| `{name}` | {_markdown(value)} |" for name, value in recipe.items()]
    lines += [
        "",
        "## Seeds",
        "",
        f"Training: {recipe.get('seed', 'unknown')}. Evaluation: {before.seed} before, {after.seed} after.",
        "",
        "## Known limits",
        "",
        "- One training run with one seed: the intervals cover the choice of questions and completions, not of runs.",
        "- Measured on the questions above only; other kinds of questions, and other languages, were not tried.",
        "- Shorter reasoning was learned at this token limit and temperature; at others the gain may differ.",
    ]
    if before.truncated_share or after.truncated_share:
        lines.append(
            f"- {_percent(before.truncated_share)} % of the completions before training and "
            f"{_percent(after.truncated_share)} % after reached the token limit; their full length is unknown."
        )
    num_unjudged = sum(one.is_correct is None for one in after.completions)
    if num_unjudged:
        lines.append(
            f"- {num_unjudged} completions had a gold answer that could not be judged; accuracies leave them out."
        )
    return "\n".join(lines) + "\n"


def plot_training(path: Path, log_history: Sequence[dict[str, Any]]) -> bool:
    """Plot the training curves that the log holds; return whether it held any."""
    curves = [(title, unit, _series(log_history, key, factor)) for key, title, unit, factor in CURVES]
    curves = [(title, unit, series) for title, unit, series in curves if series[0]]
    if not curves:
        return False
    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure, axes = _figure(rows, columns, 4.0 * columns, 2.9 * rows)
    for axis, (title, unit, (steps, values)) in zip(axes, curves, strict=False):
        is_long = len(values) >= LONG_RUN
        axis.plot(steps, values, color=AFTER_COLOUR, linewidth=1.0 if is_long else 1.8, alpha=0.3 if is_long else 1.0)
        if len(values) == 1:
            axis.plot(steps, values, "o", color=AFTER_COLOUR)
        if is_long:
            axis.plot(steps, _running_mean(values), color=AFTER_COLOUR, linewidth=1.8)
        if min(values) < 0 < max(values):
            axis.axhline(0, color=GREY, linewidth=0.8)
        axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
        axis.set_ylabel(unit)
        axis.set_xlabel("optimiser step")
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[len(curves) :]:
        axis.set_visible(False)
    if any(len(series[0]) >= LONG_RUN for _, _, series in curves):
        figure.supxlabel("pale: each step; dark: running mean", x=0.995, ha="right", fontsize=8.5, color="#606060")
    _save(figure, path)
    return True


def plot_accuracy_at_budget(path: Path, before: Evaluation, after: Evaluation) -> None:
    """Plot the share of completions that are correct within a token budget, before and after training."""
    budgets = _budgets(before, after)
    figure, (axis,) = _figure(1, 1, 6.4, 4.2)
    drawn = [("before", before, BEFORE_COLOUR), ("after", after, AFTER_COLOUR)]
    drawn = [(*one, one[1].accuracy_at_budget(budgets)) for one in drawn if one[1].accuracy is not None]
    # Labels of curves that end close together are moved apart.
    ends = [shares[-1] for *_, shares in drawn]
    is_close = len(ends) == 2 and abs(ends[1] - ends[0]) < 0.06 * max(max(ends), 0.01)
    for label, evaluation, colour, shares in drawn:
        is_upper = shares[-1] == max(ends) and (label == "after" or ends[0] != ends[-1])
        shift = (7 if is_upper else -7) if is_close else 0
        axis.step(budgets, [100 * share for share in shares], where="post", color=colour, linewidth=2)
        axis.annotate(
            f"{label}: {100 * shares[-1]:.1f} %",
            (budgets[-1], 100 * shares[-1]),
            xytext=(6, shift),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
            annotation_clip=False,
        )
        axis.plot(
            [evaluation.mean_tokens] * 2, [0, 0.04], color=colour, linewidth=3, transform=axis.get_xaxis_transform()
        )
    axis.set_xlim(0, budgets[-1])
    axis.set_ylim(0, None)
    axis.set_xlabel("token budget (tokens per completion; marks on the axis: mean length)")
    axis.set_ylabel("correct within the budget (%)")
    axis.set_title("Accuracy against token budget", loc="left", fontsize=10.5, fontweight="bold")
    _save(figure, path)


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, list["Axes"]]:
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


def _save(figure: Any, path: Path) -> None:
    # No date or version inside, so that the same run gives the same file.
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})


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


def _budgets(before: Evaluation, after: Evaluation) -> list[int]:
    longest = max(one.tokens for one in [*before.completions, *after.completions])
    step = max(1, math.ceil(longest / NUM_BUDGETS))
    return list(range(0, longest + step, step))


def _pairs(before: Evaluation, after: Evaluation) -> Iterable[tuple[str, Evaluation, Evaluation]]:
    old, new = before.tiers(), after.tiers()
    for tier in new:
        if tier in old:
            yield f"tier {tier}", old[tier], new[tier]
    yield "all", before, after


def _settings(config: "GRPOConfig | dict[str, Any]") -> dict[str, Any]:
    # `to_dict` hides access tokens.
    return config if isinstance(config, dict) else config.to_dict()


def _recipe(config: "GRPOConfig | dict[str, Any]") -> dict[str, Any]:
    flat = _settings(config)
    if all(isinstance(section, dict) for section in flat.values()):
        flat = {name: value for section in flat.values() for name, value in section.items()}
    names = ("method", "dataset_name", *(() if flat.get("method") == "grpo" else L2T_RECIPE), *RECIPE)
    return {name: flat[name] for name in names if flat.get(name) is not None}


def _strict(value: Any) -> Any:
    """Return `value` in strict JSON: `None` for numbers that are not finite, text for what has no JSON form."""
    if isinstance(value, dict):
        return {str(key): _strict(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def write_atomically(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base


def _relative(value: float | None, base: float | None) -> str:
    ratio = _ratio(value, base)
    return "-" if ratio is None else f"{ratio:.2f}x"


def _change(value: float | None, base: float | None) -> str:
    return "-" if value is None or base is None else f"{100 * (value - base):+.1f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _interval(evaluation: Evaluation) -> str:
    interval = evaluation.accuracy_interval
    return "-" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def _markdown(value: Any) -> str:
    return "`" + str(value).replace("|", "\\|").replace("\n", " ") + "`"
