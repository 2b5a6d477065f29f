"""
Sets of completions to compare scorers on, beside those of `l2t eval`: folders as that command writes them.

Reference solutions are judged as if a model had written them. A small model is hardly ever right by itself, so it also
finishes reference solutions that were cut before their answer: then the answer's form is the model's, and it is often
right.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from l2t_trl.answers import BOXED, last_box
from l2t_trl.data.benchmarks import get_benchmark
from l2t_trl.data.loading import read_rows
from l2t_trl.data.registry import SOURCES
from l2t_trl.data.resolving import resolve_split
from l2t_trl.errors import UserError
from l2t_trl.evaluation.benchmark_run import COMPLETIONS, prepare
from l2t_trl.evaluation.journal import write_result


ROWS, SETTINGS = "rows.jsonl", "settings.json"
# Names of the columns with the whole solution: lighteval takes its gold answers from them.
SOLUTIONS = {"gsm8k": "answer", "math500": "solution"}
BATCH_SIZE = 32
# Column with the verdict that completions were published with.
PUBLISHED = "published_verdict"


def benchmark_rows(name: str) -> list[dict[str, str]]:
    """
    Return a benchmark's rows with `id`, `question`, `answer` (the gold alone) and `solution` (the data set's, whole).

    Raises:
        UserError: if they cannot be read or have no solutions.
    """
    if name not in SOLUTIONS:
        raise UserError(f"got benchmark {name!r}; scorers are compared on {', '.join(SOLUTIONS)}.")
    source = SOURCES[name]
    raw = read_rows(source.hub_id, source.config, source.splits["test"][0])
    rows = [
        {key: row[key] for key in ("id", "question", "answer")} | {"solution": whole[SOLUTIONS[name]]}
        for row, whole in zip(resolve_split(source, "test").rows, raw, strict=True)
    ]
    missing = [row["id"] for row in rows if not row["solution"]]
    if missing:
        raise UserError(
            f"{name}: {len(missing)} of {len(rows)} rows ({missing[0]} first) have no solution, which lighteval takes "
            f"its gold answers from. Set L2T_DATA_ROOT to a copy of {source.hub_id} that has them."
        )
    return rows


def conclusion_start(benchmark: str, solution: str) -> int:
    r"""Return where a solution's answer begins: at its last line (GSM8K), or its last `\boxed` (MATH500)."""
    return solution.rindex("####") if benchmark == "gsm8k" else solution.rindex(BOXED)


def in_words(benchmark: str, row: dict[str, str]) -> str:
    """Return a solution that ends in a sentence rather than in a marked answer."""
    solution = row["solution"]
    if benchmark == "gsm8k":
        start = conclusion_start(benchmark, solution)
        return f"{solution[:start]}The answer is {solution[start:].removeprefix('####').strip()}."
    while BOXED in solution:
        start = conclusion_start(benchmark, solution)
        content = last_box(solution)
        end = solution.index(content, start) + len(content)
        solution = solution[:start] + content + solution[end:].lstrip()[1:]
    return solution


def write_set(folder: Path, settings: dict, lines: list[dict], rows: list[dict] | None = None) -> None:
    """Write a set of completions; `rows` are those of the questions where they are not the benchmark's."""
    write_result(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")
    for name, records in ((COMPLETIONS, lines), (ROWS, rows)):
        if records is not None:
            write_result(folder / name, "".join(json.dumps(record) + "\n" for record in records))


def make_references(root: Path, benchmarks: Sequence[str]) -> None:
    """Write the reference solutions of benchmarks, verbatim and with their answers in words."""
    for benchmark in benchmarks:
        rows = benchmark_rows(benchmark)
        for title, texts in (
            ("reference", [row["solution"] for row in rows]),
            ("reference-in-words", [in_words(benchmark, row) for row in rows]),
        ):
            lines = [{"id": row["id"], "sample": 0, "text": text} for row, text in zip(rows, texts, strict=True)]
            write_set(root / f"{title}-{benchmark}", {"benchmark": benchmark, "model": f"({title})"}, lines)


def make_continuations(root: Path, benchmarks: Sequence[str], model: str, limit: int, max_tokens: int) -> None:
    """
    Write reference solutions of the first questions that a model has finished, greedily, with vLLM.

    Args:
        root (`Path`): folder that gets a folder per set.
        benchmarks (`Sequence[str]`): their names.
        model (`str`): as for `l2t eval`.
        limit (`int`): questions of each benchmark.
        max_tokens (`int`): longest ending, in tokens.
    """
    from tqdm import tqdm

    from l2t_trl.evaluation.engines import VllmEngine
    from l2t_trl.scripts.score import find_model, load_tokenizer

    path = find_model(model)
    tokenizer, _ = load_tokenizer(path)
    sets = []
    for benchmark in benchmarks:
        rows = benchmark_rows(benchmark)[:limit]
        prompts = prepare(get_benchmark(benchmark), tokenizer, limit).prompts
        beginnings = [row["solution"][: conclusion_start(benchmark, row["solution"])] for row in rows]
        # An open box: the model answers in one whatever its habits.
        lead = "The answer is " if benchmark == "gsm8k" else ""
        opened = [f"{beginning}{lead}{BOXED}{{" for beginning in beginnings]
        sets.append((f"continued-{benchmark}", benchmark, rows, prompts, beginnings))
        sets.append((f"continued-in-the-box-{benchmark}", benchmark, rows, prompts, opened))

    encoded = [
        [
            ids + tokenizer(beginning, add_special_tokens=False)["input_ids"]
            for ids, beginning in zip(prompts, beginnings, strict=True)
        ]
        for _, _, _, prompts, beginnings in sets
    ]
    longest = max(len(ids) for some in encoded for ids in some) + max_tokens
    engine = VllmEngine(path, tokenizer, "float32", longest, BATCH_SIZE)
    for (title, benchmark, rows, _, beginnings), prompts in zip(sets, encoded, strict=True):
        endings = []
        for start in tqdm(range(0, len(rows), BATCH_SIZE), desc=title, unit="batch"):
            batch = prompts[start : start + BATCH_SIZE]
            ids = engine.complete(batch, [0] * len(batch), max_tokens, temperature=0.0, top_p=1.0)
            endings += tokenizer.batch_decode(ids, skip_special_tokens=True)
        lines = [
            {"id": row["id"], "sample": 0, "text": beginning + ending, "beginning": len(beginning)}
            for row, beginning, ending in zip(rows, beginnings, endings, strict=True)
        ]
        settings = {"benchmark": benchmark, "model": model, "max_tokens": max_tokens, "temperature": 0.0}
        write_set(root / title, settings, lines)


def make_published_math(root: Path, file: Path) -> None:
    """
    Write the completions of MATH's questions that lie in Qwen2.5-Math's repository, eight each, with its verdicts.

    Args:
        root (`Path`): folder that gets the set.
        file (`Path`): its `evaluation/data/eval_rm_maj_example/math_cot_100.jsonl`.
    """
    records = read_lines(file)
    rows = [
        {"id": str(one["idx"]), "question": one["question"], "answer": one["answer"], "solution": one["solution"]}
        for one in records
    ]
    lines = [
        {"id": str(one["idx"]), "sample": sample, "text": text, PUBLISHED: verdict}
        for one in records
        for sample, (text, verdict) in enumerate(zip(one["response"], one["score"], strict=True))
    ]
    settings = {"benchmark": "math500", "model": "not named, from Qwen2.5-Math's repository"}
    write_set(root / "published-math", settings, lines, rows)


def make_published_gsm8k(root: Path, file: Path) -> None:
    """
    Write the completions of GSM8K's test questions that lie in its own repository, by four models, with its verdicts.

    Args:
        root (`Path`): folder that gets the set.
        file (`Path`): its `grade_school_math/data/example_model_solutions.jsonl`.
    """
    ids = {row["question"].strip(): row["id"] for row in benchmark_rows("gsm8k")}
    lines = []
    for one in read_lines(file):
        for sample, model in enumerate(("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")):
            # There, as in its copy of the reference solutions, `A:` stands for the data set's `####`.
            beginning, mark, answer = one[model]["solution"].rpartition("\nA: ")
            text = f"{beginning}\n#### {answer}" if mark else answer
            verdict = one[model]["is_correct"]
            lines.append({"id": ids[one["question"].strip()], "sample": sample, "text": text, PUBLISHED: verdict})
    write_set(root / "published-gsm8k", {"benchmark": "gsm8k", "model": "GPT-3, 6B and 175B, finetuned"}, lines)


def read_lines(file: Path) -> list[dict]:
    """
    Read a file of JSON lines.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise UserError(f"got {file}, which cannot be read; set a file of JSON lines ({error}).") from error


def read_set(folder: Path) -> tuple[str, list[dict], dict[str, dict]]:
    """
    Read a folder of completions.

    Returns:
        `tuple`: name of the benchmark, lines of completions, and rows by id.

    Raises:
        UserError: if it is no such folder, or a completion has no row.
    """
    if not (folder / SETTINGS).exists():
        raise UserError(
            f"got {folder}; set a folder that l2t eval has written for a benchmark, with {SETTINGS} in it."
        )
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    lines = read_lines(folder / COMPLETIONS)
    benchmark = settings["benchmark"]
    known = read_lines(folder / ROWS) if (folder / ROWS).exists() else benchmark_rows(benchmark)
    by_id = {row["id"]: row for row in known}
    strangers = [line["id"] for line in lines if line["id"] not in by_id]
    if strangers:
        raise UserError(f"{folder}: {len(strangers)} completions ({strangers[0]} first) belong to no row.")
    return benchmark, lines, by_id
