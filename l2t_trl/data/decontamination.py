"""Finding training questions that resemble questions of a benchmark."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence


NGRAM_WORDS = 8
# A question is one of a benchmark's if it has half of that one's runs of words. One run alone is no sign: half of all
# AIME questions end "where m and n are relatively prime positive integers find m n".
SHARE = 0.5


def words_of(text: str) -> list[str]:
    """Return the words and numbers of `text`, in lower case, without punctuation and LaTeX's signs."""
    return re.findall(r"[a-z]+|\d+", text.lower())


class Overlap:
    """
    Questions that must not be trained on.

    Args:
        questions (`dict[str, Iterable[str]]`): the questions of each benchmark, by its name.
        ngram_words (`int`, *optional*, defaults to 8): length of the runs of words that are compared.
    """

    def __init__(self, questions: dict[str, Iterable[str]], ngram_words: int = NGRAM_WORDS):
        self.ngram_words = ngram_words
        self._whole: dict[tuple[str, ...], str] = {}
        self._names: list[str] = []
        self._num_ngrams: list[int] = []
        # For each run of words, the questions that have it.
        self._having: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for name, texts in questions.items():
            for text in texts:
                words = tuple(words_of(text))
                self._whole.setdefault(words, name)
                ngrams = self._ngrams_of(words)
                for ngram in ngrams:
                    self._having[ngram].append(len(self._names))
                self._names.append(name)
                self._num_ngrams.append(len(ngrams))

    def find(self, question: str) -> str | None:
        """
        Return the benchmark with a question that `question` resembles, or `None`.

        It resembles one whose words are the same, and one of whose runs of `ngram_words` words it has half at least.
        """
        words = tuple(words_of(question))
        if words and words in self._whole:
            return self._whole[words]
        shared = Counter(number for ngram in self._ngrams_of(words) for number in self._having.get(ngram, ()))
        for number, count in shared.items():
            if count >= SHARE * self._num_ngrams[number]:
                return self._names[number]
        return None

    def _ngrams_of(self, words: Sequence[str]) -> set[tuple[str, ...]]:
        return {tuple(words[i : i + self.ngram_words]) for i in range(len(words) - self.ngram_words + 1)}
