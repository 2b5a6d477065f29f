"""Every recipe trains: two steps with a random-weight model of its model's family and made-up rows."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

import families
from l2t_trl.cli import main
from l2t_trl.episodes import segment, token_bytes
from l2t_trl.models import TINY_FOLDER
from l2t_trl.scripts import train


ROOT = Path(__file__).parents[1]
RECIPES = sorted(ROOT.glob("recipes/**/*.yaml"))
FAMILIES = {
    "DeepScaleR-1.5B-Preview": "r1",
    "DeepSeek-R1-Distill-Qwen-1.5B": "r1",
    "DeepSeek-R1-Distill-Qwen-7B": "r1",
    "Qwen2-7B-Instruct": "qwen-untied",
    "Qwen2.5-3B-Instruct": "qwen-tied",
    "SmolLM2-135M-Instruct": "smollm2",
}
R1_RECIPES = [path for path in RECIPES if FAMILIES.get(path.parts[-3]) == "r1" and path.parts[-2] == "l2t"]
# What makes a recipe small: the size of everything, never what it does.
SMALL = {
    "use_cpu": True,
    "bf16": False,
    "dtype": "float32",
    "use_vllm": False,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_generations": 2,
    "max_completion_length": 12,
    # The stand-ins' tokens are bytes.
    "max_prompt_length": 2048,
    "train_size": 8,
    "test_size": 2,
    "eval_before_after": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}
name_of = lambda path: str(path.relative_to(ROOT / "recipes"))  # noqa: E731


@pytest.fixture(scope="module")
def family_folder(tmp_path_factory, tiny_tokenizer):
    """Make the folder of a family at its first use."""
    folders = {}

    def folder_of(family: str) -> Path:
        if family not in folders:
            folders[family] = families.build(family, tmp_path_factory.mktemp("models") / family, tiny_tokenizer)
        return folders[family]

    return folder_of


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    """Made-up rows with the columns of the real data sets: GSM8K under its Hub id, the others as files."""
    root = tmp_path_factory.mktemp("data")

    def write(path: str, rows: list[dict]):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    sums = [(f"What is {k} plus 1?", str(k + 1)) for k in range(16)]
    for split in ("train", "test"):
        write(f"openai/gsm8k/main/{split}.jsonl", [{"question": q, "answer": f"Add.\n#### {a}"} for q, a in sums])
    write(
        "aime.jsonl",
        [
            {"ID": f"1983-{k}", "Year": 1983, "Problem Number": k, "Question": q, "Answer": a, "Part": ""}
            for k, (q, a) in enumerate(sums)
        ],
    )
    write(
        "numinamath.jsonl",
        [{"problem": q, "solution": f"Thus \\boxed{{{a}}}.", "answer": a, "source": "synthetic"} for q, a in sums],
    )
    write(
        "functions.jsonl",
        [{"question": f"Write f(x), x plus {k}.", "tests": f"assert f(1) == {k + 1}"} for k in range(16)],
    )
    return root


def parity(completions, **kwargs) -> list[float]:
    """A reward that random completions meet half the time."""
    return [float(len(completion[0]["content"]) % 2) for completion in completions]


@pytest.fixture
def run_recipe(family_folder, data_root, tmp_path, monkeypatch):
    """Train as a recipe says, but small, and return the trainer."""
    monkeypatch.setenv("L2T_DATA_ROOT", str(data_root))
    # Every reward that a recipe names: random completions earn none of the real ones.
    monkeypatch.setattr("l2t_trl.rewards.REWARDS", {"accuracy": parity, "code": parity, "format": parity})
    trainers, build = [], train.build_trainer
    monkeypatch.setattr(train, "build_trainer", lambda *args: trainers.append(build(*args)) or trainers[-1])
    data = {
        "aime-919": {"dataset_name": str(data_root / "aime.jsonl"), "answer_column": "Answer"},
        "numinamath-4k": {"dataset_name": str(data_root / "numinamath.jsonl")},
        "python-functions": {"dataset_name": str(data_root / "functions.jsonl")},
    }

    def run(path: Path, **settings):
        recipe = yaml.safe_load(path.read_text())
        recipe.pop("generation_batch_size", None)
        model = path.relative_to(ROOT / "recipes").parts[0]
        recipe |= SMALL | {
            "model_name_or_path": str(TINY_FOLDER if model == "tiny" else family_folder(FAMILIES[model])),
            "output_dir": str(tmp_path / "out"),
        }
        recipe |= data.get(recipe["dataset_name"], {})
        if "max_continuation_length" in recipe:
            recipe["max_continuation_length"] = 4
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe | settings))
        assert main(["train", "--config", str(file)]) == 0
        return trainers[-1]

    return run


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe_trains_two_steps(run_recipe, path):
    trainer = run_recipe(path)
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert [entry["step"] for entry in logs] == [1, 2]
    is_l2t = path.parent.name == "l2t"
    assert type(trainer).__name__ == ("L2TTrainer" if is_l2t else "GRPOTrainer")
    for entry in logs:
        assert math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"])
        assert ("l2t/fitting_gain/mean" in entry) == is_l2t
        if is_l2t:
            assert math.isfinite(entry["l2t/episode_reward/mean"]) and entry["l2t/episodes/mean"] >= 0
    assert ("kl" in logs[0]) == (trainer.beta > 0)


def test_weights_in_bf16_that_stand_alone_are_warned_of(run_recipe, capsys):
    path = ROOT / "recipes/Qwen2.5-3B-Instruct/grpo/gsm8k.yaml"
    run_recipe(path, dtype="bfloat16", max_steps=1)
    assert "Warning: dtype bfloat16 without DeepSpeed keeps no weights in fp32" in capsys.readouterr().out
    run_recipe(path, max_steps=1)
    assert "Warning" not in capsys.readouterr().out


@pytest.mark.parametrize("path", R1_RECIPES, ids=name_of)
def test_r1_recipe_splits_and_probes_behind_the_thinking_that_its_template_opens(run_recipe, path):
    trainer = run_recipe(path, max_steps=1)
    tokenizer, args = trainer.processing_class, trainer.args
    (messages,) = trainer.train_dataset[:1]["prompt"]
    # No system prompt, the begin token once, and <think> opened by the template.
    assert [message["role"] for message in messages] == ["user"]
    prompt_ids = trainer._tokenize_prompts([messages])[0][0]
    assert prompt_ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(prompt_ids).endswith("<｜Assistant｜><think>\n")

    # What such a model samples then: no <think>, thoughts in paragraphs.
    completion = "First, 3 plus 1.\n\nThat is 4.\n\nWait, yes, 4.\n</think>\n\nSo \\boxed{4}."
    ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
    segments = segment(ids, token_bytes(tokenizer), args.episode_format, args.max_episodes)
    assert segments.is_marked
    texts = [tokenizer.decode(ids[start:end]) for start, end in segments.spans]
    assert texts == ["First, 3 plus 1.\n\n", "That is 4.\n\n", "Wait, yes, 4.\n", "</think>\n\nSo \\boxed{4}."]

    # Every probe closes the thinking once, with the vocabulary's own token, and is asked behind its cut.
    probe_ids = trainer._probe_ids
    (close,) = tokenizer("</think>", add_special_tokens=False)["input_ids"]
    assert probe_ids.count(close) == 1
    answer_ids = tokenizer("4" + args.answer_probe_end, add_special_tokens=False)["input_ids"]
    scores = trainer._updated_scorer().score([prompt_ids], [ids], [segments.spans], probe_ids, [answer_ids])
    cuts = [0, *(end for _, end in segments.spans[:-1])]
    for cut, log_prob in zip(cuts, scores.answer_log_probs[0].tolist(), strict=True):
        asked = prompt_ids + ids[:cut] + probe_ids
        text = tokenizer.decode(asked)
        assert text.count("<think>") == text.count("</think>") == 1 and text.endswith("\\boxed{")
        with torch.no_grad():
            logits = trainer.model.eval()(torch.tensor([asked + answer_ids])).logits[0].float().log_softmax(-1)
        own = sum(logits[len(asked) - 1 + k, token].item() for k, token in enumerate(answer_ids))
        assert log_prob == pytest.approx(own, abs=1e-4)


def test_stand_ins_behave_as_the_models_they_stand_for(family_folder):
    from transformers import AutoModelForCausalLM

    from l2t_trl.models import load_tokenizer

    question = [{"role": "user", "content": "How many?"}]
    rendered = {}
    for family in ("qwen-tied", "qwen-untied", "r1", "smollm2"):
        model = AutoModelForCausalLM.from_pretrained(family_folder(family))
        assert model.config.model_type == ("llama" if family == "smollm2" else "qwen2")
        is_shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert is_shared == (family in ("qwen-tied", "smollm2"))
        tokenizer = load_tokenizer(str(family_folder(family)))
        rendered[family] = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        # Only R1's puts a begin token in front of texts.
        assert (tokenizer("a")["input_ids"] != tokenizer("a", add_special_tokens=False)["input_ids"]) == (
            family == "r1"
        )
    assert rendered["r1"] == "<｜begin▁of▁sentence｜><｜User｜>How many?<｜Assistant｜><think>\n"
    assert rendered["qwen-tied"] == rendered["qwen-untied"]
    assert rendered["qwen-tied"].startswith("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud.")
    assert rendered["smollm2"] == "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
