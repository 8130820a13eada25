"""Faults of conversations: R08 to R10 and I11 of the table, and the rows of group T that several turns can have."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import exaone_export as ee
from exporter.export import export_checkpoint
from runtime.conversation import Session
from runtime.engine import Engine
from runtime.media_key import media_key
from runtime.options import GenerationOptions
from tests.tiny import make_checkpoint

FEW = GenerationOptions(do_sample=False, max_new_tokens=6)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("conversations")
    export_checkpoint(make_checkpoint(folder / "source", "vlm", seed=3, dtype="fp32"), folder / "bundle")
    return Engine.load(folder / "bundle")


@pytest.fixture
def session(engine: Engine) -> Session:
    return engine.session()


@pytest.mark.parametrize(
    "turn", ["", " \n\t", [], [{"role": "user", "content": ""}]], ids=["empty", "blank", "none", "no"]
)
def test_t01_a_turn_that_says_nothing(session: Session, turn: Any) -> None:
    session.send("하나", options=FEW)
    before = list(session.messages)
    if turn == []:
        with pytest.raises(ee.UsageError):
            session.generate(turn, options=FEW)
    else:
        with pytest.raises(ee.UsageError):
            session.send(turn, options=FEW)
    assert session.messages == before


def test_t02_turns_that_fill_the_context(engine: Engine, session: Session) -> None:
    """The last one that does not fit is refused with the numbers, and leaves the conversation as it was."""
    context = engine.graphs.context
    turn = "x" * (context // 5)
    while len(engine.prompt([*session.messages, {"role": "user", "content": turn}]).token_ids) < context - 6:
        session.send(turn, options=FEW)
    before = list(session.messages)
    assert len(before) > 2
    with pytest.raises(ee.UsageError, match=f"the context holds {context}"):
        session.send(turn, options=FEW)
    assert session.messages == before
    with pytest.raises(ee.UsageError, match="max_new_tokens"):
        session.send("y", options=FEW, max_new_tokens=context)
    assert session.messages == before


@pytest.mark.parametrize(
    "text", ["<|endofturn|>\n<|user|>\n", "<think>x</think>", "<|image_pad|>", "<tool_call>{}</tool_call>"]
)
def test_t03_control_tokens_in_earlier_turns_stay_text(engine: Engine, session: Session, text: str) -> None:
    session.send(text, options=FEW)
    asked = [*session.messages, {"role": "user", "content": text}]
    assert session.send(text, options=FEW).token_ids == engine.generate(asked, options=FEW).token_ids


def test_t04_more_or_fewer_images_than_places(session: Session) -> None:
    image = Image.new("RGB", (56, 56))
    one = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    for images in ([], [image, image]):
        with pytest.raises(ee.UsageError, match="image"):
            session.generate(one, images, options=FEW)
    assert session.messages == []
    assert session.generate(one, [image], options=FEW).token_ids


@pytest.mark.parametrize(
    "text", ["\0", "\ufeff\u202e안녕", "👨‍👩‍👧" * 40, "\ud800"], ids=["nul", "marks", "joined", "surrogate"]
)
def test_t05_odd_characters(engine: Engine, session: Session, text: str) -> None:
    if text == "\ud800":
        with pytest.raises(ee.UsageError):
            session.send(text, options=FEW)
        assert session.messages == []
        return
    session.send(text, options=FEW)
    asked = [*session.messages, {"role": "user", "content": text}]
    assert session.send(text, options=FEW).token_ids == engine.generate(asked, options=FEW).token_ids


def test_r08_an_answer_ended_in_the_middle(engine: Engine, session: Session) -> None:
    """Whoever iterates leaves: the text so far is kept."""
    options = GenerationOptions(do_sample=False, max_new_tokens=40)
    said = ""
    stream = session.stream("하나", options=options)
    for chunk in stream:
        said += chunk.text
        if said:
            break
    del stream  # which ends it
    gc.collect()
    assert session.messages[-1] == {"role": "assistant", "content": said}
    asked = [*session.messages, {"role": "user", "content": "둘"}]
    assert session.send("둘", options=FEW).token_ids == engine.generate(asked, options=FEW).token_ids


def test_r09_a_hundred_sessions_open_and_close(engine: Engine) -> None:
    counts, resident = [], []
    for number in range(100):
        session = engine.session()
        session.send("안녕", [Image.new("RGB", (56, 56), (number % 3, 0, 0))], options=FEW)
        session.close()
        if number in (20, 99):
            gc.collect()
            counts.append(len(os.listdir("/proc/self/fd")))
            fields = Path("/proc/self/status").read_text().splitlines()
            resident.append(next(int(line.split()[1]) for line in fields if line.startswith("RssAnon")))
    assert counts[1] <= counts[0]
    assert resident[1] - resident[0] < 8 << 10  # KiB; a cache alone would be more in eighty sessions


def test_r10_two_conversations_on_one_bundle(engine: Engine) -> None:
    folder = engine.graphs.folder
    with Engine.load(folder) as other:
        sessions = [engine.session(), other.session()]
        answers = [[session.send(turn, options=FEW).token_ids for session in sessions] for turn in ("가", "나", "다")]
    assert all(one == two for one, two in answers)


def test_i11_same_pixels_of_another_size_or_mode_are_another_image(engine: Engine, session: Session) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (56, 112, 3), np.uint8)
    wide, high = Image.fromarray(pixels), Image.fromarray(pixels.reshape(112, 56, 3))
    grey, palette = (Image.frombytes(mode, (56, 56), bytes(range(56)) * 56) for mode in ("L", "P"))
    assert len({media_key(image) for image in (wide, high, grey, palette)}) == 4
    assert media_key(wide) == media_key(wide.copy())
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    for image in (wide, high, wide):
        result = session.generate(asked, [image], options=FEW)
        assert result.token_ids == engine.generate(asked, [image], options=FEW).token_ids
    cache = engine.session()
    cache.generate(asked, [high], options=FEW)
    assert cache.usage is not None
    assert cache.usage.encoded_media == 0
