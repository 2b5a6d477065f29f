"""Builders of small trainers."""

from types import SimpleNamespace

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from l2t_trl import L2TConfig


SETTINGS = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 16,
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "learning_rate": 1e-3,
    "disable_tqdm": True,
    "seed": 7,
}


def questions(size: int = 16) -> Dataset:
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": f"{i} + 11?"}], "answer": str(i + 11)} for i in range(size)]
    )


def parity(completions, **kwargs) -> list[float]:
    """An outcome reward that random completions meet half the time."""
    return [float(len(completion[0]["content"]) % 2) for completion in completions]


def make_trainer(trainer_class, folder, output_dir, *, reward=parity, dataset=None, model=None, **settings):
    config_class = GRPOConfig if trainer_class is GRPOTrainer else L2TConfig
    peft_config, eval_dataset = settings.pop("peft_config", None), settings.pop("eval_dataset", None)
    args = config_class(output_dir=str(output_dir), **{**SETTINGS, **settings})
    return trainer_class(
        model=model if model is not None else AutoModelForCausalLM.from_pretrained(folder),
        reward_funcs=reward,
        args=args,
        train_dataset=dataset if dataset is not None else questions(),
        eval_dataset=eval_dataset,
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=peft_config,
    )


def loading_settings(**changes) -> SimpleNamespace:
    """What loading data reads of the trainer's settings."""
    defaults = {"seed": 0, "answer_column": "answer", "correctness_estimator": "answer_likelihood"}
    return SimpleNamespace(**{**defaults, "max_prompt_length": None, "on_bad_row": "stop", **changes})
