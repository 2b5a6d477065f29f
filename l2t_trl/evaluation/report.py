"""What training changed: a table for the terminal, `metrics.json`, plots, and sections for the model card."""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_whole
from .evaluate import Evaluation
from .figures import BudgetCurve, budgets_up_to, plot_budgets, plot_training


if TYPE_CHECKING:
    from trl import GRPOConfig


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
    budgets = budgets_up_to(max(one.tokens for one in [*before.completions, *after.completions]))
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
    write_whole(paths[0], json.dumps(_strict(metrics), indent=1, allow_nan=False) + "\n")
    curves = output_dir / "plots" / "training.png"
    if plot_training(curves, {"": log_history}):
        paths.append(curves)
    paths.append(output_dir / "plots" / "accuracy_at_budget.png")
    drawn = [
        BudgetCurve(name, budgets, one.accuracy_at_budget(budgets), one.mean_tokens)
        for name, one in (("before", before), ("after", after))
        if one.accuracy is not None
    ]
    plot_budgets(paths[-1], drawn)
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
