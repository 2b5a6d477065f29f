"""The memory plan: its arithmetic against hand-worked numbers, and the command `l2t plan`."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from l2t_trl import memory
from l2t_trl.cli import main
from l2t_trl.errors import UserError
from l2t_trl.memory import GIB, Setup, make_plan
from l2t_trl.model_shapes import KNOWN_SHAPES, Shape, find_shape, read_shape
from l2t_trl.models import TINY_FOLDER
from l2t_trl.scripts import plan


ROOT = Path(__file__).parents[1]
QWEN_3B = str(ROOT / "recipes/Qwen2.5-3B-Instruct/l2t/gsm8k.yaml")
R1_7B = str(ROOT / "recipes/DeepSeek-R1-Distill-Qwen-7B/l2t/numinamath-4k.yaml")
# Per layer: q 16, k 8, v 8, o 16, three of 32, biases 4 + 2 + 2, norms 8: 160. Embedding and lm_head 40 each, norm 4.
TOY = Shape(4, 2, 2, 1, 8, 10, False, 2)
TOY_PARAMETERS = 404
LIBRARIES = {"Python and libraries": memory.LIBRARY_BYTES}
CPU = Setup(is_gpu=False, is_mixed=False, batch_size=3, prompt_length=5, completion_length=7)


def change(setup: Setup, **values) -> Setup:
    return dataclasses.replace(setup, **values)


# Shapes


def test_parameters_are_counted():
    assert TOY.num_parameters == TOY_PARAMETERS
    assert dataclasses.replace(TOY, is_tied=True).num_parameters == TOY_PARAMETERS - 40
    assert dataclasses.replace(TOY, has_qkv_bias=False).num_parameters == TOY_PARAMETERS - 16


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1_777_088_000),
        ("agentica-org/DeepScaleR-1.5B-Preview", 1_777_088_000),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 7_615_616_512),
        ("Qwen/Qwen2-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen2.5-3B-Instruct", 3_085_938_688),
        ("smollm2", 134_515_008),
    ],
)
def test_known_models_have_their_published_sizes(name, parameters):
    assert KNOWN_SHAPES[name].num_parameters == parameters


def test_a_folder_is_counted_as_transformers_counts_it(tiny_folder):
    from transformers import AutoModelForCausalLM

    for folder in (TINY_FOLDER, tiny_folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert read_shape(folder / "config.json").num_parameters == model.num_parameters()
    assert find_shape("tiny") == read_shape(TINY_FOLDER / "config.json")


def test_unknown_models_and_other_architectures_are_refused(tmp_path):
    with pytest.raises(UserError, match="some/model is no local folder, nor among"):
        find_shape("some/model")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(
        UserError, match="model_type must be one of llama, mistral, qwen2, qwen3 for a plan, got 'gpt2'"
    ):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(UserError, match="has no num_attention_heads"):
        find_shape(str(tmp_path))


# Arithmetic


def test_model_state_without_deepspeed():
    # fp32: 4 bytes per weight and per gradient, two Adam moments of 4.
    made = make_plan(TOY, CPU)
    assert made.resident == {"weights": 4 * 404, "optimiser state": 8 * 404} | LIBRARIES
    assert made.phases["optimiser step"] == {"gradients": 4 * 404}
    # beta brings a reference model; several processes bucket gradients.
    mixed = make_plan(TOY, change(CPU, is_mixed=True, has_reference=True, num_processes=2)).resident
    assert mixed["reference model"] == mixed["gradient buckets (DDP)"] == 4 * 404
    # All in bf16: nothing is kept in fp32.
    half = make_plan(TOY, change(CPU, dtype="bfloat16", is_mixed=True))
    assert half.resident == {"weights": 2 * 404, "optimiser state": 4 * 404} | LIBRARIES


def test_autocast_keeps_casts_of_the_layers_until_the_pass_ends():
    def phases_with_casts(setup: Setup) -> set[str]:
        phases = make_plan(TOY, setup).phases
        # 2 layers of 160 weights in bf16.
        assert all(held.get(memory.CASTS, 640) == 640 for held in phases.values())
        return {name for name, held in phases.items() if memory.CASTS in held}

    mixed, forward = change(CPU, is_mixed=True), {"rollouts", "forward"}
    # Checkpointing casts anew, layer by layer.
    assert phases_with_casts(mixed) == forward
    assert phases_with_casts(change(mixed, checkpoints_activations=False)) == forward | {
        "backward, lm_head",
        "backward, layers",
    }
    assert phases_with_casts(CPU) == phases_with_casts(change(mixed, dtype="bfloat16")) == set()
    assert phases_with_casts(change(mixed, zero_stage=2)) == set()


def test_adapters_are_trained_in_fp32_beside_a_frozen_model():
    # Rank 2 on q (4 x 4) and v (2 x 4) of 2 layers: 2 x 2 x (8 + 6) = 56.
    adapters = memory.adapter_parameters(TOY, 2, ["q_proj", "v_proj"])
    assert adapters == 56
    made = make_plan(TOY, change(CPU, dtype="bfloat16", is_mixed=True, adapter_parameters=adapters))
    assert made.resident == {"weights": 2 * 404, "adapters": 4 * 56, "optimiser state": 8 * 56} | LIBRARIES
    assert made.phases["optimiser step"] == {"gradients": 4 * 56}
    assert made.phases["backward, lm_head"]["lm_head: gradient"] == 0


@pytest.mark.parametrize(
    "stage, weights, gradients",
    # bf16 gradients: whole and the own quarter, or the quarter alone.
    [(1, 2 * 404, 2 * 404 + 2 * 101), (2, 2 * 404, 2 * 101), (3, 2 * 101, 2 * 101)],
)
def test_zero_stages_divide_among_four_processes(stage, weights, gradients):
    made = make_plan(TOY, change(CPU, is_mixed=True, num_processes=4, zero_stage=stage, has_reference=True))
    assert made.resident["weights"] == made.resident["reference model"] == weights
    # A quarter of the fp32 weights and of two Adam moments; all is cast to fp32 for the step.
    assert (made.resident["fp32 weights"], made.resident["optimiser state"]) == (4 * 101, 8 * 101)
    assert made.phases["optimiser step"] == {"gradients": gradients, "gradients in fp32": 4 * 101}
    # Weights are gathered to be used, at most a billion of them.
    assert made.resident.get("gathered weights", 0) == (2 * 404 if stage == 3 else 0)


def test_offloading_moves_weights_and_state_to_the_host():
    setup = change(CPU, is_mixed=True, num_processes=4, zero_stage=3)
    made = make_plan(TOY, change(setup, offloads_optimizer=True, offloads_parameters=True))
    assert made.host == {"fp32 weights": 404, "optimiser state": 808, "gradients": 404, "weights": 202}
    assert set(made.resident) == {"communication buckets", "gathered weights", *LIBRARIES}
    assert sum(made.phases["optimiser step"].values()) == 0


def test_activations_with_and_without_checkpointing():
    # Per token and layer in fp32: two norms of 4 x 4 x 2 (input, normalised), what the linear layers read, 2 x 4 x 4 and
    # 4 x 8, attention 4 x 4 x 4 and 2 x 4 statistics, MLP 3 x 4 x 8, and a row of the mask, 12 x 4.
    layer = 2 * 32 + 32 + 32 + 64 + 8 + 96 + 48
    tokens, inputs = 3 * 12, 3 * 12 * 16
    final_norm = tokens * 32
    # Behind an MLP: two gradients of its width, two of the stream's.
    leaving = tokens * max(2 * 4 * 8 + 2 * 4 * 4, 6 * 4 * 4)
    plain = make_plan(TOY, change(CPU, checkpoints_activations=False)).phases
    kept = 2 * tokens * layer + final_norm
    assert plain["backward, lm_head"]["activations"] == kept
    # All is kept when the last layer is left, and only lm_head has a gradient then: 40 weights of 4 bytes.
    assert plain["backward, layers"]["activations"] == kept + leaving
    assert plain["backward, layers"]["gradients"] == 160
    saving = make_plan(TOY, CPU).phases
    assert saving["backward, lm_head"]["activations"] == 2 * inputs + final_norm
    assert saving["backward, layers"]["activations"] == 2 * inputs + final_norm + tokens * layer + leaving
    # With a pass before, gradients are there all along.
    accumulated = make_plan(TOY, change(CPU, accumulation=2)).phases
    assert accumulated["backward, lm_head"]["gradients"] == accumulated["backward, layers"]["gradients"] == 1616


def test_most_is_held_in_the_first_layer_where_gradients_outweigh_activations():
    short = change(CPU, batch_size=1, prompt_length=1, completion_length=1)
    held = make_plan(TOY, short).phases["backward, layers"]
    # One layer's gradients (160), the final norm's (4) and lm_head's (40): the first layer and the embedding have none.
    assert held["gradients"] == 4 * (160 + 4 + 40)
    # Of 2 tokens one layer's input, that layer (its mask: 2 x 4), and what is there while it is left.
    assert held["activations"] == 2 * (16 + 296 + 8 + 96)


def test_leaving_a_norm_takes_more_than_leaving_a_narrow_mlp_in_bf16():
    half = change(CPU, dtype="bfloat16", is_mixed=True, accumulation=2, is_flash=True)
    held = make_plan(TOY, half).phases["backward, layers"]["activations"]
    # One layer: norms 2 x 4 x (4 + 2), what is read 2 x (2 x 4 + 8), attention 2 x 2 x (4 + 2) and 8, MLP 3 x 2 x 8.
    layer = 48 + 32 + 24 + 8 + 48
    # Inputs of two layers, the last norm's 4 x 6, and six fp32 tensors of 4, not 2 x 2 x 8 + 2 x 2 x 4.
    assert held == 36 * (2 * 8 + 24 + layer + 96)


def test_flash_attention_takes_padding_without_a_mask_and_repeats_no_keys():
    plain, flash = (make_plan(TOY, change(CPU, checkpoints_activations=False, is_flash=value)) for value in (0, 1))
    plain, flash = plain.phases["backward, lm_head"], flash.phases["backward, lm_head"]
    # 3 x 12 x 12 booleans; per token and layer a row of 12 and two of keys and values, 2 instead of 4 wide, in fp32.
    assert (plain["attention mask"], flash["attention mask"]) == (3 * 144, 0)
    assert plain["activations"] - flash["activations"] == 2 * 36 * (12 * 4 + 2 * 2 * 4)


def test_adapters_keep_what_they_read_and_frozen_layers_do_not():
    adapted = change(CPU, checkpoints_activations=False, adapter_parameters=56, adapter_inputs=8)
    held = make_plan(TOY, adapted).phases["backward, lm_head"]["activations"]
    # Norms' inputs, attention, MLP and mask as ever; what two adapters read, 4 wide, and what they dropped of it.
    layer = 2 * 16 + 64 + 8 + 96 + 48 + 8 * (4 + 4)
    assert held == 2 * 36 * layer + 36 * 16
    # A GPU holds what was dropped as booleans.
    on_gpu = make_plan(TOY, change(adapted, is_gpu=True)).phases["backward, lm_head"]["activations"]
    assert held - on_gpu == 2 * 36 * 8 * 3


def test_lm_head_holds_no_logits_of_all_tokens():
    big = KNOWN_SHAPES["Qwen/Qwen2.5-3B-Instruct"]
    sizes = []
    for length in (8192, 16384):
        phases = make_plan(big, Setup(batch_size=2, completion_length=length)).phases
        sizes.append(phases["backward, lm_head"])
    # One tile of 4,096 x 32,768 in bf16, whatever the length, and autocast's cast of 32,768 rows of the weight.
    assert [size["lm_head: tile"] for size in sizes] == 2 * [(4096 + 2048) * 32768 * 2]
    assert sizes[0]["lm_head: gradient"] == 4 * 151936 * 2048
    # Two hidden states of 8,192 tokens, in fp32 as the stream is, and their gradients.
    assert sizes[0]["lm_head: hidden states"] == 2 * 8192 * 2048 * 8
    # bf16 weights need no cast, but gradients in fp32 are cast to bf16 when they are complete.
    half = make_plan(big, Setup(batch_size=2, completion_length=8192, zero_stage=2)).phases["backward, lm_head"]
    assert half["lm_head: tile"] == 4096 * 32768 * 2
    assert half["lm_head: gradient"] == (4 + 2) * 151936 * 2048
    assert half["lm_head: hidden states"] == 2 * 8192 * 2048 * (2 + 4 + 2)


def test_lm_head_without_triton_projects_prompts_too_and_keeps_temporaries():
    held = make_plan(TOY, CPU).phases["backward, lm_head"]
    # 3 rows of 12 tokens: states and gradients in fp32; a tile of 10 columns, seven temporaries and one of booleans.
    assert held["lm_head: hidden states"] == 36 * 4 * 8
    assert held["lm_head: tile"] == 36 * 10 * (4 + 7 * 4 + 1)


def test_rollouts_of_transformers_hold_a_cache():
    held = make_plan(TOY, change(CPU, rollout_batch_size=6)).phases["rollouts"]
    # 2 layers x keys and values of 2, in fp32, of 6 x 12 tokens; one layer twice.
    assert held["key-value cache"] == 2 * 2 * 2 * 4 * 72 * 3 // 2
    gathered = make_plan(TOY, change(CPU, is_mixed=True, zero_stage=3)).phases["rollouts"]
    assert gathered["gathered weights for generation"] == 2 * 404


def test_vllm_takes_its_share_and_keeps_a_cache_in_it():
    shape = KNOWN_SHAPES["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"]
    setup = Setup(uses_vllm=True, vllm_share=0.5)
    made = make_plan(shape, setup)
    assert made.resident["vLLM's share"] == 40 * GIB
    # 28 layers x 2 x 2 heads x 128 in bf16 = 28,672 bytes per token.
    free = 40 * GIB - 2 * 1_777_088_000 - memory.VLLM_WORK_BYTES
    assert made.engine_tokens == free // 28672
    asleep = make_plan(shape, change(setup, vllm_sleeps=True))
    assert "vLLM's share" not in asleep.resident and asleep.phases["rollouts"]["vLLM's share"] == 40 * GIB
    # A server elsewhere takes nothing here, nor do rollouts but for the old log-probabilities.
    elsewhere = make_plan(shape, change(setup, vllm_share=None))
    assert elsewhere.engine_tokens is None and "vLLM's share" not in elsewhere.resident
    assert set(elsewhere.phases["rollouts"]) == {"old log-probabilities", memory.CASTS}
    assert make_plan(shape, change(setup, vllm_tensor_parallel=2)).engine_tokens > 2 * made.engine_tokens


def test_scoring_costs_what_the_performance_page_says():
    # One completion of 16,384 tokens behind 512 in bf16, 31 probes of 15: docs/performance.md has the same sizes.
    shape = KNOWN_SHAPES["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"]
    setup = Setup(
        dtype="bfloat16",
        prompt_length=512,
        completion_length=16384,
        batch_size=1,
        scoring_batch_size=1,
        num_probe_tokens=465,
    )
    held = make_plan(shape, setup).phases["scoring"]
    assert held["key-value cache"] == 28672 * 17361 + 28672 * 17361 // 28
    assert held["probe mask"] == 465 * (16896 + 465) * 3
    assert held["logits of a chunk"] == 3 * 4 * 2**25
    assert "scoring" not in make_plan(shape, change(setup, scoring_batch_size=None)).phases
    # Under ZeRO-3 the last MLP and lm_head are gathered; a large MLP's decomposition can take more than scoring.
    sharded = make_plan(shape, change(setup, zero_stage=3)).phases["scoring"]
    assert sharded["gathered tail"] == 2 * (3 * 1536 * 8960 + 151936 * 1536)
    short = change(setup, completion_length=16, num_probe_tokens=0)
    wide = dataclasses.replace(shape, intermediate_size=30 * 8960)
    assert set(make_plan(wide, short).phases["scoring"]) == {"singular vectors"}


def test_peak_is_what_is_always_there_and_the_largest_phase():
    made = memory.Plan({"a": 5, "b": 6}, {"one": {"x": 1, "y": 3}, "two": {"x": 3}}, {"host": 100})
    assert (made.peak_phase, made.peak) == ("one", 15)


def test_small_updates_are_lost_in_bf16_weights_alone():
    moved = {}
    for rate in (1e-6, 1e-3):
        for dtype in (torch.bfloat16, torch.float32):
            torch.manual_seed(0)
            weight = torch.nn.Parameter((0.02 * torch.randn(10_000)).to(dtype))
            before = weight.detach().clone()
            weight.grad = torch.randn(10_000).to(dtype)
            torch.optim.AdamW([weight], lr=rate, weight_decay=0.0).step()
            moved[rate, dtype] = (weight != before).float().mean().item()
    assert moved[1e-6, torch.bfloat16] < 0.05 and moved[1e-6, torch.float32] > 0.95
    assert moved[1e-3, torch.bfloat16] > 0.95
    assert memory.loses_updates("bfloat16", 1e-6) and not memory.loses_updates("bfloat16", 1e-3)
    assert not memory.loses_updates("float32", 1e-6)


# The command


def test_plan_of_a_recipe_fits_and_says_so(capsys):
    assert main(["plan", "--config", R1_7B, "--gpus", "8xA100-80", "--accelerate_config", "zero3"]) == 0
    text = capsys.readouterr().out
    assert "7.616 B parameters" in text and "8 x A100 with 80 GiB, ZeRO-3; 256 completions of at most 16,384" in text
    assert "of 80: fits" in text and "sequences of 20,480" in text
    assert text.count("<- peak") == 1 and "What would make it fit" not in text


def test_plan_that_does_not_fit_says_what_would_make_it(capsys):
    command = ["plan", "--config", R1_7B, "--gpus", "8xA100-80", "--accelerate_config", "zero2"]
    assert main([*command, "--set", "per_device_train_batch_size=4"]) == 1
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text and "are more than 90% of 80 GiB" in text
    assert "--accelerate_config zero3" in text.split("What would make it fit:")[1]


@pytest.mark.parametrize("gpus, name", [("1xH100-80", None), ("2xA100-40", "zero2"), ("8xA100-40", "zero3")])
def test_suggested_changes_suffice_and_none_is_idle(gpus, name):
    request = plan.Request(
        plan.read_settings(QWEN_3B, ["dtype=float32"]), plan.read_accelerate(name), plan.parse_gpus(gpus)
    )
    steps = plan.changes(request)
    verdict = plan.judge(request)
    assert verdict.fits or steps, gpus
    if steps:
        assert plan.judge(steps[-1][1]).fits
        # The last one is what makes it fit.
        before = steps[-2][1] if len(steps) > 1 else request
        assert not plan.judge(before).fits


def test_a_server_is_suggested_where_a_gpu_holds_no_engine(capsys):
    command = ["plan", "--config", R1_7B, "--gpus", "8xA100-40", "--accelerate_config", "zero3"]
    assert main(command) == 1
    assert "vllm_mode: server" in capsys.readouterr().out.split("What would make it fit:")[1]


def test_hopeless_plans_are_called_so(capsys):
    assert main(["plan", "--config", R1_7B, "--gpus", "1xGPU-8"]) == 1
    assert "No usual change makes it fit" in capsys.readouterr().out


def test_an_engine_without_room_for_one_sequence_does_not_fit(capsys):
    command = ["plan", "--config", R1_7B, "--gpus", "8xA100-80", "--accelerate_config", "zero3"]
    assert main([*command, "--set", "vllm_gpu_memory_utilization=0.21"]) == 1
    assert "vLLM's share leaves room for" in capsys.readouterr().out


def test_bf16_without_fp32_weights_is_remarked_on(capsys):
    command = ["plan", "--config", QWEN_3B, "--gpus", "4xA100-80"]
    main(command)
    assert "rounded away" in capsys.readouterr().out
    main([*command, "--accelerate_config", "zero2"])
    assert "rounded away" not in capsys.readouterr().out
    main([*command, "--set", "use_peft=true"])
    assert "rounded away" not in capsys.readouterr().out


def test_settings_come_from_defaults_recipe_and_command_line():
    settings = plan.read_settings(QWEN_3B, ["beta=0", "gradient_checkpointing=false"])
    assert settings["per_device_eval_batch_size"] == 60  # the recipe's
    assert (settings["vllm_mode"], settings["lora_r"]) == ("colocate", 16)  # TRL's
    assert (settings["beta"], settings["gradient_checkpointing"]) == (0, False)
    shape = find_shape(settings["model_name_or_path"])
    setup = plan.make_setup(
        plan.Request(settings, plan.read_accelerate("zero3_offload"), plan.parse_gpus("2xX-8")), shape
    )
    assert not setup.has_reference and not setup.checkpoints_activations
    assert setup.zero_stage == 3 and setup.offloads_optimizer and setup.offloads_parameters
    # 24 completions per generation, from 2 processes.
    assert (setup.rollout_batch_size, setup.device_bytes) == (12, 8 * GIB)
    control = plan.read_settings(QWEN_3B.replace("l2t/gsm8k", "grpo/gsm8k"), [])
    assert plan.make_setup(plan.Request(control, None, plan.parse_gpus("1xX-8")), shape).scoring_batch_size is None


@pytest.mark.parametrize(
    "options, message",
    [
        (["--gpus", "A100"], "gpus must be written like 8xA100-80"),
        (["--gpus", "0xA100-80"], "gpus must be written like 8xA100-80"),
        (["--gpus", "8xA100-80", "--set", "batch"], "--set takes KEY=VALUE, got 'batch'"),
        (["--gpus", "8xA100-80", "--set", "num_generation=4"], "num_generation is not a setting (did you mean num_g"),
        (
            ["--gpus", "8xA100-80", "--set", "max_completion_length=many"],
            "max_completion_length must be a whole number",
        ),
        (["--gpus", "8xA100--80"], "gpus must be written like 8xA100-80"),
        (["--gpus", "8xA100-80", "--set", "beta=abc"], "beta must be a number, 0 or larger, got 'abc'"),
        (["--gpus", "8xA100-80", "--set", "beta=null"], "beta must be a number, 0 or larger, got None"),
        (["--gpus", "8xA100-80", "--set", "learning_rate=-1"], "learning_rate must be a number, 0 or larger, got -1"),
        (["--gpus", "8xA100-80", "--set", "dtype=fp16"], "dtype must be one of auto, bfloat16, float16, float32, got"),
        (["--gpus", "8xA100-80", "--set", "method=ppo"], "method must be one of l2t, grpo, got 'ppo'"),
        (["--gpus", "8xA100-80", "--set", "use_peft=yes"], "use_peft must be true or false, got 'yes'"),
        (
            ["--gpus", "8xA100-80", "--set", "vllm_gpu_memory_utilization=40"],
            "vllm_gpu_memory_utilization must be a share of the GPU, above 0 and at most 1, got 40",
        ),
        (
            ["--gpus", "8xA100-80", "--set", "vllm_mode=serve"],
            "vllm_mode must be one of colocate, server, got 'serve'",
        ),
        (["--gpus", "8xA100-80", "--set", "scoring_batch_size=0"], "scoring_batch_size must be a whole number"),
        (["--gpus", "8xA100-80", "--set", "vllm_max_model_length=x"], "vllm_max_model_length must be a whole number"),
        (["--gpus", "8xA100-80", "--prompt_length", "-5"], "--prompt_length: got -5; set at least 1"),
        (
            ["--gpus", "8xA100-80", "--set", "max_prompt_length=512", "--prompt_length", "513"],
            "--prompt_length: got 513; set at least 1 and at most max_prompt_length (512).",
        ),
        (["--gpus", "8xA100-80", "--accelerate_config", "zero9"], "accelerate_config 'zero9' is neither"),
        (["--gpus", "8xA100-80", "--set", "model_name_or_path=some/model"], "some/model is no local folder"),
    ],
)
def test_mistakes_are_named(capsys, options, message):
    assert main(["plan", "--config", QWEN_3B, *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "config, message",
    [
        ("distributed_type: FSDP", "a plan counts distributed_type NO, MULTI_GPU, MULTI_CPU, DEEPSPEED, got FSDP"),
        ("deepspeed_config: {zero_stage: auto}", "deepspeed_config needs a zero_stage from 0 to 3, got 'auto'"),
    ],
)
def test_ways_of_sharding_that_are_not_counted_are_refused(capsys, tmp_path, config, message):
    path = tmp_path / "accelerate.yaml"
    path.write_text(config)
    assert main(["plan", "--config", QWEN_3B, "--gpus", "8xA100-80", "--accelerate_config", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "setting, remark",
    [
        ("load_in_4bit=true", "load_in_4bit is not counted: weights are taken as bfloat16."),
        ("optim=sgd", "optim sgd is not counted: its state is taken as Adam's, two moments."),
        ("attn_implementation=eager", "attn_implementation eager is not counted: it keeps heads x length x length"),
    ],
)
def test_settings_that_are_not_counted_are_remarked_on(capsys, setting, remark):
    command = ["plan", "--config", QWEN_3B, "--gpus", "4xA100-80", "--accelerate_config", "zero2"]
    main(command)
    assert "is not counted" not in capsys.readouterr().out
    main([*command, "--set", setting])
    assert remark in capsys.readouterr().out


def test_a_cpu_is_filled_less_than_a_gpu():
    recipe = str(ROOT / "recipes/tiny/grpo/arithmetic.yaml")
    settings = plan.read_settings(recipe, ["bf16=false"])
    for name, filled in (("cpu", 0.75), ("any", 0.9)):
        gpus = plan.Gpus(1, name, 1.0)
        peak = plan.judge(plan.Request(settings, None, gpus)).plan.peak / GIB
        enough, few = (
            plan.judge(plan.Request(settings, None, gpus._replace(gib=peak / share)))
            for share in (filled - 0.01, filled + 0.01)
        )
        assert enough.fits and not few.fits
        assert f"are more than {filled:.0%} of" in few.remarks[0]


def test_gpus_are_read_as_they_are_sold_and_cpus_as_they_are_spelt():
    assert plan.parse_gpus("8xA100-80") == plan.parse_gpus("8xA100-80GB") == (8, "A100", 80)
    assert plan.parse_gpus("2xRTX-4090-24") == (2, "RTX-4090", 24)
    settings = plan.read_settings(QWEN_3B, [])
    shape = find_shape(settings["model_name_or_path"])
    for name in ("cpu", "CPU"):
        assert not plan.make_setup(plan.Request(settings, None, plan.parse_gpus(f"1x{name}-8")), shape).is_gpu


def test_rollouts_from_vllm_are_suggested_where_a_cache_of_all_is_too_large(capsys):
    command = ["plan", "--config", R1_7B, "--gpus", "8xA100-80", "--accelerate_config", "zero3"]
    assert main([*command, "--set", "use_vllm=false"]) == 1
    assert "use_vllm: true" in capsys.readouterr().out.split("What would make it fit:")[1]


def test_adapters_of_all_layers_read_what_their_widths_say():
    settings = plan.read_settings(QWEN_3B, ["use_peft=true", "lora_target_modules=all-linear"])
    shape = find_shape(settings["model_name_or_path"])
    setup = plan.make_setup(plan.Request(settings, None, plan.parse_gpus("1xA100-80")), shape)
    # q, k, v, gate and up read the stream, o the heads, down the MLP.
    assert setup.adapter_inputs == 5 * 2048 + 16 * 128 + 11008


def test_missing_and_broken_recipes_are_named(capsys, tmp_path):
    assert main(["plan", "--config", "none.yaml", "--gpus", "1xA-8"]) == 2
    assert "config file none.yaml cannot be read" in capsys.readouterr().err
    broken = tmp_path / "broken.yaml"
    broken.write_text("- a")
    assert main(["plan", "--config", str(broken), "--gpus", "1xA-8"]) == 2
    assert "must hold one YAML mapping" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["plan", "--help"], ["plan", "--config", QWEN_3B, "--gpus", "8xA100-80"]])
def test_plan_imports_nothing_heavy(argv):
    code = f"""
import sys
from l2t_trl.cli import main
try:
    main({argv!r})
except SystemExit:
    pass
print("RESULT", sorted({{"torch", "transformers", "trl", "datasets", "numpy"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "RESULT []"
