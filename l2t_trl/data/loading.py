"""From the name of a data set to rows with `prompt` and `answer`."""

import csv
import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from l2t_trl.data.checks import check_rows
from l2t_trl.data.code import has_tests, with_tests
from l2t_trl.data.python_functions import PYTHON_FUNCTIONS, load_functions
from l2t_trl.errors import UserError


FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
QUESTION_COLUMNS = ("question", "problem", "prompt", "Question", "Problem")
ARITHMETIC = "arithmetic"
ARITHMETIC_TRAIN_SIZE = 2048
ARITHMETIC_TEST_SIZE = 200
# Test rows are drawn with this seed, so that runs with different seeds are measured on the same questions.
TEST_SEED = 0


class Source(NamedTuple):
    """Where a known data set of the Hub keeps its question and its answer."""

    question: str
    answer: str
    config: str | None = None
    extract: Callable[[str], str | None] = str


def gsm8k_answer(solution: str) -> str | None:
    """Return the number behind the last `####` of a GSM8K solution without thousands commas, or `None` without one."""
    _, mark, answer = solution.rpartition("####")
    return answer.strip().replace(",", "") if mark else None


SOURCES = {
    "openai/gsm8k": Source("question", "answer", config="main", extract=gsm8k_answer),
    "HuggingFaceH4/MATH-500": Source("problem", "answer"),
    "HuggingFaceH4/aime_2024": Source("problem", "answer"),
    "math-ai/amc23": Source("question", "answer"),
    "math-ai/minervamath": Source("question", "answer"),
    "di-zhang-fdu/AIME_1983_2024": Source("Question", "Answer"),
    "google-research-datasets/mbpp": Source("question", "answer", config="full"),
}


def load_rows(script_args, training_args, tokenizer):
    """
    Load the rows to train and to evaluate on, and check them.

    Args:
        script_args ([`~l2t_trl.scripts.train.L2TScriptArguments`]):
            Names, splits, sizes, columns and prompt texts.
        training_args ([`L2TConfig`]):
            `seed`, `answer_column`, `max_prompt_length` and `on_bad_row`.
        tokenizer (`transformers.PreTrainedTokenizerBase`):
            Without a chat template the prompts are plain texts.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset | None]`: training and test rows with the columns `prompt`, `answer`
        and what else the rows hold. `None` if there are no rows to test on.

    Raises:
        UserError: if the data cannot be had or cannot be used.
    """
    if script_args.dataset_name == ARITHMETIC:
        train = _arithmetic(script_args, training_args, "train")
    else:
        train = read_rows(script_args.dataset_name, script_args.dataset_config, script_args.dataset_train_split)
        if train is None:
            raise UserError(f"Data set {script_args.dataset_name} has no split {script_args.dataset_train_split!r}.")

    test_name = script_args.test_dataset_name or script_args.dataset_name
    is_same = test_name == script_args.dataset_name
    if test_name == ARITHMETIC:
        test = _arithmetic(script_args, training_args, "test")
    else:
        config = script_args.dataset_config if is_same else None
        test = read_rows(test_name, config, script_args.dataset_test_split)
        if test is None and not is_same:
            raise UserError(f"Data set {test_name} has no split {script_args.dataset_test_split!r}.")
        if test is None and script_args.test_size is not None:
            train, test = _hold_out(train, script_args.test_size)

    train = to_dataset(train, script_args.dataset_name, script_args, training_args, tokenizer)
    train = _check(train, script_args.dataset_name, tokenizer, training_args)
    if script_args.dataset_name != ARITHMETIC and script_args.train_size is not None:
        train = train.shuffle(seed=training_args.seed).select(range(min(script_args.train_size, len(train))))
    if test is None:
        return train, None
    test = to_dataset(test, test_name, script_args, training_args, tokenizer)
    test = _check(test, test_name, tokenizer, training_args)
    if test_name != ARITHMETIC and script_args.test_size is not None:
        test = test.shuffle(seed=TEST_SEED).select(range(min(script_args.test_size, len(test))))
    return train, test


def read_rows(name: str, config: str | None, split: str) -> Sequence[dict[str, Any]] | None:
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

    Returns:
        `Sequence[dict[str, Any]]`: the rows, or `None` if there is no such split.

    Raises:
        UserError: if the data set cannot be read.
    """
    if name == PYTHON_FUNCTIONS:
        return load_functions(split)
    path = Path(name).expanduser()
    if path.is_file():
        return read_file(path) if split == "train" else None
    if path.is_dir():
        return _read_folder(path, split)
    if path.suffix in FILE_TYPES or name.startswith(("/", "./", "../", "~")):
        raise UserError(f"dataset_name {name}: no such file.")

    config = config or (SOURCES[name].config if name in SOURCES else None)
    root = os.environ.get("L2T_DATA_ROOT")
    if root:
        folder = Path(root, name, config or "")
        if not folder.is_dir():
            raise UserError(f"L2T_DATA_ROOT is set to {root}, but there is no folder {folder}.")
        return _read_folder(folder, split)
    return _read_from_hub(name, config, split)


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
            Name of the data set; those in `SOURCES` are known.
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
    source = SOURCES.get(name)
    question_column = script_args.question_column or (source.question if source else None)
    if question_column is None:
        question_column = next((column for column in QUESTION_COLUMNS if column in names), "question")
    answer_column = training_args.answer_column
    extract = str
    if source is not None and answer_column == "answer":
        answer_column, extract = source.answer, source.extract
    # Neither continuations nor rewards of the user's own need gold answers; evaluations do.
    needs_answers = training_args.correctness_estimator != "rollout" or script_args.eval_before_after
    for setting, column in (("question_column", question_column), ("answer_column", answer_column)):
        if column not in names and (setting == "question_column" or needs_answers):
            raise UserError(f"{name}: no column {column!r} ({setting}); its columns are {', '.join(names)}.")

    is_chat = tokenizer.chat_template is not None
    columns = {"prompt": [_prompt(row.get(question_column), script_args, is_chat) for row in rows]}
    if answer_column in names:
        columns["answer"] = [_answer(row.get(answer_column), extract) for row in rows]
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


def _prompt(question: Any, script_args, is_chat: bool) -> str | list[dict[str, str]]:
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


def _answer(value: Any, extract: Callable[[str], str | None]) -> str | None:
    if value is None or isinstance(value, bool):
        return None
    # AMC's answers are whole numbers kept as 27.0.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    answer = extract(str(value))
    return None if answer is None else answer.strip()


def _arithmetic(script_args, training_args, split: str) -> Sequence[dict[str, Any]]:
    from l2t_trl.data.arithmetic import make_dataset

    is_train = split == "train"
    size = script_args.train_size if is_train else script_args.test_size
    return make_dataset(
        size=size or (ARITHMETIC_TRAIN_SIZE if is_train else ARITHMETIC_TEST_SIZE),
        seed=training_args.seed if is_train else TEST_SEED,
        tiers=tuple(script_args.tiers) if script_args.tiers else (1, 2, 3, 4),
        split=split,
    ).to_list()


def _hold_out(rows: Sequence[dict[str, Any]], size: int) -> tuple[list, list]:
    """Split `size` rows off, the same ones for every seed."""
    if size >= len(rows):
        raise UserError(f"test_size={size} leaves none of the {len(rows)} rows to train on.")
    order = random.Random(TEST_SEED).sample(range(len(rows)), len(rows))
    held_out = set(order[:size])
    train = [row for index, row in enumerate(rows) if index not in held_out]
    return train, [rows[index] for index in sorted(held_out)]


def _read_folder(folder: Path, split: str) -> Sequence[dict[str, Any]] | None:
    for file_type in FILE_TYPES:
        path = folder / f"{split}{file_type}"
        if path.is_file():
            return read_file(path)
    if not any(path.suffix in FILE_TYPES for path in folder.iterdir()):
        raise UserError(f"{folder} has no file <split>.jsonl, nor of another type that can be read.")
    return None


def _read_from_hub(name: str, config: str | None, split: str) -> Sequence[dict[str, Any]] | None:
    from datasets import get_dataset_split_names, load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        if split not in get_dataset_split_names(name, config):
            return None
        return load_dataset(name, config, split=split).to_list()
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
