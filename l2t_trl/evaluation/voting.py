"""Statistics of several samples of one question: pass@k and maj@k, both over all ways to choose k of the n samples."""

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb


# The vote of every right answer, however it is written.
RIGHT = ("right",)


def vote_of(answer: str | None, is_correct: bool) -> Hashable:
    """
    Return what a sample votes for: answers with equal votes count together.

    Right answers are one however they are written, since the judge has found them equal to the gold answer; wrong ones
    are told apart by their text, white space and the notation of numbers aside ([`~l2t_trl.answers.answer_key`]). `None` is
    no vote.
    """
    if is_correct:
        return RIGHT
    if answer is None:
        return None
    from ..rewards import answer_key

    return answer_key(answer)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """
    Chance that one of k samples at least is right (unbiased: Chen et al. 2021, arXiv 2107.03374).

    Args:
        num_samples (`int`): samples of the question, k at least.
        num_correct (`int`): right ones among them.
        k (`int`): how many are drawn.

    Returns:
        `float`: 1 - C(n - c, k) / C(n, k).
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must be between 1 and the {num_samples} samples, got {k}.")
    return 1 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def majority_at_k(votes: Sequence[Hashable], k: int) -> float:
    """
    Chance that the answer which most of k samples give is right; among equally many, one is drawn.

    Counted over all choices of k samples. A sample without an answer does not vote; without any vote the answer is
    wrong.

    Args:
        votes (`Sequence[Hashable]`): one of each sample, from [`vote_of`].
        k (`int`): how many are drawn.

    Returns:
        `float`
    """
    if not 1 <= k <= len(votes):
        raise ValueError(f"k must be between 1 and the {len(votes)} samples, got {k}.")
    counts = Counter(votes)
    num_right, num_silent = counts.pop(RIGHT, 0), counts.pop(None, 0)
    total = 0.0
    # With m right votes among the k, no wrong answer may have more; those that have m as well share the draw.
    for m in range(1, min(k, num_right) + 1):
        # (wrong votes chosen, answers with exactly m) -> number of ways
        ways = {(0, 0): 1}
        for size in counts.values():
            step: dict[tuple[int, int], int] = {}
            for (chosen, tied), count in ways.items():
                for more in range(min(m, size, k - m - chosen) + 1):
                    key = (chosen + more, tied + (more == m))
                    step[key] = step.get(key, 0) + count * comb(size, more)
            ways = step
        for (chosen, tied), count in ways.items():
            # comb is 0 where there are not as many silent samples as are left to choose.
            total += comb(num_right, m) * count * comb(num_silent, k - m - chosen) / (1 + tied)
    return total / comb(len(votes), k)


def sizes_up_to(num_samples: int) -> list[int]:
    """Return the k that are reported: powers of two, and the number of samples."""
    powers = [2**power for power in range(num_samples.bit_length())]
    return sorted({*(k for k in powers if k <= num_samples), num_samples})
