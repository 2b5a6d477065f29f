"""The trainer: GRPO with token advantages from episode rewards."""

import textwrap
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import DistributedType, broadcast, gather_object
from safetensors.torch import load_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, get_last_checkpoint
from trl import GRPOTrainer
from trl.data_utils import is_conversational

from l2t_trl.advantages import Group, fitting_gains, token_advantages
from l2t_trl.checkpoints import (
    RANK_FILE,
    ROLLOUT_SETTINGS,
    STATE_FILE,
    check_resumable,
    load_ranks,
    pack_batches,
    save_tensors,
    unpack_batches,
)
from l2t_trl.compression import CompressionPenalty
from l2t_trl.continuations import all_cuts, mean_rewards
from l2t_trl.data.checks import check_rows
from l2t_trl.episodes import segment, token_bytes
from l2t_trl.errors import RolloutError, UserError
from l2t_trl.generation.engine import rollout_engine
from l2t_trl.l2t_config import L2TConfig
from l2t_trl.metrics import importance_shares, summarise, zero_std_share
from l2t_trl.proxy import causal_lm, proxy_bases, proxy_module_names
from l2t_trl.scoring import Scorer
from l2t_trl.sharding import ShardedProxy, before_every_step


class L2TTrainer(GRPOTrainer):
    """
    Trainer for Learning to Think (L2T), arXiv 2505.10425.

    Everything of [`~trl.GRPOTrainer`] keeps working; what changes is that the advantages of a completion's tokens also
    follow the episode rewards: what each episode adds to the policy's own probability of the correct answer (fitting
    gain), less what it writes into the parameters (compression penalty). The data set needs, beside `prompt`, a column
    with the gold answer (`args.answer_column`).

    Example:

    ```python
    from l2t_trl import L2TConfig, L2TTrainer
    from l2t_trl.rewards import accuracy

    trainer = L2TTrainer(
        model="Qwen/Qwen2.5-3B-Instruct",
        reward_funcs=accuracy,
        args=L2TConfig(output_dir="outputs/qwen"),
        train_dataset=dataset,  # columns "prompt" and "answer"
    )
    trainer.train()
    ```

    Args:
        model (`str`, `transformers.PreTrainedModel` or `peft.PeftModel`): the policy, as in [`~trl.GRPOTrainer`].
        reward_funcs (`Callable` or `list[Callable]`, *optional*): outcome rewards.
        args ([`L2TConfig`], *optional*): settings.
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`, *optional*): questions.
        eval_dataset (same, or a `dict` of them, *optional*): held-out questions.
        processing_class (`transformers.PreTrainedTokenizerBase`, *optional*): the tokenizer.
        kwargs: the other arguments of [`~trl.GRPOTrainer`].

    Raises:
        ValueError: if rows of the data cannot be used, or an argument has no meaning for episode rewards.
    """

    _tag_names = ["trl", "l2t"]
    _name = "L2T"
    _paper = {
        "title": "Learning to Think: Information-Theoretic Reinforcement Fine-Tuning for LLMs",
        "id": "2505.10425",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{wang2025learning,
                title     = {{Learning to Think: Information-Theoretic Reinforcement Fine-Tuning for LLMs}},
                author    = {Jingyao Wang and Wenwen Qiang and Zeen Song and Changwen Zheng and Hui Xiong},
                booktitle = {Advances in Neural Information Processing Systems},
                year      = 2025,
                eprint    = {arXiv:2505.10425},
            }"""),
    }

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: L2TConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        **kwargs,
    ):
        for name in ("tools", "environment_factory"):
            if kwargs.get(name):
                raise ValueError(
                    f"{name} puts tokens into a completion that the policy did not write, which episode rewards cannot "
                    "be given for. Use GRPOTrainer for it."
                )
        if args is None:
            name = model if isinstance(model, str) else causal_lm(model).config.name_or_path
            args = L2TConfig(f"{name.split('/')[-1]}-L2T")
        with rollout_engine(args):
            super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, **kwargs)
        if self._is_vlm:
            raise ValueError("L2TTrainer scores text only. Use GRPOTrainer for a vision-language model.")
        self._start_of_step = -1, 0  # the present step, and TRL's count of batches when it began
        # Without process reward and with advantages that it alone would shape, this is GRPO, to the bit.
        self.has_process_reward = args.process_reward_coef > 0 or args.advantage_form in ("paper", "episode")
        if not self.has_process_reward:
            return

        if self.is_fsdp_enabled:
            raise ValueError(
                "FSDP shards weights in a way that the scoring pass cannot read. Shard with DeepSpeed instead, e.g. "
                "--accelerate_config zero3."
            )
        # J by continuing the cuts rather than by the likelihood of a gold answer.
        self.continues_cuts = args.correctness_estimator == "rollout"
        check = partial(
            check_rows,
            tokenizer=self._tokenizer,
            answer_column=None if self.continues_cuts else args.answer_column,
            max_prompt_length=args.max_prompt_length,
            on_bad_row=args.on_bad_row,
        )
        self.train_dataset = check(self.train_dataset) if self.train_dataset is not None else None
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: check(dataset) for name, dataset in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = check(self.eval_dataset)
        self._vocabulary = token_bytes(self._tokenizer)
        self._probe_ids = self._tokenizer(args.answer_probe, add_special_tokens=False)["input_ids"]
        if not self._probe_ids:
            raise ValueError(f"answer_probe must tokenise to at least one token, got {args.answer_probe!r}.")
        self._proxy_names = proxy_module_names(self.model, args.proxy_modules, args.seed)
        self._penalty = CompressionPenalty(args.fisher_damping, args.fisher_ema, args.penalty_unit)
        self._scorer = Scorer(self.model)
        self._has_checked_scorer = False
        self._bases, self._bases_step = {}, None
        modules = dict(causal_lm(self.model).named_modules())
        self._sharded_proxy = ShardedProxy(
            {name: modules[name] for name in self._proxy_names},
            partial(self.accelerator.reduce, reduction="sum"),
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        self._last_gradient: torch.Tensor | None = None  # its proxy coordinates
        self._watches_engine = False

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        is_last = resume_from_checkpoint is True
        folder = get_last_checkpoint(self.args.output_dir) if is_last else resume_from_checkpoint
        if folder:
            check_resumable(Path(folder), self.args)
            if self.has_process_reward and not (Path(folder) / STATE_FILE).exists():
                raise UserError(f"{folder} has no {STATE_FILE}: it is not a checkpoint of an L2T run. Start anew.")
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.has_process_reward:
            # One infinite reward would take its whole group along; as NaN, TRL leaves it out.
            is_infinite = rewards.isinf()
            self._log_l2t({"outcome_infinite/frac": is_infinite.any(1).double().mean().item()})
            rewards = rewards.masked_fill(is_infinite, torch.nan)
            self._outcomes = self._weighted(rewards)
        return rewards

    def _weighted(self, rewards: torch.Tensor) -> torch.Tensor:
        """Outcome rewards `(N,)` from those of the single functions `(N, F)`; NaN where no function gave one."""
        outcomes = (rewards * self.reward_weights.to(rewards)).nansum(1)
        return outcomes.masked_fill(rewards.isnan().all(1), torch.nan)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.has_process_reward:
            start = time.perf_counter()
            output["advantages"] = self._token_advantages(output, inputs)
            self._log_l2t({"scoring_s": time.perf_counter() - start})
        if "importance_sampling_ratio" in output:
            shares = importance_shares(
                output["importance_sampling_ratio"],
                output["completion_mask"],
                self.vllm_importance_sampling_clip_max,
                self.accelerator.gather,
            )
            self._log_l2t(shares)
        return output

    def _token_advantages(self, output: dict, inputs: list[dict]) -> torch.Tensor:
        """Advantages `(B, T)` of this rank's completions of the questions in `inputs`."""
        args, is_training = self.args, self.model.training
        prompt_ids = _rows(output["prompt_ids"], output["prompt_mask"])
        completion_ids = _rows(output["completion_ids"], output["completion_mask"])
        segments = [segment(ids, self._vocabulary, args.episode_format, args.max_episodes) for ids in completion_ids]
        spans = [row.spans for row in segments]
        answer_ids = None
        if not self.continues_cuts:
            answers = [f"{row[args.answer_column]}{args.answer_probe_end}" for row in inputs]
            answer_ids = self._tokenizer(answers, add_special_tokens=False)["input_ids"]
        batch_size = args.scoring_batch_size or (
            args.per_device_train_batch_size if is_training else args.per_device_eval_batch_size
        )
        with self.accelerator.autocast():
            scores = self._updated_scorer().score(
                prompt_ids, completion_ids, spans, self._probe_ids, answer_ids, batch_size
            )

        device = output["completion_ids"].device
        span_of_token = _span_of_token(spans, output["completion_ids"].shape[1]).to(device)  # (B, T)
        if self.continues_cuts:
            correctness = self._continued_correctness(inputs, prompt_ids, completion_ids, spans)
        else:
            correctness = scores.correctness(args.answer_likelihood)
        num_tokens = torch.zeros_like(correctness)  # (B, S)
        num_tokens.scatter_add_(1, span_of_token.clamp(min=0), (span_of_token >= 0).to(num_tokens))
        is_episode = num_tokens > 0
        gains = fitting_gains(correctness, is_episode)
        penalties = torch.zeros_like(gains)
        if args.compression_coef > 0:
            reduce = partial(self.accelerator.reduce, reduction="sum")
            displacement = self._displacement(scores.gradients.shape[-1])
            _, penalties = self._penalty(scores.gradients, gains, is_episode, reduce, is_training, displacement)
        rewards = gains - args.compression_coef * penalties

        num_generations = self.num_generations if is_training else self.num_generations_eval
        group = Group(num_generations, self.accelerator.gather, self.accelerator.process_index)
        outcome = self._outcomes[group.rank * len(inputs) :][: len(inputs)]
        log_probs = torch.zeros_like(span_of_token, dtype=torch.float32)
        log_probs[:, : scores.log_probs.shape[1]] = scores.log_probs
        advantages = token_advantages(
            args.advantage_form,
            outcome=outcome,
            outcome_advantage=output["advantages"],
            episode_reward=rewards,
            span_of_token=span_of_token,
            log_probs=log_probs,
            process_reward_coef=args.process_reward_coef,
            group=group,
            token_credit=args.token_credit,
            trim_fraction=args.trim_fraction,
            scale=self.scale_rewards,
        )

        per_episode = {"fitting_gain": gains, "compression_penalty": penalties, "episode_reward": rewards}
        last_cut = (~correctness.isnan()).sum(1, keepdim=True) - 1
        summary = summarise(
            {
                "episodes": last_cut[:, 0],
                "tokens_per_episode": (span_of_token >= 0).sum(1) / is_episode.sum(1).clamp(min=1),
                "correctness_before": correctness[:, 0],
                "correctness_after": correctness.gather(1, last_cut)[:, 0],
                "unmarked": torch.tensor([not row.is_marked for row in segments], device=device),
            },
            per_episode,
            is_episode,
            self.accelerator.gather,
        )
        has_signal = self.accelerator.gather(advantages.abs().amax(1) > 1e-6)
        signal_share = zero_std_share(self._outcomes, has_signal, num_generations)
        self._log_l2t({**summary, "zero_std_groups_with_signal/frac": signal_share})
        if self.log_completions:
            self._log_episodes(spans, per_episode)
        return advantages

    def _continued_correctness(self, inputs, prompt_ids, completion_ids, spans) -> torch.Tensor:
        """J `(B, S)` of every cut: the mean outcome reward of `num_continuations` continuations."""
        start, times, rank = time.perf_counter(), self.args.num_continuations, self.accelerator.process_index
        cuts = all_cuts(completion_ids, spans, self._probe_ids)
        # Engines and gathers count on equally many from every rank: those with fewer cuts repeat their first.
        count = int(self.accelerator.gather(torch.tensor([len(cuts)], device=self.accelerator.device)).max())
        asked = [cut for cut in [*cuts, *cuts[:1] * (count - len(cuts))] for _ in range(times)]
        continuations = self._continue([prompt_ids[cut.row] + cut.prefix for cut in asked])
        ids = [cut.prefix + continuation for cut, continuation in zip(asked, continuations, strict=True)]
        rows = [inputs[cut.row] for cut in asked]
        prompts = [row["prompt"] for row in rows]
        completions = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        if is_conversational({"prompt": prompts[0]}):
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        with self._unlogged_rewards():
            rewards = super()._calculate_rewards(rows, prompts, completions, ids)
        rewards = self._weighted(rewards.masked_fill(rewards.isinf(), torch.nan)).view(-1, count, times)[rank]
        self._log_l2t({"continuation_s": time.perf_counter() - start})
        return mean_rewards(cuts, rewards[: len(cuts)], len(inputs))

    def _continue(self, prompts: list[list[int]]) -> list[list[int]]:
        """Short continuations of token ids, by whatever makes the rollouts."""
        args = self.args
        if self.use_vllm:  # forms its batches itself
            engine, name, size = self.vllm_generation, "max_completion_length", len(prompts)
        else:
            engine, name = self.generation_config, "max_new_tokens"
            size = args.per_device_train_batch_size * args.steps_per_generation
        length, continuations = getattr(engine, name), []
        setattr(engine, name, args.max_continuation_length)
        try:
            for start in range(0, len(prompts), size):
                batch = prompts[start : start + size]
                continuations += self._generate_single_turn(batch, None, {}, args.num_continuations)[0]
        finally:
            setattr(engine, name, length)
        return continuations

    @contextmanager
    def _unlogged_rewards(self) -> Iterator[None]:
        """Keep what reward functions log of continuations out of the completions table, whose rows these are not."""
        kept = self._pending_extra_logs, self._pending_metrics
        self._pending_extra_logs, self._pending_metrics = defaultdict(list), defaultdict(list)
        try:
            yield
        finally:
            self._pending_extra_logs, self._pending_metrics = kept

    def _displacement(self, rank: int) -> torch.Tensor | None:
        """theta_k - theta_{k-1} where it is the same for all episodes, `(R,)`; 0 until there is one."""
        update = self.args.parameter_update
        if update == "adaptation":
            return None
        if update == "gradient":
            last = self._last_gradient
            return torch.zeros(rank, device=self.accelerator.device) if last is None else last
        if self._sharded_proxy.start is None:
            if not self.model.training:  # an evaluation before training: DeepSpeed has yet to lay out the weights
                return torch.zeros(rank, device=self.accelerator.device)
            self._sharded_proxy.remember_start()
        return self._sharded_proxy.drift(self._bases)

    def training_step(self, model, inputs, num_items_in_batch=None):
        reads_gradient = (
            self.has_process_reward and self.args.compression_coef > 0 and self.args.parameter_update == "gradient"
        )
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if reads_gradient and is_deepspeed and not self._watches_engine:
            before_every_step(self.accelerator.deepspeed_engine_wrapped.engine, self._keep_gradient)
            self._watches_engine = True
        if self._start_of_step[0] != self.state.global_step:
            self._start_of_step = self.state.global_step, self._step
        with self._saving_on_failed_rollouts():
            loss = super().training_step(model, inputs, num_items_in_batch)
        if reads_gradient and not is_deepspeed and self.accelerator.sync_gradients:
            self._keep_gradient()
        return loss

    def evaluate(self, *args, **kwargs):
        with self._saving_on_failed_rollouts():
            return super().evaluate(*args, **kwargs)

    @contextmanager
    def _saving_on_failed_rollouts(self) -> Iterator[None]:
        """Save a checkpoint of the last whole step if rollouts cannot go on, so that nothing is lost with them."""
        try:
            yield
        except RolloutError as error:
            step, generate_every = self.state.global_step, self.args.steps_per_generation * self.num_iterations
            # Rollouts are asked for at the start of a step or in its midst, when that step is made anew.
            start = self._start_of_step[1] if self._start_of_step[0] == step else self._step
            can_go_on = start in (self._step, start // generate_every * generate_every)
            if not self.is_in_train or step == 0 or self.args.save_strategy == SaveStrategy.NO or not can_go_on:
                raise
            self._step = start
            self.model.train()
            self._save_checkpoint(self.model, trial=None)
            raise RolloutError(
                f"{error} Step {step} is saved; go on from it with --resume_from_checkpoint auto."
            ) from error

    def _keep_gradient(self) -> None:
        self._last_gradient = self._sharded_proxy.gradient(self._bases)

    def _log_l2t(self, metrics: dict[str, float]) -> None:
        mode = "train" if self.model.training else "eval"
        for name, value in metrics.items():
            self._metrics[mode][f"l2t/{name}"].append(value)

    def _log_episodes(self, spans: list[list[tuple[int, int]]], per_episode: dict[str, torch.Tensor]) -> None:
        """Columns of the completions table, which hold a list per completion."""
        columns = {"episode_spans": [[list(span) for span in row] for row in spans]}
        for name, values in per_episode.items():
            rows = zip(values.tolist(), spans, strict=True)
            columns[name] = [[round(value, 4) for value in row[: len(row_spans)]] for row, row_spans in rows]
        for name, rows in columns.items():
            # TRL flushes its own buffer of extra columns before advantages are known here.
            self._logs["extra"][name].extend(gather_object(rows))

    def _updated_scorer(self) -> Scorer:
        """The scorer, with its proxy decomposed anew when that is due."""
        args, step = self.args, self.state.global_step
        if args.compression_coef > 0:
            age = None if self._bases_step is None else step - self._bases_step
            if age is None or (self.model.training and 0 < args.proxy_refresh_steps <= age):
                bases = proxy_bases(self.model, self._proxy_names, args.proxy_rank_ratio)
                # Singular vectors are unique but for their signs, on which ranks must agree.
                self._bases = broadcast(bases) if self.accelerator.num_processes > 1 else bases
                self._bases_step = step
                # What is kept in the old coordinates.
                self._penalty.reset()
                self._last_gradient = None
                self._scorer.set_bases(self._bases)
        if not self._has_checked_scorer:
            self._scorer.check()
            self._has_checked_scorer = True
        return self._scorer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics = self._metrics["train"]
        if self.model.training and metrics.get("l2t/scoring_s") and metrics.get("step_time"):
            metrics["l2t/scoring_share"].append(sum(metrics["l2t/scoring_s"]) / sum(metrics["step_time"]))
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial):
        # Before the rest, which ends with the trainer's state: a checkpoint that has that is whole.
        if self.has_process_reward:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self._save_method_state(folder)
        super()._save_checkpoint(model, trial)

    def _save_method_state(self, folder: Path) -> None:
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        own = self._sharded_proxy.start_tensors()
        # Completions that later steps still train on.
        rollout = self.args.steps_per_generation * self.num_iterations
        has_pending = self._buffered_inputs is not None and self._step % rollout != 0
        if has_pending:
            own |= {f"batch.{name}": value for name, value in pack_batches(self._buffered_inputs).items()}
        if own:
            save_tensors(folder / RANK_FILE.format(rank), own)
        if self.args.should_save:
            state = {f"penalty.{name}": value for name, value in self._penalty.state_dict().items()}
            for name, (u, v) in self._bases.items():
                state |= {f"u.{name}": u, f"v.{name}": v}
            if self._last_gradient is not None:
                state["last_gradient"] = self._last_gradient
            state["bases_step"] = torch.tensor(-1 if self._bases_step is None else self._bases_step)
            state |= {"step": torch.tensor(self._step), "world_size": torch.tensor(world_size)}
            state |= {name: torch.tensor(getattr(self.args, name)) for name in ROLLOUT_SETTINGS}
            state["has_pending"] = torch.tensor(has_pending)
            save_tensors(folder / STATE_FILE, state)
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if not self.has_process_reward or checkpoint is None:
            return
        folder, device = Path(checkpoint), self.accelerator.device
        state = {name: value.to(device) for name, value in load_file(folder / STATE_FILE).items()}
        self._penalty.load_state_dict({name: state[f"penalty.{name}"] for name in CompressionPenalty.STATE})
        if (step := int(state["bases_step"])) >= 0:
            self._bases_step = step
            self._bases = {name: (state[f"u.{name}"], state[f"v.{name}"]) for name in self._proxy_names}
            self._scorer.set_bases(self._bases)
        self._last_gradient = state.get("last_gradient")
        ranks = load_ranks(folder, int(state["world_size"]))
        if any(":start" in name for tensors in ranks for name in tensors):
            self._sharded_proxy.load_start(ranks)
        # Steps count from a rollout's beginning, whatever a step is made of by now.
        self._step, self._buffered_inputs = 0, None
        if state["has_pending"]:
            own = ranks[self.accelerator.process_index]
            batches = {key.removeprefix("batch."): value for key, value in own.items() if key.startswith("batch.")}
            self._step = int(state["step"])
            self._buffered_inputs = [
                {name: value.to(device) for name, value in batch.items()} for batch in unpack_batches(batches)
            ]


def _rows(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """Rows of a padded tensor, without their padding."""
    return [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.bool().cpu(), strict=True)]


def _span_of_token(spans: list[list[tuple[int, int]]], num_tokens: int) -> torch.Tensor:
    """Index of each token's span, `(B, T)`, -1 behind a completion's end."""
    rows = torch.full((len(spans), num_tokens), -1)
    for row, row_spans in zip(rows, spans, strict=True):
        for index, (start, end) in enumerate(row_spans):
            row[start:end] = index
    return rows
