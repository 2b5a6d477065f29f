"""
Our verdicts on completions beside those of TRL's, lighteval's and verl's own scorers, on the very same texts.

    python benchmarks/scorers.py --scorers_python scorers-venv/bin/python FOLDER [FOLDER ...] [--list]

A folder is one that `l2t eval` writes for gsm8k or math500 (with `completions.jsonl`), or one of those that this
command makes, all of them below ROOT:

    python benchmarks/scorers.py --make ROOT --model smollm2 --limit 200 \\
        [--published_gsm8k example_model_solutions.jsonl] [--published_math math_cot_100.jsonl]

- `reference-*`: the data set's own solutions, `reference-in-words-*`: the same, ending in a sentence with the answer;
- `continued-*`: reference solutions cut before the answer and finished by the model, `continued-in-the-box-*`: cut
  behind `\\boxed{` (greedily, with vLLM);
- `published-gsm8k`: one completion of each of four models (GPT-3 of 6B and 175B, finetuned) for all questions, from the
  file `grade_school_math/data/example_model_solutions.jsonl` of https://github.com/openai/grade-school-math;
- `published-math`: a strong model's, eight for each of 100 questions of MATH, from the file
  `evaluation/data/eval_rm_maj_example/math_cot_100.jsonl` of https://github.com/QwenLM/Qwen2.5-Math. Both files have
  verdicts of their authors, which are shown as well.

The data sets come from the Hub, or from the folder that L2T_DATA_ROOT names, MATH500 with its column `solution`.
lighteval and verl need an environment of their own, with no more than what their scorers import:

    python3 -m venv scorers-venv
    scorers-venv/bin/pip install --no-deps lighteval==0.13.0 verl==0.9.1
    scorers-venv/bin/pip install torch==2.13.0 transformers==5.24.0 numpy==2.3.5 datasets==5.2.0 inspect-ai==0.3.285 \\
        latex2sympy2_extended==1.0.6 aenum==3.1.15 nltk==3.9.1 rouge_score==0.1.2 termcolor==2.3.0 sacrebleu==2.6.0 \\
        scikit-learn==1.9.1 pytablewriter==1.2.1 ray==2.60.0 tensordict==0.15.3 omegaconf==2.4.0

(pip warns that both packages miss others, which only running models takes.)
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from peers.completions import (
    COMPLETIONS,
    PUBLISHED,
    SOLUTIONS,
    make_continuations,
    make_published_gsm8k,
    make_published_math,
    make_references,
    read_set,
)
from trl.rewards import accuracy_reward

from l2t_trl.answers import BOXED, boxed_answer, final_answer, judge_texts
from l2t_trl.errors import UserError


JUDGE = Path(__file__).parent / "peers" / "judge.py"
OURS = "ours"


def ask_peers(python: str, cases: Sequence[dict]) -> tuple[dict[str, str], list[dict[str, bool]]]:
    """
    Return the versions of lighteval and verl, and their verdicts on each case.

    Raises:
        UserError: if they cannot be asked.
    """
    with tempfile.TemporaryDirectory() as scratch:
        questions, verdicts = Path(scratch, "cases.jsonl"), Path(scratch, "verdicts.jsonl")
        questions.write_text("".join(json.dumps(case) + "\n" for case in cases), encoding="utf-8")
        try:
            # What they print is no result.
            subprocess.run([python, JUDGE, questions, verdicts], check=True, stdout=sys.stderr)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(
                f"got --scorers_python {python}, which judges nothing ({error}); set the interpreter of an environment "
                "with lighteval and verl: --help says how to make one."
            ) from error
        versions, *judged = [json.loads(line) for line in verdicts.read_text(encoding="utf-8").split("\n") if line]
    return versions, judged


def judge_here(cases: Sequence[dict]) -> list[dict[str, bool | None]]:
    """Return our verdicts and those of TRL's reward, with golds as they are and in a box."""
    texts, golds = [case["text"] for case in cases], [case["answer"] for case in cases]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    columns = {
        OURS: judge_texts(texts, golds),
        "TRL": accuracy_reward(chats, golds),
        "TRL, golds boxed": accuracy_reward(chats, [f"\\boxed{{{gold}}}" for gold in golds]),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def mark_of(text: str) -> str:
    """Return by what our judge finds the answer of a completion, or why it finds none."""
    if BOXED in text:
        return "a closed box" if boxed_answer(text) else "a box left open or empty"
    return "####" if final_answer(text) else "no mark"


def compared(verdicts: Sequence[dict[str, bool | None]], name: str) -> str:
    """Return how many a scorer calls right, with those that ours does not (+) and those that only ours does (-)."""
    pairs = Counter((bool(one[OURS]), bool(one[name])) for one in verdicts)
    more, fewer, skipped = pairs[False, True], pairs[True, False], sum(one[name] is None for one in verdicts)
    notes = [f"+{more}"] * bool(more) + [f"-{fewer}"] * bool(fewer) + [f"{skipped} skipped"] * bool(skipped)
    return f"{pairs[True, True] + more}" + (f" ({', '.join(notes)})" if notes else "")


def summary_table(sets: dict[str, list[dict[str, bool | None]]]) -> list[str]:
    """Return a Markdown table of sets' verdicts: how many each scorer calls right, and where it differs from ours."""
    names = list(dict.fromkeys(name for verdicts in sets.values() for name in verdicts[0]))
    lines = [f"| completions | judged | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for title, verdicts in sets.items():
        cells = [compared(verdicts, name) if name in verdicts[0] else "" for name in names]
        lines.append(f"| {title} | {len(verdicts)} | {' | '.join(cells)} |")
    return lines


def differences(cases: Sequence[dict], verdicts: Sequence[dict[str, bool | None]]) -> list[tuple]:
    """Return `(set, scorer, its verdict, mark, case)` of every verdict that differs from ours."""
    words = {None: "skipped", True: "right", False: "wrong"}
    return [
        (case["set"], name, words[verdict if verdict is None else bool(verdict)], mark_of(case["text"]), case)
        for case, one in zip(cases, verdicts, strict=True)
        for name, verdict in one.items()
        if bool(verdict) != bool(one[OURS])
    ]


def kinds_table(differing: Sequence[tuple]) -> list[str]:
    """Return a Markdown table of the kinds of differences and their numbers."""
    counts = Counter(tuple(kind) for *kind, _ in differing)
    rows = [f"| {' | '.join(kind)} | {number} |" for kind, number in counts.items()]
    head = ["| completions | scorer | its verdict, not ours | answer marked by | number |", "|---|---|---|---|---|"]
    return [*head, *rows]


def compare(folders: Sequence[Path], python: str, lists: bool) -> None:
    """Judge all sets, and print their tables."""
    cases = []
    for folder in folders:
        benchmark, lines, rows = read_set(folder)
        for line in lines:
            row = rows[line["id"]]
            title = "/".join(folder.resolve().parts[-2:])
            cases.append(row | {"set": title, "benchmark": benchmark, "stored": line.get("is_correct")} | line)
    sent = ("benchmark", "question", "solution", "answer", "text")
    versions, elsewhere = ask_peers(python, [{key: case[key] for key in sent} for case in cases])
    versions |= {name: version(name) for name in ("trl", "math-verify")}
    print(", ".join(f"{name} {number}" for name, number in versions.items()))
    verdicts = [
        here | there | ({"as published": case[PUBLISHED]} if PUBLISHED in case else {})
        for case, here, there in zip(cases, judge_here(cases), elsewhere, strict=True)
    ]
    changed = sum(case["stored"] not in (None, one[OURS]) for case, one in zip(cases, verdicts, strict=True))
    if changed:
        print(f"{changed} of our verdicts are not those in {COMPLETIONS}, which another version has judged.")
    for benchmark in dict.fromkeys(case["benchmark"] for case in cases):
        sets: dict[str, list] = {}
        for case, one in zip(cases, verdicts, strict=True):
            if case["benchmark"] == benchmark:
                sets.setdefault(case["set"], []).append(one)
        print(f"\n{benchmark}, judged right (+ those that ours calls wrong, - those that only ours calls right):\n")
        print(*summary_table(sets), sep="\n")
    differing = differences(cases, verdicts)
    print("\nVerdicts other than ours:\n")
    print(*kinds_table(differing), sep="\n")
    if lists:
        print()
        for title, name, verdict, mark, case in differing:
            print(
                f"{title}, {case['id']}, sample {case['sample']}: {verdict} by {name}; marked by {mark}, read by us as "
                f"{final_answer(case['text'])!r} for {case['answer']!r}; ends in {case['text'][-120:]!r}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="completions to judge")
    parser.add_argument("--scorers_python", metavar="PATH", help="interpreter that has lighteval and verl")
    parser.add_argument("--list", action="store_true", help="print every difference")
    parser.add_argument("--make", type=Path, metavar="ROOT", help="make sets of completions, and judge nothing")
    parser.add_argument("--benchmark", choices=SOLUTIONS, help="make sets of this one only")
    parser.add_argument("--model", default="smollm2", help="model that finishes solutions (default: smollm2)")
    parser.add_argument("--limit", type=int, default=200, help="questions of each benchmark for it (default: 200)")
    parser.add_argument("--max_tokens", type=int, default=64, help="longest of its endings (default: 64)")
    parser.add_argument("--published_gsm8k", type=Path, metavar="FILE", help="makes a set of it, see above")
    parser.add_argument("--published_math", type=Path, metavar="FILE", help="makes a set of it, see above")
    args = parser.parse_args()
    try:
        if args.make:
            benchmarks = [args.benchmark] if args.benchmark else list(SOLUTIONS)
            make_references(args.make, benchmarks)
            for file, make in (
                (args.published_gsm8k, make_published_gsm8k),
                (args.published_math, make_published_math),
            ):
                if file:
                    make(args.make, file)
            make_continuations(args.make, benchmarks, args.model, args.limit, args.max_tokens)
        elif args.folders and args.scorers_python:
            compare(args.folders, args.scorers_python, args.list)
        else:
            print("Nothing to judge: name folders with completions, and --scorers_python.")
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
