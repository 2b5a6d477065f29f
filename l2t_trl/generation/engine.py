"""
The rollout engine: TRL's, and what that lacks without a GPU and where trainer and server share no more than a folder.

On an accelerator with vLLM in the trainer's process, or with a server that takes weights by NCCL, nothing is changed
but the checks of the server.
"""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration
from trl.import_utils import is_vllm_available
from trl.trainer import grpo_trainer

from l2t_trl.errors import RolloutError
from l2t_trl.generation.cpu import engine_arguments, leave_threads_alone, without_compiling
from l2t_trl.generation.weight_folder import WeightFolder
from l2t_trl.generation.worker import load_weights


logger = logging.getLogger(__name__)


@contextmanager
def rollout_engine(args) -> Iterator[None]:
    """Let the GRPO trainers of TRL that are built meanwhile use [`RolloutEngine`]; they offer no other way in."""
    theirs = grpo_trainer.VLLMGeneration
    grpo_trainer.VLLMGeneration = partial(RolloutEngine, weight_sync_dir=args.weight_sync_dir)
    try:
        yield
    finally:
        grpo_trainer.VLLMGeneration = theirs


class RolloutEngine(VLLMGeneration):
    """
    TRL's vLLM engine that also runs on CPUs, and sends weights to a server through a folder if asked.

    Args:
        weight_sync_dir (`str`, *optional*): folder that trainer and server share; without it, weights go by NCCL.
        args, kwargs: [`~trl.generation.vllm_generation.VLLMGeneration`]'s.
    """

    def __init__(self, *args, weight_sync_dir: str | None = None, **kwargs):
        self.weight_sync_dir = weight_sync_dir
        super().__init__(*args, **kwargs)

    @property
    def _is_on_cpu(self) -> bool:
        return self.accelerator.device.type == "cpu"

    def _init_vllm(self):
        if self.mode == "server" and is_vllm_available():
            self._connect()
        elif self.mode == "colocate" and self._is_on_cpu and is_vllm_available():
            # vLLM binds the memory of the thread that builds it to one NUMA node, which training should not inherit.
            with _cpu_settings(self._cpu_arguments()), ThreadPoolExecutor(max_workers=1) as thread:
                thread.submit(super()._init_vllm).result()
        else:
            super()._init_vllm()

    def _connect(self) -> None:
        from l2t_trl.generation.client import RolloutClient

        if self.weight_sync_dir is None and self._is_on_cpu:
            raise ValueError(
                "vllm_mode='server' sends weights by NCCL, which needs a GPU, and this trainer runs on the CPU. Set "
                "weight_sync_dir to a folder that the server sees under the same path."
            )
        plugin = self.accelerator.state.deepspeed_plugin
        is_sharded = plugin is not None and plugin.zero_stage == 3 and self.accelerator.num_processes > 1
        if self.accelerator.is_main_process:
            if is_sharded and self.weight_sync_dir is None:
                logger.warning(
                    "TRL 1.16 may hang where several processes send ZeRO-3 shards to a server by NCCL (huggingface/trl"
                    "#6797). If it does, set weight_sync_dir, or vllm_mode='colocate'."
                )
            self.vllm_client = RolloutClient(
                base_url=self.server_base_url or f"http://{self.server_host}:{self.server_port}",
                group_port=self.group_port,
                connection_timeout=self.server_timeout,
                weight_folder=None if self.weight_sync_dir is None else WeightFolder(Path(self.weight_sync_dir)),
            )
            self.vllm_client.check_model(self.model.config.get_text_config(), self.model.name_or_path)
            if self.weight_sync_dir is None:
                self.vllm_client.init_communicator(device=self.accelerator.device)
        self.accelerator.wait_for_everyone()

    def _cpu_arguments(self) -> dict:
        """Arguments of `vllm.LLM` that differ from TRL's where vLLM shares the trainer's CPU."""
        return engine_arguments(
            self.model.config.get_text_config(),
            self.model.dtype,
            self.max_model_length,
            self.max_num_seqs,
            self.gpu_memory_utilization,
        )

    def sync_weights(self):
        if self.mode == "server" and self.weight_sync_dir is not None:
            self._send_through_folder()
        elif self.mode == "colocate" and self._is_on_cpu:
            # A layer's tensors are held until all of them are there, by when a gathered or merged one has changed.
            held = ((name, value.detach().clone()) for name, value in self._iter_named_params())
            load_weights(self.llm.llm_engine.model_executor.driver_worker.model_runner, held)
            self.llm.reset_prefix_cache()
        else:
            if self.mode == "server":
                # NCCL would wait for a server that has gone.
                self._on_main_process(lambda: self.vllm_client.check_alive())
            super().sync_weights()

    def _send_through_folder(self) -> None:
        """Write the weights, which all ranks gather, and let the server load them."""
        client = self.vllm_client if self.accelerator.is_main_process else None
        self._on_main_process(lambda: client.start_weights())
        failure = None
        for name, value in self._iter_named_params():
            if client is not None and failure is None:
                # The others are in the midst of gathering, so that nothing may be raised here.
                failure = _failure_of(lambda name=name, value=value: client.add_weights(name, value))
        self._on_main_process(lambda: client.send_weights(), failure)

    def generate(self, *args, **kwargs) -> tuple:
        with nullcontext() if self.mode == "server" or not self._is_on_cpu else without_compiling():
            output = super().generate(*args, **kwargs)
        if self.mode == "server":
            # What the client has met, and answered for with nothing.
            self._on_main_process(lambda: self.vllm_client.raise_failure())
        return output

    def close(self) -> None:
        """End an engine in this process, which would do so at exit and fail where the process groups are gone by then."""
        if self.mode == "colocate":
            self.llm.llm_engine.engine_core.shutdown()

    def _on_main_process(self, function: Callable[[], None], failure: str | None = None) -> None:
        """Call a function on the main process, unless it has failed before; what fails there is raised on all ranks."""
        if self.accelerator.is_main_process and failure is None:
            failure = _failure_of(function)
        (failure,) = broadcast_object_list([failure], from_process=0)
        if failure is not None:
            raise RolloutError(failure)


def _failure_of(function: Callable[[], None]) -> str | None:
    try:
        function()
    except RolloutError as error:
        return str(error)
    return None


@contextmanager
def _cpu_settings(arguments: dict) -> Iterator[None]:
    """Let TRL build an `LLM` with some more arguments, which leaves the process's threads to the training."""
    leave_threads_alone()
    llm, set_num_threads, num_threads = vllm_generation.LLM, torch.set_num_threads, torch.get_num_threads()
    vllm_generation.LLM = partial(llm, **arguments)
    try:
        yield
    finally:
        vllm_generation.LLM = llm
        # The engine takes it away, so that nobody undoes its binding.
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)
