r"""
Peak memory of training against what `l2t plan` reckons, on models of several sizes without a GPU.

    python benchmarks/memory.py

Each run is a process of its own in fp32 with transformers' rollouts, and ends when the largest phase has come twice.
Measured is the process's peak resident memory less what it held before the model was made: by then it has trained a
model of no size for a step, so that all libraries are loaded. It is measured twice: with a malloc that gives freed
blocks back at once, so that only what is alive is resident, and as glibc's malloc is by default (`--alive_only` leaves
the latter out).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from l2t_trl.memory import GIB, LIBRARY_BYTES, Plan, Setup, make_plan
from l2t_trl.model_shapes import Shape, read_shape


# Hidden size, layers, heads, key-value heads, MLP width, vocabulary.
SIZES = {
    "nothing": (32, 1, 2, 1, 64, 400),
    "9 M": (256, 6, 4, 2, 768, 8192),
    "42 M": (512, 8, 8, 2, 1536, 16384),
    "134 M": (576, 30, 9, 3, 1536, 49152),  # SmolLM2's
}
TIED = "134 M"
# Name, method, completions per pass, passes per step, longest completion, gradient checkpointing, KL term.
RUNS = {
    "GRPO": ("grpo", 8, 1, 224, False, 0.0),
    "GRPO, checkpointing, 2 passes": ("grpo", 8, 2, 224, True, 0.0),
    "GRPO, KL term": ("grpo", 8, 1, 96, False, 0.001),
    "L2T": ("l2t", 8, 1, 224, False, 0.0),
    "L2T, checkpointing": ("l2t", 16, 1, 352, True, 0.0),
    "GRPO, checkpointing, short": ("grpo", 8, 1, 48, True, 0.0),
    "L2T, checkpointing, short": ("l2t", 8, 1, 48, True, 0.0),
}
# Blocks of so many bytes are mapped one by one, and unmapped when they are freed; else up to 32 MiB come from the heap.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
EPISODES = 5
PROMPT_TOKENS = 27  # of the longest prompt of the arithmetic world
PROBE_TOKENS = 30  # of probe and answer, at most


def plan_of(shape: Shape, run: str) -> Plan:
    """Return what the arithmetic says of a run of `RUNS`."""
    method, batch, accumulation, length, checkpoints, beta = RUNS[run]
    return make_plan(
        shape,
        Setup(
            is_gpu=False,
            is_mixed=False,
            batch_size=batch,
            accumulation=accumulation,
            rollout_batch_size=batch * accumulation,
            prompt_length=PROMPT_TOKENS,
            completion_length=length,
            checkpoints_activations=checkpoints,
            has_reference=beta > 0,
            scoring_batch_size=batch if method == "l2t" else None,
            num_probe_tokens=(EPISODES + 1) * PROBE_TOKENS,
        ),
    )


def save_model(size: str, folder: Path):
    """Write a model of random weights with the embedded model's tokenizer."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from l2t_trl.models import TINY_FOLDER

    hidden, layers, heads, key_value_heads, intermediate, vocabulary = SIZES[size]
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        tie_word_embeddings=size == TIED,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_FOLDER).save_pretrained(folder)


def train(folder: Path, run: str, steps: int):
    """Train as `RUNS` has it."""
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from l2t_trl import L2TConfig, L2TTrainer
    from l2t_trl.data.arithmetic import make_dataset

    method, batch, accumulation, length, checkpoints, beta = RUNS[run]
    trainer_class, config_class, settings = GRPOTrainer, GRPOConfig, {}
    if method == "l2t":
        trainer_class, config_class = L2TTrainer, L2TConfig
        settings = {"max_episodes": EPISODES, "episode_format": "auto"}
    with tempfile.TemporaryDirectory() as output_dir:
        args = config_class(
            output_dir=output_dir,
            max_steps=steps,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            num_generations=8,
            max_completion_length=length,
            gradient_checkpointing=checkpoints,
            beta=beta,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        dataset = make_dataset(64, 0)
        # Random text has no accuracy; its length will do.
        trainer = trainer_class(
            model=str(folder),
            reward_funcs=lambda completions, **_: [float(len(row[0]["content"]) % 2) for row in completions],
            args=args,
            train_dataset=dataset,
            processing_class=tokenizer,
        )
        trainer.train()


def resident(key: str) -> int:
    """Return a line of this process's status, `VmRSS` (now) or `VmHWM` (peak), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}.")


def measure(args) -> dict[str, int]:
    """Return the peak of one run above the process's baseline, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        save_model("nothing", Path(folder))
        train(Path(folder), args.run, 1)
    baseline = resident("VmRSS")
    train(Path(args.folder), args.run, 2)
    return {"baseline": baseline, "peak": resident("VmHWM") - baseline}


def measure_apart(folder: str, run: str, environment: dict[str, str]) -> int:
    """Return the peak of one run in a process of its own, in bytes."""
    command = [sys.executable, __file__, "--folder", folder, "--run", run]
    environment = {**os.environ, **environment}
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    return json.loads(output.stdout.splitlines()[-1])["peak"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["9 M", "42 M"], choices=SIZES)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    parser.add_argument("--alive_only", action="store_true", help="leave out the runs with the default malloc")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        sys.stdout.write(json.dumps(measure(args)) + "\n")
        return
    sys.stdout.write("| model | run | largest phase | plan, GiB | alive, GiB | alive / plan | resident, GiB |\n")
    sys.stdout.write("|---|---|---|---|---|---|---|\n")
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            save_model(size, Path(folder))
            shape = read_shape(Path(folder, "config.json"))
            for run in args.runs:
                plan = plan_of(shape, run)
                planned = plan.peak - LIBRARY_BYTES  # part of the baseline here
                alive = measure_apart(folder, run, GIVE_BACK)
                resident_peak = "" if args.alive_only else f"{measure_apart(folder, run, {}) / GIB:.2f}"
                sys.stdout.write(
                    f"| {size} | {run} | {plan.peak_phase} | {planned / GIB:.2f} | {alive / GIB:.2f} | "
                    f"{alive / planned:.2f} | {resident_peak} |\n"
                )
                sys.stdout.flush()


if __name__ == "__main__":
    main()
