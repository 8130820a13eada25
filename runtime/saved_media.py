"""Images, videos and keys of a conversation as a file has them (see `runtime.saved_session`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from model.errors import BundleError
from runtime.media import MediaReader, Medium
from runtime.media_key import media_key
from runtime.reuse import Key
from runtime.video import Clip

Fault = Callable[[str], BundleError]


def described_media(media: Sequence[Medium]) -> list[list[int]]:
    """Sizes: of an image [height, width], of a video [frames, height, width]."""
    return [list(one.frames.shape[:3]) if isinstance(one, Clip) else [one.height, one.width] for one in media]


def pixels_of(medium: Medium) -> bytes:
    """RGB, row by row."""
    return medium.frames.tobytes() if isinstance(medium, Clip) else medium.convert("RGB").tobytes()


def media_of(value: Any, take: Callable[[int], bytes], reader: MediaReader, fault: Fault) -> tuple[Medium, ...]:
    """What `described_media` says, with pixels from `take`. Raises `fault` for anything else."""
    if not isinstance(value, list):
        raise fault("it does not say what its turns show")
    found: list[Medium] = []
    for size in value:
        good = isinstance(size, list) and len(size) in (2, 3)
        if not good or not all(type(side) is int and 0 < side < 1 << 24 for side in size):
            raise fault("an image or video has no good size")
        unit = reader.images.patch_size * reader.images.merge_size
        if size[-1] % unit or size[-2] % unit:
            raise fault(f"an image or video of {size[-1]}x{size[-2]} pixels is not scaled for this model")
        pixels = take(3 * int(np.prod(size, dtype=object)))
        if len(size) == 2:
            found.append(Image.frombytes("RGB", (size[1], size[0]), pixels))
        else:
            found.append(Clip(np.frombuffer(pixels, np.uint8).reshape(*size, 3)))
            reader.tokens(found[-1])  # refused here where the model takes no videos
    return tuple(found)


def described_keys(keys: Sequence[Key], media: Sequence[Medium]) -> list[Any]:
    """Token ids as they are, and runs of an image's or video's tokens as [which of `media`, how many]."""
    places = {media_key(medium): place for place, medium in reversed(list(enumerate(media)))}
    found: list[Any] = []
    for key in keys:
        if isinstance(key, int):
            found.append(key)
        elif key[1] == 0:
            found.append([places[key[0]], 1])
        else:
            found[-1][1] += 1
    return found


def keys_of(
    value: Any, media: Sequence[Medium], reader: MediaReader, vocabulary: int, fault: Fault
) -> list[Key] | None:
    """What `described_keys` says; None for None. Raises `fault` for what it does not say."""
    if value is None:
        return None
    if not isinstance(value, list):
        raise fault("its tokens are no list")
    shown = [media_key(medium) for medium in media]
    keys: list[Key] = []
    for item in value:
        if type(item) is int and 0 <= item < vocabulary:
            keys.append(item)
            continue
        pair = item if isinstance(item, list) and len(item) == 2 and all(type(one) is int for one in item) else (-1, 0)
        if not 0 <= pair[0] < len(media) or not 0 < pair[1] <= reader.tokens(media[pair[0]]):
            raise fault(f"{str(item)[:40]!r} among its tokens")
        keys += [(shown[pair[0]], offset) for offset in range(pair[1])]
    return keys
