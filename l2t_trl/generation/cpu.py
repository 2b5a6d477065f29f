"""What vLLM has to be told on a machine without a GPU."""

import os
from typing import Any


# By default an engine binds its threads to cores, and with them all else that its process does.
UNBOUND_THREADS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
BLOCK_SIZE = 128  # tokens of a block of the key-value cache
CPU_CACHE_SHARE = 0.3  # of the memory, at most, for the cache of an engine that has the machine to itself


def cache_bytes(config, length: int, itemsize: int) -> int:
    """Bytes of one sequence of `length` tokens in the key-value cache of a model with a given text configuration."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_blocks = -(-length // BLOCK_SIZE)
    return num_blocks * BLOCK_SIZE * config.num_hidden_layers * 2 * heads * head_dim * itemsize


def physical_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def engine_arguments(
    config, dtype, length: int | None, num_sequences: int | None, memory_share: float
) -> dict[str, Any]:
    """
    Arguments of `vllm.LLM` without a GPU.

    Args:
        config: the model's text configuration.
        dtype (`torch.dtype`): precision of the weights.
        length (`int`, *optional*): longest sequence in tokens; by default what the model takes.
        num_sequences (`int`, *optional*): sequences at a time; by default 256.
        memory_share (`float`): most of the machine's memory that the key-value cache may take.
    """
    length = length or config.max_position_embeddings
    # No more than the batch can fill, as long as that is within the share of memory.
    memory = min(
        (num_sequences or 256) * cache_bytes(config, length, dtype.itemsize), int(memory_share * physical_memory())
    )
    return {
        # Compiling takes minutes, far longer than it saves in runs of the size that a CPU is for.
        "enforce_eager": True,
        # vLLM would take bfloat16 for a float32 model, and its log-probabilities would not be the trainer's.
        "dtype": str(dtype).removeprefix("torch."),
        # With a size given, no warm-up pass is needed to find it.
        "kv_cache_memory_bytes": memory,
    }


def leave_threads_alone() -> None:
    """Let engines that are built from now on not bind this process's threads to cores, unless the user says so."""
    for name, value in UNBOUND_THREADS.items():
        os.environ.setdefault(name, value)


def without_compiling():
    """vLLM compiles its sampler even in eager mode, 11 s for a function of four operations."""
    import torch

    return torch.compiler.set_stance("force_eager")
