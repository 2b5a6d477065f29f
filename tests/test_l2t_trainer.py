import copy
import math

import pandas as pd
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer

import literal
from l2t_trl import L2TTrainer
from l2t_trl.checkpoints import ENTRIES, STATE_FILE, save_tensors
from l2t_trl.episodes import segment, token_bytes
from l2t_trl.errors import RolloutError, UserError
from l2t_trl.model_card import write_model_card
from l2t_trl.proxy import proxy_module_names
from l2t_trl.scoring import Scorer
from trainers import make_trainer, questions


def weights(trainer) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in trainer.model.state_dict().values()]


def all_equal(left, right) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def generate(trainer, num_prompts: int = 2) -> dict:
    trainer.model.train()
    rows = [row for row in trainer.train_dataset.select(range(num_prompts)) for _ in range(trainer.num_generations)]
    return trainer._generate_and_score_completions(rows)


@pytest.fixture(scope="module")
def tagged_folder(tiny_folder, tiny_tokenizer, tmp_path_factory):
    """The tiny model, biased towards short episodes, so that random completions hold several."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    torch.manual_seed(1)
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight.mul_(5)
        boosted = tiny_tokenizer.convert_tokens_to_ids(["<episode_1>", "</episode_1>", "<episode_2>", "</episode_2>"])
        boosted += tiny_tokenizer.convert_tokens_to_ids(["</think>"]) + [tiny_tokenizer.eos_token_id]
        model.lm_head.weight[boosted] += 0.05 * torch.randn(64)
        model.lm_head.weight[boosted] *= 4
    folder = tmp_path_factory.mktemp("models") / "tagged"
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_without_process_reward_it_is_grpo_to_the_bit(tagged_folder, tmp_path):
    settings = {"max_steps": 4, "num_iterations": 2, "beta": 0.01}
    ours = make_trainer(
        L2TTrainer, tagged_folder, tmp_path / "a", advantage_form="sequence", process_reward_coef=0.0, **settings
    )
    start = weights(ours)
    ours.train()
    theirs = make_trainer(GRPOTrainer, tagged_folder, tmp_path / "b", **settings)
    theirs.train()
    assert all_equal(weights(ours), weights(theirs))
    assert not all_equal(weights(ours), start)


@pytest.mark.parametrize("form", ["paper", "episode", "return_to_go", "sequence"])
def test_advantages_equal_the_literal_algorithm(tagged_folder, tmp_path, form):
    # Every step of the hook against loops: segmentation, separate forwards for J, full backwards for g, dense formulas.
    settings = {"answer_probe": "</think>\\boxed{", "proxy_rank_ratio": 0.04, "compression_coef": 0.6}
    trainer = make_trainer(
        L2TTrainer, tagged_folder, tmp_path, advantage_form=form, penalty_unit="absolute", **settings
    )
    output = generate(trainer)
    model, tokenizer = trainer.model.eval(), trainer.processing_class
    rows = zip(output["prompt_ids"], output["prompt_mask"], strict=True)
    prompts = [ids[mask.bool()].tolist() for ids, mask in rows]
    rows = zip(output["completion_ids"], output["completion_mask"], strict=True)
    completions = [ids[mask.bool()].tolist() for ids, mask in rows]
    spans = [segment(ids, token_bytes(tokenizer)).spans for ids in completions]
    assert max(map(len, spans)) > 2 and len(set(map(len, spans))) > 1  # else little is tested

    probe = tokenizer("</think>\\boxed{", add_special_tokens=False)["input_ids"]
    names = proxy_module_names(model)
    ranks = {name: max(1, int(0.04 * 64)) for name in names}
    bases = literal.proxy_bases(model, names, ranks)
    correctness, gradients = [], []
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        answer = tokenizer(f"{row // 4 + 11}}}", add_special_tokens=False)["input_ids"]
        cuts = [0, *(end for _, end in spans[row][:-1])]
        totals = [
            literal.token_log_probs(model, [*prompt, *completion[:cut], *probe], answer).sum().item() for cut in cuts
        ]
        correctness.append([math.exp(total) for total in totals])
        gradients.append([literal.proxy_gradients(model, prompt, completion, [span], bases)[0] for span in spans[row]])
    real = [[start < end for start, end in row] for row in spans]
    fisher = literal.fisher_matrix(
        [g for row, keep in zip(gradients, real, strict=True) for g, k in zip(row, keep, strict=True) if k]
    )
    information = [[literal.episode_information(g, fisher, 1e-5) for g in row] for row in gradients]
    mean_square = sum(q * q for row in information for q in row) / len(information)
    gains = literal.fitting_gains(correctness)
    rewards = [
        [gain - 0.6 * q * q / mean_square for gain, q in zip(g, i, strict=True)]
        for g, i in zip(gains, information, strict=True)
    ]
    outcome = [float(len(tokenizer.decode(ids, skip_special_tokens=True)) % 2) for ids in completions]
    log_probs = [
        literal.token_log_probs(model, prompt, completion).tolist()
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    if form == "return_to_go":
        expected = literal.returns_to_go(rewards, spans, outcome, literal.normalised(outcome, 4), 0.8, 4)
    elif form == "sequence":
        expected = literal.constant_in_sequence(rewards, spans, outcome, 0.8, 4, "group")
    elif form == "episode":
        expected = literal.by_episode(rewards, spans, outcome, 0.8, 4, "group")
    else:
        expected = literal.as_in_the_paper(rewards, spans, outcome, log_probs, 0.8, 4, "group", "surprise", 0.05)
    for row, values in enumerate(expected):
        actual = output["advantages"][row]
        torch.testing.assert_close(actual[: len(values)], torch.tensor(values), rtol=1e-3, atol=2e-4)
        assert (actual[len(values) :] == 0).all()


def test_every_promised_quantity_is_logged(tagged_folder, tmp_path):
    trainer = make_trainer(L2TTrainer, tagged_folder, tmp_path, log_completions=True, num_completions_to_print=0)
    trainer.train()
    entry = trainer.state.log_history[0]
    for name in ("fitting_gain", "compression_penalty", "episode_reward", "episodes", "tokens_per_episode"):
        assert entry[f"l2t/{name}/min"] <= entry[f"l2t/{name}/mean"] <= entry[f"l2t/{name}/max"], name
    for name in ("correctness_before/mean", "correctness_after/mean", "unmarked/mean", "scoring_share"):
        assert 0 <= entry[f"l2t/{name}"] <= 1, name
    assert entry["l2t/scoring_s"] > 0
    assert entry["l2t/outcome_infinite/frac"] == 0
    assert "l2t/zero_std_groups_with_signal/frac" in entry
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    for _, row in table.iterrows():
        assert len(row["fitting_gain"]) == len(row["episode_reward"]) == len(row["episode_spans"]) >= 1
    # The rewards in the table are those of the same step's metrics.
    episodes = [
        reward
        for _, row in table.iterrows()
        for reward, (start, end) in zip(row["episode_reward"], row["episode_spans"], strict=True)
        if start < end
    ]
    assert sum(episodes) / len(episodes) == pytest.approx(entry["l2t/episode_reward/mean"], abs=1e-3)


def test_scoring_leaves_no_trace(tagged_folder, tmp_path):
    trainer = make_trainer(L2TTrainer, tagged_folder, tmp_path)
    trainer.model.train()
    trainer.model.model.layers[0].eval()  # a mode of its own, which must be kept
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    seen = {}
    original = trainer._token_advantages

    def observed(*args):
        seen["weights"], seen["rng"] = weights(trainer), torch.get_rng_state()
        seen["modes"] = [module.training for module in trainer.model.modules()]
        seen["advantages"] = original(*args)
        assert torch.equal(torch.get_rng_state(), seen["rng"])
        return seen["advantages"]

    trainer._token_advantages = observed
    rows = [row for row in trainer.train_dataset.select(range(2)) for _ in range(4)]
    trainer._generate_and_score_completions(rows)
    assert seen["advantages"].abs().sum() > 0
    assert all_equal(weights(trainer), seen["weights"])
    assert [module.training for module in trainer.model.modules()] == seen["modes"]
    assert all((parameter.grad == 1).all() for parameter in trainer.model.parameters())


def test_scoring_that_raises_leaves_no_trace(tagged_folder, tmp_path, monkeypatch):
    trainer = make_trainer(L2TTrainer, tagged_folder, tmp_path)
    before = weights(trainer)

    def fail(*args):
        raise RuntimeError("midway")

    monkeypatch.setattr(Scorer, "_answer_log_probs", fail)
    with pytest.raises(RuntimeError, match="midway"):
        generate(trainer)
    assert trainer.model.training and all(module.training for module in trainer.model.modules())
    assert all_equal(weights(trainer), before)
    assert trainer.model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trainer.model.modules())


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_config": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"num_iterations": 2, "max_steps": 3},
        {"steps_per_generation": 2, "max_steps": 3},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"mask_truncated_completions": True},
        {"scale_rewards": "none", "loss_type": "dr_grpo"},
        {"scale_rewards": "batch", "loss_type": "cispo", "epsilon_high": 5.0},
        {"proxy_modules": r".*layers\.\d+\.self_attn\.o_proj"},
        {"proxy_modules": "random:0.5"},
        {"scoring_batch_size": 3},
        {"compression_coef": 0.0},
        {"process_reward_coef": 0.0, "advantage_form": "paper"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The proxy modules of")
def test_what_grpo_does_keeps_working(tagged_folder, tmp_path, settings):
    trainer = make_trainer(L2TTrainer, tagged_folder, tmp_path, **settings)
    before = weights(trainer)
    trainer.train()
    assert not all_equal(weights(trainer), before)
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())
    entry = trainer.state.log_history[0]
    assert math.isfinite(entry["loss"]) and math.isfinite(entry["l2t/episode_reward/mean"])


def test_accumulated_batches_equal_one(tagged_folder, tmp_path):
    # The same eight completions in one batch of 8 or in two of 4: equal steps, up to rounding.
    whole = make_trainer(L2TTrainer, tagged_folder, tmp_path / "a", max_steps=1, shuffle_dataset=False)
    whole.train()
    parts = make_trainer(
        L2TTrainer,
        tagged_folder,
        tmp_path / "b",
        max_steps=1,
        shuffle_dataset=False,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    parts.train()
    left, right = whole.state.log_history[0], parts.state.log_history[0]
    for key in ("loss", "l2t/episode_reward/mean", "l2t/correctness_after/mean", "grad_norm"):
        assert left[key] == pytest.approx(right[key], rel=1e-4, abs=1e-6), key


def test_evaluation_scores_without_moving_the_averages(tagged_folder, tmp_path):
    trainer = make_trainer(
        L2TTrainer,
        tagged_folder,
        tmp_path,
        eval_dataset=questions(4),
        per_device_eval_batch_size=4,
        num_generations_eval=2,
        eval_strategy="steps",
        eval_steps=2,
    )
    generate(trainer)
    before = copy.deepcopy(trainer._penalty.state_dict())
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_l2t/correctness_after/mean"] <= 1
    after = trainer._penalty.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_resumed_run_equals_an_unbroken_one(tagged_folder, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "proxy_refresh_steps": 3}
    whole = make_trainer(L2TTrainer, tagged_folder, tmp_path / "a", max_steps=4, **settings)
    whole.train()
    rest = make_trainer(L2TTrainer, tagged_folder, tmp_path / "b", max_steps=4, **settings)
    rest.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert all_equal(weights(whole), weights(rest))
    left, right = whole._penalty.state_dict(), rest._penalty.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_checkpoint_without_our_state_is_refused(tagged_folder, tmp_path):
    plain = make_trainer(GRPOTrainer, tagged_folder, tmp_path / "a", save_strategy="steps", save_steps=2)
    plain.train()
    ours = make_trainer(L2TTrainer, tagged_folder, tmp_path / "b", max_steps=4)
    with pytest.raises(ValueError, match="not a checkpoint of an L2T run"):
        ours.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


def test_a_checkpoint_of_an_older_version_is_refused_before_it_is_loaded(tagged_folder, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make_trainer(L2TTrainer, tagged_folder, tmp_path / "a", **settings).train()
    path = tmp_path / "a" / "checkpoint-2" / STATE_FILE
    state = load_file(path)
    # All that is saved is known, and nothing else is asked for.
    assert {name for name in state if not name.startswith(("u.", "v."))} == {*ENTRIES}
    save_tensors(path, {name: value for name, value in state.items() if name != "has_pending"})
    ours = make_trainer(L2TTrainer, tagged_folder, tmp_path / "b", max_steps=4)
    before = weights(ours)
    with pytest.raises(UserError, match="has no has_pending in l2t_state.safetensors"):
        ours.train(resume_from_checkpoint=str(path.parent))
    assert all_equal(before, weights(ours))


def test_completions_that_are_left_cannot_be_shared_out_anew(tagged_folder, tmp_path):
    settings = {"max_steps": 3, "num_iterations": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(L2TTrainer, tagged_folder, tmp_path / "a", **settings).train()
    halved = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    ours = make_trainer(L2TTrainer, tagged_folder, tmp_path / "b", **settings | halved)
    before = weights(ours)
    message = (
        r"checkpoint-1 holds completions that are still to be trained on with steps_per_generation 1, "
        r"per_device_train_batch_size 8, got steps_per_generation 2, per_device_train_batch_size 4\. Set what it was, or "
        r"resume from a checkpoint that ends a rollout: every 2 steps there is one\."
    )
    with pytest.raises(ValueError, match=message):
        ours.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert all_equal(before, weights(ours))
    # At a rollout's end, the next one is shared out as it is now.
    ours.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert ours.state.global_step == 3


def test_the_proxy_is_refreshed_when_due(tagged_folder, tmp_path):
    trainer = make_trainer(L2TTrainer, tagged_folder, tmp_path, max_steps=5, proxy_refresh_steps=2)
    trainer.train()
    assert trainer._bases_step == 4
    trainer = make_trainer(L2TTrainer, tagged_folder, tmp_path, max_steps=3, proxy_refresh_steps=0)
    trainer.train()
    assert trainer._bases_step == 0


def test_infinite_and_missing_outcome_rewards_are_data(tagged_folder, tmp_path):
    def reward(completions, **kwargs):
        return [1.0, float("inf"), None, 0.0, float("nan"), 0.0, 1.0, float("-inf")]

    trainer = make_trainer(L2TTrainer, tagged_folder, tmp_path, reward=reward)
    output = generate(trainer)
    advantages = output["advantages"]
    assert advantages.isfinite().all()
    assert (advantages[[1, 2, 4, 7]] == 0).all()
    assert (advantages[[0, 3, 5, 6]].abs().sum(1) > 0).all()
    assert trainer._metrics["train"]["l2t/outcome_infinite/frac"] == [0.25]


def test_empty_completions_are_data(tagged_folder, tmp_path):
    # Every completion is its end-of-sequence token: no episode, no gain, no crash.
    trainer = make_trainer(L2TTrainer, tagged_folder, tmp_path)
    eos = trainer.processing_class.eos_token_id
    trainer._generate_single_turn = lambda prompt_ids, *args: ([[eos] for _ in prompt_ids], None)
    output = generate(trainer)
    assert output["completion_ids"].shape == (8, 1)
    assert output["advantages"].isfinite().all()
    assert trainer._metrics["train"]["l2t/episodes/max"] == [0.0]


@pytest.mark.parametrize("form", ["paper", "episode", "return_to_go", "sequence"])
def test_masked_truncated_completions_get_nothing(tagged_folder, tmp_path, form):
    trainer = make_trainer(
        L2TTrainer,
        tagged_folder,
        tmp_path,
        mask_truncated_completions=True,
        advantage_form=form,
        max_completion_length=3,
    )
    eos = trainer.processing_class.eos_token_id
    full = [5, 6, 7]
    trainer._generate_single_turn = lambda prompt_ids, *args: ([full, full, [5, 6, eos], [5, 9, eos]] * 2, None)
    output = generate(trainer)
    assert (output["advantages"][[0, 1, 4, 5]] == 0).all()
    assert output["advantages"].isfinite().all()


def test_the_model_card_names_the_method(tagged_folder, tmp_path):
    trainer = make_trainer(L2TTrainer, tagged_folder, tmp_path)
    trainer.create_model_card(model_name="thinker")
    card = (tmp_path / "README.md").read_text()
    assert "L2T" in card and "2505.10425" in card and "- l2t" in card
    assert "GRPO" not in card.split("## Citations")[0]


def test_a_written_model_card_survives_a_push(tagged_folder, tmp_path):
    trainer = make_trainer(L2TTrainer, tagged_folder, tmp_path)
    path = write_model_card(trainer, "tiny", "arithmetic", "### Results\n\nSplendid.")
    trainer.create_model_card(model_name="pushed", dataset_name="arithmetic")  # as push_to_hub does
    card = path.read_text()
    assert "Splendid." in card and "`tiny` on the data set `arithmetic`" in card and "2505.10425" in card


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": questions().remove_columns("answer")}, "no column 'answer'"),
        ({"proxy_modules": "nothing_like_this"}, "matches no linear layer"),
        ({"max_prompt_length": 3}, "prompt longer than max_prompt_length=3 tokens"),
    ],
    ids=["answer column", "proxy", "prompt"],
)
def test_mistakes_are_told_before_training(tagged_folder, tmp_path, settings, message):
    with pytest.raises(ValueError) as error:
        make_trainer(L2TTrainer, tagged_folder, tmp_path, **settings)
    assert message in str(error.value)


def test_bad_rows_can_be_dropped(tagged_folder, tmp_path):
    dataset = questions(6).to_list()
    dataset[2]["answer"] = ""
    dataset = type(questions()).from_list(dataset)
    with pytest.raises(ValueError, match="row 2"):
        make_trainer(L2TTrainer, tagged_folder, tmp_path, dataset=dataset)
    trainer = make_trainer(L2TTrainer, tagged_folder, tmp_path, dataset=dataset, on_bad_row="drop")
    assert len(trainer.train_dataset) == 5


def failing_rollouts(trainer, at: int):
    """Let the rollout of that number fail as one does whose server has gone."""
    generate, calls = trainer._generate_single_turn, []

    def fail_once(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise RolloutError("The server has gone.")
        return generate(*args, **kwargs)

    trainer._generate_single_turn = fail_once


def test_a_run_whose_rollouts_fail_loses_nothing(tagged_folder, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 100}
    unbroken = make_trainer(L2TTrainer, tagged_folder, tmp_path / "a", **settings)
    unbroken.train()
    broken = make_trainer(L2TTrainer, tagged_folder, tmp_path / "b", **settings)
    failing_rollouts(broken, at=3)
    with pytest.raises(RolloutError, match="has gone. Step 2 is saved; go on from it with --resume_from_checkpoint"):
        broken.train()
    assert [folder.name for folder in (tmp_path / "b").glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = make_trainer(L2TTrainer, tagged_folder, tmp_path / "b", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert all_equal(weights(resumed), weights(unbroken))


def test_a_step_whose_second_rollout_fails_is_made_anew(tagged_folder, tmp_path):
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 1}
    settings |= {"max_steps": 3, "save_strategy": "steps", "save_steps": 100}
    broken = make_trainer(L2TTrainer, tagged_folder, tmp_path, **settings)
    failing_rollouts(broken, at=4)  # two of each step
    with pytest.raises(RolloutError, match="Step 1 is saved"):
        broken.train()
    resumed = make_trainer(L2TTrainer, tagged_folder, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [entry["step"] for entry in resumed.state.log_history if "reward" in entry] == [1, 2, 3]


def test_a_first_rollout_that_fails_has_nothing_to_save(tagged_folder, tmp_path):
    trainer = make_trainer(L2TTrainer, tagged_folder, tmp_path, save_strategy="steps")
    failing_rollouts(trainer, at=1)
    with pytest.raises(RolloutError, match="^The server has gone.$"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
