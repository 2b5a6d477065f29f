"""What this package relies on inside TRL: an update that breaks it fails here, by name."""

import inspect
from collections import deque

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer

from l2t_trl import L2TConfig, L2TTrainer
from l2t_trl.generation.client import RolloutClient
from l2t_trl.generation.engine import RolloutEngine
from trainers import make_trainer


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_generate_and_score_completions", ["self", "inputs"]),
        ("_calculate_rewards", ["self", "inputs", "prompts", "completions", "completion_ids_list"]),
        ("_compute_loss", ["self", "model", "inputs"]),
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("_load_optimizer_and_scheduler", ["self", "checkpoint"]),
        ("log", ["self", "logs", "start_time"]),
        ("train", ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"]),
        ("training_step", ["self", "model", "inputs", "num_items_in_batch"]),
        (
            "_generate_single_turn",
            ["self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
        ),
    ],
)
def test_hooks_keep_their_signatures(name, parameters):
    assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == parameters


def test_only_known_hooks_are_overridden():
    ours = {name for name in vars(L2TTrainer) if name in dir(GRPOTrainer) and callable(getattr(L2TTrainer, name))}
    dunder = {name for name in ours if name.startswith("__")}
    assert ours - dunder == {
        "_calculate_rewards",
        "_generate_and_score_completions",
        "_load_optimizer_and_scheduler",
        "_save_checkpoint",
        "evaluate",
        "log",
        "train",
        "training_step",
    }


def test_field_names_are_new_to_grpo():
    # But for the one whose default is another.
    parent = set(GRPOConfig.__dataclass_fields__)
    assert parent & set(L2TConfig.__annotations__) == {"vllm_importance_sampling_mode"}


def test_the_engine_of_rollouts_is_where_ours_takes_its_place():
    source = inspect.getsource(GRPOTrainer.__init__)
    assert "self.vllm_generation = VLLMGeneration(" in source and hasattr(grpo_trainer, "VLLMGeneration")
    names = {name for name in vars(RolloutEngine) if hasattr(VLLMGeneration, name) and not name.startswith("__")}
    assert names == {"_init_vllm", "generate", "sync_weights"}
    assert callable(VLLMGeneration._iter_named_params)
    names = {name for name in vars(RolloutClient) if hasattr(VLLMClient, name) and not name.startswith("__")}
    assert names == {"_get", "_post", "check_server", "generate"}


@pytest.fixture(scope="module")
def scored(tiny_folder, tmp_path_factory):
    """A GRPO trainer and what one generation batch becomes."""
    trainer = make_trainer(GRPOTrainer, tiny_folder, tmp_path_factory.mktemp("grpo"), log_completions=True)
    trainer.model.train()
    rows = [row for row in trainer.train_dataset.select(range(2)) for _ in range(4)]
    return trainer, rows, trainer._generate_and_score_completions(rows)


def test_output_rows_line_up_with_inputs(scored):
    trainer, rows, output = scored
    for row, ids, mask in zip(rows, output["prompt_ids"], output["prompt_mask"], strict=True):
        question = row["prompt"][0]["content"]
        assert question in trainer.processing_class.decode(ids[mask.bool()])


def test_output_is_padded_outside(scored):
    _, _, output = scored
    assert {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages"} <= output.keys()
    assert output["advantages"].shape == (8,)
    assert (output["prompt_mask"].diff(dim=1) >= 0).all()
    assert (output["completion_mask"].diff(dim=1) <= 0).all()


def test_buffers_have_the_layout_that_is_written_to(scored):
    trainer, _, _ = scored
    assert set(trainer._metrics) == {"train", "eval"}
    assert isinstance(trainer._metrics["train"]["anything"], list)
    assert isinstance(trainer._logs["extra"]["anything"], deque)
    assert isinstance(trainer._pending_extra_logs["anything"], list)
    assert isinstance(trainer._pending_metrics["anything"], list)
    assert trainer._logs["extra"]["anything"].maxlen == trainer.args.generation_batch_size
    assert trainer.scale_rewards in ("group", "batch", "none")
    assert trainer.reward_weights.shape == (1,)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"])
def test_token_advantages_reach_the_loss(scored, loss_type):
    # Constant along a completion they mean what one number does; else each token follows its own.
    trainer, _, output = scored
    trainer.loss_type, before = loss_type, trainer.loss_type
    trainer.current_gradient_accumulation_steps = 1
    try:
        advantages = torch.linspace(-1, 1, 8)
        with torch.no_grad():
            by_completion = trainer._compute_loss(trainer.model, {**output, "advantages": advantages})
            by_token = advantages[:, None].expand(output["completion_ids"].shape)
            same = trainer._compute_loss(trainer.model, {**output, "advantages": by_token})
            by_token = by_token.clone()
            by_token[:, 0] += 1.0
            other = trainer._compute_loss(trainer.model, {**output, "advantages": by_token})
    finally:
        trainer.loss_type = before
    assert torch.equal(by_completion, same)
    assert not torch.isclose(by_completion, other)
