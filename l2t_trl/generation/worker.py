"""
What runs inside a vLLM worker: replacing the weights of a loaded model.

vLLM re-packs weights for its kernels when it loads them, on CPUs with AVX-512 even into buffers of their own, so that
tensors cannot simply be copied in. Its layer-wise reload does it right but for one case: an lm_head tied to the
embedding is not in the checkpoint, is therefore not processed, and goes on with the packed copy of its old weights.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


WEIGHTS_PATTERN = "*.safetensors"
# It warns at every reload of layers that have no weights of their own.
_RELOAD_LOGGER = "vllm.model_executor.model_loader.reload.layerwise"


class WeightFolderExtension:
    """Methods that `l2t serve` adds to vLLM's workers (`--worker-extension-cls`), called by collective RPC."""

    def load_weight_folder(self, folder: str) -> dict:
        """
        Replace the model's weights by those of a folder of safetensors files in the checkpoint's layout.

        Returns:
            `dict`: `num_weights`, how many tensors were read.

        Raises:
            ValueError: if there is no such folder or a file is damaged. The old weights are then still in place.
        """
        files = sorted(Path(folder).glob(WEIGHTS_PATTERN))
        names = weight_names(files)
        if not names:
            raise ValueError(f"{folder} holds no {WEIGHTS_PATTERN} file that this server can see.")
        load_weights(self.model_runner, read_weights(files))
        return {"num_weights": len(names)}

    def describe_model(self) -> dict:
        """Sizes by which a trainer sees whether this is its model."""
        config = self.model_runner.model_config.hf_text_config
        return {name: getattr(config, name, None) for name in MODEL_SIZES}


MODEL_SIZES = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")


def load_weights(model_runner, weights: Iterable[tuple]) -> None:
    """
    Replace the weights of a vLLM model runner's model.

    Args:
        model_runner: vLLM's; what it serves must be idle.
        weights (`Iterable[tuple[str, torch.Tensor]]`): names as in the checkpoint, and tensors that keep their values
            until this returns.
    """
    with _quiet_reload():
        model_runner.reload_weights(weights_iterator=iter(weights))
    refresh_tied_head(model_runner.get_model())


def refresh_tied_head(model) -> None:
    """Let an lm_head that shares the embedding's weights pack them anew; a module of its own was loaded as any other."""
    head = getattr(model, "lm_head", None)
    embedding = getattr(getattr(model, "model", None), "embed_tokens", None)
    if head is None or embedding is None or head is embedding:
        return
    if head.weight is embedding.weight or head.weight.data_ptr() == embedding.weight.data_ptr():
        head.quant_method.process_weights_after_loading(head)


def weight_names(files: Iterable[Path]) -> list[str]:
    """Names of all tensors of some safetensors files; only their headers are read, and compared with their sizes."""
    from safetensors import SafetensorError, safe_open

    names = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                names += tensors.keys()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read ({error}).") from error
    return names


def read_weights(files: Iterable[Path]) -> Iterator[tuple]:
    """Tensors of some safetensors files by name, one at a time."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                yield name, tensors.get_tensor(name)


@contextmanager
def _quiet_reload() -> Iterator[None]:
    logger = logging.getLogger(_RELOAD_LOGGER)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
