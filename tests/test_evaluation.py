"""The evaluation's numbers by hand, and that sampling leaves the model and the random state alone."""

import importlib
import json
import types

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from l2t_trl.evaluation import EvaluatedCompletion, Evaluation, evaluate
from l2t_trl.evaluation.evaluate import wilson_interval


QUESTIONS = ["Add 12+34", "Add 7+8", "Add 99+99+99+99", "Add 5+5+5"]
ANSWERS = ["46", "15", "396", "15"]
END, PAD, TEXT = 1, 0, 5


@pytest.fixture
def model(tiny_tokenizer):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=len(tiny_tokenizer),
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                initializer_range=0.2,
                attention_dropout=0.5,
            )
        )


@pytest.fixture
def judged(monkeypatch):
    """Judge by a rule of the test's own, and keep what was asked."""
    calls = []

    def accuracy(completions, answer, **kwargs):
        calls.append((completions, answer))
        return [float(len(str(completion)) % 2) for completion in completions]

    monkeypatch.setattr("l2t_trl.rewards.accuracy", accuracy)
    return calls


def chats():
    prompts = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return Dataset.from_dict({"prompt": prompts, "answer": ANSWERS, "tier": [1, 1, 2, 2]})


def completion(question, is_correct, tokens, is_truncated=False, tier=None):
    return EvaluatedCompletion(question, tier, "text", tokens, is_correct, is_truncated)


class CannedModel(nn.Module):
    """Answers every prompt with the same ids."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs
        self.device = torch.device("cpu")
        self.generation_config = GenerationConfig(eos_token_id=END)
        self.inputs = []

    def generate(self, input_ids, attention_mask, generation_config):
        self.inputs.append((input_ids, attention_mask, generation_config))
        rows = [self.outputs.pop(0) for _ in range(len(input_ids))]
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)


class CharacterTokenizer:
    """Ids are code points; nothing else is needed of it here."""

    eos_token_id, pad_token_id = 2, PAD

    def __call__(self, text):
        return {"input_ids": [ord(character) for character in text]}

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return ["".join(str(token) for token in row if token > 2) for row in rows]


def test_numbers_by_hand():
    evaluation = Evaluation(
        [
            completion(0, True, 10),
            completion(0, False, 30),
            completion(1, True, 20),
            completion(1, True, 50, is_truncated=True),
            completion(2, None, 90),
        ],
        max_new_tokens=50,
    )
    assert evaluation.accuracy == 3 / 4  # the one that cannot be judged is left out
    assert evaluation.mean_tokens == 200 / 5
    assert evaluation.median_tokens == 30
    assert evaluation.tokens_per_correct == pytest.approx(110 / 3)
    assert evaluation.truncated_share == 1 / 5
    # Correct within 9, 10, 20, 49 and 50 tokens: the cut-off one never ended.
    assert evaluation.accuracy_at_budget([9, 10, 20, 49, 50]) == [0, 1 / 4, 2 / 4, 2 / 4, 2 / 4]


def test_undefined_numbers_are_none():
    none_correct = Evaluation([completion(0, False, 10)], max_new_tokens=50)
    assert none_correct.accuracy == 0
    assert none_correct.tokens_per_correct is None
    none_judged = Evaluation([completion(0, None, 10)], max_new_tokens=50)
    assert none_judged.accuracy is None
    assert none_judged.accuracy_interval is None
    assert none_judged.accuracy_at_budget([10]) == [None]
    json.dumps(none_judged.to_dict(), allow_nan=False)


def test_wilson_interval():
    # Wilson (1927) for 8 of 10: 0.490 to 0.943.
    low, high = wilson_interval(0.8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert wilson_interval(0.0, 10)[0] == 0.0
    assert wilson_interval(1.0, 10)[1] == pytest.approx(1.0)


def test_interval_with_one_sample_per_question_is_wilsons():
    evaluation = Evaluation([completion(i, i < 8, 10) for i in range(10)], max_new_tokens=50)
    assert evaluation.accuracy_interval == pytest.approx(wilson_interval(0.8, 10))


def test_interval_counts_samples_that_agree_once_per_question():
    alike = Evaluation([completion(i // 5, i // 5 < 8, 10) for i in range(50)], max_new_tokens=50, num_samples=5)
    assert alike.accuracy_interval == pytest.approx(wilson_interval(0.8, 10))
    all_right = Evaluation([completion(i // 5, True, 10) for i in range(50)], max_new_tokens=50, num_samples=5)
    assert all_right.accuracy_interval == pytest.approx(wilson_interval(1.0, 10))
    # Every question alike, its samples mixed: as good as 50 questions, never better.
    mixed = Evaluation([completion(i // 5, i % 5 < 4, 10) for i in range(50)], max_new_tokens=50, num_samples=5)
    assert mixed.accuracy_interval == pytest.approx(wilson_interval(0.8, 50))


def test_tiers():
    evaluation = Evaluation(
        [completion(0, True, 10, tier=2), completion(1, False, 20, tier=1), completion(2, True, 40, tier=2)],
        max_new_tokens=50,
    )
    tiers = evaluation.tiers()
    assert list(tiers) == [1, 2]
    assert (tiers[1].accuracy, tiers[2].accuracy) == (0, 1)
    assert (tiers[1].mean_tokens, tiers[2].mean_tokens) == (20, 25)
    summary = evaluation.to_dict()
    assert summary["tiers"]["2"]["tokens_per_correct"] == 25
    assert "completions" not in summary
    assert len(evaluation.to_dict(with_completions=True)["completions"]) == 3


def test_completions_end_at_the_first_end_token(judged):
    # The model's end token (1) and the tokenizer's (2) both end; what follows is padding. The third never ends.
    outputs = [[TEXT, END, PAD, PAD], [TEXT, TEXT, 2, PAD], [TEXT, TEXT, TEXT, TEXT]]
    model = CannedModel(outputs)
    dataset = Dataset.from_dict({"prompt": ["long", "mid", "a"], "answer": ["1", "2", "3"]})
    evaluation = evaluate(model, CharacterTokenizer(), dataset, max_new_tokens=4, batch_size=2)
    assert [one.tokens for one in evaluation.completions] == [2, 3, 4]
    assert [one.is_truncated for one in evaluation.completions] == [False, False, True]
    assert [one.text for one in evaluation.completions] == ["5", "55", "5555"]
    assert [one.tier for one in evaluation.completions] == [None] * 3
    # Left padded, padding masked.
    input_ids, mask, how = model.inputs[0]
    assert input_ids.tolist() == [[ord(c) for c in "long"], [PAD, *(ord(c) for c in "mid")]]
    assert mask.tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    assert how.max_new_tokens == 4


def test_results_stand_in_the_order_of_the_questions(judged):
    # Prompts of rising length are sampled longest first.
    model = CannedModel([[TEXT + question] * 2 for question in (3, 3, 2, 2, 1, 1, 0, 0)])
    dataset = Dataset.from_dict({"prompt": ["a", "ab", "abc", "abcd"], "answer": ["p", "q", "r", "s"]})
    evaluation = evaluate(model, CharacterTokenizer(), dataset, max_new_tokens=2, batch_size=3, num_samples=2)
    assert [one.question for one in evaluation.completions] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [one.text for one in evaluation.completions] == ["55", "55", "66", "66", "77", "77", "88", "88"]
    assert [answer for _, answers in judged for answer in answers] == list("ssrrqqpp")


def test_judge_sees_completions_in_the_format_of_the_prompts(model, tiny_tokenizer, judged):
    evaluation = evaluate(model, tiny_tokenizer, chats(), max_new_tokens=4, batch_size=4)
    texts = {one.text for one in evaluation.completions}
    assert {completion[0]["content"] for completions, _ in judged for completion in completions} == texts
    judged.clear()
    strings = Dataset.from_dict({"prompt": QUESTIONS, "answer": ANSWERS})
    evaluation = evaluate(model, tiny_tokenizer, strings, max_new_tokens=4, batch_size=4)
    assert {completion for completions, _ in judged for completion in completions} == {
        one.text for one in evaluation.completions
    }


def test_same_seed_same_numbers(model, tiny_tokenizer, judged):
    first = evaluate(model, tiny_tokenizer, chats(), max_new_tokens=8, seed=3, num_samples=2)
    torch.manual_seed(99)
    again = evaluate(model, tiny_tokenizer, chats(), max_new_tokens=8, seed=3, num_samples=2)
    other = evaluate(model, tiny_tokenizer, chats(), max_new_tokens=8, seed=4, num_samples=2)
    assert first == again
    assert first.completions != other.completions
    samples = [one.text for one in first.completions if one.question == 0]
    assert len(set(samples)) == 2


def test_greedy_completions_do_not_depend_on_the_batch(model, tiny_tokenizer, judged):
    whole = evaluate(model, tiny_tokenizer, chats(), max_new_tokens=8, temperature=0, batch_size=4)
    single = evaluate(model, tiny_tokenizer, chats(), max_new_tokens=8, temperature=0, batch_size=1)
    assert whole.completions == single.completions


def test_settings_of_the_model_neither_count_nor_change(model, tiny_tokenizer, judged):
    plain = evaluate(model, tiny_tokenizer, chats(), max_new_tokens=8)
    # What Qwen2.5 ships with, and worse.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.1, top_p=0.5, top_k=1, min_p=0.9, repetition_penalty=5.0, no_repeat_ngram_size=1
    )
    before = model.generation_config.to_dict()
    shipped = evaluate(model, tiny_tokenizer, chats(), max_new_tokens=8)
    assert shipped.completions == plain.completions
    assert model.generation_config.to_dict() == before


def test_adapters_and_gradient_checkpointing(model, tiny_tokenizer, judged):
    from peft import LoraConfig, get_peft_model

    plain = evaluate(model, tiny_tokenizer, chats(), max_new_tokens=8)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.gradient_checkpointing_enable()
    adapted.train()
    # Fresh adapters change nothing.
    assert evaluate(adapted, tiny_tokenizer, chats(), max_new_tokens=8).completions == plain.completions
    assert adapted.is_gradient_checkpointing
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1.0)
    assert evaluate(adapted, tiny_tokenizer, chats(), max_new_tokens=8).completions != plain.completions


@pytest.mark.parametrize("fails", [False, True])
def test_mode_and_random_state_are_restored(model, tiny_tokenizer, monkeypatch, fails):
    modes_inside = []

    def accuracy(completions, answer, **kwargs):
        modes_inside.append(any(module.training for module in model.modules()))
        if fails:
            raise RuntimeError("judge failed")
        return [None] * len(completions)

    monkeypatch.setattr("l2t_trl.rewards.accuracy", accuracy)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="judge failed"):
            evaluate(model, tiny_tokenizer, chats(), max_new_tokens=4)
    else:
        assert evaluate(model, tiny_tokenizer, chats(), max_new_tokens=4).accuracy is None
    assert not any(modes_inside)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or larger, got 0"),
        ({"max_new_tokens": 4, "temperature": -1.0}, "temperature must be"),
        ({"max_new_tokens": 4, "temperature": float("nan")}, "temperature must be"),
        ({"max_new_tokens": 4, "top_p": 0.0}, "top_p must be"),
        ({"max_new_tokens": 4, "batch_size": 0}, "batch_size must be"),
        ({"max_new_tokens": 4, "num_samples": 0}, "num_samples must be"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate(None, None, chats(), **settings)


def test_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="is empty"):
        evaluate(None, None, Dataset.from_dict({"prompt": [], "answer": []}), max_new_tokens=4)


def test_package_exports_the_function_not_the_module():
    importlib.import_module("l2t_trl.evaluation.evaluate")
    from l2t_trl import evaluation

    assert isinstance(evaluation.evaluate, types.FunctionType)
