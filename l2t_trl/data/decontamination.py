"""Finding training questions that resemble questions of a benchmark."""

import re
from collections.abc import Iterable


# As for GPT-3: a run of 13 words in common is no accident.
NGRAM_WORDS = 13


def words_of(text: str) -> list[str]:
    """Return the words and numbers of `text`, in lower case, without punctuation and LaTeX's signs."""
    return re.findall(r"[a-z]+|\d+", text.lower())


class Overlap:
    """
    Questions that must not be trained on.

    Args:
        questions (`dict[str, Iterable[str]]`): the questions of each benchmark, by its name.
        ngram_words (`int`, *optional*, defaults to 13): words in a row that two questions may not have in common.
    """

    def __init__(self, questions: dict[str, Iterable[str]], ngram_words: int = NGRAM_WORDS):
        self.ngram_words = ngram_words
        self._whole: dict[tuple[str, ...], str] = {}
        self._ngrams: dict[tuple[str, ...], str] = {}
        for name, texts in questions.items():
            for text in texts:
                words = words_of(text)
                self._whole.setdefault(tuple(words), name)
                for ngram in self._ngrams_of(words):
                    self._ngrams.setdefault(ngram, name)

    def find(self, question: str) -> str | None:
        """
        Return the benchmark with a question that `question` resembles, or `None`.

        Two questions resemble each other if their words are the same, or have a run of `ngram_words` in common.
        """
        words = words_of(question)
        if words and tuple(words) in self._whole:
            return self._whole[tuple(words)]
        return next((self._ngrams[ngram] for ngram in self._ngrams_of(words) if ngram in self._ngrams), None)

    def _ngrams_of(self, words: list[str]) -> Iterable[tuple[str, ...]]:
        return (tuple(words[i : i + self.ngram_words]) for i in range(len(words) - self.ngram_words + 1))
