"""`l2t data`: list, show and prepare data sets, and write them in verl's layout."""

import argparse
import json
import os
from pathlib import Path

from l2t_trl.errors import UserError
from l2t_trl.scripts.options import count


EXAMPLE_WIDTH = 300


def add_arguments(parser: argparse.ArgumentParser):
    """Add the arguments of `l2t data` to `parser`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, title="actions")
    actions.add_parser("list", help="list the data sets that are known by name")

    show = actions.add_parser("show", help="print rows, columns, an example, licence and source of a data set")
    _add_request(show)

    prepare = actions.add_parser("prepare", help="write the rows into a folder that l2t train --dataset_name takes")
    _add_request(prepare)
    _add_output(prepare, "folder for <split>.jsonl or <split>.parquet")
    prepare.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl", help="type of the files")

    to_verl = actions.add_parser("to-verl", help="write <output>/<name>/<split>.parquet as verl reads it")
    _add_request(to_verl)
    _add_output(to_verl, "root folder")
    to_verl.add_argument(
        "--form",
        choices=("verl", "l2t"),
        default="verl",
        help="verl's own prompt, or the L2T authors' with a system prompt that asks for episodes",
    )
    to_verl.add_argument("--system_prompt", help="other system prompt for --form l2t")


def _add_request(parser: argparse.ArgumentParser):
    parser.add_argument("name", help="name (see l2t data list), path or Hub id")
    parser.add_argument("--split", action="append", help="split; may be given several times (default: train and test)")
    parser.add_argument("--dataset_config", help="configuration of a Hub data set")
    parser.add_argument("--question_column", help="column with the question, in a data set that is not known")
    parser.add_argument("--answer_column", help="column with the gold answer, likewise")
    parser.add_argument("--size", type=count, help="most rows of each split (default: all; of endless ones 2048, 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of generated rows")
    parser.add_argument("--tiers", type=int, nargs="+", help="difficulty tiers (default: all)")


def _add_output(parser: argparse.ArgumentParser, help_text: str):
    parser.add_argument("--output", required=True, help=help_text)
    parser.add_argument(
        "--decontaminate", action="store_true", help="leave out rows that resemble a question of a benchmark"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    parser.add_argument(
        "--on_bad_row",
        choices=("stop", "drop"),
        default="stop",
        help="rows without question, answer or usable tests, or with an id twice",
    )


def main(args: argparse.Namespace) -> int:
    """Do what `args.action` says."""
    return {"list": list_sets, "show": show, "prepare": prepare, "to-verl": to_verl}[args.action](args)


def list_sets(args: argparse.Namespace) -> int:
    """Print a table of the known data sets."""
    from l2t_trl.data.benchmarks import BENCHMARKS
    from l2t_trl.data.generated import GENERATED
    from l2t_trl.data.registry import SOURCES

    def line(label: str, name: str, sizes: dict[str, int], licence: str, source: str, is_endless: bool = False):
        rows = "any number" if is_endless else ", ".join(f"{split} {size}" for split, size in sizes.items())
        uses = (["train"] if "train" in sizes else []) + (["benchmark"] if name in BENCHMARKS else [])
        return label, rows, ", ".join(uses), licence, source

    table = [("name", "rows", "use", "licence", "source")]
    for one in SOURCES.values():
        sizes = {split: size for split, (_, size) in one.splits.items()}
        table.append(line(one.name, one.name, sizes, one.licence, one.hub_id))
    for one in GENERATED.values():
        table.append(line(one.label, one.name, one.sizes, one.licence, one.source, one.is_endless))
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    root = os.environ.get("L2T_DATA_ROOT")
    print(f"\nData sets of the Hub are read from {root} (L2T_DATA_ROOT)." if root else "\nRead from the Hub.")
    return 0


def show(args: argparse.Namespace) -> int:
    """Print what a data set holds."""
    from collections import Counter

    from l2t_trl.data.checks import list_rows
    from l2t_trl.data.generated import find_generated
    from l2t_trl.data.preparing import NOT_UNDERSTOOD, find_problems, not_understood, read_splits
    from l2t_trl.data.registry import BY_HUB_ID, SOURCES
    from l2t_trl.data.resolving import RAW_ANSWER

    request = _request(args)
    splits = read_splits(request, print)
    source = SOURCES.get(args.name) or BY_HUB_ID.get(args.name)
    if source is not None:
        print(f"source:  https://huggingface.co/datasets/{source.hub_id}")
        print(f"licence: {source.licence}")
    elif (generated := find_generated(args.name)) is not None:
        print(f"source:  {generated.source}")
        print(f"licence: {generated.licence}")
    for split, rows in splits.items():
        print(f"{split}: {len(rows)} rows")
        columns = list(dict.fromkeys(key for row in rows for key in row if key != RAW_ANSWER))
        print(f"  columns: {', '.join(columns)}")
        tiers = Counter(row["tier"] for row in rows if row.get("tier") is not None)
        if tiers:
            print(f"  tiers:   {', '.join(f'{tier}: {tiers[tier]} rows' for tier in sorted(tiers))}")
        problems = find_problems(rows)
        if bad := not_understood(rows):
            problems[NOT_UNDERSTOOD] = bad
        for reason, numbers in problems.items():
            print(f"  {reason}: {list_rows(numbers)}")
        for column in columns:
            text = json.dumps(rows[0].get(column), ensure_ascii=False)
            print(f"  {column}[0] = {text[:EXAMPLE_WIDTH]}{'...' if len(text) > EXAMPLE_WIDTH else ''}")
    return 0


def prepare(args: argparse.Namespace) -> int:
    """Write the resolved rows."""
    from l2t_trl.data.generated import check_trainable
    from l2t_trl.data.preparing import check_writable, write_rows
    from l2t_trl.data.resolving import RAW_ANSWER

    check_trainable(args.name)
    folder = Path(args.output).expanduser()
    check_writable(_paths(args, folder, args.format), args.overwrite)
    splits = _checked_splits(args)
    for split, rows in splits.items():
        path = folder / f"{split}.{args.format}"
        check_writable([path], args.overwrite)
        write_rows(path, [{key: value for key, value in row.items() if key != RAW_ANSWER} for row in rows])
        print(f"{len(rows)} rows: {path}")
    if "train" in splits:
        print(f"Train on them with: l2t train --dataset_name {folder}")
    else:
        print(f"Evaluate on them in a training with: l2t train --test_dataset_name {folder}")
    return 0


def to_verl(args: argparse.Namespace) -> int:
    """Write verl's Parquet files."""
    from l2t_trl.data.generated import check_trainable
    from l2t_trl.data.preparing import check_writable, folder_name, verl_rows, write_rows

    if args.system_prompt is not None and args.form != "l2t":
        raise UserError("--system_prompt is for --form l2t; verl's own form has none.")
    check_trainable(args.name)
    folder = Path(args.output).expanduser() / folder_name(args.name)
    check_writable(_paths(args, folder, "parquet"), args.overwrite)
    for split, rows in _checked_splits(args).items():
        path = folder / f"{split}.parquet"
        check_writable([path], args.overwrite)
        write_rows(path, verl_rows(_request(args), split, rows, args.form, args.system_prompt))
        print(f"{len(rows)} rows: {path}")
    return 0


def _checked_splits(args: argparse.Namespace) -> dict[str, list[dict]]:
    """Read the splits; rows that cannot be used stop it, or are left out and said, as `--on_bad_row` has it."""
    from l2t_trl.data.checks import list_rows
    from l2t_trl.data.preparing import (
        NOT_UNDERSTOOD,
        find_problems,
        not_understood,
        read_splits,
        without_benchmark_questions,
    )

    splits = read_splits(_request(args), print)
    if args.decontaminate:
        splits = without_benchmark_questions(splits, print)
    for split, rows in splits.items():
        problems = find_problems(rows)
        summary = "; ".join(f"{reason}: {list_rows(numbers)}" for reason, numbers in problems.items())
        if problems and args.on_bad_row == "stop":
            raise UserError(
                f"{args.name}, {split}: rows cannot be used (counted from 0). {summary}. Mend them, or set --on_bad_row "
                "drop to leave them out."
            )
        if problems:
            print(f"{args.name}, {split}: left out {summary}.")
            dropped = {number for numbers in problems.values() for number in numbers}
            splits[split] = rows = [row for number, row in enumerate(rows) if number not in dropped]
            if not rows:
                raise UserError(f"{args.name}, {split}: no row is left.")
        if bad := not_understood(rows):
            print(f"{args.name}, {split}: {NOT_UNDERSTOOD}: {list_rows(bad)}.")
    return splits


def _paths(args: argparse.Namespace, folder: Path, file_type: str) -> list[Path]:
    return [folder / f"{split}.{file_type}" for split in args.split or ("train", "test")]


def _request(args: argparse.Namespace):
    from l2t_trl.data.preparing import Request

    return Request(
        name=args.name,
        config=args.dataset_config,
        splits=tuple(args.split) if args.split else None,
        question_column=args.question_column,
        answer_column=args.answer_column,
        size=args.size,
        seed=args.seed,
        tiers=tuple(args.tiers) if args.tiers else None,
    )
