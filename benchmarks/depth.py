r"""
Answers at the cuts of completions from vLLM: cuts of a completion side by side, and cuts of like length side by side.

    OMP_NUM_THREADS=1 python benchmarks/depth.py --model smollm2

Completions are random tokens; each is cut into equal episodes and asked at every cut, as `l2t eval --depth_curve` does.
One engine does both orders in turn, the first time of each unmeasured.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

from l2t_trl.data.benchmarks import Benchmark
from l2t_trl.evaluation.benchmark_run import Sampling, Task
from l2t_trl.evaluation.depth import Asking, ask_answers
from l2t_trl.evaluation.engines import VllmEngine
from l2t_trl.scripts.score import find_model, load_tokenizer


PROMPT_TOKENS, ANSWER_TOKENS = 64, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="Model folder, Hub id, tiny or smollm2.")
    parser.add_argument("--completions", type=int, default=8, help="Completions.")
    parser.add_argument("--tokens", type=int, default=512, help="Length of each.")
    parser.add_argument("--cuts", type=int, default=8, help="Episodes of each.")
    parser.add_argument("--answers", type=int, default=4, help="Answers at every cut.")
    parser.add_argument("--batch_size", type=int, default=32, help="Answers that are asked for together.")
    parser.add_argument("--repeats", type=int, default=3, help="Measured rounds.")
    parser.add_argument("--dtype", default="float32", help="Precision.")
    args = parser.parse_args()

    path = find_model(args.model)
    tokenizer, _ = load_tokenizer(path)
    source = random.Random(0)
    rows = [{"id": str(number), "question": "", "answer": "0"} for number in range(args.completions)]
    benchmark = Benchmark("random", len(rows), lambda: rows, lambda texts, rows: [False] * len(texts))
    words = [id for id in range(len(tokenizer)) if id not in tokenizer.all_special_ids]
    task = Task(benchmark, rows, [source.choices(words, k=PROMPT_TOKENS) for _ in rows])
    lines = [{"id": row["id"], "sample": 0, "ids": source.choices(words, k=args.tokens)} for row in rows]
    cuts = [[args.tokens * k // args.cuts for k in range(args.cuts + 1)] for _ in rows]
    sampling = Sampling(1, args.tokens, 0.6, 1.0, 0, args.batch_size)
    asking = Asking("\\boxed{", "auto", args.cuts, args.answers, ANSWER_TOKENS)
    engine = VllmEngine(path, tokenizer, args.dtype, PROMPT_TOKENS + args.tokens + 64, args.batch_size)

    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(1 + args.repeats):
        for shares_prefixes, times in seconds.items():
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                ask_answers(
                    task, lines, cuts, tokenizer, lambda: engine, sampling, asking, Path(folder), shares_prefixes
                )
                times.append(time.perf_counter() - start)
    together, by_length = (times[1:] for times in seconds.values())
    ratios = [one / other for one, other in zip(by_length, together, strict=True)]
    print(f"| order of {args.completions} x {args.cuts + 1} cuts | seconds, median |\n|---|---|")
    print(f"| like lengths | {statistics.median(by_length):.1f} |")
    print(f"| one completion after the other | {statistics.median(together):.1f} |")
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
