"""Videos and many images through a whole bundle; transformers generates the expected ids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import exaone_export as ee
from exaone_export.cli import main
from model.bundle import VISION_ENCODER
from model.errors import NumericalError, UsageError
from runtime.video_frames import Frames
from tests.e2e.conftest import Bundles
from tests.e2e.test_end_to_end import COUNT, GREEDY, expected_ids, text
from tests.tiny import SPECIAL
from tests.unit.test_image import noise
from tests.videos import Frame, moving, write_video

IMAGE, VIDEO = SPECIAL["<|image_pad|>"], SPECIAL["<|video_pad|>"]


@pytest.fixture(scope="module")
def vlm(bundles: Bundles) -> Iterator[tuple[Path, ee.Engine]]:
    with ee.Engine.load(bundles.bundle("vlm")) as engine:
        yield bundles.source("vlm"), engine


def picture(height: int = 56, width: int = 84) -> Image.Image:
    return noise("RGB", height, width)


def arrays(engine: ee.Engine, frames: list[Frame]) -> dict[str, torch.Tensor]:
    """What transformers' model takes for a video."""
    values, grid = engine.requests.media.videos(frames)
    return {"pixel_values_videos": torch.from_numpy(values), "video_grid_thw": torch.from_numpy(grid)}


def image_arrays(engine: ee.Engine, *images: Image.Image) -> dict[str, torch.Tensor]:
    values, grids = zip(*map(engine.requests.image_processor, images), strict=True)
    return {
        "pixel_values": torch.from_numpy(np.concatenate(values)),
        "image_grid_thw": torch.from_numpy(np.concatenate(grids)),
    }


@pytest.mark.parametrize("count", [1, 4, 5])
def test_a_video(vlm: tuple[Path, ee.Engine], count: int) -> None:
    source, engine = vlm
    frames = moving(count)
    pairs = (count + 1) // 2
    ids = [*text(3), *[VIDEO] * (pairs * 140), *text(4, 1)]
    result = engine.generate_ids(ids, videos=[frames], options=GREEDY, max_new_tokens=COUNT)
    assert result.image_tokens == pairs * 140
    assert result.token_ids == expected_ids(source, ids, **arrays(engine, frames))[: len(result.token_ids)]


@pytest.mark.parametrize("order", ["image video image", "video image image", "image image video"])
def test_images_and_a_video_in_any_order(vlm: tuple[Path, ee.Engine], order: str) -> None:
    source, engine = vlm
    images, frames = [picture(), picture(28, 56)], moving(3)
    parts: list[dict[str, str]] = [{"type": kind} for kind in order.split()]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "무엇인가?"}]}]
    prompt = engine.prompt(messages, images, videos=[frames])
    ids = list(prompt.token_ids)
    assert (ids.count(IMAGE), ids.count(VIDEO)) == (6 + 2, 2 * 140)
    assert prompt.image_tokens == 6 + 2 + 280
    assert [token for token in ids if token in (IMAGE, VIDEO)] == [
        token
        for kind, number in zip(order.split(), _numbers(order), strict=True)
        for token in [VIDEO if kind == "video" else IMAGE] * number
    ]
    media = image_arrays(engine, *images) | arrays(engine, frames)
    result = engine.generate(messages, images, videos=[frames], options=GREEDY, max_new_tokens=COUNT)
    assert result.token_ids == expected_ids(source, ids, **media)[: len(result.token_ids)]


def _numbers(order: str) -> list[int]:
    waiting = {"image": iter([6, 2]), "video": iter([280])}
    return [next(waiting[kind]) for kind in order.split()]


def test_images_and_videos_in_several_turns_and_rows(vlm: tuple[Path, ee.Engine]) -> None:
    source, engine = vlm
    images, videos = [picture(), picture(84, 56), picture(28, 28)], [moving(2), moving(3, 64, 64)]
    first: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "video"}, {"type": "image"}, {"type": "image"}]},
    ]
    second: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "image"}]}]
    third: list[dict[str, Any]] = [{"role": "user", "content": "d"}]
    rows: list[list[Any]] = [[*images], [*images[:1]], []]
    together = engine.generate(
        [first, second, third], rows, videos=[videos, [], []],
        options=GREEDY, max_new_tokens=COUNT,
    )  # fmt: skip
    ids = list(engine.prompt(first, images, videos=videos).token_ids)
    clips = [arrays(engine, frames) for frames in videos]
    media = {name: torch.cat([clip[name] for clip in clips]) for name in clips[0]}
    expected = expected_ids(source, ids, **image_arrays(engine, *images), **media)
    assert together[0].token_ids == expected[: len(together[0].token_ids)]
    alone = engine.generate(second, images[:1], options=GREEDY, max_new_tokens=COUNT)
    assert together[1].token_ids == alone.token_ids
    assert together[2].image_tokens == 0


def test_features_of_a_video_are_those_of_its_pieces(vlm: tuple[Path, ee.Engine]) -> None:
    """One run over all frames, as transformers has it, and a run for each temporal patch."""
    _, engine = vlm
    values, grid = engine.requests.media.videos(moving(5))
    whole = engine.graphs.encode(values, grid, len(values) // 4)
    media = engine.requests.media
    (clip,) = media.scaled((), [moving(5)])
    parts = [engine.graphs.encode(*media.patches(piece), 140) for piece in media.pieces(clip)]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-5)


def test_a_file_is_what_its_frames_are(vlm: tuple[Path, ee.Engine], tmp_path: Path) -> None:
    pytest.importorskip("av")
    from tests.videos import decoded

    _, engine = vlm
    path = write_video(tmp_path / "a.mp4", moving(20))
    frames = decoded(path)
    settings: dict[str, Any] = {"options": GREEDY, "max_new_tokens": 4}
    expected = engine.generate("x", videos=[frames[::5]], **settings).token_ids
    assert engine.generate("x", videos=[path], fps=2.0, **settings).token_ids == expected
    assert engine.generate("x", videos=[Frames(frames, fps=10.0)], fps=2.0, **settings).token_ids == expected
    assert engine.generate("x", videos=[path], num_frames=4, **settings).token_ids == expected


def dry(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> list[int]:
    capsys.readouterr()
    assert main(["generate", *map(str, arguments), "--dry-run", "--json"]) == 0
    ids: list[int] = json.loads(capsys.readouterr().out)["prompt_token_ids"]
    return [token for token in ids if token in (IMAGE, VIDEO)]


def test_the_command_line(bundles: Bundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, bundle = tmp_path / "frames", bundles.bundle("vlm")
    folder.mkdir()
    for number, frame in enumerate(moving(5)):
        Image.fromarray(frame).save(folder / f"{number}.png")
    image = tmp_path / "a.png"
    picture().save(image)
    found = dry(capsys, bundle, "x", "--image", image, "--video", folder, "--image", image)
    assert found == [IMAGE] * 6 + [VIDEO] * 420 + [IMAGE] * 6
    assert dry(capsys, bundle, "x", "--video", folder, "--num-frames", "2") == [VIDEO] * 140
    assert dry(capsys, bundle, "x", "--video", folder, "--max-pixels", "3136") == [VIDEO] * (3 * 4)
    turns = [{"role": "user", "content": [{"type": "video", "video": str(folder)}, {"type": "image"}]}]
    (tmp_path / "turns.json").write_text(json.dumps(turns))
    given: tuple[str | Path, ...] = ("--messages", tmp_path / "turns.json", "--image", image)
    assert dry(capsys, bundle, *given) == [VIDEO] * 420 + [IMAGE] * 6
    turns = [
        {"role": "user", "content": [{"type": "image", "image": str(image)}]},
        {"role": "assistant", "content": "y"},
    ]
    (tmp_path / "turns.json").write_text(json.dumps(turns))
    given = ("x", "--messages", tmp_path / "turns.json", "--video", folder)
    assert dry(capsys, bundle, *given) == [IMAGE] * 6 + [VIDEO] * 420


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--video", "none.mp4"], "none.mp4"),
        (["--video", "a.txt"], "a.txt"),
        (["--image", "a.png", "--max-total-pixels", "100"], "max_total_pixels"),
        (["--image", "a.png", "--max-pixels", "-1"], "max_pixels"),
        (["--image", "a.png", "--min-pixels", "9", "--max-pixels", "8"], "min_pixels"),
        (["--video", "a.txt", "--fps", "nan"], "fps"),
        (["--video", "a.txt", "--fps", "1", "--num-frames", "4"], "num_frames"),
        (["--messages", "address.json"], "address"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], word: str,
) -> None:  # fmt: skip
    pytest.importorskip("av")
    monkeypatch.chdir(tmp_path)
    picture().save("a.png")
    Path("a.txt").write_text("#EXTM3U\n")
    part = {"type": "video", "video": "http://127.0.0.1:1/a.mp4"}
    Path("address.json").write_text(json.dumps([{"role": "user", "content": [part]}]))
    assert main(["generate", str(bundles.bundle("vlm")), "x", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert word in captured.err


def test_a_text_model_sees_no_videos(bundles: Bundles) -> None:
    with ee.Engine.load(bundles.bundle("dense")) as engine:
        with pytest.raises(UsageError, match="reads no videos"):
            engine.generate("x", videos=[moving(2)])


@pytest.mark.parametrize("word", ["NaN", "rows"])
def test_i15_what_the_encoder_gives_is_checked(bundles: Bundles, word: str) -> None:
    with ee.Engine.load(bundles.bundle("vlm")) as engine:
        session: Any = engine.graphs.session(VISION_ENCODER)
        run = session.run

        def spoiled(*given: Any) -> list[Any]:
            (features,) = run(*given)
            if word == "rows":
                return [features[1:]]
            features = features.copy()
            features[1, 2] = np.nan
            return [features]

        session.run = spoiled
        with pytest.raises(NumericalError, match=word) as caught:
            engine.generate("x", [picture()], max_new_tokens=1)
    assert caught.value.exit_code == 7
