"""Draws the images bundled with the demonstration checkpoint; none of their lines is in the training set."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from exaone_export.demo.render import LineStyle, render_line

# One to three rows of image tokens, one to three windows across, and one image that the processor has to resize.
LINES = {
    "total.png": ("Total: $24.53", LineStyle(196, 28, 20, 16, 1, (250,) * 3, (20,) * 3)),
    "date.png": ("2005-05-14", LineStyle(168, 28, 19, 12, 2, (255,) * 3, (0,) * 3)),
    "words.png": ("snow poem", LineStyle(168, 56, 22, 20, 12, (240,) * 3, (40,) * 3)),
    "galaxy.png": ("GALAXY", LineStyle(140, 28, 18, 9, 3, (245,) * 3, (60,) * 3)),
    "code.png": ("TNV-622540", LineStyle(224, 84, 24, 30, 24, (255,) * 3, (10,) * 3)),
    "room.png": ("Room 547", LineStyle(150, 30, 20, 14, 2, (255, 250, 235), (20, 30, 90))),
}


def main() -> None:
    """Writes the images and expected.json into FOLDER."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, (text, style) in LINES.items():
        render_line(text, style).save(folder / name, optimize=True)
    expected = {name: text for name, (text, _) in LINES.items()}
    (folder / "expected.json").write_text(json.dumps(expected, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
