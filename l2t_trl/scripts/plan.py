"""`l2t plan`: what memory a recipe takes on given GPUs, whether it fits, and what to change. Nothing heavy is imported."""

import argparse
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from l2t_trl.errors import UserError
from l2t_trl.memory import (
    GIB,
    LOST_UPDATES,
    Plan,
    Setup,
    adapter_parameters,
    loses_updates,
    make_plan,
    trainable_parameters,
)
from l2t_trl.model_shapes import Shape, find_shape
from l2t_trl.scripts.plan_settings import read_settings, read_yaml, whole


# Fragmentation and what the arithmetic leaves out need room, too; a CPU's heap more (see docs/memory.md).
FILLED, CPU_FILLED = 0.9, 0.75
# peft's choice for Qwen2 and Llama.
LORA_MODULES = ["q_proj", "v_proj"]
# Ways of running in parallel that are counted, and weights and optimisers: those that are not, and those that are.
COUNTED, VLLM_MODES = ("NO", "MULTI_GPU", "MULTI_CPU", "DEEPSPEED"), ("colocate", "server")
QUANTISED, ADAM = ("load_in_4bit", "load_in_8bit"), (None, "adamw_torch", "adamw_torch_fused")
# A probe's text takes a token per so many characters, and its answer so many tokens.
CHARACTERS_PER_TOKEN, ANSWER_TOKENS = 4, 8
CPU = "cpu"
SMALL_SHARE = 0.2  # of a GPU, for a vLLM that has to do with little
SHOWN = GIB // 20  # smaller parts are counted, but not listed


class Gpus(NamedTuple):
    """GPUs of a kind: how many, what they are called ("cpu": none, but processes), and the memory of each in GiB."""

    count: int
    name: str
    gib: float


class Request(NamedTuple):
    """What is planned: settings by name, the accelerate configuration (`None` without), and the GPUs."""

    settings: dict[str, Any]
    accelerate: dict[str, Any] | None
    gpus: Gpus


class Verdict(NamedTuple):
    """A plan, whether it fits, and what is wrong or worth knowing."""

    shape: Shape
    setup: Setup
    plan: Plan
    fits: bool
    remarks: list[str]


def add_arguments(parser: argparse.ArgumentParser):
    """Add the arguments of `l2t plan` to `parser`."""
    parser.add_argument("--config", required=True, metavar="FILE", help="recipe, as for l2t train")
    parser.add_argument(
        "--gpus",
        required=True,
        metavar="NxNAME-GIB",
        help="e.g. 8xA100-80: number, name and GiB of each (a GPU sold with 80 GB has 80 GiB); 1xcpu-8 without a GPU",
    )
    parser.add_argument(
        "--accelerate_config",
        metavar="NAME",
        help="file or name of an accelerate configuration, as for l2t train; as many processes as GPUs are counted",
    )
    parser.add_argument(
        "--prompt_length",
        type=int,
        metavar="N",
        help="tokens of the longest prompt, where that is known to be shorter than max_prompt_length",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting instead of the recipe's, e.g. per_device_train_batch_size=1; repeat for more",
    )


def main(args: argparse.Namespace) -> int:
    """Print the plan; the exit code is 1 if it does not fit."""
    request = request_of(args)
    verdict = judge(request)
    print(report(request, verdict))
    return 0 if verdict.fits else 1


def request_of(args: argparse.Namespace) -> Request:
    """Return what the command line asks for."""
    settings = read_settings(args.config, args.set)
    if args.prompt_length is not None:
        longest = settings["max_prompt_length"]
        if args.prompt_length < 1 or (isinstance(longest, int) and args.prompt_length > longest):
            limit = "" if longest is None else f" and at most max_prompt_length ({longest})"
            raise UserError(f"--prompt_length: got {args.prompt_length}; set at least 1{limit}.")
        settings["max_prompt_length"] = args.prompt_length
    return Request(settings, read_accelerate(args.accelerate_config), parse_gpus(args.gpus))


def parse_gpus(text: str) -> Gpus:
    """
    Read "8xA100-80".

    Raises:
        UserError: if it is written in another way.
    """
    match = re.fullmatch(r"(\d+)x([^-]+(?:-[^-]+)*)-(\d+(?:\.\d+)?)(?:GB|GiB)?", text)
    if match is None or int(match[1]) < 1 or float(match[3]) <= 0:
        raise UserError(f"gpus must be written like 8xA100-80 (number x name - GiB of each), got {text!r}.")
    return Gpus(int(match[1]), match[2], float(match[3]))


def read_accelerate(name: str | None) -> dict[str, Any] | None:
    """
    Return the accelerate configuration of a name or path, `None` for none.

    Raises:
        UserError: if there is none, or it shards in a way that is not counted.
    """
    from l2t_trl.launch import find_accelerate_config

    if name is None:
        return None
    config = dict(read_yaml(str(find_accelerate_config(name))))
    if config.get("distributed_type", "NO") not in COUNTED:
        raise UserError(
            f"{name}: a plan counts distributed_type {', '.join(COUNTED)}, got {config['distributed_type']}."
        )
    if config.get("deepspeed_config") and zero_stage(config) not in (0, 1, 2, 3):
        raise UserError(f"{name}: deepspeed_config needs a zero_stage from 0 to 3, got {zero_stage(config)!r}.")
    return config


def zero_stage(accelerate: dict[str, Any] | None) -> Any:
    """Return the ZeRO stage of an accelerate configuration, `None` where DeepSpeed has no part in it."""
    deepspeed = (accelerate or {}).get("deepspeed_config")
    return deepspeed.get("zero_stage", 0) if deepspeed else None


def judge(request: Request) -> Verdict:
    """
    Return what a request takes and whether it fits.

    Raises:
        UserError: for a value that cannot be reckoned with.
    """
    settings, gpus = request.settings, request.gpus
    shape = find_shape(settings["model_name_or_path"])
    setup = make_setup(request, shape)
    plan = make_plan(shape, setup)
    filled = FILLED if setup.is_gpu else CPU_FILLED
    fits = plan.peak <= filled * setup.device_bytes
    remarks = []
    if not fits:
        remarks.append(f"{_gib(plan.peak)} GiB are more than {filled:.0%} of {gpus.gib:g} GiB.")
    if plan.engine_tokens is not None:
        needed = setup.vllm_length or setup.length
        if plan.engine_tokens < needed:
            fits = False
            remarks.append(
                f"vLLM's share leaves room for {plan.engine_tokens:,} tokens, but one sequence may take {needed:,}: "
                "raise vllm_gpu_memory_utilization, or set vllm_max_model_length to what is needed."
            )
        else:
            remarks.append(
                f"vLLM's key-value cache holds {plan.engine_tokens:,} tokens, {plan.engine_tokens // needed} sequences of "
                f"{needed:,}."
            )
    remarks += uncounted(settings)
    is_full = setup.zero_stage is None and setup.trains_weights
    if is_full and loses_updates(settings["dtype"], float(settings["learning_rate"])):
        remarks.append(LOST_UPDATES)
    if gpus.count > 1 and request.accelerate is None:
        remarks.append("Without --accelerate_config l2t train starts one process; counted as multi_gpu here.")
    return Verdict(shape, setup, plan, fits, remarks)


def uncounted(settings: dict[str, Any]) -> list[str]:
    """Return what settings change that a plan does not count."""
    remarks = [
        f"{name} is not counted: weights are taken as {settings['dtype']}." for name in QUANTISED if settings[name]
    ]
    if settings["optim"] not in ADAM:
        remarks.append(f"optim {settings['optim']} is not counted: its state is taken as Adam's, two moments.")
    if settings["attn_implementation"] == "eager":
        remarks.append("attn_implementation eager is not counted: it keeps heads x length x length scores, sdpa none.")
    return remarks


def make_setup(request: Request, shape: Shape) -> Setup:
    """Return the sizes that a request's memory depends on."""
    settings, accelerate, gpus = request
    is_gpu = gpus.name.lower() != CPU
    deepspeed = (accelerate or {}).get("deepspeed_config") or {}
    batch, accumulation = (
        whole(settings, "per_device_train_batch_size"),
        whole(settings, "gradient_accumulation_steps"),
    )
    if settings["generation_batch_size"] is not None:
        rollouts = math.ceil(whole(settings, "generation_batch_size") / gpus.count)
    else:
        rollouts = batch * _whole_or(settings, "steps_per_generation", accumulation)
    prompt = _whole_or(settings, "max_prompt_length", 1024)
    adapters, adapter_inputs = None, 0
    if settings["use_peft"]:
        modules = settings["lora_target_modules"] or LORA_MODULES
        modules = [modules] if isinstance(modules, str) else modules
        if modules == ["all-linear"]:
            modules = list(shape.linear_sizes)
        unknown = set(modules) - set(shape.linear_sizes)
        if unknown:
            raise UserError(
                f"lora_target_modules: a plan counts {', '.join(shape.linear_sizes)}, got {sorted(unknown)}."
            )
        adapters = adapter_parameters(shape, whole(settings, "lora_r"), modules)
        adapter_inputs = sum(shape.linear_sizes[name][1] for name in modules)
    is_l2t = settings["method"] == "l2t"
    probes = 0
    if is_l2t and settings["correctness_estimator"] == "answer_likelihood":
        probe = math.ceil(len(settings["answer_probe"]) / CHARACTERS_PER_TOKEN) + ANSWER_TOKENS
        probes = probe * (whole(settings, "max_episodes") + 1)
    if settings["vllm_mode"] not in VLLM_MODES:
        raise UserError(f"vllm_mode must be one of {', '.join(VLLM_MODES)}, got {settings['vllm_mode']!r}.")
    is_colocated = settings["use_vllm"] and settings["vllm_mode"] == "colocate"
    return Setup(
        num_processes=gpus.count,
        is_gpu=is_gpu,
        device_bytes=int(gpus.gib * GIB),
        dtype=settings["dtype"] or "float32",
        # Where bf16 is not set, it follows the machine.
        is_mixed=is_gpu if settings["bf16"] is None else settings["bf16"],
        zero_stage=zero_stage(accelerate),
        offloads_optimizer=deepspeed.get("offload_optimizer_device", "none") != "none",
        offloads_parameters=deepspeed.get("offload_param_device", "none") != "none",
        batch_size=batch,
        accumulation=accumulation,
        rollout_batch_size=rollouts,
        prompt_length=prompt,
        completion_length=whole(settings, "max_completion_length"),
        checkpoints_activations=bool(settings["gradient_checkpointing"]),
        is_flash="flash" in (settings["attn_implementation"] or ""),
        has_reference=float(settings["beta"]) > 0 and adapters is None,
        adapter_parameters=adapters,
        adapter_inputs=adapter_inputs,
        uses_vllm=bool(settings["use_vllm"]),
        vllm_share=float(settings["vllm_gpu_memory_utilization"]) if is_colocated else None,
        vllm_sleeps=bool(settings["vllm_enable_sleep_mode"]),
        vllm_tensor_parallel=whole(settings, "vllm_tensor_parallel_size"),
        vllm_length=_whole_or(settings, "vllm_max_model_length", None),
        scoring_batch_size=_whole_or(settings, "scoring_batch_size", batch) if is_l2t else None,
        num_probe_tokens=probes,
    )


def _whole_or(settings: dict[str, Any], name: str, otherwise: int | None) -> int | None:
    return otherwise if settings[name] is None else whole(settings, name)


def changes(request: Request) -> list[tuple[str, Request]]:
    """
    Return the fewest of the usual changes that make a request fit, in the order in which they cost least, each with
    the request after it and those before; none if all of them do not suffice.
    """
    chosen: list[tuple[str, Callable[[Request], Request | None]]] = []
    for name, change in CHANGES:
        if _apply(request, [*chosen, (name, change)]) is None:
            continue
        chosen.append((name, change))
        if judge(_apply(request, chosen)).fits:
            break
    else:
        return []
    # The costliest first: what costs less may do without it.
    for item in chosen[::-1]:
        fewer = [other for other in chosen if other is not item]
        after = _apply(request, fewer)
        if after is not None and judge(after).fits:
            chosen = fewer
    return [(chosen[index][0], _apply(request, chosen[: index + 1])) for index in range(len(chosen))]


def report(request: Request, verdict: Verdict) -> str:
    """Return the text that `l2t plan` prints."""
    shape, setup, plan = verdict.shape, verdict.setup, verdict.plan
    settings, gpus = request.settings, request.gpus
    stage = "no DeepSpeed" if setup.zero_stage is None else f"ZeRO-{setup.zero_stage}"
    completions = setup.batch_size * setup.accumulation * setup.num_processes
    lines = [
        f"{settings['model_name_or_path']}, {settings['method']}: {shape.num_parameters / 1e9:.3f} B parameters, "
        f"{trainable_parameters(shape, setup) / 1e9:.3f} B trained",
        f"{gpus.count} x {gpus.name} with {gpus.gib:g} GiB, {stage}; {completions} completions of at most "
        f"{setup.completion_length:,} tokens per optimiser step",
        "",
        f"GiB per {'GPU' if setup.is_gpu else 'process'}, always there",
    ]
    lines += [f"  {name:<40}{_gib(size):>6}" for name, size in plan.resident.items()]
    for name, items in plan.phases.items():
        mark = "  <- peak" if name == plan.peak_phase else ""
        lines.append(f"during {name:<35}{_gib(sum(items.values())):>6}{mark}")
        lines += [f"  {part:<40}{_gib(size):>6}" for part, size in items.items() if size >= SHOWN]
    if plan.host:
        lines.append("in CPU memory, all processes")
        lines += [f"  {name:<32}{_gib(size * setup.num_processes):>6}" for name, size in plan.host.items()]
    lines += ["", f"{'peak':<42}{_gib(plan.peak):>6}  of {gpus.gib:g}: {'fits' if verdict.fits else 'DOES NOT FIT'}"]
    lines += verdict.remarks
    if not verdict.fits:
        steps = changes(request)
        if steps:
            lines.append("What would make it fit:")
            lines += [f"  {name:<66} peak {_gib(judge(after).plan.peak)} GiB" for name, after in steps]
        else:
            lines.append("No usual change makes it fit: shorter completions, more or larger GPUs.")
    return "\n".join(lines)


def _apply(request: Request, chosen: list) -> Request | None:
    for _, change in chosen:
        request = change(request)
        if request is None:
            return None
    return request


def _with(request: Request, **settings) -> Request:
    return request._replace(settings=request.settings | settings)


def _checkpoint(request: Request) -> Request | None:
    return None if request.settings["gradient_checkpointing"] else _with(request, gradient_checkpointing=True)


def _smaller_batch(request: Request) -> Request | None:
    settings = request.settings
    batch = whole(settings, "per_device_train_batch_size")
    if batch == 1:
        return None
    steps = settings["steps_per_generation"]
    return _with(
        request,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=batch * whole(settings, "gradient_accumulation_steps"),
        steps_per_generation=None if steps is None else batch * steps,
    )


def _sleep(request: Request) -> Request | None:
    settings = request.settings
    if not settings["use_vllm"] or settings["vllm_mode"] != "colocate" or settings["vllm_enable_sleep_mode"]:
        return None
    return _with(request, vllm_enable_sleep_mode=True)


def _engine(request: Request) -> Request | None:
    return None if request.settings["use_vllm"] else _with(request, use_vllm=True)


def _smaller_engine(request: Request) -> Request | None:
    settings = request.settings
    if not settings["use_vllm"] or settings["vllm_mode"] != "colocate":
        return None
    if settings["vllm_gpu_memory_utilization"] <= SMALL_SHARE:
        return None
    smaller = _with(request, vllm_gpu_memory_utilization=SMALL_SHARE)
    setup = make_setup(smaller, shape := find_shape(settings["model_name_or_path"]))
    has_room = make_plan(shape, setup).engine_tokens >= (setup.vllm_length or setup.length)
    return smaller if has_room else None


def _other_gpus(request: Request) -> Request | None:
    settings = request.settings
    is_colocated = settings["use_vllm"] and settings["vllm_mode"] == "colocate"
    return _with(request, vllm_mode="server") if is_colocated else None


def _flash(request: Request) -> Request | None:
    has_flash = "flash" in (request.settings["attn_implementation"] or "")
    return None if has_flash else _with(request, attn_implementation="flash_attention_2")


def _zero(name: str) -> Callable[[Request], Request | None]:
    def change(request: Request) -> Request | None:
        wanted = read_accelerate(name)
        present = (request.accelerate or {}).get("deepspeed_config") or {}
        offloads = present.get("offload_param_device", "none") != "none"
        stages = zero_stage(request.accelerate) or 0, zero_stage(wanted)
        if offloads or stages[0] > stages[1] or (stages[0] == stages[1] and name != "zero3_offload"):
            return None
        return request._replace(accelerate=wanted)

    return change


def _adapters(request: Request) -> Request | None:
    return None if request.settings["use_peft"] else _with(request, use_peft=True)


# What costs least comes first.
CHANGES = (
    ("gradient_checkpointing: true", _checkpoint),
    ("per_device_train_batch_size: 1, more gradient_accumulation_steps", _smaller_batch),
    ("attn_implementation: flash_attention_2 (needs flash-attn)", _flash),
    ("--accelerate_config zero2", _zero("zero2")),
    ("--accelerate_config zero3", _zero("zero3")),
    ("use_vllm: true", _engine),
    ("vllm_enable_sleep_mode: true", _sleep),
    (f"vllm_gpu_memory_utilization: {SMALL_SHARE}", _smaller_engine),
    ("vllm_mode: server, with l2t serve on other GPUs", _other_gpus),
    ("--accelerate_config zero3_offload", _zero("zero3_offload")),
    ("use_peft: true (LoRA)", _adapters),
)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
