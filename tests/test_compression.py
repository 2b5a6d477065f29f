"""Low-rank proxy, Fisher matrix, information, calibrated penalty: by hand, by dense formulas, by plain loops."""

import math
import warnings

import pytest
import torch

import literal
from l2t_trl.compression import CompressionPenalty, information
from l2t_trl.proxy import low_rank_basis, proxy_rank


def random_batch(seed: int, num_rows: int, num_spans: int, size: int, scale: float = 1.0):
    """Gradients, gains and mask of rows with 1 .. num_spans spans; padding holds rubbish that must not count."""
    generator = torch.Generator().manual_seed(seed)
    gradients = scale * torch.randn(num_rows, num_spans, size, generator=generator)
    gains = torch.randn(num_rows, num_spans, generator=generator)
    counts = torch.randint(1, num_spans + 1, (num_rows,), generator=generator)
    is_episode = torch.arange(num_spans) < counts[:, None]
    return gradients, gains, is_episode


class LiteralPenalty:
    """Running averages as lists of all batches seen so far, weighted anew each time."""

    def __init__(self, damping: float, decay: float, unit: str):
        self.damping, self.decay, self.unit = damping, decay, unit
        self.fishers, self.totals = [], []

    def _average(self, pairs) -> object:
        last = len(pairs) - 1
        weights = [self.decay ** (last - j) for j in range(len(pairs))]
        numerator = sum(w * total for w, (total, _) in zip(weights, pairs, strict=True))
        return numerator / sum(w * count for w, (_, count) in zip(weights, pairs, strict=True))

    def __call__(self, gradients, gains, is_episode):
        episodes = [
            g for row, mask in zip(gradients, is_episode, strict=True) for g, m in zip(row, mask, strict=True) if m
        ]
        self.fishers.append((literal.fisher_matrix(episodes) * len(episodes), len(episodes)))
        fisher = self._average(self.fishers)
        q = torch.zeros(is_episode.shape, dtype=torch.float64)
        charged, gained = 0.0, 0.0
        for i in range(len(gradients)):
            for k in range(is_episode.shape[1]):
                if is_episode[i, k]:
                    q[i, k] = literal.episode_information(gradients[i, k], fisher, self.damping)
                    charged += float(q[i, k]) ** 2
                    gained += max(float(gains[i, k]), 0.0)
        self.totals.append((torch.tensor([charged, gained], dtype=torch.float64), len(gradients)))
        mean_charged, mean_gained = self._average(self.totals).tolist()
        unit = 1.0 if self.unit == "absolute" else mean_gained
        return q, q**2 / mean_charged * unit


# ----- the proxy -----


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_basis_is_the_truncated_decomposition(shape, rank):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = low_rank_basis(weight, rank)
    assert u.shape == (shape[0], rank) and s.shape == (rank,) and v.shape == (shape[1], rank)
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    truncated = left[:, :rank] @ torch.diag(values[:rank]) @ right[:rank]
    torch.testing.assert_close((u @ torch.diag(s) @ v.T).double(), truncated, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(s.double(), values[:rank], rtol=1e-5, atol=0)  # the largest, in order
    torch.testing.assert_close(u.T @ u, torch.eye(rank), rtol=0, atol=1e-5)
    torch.testing.assert_close(v.T @ v, torch.eye(rank), rtol=0, atol=1e-5)
    # u_i and v_i belong together: theta_i = u_i^T W v_i, so that d theta_i = u_i^T dW v_i.
    torch.testing.assert_close((u.T @ weight @ v).diagonal(), s, rtol=1e-5, atol=1e-5)


def test_basis_of_a_half_precision_weight_is_fp32():
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert all(part.dtype == torch.float32 for part in low_rank_basis(weight, 2))


@pytest.mark.parametrize(
    ("shape", "ratio", "rank"),
    [((96, 64), 0.05, 3), ((64, 96), 0.05, 3), ((8960, 1536), 0.05, 76), ((10, 10), 0.05, 1), ((7, 9), 1.0, 7)],
)
def test_rank_is_the_ratio_of_the_smaller_side(shape, ratio, rank):
    assert proxy_rank(torch.empty(shape), ratio) == rank  # 0.05 * 64 = 3.2, 0.05 * 1536 = 76.8, rounded down


# ----- information -----


def test_information_by_hand():
    # F = diag(3, 1): mean diagonal 2, damping 0.5 adds 1 to each: diag(4, 2).
    # g = (2, 2): 4/4 + 4/2 = 3; g = (0, 1): 1/2; g = 0: 0.
    gradients = torch.tensor([[[2.0, 2.0], [0.0, 1.0]], [[-2.0, 2.0], [0.0, 0.0]]])
    expected = torch.tensor([[3.0, 0.5], [3.0, 0.0]])
    torch.testing.assert_close(information(gradients, torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 0.5), expected)


def test_information_of_a_softmax_with_two_parameters_by_hand():
    # pi = softmax(theta_1, theta_2, 0) with probabilities 1/2, 1/4, 1/4. grad log pi(a) = e_a - p, so
    #   g(1) = (1/2, -1/4), g(2) = (-1/2, 3/4), g(3) = (-1/2, -1/4)
    #   F = diag(p) - p p^T = [[1/4, -1/8], [-1/8, 3/16]], det 1/32, F^-1 = [[6, 4], [4, 8]]
    #   q(1) = 6/4 - 8/8 + 8/16 = 1, q(2) = 6/4 - 24/8 + 72/16 = 3, q(3) = 6/4 + 8/8 + 8/16 = 3    (in all: 1/p - 1)
    theta = torch.tensor([math.log(2.0), 0.0], requires_grad=True)

    def gradient(action):
        return torch.autograd.grad(torch.cat([theta, torch.zeros(1)]).log_softmax(0)[action], theta)[0]

    # One episode per action, the first twice: the sample has the model's own frequencies, so its F is exact.
    # Two completions, (1, 2) and (1, 3): sums of q^2 are 1 + 9 each, eta^2 = 1/10, penalties 0.1 and 0.9.
    gradients = torch.stack([torch.stack([gradient(0), gradient(1)]), torch.stack([gradient(0), gradient(2)])])
    torch.testing.assert_close(gradients[1, 1], torch.tensor([-0.5, -0.25]))
    penalty = CompressionPenalty(damping=0.0)
    q, charged = penalty(gradients, torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool))
    torch.testing.assert_close(penalty.fisher, torch.tensor([[0.25, -0.125], [-0.125, 0.1875]]).double())
    torch.testing.assert_close(q, torch.tensor([[1.0, 3.0], [1.0, 3.0]]))
    torch.testing.assert_close(charged, torch.tensor([[0.1, 0.9], [0.1, 0.9]]))


@pytest.mark.parametrize("damping", [1e-5, 1e-2, 1.0])
@pytest.mark.parametrize("num_episodes", [40, 4])  # more and fewer than the 6 coordinates
def test_information_equals_a_brute_force_solve(damping, num_episodes):
    gradients = torch.randn(num_episodes, 6, generator=torch.Generator().manual_seed(0))
    fisher = literal.fisher_matrix(gradients)
    expected = torch.tensor([literal.episode_information(g, fisher, damping) for g in gradients])
    torch.testing.assert_close(information(gradients, fisher, damping), expected, rtol=1e-4, atol=0)


def test_information_does_not_depend_on_the_gradients_scale():
    # Damping is relative to F's mean diagonal. Gradients of 1e-15 squared twice would leave fp32's range.
    gradients = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)).double()
    expected = information(gradients, literal.fisher_matrix(gradients), 0.1)
    for scale in (1e-15, 1e-3, 1e9):
        scaled = gradients * scale
        torch.testing.assert_close(information(scaled, literal.fisher_matrix(scaled), 0.1), expected)


def test_information_without_damping_and_with_too_few_episodes_is_that_of_the_limit():
    # F = (1/n) sum g g^T with n independent g: each q is n, whatever the g are (which is why the module warns).
    for seed in range(5):
        gradients = torch.randn(4, 10, generator=torch.Generator().manual_seed(seed)).double()
        q = information(gradients, literal.fisher_matrix(gradients), 0.0)
        torch.testing.assert_close(q, torch.full((4,), 4.0), rtol=1e-3, atol=0)


def test_information_of_zero_gradients_is_zero():
    assert torch.equal(information(torch.zeros(2, 3, 4), torch.zeros(4, 4), 1e-5), torch.zeros(2, 3))


# ----- penalty -----


@pytest.mark.filterwarnings("ignore:The Fisher matrix")
@pytest.mark.parametrize("unit", ["absolute", "gain"])
@pytest.mark.parametrize("decay", [0.9, 0.5, 0.0])
def test_averages_over_batches_equal_plain_loops(unit, decay):
    penalty, loops = CompressionPenalty(1e-3, decay, unit), LiteralPenalty(1e-3, decay, unit)
    for seed, (num_rows, num_spans, scale) in enumerate([(6, 5, 1.0), (3, 2, 3.0), (8, 4, 0.2), (5, 6, 1.0)]):
        batch = random_batch(seed, num_rows, num_spans, 4, scale)
        for actual, expected in zip(penalty(*batch), loops(*batch), strict=True):
            assert actual.shape == batch[1].shape
            torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-6)
    episodes = [decay ** (len(loops.fishers) - 1 - j) * count for j, (_, count) in enumerate(loops.fishers)]
    squares = [decay ** (2 * (len(loops.fishers) - 1 - j)) * count for j, (_, count) in enumerate(loops.fishers)]
    assert penalty.effective_episodes == pytest.approx(sum(episodes) ** 2 / sum(squares))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_an_average_completion_is_charged_one_in_all(scale):
    gradients, gains, is_episode = random_batch(0, 9, 5, 3, scale)
    q, charged = CompressionPenalty()(gradients, gains, is_episode)
    assert charged.sum(1).mean().item() == pytest.approx(1.0, rel=1e-5)
    # C_k is q_k squared, up to the unit.
    torch.testing.assert_close(charged, q.square() * (charged.sum() / q.square().sum()))


def test_an_average_completion_is_charged_what_it_gains():
    gradients, gains, is_episode = random_batch(0, 9, 5, 3)
    _, charged = CompressionPenalty(unit="gain")(gradients, gains, is_episode)
    # Losses do not count against gains, padding does not count at all.
    total = sum(max(float(gain), 0) for gain in gains[is_episode]) / 9
    assert charged.sum(1).mean().item() == pytest.approx(total, rel=1e-5)


def test_twice_the_gradient_at_the_same_fisher_is_sixteen_times_the_penalty():
    penalty = CompressionPenalty()
    gradients, gains, is_episode = random_batch(0, 9, 5, 3)
    _, charged = penalty(gradients, gains, is_episode)
    _, twice = penalty(2 * gradients, gains, is_episode, update=False)
    torch.testing.assert_close(twice, 16 * charged)  # (D . g)^2 with D = F^-1 g


def test_what_is_no_episode_counts_for_nothing():
    gradients, gains, is_episode = random_batch(0, 9, 5, 3)
    expected_q, expected = CompressionPenalty(unit="gain")(gradients, gains, is_episode)
    assert not is_episode.all()
    assert (expected_q[~is_episode] == 0).all() and (expected[~is_episode] == 0).all()
    gradients[~is_episode], gains[~is_episode] = 77.0, 77.0
    q, charged = CompressionPenalty(unit="gain")(gradients, gains, is_episode)
    torch.testing.assert_close(q, expected_q)
    torch.testing.assert_close(charged, expected)
    # More padding.
    padded = [torch.cat([tensor, torch.zeros_like(tensor)], dim=1) for tensor in (gradients, gains, is_episode)]
    q, charged = CompressionPenalty(unit="gain")(*padded)
    torch.testing.assert_close(charged[:, :5], expected)
    assert (charged[:, 5:] == 0).all()


def test_permuted_batch_permutes_the_penalties():
    gradients, gains, is_episode = random_batch(0, 9, 5, 3)
    _, expected = CompressionPenalty()(gradients, gains, is_episode)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    _, charged = CompressionPenalty()(gradients[order], gains[order], is_episode[order])
    torch.testing.assert_close(charged, expected[order])


def test_ranks_share_their_sums():
    # Two ranks with the same rows: every sum over ranks is twice the local one, every average that of one rank.
    batches = [random_batch(seed, 6, 4, 3) for seed in range(3)]
    alone, doubled = CompressionPenalty(unit="gain"), CompressionPenalty(unit="gain")
    reduced = []

    def reduce(sums):
        reduced.append(sums.shape)
        return 2 * sums

    for gradients, gains, is_episode in batches:
        expected = alone(*(torch.cat([tensor, tensor]) for tensor in (gradients, gains, is_episode)))
        actual = doubled(gradients, gains, is_episode, reduce=reduce)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other[:6])
    for name in CompressionPenalty.STATE:
        torch.testing.assert_close(getattr(doubled, name), getattr(alone, name))
    assert len(reduced) % 3 == 0 and len(set(reduced[: len(reduced) // 3])) == 2  # (R, R) once, else scalars


def test_evaluation_leaves_the_averages_alone():
    penalty = CompressionPenalty()
    penalty(*random_batch(0, 9, 5, 3))
    before = penalty.state_dict()
    gradients, gains, is_episode = random_batch(1, 4, 5, 3)
    q, _ = penalty(gradients, gains, is_episode, update=False)
    assert all(torch.equal(before[name], value) for name, value in penalty.state_dict().items())
    torch.testing.assert_close(q, information(gradients, penalty.fisher, 1e-5) * is_episode)


def test_evaluation_before_the_first_step_has_averages_of_its_own():
    batch = random_batch(0, 9, 5, 3)
    for actual, expected in zip(CompressionPenalty()(*batch, update=False), CompressionPenalty()(*batch), strict=True):
        assert torch.equal(actual, expected)


def test_state_goes_through_a_checkpoint_and_reset_forgets_it():
    penalty, restored = CompressionPenalty(unit="gain"), CompressionPenalty(unit="gain")
    for seed in range(3):
        penalty(*random_batch(seed, 6, 4, 3))
    state = penalty.state_dict()
    restored.load_state_dict(state)
    batch = random_batch(9, 6, 4, 3)
    for actual, expected in zip(restored(*batch), penalty(*batch), strict=True):
        assert torch.equal(actual, expected)
    restored.load_state_dict(state)  # the state is a copy: what happened since did not touch it
    assert restored.num_episodes < penalty.num_episodes
    penalty.reset()
    for actual, expected in zip(penalty(*batch), CompressionPenalty(unit="gain")(*batch), strict=True):
        assert torch.equal(actual, expected)


def test_reset_takes_another_rank():
    penalty = CompressionPenalty()
    penalty(*random_batch(0, 9, 5, 3))
    penalty.reset()
    assert penalty(*random_batch(0, 9, 5, 6))[0].shape == (9, 5)


# ----- degenerate batches -----


def test_fewer_episodes_than_coordinates_warn_once():
    gradients, gains, is_episode = random_batch(0, 3, 1, 8)  # 3 episodes; after a second batch worth less than 6
    penalty = CompressionPenalty()
    with pytest.warns(UserWarning, match="8 proxy coordinates.*proxy_rank_ratio"):
        q, _ = penalty(gradients, gains, is_episode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        penalty(gradients, gains, is_episode)
    # And for a reason: every q tends to the number of episodes.
    torch.testing.assert_close(
        q[is_episode], is_episode.sum().float().expand(int(is_episode.sum())), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize(("num_rows", "warns"), [(4, True), (5, False)])
def test_as_many_episodes_as_coordinates_are_too_few(num_rows, warns):
    gradients, gains, _ = random_batch(0, num_rows, 1, 4)
    is_episode = torch.ones(num_rows, 1, dtype=torch.bool)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CompressionPenalty()(gradients, gains, is_episode)
    assert bool(caught) == warns


@pytest.mark.parametrize("unit", ["absolute", "gain"])
def test_zero_gradients_cost_nothing(unit):
    penalty = CompressionPenalty(unit=unit)
    shape = (8, 3)
    q, charged = penalty(torch.zeros(*shape, 4), torch.ones(shape), torch.ones(shape, dtype=torch.bool))
    assert torch.equal(q, torch.zeros(shape)) and torch.equal(charged, torch.zeros(shape))
    # And do not spoil what comes after.
    q, charged = penalty(*random_batch(0, 8, 3, 4))
    assert q.isfinite().all() and charged.isfinite().all() and charged.sum() > 0


@pytest.mark.filterwarnings("ignore:The Fisher matrix")
@pytest.mark.parametrize("unit", ["absolute", "gain"])
def test_a_batch_without_an_episode_costs_nothing(unit):
    penalty = CompressionPenalty(unit=unit)
    q, charged = penalty(torch.ones(4, 1, 3), torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.bool))
    assert torch.equal(q, torch.zeros(4, 1)) and torch.equal(charged, torch.zeros(4, 1))
    _, charged = penalty(*random_batch(0, 8, 3, 3))
    assert charged.isfinite().all() and charged.sum() > 0


def test_gains_broken_to_zero_cost_nothing_in_units_of_gain():
    gradients, _, is_episode = random_batch(0, 9, 5, 3)
    _, charged = CompressionPenalty(unit="gain")(gradients, torch.zeros(9, 5), is_episode)
    assert torch.equal(charged, torch.zeros(9, 5))


def test_a_common_displacement_by_hand():
    penalty = CompressionPenalty(unit="absolute")
    gradients = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 1.0], [9.0, 9.0]]])
    is_episode = torch.tensor([[True, True], [True, False]])
    displacement = torch.tensor([1.0, -1.0])
    q, charged = penalty(gradients, torch.zeros(2, 2), is_episode, displacement=displacement)
    # q: 1, -2 and 3 - 1 = 2; squares 1, 4 and 4, by completion 5 and 4, on average 4.5.
    assert q.tolist() == [[1.0, -2.0], [2.0, 0.0]]
    torch.testing.assert_close(charged, torch.tensor([[1.0, 4.0], [4.0, 0.0]]) / 4.5)
    # The size of a displacement does not matter, only its direction.
    _, again = CompressionPenalty()(gradients, torch.zeros(2, 2), is_episode, displacement=100 * displacement)
    torch.testing.assert_close(again, charged)


def test_no_displacement_costs_nothing_and_moves_no_average():
    penalty = CompressionPenalty()
    gradients, is_episode = torch.ones(1, 2, 3), torch.ones(1, 2, dtype=torch.bool)
    q, charged = penalty(gradients, torch.ones(1, 2), is_episode, displacement=torch.zeros(3))
    assert not q.any() and not charged.any()
    assert all(not value.any() for value in penalty.state_dict().values())
