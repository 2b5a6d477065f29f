"""Columns beside `answer` that the accuracy reads reach it, in training and in evaluation."""

from datasets import Dataset

from l2t_trl import L2TTrainer
from l2t_trl.evaluation import evaluate
from trainers import make_trainer


ROWS = Dataset.from_list(
    [
        {"prompt": f"{k} + 1?", "answer": str(k + 1), "accepted_answers": ["080", "081"] if k == 1 else None}
        for k in range(4)
    ]
)


def test_rewards_are_told_all_accepted_answers(tiny_folder, tmp_path):
    told = {}

    def reward(completions, answer, accepted_answers, **kwargs):
        told.update(zip(answer, accepted_answers, strict=True))
        return [float(len(completion) % 2) for completion in completions]

    trainer = make_trainer(L2TTrainer, tiny_folder, tmp_path, reward=reward, dataset=ROWS, max_steps=2)
    trainer.train()
    assert told == {"1": None, "2": ["080", "081"], "3": None, "4": None}


def test_evaluation_accepts_every_accepted_answer(tiny_folder, tiny_tokenizer, monkeypatch):
    from transformers import AutoModelForCausalLM

    told = {}

    def accuracy(completions, answer, **columns):
        told.update(zip(answer, columns["accepted_answers"], strict=True))
        return [1.0] * len(completions)

    monkeypatch.setattr("l2t_trl.rewards.accuracy", accuracy)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    evaluate(model, tiny_tokenizer, ROWS, max_new_tokens=2, batch_size=4)
    assert told == {"1": None, "2": ["080", "081"], "3": None, "4": None}
