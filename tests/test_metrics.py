import math

import torch

from l2t_trl.metrics import importance_shares, summarise, zero_std_share


def test_summary_by_hand():
    # Two completions on this rank, a third on another; spans that hold no token (the second row's last) are left out.
    is_episode = torch.tensor([[True, True], [True, False]])
    gains = torch.tensor([[0.25, -0.5], [1.0, 99.0]])

    def gather(table):
        # per_completion, number of episodes, then sum, minimum and maximum of the gains
        other = torch.tensor([[9.0, 1.0, 2.0, 2.0, 2.0]], dtype=table.dtype)
        return torch.cat([table, other])

    summary = summarise({"correctness": torch.tensor([0.0, 3.0])}, {"gain": gains}, is_episode, gather)
    assert summary == {
        "correctness/mean": 4.0,  # (0 + 3 + 9) / 3
        "correctness/min": 0.0,
        "correctness/max": 9.0,
        "gain/mean": 0.6875,  # (0.25 - 0.5 + 1 + 2) / 4
        "gain/min": -0.5,
        "gain/max": 2.0,
    }


def test_no_episode_has_no_statistic():
    nothing = torch.zeros(2, 1)
    summary = summarise({}, {"gain": nothing}, nothing.bool(), lambda table: table)
    assert all(math.isnan(value) for value in summary.values()) and len(summary) == 3


def test_share_of_equal_groups_with_signal():
    nan = math.nan
    outcomes = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, nan, 1.0])
    signal = torch.tensor([False, True, True, True, False, False, False, False])
    # Groups of two: equal with signal; unequal; equal without; equal but for a missing one, without.
    assert zero_std_share(outcomes, signal, 2) == 1 / 3
    assert math.isnan(zero_std_share(torch.tensor([0.0, 1.0]), torch.tensor([True, True]), 2))


def test_shares_of_importance_weights_by_hand():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    # Of four tokens one has weight 0 and one the largest; what stands on padding counts for nothing.
    ratio = torch.tensor([[1.0, 0.0, 3.0], [0.5, 0.0, 3.0]])
    shares = importance_shares(ratio, mask, 3.0, lambda counts: counts)
    assert shares == {"importance_masked/frac": 0.25, "importance_truncated/frac": 0.25}
    # One weight per completion counts for all its tokens; another rank's four tokens are all masked.
    other = torch.tensor([[4, 0, 4]])
    shares = importance_shares(torch.tensor([[0.0], [1.0]]), mask, None, lambda counts: torch.cat([counts, other]))
    assert shares == {"importance_masked/frac": 7 / 8, "importance_truncated/frac": 0.0}
