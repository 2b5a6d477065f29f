"""
Score the episodes of given completions with a model, without training it.

The model reads every completion once. Of each episode only J and its gradient on the low-rank proxy, R numbers, are
kept; the Fisher matrix and the penalties come from all of them together.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, one_line
from ..files import write_whole
from ..models import load_model, resolve_model
from .options import add_trainer_options, count


if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


# Options with the trainer's names, defaults and help texts.
TRAINER_OPTIONS = (
    "answer_probe",
    "answer_probe_end",
    "answer_likelihood",
    "episode_format",
    "max_episodes",
    "proxy_rank_ratio",
    "fisher_damping",
    "process_reward_coef",
    "compression_coef",
)
DTYPES = ("float32", "bfloat16", "float16")
MAX_LINES_NAMED = 20


@dataclass
class Row:
    """One completion to score: where it stands in the file, what the file says, and its token ids."""

    line: int
    data: dict[str, Any]
    prompt_ids: list[int] = field(default_factory=list)
    completion_ids: list[int] = field(default_factory=list)
    answer_ids: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    text: str = ""


class BadRow(ValueError):
    """A row that cannot be scored, and why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Score the episodes of given completions, without training.\n\n"
        "Each line of the input is a JSON object with `prompt` (a string or chat messages), `completion` (a string)\n"
        "or `completion_ids` (token ids, which count if both are there), and `answer` (the gold answer, a string).\n"
        "The output has the same rows in the same order, with `correctness_before`, `episodes`, `outcome` and\n"
        "`reward` added."
    )
    parser.epilog = (
        "Of each episode, the answer span being the last,\n"
        "  correctness  J, the model's probability of the gold answer behind the probe\n"
        "  gain         increase of J over the episode, 0 for the answer span\n"
        "  information  q = g^T (F + damping * mean(diag F) * I)^-1 g, with the gradient g on the low-rank proxy of\n"
        "               the last layer's MLP, and F the mean of g g^T over all episodes of the file\n"
        "  penalty      q^2 over the mean of the file's completions' sums of q^2\n"
        "  reward       gain - compression_coef * penalty\n"
        "A completion's reward is outcome + process_reward_coef * the sum of its episodes' rewards."
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="model folder (adapters too), Hub id, tiny or smollm2"
    )
    parser.add_argument("--data", required=True, metavar="FILE", help="JSON lines to score")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON lines to write")
    parser.add_argument("--html", metavar="FILE", help="also write a page that shows the episodes coloured by reward")
    add_trainer_options(parser, TRAINER_OPTIONS)
    parser.add_argument(
        "--on_bad_row",
        choices=("stop", "drop"),
        default="stop",
        help="what a row that cannot be scored does (default: stop)",
    )
    parser.add_argument(
        "--batch_size", type=count, default=8, metavar="NUMBER", help="completions scored together (default: 8)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="type the model is loaded in (default: float32)"
    )


def main(args: argparse.Namespace) -> int:
    """
    Run the command.

    Raises:
        UserError: if an input, the model or an output cannot be used.
    """
    # What takes no model is checked before one is loaded, the quick before the slow.
    _check_outputs(args)
    rows, problems = read_rows(args.data)
    if args.on_bad_row == "stop":
        _stop_at(args.data, problems)
    model_path = find_model(args.model)
    tokenizer, vocabulary_size = load_tokenizer(model_path)
    rows, unusable = encode_rows(rows, tokenizer, vocabulary_size, args)
    if args.on_bad_row == "stop":
        _stop_at(args.data, unusable)
    problems = sorted(problems + unusable)
    if not rows:
        reason = (
            f"no row can be used: {_named(problems)}; the first: {problems[0][1]}" if problems else "there are no rows"
        )
        raise UserError(f"--data {args.data}: {reason}.")
    if problems:
        print(f"l2t score: dropped {_named(problems)} of {args.data}; the first: {problems[0][1]}.", file=sys.stderr)
    model = load_model(model_path, args.dtype)
    _warn_of_length(rows, model.config.get_text_config(decoder=True))
    results = score_rows(model, tokenizer, rows, args)
    lines = "".join(json.dumps(result, ensure_ascii=False, allow_nan=False) + "\n" for result in results)
    _write(args.output, lines)
    print(f"{args.output}: {len(results)} completions scored; {_summary(results)}")
    if args.html:
        from ..evaluation.page import render_page

        _write(args.html, render_page(results, f"Episodes of {Path(args.data).name}"))
        print(f"{args.html}: page of the episodes")
    return 0


def _warn_of_length(rows: Sequence[Row], config: "PretrainedConfig") -> None:
    limit = getattr(config, "max_position_embeddings", None)
    too_long = [row.line for row in rows if limit and len(row.prompt_ids) + len(row.completion_ids) > limit]
    if too_long:
        print(
            f"l2t score: {len(too_long)} of {len(rows)} completions end beyond the {limit} positions of the model, that "
            f"of line {too_long[0]} first; what is said of their ends is a guess.",
            file=sys.stderr,
        )


def read_rows(path: str | Path) -> tuple[list[Row], list[tuple[int, str]]]:
    """
    Read the rows of a JSON lines file; blank lines are skipped.

    Returns:
        `tuple[list[Row], list[tuple[int, str]]]`: rows with all fields, and line and complaint of the others.
    """
    rows, problems = [], []
    try:
        # Split at \n alone: other line breaks of Unicode may stand inside a JSON string.
        lines = Path(path).read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data {path}: cannot be read ({one_line(error)}).") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(Row(number, _parse(line)))
        except BadRow as error:
            problems.append((number, str(error)))
    return rows, problems


def encode_rows(
    rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", vocabulary_size: int, args: argparse.Namespace
) -> tuple[list[Row], list[tuple[int, str]]]:
    """Fill in token ids and episodes; return the rows that can be scored, and line and complaint of the others."""
    from ..episodes import segment, token_bytes

    try:
        vocabulary = token_bytes(tokenizer)
    except ValueError as error:
        raise UserError(f"--model {args.model}: {error}") from error
    # Models have rows for ids that the tokenizer does not know; such ids stand for no text.
    vocabulary += [b""] * (vocabulary_size - len(vocabulary))
    usable, problems = [], []
    for row in rows:
        try:
            _encode(row, tokenizer, vocabulary_size, args.answer_probe_end)
        except BadRow as error:
            problems.append((row.line, str(error)))
            continue
        row.spans = segment(row.completion_ids, vocabulary, args.episode_format, args.max_episodes).spans
        usable.append(row)
    return usable, problems


def find_model(name: str) -> str:
    """Return the folder or Hub id that `name` stands for, after the checks that cost little."""
    if Path(name, "adapter_config.json").exists():
        # Adapters alone: the model that they belong to is named inside and looked for when they are loaded.
        return name
    try:
        return resolve_model(name, say=lambda text: print(text, file=sys.stderr))
    except UserError as error:
        raise UserError(f"--model {name}: {str(error).removeprefix(f'model_name_or_path {name}: ')}") from error


def load_tokenizer(path: str) -> tuple["PreTrainedTokenizerBase", int]:
    """Load a model's tokenizer; return it and the number of ids that the model knows."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        adapter = Path(path, "adapter_config.json")
        base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.exists() else path
        size = AutoConfig.from_pretrained(base).get_text_config(decoder=True).vocab_size
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"--model {path}: its configuration or tokenizer cannot be loaded ({one_line(error)})."
        ) from error
    return tokenizer, size


def score_rows(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """
    Score encoded rows.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Model to score with.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        rows (`Sequence[Row]`):
            Rows from [`encode_rows`].
        args (`argparse.Namespace`):
            The options of [`add_arguments`].

    Returns:
        `list[dict[str, Any]]`: what is written, in the order of `rows`.
    """
    from ..rewards import accuracy

    probe_ids = tokenizer(args.answer_probe, add_special_tokens=False)["input_ids"]
    if not probe_ids:
        raise UserError(f"--answer_probe {args.answer_probe!r}: the model's tokenizer makes no token of it.")
    correctness, gradients = _read_model(model, rows, probe_ids, args)
    information, penalties = _penalties(gradients, len(rows), args.fisher_damping)
    texts = [tokenizer.decode(row.completion_ids, skip_special_tokens=True) for row in rows]
    outcomes = accuracy(completions=texts, answer=[row.data["answer"] for row in rows])
    results, position = [], 0
    for row, j, outcome in zip(rows, correctness, outcomes, strict=True):
        episodes = []
        for k, (start, end) in enumerate(row.spans, start=1):
            if start == end:
                continue
            is_answer = k == len(row.spans)
            gain = 0.0 if is_answer else j[k] - j[k - 1]
            penalty = penalties[position]
            episodes.append(
                {
                    "start": start,
                    "end": end,
                    "text": tokenizer.decode(row.completion_ids[start:end]),
                    "correctness": j[-1] if is_answer else j[k],
                    "gain": gain,
                    "information": information[position],
                    "penalty": penalty,
                    "reward": gain - args.compression_coef * penalty,
                    "is_answer": is_answer,
                }
            )
            position += 1
        process_reward = sum(episode["reward"] for episode in episodes)
        results.append(
            row.data
            | {
                "completion": row.text,
                "correctness_before": j[0],
                "episodes": episodes,
                "outcome": None if outcome is None else int(outcome > 0),
                "reward": None if outcome is None else outcome + args.process_reward_coef * process_reward,
            }
        )
    return results


def _read_model(
    model: "PreTrainedModel", rows: Sequence[Row], probe_ids: list[int], args: argparse.Namespace
) -> tuple[list[list[float]], list["torch.Tensor"]]:
    """Return per row J at every cut, and per non-empty span, rows and spans in order, its gradient `(R,)`."""
    import torch
    from tqdm.auto import tqdm

    from ..proxy import proxy_bases, proxy_module_names
    from ..scoring import Scorer

    try:
        bases = proxy_bases(model, proxy_module_names(model), args.proxy_rank_ratio)
        scorer = Scorer(model, bases)
        scorer.check()
    except ValueError as error:
        raise UserError(f"--model {args.model}: {error}") from error
    correctness: list[list[float]] = [[] for _ in rows]
    gradients: list[list[torch.Tensor]] = [[] for _ in rows]
    # Longest first: rows of like length share a batch, and what does not fit in memory fails at once.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].prompt_ids) - len(rows[i].completion_ids))
    with tqdm(total=len(rows), desc="scoring", unit="completion", dynamic_ncols=True) as bar:
        for start in range(0, len(order), args.batch_size):
            batch = order[start : start + args.batch_size]
            scores = scorer.score(
                [rows[i].prompt_ids for i in batch],
                [rows[i].completion_ids for i in batch],
                [rows[i].spans for i in batch],
                probe_ids,
                [rows[i].answer_ids for i in batch],
            )
            values, vectors = scores.correctness(args.answer_likelihood).cpu(), scores.gradients.cpu()
            for i, j, g in zip(batch, values, vectors, strict=True):
                # One cut before the first episode and one behind each: as many as there are spans.
                j = j[: len(rows[i].spans)]
                is_filled = [k for k, (first, last) in enumerate(rows[i].spans) if first < last]
                if not (j.isfinite().all() and g[is_filled].isfinite().all()):
                    raise UserError(
                        f"--data {args.data}, line {rows[i].line}: the model's numbers are not finite; "
                        "try --dtype float32."
                    )
                correctness[i], gradients[i] = j.tolist(), list(g[is_filled])
            bar.update(len(batch))
    return correctness, [g for row in gradients for g in row]


def _penalties(
    gradients: list["torch.Tensor"], num_completions: int, damping: float
) -> tuple[list[float], list[float]]:
    """Return information q and penalty C of every span of the file."""
    import torch

    from ..compression import information

    if not gradients:
        return [], []
    # (N, R), the N non-empty spans of the file
    stacked = torch.stack(gradients).double()
    num_spans, size = stacked.shape
    if num_spans <= size:
        print(
            f"l2t score: warning: the Fisher matrix of {size} proxy coordinates rests on {num_spans} episodes, and "
            "every episode tends to the same penalty; give more rows or a lower --proxy_rank_ratio.",
            file=sys.stderr,
        )
    q = information(stacked, stacked.T @ stacked / num_spans, damping).double()
    mean_square = q.square().sum() / num_completions
    penalty = q.square() / mean_square if mean_square > 0 else torch.zeros_like(q)
    return q.tolist(), penalty.tolist()


def _parse(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not JSON ({one_line(error)})") from error
    if not isinstance(row, dict):
        raise BadRow(f"not a JSON object, got {_brief(row)}")
    for name in ("prompt", "answer"):
        if row.get(name) is None:
            raise BadRow(f"`{name}` is missing")
    if not isinstance(row["answer"], str):
        raise BadRow(f"`answer` must be a string, got {_brief(row['answer'])}")
    if not row["answer"].strip():
        raise BadRow("`answer` is empty")
    _check_prompt(row["prompt"])
    if row.get("completion_ids") is not None:
        ids = row["completion_ids"]
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise BadRow(f"`completion_ids` must be a list of token ids, got {_brief(ids)}")
    elif row.get("completion") is None:
        raise BadRow("`completion` (or `completion_ids`) is missing")
    elif not isinstance(row["completion"], str):
        raise BadRow(f"`completion` must be a string, got {_brief(row['completion'])}")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadRow("holds half of a surrogate pair, which is no character") from error
    return row


def _check_prompt(prompt: Any) -> None:
    if isinstance(prompt, str):
        texts = [prompt]
    elif isinstance(prompt, list):
        for message in prompt:
            if not (
                isinstance(message, dict)
                and isinstance(message.get("role"), str)
                and isinstance(message.get("content"), str)
            ):
                raise BadRow(f"`prompt` must hold messages with `role` and `content`, got {_brief(message)}")
        texts = [message["content"] for message in prompt]
    else:
        raise BadRow(f"`prompt` must be a string or a list of messages, got {_brief(prompt)}")
    if not any(text.strip() for text in texts):
        raise BadRow("`prompt` is empty")


def _encode(row: Row, tokenizer: "PreTrainedTokenizerBase", vocabulary_size: int, probe_end: str) -> None:
    from jinja2 import TemplateError

    prompt, answer = row.data["prompt"], row.data["answer"]
    if isinstance(prompt, str):
        # With the special tokens that the tokenizer adds of itself, as TRL does.
        row.prompt_ids = tokenizer(text=prompt)["input_ids"]
    else:
        try:
            row.prompt_ids = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
        except (ValueError, TemplateError) as error:
            raise BadRow(f"`prompt`: the chat template does not take it ({one_line(error)})") from error
    if not row.prompt_ids:
        raise BadRow("`prompt` has no token")
    if not tokenizer(answer, add_special_tokens=False)["input_ids"]:
        raise BadRow(f"`answer` {answer!r} has no token")
    row.answer_ids = tokenizer(answer + probe_end, add_special_tokens=False)["input_ids"]
    ids = row.data.get("completion_ids")
    if ids is None:
        row.completion_ids = tokenizer(row.data["completion"], add_special_tokens=False)["input_ids"]
        row.text = row.data["completion"]
    else:
        outside = next((token for token in ids if token >= vocabulary_size), None)
        if outside is not None:
            raise BadRow(f"`completion_ids` holds {outside}, the model knows ids below {vocabulary_size}")
        row.completion_ids = ids
        row.text = row.data.get("completion") or tokenizer.decode(ids)


def _stop_at(path: str, problems: list[tuple[int, str]]) -> None:
    if problems:
        more = "" if len(problems) == 1 else f" In all, {_named(problems)} cannot be used."
        line, problem = problems[0]
        raise UserError(f"--data {path}, line {line}: {problem}.{more} Mend the data, or set --on_bad_row drop.")


def _named(problems: list[tuple[int, str]]) -> str:
    lines = ", ".join(str(line) for line, _ in problems[:MAX_LINES_NAMED])
    lines += " and so on" if len(problems) > MAX_LINES_NAMED else ""
    return f"{len(problems)} row (line {lines})" if len(problems) == 1 else f"{len(problems)} rows (lines {lines})"


def _check_outputs(args: argparse.Namespace) -> None:
    """Make sure, before any work, that the outputs can be written."""
    for option, path in (("--output", args.output), ("--html", args.html)):
        if path is None:
            continue
        if os.path.isdir(path):
            raise UserError(f"{option} {path}: is a folder, name a file.")
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=Path(path).parent):
                pass
        except OSError as error:
            raise UserError(f"{option} {path}: cannot be written ({one_line(error)}).") from error


def _write(path: str, text: str) -> None:
    try:
        write_whole(Path(path), text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({one_line(error)}).") from error


def _summary(results: list[dict[str, Any]]) -> str:
    num_episodes = sum(not episode["is_answer"] for row in results for episode in row["episodes"])
    before = sum(row["correctness_before"] for row in results) / len(results)
    after = sum(
        row["episodes"][-1]["correctness"] if row["episodes"] else row["correctness_before"] for row in results
    ) / len(results)
    num_correct = sum(row["outcome"] == 1 for row in results)
    return f"{num_correct} correct, {num_episodes} episodes, mean J {before:.3f} before and {after:.3f} after them"


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
