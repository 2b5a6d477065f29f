r"""
The compression penalty: what an episode writes into the parameters (paper Eq. 4, Thm. 4.2, Lemma B.1).

With the proxy theta of [`l2t_trl.proxy`], an episode's gradient g_k = grad_theta log pi(z_k | s_k) and the Fisher
matrix F = E[g g^T], the penalty of a parameter update D_k is the Fisher quadratic form (D_k . g_k)^2. By default the
update is the damped natural-gradient step on the episode itself, D_k = eta F^-1 g_k, so that

    q_k = g_k^T F^-1 g_k,        C_k = eta^2 q_k^2.

It may also be one displacement D of the parameters for all episodes (see [`l2t_trl.sharding`]), eta D; then q_k = D .
g_k. The paper leaves the step size eta open. Here it is calibrated so that an average completion is charged one unit in
all, eta^2 = unit / mean over completions of sum_k q_k^2, which frees the penalty of the model's scale and of the rank.

Legend: B completions, S spans (episodes and answer span), R proxy coordinates.
"""

import warnings

import torch


def information(gradients: torch.Tensor, fisher: torch.Tensor, damping: float) -> torch.Tensor:
    """
    Information q = g^T (F + damping * mean(diag F) * I)^-1 g that an episode holds about the proxy.

    Args:
        gradients (`torch.Tensor` of shape `(..., R)`): g per episode.
        fisher (`torch.Tensor` of shape `(R, R)`): F.
        damping (`float`): relative to the mean diagonal of F.

    Returns:
        `torch.Tensor` of shape `(...)`, fp32. All zero where F is: gradients that never differ from 0 hold nothing.
    """
    scale = fisher.diagonal().mean().double()
    if scale <= 0:
        return torch.zeros(gradients.shape[:-1], device=gradients.device)
    # Scaled to unit mean diagonal and in fp64: gradients of 10^-6 would leave fp32's range when squared twice.
    identity = torch.eye(len(fisher), dtype=torch.float64, device=fisher.device)
    flat = gradients.reshape(-1, gradients.shape[-1]).double() / scale.sqrt()
    factor, failed = torch.linalg.cholesky_ex(fisher.double() / scale + damping * identity)
    if failed:  # no damping, and fewer episodes than coordinates: the pseudo-inverse is the limit for damping -> 0
        solution = flat @ torch.linalg.pinv(fisher.double() / scale, hermitian=True)
    else:
        solution = torch.cholesky_solve(flat.T, factor).T
    return (flat * solution).sum(-1).float().view(gradients.shape[:-1])


class CompressionPenalty:
    """
    Penalties of the episodes of a batch, and the running averages that they rest on.

    Averages decay by `decay` per batch and are ratios of decayed sums, so that a batch counts by its episodes. With a
    single batch they are its plain means.

    Args:
        damping (`float`, *optional*, defaults to `1e-5`): damping of the Fisher matrix, relative to its mean diagonal.
        decay (`float`, *optional*, defaults to `0.9`): of the sums, per batch.
        unit (`str`, *optional*, defaults to `"absolute"`):
            What an average completion is charged: 1 (`"absolute"`), or the fitting gains that it makes (`"gain"`).
    """

    # What a checkpoint keeps; all tensors.
    STATE = ("fisher_sum", "num_episodes", "num_episodes_squared", "information_sum", "gain_sum", "num_completions")

    def __init__(self, damping: float = 1e-5, decay: float = 0.9, unit: str = "absolute"):
        self.damping, self.decay, self.unit = damping, decay, unit
        self.has_warned = False
        self.reset()

    def reset(self) -> None:
        """Forget every average, as a change of the proxy's basis requires."""
        for name in self.STATE:
            setattr(self, name, torch.zeros((), dtype=torch.float64))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The running sums, for a checkpoint."""
        return {name: getattr(self, name).clone() for name in self.STATE}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from the running sums of a checkpoint."""
        for name in self.STATE:
            setattr(self, name, state[name].clone())

    @property
    def fisher(self) -> torch.Tensor:
        """The Fisher matrix F `(R, R)`: the average of g g^T over episodes."""
        return self.fisher_sum / self.num_episodes.clamp(min=torch.finfo(torch.float64).tiny)

    @property
    def effective_episodes(self) -> float:
        """Number of equally weighted episodes that the Fisher average is worth, (sum of weights)^2 / sum of squares."""
        return (self.num_episodes**2 / self.num_episodes_squared.clamp(min=1e-30)).item()

    def __call__(
        self,
        gradients: torch.Tensor,
        gains: torch.Tensor,
        is_episode: torch.Tensor,
        reduce=lambda sums: sums,
        update: bool = True,
        displacement: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Penalties of a batch, after it has entered the averages.

        Args:
            gradients (`torch.Tensor` of shape `(B, S, R)`): g of every span.
            gains (`torch.Tensor` of shape `(B, S)`): fitting gain of every span.
            is_episode (`torch.Tensor` of shape `(B, S)`): whether a span holds tokens; others count for nothing.
            reduce (`Callable`, *optional*): sums a tensor over all ranks.
            update (`bool`, *optional*, defaults to `True`):
                Whether the averages move. Off in evaluation, unless there are none yet.
            displacement (`torch.Tensor` of shape `(R,)`, *optional*):
                D; by default every episode has its own, the natural-gradient step. A displacement of 0 costs nothing
                and leaves the averages as they are.

        Returns:
            Information q and penalty C, both of shape `(B, S)` and 0 outside episodes.
        """
        mask = is_episode.to(gradients.dtype)
        if displacement is not None and not displacement.any():
            return torch.zeros_like(mask), torch.zeros_like(mask)
        update = update or self.num_completions == 0
        if displacement is None:
            q = self._information(gradients * mask[..., None], reduce, update, mask) * mask
        else:
            q = gradients @ displacement.to(gradients) * mask
        if update:
            self._add("information_sum", reduce(q.double().square().sum()))
            self._add("gain_sum", reduce((gains * mask).clamp(min=0).double().sum()))
            self._add("num_completions", reduce(torch.tensor(len(q), dtype=torch.float64, device=q.device)))
        mean_square = (self.information_sum / self.num_completions).to(q)
        unit = 1.0 if self.unit == "absolute" else (self.gain_sum / self.num_completions).to(q)
        return q, q.square() * unit / mean_square.clamp(min=torch.finfo(q.dtype).tiny)

    def _information(self, gradients: torch.Tensor, reduce, update: bool, mask: torch.Tensor) -> torch.Tensor:
        """q of every span by the running Fisher matrix, which takes in the batch first."""
        if update:
            flat = gradients.flatten(0, 1).double()
            self._add("fisher_sum", reduce(flat.T @ flat))
            count = reduce(mask.sum().double())
            self._add("num_episodes", count)
            self.num_episodes_squared = self.num_episodes_squared.to(count) * self.decay**2 + count
        rank = gradients.shape[-1]
        if self.effective_episodes <= rank and not self.has_warned:
            self.has_warned = True
            warnings.warn(
                f"The Fisher matrix of {rank} proxy coordinates rests on {self.effective_episodes:.0f} episodes, and "
                "every episode tends to the same penalty. Set a lower proxy_rank_ratio, a fisher_ema nearer 1 or a "
                "larger generation batch.",
                stacklevel=3,
            )
        return information(gradients, self.fisher.to(gradients.device), self.damping)

    def _add(self, name: str, value: torch.Tensor) -> None:
        setattr(self, name, getattr(self, name).to(value.device) * self.decay + value)
