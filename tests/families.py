"""Folders of random-weight models that stand for those of the recipes: architecture, tokenizer and chat template."""

from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


TEMPLATES = Path(find_spec("trl").submodule_search_locations[0], "chat_templates")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
R1 = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
THINK = ["<think>", "</think>"]  # single tokens, but not special: they are part of the text


def build(family: str, folder: Path, qwen_tokenizer) -> Path:
    """
    Write a model and its tokenizer in the Hub's layout.

    Args:
        family (`str`): `"qwen-tied"`, `"qwen-untied"`, `"r1"` or `"smollm2"`.
        folder (`Path`): folder to make.
        qwen_tokenizer: byte-level tokenizer of the class that Qwen2 models have.
    """
    if family == "r1":
        tokenizer = byte_tokenizer(R1, THINK, bos=R1[0], eos=R1[1], pad=R1[1])
        tokenizer.chat_template = (TEMPLATES / "deepseek_r1_distill.jinja").read_text()
    elif family == "smollm2":
        tokenizer = byte_tokenizer(CHATML, [], bos=None, eos=CHATML[2], pad=CHATML[2])
        tokenizer.chat_template = qwen_tokenizer.chat_template
    else:
        tokenizer = qwen_tokenizer
    tokenizer.save_pretrained(folder)
    if family.startswith("qwen"):
        (folder / "chat_template.jinja").write_text((TEMPLATES / "qwen2_5.jinja").read_text())
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    settings = SIZES | ids | {"vocab_size": len(tokenizer) + 5, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    if family == "smollm2":
        model = LlamaForCausalLM(LlamaConfig(**settings, tie_word_embeddings=True))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**settings, tie_word_embeddings=family == "qwen-tied"))
    model.save_pretrained(folder)
    return folder


def byte_tokenizer(special: list[str], plain: list[str], bos: str | None, eos: str, pad: str):
    """A tokenizer of single bytes, control tokens and plain tokens; a begin token is put in front of every text."""
    vocabulary = {token: index for index, token in enumerate([*special, *BYTES])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, padding_side="left"
    )
