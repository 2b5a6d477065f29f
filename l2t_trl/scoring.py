r"""
One scoring pass: log pi of the completions, the predicted correctness J at every cut, and the proxy gradient of every
episode (paper Sec. 4.2).

A plain causal forward over prompt and completion keeps its key-value cache (phase one). All probes of a completion,
one copy of probe and answer per cut, then ride in a single short forward against that cache (phase two): each copy
sees the prefix up to its cut and itself. Nothing quadratic in the completion's length is stored, and the cost does not
grow with K but by the probes' own tokens.

The gradients follow from what the last decoder layer's MLP is: after it, positions no longer mix. One backward pass
through the tail (MLP, final norm, lm_head), in chunks of tokens, gives the gradient d_t at the output of each of its
linear layers for every token at once, and with a weight's truncated SVD W ~ U S V^T and its singular values theta as
the proxy,

    d log pi(z_t) / d theta_i = (u_i . d_t)(v_i . x_t),        g_k = sum over the tokens t of episode k.

Legend: B completions, L tokens of the longest prompt and completion, T of the longest completion, K episodes, S = K +
1 spans, Q probe tokens, N completion tokens in all, H hidden size, V vocabulary size, r rank, R sum of the ranks.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random

import torch
from torch import nn

from l2t_trl.proxy import Basis, causal_lm, is_linear
from l2t_trl.sharding import gathered


# Elements of the largest intermediate of the tail, (tokens of a chunk) x (vocabulary + MLP width).
_CHUNK_ELEMENTS = 2**25
_CPU_CHUNK_ELEMENTS = 2**21  # what its caches hold
# How far two ways to an answer token's log-probability, in nats, and to the same gradients, relatively, may differ
# before a model is taken to be one that cannot be scored in one pass. Half precision leaves more room.
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}


@dataclass
class Scores:
    """
    What one scoring pass says of a batch of completions, all in fp32.

    Attributes:
        log_probs (`torch.Tensor` of shape `(B, T)`):
            Log-probability of each completion token at temperature 1, in nats; 0 on padding.
        answer_log_probs (`torch.Tensor` of shape `(B, K + 1)`, *optional*):
            Log-probability of the gold answer behind the probe, summed over its tokens, at every cut: before the first
            episode, then after each. NaN on padding. `None` without answers.
        answer_lengths (`torch.Tensor` of shape `(B,)`, *optional*):
            Tokens of the gold answer, likewise.
        gradients (`torch.Tensor` of shape `(B, S, R)`, *optional*):
            Gradient g of the log-probability of each span with respect to the proxy; 0 on padding. `None` without
            bases.
    """

    log_probs: torch.Tensor
    answer_log_probs: torch.Tensor | None
    answer_lengths: torch.Tensor | None
    gradients: torch.Tensor | None

    def correctness(self, answer_likelihood: str = "joint") -> torch.Tensor:
        """
        Predicted probability J of the correct answer at every cut, shape `(B, K + 1)`, NaN on padding.

        `"joint"` is the product of the answer's token probabilities, `"per_token"` their geometric mean.
        """
        if answer_likelihood == "joint":
            return self.answer_log_probs.exp()
        return (self.answer_log_probs / self.answer_lengths[:, None]).exp()


class Scorer:
    """
    Scores completions with a causal language model, which it leaves exactly as it was.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`):
            The policy. A PEFT model counts with its adapters.
        bases (`dict[str, tuple[torch.Tensor, torch.Tensor]]`, *optional*):
            Singular vectors `(U, V)` of shapes `(out, r)` and `(in, r)` per proxy module, by module name. Without them
            no gradients are computed. See [`l2t_trl.proxy.proxy_bases`].

    Raises:
        ValueError: if probes cannot share the model's forward pass, e.g. because it has no key-value cache.
    """

    def __init__(self, model: nn.Module, bases: dict[str, Basis] | None = None):
        self.model = causal_lm(model)
        self.decoder = self.model.get_decoder()
        self.head = self.model.get_output_embeddings()
        self.config = self.model.config.get_text_config(decoder=True)
        layer_types = getattr(self.config, "layer_types", None) or []
        unknown = set(layer_types) - {"full_attention", "sliding_attention"}
        if unknown or getattr(self.config, "is_encoder_decoder", False) or self.head is None:
            raise ValueError(
                f"{type(self.model).__name__} cannot be scored: episodes are scored with a decoder of full or sliding "
                f"attention layers and an lm_head, got {sorted(unknown) or 'no such decoder'}."
            )
        self.tail = _Tail.of(self.decoder)
        self.bases: dict[str, Basis] = {}
        if bases is not None:
            self.set_bases(bases)

    def set_bases(self, bases: dict[str, Basis]) -> None:
        """Replace the proxy's bases, in the order in which their coordinates stand in the gradients."""
        modules = dict(self.model.named_modules())
        self.bases = bases
        self._proxies = [(modules[name], u, v) for name, (u, v) in bases.items()]
        self._in_tail = self.tail is not None and all(
            any(module is part for part in self.tail.mlp.modules()) for module, _, _ in self._proxies
        )

    def check(self, pad_token_id: int = 0) -> None:
        """
        Compare both shortcuts of the pass with plain forwards on a few made-up tokens.

        A tail whose gradients are not those of the whole model is given up with a warning, and gradients take one
        backward pass per episode instead.

        Raises:
            ValueError: if a probe's log-probabilities are not those of a forward of its own.
        """
        size = min(self.config.vocab_size, 1000)
        random = Random(0)
        row = [random.randrange(size) for _ in range(24)]
        prompt, completion, probe, answer = row[:7], row[7:19], row[19:21], row[21:]
        exact = torch.autocast(self.head_device.type, enabled=False)
        with torch.no_grad(), scoring_mode(self.model), exact, self._gathered():
            batch = _Batch([prompt], [completion], [[(0, 5), (5, 12)]], self.head_device)
            batch.place_probes(probe, [answer])
            hidden, cache, taps = self._read(batch)
            at_cuts = self._answer_log_probs(batch, cache)
            literal = []
            for cut in (0, 5):
                ids = torch.tensor([prompt + completion[:cut] + probe + answer], device=self.head_device)
                log_probs = self.model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
                literal.append(log_probs[-1 - len(answer) : -1].gather(-1, ids[0, -len(answer) :, None]).sum())
            tolerance = _PROBE_TOLERANCE.get(hidden.dtype, 0.3) * len(answer)
            error = (at_cuts[0] - torch.stack(literal)).abs().max().item()
            if not error <= tolerance:
                raise ValueError(
                    f"{type(self.model).__name__} cannot be scored: its answer log-probabilities differ by {error:.2g} "
                    "between a shared forward pass and one of their own. Its attention takes no custom mask; try "
                    "attn_implementation='sdpa' or 'eager'."
                )
            if self.bases and self._in_tail:
                in_tail, everywhere = self._tail_gradients(batch, taps)[1], self._full_gradients(batch, taps)[1]
                if not (in_tail - everywhere).norm() <= _GRADIENT_TOLERANCE.get(hidden.dtype, 0.2) * everywhere.norm():
                    self.tail, self._in_tail = None, False
        if self.bases and not self._in_tail:
            warnings.warn(
                f"The proxy modules of {type(self.model).__name__} are not those of a last MLP that can be split off: "
                "every episode takes a backward pass of its own, which is slow.",
                stacklevel=2,
            )

    @property
    def head_device(self) -> torch.device:
        """Device on which input ids are expected."""
        return self.decoder.get_input_embeddings().weight.device

    def score(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        spans: Sequence[Sequence[tuple[int, int]]],
        probe_ids: Sequence[int],
        answer_ids: Sequence[Sequence[int]] | None,
        batch_size: int | None = None,
    ) -> Scores:
        """
        Score completions, `batch_size` at a time.

        However the spans differ, the number of forward passes depends on B and `batch_size` alone, as ranks that share
        a sharded model need.

        Args:
            prompt_ids (`Sequence[Sequence[int]]` of length B): prompt token ids, without padding, at least one each.
            completion_ids (`Sequence[Sequence[int]]` of length B): completion token ids, without padding.
            spans (`Sequence[Sequence[tuple[int, int]]]` of length B):
                Episodes and answer span of each completion, see [`l2t_trl.episodes.segment`].
            probe_ids (`Sequence[int]`): ids of the text that elicits the answer, at least one.
            answer_ids (`Sequence[Sequence[int]]` of length B, *optional*): ids of the gold answers, at least one each.
                Without them no probes are run.
            batch_size (`int`, *optional*): completions per forward pass; by default all.

        Returns:
            [`Scores`]

        Raises:
            ValueError: if a prompt, the probe or an answer has no token.
        """
        for name, rows in (("prompt", prompt_ids), ("probe", [probe_ids]), ("answer", answer_ids or [])):
            empty = [index for index, row in enumerate(rows) if len(row) == 0]
            if empty:
                raise ValueError(f"A {name} must have at least one token, got none in row {empty[0]}.")
        # Rows of like length share a batch, so that little of it is padding.
        order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]) + len(completion_ids[i]))
        batch_size = batch_size or len(order)
        pieces = []
        with scoring_mode(self.model), self._gathered():
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                prompts, completions, row_spans = (
                    [column[i] for i in rows] for column in (prompt_ids, completion_ids, spans)
                )
                batch = _Batch(prompts, completions, row_spans, self.head_device)
                if answer_ids is not None:
                    batch.place_probes(list(probe_ids), [answer_ids[i] for i in rows])
                pieces.append(self._score(batch))
        place = torch.tensor(order).argsort()
        gradients = _stack([piece.gradients for piece in pieces], 0.0)[place] if self.bases else None
        answer_log_probs = answer_lengths = None
        if answer_ids is not None:
            answer_log_probs = _stack([piece.answer_log_probs for piece in pieces], torch.nan)[place]
            answer_lengths = torch.cat([piece.answer_lengths for piece in pieces])[place]
        return Scores(
            log_probs=_stack([piece.log_probs for piece in pieces], 0.0)[place],
            answer_log_probs=answer_log_probs,
            answer_lengths=answer_lengths,
            gradients=gradients,
        )

    def _gathered(self):
        """Sharded weights that every chunk needs, gathered once: the tail's, or all where gradients need the whole."""
        if self.bases and not self._in_tail:
            return gathered(self.model, [self.model])
        tail = [] if self.tail is None else self.tail.modules()
        return gathered(self.model, [*tail, self.head])

    def _score(self, batch: "_Batch") -> Scores:
        with torch.no_grad():
            hidden, cache, taps = self._read(batch)
            answer_log_probs = self._answer_log_probs(batch, cache) if batch.answer_lengths is not None else None
            del cache
        gradients = None
        if not self.bases:
            with torch.no_grad():
                flat = hidden.flatten(0, 1)
                log_probs = torch.cat(
                    [
                        _gather_log_probs(self._logits(flat[batch.predicting[chunk]]), batch.targets[chunk])
                        for chunk in self._chunks(len(batch.targets))
                    ]
                )
        else:
            gradients_of = self._tail_gradients if self._in_tail else self._full_gradients
            log_probs, gradients = gradients_of(batch, taps)
        return Scores(
            log_probs=batch.to_rows(log_probs),
            answer_log_probs=answer_log_probs,
            answer_lengths=batch.answer_lengths,
            gradients=gradients,
        )

    def _read(self, batch: "_Batch"):
        """Phase one: hidden states `(B, L, H)`, the key-value cache, and what enters the tail."""
        from transformers import DynamicCache

        # Without a config every layer keeps all positions, sliding windows included: the cuts need them.
        cache = DynamicCache()
        taps = _Taps()
        with taps.of(self.tail):
            # Rows are padded on the right, where causal attention keeps padding from mattering: no mask is needed.
            hidden = self.decoder(input_ids=batch.ids, past_key_values=cache, use_cache=True).last_hidden_state
        if cache.get_seq_length() != batch.ids.shape[1]:
            raise ValueError(
                f"{type(self.model).__name__} cannot be scored: it keeps no key-value cache of every position."
            )
        return hidden, cache, taps

    def _answer_log_probs(self, batch: "_Batch", cache) -> torch.Tensor:
        """Phase two: summed log-probability of the answer behind every cut, `(B, K + 1)`."""
        positions = batch.probe_positions
        with _masked_attention(self.model, self.config) as (mask_dtype, mask_of):
            hidden = self.decoder(
                input_ids=batch.probe_ids,
                position_ids=positions,
                attention_mask=mask_of(lambda window: batch.probe_mask(window, mask_dtype)),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        row, column = batch.answer_positions
        hidden = hidden[row, column]
        log_probs = torch.cat(
            [
                _gather_log_probs(self._logits(hidden[chunk]), batch.answer_targets[chunk])
                for chunk in self._chunks(len(row))
            ]
        )
        total = torch.full(batch.cuts.shape, torch.nan, device=hidden.device)
        total[batch.has_cut] = 0.0
        return total.index_put_((row, batch.probe_copy[row, column]), log_probs, accumulate=True)

    def _tail_gradients(self, batch: "_Batch", taps: "_Taps") -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities `(N,)` and gradients `(B, S, R)` by one backward pass through the tail."""
        log_probs, sums = [], batch.span_sums(sum(u.shape[1] for _, u, _ in self._proxies))
        modules = [module for module, _, _ in self._proxies]
        for chunk in self._chunks(len(batch.targets)):
            tapped = [tap.detach() for tap in taps.at(batch.predicting[chunk])]
            with torch.enable_grad(), _recording(modules) as record:
                hidden = self.tail.rebuild(*(tap.requires_grad_() for tap in tapped))
                logits = self._logits(hidden)
            targets = batch.targets[chunk]
            log_probs.append(_gather_log_probs(logits.detach(), targets))
            # The gradient of log softmax at the target, written down: no second (tokens x vocabulary) graph is kept.
            upstream = logits.detach().softmax(-1).neg_()
            upstream[torch.arange(len(targets), device=targets.device), targets] += 1
            outputs = [record[module][1] for module in modules]
            derivatives = torch.autograd.grad(logits, outputs, upstream)
            sums.index_add_(0, batch.span_of_token[chunk], self._coordinates(modules, record, derivatives))
        return torch.cat(log_probs), batch.to_spans(sums)

    def _full_gradients(self, batch: "_Batch", taps: "_Taps") -> tuple[torch.Tensor, torch.Tensor]:
        """The same for proxies anywhere in the model: one backward pass per span."""
        modules = [module for module, _, _ in self._proxies]
        sums = batch.span_sums(sum(u.shape[1] for _, u, _ in self._proxies))
        all_log_probs = []
        for ids, predicting, targets, span_of_token in batch.rows():
            with torch.enable_grad(), _recording(modules) as record:
                # The embeddings are the graph's root: parameters need not, and may not, require gradients.
                embeddings = self.decoder.get_input_embeddings()(ids).detach().requires_grad_()
                hidden = self.decoder(inputs_embeds=embeddings[None], use_cache=False).last_hidden_state[0]
                log_probs = torch.cat(
                    [
                        _gather_log_probs(self._logits(hidden[predicting[chunk]]), targets[chunk])
                        for chunk in self._chunks(len(targets))
                    ]
                )
                outputs = [record[module][1] for module in modules]
                for span in span_of_token.unique().tolist():
                    log_prob = log_probs[span_of_token == span].sum()
                    derivatives = torch.autograd.grad(log_prob, outputs, retain_graph=True)
                    sums[span] = self._coordinates(modules, record, derivatives).sum(0).detach()
            all_log_probs.append(log_probs.detach())
        return torch.cat(all_log_probs), batch.to_spans(sums)

    def _coordinates(self, modules, record, derivatives) -> torch.Tensor:
        """Per token, the derivative of its log-probability along each proxy coordinate, `(tokens, R)`."""
        coordinates = []
        with torch.autocast(self.head_device.type, enabled=False):
            for module, derivative, (_, u, v) in zip(modules, derivatives, self._proxies, strict=True):
                inputs = record[module][0].detach().flatten(0, -2).float()
                coordinates.append((derivative.flatten(0, -2).float() @ u) * (inputs @ v))
        return torch.cat(coordinates, dim=-1)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits in fp32 of hidden states `(tokens, H)` behind the final norm."""
        logits = self.head(hidden)
        if (cap := getattr(self.config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap
        if (scale := getattr(self.config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * scale
        if (scale := getattr(self.config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / scale
        return logits.float()

    def _chunks(self, num_tokens: int) -> Iterator[slice]:
        width = self.config.vocab_size + 4 * (getattr(self.config, "intermediate_size", None) or 0)
        elements = min(_CHUNK_ELEMENTS, _CPU_CHUNK_ELEMENTS) if self.head_device.type == "cpu" else _CHUNK_ELEMENTS
        size = max(16, elements // width)
        # At least one chunk, for a batch without a token.
        return (slice(start, start + size) for start in range(0, max(num_tokens, 1), size))


@contextmanager
def scoring_mode(model: nn.Module):
    """Evaluation mode and no gradient checkpointing inside, every module's own mode again outside, come what may."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _gather_log_probs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


def _stack(rows: list[torch.Tensor], padding: float) -> torch.Tensor:
    """Concatenate along the first dimension tensors that differ in the second."""
    size = max(piece.shape[1] for piece in rows)
    padded = [piece.new_full((piece.shape[0], size, *piece.shape[2:]), padding) for piece in rows]
    for target, piece in zip(padded, rows, strict=True):
        target[:, : piece.shape[1]] = piece
    return torch.cat(padded)


def cuts_of(spans: Sequence[tuple[int, int]]) -> list[int]:
    """Lengths of the prefixes of a completion behind which its correctness is asked: none, and up to each episode."""
    return [0, *(end for _, end in spans[:-1])]


class _Batch:
    """Index tensors of a batch: where completion tokens are predicted, and how probes sit behind their cuts."""

    def __init__(self, prompt_ids, completion_ids, spans, device):
        rows = [[*prompt, *completion] for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
        self.device = device
        self.num_rows = len(rows)
        self.ids = self._pad(rows)  # (B, L)
        length = self.ids.shape[1]
        prompt_lengths = torch.tensor([len(ids) for ids in prompt_ids], device=device)
        lengths = torch.tensor([len(ids) for ids in completion_ids], device=device)
        self.max_length = int(lengths.max())

        # Completion tokens of all rows, one behind the other (N): where each is predicted, and its span.
        in_completion = torch.arange(self.max_length, device=device) < lengths[:, None]  # (B, T)
        self.token_row, self.token_column = in_completion.nonzero(as_tuple=True)
        column = self.token_column + prompt_lengths[self.token_row]
        self.predicting = self.token_row * length + column - 1  # into the flattened (B * L)
        self.targets = self.ids[self.token_row, column]
        self.num_spans = max(len(row) for row in spans)
        ends = self._pad([[end for _, end in row] for row in spans], fill=self.max_length + 1)  # (B, S)
        span = torch.searchsorted(ends[self.token_row], self.token_column[:, None], right=True).squeeze(-1)
        self.span_of_token = self.token_row * self.num_spans + span  # (N,) into the flattened (B * S)

        self.num_cuts = torch.tensor([len(row) for row in spans], device=device)  # (B,): K_b + 1 each
        self.cuts = self._pad([cuts_of(row) for row in spans]) + prompt_lengths[:, None]  # (B, K + 1), in the row
        self.has_cut = torch.arange(self.cuts.shape[1], device=device) < self.num_cuts[:, None]
        self.answer_lengths: torch.Tensor | None = None

    def place_probes(self, probe_ids: list[int], answer_ids: Sequence[Sequence[int]]):
        """Put K_b + 1 copies of its probe and answer behind row b, of each of which the last token predicts nothing."""
        device, num_cuts = self.device, self.num_cuts
        copies = [[*probe_ids, *answer] for answer in answer_ids]
        self.answer_lengths = torch.tensor([len(ids) for ids in answer_ids], device=device)
        copy_lengths = len(probe_ids) + self.answer_lengths - 1  # (B,)
        slot = torch.arange(int((copy_lengths * num_cuts).max()), device=device)  # (Q,)
        is_probe = slot < (copy_lengths * num_cuts)[:, None]  # (B, Q)
        # Padding goes on as copies past the last, which no other token sees.
        self.probe_copy = slot // copy_lengths[:, None]
        self.probe_offset = slot % copy_lengths[:, None]
        copy_ids = self._pad(copies)
        self.probe_ids = copy_ids.gather(1, self.probe_offset)
        self.probe_cut = self.cuts.gather(1, self.probe_copy.clamp(max=self.cuts.shape[1] - 1))  # (B, Q)
        self.probe_positions = self.probe_cut + self.probe_offset
        is_answer = is_probe & (self.probe_offset >= len(probe_ids) - 1)
        self.answer_positions = is_answer.nonzero(as_tuple=True)
        row, column = self.answer_positions
        self.answer_targets = copy_ids[row, self.probe_offset[row, column] + 1]

    def probe_mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Which of the row's tokens and of the probes' each probe token sees, `(B, 1, Q, L + Q)`."""
        columns = torch.arange(self.ids.shape[1], device=self.device)
        prefix = columns < self.probe_cut[:, :, None]
        same_copy = self.probe_copy[:, :, None] == self.probe_copy[:, None, :]
        own = same_copy & (self.probe_offset[:, :, None] >= self.probe_offset[:, None, :])
        if window is not None:
            prefix &= self.probe_positions[:, :, None] - columns < window
            own &= self.probe_offset[:, :, None] - self.probe_offset[:, None, :] < window
        visible = torch.cat([prefix, own], dim=-1)[:, None]
        if dtype == torch.bool:
            return visible
        return torch.zeros(visible.shape, dtype=dtype, device=self.device).masked_fill_(
            ~visible, torch.finfo(dtype).min
        )

    def rows(self):
        """Row by row: its ids, where its completion tokens are predicted, their ids and their spans."""
        length = self.ids.shape[1]
        for row in range(self.num_rows):
            mine = self.token_row == row
            yield self.ids[row], self.predicting[mine] - row * length, self.targets[mine], self.span_of_token[mine]

    def span_sums(self, size: int) -> torch.Tensor:
        return torch.zeros(self.num_rows * self.num_spans, size, device=self.device)

    def to_spans(self, sums: torch.Tensor) -> torch.Tensor:
        return sums.view(self.num_rows, self.num_spans, -1)

    def to_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the completion tokens `(N,)` as `(B, T)`."""
        rows = torch.zeros(self.num_rows, self.max_length, device=self.device)
        return rows.index_put_((self.token_row, self.token_column), values)

    def _pad(self, rows: list[list[int]], fill: int = 0) -> torch.Tensor:
        width = max(len(row) for row in rows)
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=self.device)


@dataclass
class _Tail:
    """What follows the last layer's attention: `norm(residual + post(mlp(x)))`."""

    layer: nn.Module
    mlp: nn.Module
    pre_norm: nn.Module | None  # its input is the residual; None: the MLP's input is
    post_norm: nn.Module | None
    norm: nn.Module

    @classmethod
    def of(cls, decoder: nn.Module) -> "_Tail | None":
        """The tail of a decoder with the usual names, to be confirmed by [`Scorer.check`]; else `None`."""
        layers, norm = getattr(decoder, "layers", None), getattr(decoder, "norm", None)
        mlp = getattr(layers[-1], "mlp", None) if isinstance(layers, nn.ModuleList) else None
        if mlp is None or norm is None or not any(is_linear(module) for module in mlp.modules()):
            return None
        layer = layers[-1]
        post_norm = getattr(layer, "post_feedforward_layernorm", None)
        pre_norm = getattr(layer, "pre_feedforward_layernorm", None)
        if pre_norm is None and post_norm is None:
            pre_norm = getattr(layer, "post_attention_layernorm", None)
        return cls(layer, mlp, pre_norm, post_norm, norm)

    def modules(self) -> list[nn.Module]:
        return [module for module in (self.mlp, self.post_norm, self.norm) if module is not None]

    def rebuild(self, inputs: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Hidden states behind the final norm from the MLP's inputs and the residual, both `(tokens, H)`."""
        output = self.mlp(inputs[None])
        if self.post_norm is not None:
            output = self.post_norm(output)
        return self.norm(residual[None] + output)[0]


class _Taps:
    """Hooks that keep what enters the tail during phase one."""

    inputs: torch.Tensor | None = None
    residual: torch.Tensor | None = None

    @contextmanager
    def of(self, tail: _Tail | None):
        if tail is None:
            yield
            return

        def keep(name):
            def hook(module, args, kwargs):
                setattr(self, name, args[0] if args else next(iter(kwargs.values())))

            return hook

        handles = [tail.mlp.register_forward_pre_hook(keep("inputs"), with_kwargs=True)]
        if tail.pre_norm is not None:
            handles.append(tail.pre_norm.register_forward_pre_hook(keep("residual"), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if tail.pre_norm is None:
            self.residual = self.inputs

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs.flatten(0, 1)[positions], self.residual.flatten(0, 1)[positions]


@contextmanager
def _recording(modules: list[nn.Module]):
    """Keep each module's input and output, by module."""
    record = {}

    def hook(module, args, output):
        record[module] = (args[0], output)

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _masked_attention(model: nn.Module, config):
    """
    An attention implementation that takes an arbitrary mask, for the duration of phase two.

    Yields the mask's data type, and a function that turns "mask for a window" into what the decoder's forward takes.
    """
    implementation = config._attn_implementation
    # Flash attention takes no such mask. SDPA does, but not where scores are soft-capped.
    is_capped = getattr(config, "attn_logit_softcapping", None) is not None
    chosen = "eager" if is_capped or implementation == "eager" else "sdpa"

    def mask_of(mask_for_window):
        window = getattr(config, "sliding_window", None)
        layer_types = getattr(config, "layer_types", None)
        if layer_types is None:
            return mask_for_window(window)
        if "sliding_attention" not in layer_types:
            return mask_for_window(None)
        return {"full_attention": mask_for_window(None), "sliding_attention": mask_for_window(window)}

    config._attn_implementation = chosen
    try:
        yield (model.dtype if chosen == "eager" else torch.bool), mask_of
    finally:
        config._attn_implementation = implementation
