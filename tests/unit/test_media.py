"""Images and videos of one prompt: frames from folders and lists, order, bounds, keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.config import load_config
from model.errors import UsageError
from runtime.media import MediaReader, in_order
from runtime.media_key import media_key
from runtime.messages import build_messages, check_messages, take_media
from runtime.options import GenerationOptions
from runtime.video import Clip
from runtime.video_frames import Frames, open_video
from tests.tiny import SPECIAL, make_config, write_assets
from tests.videos import moving

IMAGE, VIDEO = SPECIAL["<|image_pad|>"], SPECIAL["<|video_pad|>"]


@pytest.fixture
def reader(tmp_path: Path) -> MediaReader:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(make_config("vlm")))
    write_assets(folder, vision=True)
    return MediaReader(folder, load_config(folder))


def picture(height: int = 56, width: int = 84, colour: str = "red") -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def folder_of(path: Path, names: list[str]) -> Path:
    path.mkdir()
    for frame, name in zip(moving(len(names)), names, strict=True):
        Image.fromarray(frame).save(path / name)
    return path


def clip_of(reader: MediaReader, video: Any, **options: Any) -> Clip:
    (found,) = reader.scaled((), [video], GenerationOptions(**options))
    assert isinstance(found, Clip)
    return found


def test_every_form_of_frames_is_the_same_video(reader: MediaReader, tmp_path: Path) -> None:
    frames = moving(5)
    folder = folder_of(tmp_path / "frames", [f"{i}.png" for i in range(8, 13)])  # "8" comes before "10"
    (folder / "notes.txt").write_text("no frame")
    (folder / ".hidden.png").write_text("no frame either")
    expected = clip_of(reader, np.stack(frames)).frames
    assert expected.shape == (5, 280, 392, 3)
    for video in (
        folder, str(folder), frames, [Image.fromarray(frame) for frame in frames],
        tuple(folder / f"{i}.png" for i in range(8, 13)), Frames(folder), Frames(frames, fps=10.0),
    ):  # fmt: skip
        np.testing.assert_array_equal(clip_of(reader, video).frames, expected)


def test_frames_with_a_rate_can_be_sampled(reader: MediaReader) -> None:
    frames = moving(40)
    taken = clip_of(reader, Frames(frames, fps=10.0), fps=2.0).frames
    np.testing.assert_array_equal(taken, clip_of(reader, frames[::5]).frames)
    assert len(clip_of(reader, frames, num_frames=6).frames) == 6
    with pytest.raises(UsageError, match="frames per second are unknown"):
        clip_of(reader, frames, fps=2.0)


@pytest.mark.parametrize(
    ("video", "why"),
    [
        ([], "no frames"),
        (np.zeros((0, 48, 64, 3), np.uint8), "no frames"),
        (np.zeros((48, 64, 3), np.uint8), "uint8 .frames, height"),
        (np.zeros((2, 48, 64, 3), np.float32), "float32"),
        (np.zeros((2, 48, 64, 2), np.uint8), "uint8"),
        ([picture(), picture(56, 56)], "frame 1 has 56x56, the first one 84x56 pixels"),
        ([picture(), 5], "frame 1 is a int"),
        (5, "it is a int"),
        (Frames([]), "no frames"),
        ([picture(1, 300)], "200 times"),
    ],
)
def test_frames_that_cannot_be_used(reader: MediaReader, video: Any, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        clip_of(reader, video)


def test_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no images in the folder"):
        open_video(tmp_path, "videos[0]")


def test_an_unreadable_frame_is_named(reader: MediaReader, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "frames", ["1.png", "2.png", "3.png"])
    (folder / "2.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"2\.png"):
        clip_of(reader, folder)


def test_lists_are_asked_for(reader: MediaReader, tmp_path: Path) -> None:
    for given in ({"images": "a.png"}, {"images": picture()}, {"videos": "a.mp4"}, {"videos": Frames([])}):
        with pytest.raises(UsageError, match="a list is needed"):
            reader.scaled(**given)


def test_a_frames_bounds_are_options_too(reader: MediaReader) -> None:
    large, small = reader.scaled([picture(600, 800), picture(10, 10)])
    assert isinstance(large, Image.Image)
    assert isinstance(small, Image.Image)
    assert (large.width, small.width) == (812, 56)
    bounded = GenerationOptions(max_pixels=784 * 12, min_pixels=784 * 9)
    large, small, clip = reader.scaled([picture(600, 800), picture(10, 10)], [moving(3)], bounded)
    assert isinstance(clip, Clip)
    assert [reader.tokens(one) for one in (large, small)] == [12, 9]
    assert clip.frames.shape[1] * clip.frames.shape[2] <= 784 * 12
    with pytest.raises(UsageError, match="min_pixels"):
        reader.scaled([picture()], options=GenerationOptions(min_pixels=1000, max_pixels=999))


def test_a_budget_for_all(reader: MediaReader) -> None:
    images = [picture()] * 4
    each = 56 * 84
    assert len(reader.scaled(images, options=GenerationOptions(max_total_pixels=4 * each))) == 4
    with pytest.raises(UsageError, match=rf"images\[3\]: with it, {4 * each} pixels .* is {4 * each - 1}"):
        reader.scaled(images, options=GenerationOptions(max_total_pixels=4 * each - 1))
    with pytest.raises(UsageError, match=r"videos\[0\]: with it, .*fps or num_frames"):
        reader.scaled(images, [moving(2)], GenerationOptions(max_total_pixels=4 * each))
    earlier = reader.scaled(images[:2], [moving(2)])
    seen = 2 * each + 2 * 280 * 392
    assert len(reader.scaled(images[2:], (), GenerationOptions(max_total_pixels=seen + 2 * each), earlier)) == 2
    with pytest.raises(UsageError, match=rf"images\[1\]: with it, {seen + 2 * each} pixels"):
        reader.scaled(images[2:], (), GenerationOptions(max_total_pixels=seen + 2 * each - 1), earlier)


def test_more_than_the_context_is_refused_before_it_is_decoded(reader: MediaReader) -> None:
    frame = moving(1)[0]

    class Endless(list[Any]):
        read = 0

        def __getitem__(self, index: Any) -> Any:
            self.read += 1
            return frame

    video = Endless([frame]) * 4000
    video = Endless(video)
    with pytest.raises(UsageError, match="context holds 2048"):
        reader.scaled((), [video])
    assert video.read == 1
    with pytest.raises(UsageError, match="context holds 2048"):
        reader.scaled([picture(500, 500)] * 1000)


@pytest.mark.parametrize(
    "change",
    [{"fps": 0.0}, {"fps": -1.0}, {"fps": float("nan")}, {"num_frames": 0}, {"max_pixels": 0}, {"min_pixels": -1},
     {"max_total_pixels": 1.5}, {"fps": "2"}, {"fps": 1.0, "num_frames": 2}],
)  # fmt: skip
def test_options_are_checked(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="bad option"):
        GenerationOptions(**change)


def test_the_order_of_placeholders_decides(reader: MediaReader) -> None:
    a, b, clip = reader.scaled([picture(), picture(28, 28)], [moving(2)])
    counts = [reader.tokens(one) for one in (a, b, clip)]
    assert counts == [6, 4, 140]
    for order in ([a, clip, b], [clip, a, b], [a, b, clip]):
        ids = [100]
        for one in order:
            ids += [VIDEO if one is clip else IMAGE] * reader.tokens(one) + [101]
        found = in_order([a, b, clip], ids, counts, VIDEO, IMAGE)
        assert [id(one) for one in found] == [id(one) for one in order]


def test_pieces_of_a_video_have_its_patches(reader: MediaReader) -> None:
    (clip,) = reader.scaled((), [moving(5)])
    pieces = reader.pieces(clip)
    assert len(pieces) == 3
    values, grids = zip(*map(reader.patches, pieces), strict=True)
    whole, grid = reader.videos(moving(5))
    np.testing.assert_array_equal(np.concatenate(values), whole)
    assert [g.tolist() for g in grids] == [[[1, *grid[0, 1:]]]] * 3


def test_keys_tell_pictures_apart() -> None:
    pixels = moving(4)
    image = Image.fromarray(pixels[0])
    keys = {
        media_key(image),
        media_key(Image.fromarray(pixels[1])),
        media_key(Image.fromarray(pixels[0].reshape(64, 48, 3))),
        media_key(Image.fromarray(pixels[0].reshape(48, 64 * 3))),
        media_key(image.convert("L")),
        media_key(Clip(np.stack(pixels[:1]))),
        media_key(Clip(np.stack(pixels[:2]))),
        media_key(Clip(np.stack(pixels[:2]).reshape(1, 96, 64, 3))),
        media_key(Clip(np.stack(pixels[1::-1]))),
    }
    assert len(keys) == 9
    palette = Image.new("P", (4, 4))
    other = palette.copy()
    palette.putpalette([0, 0, 0] * 256)
    other.putpalette([255, 0, 0] * 256)
    assert media_key(palette) != media_key(other)


def test_keys_do_not_know_names(tmp_path: Path, reader: MediaReader) -> None:
    image = Image.fromarray(moving(1)[0])
    for name in ("a.png", "b.bmp"):
        image.save(tmp_path / name)
    first, second, third = reader.scaled([tmp_path / "a.png", tmp_path / "b.bmp", np.asarray(image)])
    assert media_key(first) == media_key(second) == media_key(third)
    assert media_key(first) != media_key(image)  # of another size


def test_messages_that_name_their_media() -> None:
    text = {"type": "text", "text": "x"}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, text, {"type": "video"}]},
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": [{"type": "video", "path": "b.mp4"}, {"type": "image"}]},
    ]  # fmt: skip
    clean, images, videos = take_media(messages, ["c.png", "rest.png"], ["d.mp4"])
    assert images == ["a.png", "c.png", "rest.png"]
    assert videos == ["d.mp4", "b.mp4"]
    assert clean[0]["content"] == [{"type": "image"}, text, {"type": "video"}]
    assert check_messages(clean) == clean
    # What others send is not read from this machine's files.
    assert check_messages(messages) == clean


@pytest.mark.parametrize(
    "part",
    [{"type": "image", "image": "http://127.0.0.1/a.png"}, {"type": "image", "image": "data:image/png;base64,AA"},
     {"type": "video", "video": "file:///etc/passwd"}, {"type": "image", "url": "a.png"},
     {"type": "video", "video": ""}, {"type": "image", "image": {"url": "a"}}, {"type": "video", "video": "rtsp://h/x"}],
)  # fmt: skip
def test_addresses_are_refused(part: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"messages\[0\]\.content\[0\]"):
        take_media([{"role": "user", "content": [part]}])


def test_media_in_the_order_given() -> None:
    (message,) = build_messages("x", media=["video", "image", "video"])
    assert [part["type"] for part in message["content"]] == ["video", "image", "video", "text"]
