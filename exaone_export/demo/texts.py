"""Short lines to render: words, numbers, prices, dates, times, codes and labels."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

LONGEST = 16
CODE_LETTERS = "ABCDEFGHJKLMNPQRTUVWXY"  # without I, O, S and Z, which look like digits
LABELS = ("Total", "No.", "Room", "Gate", "Item", "Page", "Line", "Tel.", "Size", "Order")


@cache
def words() -> tuple[str, ...]:
    """The lexicon, lower case."""
    return tuple(Path(__file__).with_name("words.txt").read_text(encoding="ascii").split())


def is_held_out(text: str) -> bool:
    """Whether a line is kept from training: one line in sixteen, chosen by its checksum."""
    return zlib.crc32(text.encode()) % 16 == 0


def _cased(rng: Random, word: str) -> str:
    return rng.choice((word, word, word.capitalize(), word.upper()))


def _word(rng: Random) -> str:
    return _cased(rng, rng.choice(words()))


def _pair(rng: Random) -> str:
    first, second = rng.choice(words()), rng.choice(words())
    style = rng.randrange(4)
    if style == 0:
        return f"{first} {second}"
    if style == 1:
        return f"{first.capitalize()} {second.capitalize()}"
    if style == 2:
        return f"{first.upper()} {second.upper()}"
    return f"{first.capitalize()}, {second}!" if rng.random() < 0.3 else f"{first.capitalize()} {second}"


def _digits(rng: Random, length: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(length))


def _number(rng: Random) -> str:
    return _digits(rng, rng.randint(1, 8))


def _price(rng: Random) -> str:
    whole = str(rng.randint(0, 10 ** rng.randint(1, 4) - 1))
    return rng.choice(("${}.{}", "{}.{}", "${}.{}", "{}.{}%")).format(whole, _digits(rng, 2))


def _date(rng: Random) -> str:
    year, month, day = rng.randint(1990, 2035), rng.randint(1, 12), rng.randint(1, 28)
    style = rng.randrange(3)
    if style == 0:
        return f"{year}-{month:02}-{day:02}"
    return f"{day:02}.{month:02}.{year}" if style == 1 else f"{month}/{day}/{year}"


def _time(rng: Random) -> str:
    shown = f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    return shown if rng.random() < 0.6 else f"{shown}:{rng.randint(0, 59):02}"


def _code(rng: Random) -> str:
    letters = "".join(rng.choice(CODE_LETTERS) for _ in range(rng.randint(1, 4)))
    style = rng.randrange(3)
    if style == 0:
        return f"{letters}-{_digits(rng, rng.randint(2, 6))}"
    if style == 1:
        return letters + _digits(rng, rng.randint(1, 4)) + rng.choice(CODE_LETTERS)
    return f"#{_digits(rng, rng.randint(2, 5))}-{letters}"


def _label(rng: Random) -> str:
    label = rng.choice(LABELS)
    if label == "Total":
        return f"Total: {_price(rng)}"
    return f"{label} {_digits(rng, rng.randint(1, 5))}"


KINDS: dict[str, Callable[[Random], str]] = {
    "word": _word,
    "pair": _pair,
    "number": _number,
    "price": _price,
    "date": _date,
    "time": _time,
    "code": _code,
    "label": _label,
}


def random_text(rng: Random, kind: str, held_out: bool, longest: int = LONGEST) -> str:
    """A line of one kind (a key of `KINDS`) of at most `longest` characters; from the held-out part or the rest."""
    make = KINDS[kind]
    while True:
        text = make(rng)
        if len(text) <= longest and is_held_out(text) == held_out:
            return text
