"""S01 to S16, S18 and S20: safetensors files whose header is damaged or hostile."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from tests.faults.harness import Case, refuses
from tests.faults.spoil import (
    SECOND,
    Spoil,
    both,
    content,
    edited_header,
    entry,
    header,
    resized,
)

FILE = "model.safetensors"
GOOD = {"a": entry([2], 0, 8)}
LENGTH = len(json.dumps(GOOD))
NORM = "model.norm.weight"


def many_tensors(count: int, name: str = "t") -> Spoil:
    def spoil(folder: Path) -> None:
        listed = {f"{name}{i}": entry([1], 4 * i, 4 * i + 4) for i in range(count)}
        header(json.dumps(listed, separators=(",", ":")).encode(), bytes(4 * count))(folder)

    return spoil


def large_header(length: int) -> Spoil:
    """Zeros that take no room on the disk: only the length is looked at."""
    return both(content(struct.pack("<Q", length)), resized(length))


def deep(opening: str, middle: str, closing: str, depth: int = 5000) -> bytes:
    return (opening * depth + middle + closing * depth).encode()


def duplicate(second: str) -> bytes:
    first = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    return f"{{{first},{second}}}".encode()


def headered(name: str, raw: object, *words: str, data: int = 8, **more: Any) -> Case:
    return Case(name, header(raw, bytes(data)), 3, (FILE, *words), **more)


def offsets(name: str, begin: float, end: float, *words: str) -> Case:
    return headered(name, {"a": entry([2], begin, end)}, *words)


def size(folder: Path) -> int:
    return (folder / FILE).stat().st_size


def move(raw: dict[str, Any], by: int) -> None:
    """Moves the last tensor's range."""
    last = max((e for name, e in raw.items() if name != "__metadata__"), key=lambda e: e["data_offsets"][1])
    last["data_offsets"] = [number + by for number in last["data_offsets"]]


def resize_norm(raw: dict[str, Any], shape: list[int]) -> None:
    raw[NORM]["shape"] = shape


test_s01_too_short_for_a_header = refuses(
    Case("s01 no bytes", content(b""), 3, (FILE, "0 bytes, too short")),
    Case("s01 7 bytes", content(b"1234567"), 3, (FILE, "7 bytes, too short")),
    Case("s01 no bytes in a shard", content(b"", SECOND), 3, (SECOND, "0 bytes, too short"), shards=2),
)
test_s02_header_of_no_bytes = refuses(
    Case("s02 nothing else", content(bytes(8)), 3, (FILE, "header is empty")),
    Case("s02 a header behind it", header(GOOD, bytes(8), length=0), 3, (FILE, "header is empty")),
)
test_s03_absurd_header_length = refuses(
    Case("s03 2^62", header(GOOD, bytes(8), length=1 << 62), 3, (FILE, str(1 << 62)), apart=True),
    Case("s03 2^63", header(GOOD, bytes(8), length=1 << 63), 3, (FILE, str(1 << 63))),
    Case("s03 2^64-1", header(GOOD, bytes(8), length=(1 << 64) - 1), 3, (FILE, str((1 << 64) - 1))),
)
test_s04_large_header = refuses(
    Case("s04 claimed", header(GOOD, bytes(8), length=101_000_000), 3, (FILE, "101000000 bytes long")),
    Case("s04 101 MB", large_header(101_000_000), 3, (FILE, "a header of 101000000"), apart=True),
    Case("s04 just too large", large_header((4 << 20) + 1), 3, (FILE, "more than the 4194304 allowed")),
    Case(
        "s04 many lists below the limit",
        lambda folder: header(b'{"a":[' + b"[]," * 1_300_000 + b"[]]}")(folder),
        3,
        (FILE, "not a sound safetensors file"),
        apart=True,
    ),
)
test_s05_header_length_a_little_off = refuses(
    Case("s05 one more", header(GOOD, bytes(8), length=LENGTH + 1), 3, (FILE,)),
    Case("s05 one less", header(GOOD, bytes(8), length=LENGTH - 1), 3, (FILE, "not JSON")),
    Case("s05 eight more", header(GOOD, bytes(8), length=LENGTH + 8), 3, (FILE,)),
    Case("s05 beyond the end", header(GOOD, bytes(8), length=LENGTH + 9), 3, (FILE, f"{LENGTH + 9} bytes long")),
)
test_s06_header_not_utf8 = refuses(
    headered("s06 not UTF-8", b"\xff\xfe\xff\xfe", "UTF-8"),
    headered("s06 in a name", b'{"\xff": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "UTF-8"),
    headered("s06 a byte order mark", b"\xef\xbb\xbf" + json.dumps(GOOD).encode()),
    headered("s06 a lone surrogate", b'{"\\ud800": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
)
test_s07_header_of_another_structure = refuses(
    headered("s07 not JSON", b"hello there", "not JSON"),
    headered("s07 a list", b"[]", "this is a list"),
    headered("s07 null", b"null", "this is a NoneType"),
    headered("s07 cut", json.dumps(GOOD)[:-3].encode(), "not JSON"),
    headered("s07 something behind it", json.dumps(GOOD).encode() + b"x", "not JSON"),
    headered("s07 lists 5000 deep", deep("[", "", "]"), "nested too deeply", apart=True),
    headered("s07 objects 5000 deep", deep('{"a":', "1", "}"), "nested too deeply"),
    headered("s07 a million deep", deep("[", "", "]", 1_000_000), "nested too deeply"),
    headered("s07 metadata 5000 deep", b'{"__metadata__":' + deep('{"a":', '""', "}") + b"}", "nested too deeply"),
    headered("s07 a number of 9999 digits", b'{"a": ' + b"9" * 9999 + b"}"),
    headered("s07 entries null", {"a": None}),
    headered("s07 entries lists", {"a": []}),
    headered("s07 entries without a key", {"a": {"dtype": "F32", "shape": [2]}}),
    headered("s07 metadata a number", GOOD | {"__metadata__": 1}),
    headered("s07 metadata a list", GOOD | {"__metadata__": []}),
    headered("s07 metadata of numbers", GOOD | {"__metadata__": {"format": 1}}),
    headered("s07 metadata of null", GOOD | {"__metadata__": {"format": None}}),
    headered("s07 metadata of objects", GOOD | {"__metadata__": {"format": {}}}),
)
test_s08_name_twice = refuses(
    headered(
        "s08 another range", duplicate('"a":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}'), "'a' appears twice",
        data=12,
    ),
    headered("s08 the same range", duplicate('"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'), "appears twice"),
    headered("s08 spelled with an escape", duplicate('"\\u0061":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}')),
    headered("s08 a key of an entry", b'{"a":{"dtype":"F16","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "dtype"),
    headered("s08 the metadata", b'{"__metadata__":{},"__metadata__":{}, ' + json.dumps(GOOD).encode()[1:]),
)  # fmt: skip
test_s09_overlap = refuses(
    headered("s09 half", {"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, "bytes of b overlap those of a", data=12),
    headered("s09 inside", {"a": entry([4], 0, 16), "b": entry([1], 4, 8)}, "overlap", data=16),
    Case("s09 in the checkpoint", edited_header(lambda h: move(h, -4)), 3, (FILE, "overlap")),
)
test_s10_two_names_for_one_range = refuses(
    headered("s10 two names", {"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, "overlap")
)
test_s11_hole = refuses(
    headered("s11 between", {"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, "4 bytes between a and b", data=12),
    headered("s11 at the start", {"a": entry([1], 4, 8)}, "4 bytes between the header and a"),
)
test_s12_trailing_bytes = refuses(
    Case("s12 one byte", resized(1), 3, (FILE, "too long")),
    Case("s12 a second file", resized(1 << 20), 3, (FILE, "too long")),
    headered("s12 without tensors", {}, "too long"),
)
test_s13_cut_short = refuses(
    Case("s13 one byte", resized(-1), 3, (FILE, "cut short", "bytes,", "expected")),
    Case("s13 half", lambda folder: resized(-(size(folder) // 2))(folder), 3, (FILE, "cut short")),
    Case("s13 in the header", lambda folder: resized(200 - size(folder))(folder), 3, (FILE, "header should be")),
    Case("s13 a shard", resized(-1, SECOND), 3, (SECOND, "cut short", "expected"), shards=2),
)
test_s14_offsets = refuses(
    offsets("s14 begin behind end", 8, 0, "a ends before it begins"),
    offsets("s14 negative", -8, 0, "negative"),
    offsets("s14 fractional", 0.5, 8.5, "fractional"),
    offsets("s14 whole but fractional", 0.0, 8.0, "fractional"),
    offsets("s14 2^64", 0, 1 << 64),
    offsets("s14 beyond the end", 0, 1 << 40),
    headered("s14 three", {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}),
    headered("s14 as text", {"a": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}}),
)
test_s15_shape_and_bytes_differ = refuses(
    headered("s15 too few bytes", {"a": entry([3], 0, 8)}, "a: shape [3] of F32 takes 12 bytes, its range has 8"),
    headered("s15 too many bytes", {"a": entry([1], 0, 8)}, "takes 4 bytes, its range has 8"),
    headered("s15 another type", {"a": entry([2], 0, 8, "BF16")}, "takes 4 bytes, its range has 8"),
    headered("s15 no dimension", {"a": entry([], 0, 8)}, "takes 4 bytes"),
    headered("s15 a negative dimension", {"a": entry([-2], 0, 8)}, "negative"),
)
test_s16_shape_overflows = refuses(
    headered("s16 product", {"a": entry([1 << 40, 1 << 40], 0, 8)}, "a: shape [1099511627776, 1099511627776]"),
    headered("s16 product of bytes", {"a": entry([1 << 62], 0, 8)}, "a: shape"),
    headered("s16 to nothing", {"a": entry([1 << 32, 1 << 32], 0, 0)}, "a: shape", data=0),
    headered("s16 a thousand dimensions", {"a": entry([1 << 62] * 1000, 0, 8)}),
    headered("s16 a dimension of 2^64", {"a": entry([1 << 64], 0, 8)}),
)
test_s18_dimension_of_zero = refuses(
    Case("s18 a norm", edited_header(lambda h: resize_norm(h, [0])), 3, (FILE,)),
    Case("s18 no weights at all", header({NORM: entry([0], 0, 0)}), 3, ("missing tensors",)),
    Case("s18 a matrix of no rows", header({"model.embed_tokens.weight": entry([0, 64], 0, 0)}), 3, ("missing",)),
)
test_s20_very_many_tensors = refuses(
    Case(
        "s20 100,000 tensors", many_tensors(100_000), 3, (FILE, "more than the 4194304 allowed"),
        apart=True, megabytes=200, cpu_seconds=2,
    ),
    Case(
        "s20 50,000 tensors", many_tensors(50_000), 3, ("unexpected tensors", "and 49995 more"),
        apart=True, megabytes=200, cpu_seconds=2,
    ),
    Case(
        "s20 of known names", many_tensors(30_000, name="model.layers.0.mlp.up_proj.weight"), 3,
        ("unexpected tensors", "and 29995 more"), apart=True, megabytes=200, cpu_seconds=2,
    ),
)  # fmt: skip
