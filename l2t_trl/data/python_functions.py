"""
A seeded world of small Python functions to write, each with tests.

A task names a function, says what it returns, and gives one example. Tasks come in kinds; each kind draws parameters, so
that there are many tasks of a kind and none is like another. Expected values come from `reference`, which computes them
here; `solution` is a program written in another way, which a test runs in the sandbox. Standard library only.
"""

import random
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple


SPLITS = ("train", "test")
# One task in ten is held out.
TEST_SHARE_INVERSE = 10
NUM_TESTS = 6
# So many draws in a row without a new task: there are hardly any more.
MAX_MISSES = 5000
WORDS = (
    "amber bat cedar dune eel fig grove harbour iris jade kiln lime moss noon oak plum quartz reed sun tide".split()
)


class Kind(NamedTuple):
    """
    A kind of tasks.

    Attributes:
        name (`str`): of the kind and of its functions.
        arguments (`str`): names of the arguments.
        text (`str`): what the function returns, with the parameters in braces.
        draw (`Callable`): draws the parameters.
        inputs (`Callable`): draws the arguments of one call.
        reference (`Callable`): the value expected for parameters and arguments.
        solution (`str`): body of the function, with the parameters as `@name`.
        edge (`tuple`): arguments of a call that every task's tests have.
    """

    name: str
    arguments: str
    text: str
    draw: Callable[[random.Random], dict[str, Any]]
    inputs: Callable[[random.Random], tuple]
    reference: Callable[..., Any]
    solution: str
    edge: tuple


def _numbers(rng: random.Random) -> tuple[list[int]]:
    return ([rng.randrange(-30, 60) for _ in range(rng.randrange(1, 9))],)


def _sentence(rng: random.Random) -> tuple[str]:
    return (" ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 7))),)


def _two_lists(rng: random.Random) -> tuple[list[int], list[int]]:
    return tuple([rng.randrange(12) for _ in range(rng.randrange(1, 9))] for _ in range(2))


def _rows(rng: random.Random) -> tuple[list[list[int]]]:
    width = rng.randrange(1, 5)
    return ([[rng.randrange(20) for _ in range(width)] for _ in range(rng.randrange(1, 5))],)


def _one(low: int, high: int) -> Callable[[random.Random], tuple[int]]:
    return lambda rng: (rng.randrange(low, high),)


def _shift(shift: int, text: str) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return text.translate(str.maketrans(letters, letters[shift:] + letters[:shift]))


def _sequence(first: int, second: int, p: int, q: int, n: int) -> int:
    terms = [first, second]
    while len(terms) <= n:
        terms.append(p * terms[-1] + q * terms[-2])
    return terms[n]


def _digits(base: int, n: int) -> list[int]:
    return [n % base, *(_digits(base, n // base) if n >= base else [])]


def _runs(limit: int, numbers: list[int]) -> int:
    marks = "".join("x" if number > limit else " " for number in numbers)
    return max(map(len, marks.split()), default=0)


KINDS = (
    Kind(
        "count_between",
        "numbers",
        "how many of the numbers in a list are divisible by {d} and larger than {low}",
        lambda rng: {"d": rng.randrange(2, 8), "low": rng.randrange(-10, 40)},
        _numbers,
        lambda numbers, d, low: len([n for n in numbers if n > low and n % d == 0]),
        "count = 0\nfor n in numbers:\n    if n > @low and not n % @d:\n        count += 1\nreturn count",
        ([],),
    ),
    Kind(
        "clamp_and_scale",
        "numbers",
        "the list of the numbers, each first limited to the range from {low} to {high} and then multiplied by {factor}",
        lambda rng: {"low": rng.randrange(-20, 10), "high": rng.randrange(11, 50), "factor": rng.randrange(2, 9)},
        _numbers,
        lambda numbers, low, high, factor: [factor * min(max(n, low), high) for n in numbers],
        "result = []\nfor n in numbers:\n    n = @low if n < @low else @high if n > @high else n\n"
        "    result.append(n * @factor)\nreturn result",
        ([],),
    ),
    Kind(
        "rotate_and_drop",
        "numbers",
        "the list rotated to the left by {shift} places (the first number goes to the end, {shift} times), without the "
        "numbers that are equal to {value}",
        lambda rng: {"shift": rng.randrange(1, 12), "value": rng.randrange(12)},
        lambda rng: ([rng.randrange(12) for _ in range(rng.randrange(1, 9))],),
        lambda numbers, shift, value: [
            n for n in (numbers[(k + shift) % len(numbers)] for k in range(len(numbers))) if n != value
        ],
        "for _ in range(@shift):\n    numbers = numbers[1:] + numbers[:1]\nreturn [n for n in numbers if n != @value]",
        ([],),
    ),
    Kind(
        "shift_letters",
        "text",
        "the text with every lower-case letter replaced by the one {shift} places later in the alphabet (behind z comes a "
        "again) and every {old!r} that was there before replaced by {new!r}",
        lambda rng: {"shift": rng.randrange(1, 26), "old": " ", "new": rng.choice("_-.+/:*")},
        _sentence,
        lambda text, shift, old, new: _shift(shift, text).replace(old, new),
        'result = ""\nfor c in text:\n    if c == @old:\n        result += @new\n    elif "a" <= c <= "z":\n'
        "        result += chr((ord(c) - 97 + @shift) % 26 + 97)\n    else:\n        result += c\nreturn result",
        ("",),
    ),
    Kind(
        "reverse_long_words",
        "text",
        "the text with every word (words are separated by single spaces) of at least {length} letters reversed and the "
        "letter {letter!r} removed from the others",
        lambda rng: {"length": rng.randrange(2, 7), "letter": rng.choice("aeiourmdn")},
        _sentence,
        lambda text, length, letter: " ".join(
            word[::-1] if len(word) >= length else word.replace(letter, "") for word in text.split(" ")
        ),
        'words = []\nfor word in text.split(" "):\n    if len(word) < @length:\n'
        '        words.append("".join(c for c in word if c != @letter))\n    else:\n'
        '        words.append("".join(reversed(word)))\nreturn " ".join(words)',
        ("",),
    ),
    Kind(
        "letters_by_word",
        "text",
        "a dictionary from every different word of the text (words are separated by single spaces) that does not begin "
        "with {letter!r} to {factor} times its length",
        lambda rng: {"letter": rng.choice("abcdefghijklmnopqrst"), "factor": rng.randrange(2, 12)},
        _sentence,
        lambda text, letter, factor: {
            word: factor * len(word) for word in text.split(" ") if not word.startswith(letter)
        },
        "result = {}\nfor word in text.split(' '):\n    if word[:1] != @letter:\n        result[word] = len(word) * @factor\n"
        "return result",
        ("",),
    ),
    Kind(
        "sequence_term",
        "n",
        "term n of the sequence that begins with {first} (term 0) and {second} (term 1), and in which every later term is "
        "{p} times the one before it plus {q} times the one before that",
        lambda rng: {
            "first": rng.randrange(4),
            "second": rng.randrange(1, 6),
            "p": rng.randrange(1, 4),
            "q": rng.randrange(1, 4),
        },
        _one(0, 14),
        lambda n, first, second, p, q: _sequence(first, second, p, q, n),
        "a, b = @first, @second\nfor _ in range(n):\n    a, b = b, @p * b + @q * a\nreturn a",
        (0,),
    ),
    Kind(
        "digit_sum",
        "n",
        "the sum of the digits of the whole number n (0 or larger) written in base {base}, modulo {modulus}",
        lambda rng: {"base": rng.randrange(2, 13), "modulus": rng.randrange(3, 40)},
        _one(1, 5000),
        lambda n, base, modulus: sum(_digits(base, n)) % modulus,
        "total = 0\nwhile n:\n    n, digit = divmod(n, @base)\n    total += digit\nreturn total % @modulus",
        (0,),
    ),
    Kind(
        "grade",
        "points",
        "'high' if points are at least {high}, 'middle' if they are at least {low} but less than that, 'low' if they are "
        "at least 0 but less than that, and None if they are negative",
        lambda rng: {"low": rng.randrange(10, 50), "high": rng.randrange(50, 90)},
        _one(-20, 110),
        lambda points, low, high: (
            None if points < 0 else ("low", "middle", "high")[(points >= low) + (points >= high)]
        ),
        "if points < 0:\n    return None\nif points < @low:\n    return 'low'\nif points < @high:\n    return 'middle'\n"
        "return 'high'",
        (0,),
    ),
    Kind(
        "common_numbers",
        "first, second",
        "the {count} largest of the numbers that are in both lists, each once and in descending order, without multiples "
        "of {d}; all of them if there are fewer",
        lambda rng: {"count": rng.randrange(1, 6), "d": rng.randrange(2, 9)},
        _two_lists,
        lambda first, second, count, d: sorted({n for n in {*first} & {*second} if n % d}, reverse=True)[:count],
        "result = []\nfor n in sorted(first)[::-1]:\n    if n in second and n not in result and n % @d:\n"
        "        result.append(n)\nreturn result[:@count]",
        ([], [1]),
    ),
    Kind(
        "column_sums",
        "rows",
        "the list of the sums of the columns of a table, which is given as a list of rows of equal length, each sum "
        "multiplied by {factor} and reduced by {offset}",
        lambda rng: {"factor": rng.randrange(2, 12), "offset": rng.randrange(1, 30)},
        _rows,
        lambda rows, factor, offset: [factor * sum(column) - offset for column in zip(*rows, strict=True)],
        "if not rows:\n    return []\nsums = [0] * len(rows[0])\nfor row in rows:\n    for k, n in enumerate(row):\n"
        "        sums[k] += n\nreturn [@factor * n - @offset for n in sums]",
        ([],),
    ),
    Kind(
        "longest_run",
        "numbers",
        "the length of the longest run of neighbouring numbers in the list that are all larger than {limit}, plus {extra}",
        lambda rng: {"limit": rng.randrange(-15, 35), "extra": rng.randrange(10)},
        _numbers,
        lambda numbers, limit, extra: _runs(limit, numbers) + extra,
        "best = run = 0\nfor n in numbers:\n    run = run + 1 if n > @limit else 0\n    best = max(best, run)\n"
        "return best + @extra",
        ([],),
    ),
    Kind(
        "frequent_words",
        "text",
        "the alphabetically sorted list of the different words of the text (words are separated by single spaces) that "
        "occur at least {times} times or have exactly {length} letters",
        lambda rng: {"times": rng.randrange(2, 5), "length": rng.randrange(3, 8)},
        lambda rng: (" ".join(rng.choice(WORDS[:8]) for _ in range(rng.randrange(2, 12))),),
        lambda text, times, length: sorted(
            word for word, count in Counter(text.split(" ")).items() if count >= times or len(word) == length
        ),
        "words = text.split(' ')\nreturn sorted({w for w in words if words.count(w) >= @times or len(w) == @length})",
        ("oak",),
    ),
)


def make_functions(size: int, seed: int, split: str) -> list[dict[str, str]]:
    """
    Make tasks, the kinds in turn.

    Args:
        size (`int`):
            Number of tasks. A kind that has no further parameters is passed over.
        seed (`int`):
            Seed of parameters and tests.
        split (`str`):
            `"train"` or `"test"`; which one a task belongs to depends on its kind and parameters alone.

    Returns:
        `list[dict[str, str]]`: rows with `question`, `tests`, `solution` and `kind`, no two alike.

    Raises:
        ValueError: if there is no such split, or if there are not so many tasks.
    """
    if split not in SPLITS:
        raise ValueError(f"got split={split!r}; set one of {', '.join(SPLITS)}")
    rng = random.Random(f"{seed} {split}")
    rows, seen, turn, num_misses = [], set(), 0, 0
    while len(rows) < size:
        kind = KINDS[turn % len(KINDS)]
        turn += 1
        parameters = kind.draw(rng)
        key = f"{kind.name} {sorted(parameters.items())}"
        if key in seen or split_of(key) != split:
            num_misses += 1
            if num_misses > MAX_MISSES:
                raise ValueError(f"got size={size}; set less, there are about {len(rows)} tasks of the split {split}")
            continue
        num_misses = 0
        seen.add(key)
        rows.append(_row(kind, parameters, rng))
    return rows


def split_of(key: str) -> str:
    """Return the split that a task belongs to."""
    return "test" if zlib.crc32(key.encode()) % TEST_SHARE_INVERSE == 0 else "train"


def _row(kind: Kind, parameters: dict[str, Any], rng: random.Random) -> dict[str, str]:
    calls = [kind.edge, *(kind.inputs(rng) for _ in range(NUM_TESTS - 1))]
    values = [kind.reference(*call, **parameters) for call in calls]
    called = [f"{kind.name}({', '.join(map(repr, call))})" for call in calls]
    body = kind.solution
    # Longest first: no name is read as the beginning of another.
    for name in sorted(parameters, key=len, reverse=True):
        body = body.replace(f"@{name}", repr(parameters[name]))
    indented = "".join(f"    {line}\n" for line in body.splitlines())
    return {
        "question": (
            f"Write a Python function {kind.name}({kind.arguments}) that returns {kind.text.format(**parameters)}. For "
            f"example, {called[-1]} is {values[-1]!r}."
        ),
        "tests": "".join(f"assert {call} == {value!r}\n" for call, value in zip(called, values, strict=True)),
        "solution": f"def {kind.name}({kind.arguments}):\n{indented}",
        "kind": kind.name,
    }
