"""What an image or a video is, whatever it is called: a key for what was computed from it."""

from __future__ import annotations

import hashlib
from typing import Final

from PIL import Image

from runtime.video import Clip

_VERSION: Final = b"1"


def media_key(medium: Image.Image | Clip) -> str:
    """A hash of an image's pixels, size and mode, or of a video's frames: sha256 in hexadecimal.

    Size and mode count, since the same bytes in another shape are another picture; names, formats and metadata do not.
    Of what `MediaReader.scaled` gives, two with one key have the same features in one bundle.
    """
    if isinstance(medium, Clip):
        head = ("video", "RGB", *medium.frames.shape)
        data = medium.frames.tobytes()
    else:
        head = ("image", medium.mode, medium.height, medium.width)
        data = medium.tobytes()
        if medium.mode == "P":  # the numbers mean colours only with their palette
            data += bytes(medium.getpalette() or ()) + repr(medium.info.get("transparency")).encode()
    found = hashlib.sha256(_VERSION)
    found.update(repr(head).encode() + b"\0")
    found.update(data)
    return found.hexdigest()
