"""From the name of a data set to rows with `prompt` and `answer`."""

import csv
import json
import logging
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from l2t_trl.data.checks import check_rows, list_rows
from l2t_trl.data.code import has_tests, with_tests
from l2t_trl.data.generated import check_trainable, find_generated, generate_rows
from l2t_trl.data.registry import (
    ACCEPTED,
    BY_HUB_ID,
    HUB_CONFIGS,
    SOURCES,
    plain_gold,
    unknown_name,
)
from l2t_trl.data.verl import from_verl, is_verl
from l2t_trl.errors import UserError


logger = logging.getLogger(__name__)


FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
QUESTION_COLUMNS = ("question", "problem", "prompt", "Question", "Problem")
# Test rows are drawn with this seed, so that runs with different seeds are measured on the same questions.
TEST_SEED = 0


def load_rows(script_args, training_args, tokenizer, say: Callable[[str], None] = logger.info):
    """
    Load the rows to train and to evaluate on, and check them.

    Args:
        script_args ([`~l2t_trl.scripts.train.L2TScriptArguments`]):
            Names, splits, sizes, columns and prompt texts.
        training_args ([`L2TConfig`]):
            `seed`, `answer_column`, `max_prompt_length` and `on_bad_row`.
        tokenizer (`transformers.PreTrainedTokenizerBase`):
            Without a chat template the prompts are plain texts.
        say (`Callable[[str], None]`, *optional*):
            Told which rows of a known data set were left out, and why.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset | None]`: training and test rows with the columns `prompt`, `answer`
        and what else the rows hold. `None` if there are no rows to test on.

    Raises:
        UserError: if the data cannot be had or cannot be used.
    """
    train_name, train_split = script_args.dataset_name, script_args.dataset_train_split
    check_trainable(train_name)
    is_train_generated = find_generated(train_name) is not None
    if is_train_generated:
        train = generate_rows(train_name, train_split, script_args.train_size, training_args.seed, script_args.tiers)
    else:
        train = read_split(train_name, script_args.dataset_config, train_split, say)
    if train is None:
        raise UserError(no_split(train_name, train_split))

    test_name, test_split = script_args.test_dataset_name or train_name, script_args.dataset_test_split
    is_same = test_name == train_name
    check_trainable(test_name)
    is_test_generated = find_generated(test_name) is not None
    if is_test_generated:
        test = generate_rows(test_name, test_split, script_args.test_size, TEST_SEED, script_args.tiers)
    else:
        test = read_split(test_name, script_args.dataset_config if is_same else None, test_split, say)
    if test is None and not is_same:
        raise UserError(no_split(test_name, test_split))
    if test is None and script_args.test_size is not None:
        train, test = _hold_out(train, script_args.test_size)

    if script_args.tiers:
        train = _of_tiers(train, script_args.tiers, train_name)
        if test is not None and any("tier" in row for row in test):
            test = _of_tiers(test, script_args.tiers, test_name)
    train = to_dataset(train, train_name, script_args, training_args, tokenizer)
    train = _check(train, train_name, tokenizer, training_args)
    if not is_train_generated and script_args.train_size is not None:
        train = train.shuffle(seed=training_args.seed).select(range(min(script_args.train_size, len(train))))
    if test is None:
        return train, None
    test = to_dataset(test, test_name, script_args, training_args, tokenizer)
    test = _check(test, test_name, tokenizer, training_args)
    if not is_test_generated and script_args.test_size is not None:
        test = test.shuffle(seed=TEST_SEED).select(range(min(script_args.test_size, len(test))))
    return train, test


def read_split(
    name: str, config: str | None, split: str, say: Callable[[str], None] = logger.info
) -> Sequence[dict[str, Any]] | None:
    """
    Read one split of a data set that is known by name, or else of a path or of the Hub as in [`read_rows`].

    Args:
        name (`str`):
            Name in [`l2t_trl.data.registry.SOURCES`], path or Hub id. A name comes before a path of the same text.
        config (`str`, *optional*):
            Configuration of a Hub data set.
        split (`str`):
            Name of the split.
        say (`Callable[[str], None]`, *optional*):
            Told which rows of a known data set were left out, and why.

    Returns:
        `Sequence[dict[str, Any]]`: the rows, or `None` if there is no such split.
    """
    if name in SOURCES:
        from l2t_trl.data.resolving import resolve_split

        loaded = resolve_split(SOURCES[name], split, config)
        if loaded is None:
            return None
        for note in loaded.notes:
            say(f"{name}: {note}")
        return loaded.rows
    return read_rows(name, config, split)


def read_rows(name: str, config: str | None, split: str, is_lazy: bool = False) -> Sequence[dict[str, Any]] | None:
    """
    Read one split of a data set.

    Args:
        name (`str`):
            Path of a file (all its rows are the split `train`), of a folder with one file per split, or Hub id. Hub
            ids are looked up as `<id>/[<config>/]<split>.jsonl` in the folder that the environment variable
            L2T_DATA_ROOT names, if it is set.
        config (`str`, *optional*):
            Configuration of a Hub data set.
        split (`str`):
            Name of the split.
        is_lazy (`bool`, *optional*, defaults to `False`):
            Whether rows of the Hub may stay on disk until they are asked for: a few of very many are wanted.

    Returns:
        `Sequence[dict[str, Any]]`: the rows, or `None` if there is no such split.

    Raises:
        UserError: if the data set cannot be read.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return read_file(path) if split == "train" else None
    if path.is_dir():
        return _read_folder(path, split)
    if path.suffix in FILE_TYPES or name.startswith(("/", "./", "../", "~")):
        raise UserError(f"dataset_name {name}: no such file.")

    config = config or HUB_CONFIGS.get(name)
    root = os.environ.get("L2T_DATA_ROOT")
    if root:
        folder = Path(root, name, config or "")
        if not folder.is_dir():
            if "/" not in name:
                raise unknown_name(name)
            raise UserError(
                f"L2T_DATA_ROOT is set to {root}, but there is no folder {folder}. Put the data there, set another, or unset "
                "it to read from the Hub."
            )
        return _read_folder(folder, split)
    try:
        rows = _read_from_hub(name, config, split)
    except UserError as error:
        # A few old data sets of the Hub have no owner; far more often it is a slip of the pen.
        raise (error if "/" in name else unknown_name(name)) from error
    return rows if rows is None or is_lazy else rows.to_list()


def no_split(name: str, split: str) -> str:
    """Return what to say of a data set without the split that is wanted."""
    generated = find_generated(name)
    splits = SOURCES[name].splits if name in SOURCES else generated.sizes if generated else ()
    there_are = f"; it has {', '.join(splits)}" if splits else ""
    return f"Data set {name} has no split {split!r}{there_are}."


def read_file(path: Path) -> Sequence[dict[str, Any]]:
    """Return the rows of a .jsonl, .json (a list of objects), .csv or .parquet file."""
    if path.suffix not in FILE_TYPES:
        raise UserError(f"{path}: only {', '.join(FILE_TYPES)} files can be read.")
    try:
        if path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            try:
                return pyarrow.parquet.read_table(path).to_pylist()
            except pyarrow.ArrowInvalid as error:
                raise UserError(f"{path}: not a Parquet file ({error}).") from error
        with open(path, encoding="utf-8", newline="" if path.suffix == ".csv" else None) as file:
            if path.suffix == ".csv":
                return list(csv.DictReader(file))
            if path.suffix == ".json":
                rows = _parse_json(file.read(), str(path))
            else:
                rows = [_parse_json(line, f"{path}:{number}") for number, line in enumerate(file, 1) if line.strip()]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: every row must be a JSON object.")
    return rows


def to_dataset(rows: Sequence[dict[str, Any]], name: str, script_args, training_args, tokenizer):
    """
    Turn rows into a data set with `prompt` and `answer`.

    The answers become texts. Other columns stay, for rewards that want them, where all values are of one plain type.

    Args:
        rows (`Sequence[dict[str, Any]]`):
            Rows as read.
        name (`str`):
            Name of the data set; the columns of known Hub ids are known, and so is verl's layout.
        script_args, training_args, tokenizer:
            As in [`load_rows`].

    Returns:
        `datasets.Dataset`

    Raises:
        UserError: if there is no such column.
    """
    from datasets import Dataset

    if len(rows) == 0:
        raise UserError(f"{name}: the data set has no rows.")
    if has_tests(rows):
        rows = with_tests(rows, name, training_args.on_bad_row)
    names = list(dict.fromkeys(key for row in rows for key in row))
    names_columns = script_args.question_column is not None or training_args.answer_column != "answer"
    if is_verl(rows) and not names_columns:
        rows = [from_verl(row) for row in rows]
        names = list(dict.fromkeys(key for row in rows for key in row))
    question_column, answer_column, golds = find_columns(
        name, names, script_args.question_column, training_args.answer_column
    )
    # Neither continuations nor rewards of the user's own need gold answers; evaluations do.
    if script_args.method == "l2t":
        needs_answers = training_args.correctness_estimator != "rollout"
    else:
        needs_answers = "accuracy" in script_args.reward_funcs
    needs_answers = needs_answers or script_args.eval_before_after
    for setting, column in (("question_column", question_column), ("answer_column", answer_column)):
        if column not in names and (setting == "question_column" or needs_answers):
            raise UserError(no_column(name, column, setting, names, rows))

    is_chat = tokenizer.chat_template is not None
    columns = {"prompt": [make_prompt(row.get(question_column), script_args, is_chat) for row in rows]}
    if answer_column in names:
        answers = [golds(row.get(answer_column)) for row in rows]
        columns["answer"] = [answer[0] if isinstance(answer, list) else answer for answer in answers]
        accepted = [
            answer if isinstance(answer, list) else row.get(ACCEPTED)
            for answer, row in zip(answers, rows, strict=True)
        ]
        if any(isinstance(several, list) for several in accepted):
            columns[ACCEPTED] = accepted
        # The trainer looks for its answers under the configured name.
        columns.setdefault(training_args.answer_column, columns["answer"])
    for column in names:
        values = [row.get(column) for row in rows]
        kinds = {type(value) for value in values if value is not None}
        if (
            column not in {*columns, question_column, answer_column}
            and len(kinds) == 1
            and kinds <= {str, int, float, bool}
        ):
            columns[column] = values
    return Dataset.from_dict(columns)


def no_column(name: str, column: str, setting: str, names: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """Return what to say of a data set without a column that is wanted."""
    not_verl = [number for number, row in enumerate(rows) if not is_verl([row])]
    layout, hint = "in verl's layout (prompt, and reward_model with ground_truth)", ""
    if 0 < len(not_verl) < len(rows):
        hint = f" Only a part of it is {layout}, but not {list_rows(not_verl)}."
    elif ".parquet" in name:
        hint = f" Nor is it {layout}."
    return f"{name}: no column {column!r} ({setting}); its columns are {', '.join(names)}.{hint}"


def find_columns(
    name: str, names: Sequence[str], question_column: str | None, answer_column: str
) -> tuple[str, str, Callable[[Any], str | list[str] | None]]:
    """
    Return the columns of question and gold answer, and how to take the gold, or several, out of the latter.

    Args:
        name (`str`): name of the data set; known Hub ids have columns of their own.
        names (`Sequence[str]`): columns that there are.
        question_column (`str`, *optional*): column that the user chose; by default the first usual one.
        answer_column (`str`): likewise; `"answer"` leaves a known data set's own.
    """
    source = BY_HUB_ID.get(name)
    if question_column is None and source is not None:
        question_column = source.question
    if question_column is None:
        question_column = next((column for column in QUESTION_COLUMNS if column in names), "question")
    if source is not None and source.answer is not None and answer_column == "answer":
        return question_column, source.answer, source.golds
    return question_column, answer_column, plain_gold


def make_prompt(question: Any, script_args, is_chat: bool) -> str | list[dict[str, str]]:
    """Return a question as a prompt, with `script_args`' `instruction` and `system_prompt` where there are any."""
    if isinstance(question, list):
        messages = [dict(message) for message in question]
        if script_args.instruction and messages and messages[-1].get("content"):
            messages[-1]["content"] += f"\n{script_args.instruction}"
        if script_args.system_prompt and not any(message.get("role") == "system" for message in messages):
            messages.insert(0, {"role": "system", "content": script_args.system_prompt})
        return messages
    text = question if isinstance(question, str) else ""
    # An empty question stays empty, so that the row check finds it.
    if text.strip() and script_args.instruction:
        text = f"{text}\n{script_args.instruction}"
    if is_chat:
        system = [{"role": "system", "content": script_args.system_prompt}] if script_args.system_prompt else []
        return [*system, {"role": "user", "content": text}]
    if text.strip() and script_args.system_prompt:
        text = f"{script_args.system_prompt}\n\n{text}"
    return text


def _hold_out(rows: Sequence[dict[str, Any]], size: int) -> tuple[list, list]:
    """Split `size` rows off, the same ones for every seed."""
    if size >= len(rows):
        raise UserError(f"test_size={size} leaves none of the {len(rows)} rows to train on.")
    order = random.Random(TEST_SEED).sample(range(len(rows)), len(rows))
    held_out = set(order[:size])
    train = [row for index, row in enumerate(rows) if index not in held_out]
    return train, [rows[index] for index in sorted(held_out)]


def _of_tiers(rows: Sequence[dict[str, Any]], tiers: Sequence[int], name: str) -> list[dict[str, Any]]:
    kept = [row for row in rows if row.get("tier") in tiers]
    if not kept:
        has = sorted({row["tier"] for row in rows if row.get("tier") is not None})
        raise UserError(f"{name}: no row is of the tiers {list(tiers)}; it has {has or 'no tiers'}.")
    return kept


def _read_folder(folder: Path, split: str) -> Sequence[dict[str, Any]] | None:
    for file_type in FILE_TYPES:
        path = folder / f"{split}{file_type}"
        if path.is_file():
            return read_file(path)
    if not any(path.suffix in FILE_TYPES for path in folder.iterdir()):
        raise UserError(
            f"{folder} has no file <split>.jsonl, nor of another type that can be read. Put the data there, or name another "
            "folder."
        )
    return None


def _read_from_hub(name: str, config: str | None, split: str):
    """Return the split as a `datasets.Dataset`, or `None` if there is no such split."""
    from datasets import get_dataset_split_names, load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        if split not in get_dataset_split_names(name, config):
            return None
        return load_dataset(name, config, split=split)
    except (DatasetNotFoundError, ValueError) as error:
        raise UserError(f"dataset_name {name}: {error}") from error
    except OSError as error:
        # requests' and httpx's connection errors, and the Hub client's offline mode, are all OSErrors.
        raise UserError(
            f"dataset_name {name} is no local file, and the Hub cannot be reached ({type(error).__name__}). To work "
            f"offline, set L2T_DATA_ROOT to a folder that holds {name}/{f'{config}/' if config else ''}{split}.jsonl."
        ) from error


def _check(dataset, name: str, tokenizer, training_args):
    try:
        return check_rows(
            dataset,
            tokenizer,
            answer_column="answer" if "answer" in dataset.column_names else None,
            max_prompt_length=training_args.max_prompt_length,
            on_bad_row=training_args.on_bad_row,
        )
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not valid JSON ({error}).") from error
