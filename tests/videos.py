"""Small videos, made when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Frame = npt.NDArray[np.uint8]


def moving(count: int, height: int = 48, width: int = 64) -> list[Frame]:
    """Frames of a pattern that moves, each of another shade."""
    y, x = np.mgrid[:height, :width]
    return [
        np.stack([(x * 3 + i * 7) % 256, (y * 4) % 256, np.full_like(x, i * 20 % 256)], axis=-1).astype(np.uint8)
        for i in range(count)
    ]


def write_video(path: Path, frames: Sequence[Frame], codec: str = "mpeg4", rate: int = 10, **options: Any) -> Path:
    """Encodes frames; PyAV must be there. The format is that of the file name."""
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.options = {key: str(value) for key, value in options.items()}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def decoded(path: Path) -> list[Frame]:
    """Every frame of a video file, in order, as PyAV decodes it."""
    import av

    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False) for frame in container.decode(video=0)]
