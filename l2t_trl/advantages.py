r"""
From outcome and episode rewards to token advantages (paper Eq. 2 and 3, Sec. 4.3, Algorithm 1).

The episode reward of span k of completion i is r_prg = fitting gain - compression_coef * compression penalty, and its
return the sum of the outcome reward and alpha times the episode rewards, alpha being `process_reward_coef`. Four forms
turn them into advantages `(B, T)`:

- `"return_to_go"`: the outcome advantage of GRPO plus alpha * (G_k - mean), where G_k = sum of the episode rewards
  from episode k on, and the mean runs over the group's tokens. Gains telescope, so a preparing episode shares what
  follows from it, and nothing depends on how a completion was split; once the answer is determined only the cost is
  left.
- `"sequence"`: the completion's return, normalised in the group, constant along its tokens.
- `"episode"`: the same plus (R_k - mean_k R) / std, where R_k = outcome / S_i + alpha * r_prg_k, and the std is that
  of R over the group's episodes.
- `"paper"`: R_k spread over the episode's tokens, r_t = w_t R_k; the truncated mean rt of r_t, normalised in the
  group, is the completion's advantage A; A_t = A * r_t / rt. Guarded twice: the ratio is clipped to [0, 2] and 1 where
  rt is 0, and it is mirrored, 2 - ratio, where A and rt differ in sign, since it would otherwise punish the best-paid
  tokens of a below-average completion most.

Legend: B completions here, N over all ranks, G per group, T completion tokens, S spans (padded).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


# As in TRL: keeps a group of equal returns from dividing by 0.
_STD_EPSILON = 1e-4


@dataclass
class Group:
    """
    Statistics over the G completions of a prompt, which may sit on several ranks.

    Attributes:
        size (`int`): G, completions per prompt.
        gather (`Callable`): concatenates a tensor `(B, ...)` over all ranks, in order. The identity on one rank.
        rank (`int`): which block of B rows of the gathered tensor is this rank's.
    """

    size: int
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda values: values
    rank: int = 0

    def normalise(self, values: torch.Tensor, scale: str = "group") -> torch.Tensor:
        """
        Deviation of `values` `(B,)` from the group's mean, divided by the standard deviation of the group, of the
        whole batch (`scale="batch"`) or by nothing (`"none"`). NaN rows are left out of the statistics and become 0.
        """
        groups = self.gather(values).view(-1, self.size)
        deviation = groups - groups.nanmean(1, keepdim=True)
        if scale == "group":
            deviation = deviation / (_nanstd(groups, 1) + _STD_EPSILON)
        elif scale == "batch":
            deviation = deviation / (_nanstd(groups.flatten(), 0) + _STD_EPSILON)
        return self._local(deviation.flatten(), len(values)).nan_to_num(nan=0.0)

    def mean(self, sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Mean over everything in the group of what rows hold `sums` of in `counts` pieces, both `(B,)`."""
        totals = self.gather(torch.stack([sums, counts], 1)).view(-1, self.size, 2).sum(1, keepdim=True)
        mean = totals[..., 0] / totals[..., 1].clamp(min=1)
        return self._local(mean.expand(-1, self.size).flatten(), len(sums))

    def _local(self, values: torch.Tensor, num_rows: int) -> torch.Tensor:
        return values[self.rank * num_rows : (self.rank + 1) * num_rows]


def fitting_gains(correctness: torch.Tensor, is_episode: torch.Tensor) -> torch.Tensor:
    """
    Fitting gain dI_k = J_k - J_{k-1} of every span (paper Eq. 3). The answer span gains nothing: its worth is the
    outcome reward.

    Args:
        correctness (`torch.Tensor` of shape `(B, K + 1)`): J before the first and after every episode, NaN on padding.
        is_episode (`torch.Tensor` of shape `(B, K + 1)`): whether the span holds tokens.

    Returns:
        `torch.Tensor` of shape `(B, K + 1)`, a span each, the answer span included.
    """
    gains = torch.zeros_like(correctness)
    gains[:, :-1] = correctness.diff(dim=1).nan_to_num(nan=0.0)
    return gains * is_episode


def token_advantages(
    form: str,
    *,
    outcome: torch.Tensor,
    outcome_advantage: torch.Tensor,
    episode_reward: torch.Tensor,
    span_of_token: torch.Tensor,
    log_probs: torch.Tensor,
    process_reward_coef: float,
    group: Group,
    token_credit: str = "surprise",
    trim_fraction: float = 0.05,
    scale: str = "group",
) -> torch.Tensor:
    """
    Advantages of every completion token.

    Args:
        form (`str`): `"paper"`, `"episode"`, `"return_to_go"` or `"sequence"`, see the module's docstring.
        outcome (`torch.Tensor` of shape `(B,)`): outcome reward; NaN marks a completion that cannot be scored.
        outcome_advantage (`torch.Tensor` of shape `(B,)`): GRPO's advantage of it.
        episode_reward (`torch.Tensor` of shape `(B, S)`): per span; 0 on padding.
        span_of_token (`torch.Tensor` of shape `(B, T)`): index of the token's span; -1 on padding.
        log_probs (`torch.Tensor` of shape `(B, T)`): log pi_old of the tokens, in nats.
        process_reward_coef (`float`): alpha.
        group ([`Group`]): the completions of one prompt.
        token_credit (`str`, *optional*, defaults to `"surprise"`):
            Share of a token in its episode's reward, form `"paper"`: by `-log pi_old`, or `"uniform"`.
        trim_fraction (`float`, *optional*, defaults to `0.05`): left out of the truncated mean, form `"paper"`.
        scale (`str`, *optional*, defaults to `"group"`): what returns are divided by, see [`Group.normalise`].

    Returns:
        `torch.Tensor` of shape `(B, T)`: 0 on padding and for completions that cannot be scored.

    Raises:
        ValueError: if the form is unknown.
    """
    is_token = span_of_token >= 0  # (B, T)
    span = span_of_token.clamp(min=0)
    is_scored = ~outcome.isnan()

    if form == "return_to_go":
        to_go = (process_reward_coef * episode_reward).flip(1).cumsum(1).flip(1).gather(1, span)  # (B, T)
        weight = (is_token & is_scored[:, None]).to(to_go)
        baseline = group.mean((to_go * weight).sum(1), weight.sum(1))
        advantages = outcome_advantage[:, None] + to_go - baseline[:, None]
    elif form == "sequence":
        returns = outcome + process_reward_coef * episode_reward.sum(1)
        advantages = group.normalise(returns, scale)[:, None].expand(span.shape)
    elif form in ("episode", "paper"):
        lengths = torch.zeros_like(episode_reward).scatter_add_(1, span, is_token.to(episode_reward))  # (B, S)
        is_span = lengths > 0
        num_spans = is_span.sum(1).clamp(min=1)
        rewards = (outcome / num_spans)[:, None] + process_reward_coef * episode_reward  # R (B, S)
        rewards = rewards.masked_fill(~is_span, 0.0)
        if form == "episode":
            completion = group.normalise(outcome + process_reward_coef * episode_reward.sum(1), scale)
            deviation = (rewards - (rewards.sum(1) / num_spans)[:, None]).gather(1, span)
            advantages = completion[:, None] + deviation / (_std_in_group(rewards, is_span, group) + _STD_EPSILON)
        else:
            weights = _token_weights(span, is_token, log_probs, episode_reward.shape[1], token_credit)
            token_rewards = weights * rewards.gather(1, span)
            mean = _truncated_mean(token_rewards, is_token, trim_fraction)
            completion = group.normalise(mean.where(is_scored, torch.nan), scale)
            advantages = completion[:, None] * _guarded_ratio(token_rewards, mean, completion)
    else:
        raise ValueError(f"form must be 'paper', 'episode', 'return_to_go' or 'sequence', got {form!r}.")
    return advantages.where(is_token & is_scored[:, None], 0.0)


def _token_weights(span, is_token, log_probs, num_spans, token_credit) -> torch.Tensor:
    """Share of each token in its span, `(B, T)`; the shares of a span sum to 1."""
    surprise = -log_probs if token_credit == "surprise" else torch.ones_like(log_probs)
    surprise = surprise.masked_fill(~is_token, 0.0)
    totals = surprise.new_zeros(len(span), num_spans).scatter_add_(1, span, surprise)
    counts = torch.zeros_like(totals).scatter_add_(1, span, is_token.to(totals))
    # An episode without any surprise shares its reward evenly.
    even = is_token / counts.gather(1, span).clamp(min=1)
    total = totals.gather(1, span)
    return torch.where(total > 1e-12, surprise / total.clamp(min=1e-12), even)


def _truncated_mean(values: torch.Tensor, is_token: torch.Tensor, trim_fraction: float) -> torch.Tensor:
    """Mean `(B,)` of each row's values without the lowest and highest `trim_fraction / 2` of them, rounded down."""
    lengths = is_token.sum(1)
    ranked = values.masked_fill(~is_token, torch.inf).sort(1).values
    cut = (lengths * (trim_fraction / 2)).long()
    place = torch.arange(values.shape[1], device=values.device)
    is_kept = (place >= cut[:, None]) & (place < (lengths - cut)[:, None])
    return ranked.where(is_kept, 0.0).sum(1) / is_kept.sum(1).clamp(min=1)


def _guarded_ratio(token_rewards: torch.Tensor, mean: torch.Tensor, completion: torch.Tensor) -> torch.Tensor:
    mean = mean[:, None]
    ratio = torch.where(mean.abs() > 1e-8, token_rewards / mean.where(mean.abs() > 1e-8, 1.0), 1.0).clamp(0, 2)
    return torch.where(completion[:, None] * mean < 0, 2 - ratio, ratio)


def _std_in_group(rewards: torch.Tensor, is_span: torch.Tensor, group: Group) -> torch.Tensor:
    """Standard deviation `(B, 1)` of all episodes' rewards in the group; unscored completions are left out."""
    weight = (is_span & ~rewards.isnan()).to(rewards)
    rewards = rewards.nan_to_num(nan=0.0) * weight
    counts = weight.sum(1)
    mean = group.mean(rewards.sum(1), counts)
    square = group.mean(((rewards - mean[:, None]).square() * weight).sum(1), counts)
    return square.sqrt()[:, None]


def _nanstd(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Unbiased standard deviation along `dim`, kept as a dimension, NaN left out."""
    mean = values.nanmean(dim, keepdim=True)
    count = (~values.isnan()).sum(dim, keepdim=True)
    return ((values - mean).square().nansum(dim, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
