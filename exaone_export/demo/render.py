"""Renders lines and receipts with Pillow's built-in scalable font, as the demonstration checkpoint was trained."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random

from PIL import Image, ImageDraw, ImageFont

GRID = 28  # sides that are multiples of this are not resized by the processor
WIDTHS = tuple(range(2 * GRID, 13 * GRID, GRID))
HEIGHTS = (GRID, 2 * GRID, 3 * GRID)
Color = tuple[int, int, int]


@dataclass(frozen=True)
class LineStyle:
    """How a line is drawn: image size, font size and top left corner of the text in pixels, colours."""

    width: int
    height: int
    font_size: int
    left: float
    top: float
    paper: Color = (255, 255, 255)
    ink: Color = (0, 0, 0)


@dataclass(frozen=True)
class Piece:
    """Text without a break and its top left corner in pixels."""

    text: str
    left: float
    top: float


@dataclass(frozen=True)
class Page:
    """Pieces of text on one image, in reading order; sizes in pixels."""

    width: int
    height: int
    font_size: int
    pieces: tuple[Piece, ...]
    paper: Color = (255, 255, 255)
    ink: Color = (0, 0, 0)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's built-in font (Aileron) at `size` pixels. OSError where Pillow was built without FreeType."""
    loaded = ImageFont.load_default(size=size)
    if not isinstance(loaded, ImageFont.FreeTypeFont):
        raise OSError("Pillow was built without FreeType, so its built-in font has only one size")
    return loaded


@cache
def advance(character: str, size: int) -> float:
    """Width of a character in pixels, kerning aside."""
    return font(size).getlength(character)


def text_width(text: str, size: int) -> float:
    """Width of a line in pixels."""
    return sum(advance(character, size) for character in text)


def random_height(rng: Random, heights: tuple[int, ...] = HEIGHTS) -> int:
    """The first height half of the time, else any of them."""
    return rng.choice(heights) if rng.random() < 0.5 else heights[0]


def font_sizes(height: int) -> tuple[int, int]:
    """Smallest and largest font used on an image of this height."""
    return (18, 20) if height == GRID else (20, 26)


def random_style(rng: Random, text: str, height: int) -> LineStyle | None:
    """Size, place and greys for a line, or None where it fits no width of `WIDTHS`."""
    size = rng.randint(*font_sizes(height))
    needed = text_width(text, size) + 4
    fitting = [width for width in WIDTHS if width >= needed]
    if not fitting:
        return None
    width = fitting[min(int(rng.expovariate(1.2)), len(fitting) - 1)]
    return placed(rng, text, size, width, height)


def placed(rng: Random, text: str, size: int, width: int, height: int) -> LineStyle:
    """A random place and random greys for a line that fits."""
    ascent, descent = font(size).getmetrics()
    # A few pixels above the tallest letter stay empty in this font, so the line may start above the edge.
    lowest = height - ascent - descent
    top = rng.uniform(min(-2.0, lowest), max(lowest, -2.0))
    left = rng.uniform(1, max(1.0, width - text_width(text, size) - 1))
    paper, ink = rng.randint(225, 255), rng.randint(0, 90)
    return LineStyle(width, height, size, round(left), round(top), (paper,) * 3, (ink,) * 3)


def line_page(text: str, style: LineStyle) -> Page:
    """The page that shows one line."""
    piece = Piece(text, style.left, style.top)
    return Page(style.width, style.height, style.font_size, (piece,), style.paper, style.ink)


def page_coverage(page: Page) -> Image.Image:
    """The ink of a page, mode "L": 0 is paper, 255 is ink."""
    image = Image.new("L", (page.width, page.height))
    draw = ImageDraw.Draw(image)
    for piece in page.pieces:
        draw.text((piece.left, piece.top), piece.text, fill=255, font=font(page.font_size))
    return image


def render_page(page: Page) -> Image.Image:
    """A page as an RGB image."""
    paper = Image.new("RGB", (page.width, page.height), page.paper)
    paper.paste(page.ink, mask=page_coverage(page))
    return paper


def coverage(text: str, style: LineStyle) -> Image.Image:
    """The ink of a line, mode "L": 0 is paper, 255 is ink."""
    return page_coverage(line_page(text, style))


def render_line(text: str, style: LineStyle) -> Image.Image:
    """A line of text as an RGB image."""
    return render_page(line_page(text, style))


def centres(text: str, style: LineStyle) -> list[float]:
    """Horizontal centre of each character of a line in pixels, for supervision while training."""
    return piece_centres(Piece(text, style.left, style.top), style.font_size)


def piece_centres(piece: Piece, font_size: int) -> list[float]:
    """Horizontal centre of each character of a piece in pixels."""
    found, at = [], piece.left
    for character in piece.text:
        width = advance(character, font_size)
        found.append(at + width / 2)
        at += width
    return found
