"""J by continuing every cut: the estimator `rollout`."""

import pytest
import torch

from l2t_trl import L2TTrainer
from l2t_trl.continuations import all_cuts, mean_rewards
from l2t_trl.data.checks import check_rows
from trainers import make_trainer, questions


def test_cuts_by_hand():
    # Two episodes and an answer span: before the first, after each; then a completion that is all answer span.
    cuts = all_cuts([[10, 11, 12, 13, 14], [20]], [[(0, 2), (2, 3), (3, 5)], [(0, 1)]], [7, 8])
    assert [(cut.row, cut.index, cut.prefix) for cut in cuts] == [
        (0, 0, [7, 8]),
        (0, 1, [10, 11, 7, 8]),
        (0, 2, [10, 11, 12, 7, 8]),
        (1, 0, [7, 8]),
    ]


def test_mean_rewards_by_hand():
    cuts = all_cuts([[1, 2], [3]], [[(0, 1), (1, 2)], [(0, 1)]], [7])
    nan = torch.nan
    # What no function could reward is left out of the mean; nothing left is 0, and a cut that is not there NaN.
    table = mean_rewards(cuts, torch.tensor([[1.0, 0.0], [nan, 1.0], [nan, nan]]), 2)
    assert table[0].tolist() == [0.5, 1.0]
    assert table[1, 0] == 0.0 and table[1, 1].isnan()


SCRIPT = "<think><episode_1>a</episode_1><episode_2>b</episode_2></think>c"


def scripted(trainer, asked: list):
    """Completions of two episodes; of every cut, continuations that name how many episodes stand before it."""
    tokenizer = trainer.processing_class

    def generate(prompt_ids, images, multimodal_fields, num_generations):
        if trainer.generation_config.max_new_tokens == trainer.args.max_completion_length:
            texts = [SCRIPT] * len(prompt_ids)
        else:
            texts = [tokenizer.decode(ids) for ids in prompt_ids]
            asked.append((trainer.generation_config.max_new_tokens, texts))
            texts = [str(text.count("</episode_")) for text in texts]
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts], None

    return generate


def counted_episodes(completions, log_extra=None, log_metric=None, **kwargs) -> list[float]:
    """A quarter for each episode that the scripted continuation has counted."""
    log_extra("note", ["x"] * len(completions))
    log_metric("calls", 1.0)
    last = [completion[0]["content"][-1] for completion in completions]
    return [int(character) / 4 if character.isdigit() else 0.0 for character in last]


@pytest.mark.parametrize("batch_size", [8, 4])
def test_gains_are_those_of_the_continuations(tiny_folder, tmp_path, batch_size):
    # No gold answer is needed.
    dataset = questions().remove_columns("answer")
    trainer = make_trainer(
        L2TTrainer,
        tiny_folder,
        tmp_path,
        reward=counted_episodes,
        dataset=dataset,
        per_device_train_batch_size=batch_size,
        correctness_estimator="rollout",
        num_continuations=2,
        max_continuation_length=5,
        compression_coef=0.0,
        answer_probe="</think>",
        log_completions=True,
        max_completion_length=96,
    )
    asked = []
    trainer._generate_single_turn = scripted(trainer, asked)
    trainer.model.train()
    rows = [row for row in trainer.train_dataset.select(range(batch_size // 4)) for _ in range(4)]
    trainer._generate_and_score_completions(rows)
    # Three cuts of every completion, twice, no more at a time than in a rollout, and no longer than asked for.
    texts = [text for _, batch in asked for text in batch]
    assert len(texts) == batch_size * 3 * 2 and {len(batch) for _, batch in asked} == {batch_size}
    assert {length for length, _ in asked} == {5} and trainer.generation_config.max_new_tokens == 96
    assert texts[0] == texts[1] and texts[0].endswith("assistant\n</think>")
    assert texts[2].endswith("<think><episode_1>a</episode_1></think>")
    assert texts[4].endswith("<episode_2>b</episode_2></think>")
    assert list(trainer._logs["extra"]["fitting_gain"])[0] == [0.25, 0.25, 0.0]
    # Rewards of continuations are logged nowhere.
    assert len(trainer._logs["extra"]["note"]) == batch_size
    assert trainer._metrics["train"]["calls"] == [1.0] and not trainer._pending_extra_logs


def test_it_trains_without_gold_answers(tiny_folder, tmp_path):
    trainer = make_trainer(
        L2TTrainer,
        tiny_folder,
        tmp_path,
        dataset=questions().remove_columns("answer"),
        correctness_estimator="rollout",
        num_continuations=2,
        max_continuation_length=3,
        episode_format="paragraph",
    )
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "l2t/continuation_s" in entry] == [1, 2]


def test_the_likelihood_needs_answers_and_continuations_do_not(tiny_tokenizer):
    rows = questions(3).remove_columns("answer")
    with pytest.raises(ValueError, match="no column 'answer'"):
        check_rows(rows, tiny_tokenizer)
    assert check_rows(rows, tiny_tokenizer, answer_column=None) is rows
