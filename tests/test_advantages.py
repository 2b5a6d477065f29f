"""Token advantages of every form: numbers worked by hand, plain loops, and what each form promises."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import literal
from l2t_trl.advantages import Group, fitting_gains, token_advantages


FORMS = ("paper", "episode", "return_to_go", "sequence")
GRPO_EPSILON = 1e-4  # TRL's, beside the standard deviation


def span_of_token(spans, num_tokens: int) -> torch.Tensor:
    rows = []
    for row in spans:
        indices = [k for k, (start, end) in enumerate(row) for _ in range(start, end)]
        rows.append(indices + [-1] * (num_tokens - len(indices)))
    return torch.tensor(rows)


def compute(form: str, batch: dict, size: int | None = None, **options) -> torch.Tensor:
    """Call with a batch of plain lists: spans, rewards per span, outcome, log_probs per token."""
    num_tokens = max(row[-1][1] for row in batch["spans"]) + options.pop("padding", 0)
    num_spans = max(map(len, batch["spans"])) + options.pop("span_padding", 0)
    outcome = torch.tensor(batch["outcome"])
    group = options.pop("group", None) or Group(size or len(outcome))
    advantage = torch.tensor(batch["outcome_advantage"]) if "outcome_advantage" in batch else outcome.nan_to_num()
    return token_advantages(
        form,
        outcome=outcome,
        outcome_advantage=advantage,
        episode_reward=torch.tensor([row + [0.0] * (num_spans - len(row)) for row in batch["rewards"]]),
        span_of_token=span_of_token(batch["spans"], num_tokens),
        log_probs=torch.tensor([row + [0.0] * (num_tokens - len(row)) for row in batch["log_probs"]]),
        process_reward_coef=options.pop("process_reward_coef", 1.0),
        group=group,
        **options,
    )


def loops(
    form: str, batch: dict, size: int, process_reward_coef, token_credit="surprise", trim_fraction=0.05, scale="group"
):
    rewards, spans, outcome = batch["rewards"], batch["spans"], batch["outcome"]
    if form == "return_to_go":
        return literal.returns_to_go(rewards, spans, outcome, batch["outcome_advantage"], process_reward_coef, size)
    if form == "sequence":
        rows = literal.constant_in_sequence(rewards, spans, outcome, process_reward_coef, size, scale)
        return [[0.0 if math.isnan(out) else a for a in row] for row, out in zip(rows, outcome, strict=True)]
    if form == "episode":
        return literal.by_episode(rewards, spans, outcome, process_reward_coef, size, scale)
    arguments = (batch["log_probs"], process_reward_coef, size, scale, token_credit, trim_fraction)
    return literal.as_in_the_paper(rewards, spans, outcome, *arguments)


def random_batch(seed: int, num_rows: int = 8, has_unscored: bool = True, max_length: int = 60) -> dict:
    """Rows of 1 to 6 spans, the answer span empty in some, one row empty, one that cannot be scored."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(size: int, low: float = -1.0) -> list[float]:
        return (torch.rand(size, generator=generator) * (1 - low) + low).tolist()

    batch = {"spans": [], "rewards": [], "log_probs": [], "outcome": [], "outcome_advantage": uniform(num_rows)}
    for row in range(num_rows):
        num_spans = int(torch.randint(2, 7, (), generator=generator))
        length = int(torch.randint(num_spans, max_length, (), generator=generator))
        borders = sorted(torch.randperm(length - 1, generator=generator)[: num_spans - 1].add(1).tolist())
        if row % 3 == 1:
            borders[-1] = length  # truncated: nothing after the last episode
        ends = [*borders, length]
        batch["spans"].append(list(zip([0, *ends], ends, strict=False)))
        rewards = zip(batch["spans"][-1], uniform(num_spans), strict=True)
        batch["rewards"].append([0.0 if start == end else value for (start, end), value in rewards])
        batch["log_probs"].append([-5 * value for value in uniform(length, 0.0)])
        batch["outcome"].append(float(torch.randint(0, 2, (), generator=generator)))
    if has_unscored:
        batch["outcome"][2] = math.nan
    return batch


def select(batch: dict, order) -> dict:
    return {name: [column[i] for i in order] for name, column in batch.items()}


def assert_rows(actual: torch.Tensor, expected: list[list[float]], rtol: float = 1e-4, atol: float = 2e-5):
    for row, values in zip(actual, expected, strict=True):
        torch.testing.assert_close(row[: len(values)], torch.tensor(values, dtype=torch.float32), rtol=rtol, atol=atol)
        assert (row[len(values) :] == 0).all()


# ----- fitting gain -----


def test_fitting_gain_by_hand():
    # J from 0.1 over 0.4 to 0.3: gains 0.3 and -0.1, the answer span nothing. The second row has one episode only.
    correctness = torch.tensor([[0.1, 0.4, 0.3], [0.2, 0.9, torch.nan]])
    gains = fitting_gains(correctness, torch.tensor([[True, True, True], [True, True, False]]))
    torch.testing.assert_close(gains, torch.tensor([[0.3, -0.1, 0.0], [0.7, 0.0, 0.0]]))


def test_fitting_gains_telescope_and_equal_loops():
    generator = torch.Generator().manual_seed(0)
    counts = [1, 4, 2, 6]
    rows = [torch.rand(count + 1, generator=generator).tolist() for count in counts]
    correctness = torch.full((4, 7), torch.nan)
    for target, row in zip(correctness, rows, strict=True):
        target[: len(row)] = torch.tensor(row)
    gains = fitting_gains(correctness, ~correctness.isnan())
    for actual, expected, row in zip(gains, literal.fitting_gains(rows), rows, strict=True):
        torch.testing.assert_close(actual[: len(expected)], torch.tensor(expected))
        assert (actual[len(expected) :] == 0).all()
        assert actual.sum().item() == pytest.approx(row[-1] - row[0], abs=1e-6)


def test_an_empty_completion_gains_nothing():
    assert torch.equal(
        fitting_gains(torch.tensor([[0.4, torch.nan]]), torch.tensor([[False, False]])), torch.zeros(1, 2)
    )


# ----- by hand -----

# Two completions of one question. A: right, two episodes of 2 and 1 tokens, answer of 1 token.
# B: wrong, one episode of 2 tokens, answer of 2 tokens.
BY_HAND = {
    "spans": [[(0, 2), (2, 3), (3, 4)], [(0, 2), (2, 4)]],
    "rewards": [[0.4, 0.2, -0.1], [-0.3, 0.0]],
    "outcome": [1.0, 0.0],
    "outcome_advantage": [0.7, -0.7],
    "log_probs": [[-1.0, -3.0, -2.0, -0.5], [-1.0, -1.0, -2.0, -2.0]],
}


def test_return_to_go_by_hand():
    # alpha 0.5. To go, A: 0.5 * (0.5, 0.5, 0.1, -0.1) = 0.25, 0.25, 0.05, -0.05; B: 0.5 * (-0.3, -0.3, 0, 0).
    # Mean over the 8 tokens: (0.5 - 0.3) / 8 = 0.025.
    expected = [
        [0.7 + 0.225, 0.7 + 0.225, 0.7 + 0.025, 0.7 - 0.075],
        [-0.7 - 0.175, -0.7 - 0.175, -0.7 - 0.025, -0.7 - 0.025],
    ]
    assert_rows(compute("return_to_go", BY_HAND, process_reward_coef=0.5), expected)


def test_sequence_by_hand():
    # Returns 1 + 0.5 * 0.5 = 1.25 and 0 - 0.5 * 0.3 = -0.15: mean 0.55, deviations +-0.7, std 0.7 * sqrt(2).
    value = 0.7 / (0.7 * math.sqrt(2) + GRPO_EPSILON)
    assert_rows(compute("sequence", BY_HAND, process_reward_coef=0.5), [[value] * 4, [-value] * 4])
    assert_rows(compute("sequence", BY_HAND, process_reward_coef=0.5, scale="none"), [[0.7] * 4, [-0.7] * 4])


def test_episode_by_hand():
    # R of A: 1/3 + 0.5 * (0.4, 0.2, -0.1) = 0.5333, 0.4333, 0.2833, mean 0.4167; of B: -0.15, 0, mean -0.075.
    # All five: mean 0.22, squares of the deviations 0.098178 + 0.045511 + 0.004011 + 0.1369 + 0.0484 = 0.333, std
    # sqrt(0.333 / 5) = 0.258070.
    base, std = 0.7 / (0.7 * math.sqrt(2) + GRPO_EPSILON), 0.258070 + GRPO_EPSILON
    first = base + 0.116667 / std
    expected = [
        [first, first, base + 0.016667 / std, base - 0.133333 / std],
        [-base - 0.075 / std] * 2 + [-base + 0.075 / std] * 2,
    ]
    assert_rows(compute("episode", BY_HAND, process_reward_coef=0.5), expected)


def test_paper_by_hand():
    # R as above. Surprise shares: A 1/4, 3/4 | 1 | 1, so r = 0.133333, 0.4, 0.433333, 0.283333; mean 0.3125.
    # B: halves of -0.15 and of 0: r = -0.075, -0.075, 0, 0; mean -0.0375. Nothing is trimmed of 4 tokens.
    # A = +-0.175 / (0.175 * sqrt(2) + eps). Ratios of A: 0.426667, 1.28, 1.386667, 0.906667; of B: 2, 2, 0, 0.
    # B's mean is negative and so is its A: no mirror.
    value = 0.175 / (0.175 * math.sqrt(2) + GRPO_EPSILON)
    expected = [[value * ratio for ratio in (0.426667, 1.28, 1.386667, 0.906667)], [-2 * value, -2 * value, 0.0, 0.0]]
    assert_rows(compute("paper", BY_HAND, process_reward_coef=0.5), expected)
    # Evenly: A's first two tokens get 0.266667 each; ratio 0.853333.
    uniform = compute("paper", BY_HAND, process_reward_coef=0.5, token_credit="uniform")
    torch.testing.assert_close(uniform[0, :2], torch.full((2,), value * 0.853333), rtol=1e-4, atol=0)


def test_paper_mirrors_the_ratio_where_it_would_punish_the_best_paid_tokens():
    # Both right, so means are positive: A gets 0.5 + (0.3, 0.1) per token, mean 0.7; B 0.5 + (0.2, -0.4), mean 0.4.
    # B's A is negative: its better token (ratio 0.7 / 0.4 = 1.75) must lose less (2 - 1.75) than its worse (2 - 0.25).
    batch = {
        "spans": [[(0, 1), (1, 2)]] * 2,
        "rewards": [[0.3, 0.1], [0.2, -0.4]],
        "outcome": [1.0, 1.0],
        "log_probs": [[-1.0, -1.0]] * 2,
    }
    value = 0.15 / (0.15 * math.sqrt(2) + GRPO_EPSILON)
    expected = [[value * 0.8 / 0.7, value * 0.6 / 0.7], [-value * 0.25, -value * 1.75]]
    assert_rows(compute("paper", batch), expected)


def test_paper_clips_the_ratio_and_takes_1_where_the_mean_is_0():
    # A: r = 0.9, 0.1, -0.4, mean 0.2: ratios 4.5, 0.5, -2 are clipped to 2, 0.5, 0.
    # B: r = 0.5, -0.5, 0, mean 0: ratio 1.
    batch = {
        "spans": [[(0, 1), (1, 2), (2, 3)]] * 2,
        "rewards": [[0.9, 0.1, -0.4], [0.5, -0.5, 0.0]],
        "outcome": [0.0, 0.0],
        "log_probs": [[-1.0, -1.0, -1.0]] * 2,
    }
    value = 0.1 / (0.1 * math.sqrt(2) + GRPO_EPSILON)
    assert_rows(compute("paper", batch), [[2 * value, 0.5 * value, 0.0], [-value] * 3])


def test_paper_trims_both_tails():
    # One span of reward 40: one token of surprise 41 (share 41 / 80: r = 20.5), 39 tokens of surprise 1 (r = 0.5).
    # Trimmed: 40 * 0.05 / 2 = 1 of each end, so the mean is 0.5; untrimmed it is 1. The other row's is 0.
    batch = {
        "spans": [[(0, 40), (40, 40)]] * 2,
        "rewards": [[40.0, 0.0], [0.0, 0.0]],
        "outcome": [0.0, 0.0],
        "log_probs": [[-41.0] + [-1.0] * 39, [-1.0] * 40],
    }
    trimmed = compute("paper", batch, trim_fraction=0.05, scale="none")
    assert_rows(trimmed, [[0.25 * 2] + [0.25] * 39, [-0.25] * 40])
    whole = compute("paper", batch, trim_fraction=0.0, scale="none")
    assert_rows(whole, [[0.5 * 2] + [0.5 * 0.5] * 39, [-0.5] * 40])


def test_paper_shares_the_reward_of_certain_tokens_evenly():
    # log pi = 0 for a whole episode: no surprise to share by.
    batch = {**BY_HAND, "log_probs": [[0.0, 0.0, -2.0, -0.5], [-1.0, -1.0, -2.0, -2.0]]}
    expected = compute("paper", {**BY_HAND, "log_probs": [[-1.0, -1.0, -2.0, -0.5], [-1.0, -1.0, -2.0, -2.0]]})
    torch.testing.assert_close(compute("paper", batch), expected)


# ----- loops -----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("seed", range(4))
def test_equal_to_plain_loops(form, scale, seed):
    batch, coefficient = random_batch(seed), (0.8, 0.3)[seed % 2]
    options = {
        "token_credit": ("surprise", "uniform")[seed // 2],
        "trim_fraction": (0.05, 0.3)[seed % 2],
        "scale": scale,
    }
    actual = compute(form, batch, 4, process_reward_coef=coefficient, padding=seed, span_padding=seed % 2, **options)
    assert_rows(actual, loops(form, batch, 4, coefficient, **options))


# ----- properties -----


@pytest.mark.parametrize("form", FORMS)
def test_padding_is_zero_and_more_padding_changes_nothing(form):
    batch = random_batch(0)
    expected = compute(form, batch, 4)
    padded = compute(form, batch, 4, padding=7, span_padding=3)
    width = expected.shape[1]
    torch.testing.assert_close(padded[:, :width], expected)
    assert (padded[:, width:] == 0).all()
    for row, spans in zip(expected, batch["spans"], strict=True):
        assert (row[spans[-1][1] :] == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_log_probs_and_rewards_behind_the_end_are_not_read(form):
    batch = select(BY_HAND, [0, 1])
    batch["spans"] = [batch["spans"][0], [(0, 2), (2, 3)]]
    batch["log_probs"] = [batch["log_probs"][0], batch["log_probs"][1][:3]]
    expected = compute(form, batch)
    batch["log_probs"][1] = batch["log_probs"][1] + [-77.0]
    torch.testing.assert_close(compute(form, batch), expected)


@pytest.mark.parametrize("form", FORMS)
def test_permuted_completions_of_a_group_permute_the_advantages(form):
    batch, order = random_batch(1), [2, 0, 3, 1, 7, 6, 4, 5]
    width = max(row[-1][1] for row in batch["spans"])
    torch.testing.assert_close(compute(form, select(batch, order), 4), compute(form, batch, 4)[order][:, :width])


@pytest.mark.parametrize("form", FORMS)
def test_groups_do_not_see_each_other(form):
    batch = random_batch(2)
    together = compute(form, batch, 4)
    for rows in (range(0, 4), range(4, 8)):
        alone = compute(form, select(batch, rows), 4)
        torch.testing.assert_close(together[list(rows)][:, : alone.shape[1]], alone)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_ranks", [2, 4])  # whole groups per rank, and groups over two ranks
def test_groups_over_several_ranks_equal_one_rank(form, num_ranks):
    batch, num_rows = random_batch(3), 8 // num_ranks
    expected = compute(form, batch, 4)
    slots, barrier = [None] * num_ranks, threading.Barrier(num_ranks, timeout=20)

    def run(rank: int) -> torch.Tensor:
        def gather(values: torch.Tensor) -> torch.Tensor:
            slots[rank] = values
            barrier.wait()
            everything = torch.cat(slots)
            barrier.wait()
            return everything

        rows = select(batch, range(rank * num_rows, (rank + 1) * num_rows))
        return compute(form, rows, group=Group(4, gather, rank))

    with ThreadPoolExecutor(num_ranks) as pool:
        for rank, actual in enumerate(pool.map(run, range(num_ranks))):
            own = expected[rank * num_rows : (rank + 1) * num_rows]
            torch.testing.assert_close(actual, own[:, : actual.shape[1]])
            assert (own[:, actual.shape[1] :] == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_completions_that_cannot_be_scored_get_nothing_and_count_for_nothing(form):
    batch = random_batch(4)
    actual = compute(form, batch, 4)
    assert (actual[2] == 0).all()
    assert actual.isfinite().all()
    other = {**batch, "rewards": [[9.0] * len(row) if i == 2 else row for i, row in enumerate(batch["rewards"])]}
    torch.testing.assert_close(compute(form, other, 4), actual)
    nothing = {**batch, "outcome": [math.nan] * 8, "outcome_advantage": [math.nan] * 8}
    assert (compute(form, nothing, 4) == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_group_of_equal_outcomes_still_learns_from_its_episodes(form):
    # GRPO's advantage is 0 for all; the episode rewards still tell completions and episodes apart.
    batch = {**random_batch(5, has_unscored=False), "outcome": [1.0] * 8, "outcome_advantage": [0.0] * 8}
    actual = compute(form, batch, 4)
    assert actual.isfinite().all() and actual.abs().amax(1).min() > 1e-3
    if form != "sequence":  # and within a completion
        for row, spans in zip(actual, batch["spans"], strict=True):
            assert row[: spans[-1][1]].std() > 1e-3


@pytest.mark.parametrize("form", ["paper", "episode", "sequence"])
def test_a_group_of_equal_returns_is_not_blown_up(form):
    batch = select(BY_HAND, [0, 0, 0])
    actual = compute(form, batch)
    if form == "episode":
        torch.testing.assert_close(actual[0], actual[1])
        assert actual.abs().max() < 5
    else:
        torch.testing.assert_close(actual, torch.zeros_like(actual), rtol=0, atol=1e-3)


@pytest.mark.parametrize("form", ["episode", "return_to_go", "sequence"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_without_episode_rewards_it_is_grpo(form, scale):
    batch = {**random_batch(6, has_unscored=False), "outcome": [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0]}
    outcome = torch.tensor(batch["outcome"]).view(-1, 4)
    spread = {"group": outcome.std(1, keepdim=True), "batch": outcome.std()}
    grpo = outcome - outcome.mean(1, keepdim=True)
    grpo = (grpo if scale == "none" else grpo / (spread[scale] + GRPO_EPSILON)).flatten()
    batch["outcome_advantage"] = grpo.tolist()
    actual = compute(form, batch, 4, process_reward_coef=0.0, scale=scale)
    for i, spans in enumerate(batch["spans"]):
        tokens = actual[i, : spans[-1][1]]
        # "episode": outcome / S is the same for all spans of a completion, so nothing is added within it.
        torch.testing.assert_close(tokens, grpo[i].expand(len(tokens)), rtol=1e-5, atol=1e-5)


def test_sequence_is_constant_along_tokens():
    batch = random_batch(7)
    for row, spans in zip(compute("sequence", batch, 4), batch["spans"], strict=True):
        assert row[: spans[-1][1]].unique().numel() == 1


@pytest.mark.parametrize("form", FORMS)
def test_the_coefficient_of_the_process_reward_matters(form):
    batch = random_batch(8)
    assert (compute(form, batch, 4, process_reward_coef=0.0) - compute(form, batch, 4)).abs().max() > 0.05


def test_return_to_go_does_not_depend_on_how_an_episode_is_split():
    # J: 0.1 -> 0.5 over tokens 0-5, -> 0.9 over 6-8. The first episode is split at token 2, where J is still 0.1, or
    # at 4, where it is 0.3: gains telescope, so only the tokens behind the new cut change, by what was gained before.
    def advantages(spans, rewards):
        batch = select(BY_HAND, [0, 1])
        batch["spans"] = [spans, [(0, 4), (4, 5)]]
        batch["rewards"] = [rewards, [0.2, 0.0]]
        batch["log_probs"] = [[-1.0] * 10, [-1.0] * 5]
        return compute("return_to_go", batch)

    whole = advantages([(0, 6), (6, 9), (9, 10)], [0.4, 0.4, 0.0])
    torch.testing.assert_close(advantages([(0, 2), (2, 6), (6, 9), (9, 10)], [0.0, 0.4, 0.4, 0.0]), whole)
    halved = advantages([(0, 4), (4, 6), (6, 9), (9, 10)], [0.2, 0.2, 0.4, 0.0])
    change = torch.zeros_like(whole)
    change[0, 4:6] = -0.2
    baseline = -2 * 0.2 / 15  # of 15 tokens
    torch.testing.assert_close(halved, whole + (change - baseline) * (whole != 0))


def test_return_to_go_keeps_its_scale():
    # Twice the episode rewards, twice the distance from GRPO's advantage: nothing is standardised away.
    batch = random_batch(9, has_unscored=False)
    twice = {**batch, "rewards": [[2 * value for value in row] for row in batch["rewards"]]}
    grpo = compute("return_to_go", batch, 4, process_reward_coef=0.0)
    one, two = (compute("return_to_go", each, 4) - grpo for each in (batch, twice))
    torch.testing.assert_close(two, 2 * one, rtol=1e-4, atol=1e-5)
    # And the process part has mean 0 over the tokens of each group.
    is_token = grpo != 0
    assert one[:4][is_token[:4]].mean().abs() < 1e-5 and one[4:][is_token[4:]].mean().abs() < 1e-5


def test_paper_rewards_conserve_the_return():
    # Sum over tokens of r_t = sum over spans of R_k = outcome + alpha * sum of the episode rewards. Seen through the
    # advantages of two completions, of which the second has the return 0.
    batch = random_batch(10, num_rows=2, has_unscored=False)
    batch["rewards"][1] = [0.0] * len(batch["rewards"][1])
    batch["outcome"] = [1.0, 0.0]
    actual = compute("paper", batch, 2, process_reward_coef=0.8, trim_fraction=0.0, scale="none")
    length = batch["spans"][0][-1][1]
    total = 1.0 + 0.8 * sum(batch["rewards"][0])
    # The second row's ratio is 1 (its mean is 0), so it shows A = -(mean of the first) / 2.
    assert actual[1, 0].item() == pytest.approx(-total / length / 2, rel=1e-4)


def test_empty_completions_get_nothing():
    batch = select(BY_HAND, [0, 1, 0])
    batch["spans"] = [*batch["spans"][:2], [(0, 0)]]
    batch["rewards"] = [*batch["rewards"][:2], [0.0]]
    batch["log_probs"] = [*batch["log_probs"][:2], []]
    batch["outcome"] = [1.0, 0.0, 0.0]
    for form in FORMS:
        actual = compute(form, batch)
        assert actual.isfinite().all() and (actual[2] == 0).all()


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match="'grpo'"):
        compute("grpo", BY_HAND)
