"""Tiny random causal language models in fp32, one per shape of last block that scoring has to get right."""

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Starcoder2Config,
)


VOCABULARY_SIZE = 61

_SIZES = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_NO_KEY_VALUE_HEADS = {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"}
# Windows and alternations are small enough to bite on rows of 40 tokens.
_CONFIGS = {
    "qwen2_untied": lambda: Qwen2Config(**_SIZES, tie_word_embeddings=False),
    "qwen2_tied": lambda: Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "qwen2_biases": lambda: Qwen2Config(**_SIZES, tie_word_embeddings=False),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=8, tie_word_embeddings=True),
    "llama": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=False),
    "llama_biases": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "mistral_window": lambda: MistralConfig(**_SIZES, head_dim=8, sliding_window=8),
    "gemma2": lambda: Gemma2Config(
        **_SIZES,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        attn_implementation="eager",  # SDPA has no soft cap
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=8, sliding_window_pattern=2
    ),
    "olmo2": lambda: Olmo2Config(**_SIZES, tie_word_embeddings=False),
    "phi3_fused": lambda: Phi3Config(**_SIZES, tie_word_embeddings=False),
    "starcoder2": lambda: Starcoder2Config(
        **_SIZES, sliding_window=8, residual_dropout=0.0, embedding_dropout=0.0, attention_dropout=0.0
    ),
    "granite": lambda: GraniteConfig(
        **_SIZES, residual_multiplier=0.5, embedding_multiplier=2.0, attention_multiplier=0.3, logits_scaling=1.5
    ),
    "gpt_neox_parallel": lambda: GPTNeoXConfig(
        **_NO_KEY_VALUE_HEADS, use_parallel_residual=True, attention_dropout=0.0, hidden_dropout=0.0
    ),
    "phi_parallel": lambda: PhiConfig(**_SIZES, resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0),
    "cohere2_parallel": lambda: Cohere2Config(**_SIZES, sliding_window=8, logit_scale=0.5),
    "gpt2_conv1d": lambda: GPT2Config(
        vocab_size=VOCABULARY_SIZE,
        n_positions=512,
        n_embd=32,
        n_layer=3,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_SIZES,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "mixtral": lambda: MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
}

# Last block = residual + f(MLP(norm(x))), then norm and lm_head: what the exact one-pass gradients were made for.
DENSE = (
    "qwen2_untied",
    "qwen2_tied",
    "qwen2_biases",
    "qwen3",
    "llama",
    "llama_biases",
    "mistral_window",
    "gemma2",
    "gemma3",
    "olmo2",
)
# Everything else may take a slow path, with a warning, or be refused, but must never give a wrong number.
ODD = tuple(name for name in _CONFIGS if name not in DENSE)


def build(name: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A model in evaluation mode; `overrides` are set on its config (`attn_implementation`, dropout rates, ...)."""
    config: PretrainedConfig = _CONFIGS[name]()
    attention = overrides.pop("attn_implementation", config._attn_implementation or "sdpa")
    for key, value in overrides.items():
        if not hasattr(config, key):
            raise ValueError(f"{type(config).__name__} has no setting {key!r}.")
        setattr(config, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
        if name == "qwen2_biases":
            _add_biases(model)
        _randomise(model)
    return model.eval()


def build_lora(seed: int = 0, name: str = "qwen2_untied", adapters: tuple[str, ...] = ("default",)) -> nn.Module:
    """A LoRA model whose adapters do something: on attention and MLP of every layer, with non-zero B."""
    from peft import LoraConfig, get_peft_model

    def settings(rank: int) -> LoraConfig:
        return LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=0.0,
            target_modules=["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
            task_type="CAUSAL_LM",
        )

    model = build(name, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        model = get_peft_model(model, settings(3), adapter_name=adapters[0])
        for rank, adapter in enumerate(adapters[1:], start=4):
            model.add_adapter(adapter, settings(rank))
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                nn.init.normal_(parameter, std=0.15)
    return model.eval()


def _add_biases(model: PreTrainedModel):
    # No setting of Qwen2 asks for these, so the layers are replaced: every MLP and the lm_head get a bias.
    def with_bias(layer: nn.Linear) -> nn.Linear:
        return nn.Linear(layer.in_features, layer.out_features, bias=True)

    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, with_bias(getattr(layer.mlp, name)))
    model.lm_head = with_bias(model.lm_head)


@torch.no_grad()
def _randomise(model: PreTrainedModel):
    # Larger than the library's 0.02, so that probabilities are far from uniform, and nothing is left at 0 or 1,
    # where a forgotten bias or norm weight would not show.
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=0.2)
        elif parameter.abs().max() == 0:
            parameter.normal_(std=0.2)
        else:
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
