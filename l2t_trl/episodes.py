r"""
Splitting a completion into episodes (paper Sec. 4.3, App. G.4).

Everything happens on the sampled token ids: they are mapped to bytes once, the marks are searched in the bytes, and
byte positions are mapped back to token indices. Decoded text is never encoded again, so that spans always fit the ids.
A malformed completion is data, not an error: whatever its marks, its spans are ordered, disjoint and cover every
token.

Legend: T completion tokens, K episodes.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple


Span = tuple[int, int]


class Segmentation(NamedTuple):
    """
    A completion's spans, half-open token ranges that cover it in order.

    Attributes:
        spans (`list[tuple[int, int]]`):
            The K episodes and, last, the answer span: what follows the last episode (the closing `</think>`, the
            answer, the end-of-sequence token). It is empty, `(T, T)`, where the completion ends inside an episode. A
            completion without any reasoning has no episode, only the answer span.
        is_marked (`bool`):
            Whether the completion held a mark of the format. If not, its reasoning counts as a single episode.
    """

    spans: list[Span]
    is_marked: bool


_TAG = re.compile(rb"<(/?)episode_\d+>")
_THINK_OPEN, _THINK_CLOSE = b"<think>", b"</think>"
_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n\s*")
_OPENING = re.compile(rb"\s*(?:<think>)?\s*")
# Phrases with which reasoning models turn to something else, at the start of a line or sentence (as MRT splits them).
# The space before one belongs to it, as it does in the tokens of byte-level vocabularies.
_REFLECTION = re.compile(
    rb"(?:(?<=\n)|(?<=[.!?])(?= ))(?= ?(?:But wait|Wait|Alternatively|Hmm|Hold on|Actually|On second thought|Another way"
    rb"|Another approach|Let me (?:check|double-check|recheck|re-check|verify|try|reconsider)|Maybe I should)\b)"
)


def segment(
    completion_ids: Sequence[int], vocabulary: Sequence[bytes], episode_format: str = "tags", max_episodes: int = 30
) -> Segmentation:
    """
    Split a completion into episodes and an answer span.

    Text between two episodes belongs to the one that follows; a token that straddles a border belongs to the one
    before.

    Args:
        completion_ids (`Sequence[int]` of length T):
            Sampled token ids, without padding.
        vocabulary (`Sequence[bytes]`):
            Bytes of every token id, from [`token_bytes`].
        episode_format (`str`, *optional*, defaults to `"tags"`):
            - `"tags"`: an episode runs from `<episode_k>` to its closing tag, the next opening tag or `</think>`,
              whichever comes first; numbers are not read, so repeated or misnumbered tags count like others.
            - `"think"`: every `<think>` block is an episode, up to its `</think>`, which probes bring themselves; the
              first may have been opened by the prompt.
            - `"paragraph"`: blank lines separate episodes.
            - `"reflection"`: a line or sentence that starts with an opener such as "Wait" begins an episode.
            - `"auto"`: tags if there are any, else paragraphs.
        max_episodes (`int`, *optional*, defaults to `30`):
            Most episodes; further ones merge into the last.

    Returns:
        [`Segmentation`]

    Raises:
        ValueError: if the format is unknown.
    """
    if episode_format not in _FIND_ENDS:
        raise ValueError(f"episode_format must be one of {', '.join(_FIND_ENDS)}, got {episode_format!r}.")
    # Models have more output rows than their tokenizers have ids, and untrained ones sample them.
    pieces = [vocabulary[token] if token < len(vocabulary) else b"" for token in completion_ids]
    text = b"".join(pieces)
    starts = [0, *accumulate(map(len, pieces))][: len(pieces)]  # first byte of each token

    byte_ends = _FIND_ENDS[episode_format](text)
    is_marked = bool(byte_ends)
    if not is_marked:
        byte_ends = [_reasoning_end(text)]
    # Ends that meet in one token fall together, and an end at 0 encloses nothing.
    ends = sorted({bisect_left(starts, end) for end in byte_ends} - {0})
    if len(ends) > max_episodes:
        ends = ends[: max_episodes - 1] + ends[-1:]
    return Segmentation([*zip([0, *ends], [*ends, len(pieces)], strict=True)], is_marked)


def token_bytes(tokenizer) -> list[bytes]:
    """
    Bytes that each token id stands for, for the byte-level (GPT-2, Qwen, Llama 3) and the byte-fallback
    (SentencePiece) vocabularies of fast tokenizers. Special tokens stand for no bytes: they cannot be part of a mark.

    Args:
        tokenizer (`transformers.PreTrainedTokenizerFast`): the policy's tokenizer.

    Returns:
        `list[bytes]`: one entry per id, empty for ids without a token.

    Raises:
        ValueError: if the tokenizer is of another kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.dumps(json.loads(backend.to_str())["decoder"]) if backend is not None else ""
    if '"ByteLevel"' in decoder:
        to_bytes = _byte_level
    elif '"ByteFallback"' in decoder or '"Metaspace"' in decoder or "\\u2581" in decoder:
        to_bytes = _byte_fallback
    else:
        raise ValueError(
            f"Episodes are found in the bytes of tokens, which {type(tokenizer).__name__} does not show: it is neither a "
            "byte-level nor a byte-fallback fast tokenizer. Use the model's fast tokenizer."
        )
    added = tokenizer.added_tokens_decoder
    vocabulary = [b""] * (max(tokenizer.get_vocab().values()) + 1)
    for token, index in tokenizer.get_vocab().items():
        if index not in added:
            vocabulary[index] = to_bytes(token)
        elif not added[index].special:
            vocabulary[index] = added[index].content.encode()
    return vocabulary


def _reasoning_end(text: bytes) -> int:
    """First byte of `</think>`, or the end of a text without one."""
    end = text.find(_THINK_CLOSE)
    return len(text) if end < 0 else end


def _tag_ends(text: bytes) -> list[int]:
    limit = _reasoning_end(text)
    ends, is_open = [], False
    for tag in _TAG.finditer(text, 0, limit):
        is_closing = bool(tag[1])
        if is_open:
            ends.append(tag.end() if is_closing else tag.start())
        is_open = not is_closing
    return [*ends, limit] if is_open else ends


def _think_ends(text: bytes) -> list[int]:
    ends = [block.start() for block in re.finditer(re.escape(_THINK_CLOSE), text)]
    is_cut_off = text.find(_THINK_OPEN, ends[-1] if ends else 0) >= 0
    return [*ends, len(text)] if is_cut_off else ends


def _separator_ends(separator: re.Pattern, text: bytes) -> list[int]:
    limit = _reasoning_end(text)
    # White space and the opening <think> alone are no episode.
    first = _OPENING.match(text).end()
    ends = [mark.end() for mark in separator.finditer(text, 0, limit) if first < mark.end() < limit]
    return [*ends, limit] if ends else []


def _paragraph_ends(text: bytes) -> list[int]:
    return _separator_ends(_BLANK_LINE, text)


def _reflection_ends(text: bytes) -> list[int]:
    return _separator_ends(_REFLECTION, text)


def _auto_ends(text: bytes) -> list[int]:
    return _tag_ends(text) or _paragraph_ends(text)


# Format -> where its episodes end in the text, in bytes; nothing where the text holds no mark.
_FIND_ENDS = {
    "tags": _tag_ends,
    "think": _think_ends,
    "paragraph": _paragraph_ends,
    "reflection": _reflection_ends,
    "auto": _auto_ends,
}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: the printable character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    return bytes(_BYTE_OF_CHARACTER[character] for character in token)


def _byte_fallback(token: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()
