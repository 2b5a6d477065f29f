"""
A short run of L2T for comparison between process counts and ZeRO stages; started by accelerate's launcher.

Completions are scripted by question and place in the group, so that every arrangement trains on the same ones. Rank 0
writes what it saw: advantages, gains and penalties of every step in global order, and the final weights.
"""

import argparse
import json
import os
import signal
from pathlib import Path

from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from safetensors.torch import save_file
from transformers import AutoTokenizer
from trl import GRPOTrainer

from l2t_trl import L2TConfig, L2TTrainer
from l2t_trl.launch import end_process
from trainers import SETTINGS, parity, questions


GLOBAL_BATCH = 8


def scripted(question: str, place: int) -> str:
    """Completions of different numbers of episodes, half of them without any: four ranks leave two with none at all."""
    first = question.split()[0]
    if place < 2:
        return f"no episodes, {first}" * (place + 1)
    episodes = "".join(f"<episode_{k}>{first}+{k * place}</episode_{k}>" for k in range(1, place + 2))
    return f"<think>{episodes}</think>{place}"


def recording(base):
    class Recording(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.record = {"advantages": [], "gains": [], "penalties": []}

        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            offset = self.accelerator.process_index * len(prompt_ids)
            texts = self._tokenizer.batch_decode(prompt_ids)
            questions = [text.split("user\n")[1] for text in texts]
            completions = [
                scripted(question, (offset + i) % self.num_generations) for i, question in enumerate(questions)
            ]
            ids = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in completions]
            return [row + [self._tokenizer.eos_token_id] for row in ids], None

        def _log_episodes(self, spans, per_episode):
            super()._log_episodes(spans, per_episode)
            for name, values in (("gains", "fitting_gain"), ("penalties", "compression_penalty")):
                self._keep(name, per_episode[values])

        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            self._keep("advantages", output["advantages"].reshape(len(inputs), -1))
            return output

        def _keep(self, name, values):
            self.record[name].append(gather_object(values.tolist()))

    return Recording


def fail(*_, **__):
    raise RuntimeError("made up: this rank cannot score")


def kill_in_save(trainer, step: int):
    """Let the process die as by `kill -9` while it writes the checkpoint of a step, between two of its files."""
    save = trainer._save_rng_state

    def killed(output_dir):
        if trainer.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        save(output_dir)

    trainer._save_rng_state = killed


def record_gathers(record: list):
    """Let DeepSpeed's context for gathering parameters note the shapes that it gathers."""
    from deepspeed import zero

    class Recorded(zero.GatheredParameters):
        def __init__(self, params, *args, **kwargs):
            params = list(params)
            record.append([list(parameter.ds_shape) for parameter in params])
            super().__init__(params, *args, **kwargs)

    zero.GatheredParameters = Recorded


def run(
    model: str,
    folder: Path,
    method: str = "l2t",
    lora: bool = False,
    resume: str | None = None,
    fail_on_rank: int | None = None,
    records_gathers: bool = False,
    killed_in_save: int | None = None,
    **settings,
):
    """One run; its record and final weights go to `folder`."""
    AcceleratorState._reset_state(reset_partial_state=False)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    config = L2TConfig(
        output_dir=str(folder),
        **{
            **SETTINGS,
            "per_device_train_batch_size": GLOBAL_BATCH // world,
            "max_steps": 3,
            "log_completions": True,
            "num_completions_to_print": 0,
            "max_grad_norm": 0.05,
            "gradient_checkpointing": False,
            "answer_likelihood": "per_token",
            "answer_probe": "</think>",
            "process_reward_coef": 30.0,
            **settings,
        },
    )
    peft_config = None
    if lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
    trainer = recording(L2TTrainer if method == "l2t" else GRPOTrainer)(
        model=model,
        reward_funcs=parity,
        args=config,
        train_dataset=questions(),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=peft_config,
    )
    if fail_on_rank == trainer.accelerator.process_index:
        trainer._scorer.score = fail
    if killed_in_save is not None:
        kill_in_save(trainer, killed_in_save)
    gathers = []
    if records_gathers:
        record_gathers(gathers)
    trainer.train(resume_from_checkpoint=resume)
    trainer.record["gathers"] = list(gathers)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        (folder / "record.json").write_text(json.dumps(trainer.record))
        weights = {name: value.detach().float().clone() for name, value in state.items()}
        save_file(weights, folder / "weights.safetensors")
    return trainer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--runs", type=json.loads, required=True, help="settings of each run by name")
    args = parser.parse_args()
    for name, settings in args.runs.items():
        trainer = run(args.model, args.output / name, **settings)
    trainer.accelerator.end_training()
    end_process()


if __name__ == "__main__":
    main()
