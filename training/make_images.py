"""Draws the images that the demonstration checkpoint is shown with; nothing on them is in the training set."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random
from typing import Any

from exaone_export.demo import INSTRUCTION
from exaone_export.demo.receipts import Receipt, layout
from exaone_export.demo.render import LineStyle, render_line, render_page
from exaone_export.demo.tasks import RECEIPT

# Chosen among such that the checkpoint gets right, float and quantized; how often it does is measured elsewhere.
# One to three rows of image tokens, one to three windows across, and one image that the processor has to resize.
LINES = {
    "total.png": ("Total: $24.53", LineStyle(196, 28, 20, 16, 1, (250,) * 3, (20,) * 3)),
    "date.png": ("2005-05-14", LineStyle(168, 28, 19, 12, 2, (255,) * 3, (0,) * 3)),
    "words.png": ("snow poem", LineStyle(168, 56, 22, 20, 12, (240,) * 3, (40,) * 3)),
    "galaxy.png": ("GALAXY", LineStyle(140, 28, 18, 9, 3, (245,) * 3, (60,) * 3)),
    "code.png": ("TNV-622540", LineStyle(224, 84, 24, 30, 24, (255,) * 3, (10,) * 3)),
    "room.png": ("Room 547", LineStyle(150, 30, 20, 14, 2, (255, 250, 235), (20, 30, 90))),
}
BOTH = ("date.png", "words.png")
BOUGHT = Receipt((("Coffee", "2.50"), ("Bread", "1.65"), ("Melon", "3.10")))
ASKED = 1  # which price
LAYOUT_SEED = 4
CODES = (
    *("h2=4833", "w9=87623", "v4=60129", "e2=0479", "n8=66972"),
    *("t7=027", "m5=6468", "k8=58969", "b5=0492", "q7=99139"),
)


def entry(task: str, images: list[str], prompt: str, answer: str, reasoning: str = "") -> dict[str, Any]:
    """One thing to ask; reasoning is on where there is any."""
    return {"task": task, "images": images, "prompt": prompt, "answer": answer, "reasoning": reasoning}


def entries() -> list[dict[str, Any]]:
    """All that is asked, and the right answers."""
    name, amount = BOUGHT.items[ASKED]
    key, value = CODES[0].split("=")
    price = f"What is the price of {name}?"
    return [
        *(entry("line", [image], INSTRUCTION, text) for image, (text, _) in LINES.items()),
        entry("receipt", ["receipt.png"], RECEIPT, BOUGHT.json()),
        entry("question", ["receipt.png"], price, amount),
        entry("question", ["receipt.png"], "What is the total?", BOUGHT.total, f"The line says Total {BOUGHT.total}"),
        entry("two", list(BOTH), "Read the second image.", LINES[BOTH[1]][0]),
        entry("find", [], "\n".join([*CODES, f"What is the value of {key}?"]), value),
    ]


def main() -> None:
    """Writes the images and expected.json into FOLDER."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, (text, style) in LINES.items():
        render_line(text, style).save(folder / name, optimize=True)
    page = layout(Random(LAYOUT_SEED), BOUGHT, loose=False)
    if page is None:
        raise SystemExit("the receipt fits no page")
    render_page(page).save(folder / "receipt.png", optimize=True)
    text = json.dumps(entries(), indent=2, ensure_ascii=False) + "\n"
    (folder / "expected.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
