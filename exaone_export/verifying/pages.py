"""Documents drawn for the built-in prompts: lines of text on paper."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_PAPER, _INK = (250, 248, 240), (20, 20, 60)


def draw_page(lines: Sequence[str], size: int) -> Image.Image:
    """A picture with lines of text, as wide as the longest one with its margins.

    Args:
        lines: top to bottom; Pillow's built-in font has Latin letters only.
        size: of the font, in pixels.
    """
    font = ImageFont.load_default(size)
    step = size + size // 2
    width = max(font.getbbox(line)[2] for line in lines)
    image = Image.new("RGB", (int(width) + 2 * size, step * len(lines) + size), _PAPER)
    draw = ImageDraw.Draw(image)
    for row, line in enumerate(lines):
        draw.text((size, size // 2 + row * step), line, fill=_INK, font=font)
    return image
