r"""
The low-rank proxy of the parameters (paper Thm. 4.2, App. F): the leading singular values of a few weight matrices.

A weight W (out x in) is decomposed as W ~ U diag(theta) V^T; U and V stay fixed, and the r singular values theta stand
for the matrix. By default the matrices are those of the last decoder layer's MLP, "a single-layer MLP".
"""

import re
from random import Random

import torch
from torch import nn

from l2t_trl.sharding import Basis, gathered


def proxy_module_names(model: nn.Module, pattern: str | None = None, seed: int = 0) -> list[str]:
    """
    Names of the linear modules whose weights carry the proxy.

    Args:
        model (`nn.Module`): the policy.
        pattern (`str`, *optional*):
            By default the linear layers of the last decoder layer's MLP. Else a regular expression that must match a
            whole module name, or `"random:SHARE"`: all linear layers of a random share of the decoder layers.
        seed (`int`, *optional*, defaults to `0`): seed of the random share.

    Raises:
        ValueError: if no linear layer matches.
    """
    model = causal_lm(model)
    linear = [name for name, module in model.named_modules() if is_linear(module)]
    # A LoRA layer wraps linear layers of its own; the outermost carries the effective weight.
    linear = [name for name in linear if not any(name.startswith(f"{other}.") for other in linear)]
    layers = _decoder_layers(model)
    if pattern is None:
        names = [name for name in linear if layers and name.startswith(f"{layers[-1]}.mlp.")]
        if layers and any(name == f"{layers[-1]}.mlp.experts" for name, _ in model.named_modules()):
            raise ValueError(
                f"The last MLP of {type(model).__name__} is a mixture of experts, whose tokens take different weights. "
                "Set proxy_modules to a regular expression over linear layers that every token passes, such as those of "
                "its attention."
            )
    elif pattern.startswith("random:"):
        share = pattern.removeprefix("random:")
        if not re.fullmatch(r"0?\.\d+|1(\.0*)?", share) or float(share) == 0:
            raise ValueError(f"proxy_modules 'random:SHARE' takes a share above 0 and at most 1, got {pattern!r}.")
        chosen = Random(seed).sample(layers, max(1, round(float(share) * len(layers))))
        names = [name for name in linear if any(name.startswith(f"{layer}.") for layer in chosen)]
    else:
        names = [name for name in linear if re.fullmatch(pattern, name)]
    if not names:
        examples = ", ".join(name for name in linear if layers and name.startswith(f"{layers[-1]}."))
        raise ValueError(
            f"proxy_modules={pattern!r} matches no linear layer of {type(model).__name__}. Set a regular expression that "
            f"matches whole module names, such as those of its last layer: {examples or ', '.join(linear[-4:])}."
        )
    return names


def proxy_bases(model: nn.Module, names: list[str], ratio: float) -> dict[str, Basis]:
    """
    Singular vectors of the proxy modules' weights.

    Args:
        model (`nn.Module`): the policy.
        names (`list[str]`): the modules, from [`proxy_module_names`].
        ratio (`float`): rank relative to the smaller side of each weight, in (0, 1].

    Returns:
        `dict[str, tuple[torch.Tensor, torch.Tensor]]`: U of shape `(out, r)` and V of shape `(in, r)` by module name.
    """
    modules = dict(causal_lm(model).named_modules())
    bases = {}
    for name in names:
        with gathered(model, [modules[name]]):  # one matrix at a time
            weight = effective_weight(modules[name])
        u, _, v = low_rank_basis(weight, proxy_rank(weight, ratio))
        bases[name] = (u, v)
    return bases


def proxy_rank(weight: torch.Tensor, ratio: float) -> int:
    """Rank of a weight's proxy: `ratio` times its smaller side, rounded down, at least 1."""
    return max(1, int(ratio * min(weight.shape)))


def low_rank_basis(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Truncated singular value decomposition `W ~ U diag(S) V^T` in fp32.

    Args:
        weight (`torch.Tensor` of shape `(out, in)`): weight matrix.
        rank (`int`): number of leading singular directions.

    Returns:
        `U` of shape `(out, rank)`, `S` of shape `(rank,)`, `V` of shape `(in, rank)`.
    """
    u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    return u[:, :rank].contiguous(), s[:rank].contiguous(), vh[:rank].T.contiguous()


def effective_weight(module: nn.Module) -> torch.Tensor:
    """Weight `(out, in)` with which a linear layer acts, active LoRA adapters merged in, detached, in fp32."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    weight = base.weight.detach()
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"A proxy needs a floating-point matrix, got {tuple(weight.shape)} {weight.dtype} from "
            f"{type(base).__name__}. Load the model without quantization or set proxy_modules to other layers."
        )
    weight = weight.float()
    if base is not module and not module.disable_adapters and not module.merged:
        for adapter in module.active_adapters:
            if adapter in module.lora_A:
                weight = weight + module.get_delta_weight(adapter).detach().float()
    return weight


def causal_lm(model: nn.Module) -> nn.Module:
    """
    The causal language model inside a PEFT wrapper, adapters included, or the model itself.

    Raises:
        ValueError: for prompt learning, whose virtual tokens are no part of the model inside.
    """
    if not hasattr(model, "peft_config"):
        return model
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise ValueError("Completions cannot be scored under prompt learning (virtual tokens). Use LoRA instead.")
    return model.get_base_model()


def is_linear(module: nn.Module) -> bool:
    """Whether a module acts by one matrix that a proxy can stand for: a linear layer, with LoRA around it or not."""
    return isinstance(module, nn.Linear) or (hasattr(module, "lora_A") and hasattr(module, "get_base_layer"))


def _decoder_layers(model: nn.Module) -> list[str]:
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return []
    prefix = next(name for name, module in model.named_modules() if module is layers)
    return [f"{prefix}.{index}" for index in range(len(layers))]
