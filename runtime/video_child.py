"""The process that decodes a video; `runtime.video_file` starts it and talks to it.

It is run as a script, isolated from the user's site and environment: ``video_child.py FILE MEMORY_BYTES FOLDER...``
with the number of an open file that it inherits and the folders that hold PyAV and this package. It opens nothing
else: what a video names (playlists, other files, addresses) is refused. A damaged file that crashes a decoder ends this
process alone.

Frames on its standard input and output are those of `runtime.template_child`. It writes ``{"ready": true}``, then what
the video is, then reads one list of frame numbers, rising, and writes for each ``{"bytes": n}`` and so many bytes of
RGB. ``{"error": ...}`` in any place is its last word.
"""

from __future__ import annotations

import os
import signal
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

MAX_PACKETS: Final = 1 << 20  # nine hours at 30 frames a second
MAX_FRAME_PIXELS: Final = 36_000_000  # 8K, the largest that the H.264 and HEVC standards have levels for
FORMATS: Final = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,ogg,gif"
SHOWN_FORMATS: Final = "MP4, MOV, MKV, WebM, AVI, MPEG, Ogg or GIF"
_CPU_SECONDS: Final = 600  # far more than the parent waits: it only ends a child whose parent was killed
# A jump to a key frame is worth it if it saves decoding so many frames.
_JUMP: Final = 24
# Streams without an index: a jump lands anywhere.
_NO_JUMPS: Final = ("mpegts", "mpeg")
# Of a duration that the container gives.
_SLACK_S: Final = 0.5
_MIB: Final = 1 << 20


class VideoError(Exception):
    """The video cannot be used; the text says why."""


@dataclass(frozen=True)
class Index:
    """What the container says of the video's packets.

    Attributes:
        times: of presentation, rising; none if a packet has no time of its own, or times are of no use.
        keys: those of them at which decoding can start.
        count: packets that are shown.
    """

    times: list[int]
    keys: list[int]
    count: int


def refuse_to_open(url: str, flags: int, options: dict[str, str]) -> Any:
    """Given to libav for whatever a video wants opened besides itself."""
    raise PermissionError(url)


def open_video(file: BinaryIO) -> tuple[Any, Any]:
    """The container and its first stream of moving pictures."""
    import av

    options = {"format_whitelist": FORMATS, "protocol_whitelist": "none", "max_pixels": str(MAX_FRAME_PIXELS)}
    container: Any = av.open(file, options=options, io_open=refuse_to_open)
    still = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & still]
    if not streams:
        raise VideoError("it has no pictures")
    size = (streams[0].codec_context.width, streams[0].codec_context.height)
    if size[0] * size[1] > MAX_FRAME_PIXELS:
        raise VideoError(f"{size[0]}x{size[1]} pixels, more than the {MAX_FRAME_PIXELS} allowed")
    return container, streams[0]


def index_packets(container: Any, stream: Any) -> Index:
    """Reads the container to its end without decoding; raises VideoError for too much or less than it promises."""
    times, keys, count, packets, timed, end = [], [], 0, 0, True, 0.0
    for packet in container.demux():
        if not packet.size:  # the end
            continue
        if packet.pts is not None and packet.time_base:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream is not stream:
            continue
        packets += 1
        if packets > MAX_PACKETS:
            raise VideoError(f"more than the {MAX_PACKETS} frames allowed")
        if packet.is_discard:
            continue
        count += 1
        timed = timed and packet.pts is not None
        if timed:
            times.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
    if not count:
        raise VideoError("it has no frames")
    _check_whole(container, stream, packets, end)
    times.sort()
    if not timed or len(set(times)) < count or container.format.name in _NO_JUMPS:
        times = []
    return Index(times, sorted(keys), count)


def _check_whole(container: Any, stream: Any, packets: int, end: float) -> None:
    """Raises VideoError where the container promises more than is there."""
    name = container.format.name
    if ("mov" in name or name == "avi") and packets < stream.frames:
        raise VideoError(f"truncated: {packets} of {stream.frames} frames are there")
    promised = (container.duration or 0) / 1e6 + max(0.0, (container.start_time or 0) / 1e6)
    if "matroska" in name and end < promised - _SLACK_S:
        raise VideoError(f"truncated: {end:.1f} of {promised:.1f} s are there")


def to_rgb(frame: Any) -> tuple[int, int, bytes]:
    """Width, height and RGB bytes of a decoded frame, without the padding of its rows."""
    if frame.width * frame.height > MAX_FRAME_PIXELS:
        raise VideoError(f"{frame.width}x{frame.height} pixels, more than the {MAX_FRAME_PIXELS} allowed")
    plane = frame.reformat(format="rgb24").planes[0]
    row, stride = 3 * frame.width, plane.line_size
    data = memoryview(plane)
    if stride == row:
        return frame.width, frame.height, bytes(data[: row * frame.height])
    return frame.width, frame.height, b"".join(data[y * stride : y * stride + row] for y in range(frame.height))


def decoded(file: BinaryIO, index: Index, wanted: Sequence[int]) -> Iterator[Any]:
    """The frames of these numbers, which rise.

    Whole stretches between key frames are skipped where packets have times; elsewhere frames are counted.
    """
    file.seek(0)
    container, stream = open_video(file)
    frames, seen, last = container.decode(stream), -1, None
    for number in wanted:
        key = _key_before(index, number)
        if key is not None and key - seen > _JUMP:
            container.seek(index.times[key], stream=stream)
            frames, seen, last = container.decode(stream), key - 1, None
        while seen < number:
            last = next(frames, None)
            if last is None:
                raise VideoError(f"damaged or truncated: frame {number} of {index.count} cannot be decoded")
            seen = _number_of(last, index, seen)
        yield last


def _key_before(index: Index, number: int) -> int | None:
    """The number of the last key frame up to this one."""
    place = bisect_right(index.keys, index.times[number]) if index.times else 0
    return bisect_right(index.times, index.keys[place - 1]) - 1 if place else None


def _number_of(frame: Any, index: Index, seen: int) -> int:
    """A decoded frame's number; one without a known time is the next."""
    if not index.times or frame.pts is None:
        return seen + 1
    return bisect_right(index.times, frame.pts) - 1


def serve(file: BinaryIO, requests: BinaryIO, answers: BinaryIO, memory: int) -> None:
    """Describes the video, and answers one request."""
    import av

    from runtime.template_child import encode_frame, limit_memory, write_frame

    write_frame(answers, encode_frame({"ready": True}))
    limit_memory(memory)
    try:
        _answer(file, requests, answers)
    except EOFError:
        return
    except VideoError as reason:
        why = str(reason)
    except MemoryError:
        why = f"decoding it takes more than {memory // _MIB} MiB"
    except (av.FFmpegError, OSError, ValueError, TypeError, AttributeError, ArithmeticError, LookupError, RuntimeError):
        why = "damaged or truncated"  # a library's own words may hold anything
    else:
        return
    write_frame(answers, encode_frame({"error": why}))


def _answer(file: BinaryIO, requests: BinaryIO, answers: BinaryIO) -> None:
    import av

    from runtime.template_child import encode_frame, read_frame, write_frame

    try:
        container, stream = open_video(file)
    except (av.FFmpegError, OSError):
        raise VideoError(f"not a readable {SHOWN_FORMATS} file") from None
    index = index_packets(container, stream)
    first = next(decoded(file, index, [0]))
    width, height, _ = to_rgb(first)
    facts = {
        "frames": index.count, "rate": float(stream.average_rate or 0), "width": width, "height": height,
        "rotation": int(first.rotation),
    }  # fmt: skip
    write_frame(answers, encode_frame(facts))
    for frame in decoded(file, index, read_frame(requests)):
        if (frame.width, frame.height) != (width, height):
            raise VideoError(f"its frames change size, from {width}x{height} to {frame.width}x{frame.height}")
        data = to_rgb(frame)[2]
        write_frame(answers, encode_frame({"bytes": len(data)}))
        write_frame(answers, data)


def main(arguments: list[str]) -> None:
    """Runs the process; see the module."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; the child ends with its input
    sys.path += arguments[2:]
    if sys.platform != "win32":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        limit = _CPU_SECONDS if hard == resource.RLIM_INFINITY else min(_CPU_SECONDS, hard)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))
    with os.fdopen(int(arguments[0]), "rb") as file:
        serve(file, sys.stdin.buffer, sys.stdout.buffer, int(arguments[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
