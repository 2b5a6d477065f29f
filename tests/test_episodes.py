"""Segmentation: hand-worked token ids, both kinds of vocabulary, malformed completions, random bytes."""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

import literal
from l2t_trl.episodes import segment, token_bytes


FORMATS = ("tags", "think", "paragraph", "reflection", "auto")
TAGS = ["<think>", "</think>", *(f"<{slash}episode_{k}>" for k in range(1, 4) for slash in ("", "/"))]


def split(*pieces: bytes, **options) -> tuple[list[bytes], bool]:
    """Segment a completion given as its tokens' bytes; returns the bytes of every span."""
    spans, is_marked = segment(range(len(pieces)), pieces, **options)
    return [b"".join(pieces[start:end]) for start, end in spans], is_marked


def one_byte_tokens(text: bytes) -> list[bytes]:
    return [text[i : i + 1] for i in range(len(text))]


@pytest.fixture(scope="module")
def byte_level():
    """256 bytes, merges that run over the borders of marks, no tag among the added tokens."""
    return make_byte_level()


def make_byte_level(tags=(), is_special: bool = False) -> Qwen2Tokenizer:
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for pair in (("Ġ", "W"), ("a", "i"), ("ĠW", "ai"), ("ĠWai", "t"), ("Ċ", "Ċ"), ("<", "/"), (">", "Ċ"), (">", "ĊĊ")):
        vocab["".join(pair)] = len(vocab)
        merges.append(pair)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.add_tokens([AddedToken(tag, special=is_special) for tag in tags], special_tokens=is_special)
    return tokenizer


@pytest.fixture(scope="module")
def sentence_piece() -> PreTrainedTokenizerFast:
    """SentencePiece as Llama 2 and Gemma have it: U+2581 for a space, <0x..> for bytes without a piece."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    for character in "▁</>_episodthnkabcx123.":
        vocab[character] = len(vocab)
    merges = []
    for pair in (("▁", "<"), ("▁", "a"), ("e", "p"), ("<", "/"), ("1", ">"), ("t", "h"), ("th", "i")):
        vocab["".join(pair)] = len(vocab)
        merges.append(pair)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    return tokenizer


# ----- bytes of tokens -----


@pytest.mark.parametrize("text", ["plain ascii\n\n", "é ✓ 日本 🙂", "tab\tnul\0", " Wait <think>", "</think>\n\nx"])
def test_token_bytes_of_a_byte_level_vocabulary_spell_the_text(byte_level, text):
    vocabulary = token_bytes(byte_level)
    ids = byte_level(text)["input_ids"]
    assert b"".join(vocabulary[token] for token in ids) == text.encode()
    assert len(vocabulary) == len(byte_level)


def test_token_bytes_of_a_byte_level_vocabulary_cover_every_byte(byte_level):
    vocabulary = token_bytes(byte_level)
    assert sorted(vocabulary[:256]) == [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize("text", ["think a </think>", "é\n\nb", "日 🙂 a"])
def test_token_bytes_of_a_byte_fallback_vocabulary_spell_the_text(sentence_piece, text):
    vocabulary = token_bytes(sentence_piece)
    ids = sentence_piece(text)["input_ids"]
    assert b"".join(vocabulary[token] for token in ids) == b" " + text.encode()  # its normalizer prepends a space


def test_added_tokens_have_bytes_and_special_tokens_have_none():
    tokenizer = make_byte_level(["</think>", "é"])
    vocabulary = token_bytes(tokenizer)
    assert vocabulary[tokenizer.convert_tokens_to_ids("</think>")] == b"</think>"
    assert vocabulary[tokenizer.convert_tokens_to_ids("é")] == "é".encode()  # its content, not the byte alphabet's é
    assert vocabulary[tokenizer.eos_token_id] == b""


def test_token_bytes_refuses_a_vocabulary_that_hides_its_bytes():
    backend = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="byte"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"))


# ----- tags -----

WELL_FORMED = "<think>\n<episode_1>a b</episode_1>\n<episode_2>c</episode_2>\n</think>\n\n4<|endoftext|>"


@pytest.mark.parametrize("tags", [(), TAGS], ids=["tags in pieces", "tags as added tokens"])
def test_tags_split_by_hand(tags):
    tokenizer = make_byte_level(tags)
    ids = tokenizer(WELL_FORMED)["input_ids"]
    vocabulary = token_bytes(tokenizer)
    spans, is_marked = segment(ids, vocabulary, "tags")
    texts = [b"".join(vocabulary[token] for token in ids[start:end]) for start, end in spans]
    if tags:
        # <think> \n <episode_1> a _ b </episode_1> | \n <episode_2> c </episode_2> | \n </think> \n\n 4 eos
        assert len(ids) == 16
        assert spans == [(0, 7), (7, 11), (11, 16)]
        assert texts[1] == b"\n<episode_2>c</episode_2>"
    else:
        # "</episode_1>\n" ends in the token ">\n", which straddles the border: it goes to the episode before it.
        assert texts[0] == b"<think>\n<episode_1>a b</episode_1>\n"
        assert texts[1] == b"<episode_2>c</episode_2>\n"
        assert texts[2] == b"</think>\n\n4"
        assert spans[-1][1] == len(ids)  # the end-of-text token is covered although it has no bytes
    assert is_marked


def test_byte_fallback_vocabulary_splits_by_hand(sentence_piece):
    ids = sentence_piece("<episode_1>a</episode_1> <episode_2>é</episode_2></think> 3")["input_ids"]
    vocabulary = token_bytes(sentence_piece)
    spans, is_marked = segment(ids, vocabulary, "tags")
    texts = [b"".join(vocabulary[token] for token in ids[start:end]) for start, end in spans]
    assert texts == [b" <episode_1>a</episode_1>", " <episode_2>é</episode_2>".encode(), b"</think> 3"]
    # tokens: "_<" e p i s o d e... count by hand: _< ep i s o d e _ 1> a </ ep i s o d e _ 1> = 9 + 1 + 9
    assert spans[0] == (0, 19)
    assert is_marked


@pytest.mark.parametrize(
    "by_hand",  # | where a span ends
    [
        "<episode_1>a</episode_1>|<episode_2>b</episode_2>|c",
        # Text between episodes belongs to the following one, text before the first to the first.
        "x<episode_1>a</episode_1>|y<episode_2>b</episode_2>|c",
        # Unclosed: ends where the next one opens, at </think>, or where the completion is cut off.
        "<episode_1>a|<episode_2>b</episode_2>|c",
        "<episode_1>a</episode_1>|<episode_2>b|</think>c",
        "<episode_1>a</episode_1>|<episode_2>b|",
        # Cut off inside a tag: what there is of it is text.
        "<episode_1>a</episode_1>|<epis",
        "<episode_1>a</episod|",
        # Repeated and out of order: the numbers are not read.
        "<episode_2>a</episode_2>|<episode_1>b</episode_1>|c",
        "<episode_1>a</episode_1>|<episode_1>b</episode_7>|c",
        # Nested: the inner one ends the outer one; the outer closing tag closes nothing.
        "<episode_1>a|<episode_2>b</episode_2>|c</episode_1>d",
        # Tags behind </think> are not reasoning.
        "<episode_1>a</episode_1>|</think><episode_2>b</episode_2>",
    ],
)
def test_malformed_tags_by_hand(by_hand):
    expected = by_hand.encode().split(b"|")
    assert split(*one_byte_tokens(b"".join(expected))) == (expected, True)


@pytest.mark.parametrize(
    "by_hand",
    [
        # One episode up to </think>, or the whole completion.
        "<think>a b|</think>c",
        "a b|</think>c",
        "a b|",
        # A closing tag alone opens nothing, and neither does a tag behind </think>.
        "a</episode_1>b|",
        "a|</think><episode_1>b</episode_1>c",
        # Not tags.
        "<episode_>a</episode_><episode_x><Episode_1><episode 1>|",
        # Nothing before </think>: no episode at all.
        "</think>a",
    ],
)
def test_no_tags_by_hand(by_hand):
    expected = by_hand.encode().split(b"|")
    assert split(*one_byte_tokens(b"".join(expected))) == (expected, False)


def test_the_opening_think_is_optional():
    text = "<episode_1>a</episode_1></think>4"
    without, _ = split(*one_byte_tokens(text.encode()))
    with_opener, _ = split(*one_byte_tokens(b"<think>" + text.encode()))
    assert [b"<think>" + without[0], *without[1:]] == with_opener


def test_tags_over_odd_token_borders():
    # The borders: behind "</episode_1>" (inside b"1>\nx<"), so that token is the first episode's last.
    pieces = [b"<ep", b"isode", b"_1", b">a</epi", b"sode_", b"1>\nx<", b"episode_2>b</", b"episode_2", b">", b"\n4"]
    assert segment(range(10), pieces) == ([(0, 6), (6, 9), (9, 10)], True)


def test_two_borders_inside_one_token():
    # Both episodes end in the second token: they fall together, no empty episode is made up.
    assert segment(range(3), [b"<episode_1>a", b"</episode_1><episode_2>b</episode_2>", b"4"]) == (
        [(0, 2), (2, 3)],
        True,
    )


def test_multi_byte_characters_across_tokens():
    smile = "🙂".encode()
    pieces = [b"<episode_1>", smile[:1], smile[1:3], smile[3:] + b"</episode_1>", b"<episode_2>", smile[:2]]
    assert segment(range(6), pieces) == ([(0, 4), (4, 6), (6, 6)], True)


def test_tokens_without_bytes_belong_to_what_follows():
    pieces = [b"", b"<episode_1>a</episode_1>", b"", b"<episode_2>b</episode_2>", b"", b"4", b""]
    assert segment(range(7), pieces) == ([(0, 2), (2, 4), (4, 7)], True)
    # So the end-of-text token behind the last closing tag is the answer span, not part of the episode.
    assert segment(range(4), pieces[:2] + [b"", b""]) == ([(0, 2), (2, 4)], True)


def test_ids_beyond_the_vocabulary_have_no_bytes():
    # Models have more rows than their tokenizers have ids (Qwen2.5: 151,936 and 151,665), and sampling can hit them.
    vocabulary = [b"<episode_1>a</episode_1>", b"4"]
    assert segment([0, 700, 1], vocabulary) == ([(0, 1), (1, 3)], True)
    assert segment([700, 701], vocabulary) == ([(0, 2)], False)


def test_empty_completion_has_no_episode():
    for episode_format in FORMATS:
        assert segment([], [], episode_format) == ([(0, 0)], False)


def test_more_than_max_episodes_merge_into_the_last():
    text = b"".join(b"<episode_%d>x</episode_%d>" % (k, k) for k in range(1, 6)) + b"4"
    parts = [b"<episode_%d>x</episode_%d>" % (k, k) for k in range(1, 6)]
    assert split(*one_byte_tokens(text), max_episodes=5)[0] == [*parts, b"4"]
    assert split(*one_byte_tokens(text), max_episodes=3)[0] == [parts[0], parts[1], b"".join(parts[2:]), b"4"]
    assert split(*one_byte_tokens(text), max_episodes=1)[0] == [b"".join(parts), b"4"]


def test_thirty_episodes_by_default():
    text = b"".join(b"<episode_%d>x</episode_%d>" % (k, k) for k in range(1, 41)) + b"4"
    spans, _ = segment(text, [bytes([i]) for i in range(256)])
    assert len(spans) == 31
    assert text[spans[29][0] : spans[29][1]].startswith(b"<episode_30>x</episode_30><episode_31>")
    assert text[spans[30][0] :] == b"4"


# ----- the other formats -----


def test_think_blocks_by_hand():
    # An episode ends before its closing tag, which the probe brings along.
    text = b"<think>a</think>b<think>c</think>d"
    assert split(*one_byte_tokens(text), episode_format="think") == (
        [b"<think>a", b"</think>b<think>c", b"</think>d"],
        True,
    )
    # Opened by the prompt; and cut off inside the second block.
    text = b"a</think>b<think>c"
    assert split(*one_byte_tokens(text), episode_format="think") == ([b"a", b"</think>b<think>c", b""], True)
    assert split(b"a", b"b", episode_format="think") == ([b"ab", b""], False)


def test_paragraphs_by_hand():
    text = b"a\nb\n\nc\n \t\n\n\nd\n\n</think>\n\n4\n\n5"
    expected = [b"a\nb\n\n", b"c\n \t\n\n\n", b"d\n\n", b"</think>\n\n4\n\n5"]
    assert split(*one_byte_tokens(text), episode_format="paragraph") == (expected, True)
    assert split(*one_byte_tokens(b"a\nb</think>\n\n4"), episode_format="paragraph") == (
        [b"a\nb", b"</think>\n\n4"],
        False,
    )
    assert split(*one_byte_tokens(b"a\n\nb"), episode_format="paragraph") == ([b"a\n\n", b"b", b""], True)


def test_a_blank_line_at_the_end_of_reasoning_separates_nothing():
    for text in (b"a\n\n</think>4", b"a\n\n"):
        (first, *_), is_marked = split(*one_byte_tokens(text), episode_format="paragraph")
        assert (first, is_marked) == (b"a\n\n", False)


def test_leading_blank_lines_are_no_paragraph():
    # R1-like models begin with "<think>\n\n" or a blank line; white space is no episode.
    text = b"\n\na\n\nb</think>4"
    assert split(*one_byte_tokens(text), episode_format="paragraph")[0] == [b"\n\na\n\n", b"b", b"</think>4"]
    text = b"<think>\n\na\n\nb</think>4"
    assert split(*one_byte_tokens(text), episode_format="paragraph")[0] == [b"<think>\n\na\n\n", b"b", b"</think>4"]


def test_reflection_by_hand():
    text = b"So 3.\nWait, 4? Alternatively 5. Let me check it. Waiting. I said wait\nHmm no</think>\nWait"
    expected = [b"So 3.\n", b"Wait, 4?", b" Alternatively 5.", b" Let me check it. Waiting. I said wait\n", b"Hmm no"]
    texts, is_marked = split(*one_byte_tokens(text), episode_format="reflection")
    assert [part.strip() for part in texts[:-1]] == [part.strip() for part in expected]
    assert texts[-1] == b"</think>\nWait"
    assert is_marked
    assert split(*one_byte_tokens(b"Wait, no openers"), episode_format="reflection")[1] is False


def test_reflection_gives_the_opener_to_the_episode_it_opens(byte_level):
    # Byte-level tokens carry the space in front of a word: " Wait" is one token.
    ids = byte_level("a. Wait b")["input_ids"]
    vocabulary = token_bytes(byte_level)
    assert [vocabulary[token] for token in ids] == [b"a", b".", b" Wait", b" ", b"b"]
    assert segment(ids, vocabulary, "reflection") == ([(0, 2), (2, 5), (5, 5)], True)


def test_auto_takes_tags_and_else_paragraphs():
    tags = b"a\n\nb<episode_1>c</episode_1>\n\nd"
    assert split(*one_byte_tokens(tags), episode_format="auto") == split(*one_byte_tokens(tags), episode_format="tags")
    paragraphs = b"a\n\nb</think>c"
    assert split(*one_byte_tokens(paragraphs), episode_format="auto") == ([b"a\n\n", b"b", b"</think>c"], True)


def test_unknown_format_is_refused():
    with pytest.raises(ValueError, match="lines.*"):
        segment([0], [b"a"], "lines")


# ----- properties -----

_SNIPPETS = [
    b"<episode_1>", b"</episode_1>", b"<episode_22>", b"</episode_3>", b"<think>", b"</think>", b"\n\n", b"\n",
    b" ", b"a", b"Wait", b". Wait", b"\nHmm ", b"\xf0\x9f", b"\x99\x82", b"\xff", b"<epis", b"ode_1>", b"</", b">",
    b"", b"4",
]  # fmt: skip


def random_pieces(source: random.Random) -> list[bytes]:
    """Marks, parts of marks and raw bytes, cut at random places into tokens, some of them without bytes."""
    text = b"".join(
        source.choice(_SNIPPETS) if source.random() < 0.9 else source.randbytes(3) for _ in range(source.randrange(25))
    )
    pieces, position = [], 0
    while position < len(text) or source.random() < 0.2:
        length = source.choice([0, 1, 1, 2, 3, 5, 12])
        pieces.append(text[position : position + length])
        position += length
    return pieces


@pytest.mark.parametrize("episode_format", FORMATS)
def test_spans_are_ordered_disjoint_and_cover_every_token(episode_format):
    source = random.Random(0)
    for _ in range(1500):
        pieces, max_episodes = random_pieces(source), source.choice([1, 2, 3, 30])
        spans, _ = segment(range(len(pieces)), pieces, episode_format, max_episodes)
        assert 1 <= len(spans) <= max_episodes + 1
        assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])], pieces
        assert spans[-1][1] == len(pieces)
        assert all(start < end for start, end in spans[:-1]), pieces  # no empty episode
        text = b"".join(pieces)
        assert len(spans) > 1 or text.startswith(b"</think>") or not text  # no episode only where nothing is reasoned


def test_tags_equal_a_walk_over_the_bytes():
    source = random.Random(1)
    num_marked = 0
    for _ in range(3000):
        pieces, max_episodes = random_pieces(source), source.choice([1, 2, 3, 30])
        if not pieces:
            continue
        expected = literal.tag_spans(pieces, max_episodes)
        assert segment(range(len(pieces)), pieces, "tags", max_episodes) == expected, pieces
        num_marked += expected[1]
    assert num_marked > 1000


def test_splitting_tokens_does_not_move_borders_in_the_bytes():
    # Borders depend on the text, tokens only round them: with one-byte tokens they are exact for any tokenisation.
    source = random.Random(2)
    for _ in range(500):
        pieces = random_pieces(source)
        text = b"".join(pieces)
        if not text:
            continue
        coarse, _ = segment(range(len(pieces)), pieces)
        exact, _ = segment(range(len(text)), one_byte_tokens(text))
        exact_ends = {end for _, end in exact}
        for _, end in coarse[:-1]:
            token_end = len(b"".join(pieces[:end]))
            token_start = token_end - len(pieces[end - 1]) if end < len(pieces) else 0
            assert any(token_start <= exact_end <= token_end for exact_end in exact_ends)


def test_nothing_is_encoded_again(byte_level, monkeypatch):
    # Sampled ids need not be what encoding their text gives: "</" + "\n\n" here come as single characters.
    vocabulary = token_bytes(byte_level)
    single = {vocabulary[index]: index for index in range(256)}
    ids = [single[bytes([byte])] for byte in b"<episode_1>a</episode_1>\n\n<episode_2>b</episode_2>4"]
    encoded = byte_level(byte_level.decode(ids))["input_ids"]
    assert encoded != ids and len(encoded) < len(ids)
    assert segment(ids, vocabulary) == ([(0, 24), (24, 50), (50, 51)], True)

    def refuse(*args, **kwargs):
        raise AssertionError("text was encoded or decoded")

    for name in ("encode", "decode", "__call__", "batch_decode", "tokenize"):
        monkeypatch.setattr(type(byte_level), name, refuse)
    # Invalid UTF-8, which no decoded text could carry.
    broken = [single[bytes([byte])] for byte in b"<episode_1>\xff\xf0\x9f</episode_1>\xe2"]
    assert segment(broken, token_bytes(byte_level)) == ([(0, 26), (26, 27)], True)
