"""
Sample completions of held-out questions, judge them, and sum up accuracy and length.

torch is imported where a model is sampled, so that reports are written, and the command line answers, without it.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..rewards import final_answer
from .sampling import check_sampling, end_ids_of, evaluation_mode, generation_config, sample, tokenize
from .voting import majority_at_k, pass_at_k, vote_of


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Quantile of the standard normal distribution for a 95 % interval.
Z_95 = 1.959963984540054


@dataclass(frozen=True)
class EvaluatedCompletion:
    """
    One sampled and judged completion.

    Attributes:
        question (`int`):
            Row of the question in the data set.
        tier (`int`, `str` or `None`):
            The question's tier of difficulty, `None` where the data set has no tiers.
        text (`str`):
            The completion without special tokens.
        tokens (`int`):
            Its length in tokens, the token that ends it included.
        is_correct (`bool` or `None`):
            The judgement; `None` where the gold answer cannot be judged.
        is_truncated (`bool`):
            Whether it reached the longest allowed length before it ended.
    """

    question: int
    tier: int | str | None
    text: str
    tokens: int
    is_correct: bool | None
    is_truncated: bool


@dataclass
class Evaluation:
    """
    Judged completions and how they were sampled. Accuracies are shares in [0, 1] of those that can be judged.

    Attributes:
        completions (`list[EvaluatedCompletion]`):
            In the order of the questions, the samples of one question one after another.
        max_new_tokens (`int`), temperature (`float`), top_p (`float`), num_samples (`int`), seed (`int`):
            How they were sampled.
    """

    completions: list[EvaluatedCompletion]
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    num_samples: int = 1
    seed: int = 0

    @property
    def accuracy(self) -> float | None:
        """Share of correct completions; `None` if none can be judged."""
        judged = self._judged()
        return sum(one.is_correct for one in judged) / len(judged) if judged else None

    @property
    def accuracy_interval(self) -> tuple[float, float] | None:
        """
        95 % confidence interval of the accuracy: Wilson's, for as many independent completions as would vary as much.

        Samples of one question resemble each other, so that number lies between that of the questions and that of the
        completions. With one sample per question it is Wilson's interval as usual.
        """
        judged = self._judged()
        if not judged:
            return None
        share = sum(one.is_correct for one in judged) / len(judged)
        surplus: dict[int, float] = {}
        for one in judged:
            surplus[one.question] = surplus.get(one.question, 0.0) + one.is_correct - share
        variance = sum(value**2 for value in surplus.values()) / len(judged) ** 2
        if 0 < share < 1:
            size = min(max(share * (1 - share) / variance, len(surplus)), len(judged)) if variance > 0 else len(judged)
        else:
            # All alike: nothing is known about the spread within a question, so each question counts once.
            size = len(surplus)
        return wilson_interval(share, size)

    @property
    def mean_tokens(self) -> float:
        """Mean length of a completion, in tokens."""
        return statistics.fmean(one.tokens for one in self.completions)

    @property
    def median_tokens(self) -> float:
        """Median length of a completion, in tokens."""
        return float(statistics.median(one.tokens for one in self.completions))

    @property
    def tokens_per_correct(self) -> float | None:
        """Tokens of all judged completions over the number of correct ones; `None` if there is none."""
        judged = self._judged()
        num_correct = sum(one.is_correct for one in judged)
        return sum(one.tokens for one in judged) / num_correct if num_correct else None

    @property
    def truncated_share(self) -> float:
        """Share of completions cut off at the longest allowed length."""
        return statistics.fmean(one.is_truncated for one in self.completions)

    def pass_at(self, k: int) -> float | None:
        """
        Mean over the questions of the chance that one of k samples at least is correct; `None` without such questions.

        Questions with fewer than k samples that can be judged are left out.
        """
        groups = self._samples(k)
        return (
            statistics.fmean(pass_at_k(len(group), sum(one.is_correct for one in group), k) for group in groups)
            if groups
            else None
        )

    def majority_at(self, k: int) -> float | None:
        r"""
        Mean over the questions of the chance that the `\boxed{}` answer of most of k samples is correct, likewise.

        Among equally frequent answers one is drawn; completions without an answer do not vote.
        """
        votes = [[vote_of(final_answer(one.text), one.is_correct) for one in group] for group in self._samples(k)]
        return statistics.fmean(majority_at_k(group, k) for group in votes) if votes else None

    def accuracy_at_budget(self, budgets: Sequence[int]) -> list[float | None]:
        """
        Return for every token budget the share of completions that are correct and ended within it.

        Budgets above `max_new_tokens` are answered by what was sampled: a completion cut off there counts as wrong.
        """
        judged = self._judged()
        if not judged:
            return [None] * len(budgets)
        lengths = [one.tokens for one in judged if one.is_correct and not one.is_truncated]
        return [sum(length <= budget for length in lengths) / len(judged) for budget in budgets]

    def tiers(self) -> dict[int | str, "Evaluation"]:
        """Return the evaluation of every tier, in the order of the tiers; empty where the data set has none."""
        groups: dict[int | str, list[EvaluatedCompletion]] = {}
        for one in self.completions:
            if one.tier is not None:
                groups.setdefault(one.tier, []).append(one)
        how = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "num_samples": self.num_samples,
            "seed": self.seed,
        }
        return {tier: Evaluation(groups[tier], **how) for tier in sorted(groups)}

    def to_dict(self, with_completions: bool = False) -> dict[str, Any]:
        """Return the numbers, and on request the completions, as JSON can hold them; what is undefined is `None`."""
        summary = self.summary() | {
            "tiers": {str(tier): evaluation.summary() for tier, evaluation in self.tiers().items()},
            "sampling": {
                "max_new_tokens": self.max_new_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "num_samples": self.num_samples,
                "seed": self.seed,
            },
        }
        return summary | {"completions": [asdict(one) for one in self.completions]} if with_completions else summary

    def summary(self) -> dict[str, Any]:
        """Return the numbers of all completions together, tiers and sampling left out."""
        return {
            "num_questions": len({one.question for one in self.completions}),
            "num_completions": len(self.completions),
            "num_unjudged": len(self.completions) - len(self._judged()),
            "accuracy": self.accuracy,
            "accuracy_interval": list(self.accuracy_interval) if self.accuracy_interval else None,
            "mean_tokens": self.mean_tokens,
            "median_tokens": self.median_tokens,
            "tokens_per_correct": self.tokens_per_correct,
            "truncated_share": self.truncated_share,
        }

    def _samples(self, k: int) -> list[list[EvaluatedCompletion]]:
        """Return the judged completions of every question that has k at least."""
        groups: dict[int, list[EvaluatedCompletion]] = {}
        for one in self._judged():
            groups.setdefault(one.question, []).append(one)
        return [group for group in groups.values() if len(group) >= k]

    def _judged(self) -> list[EvaluatedCompletion]:
        return [one for one in self.completions if one.is_correct is not None]


def wilson_interval(share: float, size: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share seen in `size` independent trials."""
    scale = 1 + Z_95**2 / size
    middle = (share + Z_95**2 / (2 * size)) / scale
    half = Z_95 / scale * math.sqrt(share * (1 - share) / size + Z_95**2 / (4 * size**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    dataset: "Dataset",
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    num_samples: int = 1,
    description: str = "evaluating",
) -> Evaluation:
    """
    Sample and judge completions of every question of `dataset`.

    The same seed and batch size give the same completions. The model's mode and generation settings and the global
    random state are left as they were, also if sampling fails.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model, on the device it is to be sampled on.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        dataset (`Dataset`):
            Rows with `prompt` (string or chat messages), `answer` and optionally `tier`.
        max_new_tokens (`int`):
            Longest completion, in tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature; 0 decodes greedily.
        top_p (`float`, *optional*, defaults to `1.0`):
            Share of the probability that is sampled from.
        batch_size (`int`, *optional*, defaults to `64`):
            Completions sampled together.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling.
        num_samples (`int`, *optional*, defaults to `1`):
            Completions per question.
        description (`str`, *optional*, defaults to `"evaluating"`):
            Label of the progress bar.

    Returns:
        [`Evaluation`]

    Raises:
        ValueError: if the data set is empty or a number is out of its range.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size), ("num_samples", num_samples)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or larger, got {value}.")
    check_sampling(temperature, top_p)
    if len(dataset) == 0:
        raise ValueError("The data set to evaluate on is empty.")
    from tqdm.auto import tqdm

    from ..rewards import ANSWER_COLUMNS, accuracy

    prompts = list(dataset["prompt"])
    answers = {name: list(dataset[name]) for name in ANSWER_COLUMNS if name in dataset.column_names}
    tiers = list(dataset["tier"]) if "tier" in dataset.column_names else [None] * len(prompts)
    prompt_ids = [tokenize(tokenizer, prompt) for prompt in prompts]
    # Longest first: batches hold prompts of like length, and what does not fit in memory fails at once.
    order = sorted(range(len(prompts)), key=lambda question: -len(prompt_ids[question]))
    order = [question for question in order for _ in range(num_samples)]
    end_ids = end_ids_of(model.generation_config, tokenizer)
    how = generation_config(model, tokenizer, end_ids, max_new_tokens, temperature, top_p)
    judged: list[EvaluatedCompletion] = []
    with (
        evaluation_mode(model, seed),
        tqdm(total=len(order), desc=description, unit="completion", dynamic_ncols=True) as bar,
    ):
        for start in range(0, len(order), batch_size):
            questions = order[start : start + batch_size]
            completion_ids = sample(model, [prompt_ids[question] for question in questions], how, end_ids)
            texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
            is_chat = not isinstance(prompts[questions[0]], str)
            verdicts = accuracy(
                completions=[[{"role": "assistant", "content": text}] for text in texts] if is_chat else texts,
                **{name: [values[question] for question in questions] for name, values in answers.items()},
            )
            for question, ids, text, verdict in zip(questions, completion_ids, texts, verdicts, strict=True):
                judged.append(
                    EvaluatedCompletion(
                        question=question,
                        tier=tiers[question],
                        text=text,
                        tokens=len(ids),
                        is_correct=None if verdict is None else verdict > 0,
                        is_truncated=ids[-1] not in end_ids,
                    )
                )
            bar.update(len(questions))
            num_correct = sum(one.is_correct is True for one in judged)
            num_judged = sum(one.is_correct is not None for one in judged)
            bar.set_postfix(
                accuracy=f"{num_correct / num_judged:.3f}" if num_judged else "-",
                tokens=f"{statistics.fmean(one.tokens for one in judged):.0f}",
            )
    # `sorted` is stable, so the samples of a question keep the order they were drawn in.
    judged.sort(key=lambda one: one.question)
    return Evaluation(judged, max_new_tokens, temperature, top_p, num_samples, seed)
