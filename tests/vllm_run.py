"""
Short trainings whose rollouts come from vLLM, each in a process of its own: an engine leaves traces in its process.

    python tests/vllm_run.py NAME --model FOLDER --output FOLDER [--settings JSON]

writes what was seen to record.json in the output folder.
"""

import argparse
import json
import os
import signal
from pathlib import Path


os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch  # noqa: E402

from l2t_trl import L2TTrainer  # noqa: E402
from l2t_trl.errors import RolloutError  # noqa: E402
from l2t_trl.launch import end_process  # noqa: E402
from trainers import make_trainer  # noqa: E402


# Large enough that an engine with the weights of the step before is found out.
LEARNING_RATE = 2e-2


def train(model: str, output: Path, steps: int = 3, resume: str | None = None, callback=None, **settings):
    """Train, and return the trainer and its record."""
    adapter = None
    if settings.pop("lora", False):
        from peft import LoraConfig

        adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
    trainer = make_trainer(
        L2TTrainer,
        model,
        output,
        **{
            "use_vllm": True,
            "vllm_max_model_length": 256,
            "max_steps": steps,
            "learning_rate": LEARNING_RATE,
            "gradient_checkpointing": False,
            "answer_likelihood": "per_token",
            "answer_probe": "</think>",
            "peft_config": adapter,
            **settings,
        },
    )
    if callback is not None:
        trainer.add_callback(callback)
    try:
        trainer.train(resume_from_checkpoint=resume)
        error = None
    except RolloutError as failure:
        error = str(failure)
    logs = [entry for entry in trainer.state.log_history if "step_time" in entry]
    return trainer, {"logs": logs, "error": error, "threads": torch.get_num_threads()}


def colocate(model: str, output: Path, **settings):
    """Train, then look at one more generation whose engine has not been given the last step's weights."""
    trainer, record = train(model, output, **settings)
    rows = [row for row in trainer.train_dataset.select(range(2)) for _ in range(4)]
    trainer.model.train()
    trainer._last_loaded_step = trainer.state.global_step
    trainer._generate_and_score_completions(rows)
    (record["stale"],) = trainer._metrics["train"]["sampling/sampling_logp_difference/max"]
    record["memory_policy"] = Path("/proc/self/numa_maps").read_text().split()[1]
    return record


def server(model: str, output: Path, kill_after: tuple[int, int] | None = None, **settings):
    """Train against a server; `kill_after` is a step and the process group that does not outlive it."""
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if kill_after is not None and state.global_step == kill_after[0]:
                os.killpg(kill_after[1], signal.SIGKILL)

    return train(model, output, vllm_mode="server", callback=Kill(), **settings)[1]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=["colocate", "server"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--settings", type=json.loads, default={})
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    record = globals()[args.name](args.model, args.output, **args.settings)
    if os.environ.get("RANK", "0") == "0":
        (args.output / "record.json").write_text(json.dumps(record))
    end_process()


if __name__ == "__main__":
    main()
