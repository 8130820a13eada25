"""What `bench` is asked and what it finds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Self

from model.errors import UsageError

MOST_REPEATS: Final = 1000
LARGEST_SIDE: Final = 16384


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        prompt_tokens: tokens of the prompt whose reading is timed; an image's come on top.
        new_tokens: tokens whose decoding is timed.
        depth: tokens in the context when decoding begins; None takes the prompt, image included. A decoder needs one
            token to start from, so 0 is measured after one.
        image: width and height of an image put before the prompt, in pixels.
        batch: rows side by side, each with a prompt and an image of its own.
        repeat: rounds that count; one more goes before them to warm up.
        growth: also measure shorter prompts and smaller images, to see how time grows.

    Raises:
        UsageError: a number is out of its range.
    """

    prompt_tokens: int = 512
    new_tokens: int = 64
    depth: int | None = None
    image: tuple[int, int] | None = None
    batch: int = 1
    repeat: int = 5
    growth: bool = False

    def __post_init__(self) -> None:
        for name, lowest, highest in (
            ("prompt_tokens", 1, 2**31),
            ("new_tokens", 1, 2**31),
            ("depth", 0, 2**31),
            ("batch", 1, 4096),
            ("repeat", 1, MOST_REPEATS),
        ):
            value = getattr(self, name)
            if name == "depth" and value is None:
                continue
            if type(value) is not int or not lowest <= value <= highest:
                why = f"{str(value)[:40]} is not between {lowest} and {highest}"
                raise UsageError("bad option", name, why, "Give a whole number")
        if self.image is not None and not _is_size(self.image):
            why = f"{str(self.image)[:40]} is not a width and a height between 1 and {LARGEST_SIDE}"
            raise UsageError("bad option", "image", why, "Give both in pixels")


def _is_size(image: object) -> bool:
    sides = image if isinstance(image, tuple) else ()
    return len(sides) == 2 and all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in sides)


@dataclass(frozen=True)
class Spread:
    """Smallest, middle and largest of several measurements."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """The spread of at least one value."""
        found = sorted(values)
        return cls(found[0], statistics.median(found), found[-1])


@dataclass(frozen=True)
class Sample:
    """One round of one bundle; tokens are those of all rows together.

    Attributes:
        prefill_tokens_per_s: tokens of the prompt, image included, over the time to read them.
        decode_tokens_per_s: new tokens a second.
        time_to_first_token_s: from the image's pixels and the prompt's ids to the first new token.
        vision_s: scaling and encoding the image.
        read_bandwidth_bytes_per_s: of the memory, measured just before and after; the better one.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    time_to_first_token_s: float
    vision_s: float
    read_bandwidth_bytes_per_s: float


@dataclass(frozen=True)
class Growth:
    """How time grows with size; each list has one entry for each size measured.

    Attributes:
        tokens: lengths of a single prompt.
        prefill_s: seconds to read it.
        decode_s: seconds for one token after it.
        patches: sizes of an image; empty without one.
        vision_s: seconds to scale and encode it.
    """

    tokens: tuple[int, ...]
    prefill_s: tuple[Spread, ...]
    decode_s: tuple[Spread, ...]
    patches: tuple[int, ...] = ()
    vision_s: tuple[Spread, ...] = ()


@dataclass(frozen=True)
class Bench:
    """Figures of one bundle. A `Spread` is over the rounds.

    Attributes:
        bundle: its folder's name.
        prefill_tokens_per_s, decode_tokens_per_s, time_to_first_token_s, vision_s: see `Sample`; the image's time is
            0 without one.
        load_s: opening the graphs in a new process, its files in the page cache, imports not counted.
        peak_rss_bytes: most memory that the process running the bundle held, libraries and mapped files included.
        bundle_bytes: of all files.
        weight_bytes_per_token: bytes of weights that a pass for one token reads: the decoder's, its output layer's, and
            one row of the embedding and of the rotary tables.
        cache_bytes_per_token: bytes of keys and values that one row's token reads, half of the new tokens before it.
        read_bandwidth_bytes_per_s: of the memory, read by as many threads; the median over the rounds.
        roofline_fraction: decode passes a second, times `weight_bytes_per_token`, over `read_bandwidth_bytes_per_s`,
            all of them medians. 1 would be a decoder that waits for nothing but its weights. None on another
            device than the CPU.
        traffic_fraction: the same with `cache_bytes_per_token` of every row on top.
        ep: execution provider.
        threads: of one operator, and of the reading of memory.
        prompt_tokens: of one row, image included; `image_tokens` are those of the image.
        new_tokens, depth, batch, repeat: as measured.
        read_bandwidth: spread of the bandwidth, which differs from minute to minute on shared machines.
        roofline, traffic: spreads of the two fractions, each round against its own bandwidth.
        growth: see `Growth`; None unless asked for.
        compared: figures of the other bundle, its rounds taking turns with this one's.
        ratios: this bundle over the other, round by round.
    """

    bundle: str
    prefill_tokens_per_s: Spread
    decode_tokens_per_s: Spread
    time_to_first_token_s: Spread
    vision_s: Spread
    load_s: Spread
    peak_rss_bytes: int
    bundle_bytes: int
    weight_bytes_per_token: int
    read_bandwidth_bytes_per_s: float
    roofline_fraction: float | None
    ep: str
    threads: int
    prompt_tokens: int
    image_tokens: int
    new_tokens: int
    depth: int
    batch: int
    repeat: int
    read_bandwidth: Spread
    roofline: Spread | None
    cache_bytes_per_token: int = 0
    traffic_fraction: float | None = None
    traffic: Spread | None = None
    growth: Growth | None = None
    compared: Bench | None = None
    ratios: Mapping[str, Spread] = field(default_factory=dict)
