r"""
One L2T step against one GRPO step, in time and peak memory, on the same rollouts.

    python benchmarks/step.py --model tiny
    python benchmarks/step.py --model smollm2 --batch 8 --tokens 48 --steps 2 --rounds 1
    python benchmarks/step.py --model tiny --accelerate_config cpu_zero3 --processes 2

The learning rate is 0, so that both methods sample the very same completions at every step, and the ratio is that of
the work alone. Each method runs in a process of its own, in turns, and reports its median step and its peak memory;
the first step of a process, which warms up, is left out.

With an accelerate configuration both run under it, and what scoring communicates is counted: the bytes that a rank
receives or reduces in collectives that are called while it scores.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


CONFIGS = Path(__file__).parent.parent / "accelerate_configs"
# As in the recipes.
L2T_SETTINGS = {
    "tiny": {
        "episode_format": "tags",
        "answer_probe": "</think>\\boxed{",
        "answer_likelihood": "per_token",
    },
    "smollm2": {"episode_format": "auto", "answer_probe": "\n\nThe final answer is \\boxed{"},
}


class Traffic:
    """Bytes of the results of torch.distributed's collectives, counted while switched on."""

    COLLECTIVES = {
        "all_gather_into_tensor": 0,
        "all_gather": 0,
        "all_reduce": 0,
        "broadcast": 0,
        "reduce_scatter_tensor": 0,
    }

    def __init__(self):
        import torch.distributed

        self.is_on, self.bytes = False, 0
        for name, position in self.COLLECTIVES.items():
            setattr(torch.distributed, name, self._counted(getattr(torch.distributed, name), position))

    def _counted(self, collective, position):
        def counted(*args, **kwargs):
            if self.is_on:
                result = args[position] if args else next(iter(kwargs.values()))
                tensors = result if isinstance(result, (list, tuple)) else [result]
                self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            return collective(*args, **kwargs)

        return counted

    def during(self, function):
        def counted(*args, **kwargs):
            self.is_on = True
            try:
                return function(*args, **kwargs)
            finally:
                self.is_on = False

        return counted


def measure(args) -> dict[str, float]:
    """Run one method and return its seconds per step, its peak memory in MiB and the bytes that scoring moves."""
    traffic = Traffic()
    from transformers import AutoTokenizer
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
            model=folder,
            reward_funcs=accuracy,
            args=config_class(
                output_dir=output_dir,
                max_steps=args.steps + 1,
                per_device_train_batch_size=args.batch // args.processes,
                model_init_kwargs={"dtype": "float32"},
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
        if args.only == "l2t":
            trainer._token_advantages = traffic.during(trainer._token_advantages)
        trainer.train()
        trainer.accelerator.end_training()
    steps = [entry for entry in trainer.state.log_history if "step_time" in entry][1:]
    return {
        "seconds": statistics.median(entry["step_time"] for entry in steps),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "tokens": statistics.mean(entry["completions/mean_length"] for entry in steps),
        "traffic": traffic.bytes / (args.steps + 1) / 2**20,
        "scoring": statistics.median(entry.get("l2t/scoring_s", 0.0) for entry in steps),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", choices=["tiny", "smollm2"])
    parser.add_argument("--batch", type=int, default=128, help="completions per step")
    parser.add_argument("--tokens", type=int, default=200, help="longest completion")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes per method, in turns")
    parser.add_argument("--accelerate_config", help="run under accelerate_configs/NAME.yaml")
    parser.add_argument("--processes", type=int, default=1, help="number of processes under that configuration")
    parser.add_argument("--only", choices=["grpo", "l2t"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        measured = measure(args)
        if os.environ.get("RANK", "0") == "0":
            sys.stdout.write(json.dumps(measured) + "\n")
        return
    runs = {"grpo": [], "l2t": []}
    for _ in range(args.rounds):
        for method, results in runs.items():
            command = [__file__, *sys.argv[1:], "--only", method]
            if args.accelerate_config:
                config = CONFIGS / f"{args.accelerate_config}.yaml"
                options = ["--config_file", str(config), "--num_processes", str(args.processes)]
                command = ["-m", "accelerate.commands.launch", *options, "--main_process_port", "0", *command]
            command = [sys.executable, *command]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            results.append(json.loads([line for line in output.stdout.splitlines() if line.startswith('{"')][-1]))
    sys.stdout.write(f"{args.model}, {args.batch} completions of {runs['grpo'][0]['tokens']:.0f} tokens on average\n")
    for method, results in runs.items():
        seconds, memory = ([run[key] for run in results] for key in ("seconds", "memory"))
        scoring = statistics.median(run["scoring"] for run in results)
        sys.stdout.write(f"{method:5} {statistics.median(seconds):8.2f} s per step (scoring {scoring:.2f} s), ")
        sys.stdout.write(f"peak memory {statistics.median(memory):.0f} MiB")
        traffic = statistics.median(run["traffic"] for run in results)
        sys.stdout.write(f", {traffic:.2f} MiB communicated by scoring\n" if traffic else "\n")
    for key, name in (("seconds", "time"), ("memory", "peak memory")):
        ratios = [ours[key] / theirs[key] for ours, theirs in zip(runs["l2t"], runs["grpo"], strict=True)]
        sys.stdout.write(
            f"L2T / GRPO, {name}: {statistics.median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f})\n"
        )


if __name__ == "__main__":
    main()
