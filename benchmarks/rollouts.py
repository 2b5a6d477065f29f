r"""
Rollouts from transformers and from vLLM in the trainer's process: tokens per second, and what the engine's start costs.

    python benchmarks/rollouts.py --model tiny
    python benchmarks/rollouts.py --model smollm2 --tokens 64 --repeats 2
    python benchmarks/rollouts.py --model tiny --continuations 4
    python benchmarks/rollouts.py --model tiny --starts

Every contestant runs in a process of its own, in turns, builds a trainer and asks it for completions as a training
step does, the first time unmeasured. Tokens are those up to the end of each completion. Start is the time from the
process's start to the built trainer, imports included; first the time of the unmeasured rollout, sync of weights
included.

With `--continuations M`, what is asked for are M short continuations of every cut of completions of about the given
length (the estimator `rollout`), with vLLM's prefix caching and without.

With `--starts`, only the start is measured: with rollouts from transformers, from vLLM as it is started here, and from
vLLM as TRL alone would start it.

Every process has caches of its own, which are empty.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time


START = time.perf_counter()
ENGINES = ("transformers", "vllm")
WITHOUT_PREFIX_CACHE = "vllm-no-prefix-cache"
AS_TRL_STARTS_IT = "vllm-as-trl-starts-it"
CACHES = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CONFIG_ROOT")
CONTINUATION_TOKENS, CUTS, PROMPTS = 8, 8, 16


def build(args):
    """Return a trainer whose rollouts come from the engine that is asked for."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from transformers import AutoTokenizer

    from l2t_trl import L2TConfig, L2TTrainer
    from l2t_trl.data.arithmetic import make_dataset
    from l2t_trl.models import resolve_model
    from l2t_trl.rewards import accuracy

    if args.engine == WITHOUT_PREFIX_CACHE:
        from functools import partial

        from trl.generation import vllm_generation

        vllm_generation.LLM = partial(vllm_generation.LLM, enable_prefix_caching=False)
    if args.engine == AS_TRL_STARTS_IT:
        from trl.generation.vllm_generation import VLLMGeneration

        from l2t_trl.generation.engine import RolloutEngine

        RolloutEngine._init_vllm = VLLMGeneration._init_vllm
    folder = resolve_model(args.model)
    size = args.batch if args.continuations is None else PROMPTS * CUTS * args.continuations
    return L2TTrainer(
        model=folder,
        reward_funcs=accuracy,
        args=L2TConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=size,
            num_generations=8,
            max_completion_length=args.tokens if args.continuations is None else CONTINUATION_TOKENS,
            model_init_kwargs={"dtype": "float32"},
            use_vllm=args.engine != "transformers",
            vllm_max_model_length=1024,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
        train_dataset=make_dataset(max(args.batch // 8, 16), 0),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )


def prompts_of(trainer, args) -> list[list[int]]:
    tokenizer = trainer.processing_class
    texts = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        for row in trainer.train_dataset
    ]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if args.continuations is None:
        return [row for row in ids[: args.batch // 8] for _ in range(8)]
    filler = tokenizer("7+8=15\n", add_special_tokens=False)["input_ids"] * args.tokens
    ends = [args.tokens * cut // (CUTS - 1) for cut in range(CUTS)]
    return [row + filler[:end] for row in ids[:PROMPTS] for end in ends for _ in range(args.continuations)]


def measure(args) -> dict[str, float]:
    """Run one contestant."""
    trainer = build(args)
    start = time.perf_counter() - START
    if args.starts:
        return {"start": start}
    prompts, seconds, tokens = prompts_of(trainer, args), [], []
    for _ in range(args.repeats + 1):
        before = time.perf_counter()
        completions, _ = trainer._generate_single_turn(prompts, None, {}, 8)
        seconds.append(time.perf_counter() - before)
        tokens.append(sum(map(len, completions)))
    return {
        "start": start,
        "first": seconds[0],
        "speed": sum(tokens[1:]) / sum(seconds[1:]),
        "seconds": statistics.mean(seconds[1:]),
        "length": sum(tokens) / len(tokens) / len(prompts),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", choices=["tiny", "smollm2"])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128], help="completions per rollout")
    parser.add_argument("--tokens", type=int, default=200, help="longest completion")
    parser.add_argument("--repeats", type=int, default=4, help="measured rollouts of a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes per contestant, in turns")
    parser.add_argument("--starts", action="store_true", help="measure how long the engines take to start instead")
    parser.add_argument("--continuations", type=int, help="measure continuations of cuts instead, so many of each")
    parser.add_argument("--engine", choices=[*ENGINES, WITHOUT_PREFIX_CACHE, AS_TRL_STARTS_IT], help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=8, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        sys.stdout.write(json.dumps(measure(args)) + "\n")
        return
    if args.starts:
        starts = run_in_turns((*ENGINES, AS_TRL_STARTS_IT), args.rounds, args.batches[-1])
        for engine, results in starts.items():
            seconds = [result["start"] for result in results]
            sys.stdout.write(f"{args.model}, {engine:22} {statistics.median(seconds):6.1f} s to the built trainer ")
            sys.stdout.write(f"({min(seconds):.1f} to {max(seconds):.1f})\n")
        return
    is_rollout = args.continuations is None
    engines = ENGINES if is_rollout else (*ENGINES, WITHOUT_PREFIX_CACHE)
    for batch in args.batches if is_rollout else [PROMPTS]:
        runs = run_in_turns(engines, args.rounds, batch)
        for engine, results in runs.items():
            median = {key: statistics.median(result[key] for result in results) for key in results[0]}
            pairs = zip(results, runs["transformers"], strict=True)
            ratios = [result["speed"] / base["speed"] for result, base in pairs]
            sys.stdout.write(
                f"{args.model}, {batch} {'completions' if is_rollout else 'prompts'}, {engine:20} "
                f"{median['speed']:6.0f} tokens/s ({statistics.median(ratios):.2f}x, {min(ratios):.2f} to {max(ratios):.2f}), "
                f"{median['seconds']:.2f} s per rollout of {median['length']:.0f} tokens on average, "
                f"start {median['start']:.1f} s, first {median['first']:.1f} s\n"
            )
            sys.stdout.flush()


def run_in_turns(engines, rounds: int, batch: int) -> dict[str, list[dict]]:
    """Run every contestant in a process of its own, in turns, and return what they report."""
    runs = {engine: [] for engine in engines}
    for _ in range(rounds):
        for engine, results in runs.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--engine", engine, "--batch", str(batch)]
            with tempfile.TemporaryDirectory() as caches:
                environment = os.environ | dict.fromkeys(CACHES, caches)
                output = subprocess.run(
                    command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
                )
            results.append(json.loads(output.stdout.splitlines()[-1]))
    return runs


if __name__ == "__main__":
    main()
