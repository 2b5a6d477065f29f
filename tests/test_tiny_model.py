"""
The shipped tiny model: its tokenizer survives every way it is loaded, its folder is what `base` makes, and it does
what it says.
"""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer

import l2t_trl
from l2t_trl.data.arithmetic import make_traces
from l2t_trl.scripts import base


FOLDER = Path(l2t_trl.__file__).parent / "tiny" / "model"
ANSWERS = ["7", "42", "425", "1234", "10800", "000"]


@pytest.fixture(scope="module")
def built():
    return base.build_tokenizer()


@pytest.fixture(scope="module")
def loaded():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def rows():
    return list(make_traces(80, seed=11, split="test"))


def prompt_ids(tokenizer, row):
    return tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)


def test_reloaded_tokenizer_gives_the_ids_of_training(built, loaded, rows):
    assert type(loaded) is Qwen2Tokenizer
    assert loaded.get_vocab() == built.get_vocab()
    for row in rows:
        completion = row["completion"][0]["content"]
        assert prompt_ids(loaded, row) == prompt_ids(built, row)
        assert loaded.encode(completion) == built.encode(completion)
    # Text that no merge was trained on, and a prefix space, which a wrong pre-tokenizer handles differently.
    for text in ["Größe: 12 apples?\n\n 3,5", " check", "  \n<think> so"]:
        assert loaded.encode(text) == built.encode(text)
        assert loaded.decode(loaded.encode(text)) == text


def test_chat_template_and_plain_encoding_agree(loaded, rows):
    for row in rows:
        prompt, completion = prompt_ids(loaded, row), loaded.encode(row["completion"][0]["content"])
        whole = loaded.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
        assert whole == prompt + completion + loaded.encode("<|im_end|>\n")


def test_chat_template_adds_nothing(loaded):
    messages = [{"role": "user", "content": "Add 47+85"}, {"role": "assistant", "content": "<think>a</think>b"}]
    assert loaded.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>user\nAdd 47+85<|im_end|>\n<|im_start|>assistant\n<think>a</think>b<|im_end|>\n"
    )
    assert loaded.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nAdd 47+85<|im_end|>\n<|im_start|>assistant\n"
    )


def test_ids_of_trl(loaded, rows, tmp_path):
    from datasets import Dataset
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from trl import SFTConfig, SFTTrainer

    config = Qwen2Config(
        vocab_size=len(loaded),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    trainer = SFTTrainer(
        model=Qwen2ForCausalLM(config),
        args=SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]),
        processing_class=loaded,
    )
    for row, ours in zip(trainer.train_dataset, rows, strict=True):
        completion = loaded.encode(ours["completion"][0]["content"]) + [loaded.eos_token_id]
        # TRL's conversational rows end in the template's newline, which `base` leaves out: generation stops before it.
        assert row["input_ids"] == prompt_ids(loaded, ours) + completion + loaded.encode("\n")


def test_rows_of_base(built):
    row = base.trace_row(built, random.Random(0), tier=3)
    trained = [label for label in row["labels"] if label != -100]
    text = built.decode(trained)
    assert text.startswith("<think><episode_1>") and text.endswith("}<|im_end|>")
    assert built.decode(row["input_ids"][: -len(trained)]).endswith("<|im_start|>assistant\n")

    row = base.answer_row(built, random.Random(0))
    text, trained = built.decode(row["input_ids"]), built.decode([label for label in row["labels"] if label != -100])
    rights = [str(sum(map(int, terms.split("+")))) for terms in re.findall(r"Add ([\d+]+)", text)]
    assert rights == re.findall(r"</think>\\boxed\{(\d+)\}", text)
    assert trained == "".join(right + "}" for right in rights)

    row = base.drill_row(built, random.Random(0))
    trained = ""
    for column in built.decode(row["input_ids"]).split():
        total, *additions = re.split(r"[+=]", column)
        for term, result in zip(additions[::2], additions[1::2], strict=True):
            assert int(total) + int(term) == int(result)
            total = result
            trained += result
    assert built.decode([label for label in row["labels"] if label != -100]) == trained


def test_digits_are_single_tokens(loaded):
    for answer in ANSWERS:
        assert len(loaded.encode(answer)) == len(answer)


@pytest.mark.parametrize("answer", ANSWERS)
def test_probe_and_answer_tokenise_apart_as_in_place(loaded, answer):
    probe, gold = loaded.encode("</think>\\boxed{"), loaded.encode(answer + "}")
    assert probe + gold == loaded.encode("</think>\\boxed{" + answer + "}")
    assert loaded.encode("\\boxed{") == probe[1:]
    whole = loaded.encode("<think><episode_1>units 7+5=12</episode_1></think>\\boxed{" + answer + "}")
    assert whole[-len(probe + gold) :] == probe + gold


def test_tags_are_single_tokens_and_survive_decoding(loaded, rows):
    for tag in ["<think>", "</think>", "<episode_1>", "</episode_1>", "<episode_30>", "</episode_30>"]:
        assert len(loaded.encode(tag)) == 1
    for row in rows:
        text = row["completion"][0]["content"]
        ids = loaded.encode(text) + [loaded.eos_token_id, loaded.pad_token_id]
        assert loaded.decode(ids, skip_special_tokens=True) == text


def test_special_tokens(loaded, model):
    assert (loaded.eos_token, loaded.pad_token, loaded.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    assert set(loaded.all_special_tokens) == {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}
    eos = model.generation_config.eos_token_id
    assert loaded.eos_token_id in (eos if isinstance(eos, list) else [eos])
    assert model.generation_config.pad_token_id == loaded.pad_token_id


def test_folder(model, loaded):
    assert {path.name for path in FOLDER.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert (FOLDER / "model.safetensors").stat().st_size <= 5_000_000
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert not config["tie_word_embeddings"]
    assert config["use_cache"]
    assert config["vocab_size"] == len(loaded)
    assert 300_000 <= model.num_parameters() <= 1_500_000


def test_shipped_model_samples_as_promised(model, loaded):
    # Measured on 512 questions: 0.60 right and 0.95 well-formed at temperature 1, 0.76 right greedily. The bounds are
    # three standard errors of 64 and 32 questions away: they catch a broken folder, not a drift.
    sampled = base.evaluate(model, loaded, size=64, seed=1, temperature=1.0)[-1]
    assert 0.41 < sampled["accuracy"] < 0.79
    assert sampled["well_formed"] > 0.87
    assert 1.6 < sampled["tokens"] / sampled["minimal"] < 2.4
    greedy = base.evaluate(model, loaded, size=32, seed=1, temperature=0.0)[-1]
    assert greedy["accuracy"] > 0.53


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think><episode_1>a</episode_1><episode_2>b</episode_2></think>\\boxed{12}<|im_end|>", True),
        ("<think></think>\\boxed{12}<|im_end|>", True),
        ("<think><episode_1>a</episode_1></think>\\boxed{12}", False),
        ("<think><episode_1>a</episode_1></think>\\boxed{}<|im_end|>", False),
        ("<think><episode_2>a</episode_2></think>\\boxed{12}<|im_end|>", False),
        ("<think><episode_1>a</episode_2></think>\\boxed{12}<|im_end|>", False),
        ("<think><episode_1>a</episode_1>b</think>\\boxed{12}<|im_end|>", False),
        ("<episode_1>a</episode_1></think>\\boxed{12}<|im_end|>", False),
    ],
)
def test_is_well_formed(text, expected):
    assert base.is_well_formed(text) is expected


def test_equal_seeds_give_equal_weights(tmp_path):
    def weights(name, seed):
        folder = tmp_path / name
        arguments = {"output_dir": folder, "seed": seed, "max_steps": 2, "width": 64, "num_layers": 1, "eval_size": 0}
        base.main([part for key, value in arguments.items() for part in (f"--{key}", str(value))])
        return (folder / "model.safetensors").read_bytes()

    first = weights("first", 0)
    torch.rand(3)  # The state left by the caller must not matter.
    assert weights("second", 0) == first
    assert weights("third", 1) != first


def test_width_is_validated(tmp_path):
    with pytest.raises(ValueError, match="got --width 100; set a multiple of 64"):
        base.main(["--output_dir", str(tmp_path), "--width", "100"])
