"""
What completes prompts in an evaluation: a transformers model, or vLLM in this process.

Every completion has a seed of its own, so that its random numbers do not depend on what else is generated, nor on the
batch it is in. Rounding does: an engine repeats itself to the bit where it is given the same batches in turn, and
otherwise up to tokens whose probabilities were equal but for rounding.
"""

import os
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

from ..errors import UserError
from .sampling import RowSampler, end_ids_of, evaluation_mode, generation_config, sample


CPU_BATCHED_TOKENS = 4096  # that vLLM reads in one step without a GPU, if no prompt is longer


class Engine(Protocol):
    """
    Completes prompts.

    Attributes:
        end_ids (`list[int]`): the token ids that end a completion.
    """

    end_ids: list[int]

    def complete(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_tokens: int, temperature: float, top_p: float
    ) -> list[list[int]]:
        """
        Return the token ids of one completion per prompt, the one that ends it included.

        Args:
            prompts (`Sequence[Sequence[int]]` of length B): token ids.
            seeds (`Sequence[int]` of length B): seed of each.
            max_tokens (`int`): longest completion.
            temperature (`float`): 0 decodes greedily.
            top_p (`float`): share of the probability that is sampled from.
        """
        ...


class TransformersEngine:
    """
    A transformers model, on the GPU if there is one.

    Args:
        path (`str`): model folder, adapters too, or Hub id.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        dtype (`str`): precision that it is loaded in.
    """

    def __init__(self, path: str, tokenizer, dtype: str):
        from ..models import load_model

        self.model, self.tokenizer = load_model(path, dtype), tokenizer
        self.end_ids = end_ids_of(self.model.generation_config, tokenizer)

    def complete(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_tokens: int, temperature: float, top_p: float
    ) -> list[list[int]]:
        """As [`Engine`] says."""
        how = generation_config(self.model, self.tokenizer, self.end_ids, max_tokens, 0.0, 1.0)
        choose = RowSampler(seeds, temperature, top_p) if temperature > 0 else None
        with evaluation_mode(self.model, seed=0):
            return sample(self.model, prompts, how, self.end_ids, choose)


class VllmEngine:
    """
    vLLM in this process. Adapters are merged into the weights, which takes room for the model in the temporary folder.

    Args:
        path (`str`): model folder, adapters too, or Hub id.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        dtype (`str`): precision that it is loaded in.
        max_length (`int`): longest prompt and completion together, in tokens.
        num_sequences (`int`): most completions at a time.
        memory_share (`float`): share of the GPU's memory that it takes.
        num_gpus (`int`): GPUs that the model is spread over.
    """

    def __init__(
        self,
        path: str,
        tokenizer,
        dtype: str,
        max_length: int,
        num_sequences: int,
        memory_share: float = 0.8,
        num_gpus: int = 1,
    ):
        # The worker runs in this process: there is no second one to start.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import torch
        from transformers import AutoConfig, GenerationConfig

        from ..generation.cpu import CPU_CACHE_SHARE, engine_arguments, leave_threads_alone

        self._is_on_cpu = not torch.cuda.is_available()
        if self._is_on_cpu:
            leave_threads_alone()
        with tempfile.TemporaryDirectory() as scratch:
            if Path(path, "adapter_config.json").exists():
                path = _merged(path, tokenizer, dtype, Path(scratch))
            try:
                settings = GenerationConfig.from_pretrained(path)
            except OSError:
                settings = GenerationConfig.from_model_config(AutoConfig.from_pretrained(path))
            self.end_ids = end_ids_of(settings, tokenizer)
            arguments = {
                "dtype": dtype,
                "gpu_memory_utilization": memory_share,
                "tensor_parallel_size": num_gpus,
            }
            if self._is_on_cpu:
                config = AutoConfig.from_pretrained(path).get_text_config(decoder=True)
                arguments = engine_arguments(config, getattr(torch, dtype), max_length, num_sequences, CPU_CACHE_SHARE)
                # Behind a part of a prompt vLLM winds a request's random numbers back, which CPU generators cannot do:
                # prompts are read whole.
                arguments |= {
                    "enable_chunked_prefill": False,
                    "max_num_batched_tokens": max(max_length, CPU_BATCHED_TOKENS),
                }
            from vllm import LLM

            with self._quietly():
                self.llm = LLM(
                    path,
                    max_model_len=max_length,
                    max_num_seqs=num_sequences,
                    seed=0,
                    disable_log_stats=True,
                    **arguments,
                )

    def complete(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_tokens: int, temperature: float, top_p: float
    ) -> list[list[int]]:
        """As [`Engine`] says."""
        from vllm import SamplingParams

        how = [
            SamplingParams(
                temperature=temperature,
                top_p=top_p,
                max_tokens=max_tokens,
                seed=seed,
                stop_token_ids=self.end_ids,
                detokenize=False,
            )
            for seed in seeds
        ]
        # What is in the cache changes what is computed together, and with it the rounding.
        self.llm.reset_prefix_cache()
        with self._quietly():
            outputs = self.llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], how, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def _quietly(self):
        from ..generation.cpu import without_compiling

        return without_compiling() if self._is_on_cpu else nullcontext()


def _merged(path: str, tokenizer, dtype: str, folder: Path) -> str:
    """Write a model with its adapters merged into its weights; vLLM then needs to know nothing of them."""
    import torch

    from ..models import load_model

    try:
        load_model(path, dtype).merge_and_unload().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except OSError as error:
        raise UserError(
            f"--model {path}: the model with its adapters merged cannot be written to {folder} ({error.strerror}). Set "
            "TMPDIR to a folder with room."
        ) from error
    # The engine takes its share of what is free.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return str(folder)
