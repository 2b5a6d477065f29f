r"""
One L2T step against one GRPO step, in time and peak memory, on the same rollouts.

    python benchmarks/step.py --model tiny
    python benchmarks/step.py --model smollm2 --batch 8 --tokens 48 --steps 2 --rounds 2

The learning rate is 0, so that both methods sample the very same completions at every step, and the ratio is that of
the work alone. Each method runs in a process of its own, in turns, and reports its median step and its peak memory;
the first step of a process, which warms up, is left out.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile


# As in the recipes.
L2T_SETTINGS = {
    "tiny": {
        "episode_format": "tags",
        "answer_probe": "</think>\\boxed{",
        "answer_likelihood": "per_token",
    },
    "smollm2": {"episode_format": "auto", "answer_probe": "\n\nThe final answer is \\boxed{"},
}


def measure(args) -> dict[str, float]:
    """Run one method and return its seconds per step and its peak memory in MiB."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from l2t_trl import L2TConfig, L2TTrainer
    from l2t_trl.data.arithmetic import make_dataset
    from l2t_trl.models import resolve_model
    from l2t_trl.rewards import accuracy

    folder = resolve_model(args.model)
    trainer_class, config_class = (L2TTrainer, L2TConfig) if args.only == "l2t" else (GRPOTrainer, GRPOConfig)
    settings = {}
    if args.only == "l2t":
        settings = L2T_SETTINGS[args.model]
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = trainer_class(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
            reward_funcs=accuracy,
            args=config_class(
                output_dir=output_dir,
                max_steps=args.steps + 1,
                per_device_train_batch_size=args.batch,
                num_generations=8,
                max_completion_length=args.tokens,
                learning_rate=0.0,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **settings,
            ),
            train_dataset=make_dataset(256, 0),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        trainer.train()
    steps = [entry for entry in trainer.state.log_history if "step_time" in entry][1:]
    return {
        "seconds": statistics.median(entry["step_time"] for entry in steps),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "tokens": statistics.mean(entry["completions/mean_length"] for entry in steps),
        "scoring": statistics.median(entry.get("l2t/scoring_s", 0.0) for entry in steps),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", choices=["tiny", "smollm2"])
    parser.add_argument("--batch", type=int, default=128, help="completions per step")
    parser.add_argument("--tokens", type=int, default=200, help="longest completion")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes per method, in turns")
    parser.add_argument("--only", choices=["grpo", "l2t"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        sys.stdout.write(json.dumps(measure(args)) + "\n")
        return
    runs = {"grpo": [], "l2t": []}
    for _ in range(args.rounds):
        for method, results in runs.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--only", method]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            results.append(json.loads(output.stdout.splitlines()[-1]))
    sys.stdout.write(f"{args.model}, {args.batch} completions of {runs['grpo'][0]['tokens']:.0f} tokens on average\n")
    for method, results in runs.items():
        seconds, memory = ([run[key] for run in results] for key in ("seconds", "memory"))
        scoring = statistics.median(run["scoring"] for run in results)
        sys.stdout.write(f"{method:5} {statistics.median(seconds):8.2f} s per step (scoring {scoring:.2f} s), ")
        sys.stdout.write(f"peak memory {statistics.median(memory):.0f} MiB\n")
    for key, name in (("seconds", "time"), ("memory", "peak memory")):
        ratios = [ours[key] / theirs[key] for ours, theirs in zip(runs["l2t"], runs["grpo"], strict=True)]
        sys.stdout.write(
            f"L2T / GRPO, {name}: {statistics.median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f})\n"
        )


if __name__ == "__main__":
    main()
