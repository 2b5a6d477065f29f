"""
J by Monte Carlo: the mean outcome reward of short continuations of every cut (the estimator `rollout`).

Legend: B completions, S spans of the one with the most (K + 1 cuts), m continuations per cut.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from l2t_trl.scoring import cuts_of


class Cut(NamedTuple):
    """A place from which a completion is continued: its row, which cut of it, and the ids up to there and of the probe."""

    row: int
    index: int
    prefix: list[int]


def all_cuts(
    completion_ids: Sequence[Sequence[int]], spans: Sequence[Sequence[tuple[int, int]]], probe_ids: Sequence[int]
) -> list[Cut]:
    """
    Every cut of every completion, with the probe behind it.

    Args:
        completion_ids (`Sequence[Sequence[int]]` of length B): completion token ids, without padding.
        spans (`Sequence[Sequence[tuple[int, int]]]` of length B): episodes and answer span of each completion.
        probe_ids (`Sequence[int]`): ids of the text that elicits the answer.
    """
    return [
        Cut(row, index, [*ids[:cut], *probe_ids])
        for row, (ids, row_spans) in enumerate(zip(completion_ids, spans, strict=True))
        for index, cut in enumerate(cuts_of(row_spans))
    ]


def mean_rewards(cuts: Sequence[Cut], rewards: torch.Tensor, num_rows: int) -> torch.Tensor:
    """
    Mean reward of the continuations of every cut.

    Args:
        cuts (`Sequence[Cut]` of length N): the cuts.
        rewards (`torch.Tensor` of shape `(N, m)`): outcome rewards; NaN where there is none.
        num_rows (`int`): B.

    Returns:
        `torch.Tensor` of shape `(B, S)`: 0 where no continuation has a reward, NaN on padding.
    """
    means = rewards.nanmean(1).nan_to_num(nan=0.0)
    row, index = torch.tensor([(cut.row, cut.index) for cut in cuts], device=rewards.device).T
    table = torch.full((num_rows, int(index.max()) + 1), torch.nan, device=rewards.device)
    return table.index_put_((row, index), means)
