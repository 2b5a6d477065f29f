"""
Sampling completions from a transformers model.

torch is imported where a model is sampled, so that reports are written, and the command line answers, without it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def check_sampling(temperature: float, top_p: float) -> None:
    """Raise a [`ValueError`] for a temperature or nucleus out of range."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be a finite number, 0 (greedy) or larger, got {temperature}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}.")


def tokenize(tokenizer: "PreTrainedTokenizerBase", prompt: str | list[dict[str, str]]) -> list[int]:
    """Return a prompt's ids, as TRL's trainers make them."""
    if isinstance(prompt, str):
        return tokenizer(text=prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]


def end_ids_of(settings: "GenerationConfig", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids that end a completion: the tokenizer's, and those that the model's settings name besides."""
    ids = settings.eos_token_id
    return sorted({*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id} - {None})


def generation_config(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    end_ids: list[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> "GenerationConfig":
    from transformers import GenerationConfig

    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (end_ids[0] if end_ids else 0)
    how = {"do_sample": False}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    # What is not named here would come from the model's own settings, such as the repetition penalty of Qwen2.5.
    return GenerationConfig(
        **how,
        max_new_tokens=max_new_tokens,
        # Set, it costs a sort of the vocabulary per token; so only against a model that sets it.
        min_p=None if model.generation_config.min_p is None else 0.0,
        typical_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        num_beams=1,
        num_return_sequences=1,
        use_cache=True,
        eos_token_id=end_ids or None,
        pad_token_id=pad_id,
        disable_compile=True,
    )


@contextmanager
def evaluation_mode(model: "PreTrainedModel", seed: int) -> Iterator[None]:
    """Evaluation mode, no gradients and seeded random numbers inside; everything as before outside."""
    import torch

    # Modules may differ in mode (a frozen dropout, say), so each gets its own back.
    modes = {module: module.training for module in model.modules()}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            for module, is_training in modes.items():
                module.training = is_training


def sample(
    model: "PreTrainedModel",
    prompt_ids: Sequence[Sequence[int]],
    how: "GenerationConfig",
    end_ids: Sequence[int],
    choose: Callable | None = None,
) -> list[list[int]]:
    """
    Return one completion per prompt, the token that ends it included, padding left out.

    With `choose`, such as a [`RowSampler`], it chooses every token, and `how` must be greedy.
    """
    import torch

    width = max(len(ids) for ids in prompt_ids)
    input_ids = torch.tensor([[how.pad_token_id] * (width - len(ids)) + list(ids) for ids in prompt_ids])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids])
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=how,
        **({} if choose is None else {"logits_processor": [choose]}),
    )
    completions = []
    for ids in output[:, width:].tolist():
        end = next((i for i, token in enumerate(ids) if token in end_ids), None)
        completions.append(ids if end is None else ids[: end + 1])
    return completions


class RowSampler:
    """
    Samples every row of a batch with random numbers of its own, so that no row depends on which others are beside it.

    A logits processor for greedy decoding: it leaves the sampled token alone. One uniform number per row and token is
    looked up in the cumulative distribution.

    Args:
        seeds (`Sequence[int]` of length B): seed of every row.
        temperature (`float`): above 0.
        top_p (`float`): share of the probability that is sampled from.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float):
        self.sources = [Random(seed) for seed in seeds]
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        import torch

        probabilities = (scores.float() / self.temperature).softmax(-1)  # (B, V)
        if self.top_p < 1:
            ordered, order = probabilities.sort(descending=True, stable=True)
            # The token that reaches the share still belongs to it.
            ordered[ordered.cumsum(-1) - ordered >= self.top_p] = 0
            probabilities = torch.zeros_like(probabilities).scatter(1, order, ordered)
        # Of doubles, or the rounding of a large vocabulary's sum would show.
        cumulative = probabilities.double().cumsum(-1)
        uniform = torch.tensor([source.random() for source in self.sources], device=scores.device, dtype=torch.float64)
        chosen = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
        chosen = chosen.clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)
