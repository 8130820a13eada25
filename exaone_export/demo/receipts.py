"""Receipts of two to five lines: what they say, as JSON, and how they are laid out."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from exaone_export.demo.render import GRID, Page, Piece, font, text_width
from exaone_export.demo.texts import is_held_out, words

LONGEST_NAME = 8
WIDTHS = (5 * GRID, 6 * GRID, 7 * GRID)
GAP = 10  # pixels between a name and its price, at least
LINES = (2, 5)
TOTAL = "Total"


@dataclass(frozen=True)
class Receipt:
    """Names and prices as they are printed; the last line is the total."""

    items: tuple[tuple[str, str], ...]

    @property
    def total(self) -> str:
        """The sum as it is printed."""
        return price(sum(round(100 * float(amount)) for _, amount in self.items))

    @property
    def lines(self) -> tuple[tuple[str, str], ...]:
        """What is printed: the items, then the total."""
        return (*self.items, (TOTAL, self.total))

    def json(self) -> str:
        """The lines as one JSON object, without spaces."""
        return "{" + ",".join(f'"{name}":{amount}' for name, amount in self.lines) + "}"


def price(cents: int) -> str:
    """An amount as it is printed."""
    return f"{cents // 100}.{cents % 100:02}"


def _name(rng: Random, case: int) -> str:
    while True:
        word = rng.choice(words())
        if len(word) <= LONGEST_NAME and word != TOTAL.lower():
            return (word.capitalize(), word, word.upper())[case]


def _amount(rng: Random) -> str:
    return price(rng.randint(5, 999) if rng.random() < 0.6 else rng.randint(1000, 9999))


def random_receipt(rng: Random, held_out: bool, lines: tuple[int, int] = LINES) -> Receipt:
    """A receipt of as many lines, the total included; from the held-out part or the rest."""
    while True:
        case, count = rng.choice((0, 0, 1, 2)), rng.randint(*lines) - 1
        names: list[str] = []
        while len(names) < count:
            name = _name(rng, case)
            if name not in names:
                names.append(name)
        receipt = Receipt(tuple((name, _amount(rng)) for name in names))
        if is_held_out(receipt.json()) == held_out:
            return receipt


def layout(rng: Random, receipt: Receipt, loose: bool = True) -> Page | None:
    """Names on the left, prices on the right, or None where a line fits no width of `WIDTHS`.

    Args:
        rng: source of sizes, places and greys.
        receipt: what to print.
        loose: whether lines may lie anywhere; else every line has its own row of image tokens.
    """
    size = rng.randint(18, 20)
    needed = max(text_width(name, size) + text_width(amount, size) for name, amount in receipt.lines) + GAP + 6
    fitting = [width for width in WIDTHS if width >= needed]
    if not fitting:
        return None
    width = fitting[min(int(rng.expovariate(1.5)), len(fitting) - 1)]
    ascent, descent = font(size).getmetrics()
    pitch, first = GRID, rng.randint(-2, GRID - ascent - descent)
    if loose:
        pitch, first = rng.randint(GRID, GRID + 4), rng.randint(-2, GRID // 2)
    bottom = first + pitch * (len(receipt.lines) - 1) + ascent + descent
    height = -(-(bottom - 2) // GRID) * GRID
    left, right = rng.randint(1, 5), width - rng.randint(2, 5)
    pieces: list[Piece] = []
    for number, (name, amount) in enumerate(receipt.lines):
        top = first + pitch * number
        pieces += [Piece(name, left, top), Piece(amount, round(right - text_width(amount, size)), top)]
    paper, ink = rng.randint(225, 255), rng.randint(0, 90)
    return Page(width, height, size, tuple(pieces), (paper,) * 3, (ink,) * 3)
