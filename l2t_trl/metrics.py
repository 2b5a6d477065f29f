"""Statistics of a generation batch over all ranks. Legend: B completions here, N over all ranks, S spans."""

import math
from collections.abc import Callable

import torch


def summarise(
    per_completion: dict[str, torch.Tensor],
    per_episode: dict[str, torch.Tensor],
    is_episode: torch.Tensor,
    gather: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, float]:
    """
    Mean, minimum and maximum of each quantity over all ranks, by one collective.

    Args:
        per_completion (`dict[str, torch.Tensor]` of shapes `(B,)`): one value per completion.
        per_episode (`dict[str, torch.Tensor]` of shapes `(B, S)`): one value per span.
        is_episode (`torch.Tensor` of shape `(B, S)`): whether a span holds tokens; others are left out.
        gather (`Callable`): concatenates a tensor `(B, ...)` over all ranks.

    Returns:
        `dict[str, float]`: by `name/mean`, `name/min` and `name/max`; NaN where there is nothing to summarise.
    """
    columns = [*per_completion.values(), is_episode.sum(1)]
    for values in per_episode.values():
        columns.append(values.masked_fill(~is_episode, 0.0).sum(1))
        columns.append(values.masked_fill(~is_episode, torch.inf).amin(1))
        columns.append(values.masked_fill(~is_episode, -torch.inf).amax(1))
    table = gather(torch.stack([column.double() for column in columns], 1)).cpu()  # (N, columns)

    summary = {}
    for name, column in zip(per_completion, table.T, strict=False):
        summary |= {f"{name}/mean": column.mean().item()}
        summary |= {f"{name}/min": column.min().item(), f"{name}/max": column.max().item()}
    num_episodes, *statistics = table.T[len(per_completion) :]
    for index, name in enumerate(per_episode):
        total, low, high = statistics[3 * index : 3 * index + 3]
        count = num_episodes.sum().item()
        summary[f"{name}/mean"] = total.sum().item() / count if count else math.nan
        summary |= {f"{name}/min": low.min().item() if count else math.nan}
        summary |= {f"{name}/max": high.max().item() if count else math.nan}
    return summary


def zero_std_share(outcomes: torch.Tensor, has_signal: torch.Tensor, group_size: int) -> float:
    """
    Share of the groups with equal outcome rewards in which some completion still has a non-zero advantage.

    Args:
        outcomes (`torch.Tensor` of shape `(N,)`): outcome rewards of all ranks, NaN where there is none.
        has_signal (`torch.Tensor` of shape `(N,)`): whether any token of the completion has one.
        group_size (`int`): completions per prompt.

    Returns:
        `float`: NaN where no group has equal outcome rewards.
    """
    groups = outcomes.view(-1, group_size)
    is_equal = groups.nan_to_num(nan=torch.inf).amin(1) >= groups.nan_to_num(nan=-torch.inf).amax(1)
    if not is_equal.any():
        return math.nan
    return has_signal.view(-1, group_size).any(1)[is_equal].double().mean().item()


def importance_shares(
    ratio: torch.Tensor,
    mask: torch.Tensor,
    clip_max: float | None,
    gather: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, float]:
    """
    Shares of all completion tokens whose importance weight between trainer and vLLM is 0, or as large as it may be.

    Args:
        ratio (`torch.Tensor` of shape `(B, T)` or `(B, 1)`): weights of tokens or of whole completions.
        mask (`torch.Tensor` of shape `(B, T)`): 1 on completion tokens.
        clip_max (`float`, *optional*): the largest weight.
        gather (`Callable`): concatenates a tensor `(1, ...)` over all ranks.

    Returns:
        `dict[str, float]`: `importance_masked/frac` and `importance_truncated/frac`.
    """
    weights = ratio.expand(mask.shape)[mask.bool()]
    is_truncated = torch.zeros_like(weights, dtype=torch.bool) if clip_max is None else weights >= clip_max
    counts = torch.stack([(weights == 0).sum(), is_truncated.sum(), mask.sum()])
    masked, truncated, total = gather(counts[None]).sum(0).tolist()
    return {
        "importance_masked/frac": masked / total if total else math.nan,
        "importance_truncated/frac": truncated / total if total else math.nan,
    }
