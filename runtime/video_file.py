"""Videos from files, decoded by a process of their own: a damaged one cannot take this process with it, nor its memory.

The file is opened here, once, and judged; the child gets the open file and opens nothing (see `runtime.video_child`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from model.errors import EnvironmentFault, UsageError
from runtime.closing import Closing
from runtime.image_file import display_name, open_ordinary
from runtime.template_child import encode_frame, read_frame, write_frame
from runtime.video import Frame, video_refusal

MAX_FILE_BYTES: Final = 8 << 30
# Address space of the decoder beyond what it starts with: an 8K frame in RGB and the frames that it refers to.
MEMORY: Final = 2 << 30
START_LIMIT_S: Final = 30.0
HEADER_LIMIT_S: Final = 20.0
FRAME_LIMIT_S: Final = 20.0  # for each frame, however far it is behind the last

_WHAT: Final = "cannot read video"


class VideoFile(Closing):
    """An open video file.

    Args:
        path: an ordinary file, at most `MAX_FILE_BYTES` long, in one of the formats of `runtime.video_child`.

    Attributes:
        name: what messages call it.
        frames: how many it has.
        rate: of them a second; None if the file does not say.
        height, width: of its frames, upright.

    Raises:
        UsageError: it cannot be read; the message names the file.
        EnvironmentFault: PyAV is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = display_name(os.fspath(path))
        folders = [_folder_of("av"), str(Path(__file__).parent.parent)]
        with open_ordinary(path, self.name, video_refusal, MAX_FILE_BYTES) as file:
            self._process = _start(file, folders)
        try:
            facts = self._describe()
        except BaseException:
            self.close()
            raise
        self.frames: int = facts["frames"]
        self.rate: float | None = facts["rate"] or None
        self._shape = (facts["height"], facts["width"], 3)
        self._quarters = round(facts["rotation"] / 90) % 4
        self.height, self.width = self._shape[:2] if self._quarters % 2 == 0 else self._shape[1::-1]

    def read(self, indices: Sequence[int]) -> Iterator[Frame]:
        """The frames of these numbers, uint8 [height, width, 3], upright; once only.

        Args:
            indices: rising.
        """
        try:
            write_frame(_pipe(self._process.stdin), encode_frame(list(indices)))
        except OSError:
            raise self._fault() from None
        size = self._shape[0] * self._shape[1] * self._shape[2]
        for _ in indices:
            head, data = self._receive(FRAME_LIMIT_S, size)
            if head.get("bytes") != size:
                raise self._fault()
            frame = np.frombuffer(data, np.uint8).reshape(self._shape)
            yield np.ascontiguousarray(np.rot90(frame, self._quarters))

    def close(self) -> None:
        """Ends the decoder."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                _pipe(pipe).close()

    def _describe(self) -> dict[str, Any]:
        try:
            self._receive(START_LIMIT_S)
        except UsageError:
            why = "the process that decodes it does not start"
            raise EnvironmentFault(_WHAT, sys.executable, why, "Check the installation of PyAV") from None
        return self._receive(HEADER_LIMIT_S)[0]

    def _receive(self, limit_s: float, more: int = 0) -> tuple[dict[str, Any], bytes]:
        """The next frame, and if it announces bytes, those, up to `more`; UsageError in place of an error."""
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self._process.kill()

        timer = threading.Timer(limit_s, expire)
        timer.daemon = True
        timer.start()
        try:
            stream = _pipe(self._process.stdout)
            head = read_frame(stream)
            data = stream.read(more) if "bytes" in head else b""
        except (OSError, EOFError, ValueError):
            raise self._fault(limit_s if expired.is_set() else None) from None
        finally:
            timer.cancel()
            timer.join()  # so that no kill comes late, when the next frame is asked for
        if "error" in head:
            raise video_refusal(self.name, str(head["error"]), "Use an intact file, or convert it first")
        if "bytes" in head and len(data) < more:
            raise self._fault(limit_s if expired.is_set() else None)
        return head, data

    def _fault(self, limit_s: float | None = None) -> UsageError:
        why = "decoding it crashes" if limit_s is None else f"decoding it takes more than {limit_s:g} s"
        return video_refusal(self.name, why, "Use an intact file, or convert it first")


def _start(file: BinaryIO, folders: Sequence[str]) -> subprocess.Popen[bytes]:
    # -I and -S keep out the user's environment, site and working folder, and save their start-up time.
    script = Path(__file__).with_name("video_child.py")
    number = file.fileno()
    command = [sys.executable, "-I", "-S", "-B", str(script), str(number), str(MEMORY), *folders]
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    try:
        # A group of its own: Ctrl-C at the terminal is not for it, not even while it starts.
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, pass_fds=(number,), process_group=0)
    except OSError as error:
        raise EnvironmentFault(_WHAT, sys.executable, error.strerror or "it cannot be run") from error


def _folder_of(package: str) -> str:
    spec = importlib.util.find_spec(package)  # found, not imported: it is the child that needs it
    if spec is None or spec.origin is None:
        remedy = "Install it: pip install 'exaone-export[video]', or give the frames as a folder of images"
        raise EnvironmentFault(_WHAT, "PyAV", "it is not installed", remedy)
    return str(Path(spec.origin).parent.parent)


def _pipe(stream: Any) -> BinaryIO:
    found: BinaryIO = stream
    return found
