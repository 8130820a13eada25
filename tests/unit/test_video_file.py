"""Video files, good and hostile, through the decoding process."""

from __future__ import annotations

import os
import signal
import socket
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.errors import EnvironmentFault, UsageError
from runtime import video_file
from runtime.video_file import VideoFile
from tests.videos import decoded, moving, write_video

pytest.importorskip("av")

FORMATS = {
    "a.mp4": ("mpeg4", {}),
    "b.mp4": ("libx264", {"bf": 3, "g": 10}),
    "a.mkv": ("libx264", {"bf": 3, "g": 30}),
    "a.webm": ("libvpx-vp9", {}),
    "a.avi": ("mpeg4", {"bf": 2}),
    "a.mov": ("mjpeg", {}),
    "a.ts": ("libx264", {"bf": 2, "g": 12}),
    "a.gif": ("gif", {}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(tmp_path: Path, name: str) -> None:
    import av

    codec, options = FORMATS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"this build of PyAV cannot write {codec}")
    path = write_video(tmp_path / name, moving(60), codec, **options)
    expected = decoded(path)
    for wanted in (list(range(60)), [0, 1, 29, 30, 59], [58], [3, 57]):
        with VideoFile(path) as video:
            assert (video.frames, video.rate, video.height, video.width) == (60, 10.0, 48, 64)
            for number, frame in zip(wanted, video.read(wanted), strict=True):
                np.testing.assert_array_equal(frame, expected[number], err_msg=f"{name}: {number}")


def test_the_decoder_is_none_of_the_terminals(tmp_path: Path) -> None:
    """Ctrl-C goes to the group of processes in the foreground, and is the parent's."""
    with VideoFile(write_video(tmp_path / "a.avi", moving(3), "mpeg4")) as video:
        assert os.getpgid(video._process.pid) != os.getpgid(0)


def test_stretches_that_nobody_asks_for_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime import video_child

    path = write_video(tmp_path / "a.mp4", moving(200), "mpeg4", g=20)
    expected = decoded(path)
    seen = 0

    def counting(frame: Any, index: Any, before: int) -> int:
        nonlocal seen
        seen += 1
        return number_of(frame, index, before)

    number_of = video_child._number_of
    monkeypatch.setattr(video_child, "_number_of", counting)
    with path.open("rb") as file:
        index = video_child.index_packets(*video_child.open_video(file))
        found = [video_child.to_rgb(frame)[2] for frame in video_child.decoded(file, index, [0, 100, 199])]
    assert found == [expected[i].tobytes() for i in (0, 100, 199)]
    assert seen < 60


def turned(path: Path, quarters: int) -> Path:
    """The file with a matrix in its track header that turns the picture, as telephones write it."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 20 + 16
    one = 1 << 16
    rows = {1: (0, one, -one, 0), 2: (-one, 0, 0, -one), 3: (0, -one, one, 0)}[quarters]
    data[at : at + 36] = struct.pack(">9i", rows[0], rows[1], 0, rows[2], rows[3], 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_turned_video_is_upright(tmp_path: Path, quarters: int) -> None:
    path = write_video(tmp_path / "a.mp4", moving(2))
    plain = decoded(path)[0]
    # The matrix says how many quarters clockwise a player turns the picture.
    with VideoFile(turned(path, quarters)) as video:
        frame = next(video.read([0]))
        assert frame.shape[:2] == (video.height, video.width)
    np.testing.assert_array_equal(frame, np.rot90(plain, -quarters))


def without_pictures(path: Path) -> Path:
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=16000)
        sound: Any = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    return path


PLAYLISTS = {
    "a.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{target}\n#EXT-X-ENDLIST\n",
    "a.ffconcat": "ffconcat version 1.0\nfile '{target}'\n",
    "a.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "a.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet '
    'mimeType="video/mp4"><Representation id="1"><BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period>'
    "</MPD>",
    "a.mp4": "#EXTM3U\n#EXTINF:10,\nfile://{target}\n",
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_playlists_reach_nothing(tmp_path: Path, name: str) -> None:
    target = write_video(tmp_path / "target.ts", moving(3))
    before = target.stat().st_atime_ns
    (tmp_path / name).write_text(PLAYLISTS[name].format(target=target))
    with pytest.raises(UsageError, match="not a readable MP4") as caught:
        VideoFile(tmp_path / name)
    assert "target" not in str(caught.value)
    assert target.stat().st_atime_ns == before


def test_a_playlist_calls_nobody(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.2)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        (tmp_path / "a.m3u8").write_text(PLAYLISTS["a.m3u8"].format(target=address))
        with pytest.raises(UsageError, match="not a readable"):
            VideoFile(tmp_path / "a.m3u8")
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files_are_refused(tmp_path: Path, name: str, share: float) -> None:
    path = write_video(tmp_path / name, moving(60))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UsageError, match=rf"cannot read video: .*{name}: "):
        with VideoFile(path) as video:
            list(video.read(range(video.frames)))


def test_damaged_pictures_are_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving(60))
    content = bytearray(path.read_bytes())
    content[3000:3400] = bytes(400)
    path.write_bytes(content)
    with pytest.raises(UsageError, match="damaged or truncated"):
        with VideoFile(path) as video:
            list(video.read(range(video.frames)))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_any_bytes_give_frames_or_a_message(tmp_path: Path, name: str) -> None:
    content = write_video(tmp_path / name, moving(12)).read_bytes()
    random = np.random.default_rng(11)
    for _ in range(8):
        mutant = np.frombuffer(content, np.uint8).copy()
        places = random.integers(0, [400, len(mutant)], (5, 2)).ravel()
        mutant[places] = random.integers(0, 256, 10)
        (tmp_path / "mutant").write_bytes(mutant.tobytes())
        try:
            with VideoFile(tmp_path / "mutant") as video:
                found = list(video.read(range(min(video.frames, 12))))
                assert {frame.shape for frame in found} == {(video.height, video.width, 3)}
        except UsageError as error:
            assert str(error).startswith("cannot read video: ")


@pytest.mark.parametrize(
    "content",
    [b"text", b"\x89PNG\r\n\x1a\n" + bytes(60), b"%PDF-1.7\n", b"PK\x03\x04" + bytes(60), b"RIFF", bytes(4096),
     b"\0\0\0\x18ftypmp42" + bytes(40), b"\x1aE\xdf\xa3" + bytes(60), b"G" * 4000, b"ID3\x04" + bytes(400)],
)  # fmt: skip
def test_what_is_no_video_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"cannot read video: .*a\.mp4: "):
        VideoFile(path)


def test_a_video_needs_pictures(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it has no pictures"):
        VideoFile(without_pictures(tmp_path / "sound.mp4"))


def test_what_is_no_ordinary_file_is_refused_at_once(tmp_path: Path) -> None:
    fifo, empty = tmp_path / "fifo.mp4", tmp_path / "empty.mp4"
    os.mkfifo(fifo)
    empty.touch()
    for path in (fifo, empty, Path("/dev/zero"), tmp_path / "missing.mp4"):
        with pytest.raises(UsageError, match="cannot read video"):
            VideoFile(path)


def test_addresses_are_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "a.mp4", moving(2))
    for name in ("http://127.0.0.1:9/a.mp4", "file:a.mp4", "concat:a.mp4|a.mp4", "pipe:0"):
        with pytest.raises(UsageError, match="no such file"):
            VideoFile(name)


def test_huge_frames_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", moving(4), "mjpeg")
    content = path.read_bytes()
    small, huge = struct.pack(">HH", 48, 64), struct.pack(">HH", 60_000, 60_000)
    assert content.count(small) >= 4  # in the head of each picture
    path.write_bytes(content.replace(small, huge))
    with pytest.raises(UsageError, match=r"a\.avi: "):
        VideoFile(path)


def test_a_decoder_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", moving(4))
    with VideoFile(path) as video:
        os.kill(video._process.pid, signal.SIGSTOP)  # it will take for ever
        monkeypatch.setattr(video_file, "FRAME_LIMIT_S", 0.1)
        with pytest.raises(UsageError, match=r"a\.mp4: decoding it takes more than 0\.1 s"):
            next(video.read([0]))
        assert video._process.wait() == -signal.SIGKILL


def test_a_decoder_that_crashes(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving(4))
    with VideoFile(path) as video:
        video._process.kill()
        with pytest.raises(UsageError, match=r"a\.mp4: decoding it crashes"):
            next(video.read([0]))


def test_a_decoder_that_wants_too_much_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", moving(4, 1080, 1920))
    monkeypatch.setattr(video_file, "MEMORY", 4 << 20)
    with pytest.raises(UsageError, match=r"a\.mp4: "):
        with VideoFile(path) as video:
            list(video.read([0, 3]))


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match=r"exaone-export\[video\]"):
        VideoFile(tmp_path / "a.mp4")


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving(4))
    before = len(os.listdir("/proc/self/fd"))
    with VideoFile(path) as video:
        next(video.read([0, 1, 2]))
    assert video._process.poll() is not None
    assert len(os.listdir("/proc/self/fd")) == before
