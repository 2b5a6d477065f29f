"""
A seeded world of column additions with over-thinking solution traces.

A question asks for the sum of 2 to 6 numbers of equal width (2 to 4 digits). A solution goes column by column from the
units upward, one column and its carry per episode, so each necessary episode fixes one more digit of the answer.
Between them stand redundant episodes that change nothing, and with a set probability a step goes wrong; the solution
then goes on from the wrong value and ends in a wrong answer. `datasets` is imported where it is needed, everything
else is the standard library.
"""

import random
import zlib
from typing import NamedTuple


# (how many numbers, digits of each number); a tier draws one of its shapes evenly.
TIERS = {
    1: ((2, 2),),
    2: ((3, 2), (2, 3)),
    3: ((3, 3), (2, 4)),
    4: ((4, 3), (3, 4), (5, 2), (6, 2)),
}
COLUMN_NAMES = ("units", "tens", "hundreds", "thousands")
SPLITS = ("train", "test")

# One question in ten is held out.
TEST_SHARE_INVERSE = 10

# Chance that one more redundant episode follows; 0.62 makes a mean trace twice as long as the minimal one.
REDUNDANCY = 0.62
MAX_REDUNDANT_IN_A_ROW = 3

# Chance that a column goes wrong. About three columns per question leave roughly three traces in four correct.
WRONG_STEP_PROBABILITY = 0.09


class Episode(NamedTuple):
    """One episode of a trace: the text between its tags, and whether the answer needs it."""

    text: str
    is_necessary: bool


class Trace(NamedTuple):
    """A solution: its episodes in order, the answer it ends in, and whether that answer is right."""

    episodes: list[Episode]
    answer: str
    is_correct: bool


def question_text(numbers: list[int]) -> str:
    """Return the user message that asks for the sum of `numbers`."""
    return "Add " + "+".join(str(number) for number in numbers)


def question_numbers(question: str) -> list[int]:
    """Return the numbers of a question made by [`question_text`]."""
    return [int(number) for number in question.removeprefix("Add ").split("+")]


def split_of(numbers: list[int]) -> str:
    """
    Return the split a question belongs to, a function of its numbers alone.

    The order of the numbers does not count, so a held-out question is never a training question written in another
    order.
    """
    key = "+".join(str(number) for number in sorted(numbers))
    return "test" if zlib.crc32(key.encode()) % TEST_SHARE_INVERSE == 0 else "train"


def draw_numbers(rng: random.Random, tier: int, split: str) -> list[int]:
    """Draw the numbers of one question of `tier` that belongs to `split`."""
    while True:
        count, width = rng.choice(TIERS[tier])
        numbers = [rng.randrange(10 ** (width - 1), 10**width) for _ in range(count)]
        if split_of(numbers) == split:
            return numbers


def draw_trace(rng: random.Random, numbers: list[int], redundancy: float, wrong_step_probability: float) -> Trace:
    """
    Draw one solution of the sum of `numbers`.

    Args:
        rng (`random.Random`): source of all choices.
        numbers (`list[int]`): the addends, all of the same width.
        redundancy (`float`): chance in [0, 1) that one more redundant episode follows, up to three in a row; 0 gives
        the minimal trace.
        wrong_step_probability (`float`): chance in [0, 1] that a column goes wrong, up to the first that does.

    Returns:
        [`Trace`]: necessary episodes first to last from the units upward, redundant ones between them.
    """
    width = len(str(numbers[0]))
    episodes = _redundant_episodes(rng, numbers, redundancy, column=None, answer="")
    carry, answer, has_erred = 0, "", False
    for place in range(width):
        digits = [number // 10**place % 10 for number in numbers]
        # At most one error: a second one could cancel the first, and a right answer would then hide wrong steps.
        errs = not has_erred and rng.random() < wrong_step_probability
        has_erred = has_erred or errs
        errs_in_carry = errs and place > 0 and rng.random() < 0.5
        if errs_in_carry:
            carry = rng.choice([wrong for wrong in (carry - 1, carry + 1) if wrong >= 0])
        terms = digits + [carry] if place > 0 else digits
        wrong_term = rng.randrange(1, len(terms)) if errs and not errs_in_carry else None
        column, total = _running_sum(rng, terms, wrong_term)
        episodes.append(Episode(f"{COLUMN_NAMES[place]} {column}", True))
        is_last = place == width - 1
        answer = (str(total) if is_last else str(total % 10)) + answer
        carry = total // 10
        episodes += _redundant_episodes(rng, numbers, redundancy, column, answer)
    return Trace(episodes, answer, int(answer) == sum(numbers))


def _running_sum(rng: random.Random, terms: list[int], wrong_term: int | None) -> tuple[str, int]:
    """Return `terms` added one by one, as in `7+8=15+6=21`, and their total; adding term `wrong_term` goes wrong."""
    total, text = terms[0], str(terms[0])
    for i, term in enumerate(terms[1:], start=1):
        total += term
        if i == wrong_term:
            # The last column's total opens the answer, so it has to stay positive.
            total = rng.choice([wrong for wrong in (total - 10, total - 1, total + 1, total + 10) if wrong > 0])
        text += f"+{term}={total}"
    return text, total


def _redundant_episodes(
    rng: random.Random, numbers: list[int], redundancy: float, column: str | None, answer: str
) -> list[Episode]:
    """
    Draw the redundant episodes that follow `column` (None: before the first column), `answer` being the digits fixed
    so far.
    """
    texts = ["read " + "+".join(str(number) for number in numbers), "hmm let me see"]
    if column is not None:
        # A check repeats the column as it stands, right or wrong: it informs about nothing. No kind is likelier than
        # to go on: a habit, which surprises nobody, would write nothing into the parameters and cost nothing.
        texts += [f"so far {answer}", f"check {column}", f"check {column}"]
    episodes = []
    while len(episodes) < MAX_REDUNDANT_IN_A_ROW and rng.random() < redundancy:
        episodes.append(Episode(rng.choice(texts), False))
    return episodes


def episodes_text(episodes: list[Episode]) -> str:
    """Return the opened thought up to the end of the last of `episodes`, each between its numbered tags."""
    tagged = (f"<episode_{i}>{episode.text}</episode_{i}>" for i, episode in enumerate(episodes, start=1))
    return "<think>" + "".join(tagged)


def trace_text(trace: Trace) -> str:
    """Return the whole completion: the thought and the boxed answer."""
    return episodes_text(trace.episodes) + "</think>\\boxed{" + trace.answer + "}"


def is_necessary(episode_text: str) -> bool:
    """Return whether the text of an episode works out a column."""
    return episode_text.startswith(COLUMN_NAMES)


def make_dataset(size: int, seed: int, tiers: tuple[int, ...] = (1, 2, 3, 4), split: str = "train"):
    """
    Make questions, the tiers in turn.

    Args:
        size (`int`): number of questions; they are drawn independently, so the easiest tier repeats some.
        seed (`int`): equal seeds give equal rows on every platform.
        tiers (`tuple[int, ...]`, *optional*, defaults to `(1, 2, 3, 4)`): difficulty tiers, 1 the easiest.
        split (`str`, *optional*, defaults to `"train"`): `"train"` or `"test"`; no question is in both.

    Returns:
        `datasets.Dataset` with the columns `prompt` (chat messages), `answer` and `tier`.

    Raises:
        ValueError: if an argument is out of range.
    """
    from datasets import Dataset

    _validate(size, tiers, split)
    rng = random.Random(f"questions {split} {seed}")
    rows = []
    for i in range(size):
        tier = tiers[i % len(tiers)]
        numbers = draw_numbers(rng, tier, split)
        rows.append({"prompt": _user(numbers), "answer": str(sum(numbers)), "tier": tier})
    return Dataset.from_list(rows)


def make_traces(
    size: int,
    seed: int,
    tiers: tuple[int, ...] = (1, 2, 3, 4),
    split: str = "train",
    redundancy: float = REDUNDANCY,
    wrong_step_probability: float = WRONG_STEP_PROBABILITY,
):
    """
    Make questions with one drawn solution each, as prompt-completion rows for supervised fine-tuning.

    Args:
        size (`int`): number of rows.
        seed (`int`): equal seeds give equal rows on every platform.
        tiers (`tuple[int, ...]`, *optional*, defaults to `(1, 2, 3, 4)`): difficulty tiers, 1 the easiest.
        split (`str`, *optional*, defaults to `"train"`): `"train"` or `"test"`; no question is in both.
        redundancy (`float`, *optional*, defaults to 0.62): chance in [0, 1) that one more redundant episode follows; 0
        gives minimal traces.
        wrong_step_probability (`float`, *optional*, defaults to 0.09): chance in [0, 1] that a column goes wrong.

    Returns:
        `datasets.Dataset` with the columns `prompt`, `completion` (chat messages), `answer` (the right one), `tier`
        and `is_correct` (whether the completion ends in the right answer).

    Raises:
        ValueError: if an argument is out of range.
    """
    from datasets import Dataset

    _validate(size, tiers, split)
    if not 0 <= redundancy < 1:
        raise ValueError(f"got redundancy={redundancy}; set a number in [0, 1)")
    if not 0 <= wrong_step_probability <= 1:
        raise ValueError(f"got wrong_step_probability={wrong_step_probability}; set a number in [0, 1]")
    rng = random.Random(f"traces {split} {seed}")
    rows = []
    for i in range(size):
        tier = tiers[i % len(tiers)]
        numbers = draw_numbers(rng, tier, split)
        trace = draw_trace(rng, numbers, redundancy, wrong_step_probability)
        rows.append(
            {
                "prompt": _user(numbers),
                "completion": [{"role": "assistant", "content": trace_text(trace)}],
                "answer": str(sum(numbers)),
                "tier": tier,
                "is_correct": trace.is_correct,
            }
        )
    return Dataset.from_list(rows)


def _user(numbers: list[int]) -> list[dict[str, str]]:
    return [{"role": "user", "content": question_text(numbers)}]


def _validate(size: int, tiers: tuple[int, ...], split: str) -> None:
    if size < 1:
        raise ValueError(f"got size={size}; set at least 1")
    if not tiers or not set(tiers) <= set(TIERS):
        raise ValueError(f"got tiers={tiers}; set a non-empty choice of {tuple(TIERS)}")
    if split not in SPLITS:
        raise ValueError(f"got split={split!r}; set one of {SPLITS}")
