"""From a known source to its rows: columns named, golds taken out, some rows left out and counted."""

import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from l2t_trl.answers import understood
from l2t_trl.data.code import TASK_COLUMNS, TEST_LIST, TESTS, row_with_tests
from l2t_trl.data.decontamination import Overlap, words_of
from l2t_trl.data.loading import read_rows
from l2t_trl.data.registry import ACCEPTED, SOURCES, Source
from l2t_trl.errors import UserError


# Samples are drawn with this seed, whatever a run's own, so that a name means the same rows for everyone.
SAMPLE_SEED = 0
RAW_ANSWER = "raw_answer"


class Loaded(NamedTuple):
    """
    Attributes:
        rows (`list[dict]`): rows with `id`, `question`, `answer` (`None` where there is none) or `tests` and, where the
            source has them, `accepted_answers`, `tier` and the source's extra columns.
        notes (`list[str]`): what is to be said about them: how many were left out, and why.
    """

    rows: list[dict[str, Any]]
    notes: list[str]


def resolve_split(
    source: Source, split: str, config: str | None = None, keeps_raw_answer: bool = False
) -> Loaded | None:
    """
    Read one split of a known source.

    Args:
        source ([`Source`]):
            Where it lies and what its columns mean.
        split (`str`):
            One of `source.splits`.
        config (`str`, *optional*):
            Other configuration than the source's.
        keeps_raw_answer (`bool`, *optional*, defaults to `False`):
            Whether rows have a column `raw_answer`, such as the whole solution that ends in the gold answer.

    Returns:
        [`Loaded`] or `None` if the source has no such split.

    Raises:
        UserError: if it cannot be read, has no rows, lacks a column, or if two rows have one id.
    """
    if split not in source.splits:
        return None
    hub_split, expected = source.splits[split]
    raw = read_rows(source.hub_id, config or source.config, hub_split, is_lazy=source.sample is not None)
    if raw is None:
        raise UserError(f"{source.name}: {source.hub_id} has no split {hub_split!r}{_read_from()}.")
    if len(raw) == 0:
        raise UserError(f"{source.name}: {source.hub_id} has no rows in its split {hub_split!r}{_read_from()}.")
    _check_columns(source, raw)
    if source.answer is None:
        raw = [row_with_tests(row) for row in raw]
    _check_cells(source, raw)

    notes: list[str] = []
    overlap = benchmark_overlap(notes) if source.is_decontaminated else None
    refused: Counter[str] = Counter()
    if source.sample is None:
        rows = [row for row in _usable(source, raw, range(len(raw)), overlap, refused)]
        num_read = len(raw)
    else:
        rows, num_read = _draw(source, raw, overlap, refused)
    _check_ids(source, rows)
    if not keeps_raw_answer:
        for row in rows:
            row.pop(RAW_ANSWER, None)
    if refused or source.sample is not None:
        reasons = "; ".join(f"{count} {reason}" for reason, count in refused.most_common()) or "none"
        notes.insert(0, f"{len(rows)} of {num_read} rows kept; left out: {reasons}.")
    if len(rows) != expected and config in (None, source.config):
        notes.append(f"{len(rows)} rows, where {expected} were expected.")
    return Loaded(rows, notes)


def _draw(source: Source, raw: Sequence, overlap: Overlap | None, refused: Counter) -> tuple[list[dict], int]:
    """Draw usable rows whose gold answers are understood, until `source.sample` are there; and say how many were read."""
    from tqdm.auto import tqdm

    order = random.Random(SAMPLE_SEED).sample(range(len(raw)), len(raw))
    rows: list[dict[str, Any]] = []
    seen: set[tuple[str, ...]] = set()
    num_read = 0
    with tqdm(total=source.sample, desc=f"Drawing {source.name}", leave=False, delay=2) as bar:
        while len(rows) < source.sample and num_read < len(order):
            chunk = order[num_read : num_read + max(source.sample - len(rows), 16)]
            candidates = list(_usable(source, raw, chunk, overlap, refused, seen))
            verdicts = understood([row["answer"] for row in candidates])
            num_read += len(chunk)
            for row, is_understood in zip(candidates, verdicts, strict=True):
                if not is_understood:
                    refused["with an answer that math-verify does not understand"] += 1
                elif len(rows) < source.sample:
                    rows.append(row)
                    bar.update()
                else:
                    refused["more than needed"] += 1
    return rows, num_read


def _usable(
    source: Source,
    raw: Sequence,
    indices: Iterable[int],
    overlap: Overlap | None,
    refused: Counter,
    seen: set[tuple[str, ...]] | None = None,
) -> Iterable[dict[str, Any]]:
    """Yield the resolved rows of `indices`, and count in `refused` those that are left out."""
    for index in indices:
        row = raw[index]
        reason = source.refuse(row)
        question = row[source.question]
        if reason is None and seen is not None:
            words = tuple(words_of(question))
            reason = "a repetition" if words in seen else None
            seen.add(words)
        if reason is None and overlap is not None:
            benchmark = overlap.find(question)
            reason = benchmark and f"like a question of {benchmark}"
        if reason is not None:
            refused[reason] += 1
        else:
            yield _resolve(source, row, index)


def _resolve(source: Source, row: dict[str, Any], index: int) -> dict[str, Any]:
    resolved = {
        "id": str(row[source.id_column]) if source.id_column in row else str(index),
        "question": row[source.question],
    }
    if source.answer is None:
        resolved[TESTS] = row[TESTS]
    else:
        golds = source.golds(row[source.answer])
        resolved |= {"answer": golds[0] if isinstance(golds, list) else golds, RAW_ANSWER: row[source.answer]}
        if isinstance(golds, list):
            resolved[ACCEPTED] = golds
    if source.tier is not None:
        resolved["tier"] = source.tier(row)
    return resolved | {column: row[column] for column in source.extra if column in row}


def benchmark_overlap(notes: list[str]) -> Overlap:
    """Return the questions of all benchmarks that can be read; what cannot goes into `notes`."""
    questions, unread = {}, []
    for source in SOURCES.values():
        if source.is_benchmark:
            try:
                questions[source.name] = [row["question"] for row in resolve_split(source, "test").rows]
            # Benchmarks are compared with as far as they are at hand.
            except UserError:
                unread.append(source.name)
    notes.append(f"compared with {', '.join(questions) or 'no benchmark'}.")
    if unread:
        notes.append(f"not compared with {', '.join(unread)}, which cannot be read here.")
    return Overlap(questions)


def _read_from() -> str:
    """Return where rows are read from, if it is not the Hub: the usual place of a mistake."""
    root = os.environ.get("L2T_DATA_ROOT")
    return f" under {root}; mend the file, or set L2T_DATA_ROOT to another folder" if root else ""


def _check_columns(source: Source, raw: Sequence):
    names = getattr(raw, "column_names", None) or list(dict.fromkeys(key for row in raw for key in row))
    needed = [(source.question,), (source.answer,)] if source.answer is not None else [TASK_COLUMNS, (TEST_LIST,)]
    for columns in needed:
        if not any(column in names for column in columns):
            wanted = " or ".join(map(repr, columns))
            raise UserError(f"{source.name}: {source.hub_id} has no column {wanted}; it has {', '.join(names)}.")


def _check_cells(source: Source, raw: Sequence):
    for index, row in enumerate(raw if isinstance(raw, list) else ()):
        has_target = row.get(TESTS) if source.answer is None else source.answer in row
        if not isinstance(row.get(source.question), str) or not has_target:
            raise UserError(
                f"{source.name}: row {index} (counted from 0) of {source.hub_id} has no text in {source.question!r} "
                f"or no {source.answer or TESTS!r}."
            )


def _check_ids(source: Source, rows: list[dict[str, Any]]):
    first: dict[str, int] = {}
    for number, row in enumerate(rows):
        if row["id"] in first:
            raise UserError(
                f"{source.name}: id {row['id']!r} is that of two rows of {source.hub_id}, {first[row['id']]} and "
                f"{number} (counted from 0, rows left out not counted)."
            )
        first[row["id"]] = number
