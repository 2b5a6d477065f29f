"""
Verdicts on answers: ours beside those of TRL's `accuracy_reward`.

    L2T_DATA_ROOT=FOLDER python benchmarks/answers.py [--list]

For every benchmark that lies in the folder, each gold answer is written back as a completion: verbatim, then in other
forms that mean the same, then changed so that they mean something else. The table of verbatim golds also has TRL's
reward with the golds wrapped in a box, which is not how its data sets hold them.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable
from fractions import Fraction

from trl.rewards import accuracy_reward

from l2t_trl.answers import accepted_golds, judge_texts
from l2t_trl.data.benchmarks import BENCHMARKS
from l2t_trl.data.registry import ACCEPTED, SOURCES
from l2t_trl.data.resolving import resolve_split
from l2t_trl.errors import UserError


INTEGER = re.compile(r"-?\d+")
SIMPLE_FRACTION = re.compile(r"\\frac\{(\d+)\}\{(\d+)\}")
SCIENTIFIC = re.compile(r"([+-]?\d+(?:\.\d+)?)e([+-]?\d+)")


def is_integer(gold: str) -> bool:
    return INTEGER.fullmatch(gold) is not None


def decimal(gold: str) -> str | None:
    """Return a fraction as a decimal number where it has an end within four places."""
    match = SIMPLE_FRACTION.fullmatch(gold)
    if match is None:
        return None
    value = Fraction(int(match[1]), int(match[2])) * 10**4
    return f"{float(value / 10**4):.4f}".rstrip("0").rstrip(".") if value.denominator == 1 else None


def replaced(pattern: str, by: str) -> Callable[[str], str | None]:
    """Return a change that is none where the pattern is not found."""

    def change(gold: str) -> str | None:
        changed = re.sub(pattern, by, gold)
        return None if changed == gold else changed

    return change


def when(condition: Callable[[str], bool], form: str) -> Callable[[str], str | None]:
    return lambda gold: form.replace("GOLD", gold) if condition(gold) else None


def with_commas(gold: str) -> str | None:
    return f"{int(gold):,}" if is_integer(gold) and abs(int(gold)) >= 1000 else None


def scientific(gold: str) -> str | None:
    match = SCIENTIFIC.fullmatch(gold)
    return f"{match[1]} \\times 10^{{{int(match[2])}}}" if match else None


ANY = lambda gold: True  # noqa: E731
SAME: dict[str, Callable[[str], str | None]] = {
    "`$...$` inside the box": when(ANY, "$GOLD$"),
    "full stop behind it": when(ANY, "GOLD."),
    "`\\dfrac` for `\\frac`": replaced(r"\\frac", r"\\dfrac"),
    "`\\frac12` for `\\frac{1}{2}`": replaced(r"\\frac\{(\d)\}\{(\d)\}", r"\\frac\1\2"),
    "0.5 for `\\frac{1}{2}`": decimal,
    "`(` for `\\left(`": replaced(r"\\left|\\right(?!arrow)", ""),
    "spaces left out": replaced(r"(?<![a-zA-Z]) ", ""),
    "`12.0` for 12": when(is_integer, "GOLD.0"),
    "1,200 for 1200": with_commas,
    "25 for 025": replaced(r"^0+(?=\d+$)", ""),
    "a unit behind a number": when(is_integer, "GOLD \\text{ units}"),
    "`x =` before a number": when(is_integer, "x = GOLD"),
    "`^\\circ` behind a number": when(is_integer, "GOLD^\\circ"),
    "`\\$` before a number": when(is_integer, "\\$GOLD"),
    "`a \\times 10^{b}` for aeb": scientific,
}
OTHER: dict[str, Callable[[str], str | None]] = {
    "one more": lambda gold: str(int(gold) + 1) if is_integer(gold) else None,
    "the sign turned": lambda gold: str(-int(gold)) if is_integer(gold) and int(gold) else None,
    "a digit behind it": when(is_integer, "GOLD7"),
    "another numerator": replaced(r"\\frac\{(\d+)\}", r"\\frac{\g<1>1}"),
    "the first number of it alone": lambda gold: (
        found[0] if (found := re.findall(r"\d+", gold)) and not re.fullmatch(r"[-$\d.,e]*", gold) else None
    ),
}


def read_rows() -> dict[str, list[dict]]:
    """Return the rows with gold answers of every set that can be read here."""
    rows = {}
    for name, split in (*((name, "test") for name in BENCHMARKS if name in SOURCES), ("aime-919", "train")):
        try:
            rows[name] = resolve_split(SOURCES[name], split).rows
        except UserError as error:
            print(f"Left out: {name} ({error})", file=sys.stderr)
    return rows


def judge(answers: list[str], rows: list[dict]) -> dict[str, list]:
    """Return the verdicts on `answers`, boxed: ours, TRL's on golds as they are and on golds in a box."""
    texts = [f"\\boxed{{{answer}}}" for answer in answers]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    golds = [row["answer"] for row in rows]
    return {
        "ours": judge_texts(texts, [row.get(ACCEPTED) or row["answer"] for row in rows]),
        "trl": accuracy_reward(chats, golds),
        "boxed": accuracy_reward(chats, [f"\\boxed{{{gold}}}" for gold in golds]),
    }


def counted(verdicts: Iterable) -> str:
    verdicts = list(verdicts)
    right, skipped = sum(bool(verdict) for verdict in verdicts), sum(verdict is None for verdict in verdicts)
    return f"{right} ({skipped} skipped)" if skipped else str(right)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print every answer on which the verdicts differ")
    args = parser.parse_args()
    if not os.environ.get("L2T_DATA_ROOT"):
        print("Nothing to judge: set L2T_DATA_ROOT to a folder with benchmarks under their Hub ids.")
        return 0
    rows = read_rows()
    if not rows:
        print("None of the benchmarks lies in the folder that L2T_DATA_ROOT names.")
        return 0

    print("Golds written back verbatim, judged right:\n")
    print("| benchmark | golds | ours | TRL | TRL, golds boxed |\n|---|---|---|---|---|")
    differing = []
    for name, some in rows.items():
        golds = [row["answer"] for row in some]
        verdicts = judge(golds, some)
        print(f"| {name} | {len(golds)} | {' | '.join(counted(column) for column in verdicts.values())} |", flush=True)
        differing += [
            (name, gold, gold, *pair)
            for gold, *pair in zip(golds, verdicts["ours"], verdicts["trl"], strict=True)
            if bool(pair[0]) != bool(pair[1])
        ]

    for title, forms in (
        ("Other forms of the same golds, judged right", SAME),
        ("Other answers, judged right", OTHER),
    ):
        print(f"\n{title}:\n\n| form | answers | ours | TRL | TRL, golds boxed |\n|---|---|---|---|---|")
        for form, change in forms.items():
            pairs = {}
            for some in rows.values():
                for row in some:
                    answer = change(row["answer"])
                    if answer is not None and (forms is SAME or answer not in accepted_golds(row.get(ACCEPTED) or [])):
                        pairs.setdefault((answer, row["answer"]), row)
            if not pairs:
                continue
            verdicts = judge([answer for answer, _ in pairs], list(pairs.values()))
            print(
                f"| {form} | {len(pairs)} | {' | '.join(counted(column) for column in verdicts.values())} |",
                flush=True,
            )
            differing += [
                (form, answer, gold, *pair)
                for (answer, gold), *pair in zip(pairs, verdicts["ours"], verdicts["trl"], strict=True)
                if bool(pair[0]) != bool(pair[1])
            ]
    print(f"\n{len(differing)} verdicts differ between ours and TRL's on golds as they are.")
    if args.list:
        for where, answer, gold, ours, trl in differing:
            print(f"{where}: {answer!r} for {gold!r}: ours {ours}, TRL {trl}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
