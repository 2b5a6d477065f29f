"""`l2t serve`: vLLM's own server with the settings that training against it needs."""

import argparse
import os
import sys

from l2t_trl.errors import UserError
from l2t_trl.generation.cpu import CPU_CACHE_SHARE, UNBOUND_THREADS, physical_memory
from l2t_trl.models import resolve_model


# Log-probabilities as they were sampled from, at any number per token: what importance sampling compares with.
FLAGS = ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
FLAGS += ["--worker-extension-cls", "l2t_trl.generation.worker.WeightFolderExtension"]
# TRL and the folder transport use routes that vLLM offers in this mode only.
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}
GPU_FLAGS = ["--weight-transfer-config", '{"backend": "nccl"}']
# Compiling takes minutes, longer than it saves.
CPU_FLAGS = ["--enforce-eager"]
# The engine runs its worker itself, one process less to start, and does not compile its sampler either.
CPU_ENVIRONMENT = UNBOUND_THREADS | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
CPU_CACHE_BYTES = 2 * 2**30


def add_arguments(parser: argparse.ArgumentParser):
    """Declare the command's options."""
    parser.epilog = (
        "The server takes weights and commands from whoever reaches its port, so open it (--host) to trusted networks "
        "only. Train against it with --use_vllm true --vllm_mode server --vllm_server_port PORT; without a GPU, or where "
        "trainer and server share no network for NCCL, add --weight_sync_dir FOLDER, which both must see."
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder, Hub id, tiny or smollm2")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (default: 8000)")
    parser.add_argument(
        "--dtype", default=None, help="precision of the weights (default: the model's; float32 without a GPU)"
    )
    parser.add_argument(
        "vllm_arguments", nargs="*", metavar="-- --any-vllm-flag VALUE", help="further flags for vLLM, behind --"
    )


def main(args: argparse.Namespace) -> int:
    """Become the server's process, so that signals and exit codes are its own."""
    from trl.import_utils import is_vllm_available

    from l2t_trl.scripts.env import gpu_names

    if not is_vllm_available():
        raise UserError(
            "vLLM is not installed: make install VLLM=1, or on a machine with a GPU pip install vllm==0.31.0."
        )
    command, environment = server_command(args, resolve_model(args.model), has_gpu=bool(gpu_names()))
    sys.stdout.flush()
    os.execve(command[0], command, {**os.environ, **environment})


def server_command(args: argparse.Namespace, model: str, has_gpu: bool) -> tuple[list[str], dict[str, str]]:
    """
    Return the command line of the server and what its environment needs beside this one's.

    The module is started rather than the program `vllm`, which looks its version up under a name that the CPU build
    does not have.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", args.host, "--port", str(args.port), *FLAGS]
    environment = dict(ENVIRONMENT)
    dtype = args.dtype
    if has_gpu:
        command += GPU_FLAGS
    else:
        cache = min(CPU_CACHE_BYTES, int(CPU_CACHE_SHARE * physical_memory()))
        command += [*CPU_FLAGS, "--kv-cache-memory-bytes", str(cache)]
        environment |= {name: value for name, value in CPU_ENVIRONMENT.items() if name not in os.environ}
        dtype = dtype or "float32"
    if dtype is not None:
        command += ["--dtype", dtype]
    return command + args.vllm_arguments, environment
