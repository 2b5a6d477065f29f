"""The memory plan against what PyTorch keeps alive in one pass of a small model, allocation by allocation."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl.trainer import utils
from trl.trainer.utils import add_fused_lm_head

from l2t_trl import memory
from l2t_trl.memory import Setup, make_plan
from l2t_trl.model_shapes import Shape


SHAPE = Shape(256, 4, 4, 2, 768, 512, False, 64)
BATCH, LENGTH = 4, 128
HEAD = "ChunkedLogProbFunctionBackward"


def make_model(setup: Setup) -> torch.nn.Module:
    config = Qwen2Config(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.intermediate_size,
        num_hidden_layers=SHAPE.num_layers,
        num_attention_heads=SHAPE.num_heads,
        num_key_value_heads=SHAPE.num_key_value_heads,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    model = Qwen2ForCausalLM(config).to(getattr(torch, setup.dtype)).train()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    if not setup.trains_weights:
        model = get_peft_model(
            model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.05, task_type="CAUSAL_LM")
        )
        model.enable_input_require_grads()
    if setup.checkpoints_activations:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def run_pass(model: torch.nn.Module, setup: Setup):
    ids = torch.randint(0, SHAPE.vocab_size, (BATCH, LENGTH))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # without padding there would be no mask
    with torch.autocast("cpu", torch.bfloat16, enabled=setup.is_mixed):
        output = model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True)
    output.log_probs.sum().backward()


def alive(model: torch.nn.Module, setup: Setup) -> dict[str, int]:
    """Most bytes that a pass holds at once: at the end of the forward pass, in lm_head's backward, behind it."""
    run_pass(model, setup)
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run_pass(model, setup)
    events, roots = [], list(record.profiler.kineto_results.experimental_event_tree())
    while roots:
        event = roots.pop()
        roots.extend(event.children)
        if event.name == "[memory]":
            events.append((event.start_time_ns, event.typed[1].ptr, event.typed[1].alloc_size, in_head(event)))
    held, peaks = 0, {"kept": 0, "backward, lm_head": 0, "backward, layers": 0}
    blocks = set()
    for _, address, size, is_head in sorted(events):
        # What was there before, such as another test's model that is collected now, is no part of the pass.
        if size < 0 and address not in blocks:
            continue
        (blocks.add if size > 0 else blocks.remove)(address)
        if is_head and not peaks["backward, lm_head"]:
            peaks["kept"] = held
        held += size
        if is_head or peaks["kept"]:
            phase = "backward, lm_head" if is_head else "backward, layers"
            peaks[phase] = max(peaks[phase], held)
    return peaks


def in_head(event) -> bool:
    while event is not None and event.name != HEAD:
        event = event.parent
    return event is not None


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize(
    "dtype, is_mixed, adapters",
    [
        ("float32", False, False),
        ("float32", True, False),
        ("bfloat16", True, False),
        ("float32", False, True),
        ("float32", True, True),
        ("bfloat16", True, True),
    ],
)
def test_a_pass_holds_what_the_plan_says(monkeypatch, dtype, is_mixed, adapters, is_checkpointed):
    # PyTorch counts a tile's columns beyond the vocabulary, too, though a CPU gives them no memory.
    monkeypatch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", SHAPE.vocab_size)
    setup = Setup(
        is_gpu=False,
        dtype=dtype,
        is_mixed=is_mixed,
        batch_size=BATCH,
        prompt_length=0,
        completion_length=LENGTH,
        checkpoints_activations=is_checkpointed,
        adapter_parameters=memory.adapter_parameters(SHAPE, 2, ["q_proj", "down_proj"]) if adapters else None,
        adapter_inputs=SHAPE.hidden_size + SHAPE.intermediate_size if adapters else 0,
    )
    measured = alive(make_model(setup), setup)
    phases = make_plan(SHAPE, setup).phases
    head = phases["backward, lm_head"]
    states = BATCH * LENGTH * SHAPE.hidden_size * setup.weight_bytes
    kept = head["activations"] + head.get(memory.CASTS, 0) + head["gradients"] + states
    # The attention mask is kept by checkpoints only: without, each layer has its own in fp32.
    kept += head["attention mask"] if is_checkpointed else 0
    assert kept == pytest.approx(measured["kept"], rel=0.05)
    assert sum(head.values()) == pytest.approx(measured["backward, lm_head"], rel=0.05)
    # Of the gradients behind a layer the plan takes what may be there together: more than there is, but not by much.
    assert 0.95 < sum(phases["backward, layers"].values()) / measured["backward, layers"] < 1.12
