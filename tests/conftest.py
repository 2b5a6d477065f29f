"""Fixtures for all tests: nothing is downloaded, and every model is tiny."""

import os


# Before transformers or datasets is imported: a test that would reach for the network fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The models are so small that threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("L2T_DATA_ROOT", None)

import pytest  # noqa: E402


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NUM_EPISODE_TAGS = 30


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """
    Byte-level Qwen2 tokenizer: 256 bytes, the chat's control tokens, and episode tags as single, non-special tokens.

    Its class is the one that AutoTokenizer chooses for a folder with a Qwen2 configuration, so a reload encodes alike.
    """
    from tokenizers import AddedToken, pre_tokenizers
    from transformers import Qwen2Tokenizer

    vocabulary = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )
    tags = ["<think>", "</think>"]
    tags += [tag for k in range(1, NUM_EPISODE_TAGS + 1) for tag in (f"<episode_{k}>", f"</episode_{k}>")]
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return tokenizer


def write_qwen2(folder, tokenizer, **settings):
    """Write a Qwen2 model with random weights (2 layers, width 64) and a tokenizer, in the Hub's layout."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tiny_tokenizer):
    """Folder of a Qwen2 model with random weights (2 layers, width 64) and `tiny_tokenizer`, in the Hub's layout."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_qwen2(folder, tiny_tokenizer, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    return folder
