"""
The mathematics of L2T done slowly and literally: no padding, no batch, no shared forward, no vectorised step.

Written from the paper and the method's description, not from the package, which it is there to check. One forward per
answer and cut, one backward per episode through the whole model, dense matrices in float64, plain loops.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn


Span = tuple[int, int]


# ----- log-probabilities and J: separate forwards -----


def log_softmax_rows(model: nn.Module, ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities (L, V) of what follows each of the L tokens, at temperature 1, from one unpadded forward."""
    device = next(model.parameters()).device
    logits = model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0]
    return torch.log_softmax(logits.double(), dim=-1)


def token_log_probs(model: nn.Module, prompt: Sequence[int], continuation: Sequence[int]) -> torch.Tensor:
    """log pi of every token of `continuation` behind `prompt`; with its graph where gradients are on."""
    if not len(continuation):
        return torch.zeros(0, dtype=torch.float64)
    rows = log_softmax_rows(model, [*prompt, *continuation])
    return torch.stack([rows[len(prompt) + t - 1, token] for t, token in enumerate(continuation)])


def answer_log_probs(
    model: nn.Module,
    prompt: Sequence[int],
    completion: Sequence[int],
    spans: Sequence[Span],
    probe: Sequence[int],
    answer: Sequence[int],
) -> list[float]:
    """log J_0 .. log J_K: the answer behind prompt, the completion's first k episodes and the probe."""
    cuts = [0, *(end for _, end in spans[:-1])]
    result = []
    for cut in cuts:
        with torch.no_grad():
            log_probs = token_log_probs(model, [*prompt, *completion[:cut], *probe], answer)
        result.append(sum(log_probs.tolist()))
    return result


# ----- g_k: full backwards -----


def plain_layer(model: nn.Module, name: str) -> nn.Module:
    """The layer that holds the weight: inside a LoRA wrapper, the wrapped one."""
    module = model.get_submodule(name)
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def is_transposed(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D"  # GPT-2's (in, out)


def effective_weight(model: nn.Module, name: str) -> torch.Tensor:
    """W (out, in) as the forward sees it: plain, or plus scaling * B A of every active LoRA adapter."""
    module, layer = model.get_submodule(name), plain_layer(model, name)
    weight = layer.weight.detach().double()
    weight = weight.T if is_transposed(layer) else weight
    if hasattr(module, "lora_A"):
        for adapter in module.active_adapters:
            down, up = module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach()
            weight = weight + module.scaling[adapter] * up.double() @ down.double()
    return weight


def weight_gradients(
    model: nn.Module, prompt: Sequence[int], completion: Sequence[int], span: Span, names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """
    d/dW of the sum of log pi over the tokens of one span, (out, in) per layer, by a backward through the model.

    y = W x + scaling B A x + b: the gradient with respect to the base weight is that with respect to the effective W.
    """
    layers = {name: plain_layer(model, name) for name in names}
    shapes = {name: (layer.weight.T if is_transposed(layer) else layer.weight).shape for name, layer in layers.items()}
    if span[0] == span[1]:
        return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    flags = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        with torch.enable_grad():
            log_probs = token_log_probs(model, prompt, completion)
            total = sum(log_probs[t] for t in range(*span))
            gradients = torch.autograd.grad(total, [layer.weight for layer in layers.values()])
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(flags[id(parameter)])
    return {
        name: (gradient.T if is_transposed(layers[name]) else gradient).double()
        for name, gradient in zip(names, gradients, strict=True)
    }


def proxy_gradients(
    model: nn.Module,
    prompt: Sequence[int],
    completion: Sequence[int],
    spans: Sequence[Span],
    bases: dict[str, tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """g of every span, (S, R): entry i of a layer is u_i^T (dW) v_i, the layers one after another."""
    rows = []
    for span in spans:
        gradients = weight_gradients(model, prompt, completion, span, list(bases))
        entries = []
        for name, (left, right) in bases.items():
            for i in range(left.shape[1]):
                entries.append(float(left[:, i].double() @ gradients[name] @ right[:, i].double()))
        rows.append(entries)
    return torch.tensor(rows, dtype=torch.float64)


def proxy_bases(model: nn.Module, names: Sequence[str], ranks: dict[str, int] | int) -> dict[str, tuple]:
    """U_r (out, r) and V_r (in, r) of every layer's effective weight, from the full decomposition."""
    bases = {}
    for name in names:
        left, _, right = torch.linalg.svd(effective_weight(model, name), full_matrices=False)
        rank = ranks if isinstance(ranks, int) else ranks[name]
        bases[name] = (left[:, :rank].float(), right[:rank].T.float())
    return bases


# ----- Fisher matrix and penalty: dense formulas in float64 -----


def fisher_matrix(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """F = mean of g g^T over episodes."""
    gradients = [g.double() for g in gradients]
    total = torch.zeros(len(gradients[0]), len(gradients[0]), dtype=torch.float64)
    for g in gradients:
        for i in range(len(g)):
            for j in range(len(g)):
                total[i, j] += g[i] * g[j]
    return total / len(gradients)


def episode_information(gradient: torch.Tensor, fisher: torch.Tensor, damping: float) -> float:
    """q = g^T (F + damping * mean(diag F) * I)^-1 g."""
    size = len(fisher)
    mean_diagonal = sum(float(fisher[i, i]) for i in range(size)) / size
    damped = fisher.double() + damping * mean_diagonal * torch.eye(size, dtype=torch.float64)
    g = gradient.double()
    return float(g @ torch.linalg.inv(damped) @ g)


# ----- episodes: one byte at a time -----


def tag_spans(pieces: Sequence[bytes], max_episodes: int) -> tuple[list[Span], bool]:
    """
    Spans of the format "tags", by walking over the text byte by byte.

    An episode lasts from its opening tag to its closing tag, the next opening tag or `</think>`; text before it
    belongs to it; a token goes where its first byte goes, and a token without bytes where the next byte goes, at the
    end to the answer span. Where nothing comes before `</think>` there is no episode.
    """
    text = b"".join(pieces)
    label: list[int] = []  # of every byte: the episode it belongs to
    number, is_open, found = 0, False, False
    position = 0
    while position < len(text):
        if text.startswith(b"</think>", position):
            number, found, is_open = (number + 1, True, False) if is_open else (number, found, False)
            break
        tag = _tag_at(text, position)
        if tag is None:
            label.append(number)
            position += 1
            continue
        is_closing, length = tag
        if is_open and not is_closing:
            number, found = number + 1, True
        label += [number] * length
        position += length
        if is_open and is_closing:
            number, found = number + 1, True
        is_open = not is_closing
    if position >= len(text) and is_open:
        number, found = number + 1, True
    num_episodes = number
    if not found:  # everything before </think> is one episode
        num_episodes = 1
        label = [0] * position
    # What no episode claimed is the answer span, also bytes labelled with a number no episode ended on.
    label = [min(each, num_episodes) for each in label]
    label += [num_episodes] * (len(text) - len(label))

    owners, start = [], 0
    for piece in pieces:
        owners.append(label[start] if start < len(text) else num_episodes)
        start += len(piece)
    ends = []
    for k in range(num_episodes):
        end = sum(owner <= k for owner in owners)
        if end > (ends[-1] if ends else 0):
            ends.append(end)
    while len(ends) > max_episodes:
        del ends[-2]
    starts = [0, *ends]
    return [(start, end) for start, end in zip(starts, [*ends, len(pieces)], strict=True)], found


def _tag_at(text: bytes, position: int) -> tuple[bool, int] | None:
    """(is it closing, its length) of an episode tag that starts at this byte."""
    rest = text[position:]
    for is_closing, opener in ((False, b"<episode_"), (True, b"</episode_")):
        if rest.startswith(opener):
            digits = 0
            while rest[len(opener) + digits : len(opener) + digits + 1].isdigit():
                digits += 1
            if digits and rest[len(opener) + digits : len(opener) + digits + 1] == b">":
                return is_closing, len(opener) + digits + 1
    return None


# ----- small things used by several loops -----


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def deviation(values: Sequence[float], is_unbiased: bool = True) -> float:
    """Standard deviation; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    center = mean(values)
    return math.sqrt(sum((value - center) ** 2 for value in values) / (len(values) - is_unbiased))


# ----- advantages: plain loops over the completions of all groups, in order -----


def normalised(values: Sequence[float], size: int, scale: str = "group") -> list[float]:
    """Deviation from the group's mean over a standard deviation; NaN counts for nothing and becomes 0."""
    known = [value for value in values if not math.isnan(value)]
    result = []
    for i, value in enumerate(values):
        first = i // size * size
        group = [other for other in values[first : first + size] if not math.isnan(other)]
        if math.isnan(value):
            result.append(0.0)
            continue
        spread = {"group": deviation(group), "batch": deviation(known), "none": None}[scale]
        result.append((value - mean(group)) / (1.0 if spread is None else spread + 1e-4))
    return result


def fitting_gains(correctness: Sequence[Sequence[float]]) -> list[list[float]]:
    """J_k - J_{k-1} per episode, then 0 for the answer span; rows without padding."""
    return [[after - before for before, after in zip(row, row[1:], strict=False)] + [0.0] for row in correctness]


def returns_to_go(rewards: Sequence[Sequence[float]], spans, outcome, outcome_advantage, coefficient, size):
    """GRPO's advantage plus alpha * (sum of episode rewards from the token's episode on - its mean over the group)."""
    to_go = []
    for row, row_spans in zip(rewards, spans, strict=True):
        tokens = []
        for k, (start, end) in enumerate(row_spans):
            tokens += [coefficient * sum(row[k : len(row_spans)])] * (end - start)
        to_go.append(tokens)
    result = []
    for i, tokens in enumerate(to_go):
        first = i // size * size
        everyone = [value for j in range(first, first + size) if not math.isnan(outcome[j]) for value in to_go[j]]
        known = not math.isnan(outcome[i])
        result.append([outcome_advantage[i] + value - mean(everyone) if known else 0.0 for value in tokens])
    return result


def constant_in_sequence(rewards, spans, outcome, coefficient, size, scale):
    totals = [out + coefficient * sum(row) for out, row in zip(outcome, rewards, strict=True)]
    advantages = normalised(totals, size, scale)
    return [[a] * row_spans[-1][1] for a, row_spans in zip(advantages, spans, strict=True)]


def episode_returns(rewards, spans, outcome, coefficient) -> list[list[float | None]]:
    """R_k = outcome / number of spans that hold tokens + alpha * episode reward; None where a span holds none."""
    result = []
    for row, row_spans, out in zip(rewards, spans, outcome, strict=True):
        filled = [start < end for start, end in row_spans]
        result.append([out / sum(filled) + coefficient * row[k] if f else None for k, f in enumerate(filled)])
    return result


def by_episode(rewards, spans, outcome, coefficient, size, scale):
    """The completion's normalised return plus (R_k - mean_k R) / std of R over the group's episodes."""
    returns = episode_returns(rewards, spans, outcome, coefficient)
    base = constant_in_sequence(rewards, spans, outcome, coefficient, size, scale)
    result = []
    for i, row_spans in enumerate(spans):
        if math.isnan(outcome[i]):
            result.append([0.0] * row_spans[-1][1])
            continue
        first = i // size * size
        group = [r for row in returns[first : first + size] for r in row if r is not None and not math.isnan(r)]
        spread = deviation(group, is_unbiased=False) + 1e-4
        own = mean([r for r in returns[i] if r is not None])
        tokens = []
        for k, (start, end) in enumerate(row_spans):
            tokens += [base[i][t] + (returns[i][k] - own) / spread for t in range(start, end)]
        result.append(tokens)
    return result


def truncated_mean(values: Sequence[float], trim: float) -> float:
    """Mean without the lowest and the highest half of the share `trim`, rounded down."""
    cut = int(round(len(values) * trim / 2, 9))
    return mean(sorted(values)[cut : len(values) - cut])


def as_in_the_paper(rewards, spans, outcome, log_probs, coefficient, size, scale, credit, trim):
    """r_t = w_t R_k; A = normalised truncated mean; A_t = A r_t / rt, the ratio in [0, 2], mirrored if A < 0 < rt."""
    returns = episode_returns(rewards, spans, outcome, coefficient)
    token_rewards, means = [], []
    for row_spans, row_returns, row_log_probs, out in zip(spans, returns, log_probs, outcome, strict=True):
        tokens = []
        for k, (start, end) in enumerate(row_spans):
            weights = [-row_log_probs[t] if credit == "surprise" else 1.0 for t in range(start, end)]
            if sum(weights) == 0:
                weights = [1.0] * len(weights)
            tokens += [weight / sum(weights) * row_returns[k] for weight in weights]
        token_rewards.append(tokens)
        means.append(math.nan if math.isnan(out) else truncated_mean(tokens, trim))
    result = []
    for advantage, center, tokens in zip(normalised(means, size, scale), means, token_rewards, strict=True):
        row = []
        for value in tokens:
            ratio = min(max(value / center, 0.0), 2.0) if abs(center) > 1e-8 else 1.0
            row.append(0.0 if math.isnan(center) else advantage * (2 - ratio if advantage * center < 0 else ratio))
        result.append(row)
    return result
