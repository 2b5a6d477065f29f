"""Data sets as files: every split resolved to plain rows, looked through, and written whole or not at all."""

import io
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from l2t_trl.answers import understood
from l2t_trl.data.code import TESTS, has_tests, is_python, with_tests
from l2t_trl.data.generated import find_generated, generate_rows
from l2t_trl.data.loading import find_columns, no_column, no_split, read_rows
from l2t_trl.data.registry import ACCEPTED, BY_HUB_ID, SOURCES, plain_gold
from l2t_trl.data.resolving import RAW_ANSWER, benchmark_overlap, resolve_split
from l2t_trl.data.verl import KEPT, from_verl, is_verl, to_verl
from l2t_trl.errors import UserError
from l2t_trl.files import write_whole


SPLITS = ("train", "test")
UNDERSTOOD_CHUNK = 500
PROGRESS_FROM = 2000
NOT_UNDERSTOOD = "answer that only the same text can meet"


class Request(NamedTuple):
    """
    Which rows of which data set are wanted.

    Attributes:
        name (`str`): known name, path or Hub id.
        config (`str`, *optional*): configuration of a Hub data set.
        splits (`tuple[str, ...]`, *optional*): splits; by default all of `train` and `test` that there are.
        question_column, answer_column (`str`, *optional*): columns of a data set that is not known.
        size (`int`, *optional*): most rows of a split.
        seed (`int`): for generated rows.
        tiers (`tuple[int, ...]`, *optional*): difficulty tiers.
    """

    name: str
    config: str | None = None
    splits: tuple[str, ...] | None = None
    question_column: str | None = None
    answer_column: str | None = None
    size: int | None = None
    seed: int = 0
    tiers: tuple[int, ...] | None = None


def read_splits(request: Request, say: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
    """
    Return the rows of each split, with `id`, `question` (or `prompt`, a chat), `answer`, `raw_answer` and the rest.

    Args:
        request ([`Request`]): which rows.
        say (`Callable[[str], None]`): told what was left out.

    Raises:
        UserError: if the data set is not known, cannot be read, has no rows, or lacks a split or a column.
    """
    if request.name in SOURCES and (request.question_column or request.answer_column):
        raise UserError(
            f"{request.name}: its columns are known, got question_column {request.question_column!r} and answer_column "
            f"{request.answer_column!r}. Leave both out, or name a file."
        )
    wanted = request.splits or (tuple(SOURCES[request.name].splits) if request.name in SOURCES else SPLITS)
    splits = {}
    for split in wanted:
        rows = _read(request, split, say)
        if rows is None and request.splits:
            raise UserError(no_split(request.name, split))
        if rows is None:
            continue
        if request.tiers:
            rows = [row for row in rows if row.get("tier") in request.tiers]
        if not rows:
            tiers = f" of the tiers {list(request.tiers)}" if request.tiers else ""
            raise UserError(f"{request.name}: the split {split!r} has no rows{tiers}.")
        splits[split] = rows[: request.size]
    if not splits:
        raise UserError(f"{request.name} has none of the splits {', '.join(SPLITS)}; name one with --split.")
    return splits


def _read(request: Request, split: str, say: Callable[[str], None]) -> list[dict[str, Any]] | None:
    if request.name in SOURCES:
        loaded = resolve_split(SOURCES[request.name], split, request.config, keeps_raw_answer=True)
        for note in loaded.notes if loaded else ():
            say(f"{request.name}, {split}: {note}")
        return None if loaded is None else loaded.rows
    if find_generated(request.name):
        rows = generate_rows(request.name, split, request.size, request.seed, request.tiers)
    else:
        rows = read_rows(request.name, request.config, split)
    return None if rows is None else _plain_rows(request, rows)


def _plain_rows(request: Request, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Name the columns of rows that no registry knows."""
    if rows and is_verl(rows) and request.question_column is None and request.answer_column is None:
        rows = [from_verl(row) for row in rows]
    if has_tests(rows):
        rows = with_tests(rows, request.name, on_bad_row="stop")
    names = list(dict.fromkeys(key for row in rows for key in row))
    question_column, answer_column, golds = find_columns(
        request.name, names, request.question_column, request.answer_column or "answer"
    )
    has_golds = not has_tests(rows) or answer_column in names
    for setting, column in (("question_column", question_column), ("answer_column", answer_column)):
        if rows and column not in names and (has_golds or setting == "question_column"):
            raise UserError(no_column(request.name, column, setting, names, rows))
    plain = []
    for index, row in enumerate(rows):
        question, gold = row.get(question_column), golds(row.get(answer_column))
        if isinstance(question, list) and len(question) == 1 and question[0].get("role") == "user":
            question = question[0].get("content")
        head = {
            "id": str(row["id"]) if row.get("id") is not None else str(index),
            "prompt" if isinstance(question, list) else "question": question,
        }
        if has_golds:
            head |= {"answer": gold[0] if isinstance(gold, list) else gold, RAW_ANSWER: row.get(answer_column)}
        if isinstance(gold, list):
            head[ACCEPTED] = gold
        plain.append(head | {k: v for k, v in row.items() if k not in {*head, question_column, answer_column}})
    return plain


def find_problems(rows: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """
    Return the numbers of the rows with each kind of problem: no question, no answer, tests that are not Python, an id that
    an earlier row has.

    Golds that math-verify cannot read are problems of their own kind ([`not_understood`]): such rows can be used.
    """
    problems: dict[str, list[int]] = defaultdict(list)
    ids = set()
    for number, row in enumerate(rows):
        question = row.get("question", row.get("prompt"))
        if not question or not str(question).strip():
            problems["no question"].append(number)
        elif not plain_gold(row.get("answer")) and not row.get(TESTS):
            problems["no answer"].append(number)
        elif not is_python(row.get(TESTS)):
            problems["tests that are not Python"].append(number)
        elif row["id"] in ids:
            problems["id of an earlier row"].append(number)
        ids.add(row["id"])
    return dict(problems)


def without_benchmark_questions(
    splits: dict[str, list[dict[str, Any]]], say: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """
    Return the splits without the rows whose question resembles one of a benchmark that can be read here.

    Args:
        splits (`dict[str, list[dict]]`): rows as from [`read_splits`].
        say (`Callable[[str], None]`): told what was compared, and how many rows were left out.

    Raises:
        UserError: if no row is left.
    """
    notes: list[str] = []
    overlap = benchmark_overlap(notes)
    kept = {}
    for split, rows in splits.items():
        found = [overlap.find(row["question"]) if isinstance(row.get("question"), str) else None for row in rows]
        kept[split] = [row for row, benchmark in zip(rows, found, strict=True) if benchmark is None]
        counts = Counter(benchmark for benchmark in found if benchmark)
        reasons = "; ".join(f"{count} like a question of {benchmark}" for benchmark, count in counts.most_common())
        say(f"{split}: {len(kept[split])} of {len(rows)} rows kept; left out: {reasons or 'none'}.")
        if not kept[split]:
            raise UserError(f"{split}: no row is left.")
    for note in notes:
        say(note)
    return kept


def not_understood(rows: Sequence[dict[str, Any]]) -> list[int]:
    """Return the numbers of the rows with a gold answer that can be compared with nothing but the same text."""
    from tqdm.auto import tqdm

    numbers = [number for number, row in enumerate(rows) if row.get("answer") and not row.get("reasoning_task")]
    bad = []
    for start in tqdm(
        range(0, len(numbers), UNDERSTOOD_CHUNK), "Reading answers", disable=len(rows) < PROGRESS_FROM, leave=False
    ):
        chunk = numbers[start : start + UNDERSTOOD_CHUNK]
        verdicts = understood([rows[number]["answer"] for number in chunk])
        bad += [number for number, verdict in zip(chunk, verdicts, strict=True) if not verdict]
    return bad


def verl_rows(
    request: Request, split: str, rows: Sequence[dict[str, Any]], form: str, system_prompt: str | None
) -> list[dict[str, Any]]:
    """
    Return `rows` in verl's layout, see [`l2t_trl.data.verl.to_verl`].

    Raises:
        UserError: if a row holds a chat rather than a question, or tests rather than an answer, or if they are verl's already.
    """
    source = SOURCES.get(request.name) or BY_HUB_ID.get(request.name)
    has_several = any(row.get(ACCEPTED) for row in rows)
    kept = [name for name in KEPT if any(row.get(name) is not None for row in rows)]
    if rows and all("data_source" in row and "ability" in row for row in rows):
        raise UserError(f"{request.name} is in verl's layout already; its questions would get a second instruction.")
    converted = []
    for index, row in enumerate(rows):
        if "question" not in row:
            raise UserError(f"{request.name}: row {index} holds a chat, to which no instruction can be added.")
        if "answer" not in row:
            raise UserError(
                f"{request.name}: row {index} has tests in place of an answer, and verl's layout for questions with "
                f"answers has no place for them. Write it with l2t data prepare {request.name}."
            )
        raw = plain_gold(row[RAW_ANSWER])
        one = to_verl(
            row["question"],
            row["answer"],
            raw,
            source.hub_id if source else request.name,
            split,
            index,
            form,
            system_prompt,
        )
        one["extra_info"] |= {name: row.get(name) for name in kept}
        if has_several:
            one["extra_info"][ACCEPTED] = row.get(ACCEPTED) or [row["answer"]]
        converted.append(one)
    return converted


def folder_name(name: str) -> str:
    """Return the name of a data set's folder: a known one's own, otherwise the last part of a path or Hub id."""
    source = SOURCES.get(name) or BY_HUB_ID.get(name)
    return source.name if source else Path(name).expanduser().stem.replace(":", "-")


def check_writable(paths: Sequence[Path], may_overwrite: bool):
    """
    Make the folders of `paths`, or raise before anything long is done.

    Raises:
        UserError: if one of the files is there and may not be replaced, or a folder cannot be made.
    """
    for path in paths:
        if path.exists() and not may_overwrite:
            raise UserError(f"{path} is there already; set --overwrite to replace it, or another --output.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path.parent} cannot be made: {error.strerror}. Set another --output.") from error


def write_rows(path: Path, rows: Sequence[dict[str, Any]]):
    """
    Write rows to a .jsonl or .parquet file, whole or not at all: what was there stays until the new file is complete.

    Raises:
        UserError: if the file cannot be written, for example because the disk is full.
    """
    try:
        write_whole(path, _parquet(rows) if path.suffix == ".parquet" else _json_lines(rows))
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. If it was there before, it is as it was. Make room, "
            "or set another --output."
        ) from error


def _json_lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    from datasets import Dataset

    names = list(dict.fromkeys(key for row in rows for key in row))
    # In memory: pyarrow ends the process where a file on a full disk takes no more.
    content = io.BytesIO()
    Dataset.from_dict({name: [row.get(name) for row in rows] for name in names}).to_parquet(content)
    return content.getvalue()
