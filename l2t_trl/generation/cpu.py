"""What vLLM has to be told on a machine without a GPU."""

import os


# By default an engine binds its threads to cores, and with them all else that its process does.
UNBOUND_THREADS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
BLOCK_SIZE = 128  # tokens of a block of the key-value cache


def cache_bytes(config, length: int, itemsize: int) -> int:
    """Bytes of one sequence of `length` tokens in the key-value cache of a model with a given text configuration."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_blocks = -(-length // BLOCK_SIZE)
    return num_blocks * BLOCK_SIZE * config.num_hidden_layers * 2 * heads * head_dim * itemsize


def physical_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
