"""What the demonstration checkpoint is asked: lines, receipts, questions about them, two images, and look-ups in text.

Every task has levels of difficulty for training; the last one is what is measured. A sample's text, receipt or list is
from the held-out part, chosen by checksum, or from the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random

from exaone_export.demo.receipts import LINES, Receipt, layout, random_receipt
from exaone_export.demo.render import GRID, HEIGHTS, Page, line_page, random_height, random_style
from exaone_export.demo.texts import CODE_LETTERS, KINDS, LONGEST, is_held_out, random_text

EVERYTHING = (*KINDS, "pair", "pair", "code")  # letters need more practice than digits
READ = ("Read the text.", "Read the text.", "What does the image say?", "Read this.", "What is written here?")
READ_KOREAN = "글을 읽어 줘."
RECEIPT = "Read the receipt as JSON."
ORDINALS = (("first", "첫째는?"), ("second", "둘째는?"))
LOOKUPS = ("line", "where", "where", "price", "price")  # no lucky guesses; the first two are steps to the third
QUESTIONS = ("total", "items", "line", "where", "price", "price")
WINDOW = 32  # tokens a window layer sees
ENTRY = 7  # tokens of a list's entry, at least
SHARED_WIDTHS = (4 * GRID, 6 * GRID, 9 * GRID)  # of two images, so that there are few pairs of sizes


@dataclass(frozen=True)
class Exercise:
    """One thing to ask, and the right answer.

    Attributes:
        task: a key of `TASKS`.
        kind: what sort of line or question.
        prompt: the user's text, after the images.
        pages: the images.
        answer: what the model has to say, character for character.
        reasoning: what it has to say before, where reasoning is on.
    """

    task: str
    kind: str
    prompt: str
    pages: tuple[Page, ...]
    answer: str
    reasoning: str


@dataclass(frozen=True)
class Level:
    """How hard: kinds, longest line and heights of lines; lines of a receipt, questions; entries of a list; drawing."""

    kinds: tuple[str, ...] = EVERYTHING
    longest: int = LONGEST
    heights: tuple[int, ...] = HEIGHTS
    lines: tuple[int, int] = LINES
    questions: tuple[str, ...] = QUESTIONS
    entries: tuple[int, int] = (8, 16)
    loose: bool = True
    varied: bool = False


def _line(rng: Random, held_out: bool, level: Level) -> tuple[str, Page]:
    while True:
        text = random_text(rng, rng.choice(level.kinds), held_out, level.longest)
        style = random_style(rng, text, random_height(rng, level.heights))
        if style is not None:
            return text, line_page(text, style)


def line_exercise(rng: Random, held_out: bool, level: Level) -> Exercise:
    """Read the line an image shows."""
    text, page = _line(rng, held_out, level)
    prompt = READ_KOREAN if rng.random() < 0.1 else rng.choice(READ)
    return Exercise("line", "line", prompt, (page,), text, "The image shows one line.")


def copy_exercise(rng: Random, held_out: bool, level: Level) -> Exercise:
    """Repeat a line; no image."""
    text = random_text(rng, rng.choice(level.kinds), held_out, level.longest)
    return Exercise("copy", "copy", f"Repeat: {text}", (), text, "The line says it.")


def _receipt(rng: Random, held_out: bool, level: Level) -> tuple[Receipt, Page, str]:
    while True:
        receipt = random_receipt(rng, held_out, level.lines)
        page = layout(rng, receipt, level.loose)
        if page is not None:
            return receipt, page, f"The image shows a receipt of {len(receipt.lines)} lines."


def receipt_exercise(rng: Random, held_out: bool, level: Level) -> Exercise:
    """A receipt as JSON."""
    receipt, page, reasoning = _receipt(rng, held_out, level)
    return Exercise("receipt", f"{len(receipt.lines)} lines", RECEIPT, (page,), receipt.json(), reasoning)


def question_exercise(rng: Random, held_out: bool, level: Level) -> Exercise:
    """A kind of `QUESTIONS` about a receipt; one time in ten asked in Korean."""
    receipt, page, reasoning = _receipt(rng, held_out, level)
    kind, korean = rng.choice(level.questions), rng.random() < 0.1
    number = len(receipt.items) if kind == "total" else rng.randrange(len(receipt.items))
    name, amount = receipt.lines[number]
    if kind != "items":
        reasoning = f"The line says {name} {amount}"
    asked = {
        "total": ("What is the total?", "합계는?"),
        "items": ("What is the number of items?", "몇 개?"),
        "line": (f"What is the price in line {number + 1}?", f"{number + 1}줄 가격은?"),
        "where": (f"What is the line of {name}?", f"{name} 몇 줄?"),
        "price": (f"What is the price of {name}?", f"{name} 가격은?"),
    }
    answer = {"items": str(len(receipt.items)), "where": str(number + 1)}.get(kind, amount)
    return Exercise("question", kind, asked[kind][korean], (page,), answer, reasoning)


def _widened(rng: Random, held_out: bool, level: Level) -> tuple[str, Page]:
    while True:
        text, page = _line(rng, held_out, level)
        width = next((width for width in SHARED_WIDTHS if width >= page.width), None)
        if width is not None:
            return text, replace(page, width=width)


def two_exercise(rng: Random, held_out: bool, level: Level) -> Exercise:
    """Two images with a line each: read the first or the second."""
    (first, left), (second, right) = _widened(rng, held_out, level), _widened(rng, held_out, level)
    asked = rng.randrange(2)
    english, korean = ORDINALS[asked]
    prompt = korean if rng.random() < 0.1 else f"Read the {english} image."
    return Exercise("two", english, prompt, (left, right), (first, second)[asked], "There are two images.")


def _digits(rng: Random, length: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(length))


def find_exercise(rng: Random, held_out: bool, level: Level) -> Exercise:
    """The value that stands beside a key in a list, farther back than the window wherever the list is long enough."""
    while True:
        count = rng.randint(*level.entries)
        keys = rng.sample([letter + digit for letter in CODE_LETTERS.lower() for digit in "23456789"], count)
        entries = [f"{key}={_digits(rng, rng.randint(3, 5))}" for key in keys]
        text = "\n".join(entries)
        if is_held_out(text) == held_out:
            break
    far = max(1, count - -(-WINDOW // ENTRY))
    at = rng.randrange(far)
    answer = entries[at].partition("=")[2]
    prompt = f"{text}\nWhat is the value of {keys[at]}?"
    return Exercise("find", f"{count} entries", prompt, (), answer, f"The line says {entries[at]}")


TASKS: Mapping[str, Callable[[Random, bool, Level], Exercise]] = {
    "line": line_exercise,
    "copy": copy_exercise,
    "receipt": receipt_exercise,
    "question": question_exercise,
    "two": two_exercise,
    "find": find_exercise,
}
_RECEIPTS = (
    Level(lines=(2, 2), loose=False),
    Level(lines=(2, 3), loose=False),
    Level(lines=(2, 4), loose=False),
    Level(loose=False),
    Level(lines=(2, 4)),
    Level(),
    Level(varied=True),
)
_QUESTIONS = (
    Level(lines=(3, 4), loose=False, questions=LOOKUPS),
    Level(lines=(3, 5), loose=False, questions=LOOKUPS),
    Level(lines=(3, 5), questions=LOOKUPS),
    Level(varied=True),
)
LEVELS: Mapping[str, tuple[Level, ...]] = {
    "line": (
        Level(("number",), 4, HEIGHTS[:1]),
        Level(EVERYTHING, 8, HEIGHTS[:1]),
        Level(EVERYTHING, 16, HEIGHTS[:2]),
        Level(),
        Level(varied=True),
    ),
    "copy": (Level(),),
    "receipt": _RECEIPTS,
    "question": _QUESTIONS,
    "two": (
        Level(longest=8, heights=(GRID,)),
        Level(longest=12, heights=(GRID,)),
        Level(longest=12, heights=(GRID,), varied=True),
    ),
    "find": (Level(entries=(2, 4)), Level(entries=(2, 8)), Level(entries=(4, 12)), Level()),
}


def exercise(rng: Random, task: str, held_out: bool, level: int = -1) -> Exercise:
    """One exercise of a task (a key of `TASKS`), at the hardest level unless told, held out or not."""
    return TASKS[task](rng, held_out, LEVELS[task][level])
