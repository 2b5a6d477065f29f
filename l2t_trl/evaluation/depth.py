r"""
Accuracy by the number of episodes (paper Fig. 1): completions are cut behind their k-th episode, and asked for the answer.

At depth k a completion with k episodes or more counts with the answers that are sampled behind its first k episodes and
the probe; one with fewer counts as it is, whole, with its own answer and length. So the curve starts at answers without
any reasoning and ends at the accuracy of the completions themselves, but for those that are asked at their last episode.

Legend: K episodes of a completion, k how many are read.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..episodes import segment
from ..errors import UserError
from ..rewards import final_answer
from .benchmark_run import Sampling, Task, seed_of
from .journal import Journal
from .voting import majority_at_k, vote_of


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .engines import Engine


DEPTH_ANSWERS = "depth.jsonl"
VOTERS = 4  # maj@4, as in the paper


@dataclass(frozen=True)
class Asking:
    """
    How cut completions are asked for the answer.

    Attributes:
        answer_probe (`str`): text behind the cut, up to where the answer starts.
        episode_format (`str`), max_episodes (`int`): how episodes are found, see [`~l2t_trl.episodes.segment`].
        depth_answers (`int`): answers sampled at every cut.
        answer_tokens (`int`): longest of them.
    """

    answer_probe: str
    episode_format: str
    max_episodes: int
    depth_answers: int
    answer_tokens: int


def find_cuts(
    lines: Sequence[dict[str, Any]], vocabulary: Sequence[bytes], episode_format: str, max_episodes: int
) -> list[list[int]]:
    """Return, per completion, the lengths in tokens of its first 0 to K episodes."""
    from ..scoring import cuts_of

    return [cuts_of(segment(line["ids"], vocabulary, episode_format, max_episodes).spans) for line in lines]


def ask_answers(
    task: Task,
    lines: Sequence[dict[str, Any]],
    cuts: Sequence[Sequence[int]],
    tokenizer: "PreTrainedTokenizerBase",
    engine: Callable[[], "Engine"],
    sampling: Sampling,
    asking: Asking,
    folder: Path,
    shares_prefixes: bool = False,
) -> list[dict[str, Any]]:
    """
    Sample and judge answers at every cut of every completion, as far as the folder does not hold them yet.

    Args:
        task ([`~l2t_trl.evaluation.benchmark_run.Task`]):
            The questions.
        lines (`Sequence[dict[str, Any]]`):
            The stored completions.
        cuts (`Sequence[Sequence[int]]`):
            Cuts of each, from [`find_cuts`].
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        engine (`Callable[[], Engine]`):
            Gives the engine, which is asked for only where something is left to do.
        sampling ([`~l2t_trl.evaluation.benchmark_run.Sampling`]):
            Temperature, nucleus, seed and batch size; those of the completions.
        asking ([`Asking`]):
            How to ask.
        folder (`Path`):
            Holds `depth.jsonl`: a line per cut with `id`, `sample`, `episodes` (k), `answers` and `verdicts`.
        shares_prefixes (`bool`, *optional*, defaults to `False`):
            Whether the engine reads what prompts of a batch begin with only once. The cuts of a completion then stand
            together, the longest first, and cost one reading instead of one each. Otherwise cuts of like length do.

    Returns:
        `list[dict[str, Any]]`: the lines.

    Raises:
        UserError: if the file cannot be used or written.
    """
    from tqdm.auto import tqdm

    prompts = dict(zip((row["id"] for row in task.rows), task.prompts, strict=True))
    rows = {row["id"]: row for row in task.rows}
    ids_of = {(line["id"], line["sample"]): line["ids"] for line in lines}
    length_of = {
        (line["id"], line["sample"], k): cut
        for line, row_cuts in zip(lines, cuts, strict=True)
        for k, cut in enumerate(row_cuts)
    }

    def place(key: tuple[str, int, int]) -> tuple:
        id, sample, _ = key
        longest = (-len(prompts[id]) - len(ids_of[id, sample]), id, sample) if shares_prefixes else ()
        return (*longest, -len(prompts[id]) - length_of[key])

    keys = [{"id": id, "sample": sample, "episodes": k} for id, sample, k in sorted(length_of, key=place)]
    probe = tokenizer(asking.answer_probe, add_special_tokens=False)["input_ids"]
    # A batch of the engine holds as many sequences as when it samples completions.
    batch_size = max(1, sampling.batch_size // asking.depth_answers)
    with (
        Journal(folder / DEPTH_ANSWERS, keys, batch_size) as journal,
        tqdm(
            total=len(keys), initial=len(journal.done), desc=f"{task.name}, depth", unit="cut", dynamic_ncols=True
        ) as bar,
    ):
        for batch in journal.batches:
            asked = [(key, i) for key in batch for i in range(asking.depth_answers)]
            completions = engine().complete(
                [
                    [
                        *prompts[key["id"]],
                        *ids_of[key["id"], key["sample"]][: length_of[tuple(key.values())]],
                        *probe,
                    ]
                    for key, _ in asked
                ],
                [seed_of(sampling.seed, task.name, *key.values(), i) for key, i in asked],
                asking.answer_tokens,
                sampling.temperature,
                sampling.top_p,
            )
            texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
            texts = [first_answer(asking.answer_probe, text) for text in texts]
            verdicts = task.benchmark.judge(
                [asking.answer_probe + text for text in texts], [rows[key["id"]] for key, _ in asked]
            )
            size = asking.depth_answers
            journal.add(
                [
                    key
                    | {
                        "answers": texts[size * n : size * (n + 1)],
                        "verdicts": verdicts[size * n : size * (n + 1)],
                    }
                    for n, key in enumerate(batch)
                ]
            )
            bar.update(len(batch))
        return journal.done


def first_answer(probe: str, text: str) -> str:
    """Return what a model says behind the probe up to where the first answer is complete, or all of it."""
    ends = [position + 1 for position, character in enumerate(text) if character == "}"]
    return next((text[:end] for end in ends if final_answer(probe + text[:end]) is not None), text)


def depth_curve(
    lines: Sequence[dict[str, Any]],
    cuts: Sequence[Sequence[int]],
    answers: Sequence[dict[str, Any]],
    probe: str,
) -> dict[str, Any]:
    """
    Return Acc(k), maj@4(k) and T(k).

    Args:
        lines (`Sequence[dict[str, Any]]`):
            The stored completions.
        cuts (`Sequence[Sequence[int]]`):
            Cuts of each.
        answers (`Sequence[dict[str, Any]]`):
            The answers at every cut.
        probe (`str`):
            The text that they stand behind.

    Returns:
        `dict[str, Any]`: lists by k from 0 to the largest K: `episodes` (k), `accuracy`, `majority` (of four answers at
        the same cut, or fewer if fewer were sampled; among equally many, one is drawn), `tokens` (mean length that is
        read) and `num_cut` (completions with k episodes or more). Completions that cannot be judged are left out.
    """
    states = _states(lines, cuts, answers, probe)
    deepest = max((len(row) - 2 for row in states), default=-1)
    at_depth = [[row[min(k, len(row) - 1)] for row in states] for k in range(deepest + 1)]
    return {
        "episodes": list(range(deepest + 1)),
        "accuracy": [statistics.fmean(state.accuracy for state in column) for column in at_depth],
        "majority": [statistics.fmean(state.majority for state in column) for column in at_depth],
        "tokens": [statistics.fmean(state.tokens for state in column) for column in at_depth],
        "num_cut": [sum(len(row) - 2 >= k for row in states) for k in range(deepest + 1)],
        "num_completions": len(states),
    }


def accuracy_when_asked(
    lines: Sequence[dict[str, Any]],
    cuts: Sequence[Sequence[int]],
    answers: Sequence[dict[str, Any]],
    probe: str,
    budgets: Sequence[int],
) -> list[float]:
    """
    Return the accuracy for every token budget, if the answer is asked for where the budget ends.

    A completion that ends within the budget counts as it is, another, and one that was cut off, with the answers behind
    its last whole episode within the budget. The probe and the answer are not counted.
    """
    states = [[state for state in row if state.has_ended] for row in _states(lines, cuts, answers, probe)]
    # The last state that fits; the first has no tokens.
    return [
        statistics.fmean([state for state in row if state.tokens <= budget][-1].accuracy for row in states)
        for budget in budgets
    ]


def check_lengths(
    task: Task, lines: Sequence[dict[str, Any]], cuts: Sequence[Sequence[int]], num_more: int, limit: int
) -> None:
    """Raise a [`UserError`] if prompt, cut completion and `num_more` tokens take more than the model's `limit`."""
    lengths = dict(zip((row["id"] for row in task.rows), map(len, task.prompts), strict=True))
    longest = max(chain((0,), (lengths[line["id"]] + row[-1] for line, row in zip(lines, cuts, strict=True))))
    if longest + num_more > limit:
        raise UserError(
            f"--depth_curve: the longest cut completion has {longest} tokens with its prompt, and {num_more} more for "
            f"probe and answer exceed the model's {limit}. Sample with a smaller --max_tokens into another --output."
        )


@dataclass(frozen=True)
class _State:
    """
    What a completion is worth at one point: tokens read, the share of right answers and of right majorities, and
    whether there is an answer: not in a whole completion that was cut off.
    """

    tokens: int
    accuracy: float
    majority: float
    has_ended: bool = True


def _states(lines, cuts, answers, probe) -> list[list[_State]]:
    """Return, per completion that can be judged, its states at k = 0 to K, and last as it is."""
    by_key = {(line["id"], line["sample"], line["episodes"]): line for line in answers}
    rows = []
    for line, row_cuts in zip(lines, cuts, strict=True):
        if line["is_correct"] is None:
            continue
        row = []
        for k, cut in enumerate(row_cuts):
            asked = by_key[line["id"], line["sample"], k]
            verdicts = [bool(verdict) for verdict in asked["verdicts"]]
            votes = [
                vote_of(final_answer(probe + text), verdict)
                for text, verdict in zip(asked["answers"], verdicts, strict=True)
            ]
            row.append(_State(cut, statistics.fmean(verdicts), majority_at_k(votes, min(VOTERS, len(votes)))))
        worth = float(line["is_correct"])
        rows.append([*row, _State(line["tokens"], worth, worth, not line["is_truncated"])])
    return rows
