"""Settings of [`L2TTrainer`]: GRPO's, and those of the episode reward."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal, get_args, get_origin

import torch
from trl import GRPOConfig


# Losses whose mathematics hold token by token, so that (B, T) advantages keep their meaning.
TOKEN_LEVEL_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")


@dataclass
class L2TConfig(GRPOConfig):
    r"""
    Configuration class for the [`L2TTrainer`].

    This class includes only the parameters that are specific to L2T; for the others see [`~trl.GRPOConfig`]. The paper
    is "Learning to Think" (arXiv 2505.10425); its symbols are given where a parameter has one. `beta` is GRPO's KL
    weight here, not the paper's beta, which is `compression_coef`.

    Parameters:
        process_reward_coef (`float`, *optional*, defaults to `0.8`):
            Weight alpha of the episode rewards beside the outcome reward (Eq. 2). 0 turns the process reward off.
        compression_coef (`float`, *optional*, defaults to `0.6`):
            Weight beta of the compression penalty inside an episode reward (Eq. 3). 0 turns the penalty off.
        advantage_form (`str`, *optional*, defaults to `"paper"`):
            How rewards become token advantages: `"paper"` (Sec. 4.3, guarded), `"episode"`, `"return_to_go"` or
            `"sequence"`. See `l2t_trl.advantages`.
        token_credit (`str`, *optional*, defaults to `"surprise"`):
            How an episode's reward is shared among its tokens by the form `"paper"`: by `-log pi_old` (`"surprise"`)
            or evenly (`"uniform"`).
        trim_fraction (`float`, *optional*, defaults to `0.05`):
            Share of a completion's token rewards left out of their truncated mean by the form `"paper"`.
        episode_format (`str`, *optional*, defaults to `"tags"`):
            How a completion is split: `"tags"` (`<episode_k>`), `"think"`, `"paragraph"`, `"reflection"` or `"auto"`.
        max_episodes (`int`, *optional*, defaults to `30`):
            Most episodes of a completion; further ones merge into the last.
        correctness_estimator (`str`, *optional*, defaults to `"answer_likelihood"`):
            Where J, the predicted probability of the correct answer, comes from: the policy's own likelihood of the
            gold answer behind `answer_probe` (`"answer_likelihood"`), or the mean outcome reward of short
            continuations behind it (`"rollout"`), which needs no gold answer.
        num_continuations (`int`, *optional*, defaults to `4`):
            Continuations sampled at every cut by the estimator `"rollout"`.
        max_continuation_length (`int`, *optional*, defaults to `32`):
            Longest of them in tokens.
        answer_likelihood (`str`, *optional*, defaults to `"joint"`):
            J from the answer's token probabilities: their product (`"joint"`) or geometric mean (`"per_token"`).
        answer_probe (`str`, *optional*, defaults to `"\n</think>\n\nThe final answer is \\boxed{"`):
            Text that elicits the answer, appended (as token ids) to the completion's first k episodes.
        answer_probe_end (`str`, *optional*, defaults to `"}"`):
            Text that closes the answer, tokenised together with it, so that 42 does not count for 425.
        answer_column (`str`, *optional*, defaults to `"answer"`):
            Data set column that holds the gold answer.
        proxy_modules (`str`, *optional*):
            Modules whose weights carry the low-rank proxy: by default the last decoder layer's MLP. A regular
            expression over module names, or `"random:0.3"` for the linear layers of a random 30 % of the decoder
            layers, needs one backward pass per episode.
        proxy_rank_ratio (`float`, *optional*, defaults to `0.05`):
            Rank of each proxy relative to the smaller side of its weight matrix (r/d; 0.01-0.1 at 1.5 B, 0.001-0.01
            at 7 B).
        proxy_refresh_steps (`int`, *optional*, defaults to `100`):
            Optimiser steps between two decompositions of the proxy's weights; 0 keeps the first.
        fisher_damping (`float`, *optional*, defaults to `1e-5`):
            Damping of the Fisher matrix, relative to its mean diagonal.
        fisher_ema (`float`, *optional*, defaults to `0.9`):
            Decay per generation batch of the averages behind the Fisher matrix and the penalty's unit.
        parameter_update (`str`, *optional*, defaults to `"adaptation"`):
            What theta_k - theta_{k-1} is (Eq. 4): `"adaptation"`, a natural-gradient step on the episode;
            `"gradient"`, the last optimiser step's gradient; or `"drift"`, what training has moved so far. The latter
            two are read from each rank's shard of gradients and weights.
        penalty_unit (`str`, *optional*, defaults to `"gain"`):
            What a compression penalty of an average completion amounts to: 1 (`"absolute"`) or its total fitting gain
            (`"gain"`).
        weight_sync_dir (`str`, *optional*):
            Folder through which a vLLM server gets the trainer's weights, as safetensors files, instead of by NCCL:
            without a GPU, or between machines that share no more than a file system. Trainer and server must see it
            under the same path. One folder per run.
        scoring_batch_size (`int`, *optional*):
            Completions scored together on one device; by default the train (in evaluation, eval) batch size.
        max_prompt_length (`int`, *optional*, defaults to `4096`):
            Longest prompt in tokens, checked before training.
        on_bad_row (`str`, *optional*, defaults to `"stop"`):
            What a row without a usable prompt or answer does: `"stop"` with an error that names it, or `"drop"` it
            and report how many were dropped.

    One default differs from [`~trl.GRPOConfig`]'s:

        vllm_importance_sampling_mode (`str`, *optional*, defaults to `"token_truncate"`):
            How the ratio between trainer and vLLM is used. GRPOConfig's `"sequence_mask"` multiplies the ratios of all
            tokens, whose spread grows with the length, so that long completions drift to weight 0.
    """

    process_reward_coef: float = field(
        default=0.8, metadata={"help": "Weight alpha of the episode rewards beside the outcome reward (0: off)."}
    )
    compression_coef: float = field(
        default=0.6, metadata={"help": "Weight beta of the compression penalty inside an episode reward (0: off)."}
    )
    advantage_form: Literal["paper", "episode", "return_to_go", "sequence"] = field(
        default="paper", metadata={"help": "How outcome and episode rewards become token advantages."}
    )
    token_credit: Literal["surprise", "uniform"] = field(
        default="surprise", metadata={"help": "How the form 'paper' shares an episode's reward among its tokens."}
    )
    trim_fraction: float = field(
        default=0.05, metadata={"help": "Share of token rewards left out of the truncated mean of the form 'paper'."}
    )
    episode_format: Literal["tags", "think", "paragraph", "reflection", "auto"] = field(
        default="tags", metadata={"help": "How a completion is split into episodes."}
    )
    max_episodes: int = field(
        default=30, metadata={"help": "Most episodes of a completion; further ones merge into the last."}
    )
    correctness_estimator: Literal["answer_likelihood", "rollout"] = field(
        default="answer_likelihood",
        metadata={
            "help": "Where J comes from: the policy's likelihood of the gold answer behind the probe, or the mean "
            "outcome reward of short continuations of it."
        },
    )
    num_continuations: int = field(
        default=4, metadata={"help": "Continuations sampled at every cut by the estimator 'rollout'."}
    )
    max_continuation_length: int = field(default=32, metadata={"help": "Longest of them in tokens."})
    answer_likelihood: Literal["joint", "per_token"] = field(
        default="joint", metadata={"help": "J as the product of the answer's token probabilities, or geometric mean."}
    )
    answer_probe: str = field(
        default="\n</think>\n\nThe final answer is \\boxed{",
        metadata={"help": "Text that elicits the answer after the first k episodes."},
    )
    answer_probe_end: str = field(
        default="}", metadata={"help": "Text that closes the answer, tokenised together with it."}
    )
    answer_column: str = field(default="answer", metadata={"help": "Data set column that holds the gold answer."})
    proxy_modules: str | None = field(
        default=None,
        metadata={
            "help": "Modules that carry the low-rank proxy: the last layer's MLP (default), a regular expression over "
            "module names, or 'random:0.3'."
        },
    )
    proxy_rank_ratio: float = field(
        default=0.05, metadata={"help": "Rank of each proxy relative to the smaller side of its weight, in (0, 1]."}
    )
    proxy_refresh_steps: int = field(
        default=100, metadata={"help": "Optimiser steps between two decompositions of the proxy (0: never again)."}
    )
    fisher_damping: float = field(
        default=1e-5, metadata={"help": "Damping of the Fisher matrix, relative to its mean diagonal."}
    )
    fisher_ema: float = field(
        default=0.9, metadata={"help": "Decay per generation batch of the Fisher matrix and the penalty's unit."}
    )
    parameter_update: Literal["adaptation", "gradient", "drift"] = field(
        default="adaptation", metadata={"help": "The parameter update that the penalty measures."}
    )
    penalty_unit: Literal["absolute", "gain"] = field(
        default="gain", metadata={"help": "An average completion's penalty: 1, or its total fitting gain."}
    )
    weight_sync_dir: str | None = field(
        default=None,
        metadata={"help": "Folder shared with a vLLM server, through which it gets the weights instead of by NCCL."},
    )
    scoring_batch_size: int | None = field(
        default=None, metadata={"help": "Completions scored together on one device (default: the batch size)."}
    )
    max_prompt_length: int | None = field(
        default=4096, metadata={"help": "Longest prompt in tokens, checked before training."}
    )
    on_bad_row: Literal["stop", "drop"] = field(
        default="stop", metadata={"help": "What a row without a usable prompt or answer does."}
    )
    vllm_importance_sampling_mode: str = field(
        default="token_truncate",
        metadata={
            "help": "How the ratio between trainer and vLLM is used: 'token_truncate', 'token_mask', "
            "'sequence_truncate' or 'sequence_mask'. The last two drive long completions to weight 0."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_ranges()
        self._check_combinations()

    @property
    def device(self) -> torch.device:
        # Processes on one CPU are given cpu:0, cpu:1 and so on, from which torch.load reads no optimiser state back.
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    def _check_ranges(self):
        def require(is_valid: bool, name: str, instead: str):
            if not is_valid:
                raise ValueError(f"{name} must be {instead}, got {getattr(self, name)!r}.")

        for name in ("process_reward_coef", "compression_coef", "fisher_damping"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, name, "a finite number, 0 or larger")
        require(0 <= self.trim_fraction < 1, "trim_fraction", "at least 0 and below 1")
        require(0 < self.proxy_rank_ratio <= 1, "proxy_rank_ratio", "above 0 and at most 1")
        require(0 <= self.fisher_ema < 1, "fisher_ema", "at least 0 and below 1")
        require(self.max_episodes >= 1, "max_episodes", "1 or larger")
        require(self.proxy_refresh_steps >= 0, "proxy_refresh_steps", "0 (never) or larger")
        require(self.scoring_batch_size is None or self.scoring_batch_size >= 1, "scoring_batch_size", "1 or larger")
        require(self.max_prompt_length is None or self.max_prompt_length >= 1, "max_prompt_length", "1 or larger")
        require(self.num_continuations >= 1, "num_continuations", "1 or larger")
        require(self.max_continuation_length >= 1, "max_continuation_length", "1 or larger")
        require(bool(self.answer_probe), "answer_probe", "a text that elicits the answer, not empty")
        for name, hint in L2TConfig.__annotations__.items():
            if get_origin(hint) is Literal:
                require(getattr(self, name) in get_args(hint), name, f"one of {', '.join(get_args(hint))}")
        if self.proxy_modules is not None:
            try:
                re.compile(self.proxy_modules)
            except re.error as error:
                raise ValueError(
                    f"proxy_modules must be a regular expression over module names, or 'random:SHARE', "
                    f"got {self.proxy_modules!r} ({error})."
                ) from error

    def _check_combinations(self):
        if self.weight_sync_dir is not None and not (self.use_vllm and self.vllm_mode == "server"):
            raise ValueError(
                f"weight_sync_dir={self.weight_sync_dir!r} is how a vLLM server gets the weights. Set use_vllm=True and "
                "vllm_mode='server', or leave it unset."
            )
        if self.correctness_estimator == "rollout" and self.use_vllm and self.vllm_max_model_length is not None:
            # A token stands for at least one byte.
            probe = len(self.answer_probe.encode())
            parts = (self.max_prompt_length or 0, self.max_completion_length, probe, self.max_continuation_length)
            if sum(parts) > self.vllm_max_model_length:
                raise ValueError(
                    f"vllm_max_model_length={self.vllm_max_model_length} leaves no room for continuations: prompt, "
                    f"completion, probe and continuation may take {' + '.join(map(str, parts))} = {sum(parts)} tokens. "
                    "Set it to that, or max_prompt_length to what the data needs."
                )
        if self.loss_type not in TOKEN_LEVEL_LOSSES:
            raise ValueError(
                f"loss_type={self.loss_type!r} takes the advantage's sign or mean per completion, which has no meaning "
                f"for L2T's token advantages. Set loss_type to one of {', '.join(TOKEN_LEVEL_LOSSES)}."
            )
        if self.remove_unused_columns:
            raise ValueError(
                f"remove_unused_columns=True would drop the column {self.answer_column!r}. Set it to False."
            )
        if self.off_policy_mask_threshold is not None:
            raise ValueError(
                "off_policy_mask_threshold keeps or drops whole completions by the sign of their advantage, which "
                "differs between the tokens of one completion under L2T. Leave it unset."
            )
        if self.importance_sampling_level != "token":
            raise ValueError(
                f"importance_sampling_level={self.importance_sampling_level!r} averages the credit of a completion's "
                "tokens away. Set importance_sampling_level='token'."
            )
