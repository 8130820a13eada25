"""Progress bars: drawn on a terminal only, with rate and remaining time."""

from __future__ import annotations

import io

from exaone_export.progress import BarProgress, choose_progress
from model.progress import NullProgress, Progress, beside


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _go(progress: Progress, unit: str) -> None:
    progress.start("writing decoder", 2e9, unit)
    progress.advance(5e8)
    progress.advance(1.5e9)
    progress.finish()
    progress.finish()


def test_only_terminals_get_bars() -> None:
    assert isinstance(choose_progress(wanted=True, stream=Terminal()), BarProgress)
    assert isinstance(choose_progress(wanted=False, stream=Terminal()), NullProgress)
    assert isinstance(choose_progress(wanted=True, stream=io.StringIO()), NullProgress)


def test_bytes_are_shown_as_sizes() -> None:
    stream = Terminal()
    _go(BarProgress(stream), "bytes")
    assert "writing decoder" in stream.getvalue()
    assert "2.0/2.0 GB" in stream.getvalue()


def test_counts_are_shown_as_counts() -> None:
    stream = Terminal()
    progress = BarProgress(stream)
    progress.start("tracing", 4, "layers")
    progress.advance(4)
    progress.start("next step without a total", 0, "tensors")
    progress.finish()
    assert "4/4" in stream.getvalue()
    assert "next step" in stream.getvalue()


def test_two_things_at_the_same_time() -> None:
    stream = Terminal()
    progress = BarProgress(stream)
    weights = beside(progress)
    weights.start("downloading weights", 5e9, "bytes")
    for graph in ("embedding", "decoder"):
        progress.start(f"writing {graph}", 3, "tensors")
        weights.advance(2.5e9)
        progress.advance(3)
    progress.finish()
    weights.finish()
    last = stream.getvalue().rpartition("downloading weights")[2]
    assert "5.0/5.0 GB" in last
    assert "writing embedding" in last
    assert "3/3" in last.partition("writing decoder")[2]


def test_what_shows_one_thing_is_silent_about_a_second() -> None:
    class One(NullProgress):
        pass

    assert isinstance(beside(One()), NullProgress)


def test_silence_accepts_the_same_calls() -> None:
    _go(NullProgress(), "bytes")
    assert isinstance(NullProgress(), object)
