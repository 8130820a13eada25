"""Texts and images of the demonstration: bounded, reproducible, and split as the figures say."""

from random import Random

import numpy as np
import pytest

from exaone_export.demo.render import HEIGHTS, WIDTHS, LineStyle, centres, coverage, random_style, render_line
from exaone_export.demo.texts import KINDS, LONGEST, is_held_out, random_text, words


@pytest.mark.parametrize("kind", KINDS)
def test_lines_are_short_printable_and_split(kind: str) -> None:
    rng = Random(1)
    for held_out in (True, False):
        texts = [random_text(rng, kind, held_out) for _ in range(50)]
        assert all(0 < len(text) <= LONGEST and text.isascii() and text.isprintable() for text in texts)
        assert all(is_held_out(text) is held_out for text in texts)


def test_lexicon_has_no_word_twice_and_none_a_phrase_begins_with() -> None:
    assert len(set(words())) == len(words()) > 400
    assert not [word for word in words() if word.startswith(("re", "wh", "th"))]


def test_styles_fit_their_image() -> None:
    rng = Random(2)
    for _ in range(200):
        text = random_text(rng, rng.choice(list(KINDS)), held_out=False)
        style = random_style(rng, text, rng.choice(HEIGHTS))
        assert style is not None
        assert style.width in WIDTHS
        assert style.height in HEIGHTS
        places = centres(text, style)
        assert places == sorted(places)
        assert 0 < places[0] <= places[-1] < style.width


def test_rendering_is_ink_on_paper() -> None:
    style = LineStyle(112, 28, 20, 4, 1, paper=(250, 250, 250), ink=(10, 20, 30))
    pixels = np.array(render_line("AB12", style))
    assert pixels.shape == (28, 112, 3)
    assert tuple(pixels[0, -1]) == (250, 250, 250)
    assert (pixels == np.array((10, 20, 30))).all(-1).any()
    assert np.array_equal(np.array(coverage("AB12", style)), np.array(coverage("AB12", style)))
