"""The engine over graphs that are plain Python."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from model.config import ExaoneConfig, load_config
from model.errors import BundleError, UsageError
from runtime.engine import Engine
from runtime.forward import Ids, Logits
from runtime.graphs import Graphs
from runtime.options import GenerationOptions
from tests.tiny import BYTES_AT, SPECIAL, make_config, write_assets

EOS = SPECIAL["<|endofturn|>"]
Rows = list[list[int]]


class Script:
    """A text model that says, after any prompt, what it is told to say in that row."""

    chunk = 256

    def __init__(self, answers: Rows) -> None:
        self.answers = answers
        self.prompts: list[int] = []

    def samplers(self, samplers: list[Any], plain: bool) -> list[Any]:
        return samplers

    def __call__(self, ids: Ids, lengths: Ids) -> Logits:
        self.prompts = self.prompts or lengths.tolist()
        logits = np.zeros((len(ids), 1, 512), np.float32)
        for row, answer in enumerate(self.answers[: len(ids)]):
            said = max(0, int(lengths[row]) - self.prompts[row])
            logits[row, 0, answer[min(said, len(answer) - 1)]] = 1
        return logits


class FakeGraphs:
    """Stands for `Graphs`; remembers what was asked of it."""

    ep, load_s, pad_id = "cpu", 0.0, 0
    residence = "a device"  # where lists are one batch: what is scripted has no rows to move

    def __init__(self, folder: Path, answers: Rows) -> None:
        self.folder = folder
        self.config: ExaoneConfig = load_config(folder)
        self.context = self.config.text.max_position_embeddings
        self.answers = answers
        self.opened: list[bool] = []
        self.encoded: list[list[int]] = []
        self.features: Any = None
        self.closed = False

    def open(self, images: bool = True) -> None:
        self.opened.append(images)

    def encode(self, values: Any, grid: Any, tokens: int) -> Any:
        self.encoded += grid.tolist()
        assert len(values) == 4 * tokens
        images = np.arange(len(self.encoded) - len(grid), len(self.encoded)) + 1
        return np.repeat(images.astype(np.float32), grid.prod(1) // 4)[:, None].repeat(64, 1)

    def features_on_device(self, tokens: int) -> None:
        return None

    def forward(self, rows: int, features: Any = None, expected: int = 0) -> Script:
        assert expected > 0
        self.features = features
        return Script(self.answers)

    def close(self) -> None:
        self.closed = True


def text(words: str) -> list[int]:
    return [byte + BYTES_AT for byte in words.encode()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(make_config("vlm", max_position_embeddings=400)))
    write_assets(tmp_path, vision=True)
    return tmp_path


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with engine_of(folder, [[*text("안녕 🙂"), EOS]]) as opened:
        yield opened


def engine_of(folder: Path, answers: Rows) -> Engine:
    return Engine(cast(Graphs, FakeGraphs(folder, answers)))


def fake(engine: Engine) -> FakeGraphs:
    return cast(FakeGraphs, engine.graphs)


def picture(height: int = 56, width: int = 84) -> Image.Image:
    return Image.new("RGB", (width, height), "red")


def test_a_prompt_is_answered(engine: Engine) -> None:
    result = engine.generate("안녕?")
    assert (result.text, result.finish_reason) == ("안녕 🙂", "stop")
    assert result.token_ids == [*text("안녕 🙂"), EOS]
    assert result.prompt_tokens == len(engine.prompt("안녕?").token_ids)
    assert (result.image_tokens, result.timings.vision_s) == (0, 0.0)
    assert fake(engine).opened == [False]


def test_a_conversation_with_images(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "사진.png"
    picture(200, 300).save(path)
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "짧게"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "그리고"}, {"type": "image"}]},
    ]
    result = engine.generate(messages, [path, np.asarray(picture())])
    assert result.image_tokens == 77 + 6
    assert fake(engine).encoded == [[1, 14, 22], [1, 4, 6]]
    assert fake(engine).features[:, 0].tolist() == [1] * 77 + [2] * 6
    assert fake(engine).opened == [True]
    prompt = engine.prompt(messages, [path, picture()])
    assert prompt.token_ids.count(SPECIAL["<|image_pad|>"]) == prompt.image_tokens == 83
    assert prompt.text.count("<|image_pad|>") == 2


def test_a_dry_run_opens_no_graph(engine: Engine) -> None:
    prompt = engine.prompt("hi", [picture()], system="짧게", enable_thinking=True)
    assert prompt.thinking
    assert prompt.text.startswith("<|system|>\n짧게")
    assert fake(engine).opened == []


def test_a_stream_is_the_answer_in_pieces(engine: Engine) -> None:
    pieces = list(engine.stream("안녕?"))
    assert "".join(piece.text for piece in pieces) == "안녕 🙂"
    assert [piece.finished for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert [token for piece in pieces for token in piece.token_ids] == [*text("안녕 🙂"), EOS]
    result = pieces[-1].result
    assert result is not None
    assert result.text == "안녕 🙂"


def test_thinking_is_split_off(folder: Path) -> None:
    answer = [*text("hm"), SPECIAL["</think>"], *text("\n\nyes"), EOS]
    with engine_of(folder, [answer]) as engine:
        result = engine.generate("?", enable_thinking=True)
        assert (result.reasoning, result.text) == ("hm", "yes")
        kinds = {piece.kind for piece in engine.stream("?", enable_thinking=True) if piece.text}
        assert kinds == {"reasoning", "text"}


def test_a_batch_gives_a_list(folder: Path) -> None:
    answers = [[*text("one"), EOS], [*text("three"), EOS]]
    with engine_of(folder, answers) as engine:
        results = engine.generate(["a", "bcd"], [[picture()], []], stop=["re"])
        assert [result.text for result in results] == ["one", "th"]
        assert [result.finish_reason for result in results] == ["stop", "stop"]
        assert [result.image_tokens for result in results] == [6, 0]
        assert results[1].token_ids == text("thre")
        turns = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
        assert len(engine.generate(turns)) == 2
        wrong: list[Any] = [[picture()], [[picture()]], [picture(), picture()]]
        for images in wrong:
            with pytest.raises(UsageError, match="lists of images"):
                engine.generate(["a", "b"], images)


def test_limits(folder: Path) -> None:
    with engine_of(folder, [[150]]) as engine:
        used = len(engine.prompt("hi").token_ids)
        assert len(engine.generate("hi").token_ids) == 400 - used
        assert len(engine.generate("hi", max_new_tokens=3).token_ids) == 3
        assert engine.generate("hi", max_new_tokens=3).finish_reason == "length"
        with pytest.raises(UsageError, match=f"Ask for at most {400 - used}"):
            engine.generate("hi", max_new_tokens=400)
        with pytest.raises(UsageError, match="the context holds 400"):
            engine.generate("x" * 400)
        with pytest.raises(UsageError, match="it is empty"):
            engine.generate(" ")
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7, "eos_token_id": [150, 3]}))
    with engine_of(folder, [[151]]) as engine:
        assert engine.eos_ids == {53, 150, 3}
        assert engine.defaults.max_new_tokens is None
        assert len(engine.generate("hi").token_ids) == 7
        assert len(engine.generate("hi", options=GenerationOptions(max_new_tokens=9)).token_ids) == 9
        # The bundle's own wish is no reason to refuse a prompt that leaves less room.
        assert len(engine.generate("x" * (397 - used)).token_ids) <= 7


def test_ids_without_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with engine_of(folder, [[5, 6, EOS]]) as engine:
        result = engine.generate_ids([1, 2, 3])
        assert (result.token_ids, result.text) == ([5, 6, EOS], "")
        assert engine.generate_ids([[1, 2], [3]])[0].token_ids == [5, 6, EOS]
        with pytest.raises(BundleError, match=r"tokenizer\.json"):
            engine.generate("hi")


@pytest.mark.parametrize("ids", [[], [512], [-1], [1.5], [True], ["a"], [67], [68, 1]])
def test_unusable_ids(engine: Engine, ids: list[Any]) -> None:
    with pytest.raises(UsageError, match="cannot use"):
        engine.generate_ids(ids)


@pytest.mark.parametrize("images", ["a.png", Path("a.png"), picture(), [3], [None], ["missing.png"], [picture(1, 300)]])
def test_unusable_images(engine: Engine, images: Any) -> None:
    with pytest.raises(UsageError):
        engine.generate("hi", images)
    assert fake(engine).opened == []


def test_images_need_their_placeholders(engine: Engine) -> None:
    with pytest.raises(UsageError, match="placeholder"):
        engine.generate([{"role": "user", "content": "hi"}], [picture()])


def test_a_text_model_takes_no_images(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(make_config("dense")))
    write_assets(tmp_path, vision=False)
    with engine_of(tmp_path, [[EOS]]) as engine:
        assert engine.generate("hi").token_ids == [EOS]
        with pytest.raises(UsageError, match="reads text only"):
            engine.generate("hi", [picture()])


@pytest.mark.parametrize("value", ["53", -1, [1, None], True])
def test_unusable_eos(folder: Path, value: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(BundleError, match="eos_token_id"):
        engine_of(folder, [])


def test_a_larger_vocabulary_than_the_models_is_damage(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(make_config("vlm", vocab_size=300)))
    with engine_of(folder, [[5]]) as engine, pytest.raises(BundleError, match="512 tokens, the model has 300"):
        engine.generate("hi")


def test_options_by_name(engine: Engine) -> None:
    with pytest.raises(UsageError, match="is not a known option"):
        engine.generate("hi", temprature=1)
    assert dataclasses.asdict(engine.generate("hi", temperature=1.0, seed=3, top_k=1))["text"] == "안녕 🙂"


def test_closing_closes_everything(folder: Path) -> None:
    engine = engine_of(folder, [[EOS]])
    engine.generate("hi")
    engine.close()
    assert fake(engine).closed
    engine.close()
