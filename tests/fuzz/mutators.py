"""Damage: to bytes, and to JSON values with their structure kept."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from random import Random
from typing import Any, Final

INTEGERS: Final = (
    0, 1, 2, 3, 7, 8, 16, 31, 64, 127, 128, 255, 256, 1000, 4096, 32767, 32768, 65535, 65536, (1 << 24) - 1, 1 << 24,
    (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 53) + 1, (1 << 62), (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
    1 << 64, 10**30, -1, -2, -128, -(1 << 31), -(1 << 63),
)  # fmt: skip
TEXTS: Final = (
    b"1e400", b"-1", b"NaN", b"Infinity", b"null", b"true", b"[]", b"{}", b"9" * 20, b"9" * 5000, b'""', b"\xff",
    b"\x00", b'"', b"{", b"]", b"\\u0000", b"\\ud800", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"[" * 2000, b'{"a":' * 600,
    b"../", b"/dev/zero", b"\n", b"0x10", b"1_000", b"\xc0\x80",
)  # fmt: skip
_HOSTILE: Final[tuple[Any, ...]] = (
    None, True, False, 0, -1, 1, 0.0, -0.0, 0.5, 1.5, 1e308, 1e-320, float("nan"), float("inf"), -float("inf"), "",
    " ", "0", "1", "true", "None", "x" * 3000, "../../etc/passwd", "/dev/zero", "a\0b", "\ud800", "\x1b[31m", "가나다",
    [], {}, [[]], [None], {"": None}, ["a"] * 300, [1, 2, 3], {"__class__": "x"}, "<|endofturn|>", "{{ 7 * 7 }}",
)  # fmt: skip
_STOP: Final = 0.22
_PAIR: Final = re.compile(r'\{\s*("(?:[^"\\]|\\.)*")\s*:')


def spoiled(raw: bytes, random: Random, start: int = 0, end: int | None = None) -> bytes:
    """A few changes to the bytes from `start` to `end`."""
    data = bytearray(raw)
    last = len(data) if end is None else end
    for _ in range(random.choice((1, 1, 1, 1, 2, 3, 6))):
        last = max(start + 1, min(last, len(data)))
        before = len(data)
        _CHANGES[random.randrange(len(_CHANGES))](data, random, start, last)
        last += len(data) - before
        if len(data) <= start:
            break
    return bytes(data)


def _flip(data: bytearray, random: Random, start: int, end: int) -> None:
    at = random.randrange(start, end)
    if at < len(data):
        data[at] ^= 1 << random.randrange(8)


def _put(data: bytearray, random: Random, start: int, end: int) -> None:
    at = random.randrange(start, end)
    data[at : at + 1] = bytes([random.choice((0, 1, 9, 10, 32, 34, 48, 57, 92, 127, 128, 254, 255))])


def _delete(data: bytearray, random: Random, start: int, end: int) -> None:
    at = random.randrange(start, end)
    del data[at : at + random.choice((1, 1, 2, 4, 8, 20, 100))]


def _insert(data: bytearray, random: Random, start: int, end: int) -> None:
    at = random.randrange(start, end)
    data[at:at] = random.choice(TEXTS) if random.random() < 0.6 else random.randbytes(random.randrange(1, 9))


def _replace(data: bytearray, random: Random, start: int, end: int) -> None:
    at = random.randrange(start, end)
    data[at : at + random.randrange(8)] = random.choice(TEXTS)


def _copy(data: bytearray, random: Random, start: int, end: int) -> None:
    at, other, count = random.randrange(start, end), random.randrange(start, end), random.choice((1, 2, 4, 8, 32))
    data[at : at + count] = data[other : other + count]


def _double(data: bytearray, random: Random, start: int, end: int) -> None:
    at, count = random.randrange(start, end), random.choice((1, 4, 16, 64))
    data[at:at] = data[at : at + count]


def _number(data: bytearray, random: Random, start: int, end: int) -> None:
    at = random.randrange(start, end)
    form = random.choice("bBhHiIqQ")
    size = struct.calcsize(form)
    value = random.choice(INTEGERS) % (1 << (8 * size))
    data[at : at + size] = value.to_bytes(size, random.choice(("little", "big")))


def _cut(data: bytearray, random: Random, start: int, end: int) -> None:
    del data[random.randrange(start, end) :]


_CHANGES: Final[tuple[Callable[[bytearray, Random, int, int], None], ...]] = (
    _flip, _flip, _put, _delete, _insert, _replace, _copy, _double, _number, _number, _cut,
)  # fmt: skip


def hostile(random: Random) -> Any:
    """A JSON value that readers stumble over."""
    chance = random.random()
    if chance < 0.3:
        return random.choice(INTEGERS)
    if chance < 0.31:
        value: Any = random.choice((1, "x", None))
        for _ in range(random.choice((20, 70, 200))):
            value = [value] if random.random() < 0.5 else {"a": value}
        return value
    return random.choice(_HOSTILE)


def spoiled_value(value: Any, random: Random) -> Any:
    """A copy of a JSON value with one to three changes in its structure."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        value = _changed(value, random, value)
    return value


def _changed(value: Any, random: Random, root: Any) -> Any:
    """Goes down to somewhere and changes something there; only what is on the way is copied."""
    if isinstance(value, dict) and value and random.random() > _STOP:
        key = random.choice(list(value))
        return {**value, key: _changed(value[key], random, root)}
    if isinstance(value, list) and value and random.random() > _STOP:
        place = random.randrange(len(value))
        return [*value[:place], _changed(value[place], random, root), *value[place + 1 :]]
    if isinstance(value, dict) and random.random() < 0.8:
        return _changed_object(value, random, root)
    if isinstance(value, list) and random.random() < 0.8:
        return _changed_list(value, random)
    if type(value) in (int, float) and random.random() < 0.5:
        return random.choice((value + 1, value - 1, -value, value * 2, value // 2, float(value), str(value)))
    if isinstance(value, str) and value and random.random() < 0.5:
        return _changed_text(value, random)
    return hostile(random)


def _changed_object(value: dict[str, Any], random: Random, root: Any) -> dict[str, Any]:
    keys = list(value)
    kind = random.randrange(6)
    if kind == 0 or not keys:
        return value | {random.choice(("", "extra", "a\0", "\ud800", "x" * 500, "auto_map", "1")): hostile(random)}
    key = random.choice(keys)
    if kind == 1:
        return {name: item for name, item in value.items() if name != key}
    if kind == 2:
        other = random.choice(keys)
        return value | {key: value[other], other: value[key]}
    if kind == 3:
        return {(f"{name}_" if name == key else name): item for name, item in value.items()}
    if kind == 4:
        return value | {_changed_text(key, random): value[key]}
    return value | {key: root if random.random() < 0.1 else hostile(random)}


def _changed_list(value: list[Any], random: Random) -> list[Any]:
    kind = random.randrange(5)
    if kind == 0 or not value:
        return [*value, hostile(random)]
    place = random.randrange(len(value))
    if kind == 1:
        return value[:place] + value[place + 1 :]
    if kind == 2:
        return [*value[:place], value[place], *value[place:]]
    if kind == 3:
        return value[:place]
    return value[::-1]


def _changed_text(text: str, random: Random) -> str:
    at = random.randrange(len(text) + 1)
    kind = random.randrange(5)
    if kind == 0:
        return text[:at] + random.choice(("\0", "\ud800", "/", "..", "\n", "\x1b", "é", "\u202e", " ")) + text[at:]
    if kind == 1:
        return text[:at]
    if kind == 2:
        return text + text
    if kind == 3:
        return text.swapcase()
    return text[:at] + chr(random.randrange(1, 0x3000)) + text[at + 1 :]


def json_bytes(value: Any, random: Random) -> bytes:
    """A value as JSON, now and then with a key twice."""
    text = json.dumps(value, ensure_ascii=random.random() < 0.5)
    if random.random() < 0.05:
        found = list(_PAIR.finditer(text))
        if found:
            at = random.choice(found)
            text = (
                f"{text[: at.start() + 1]}{at.group(1)}: {random.choice(('null', '1', '[]'))}, {text[at.start() + 1 :]}"
            )
    return text.encode("utf-8", "surrogatepass")


def spoiled_json(raw: bytes, value: Any, random: Random) -> bytes:
    """Either the bytes or the value that they hold changed."""
    if random.random() < 0.35:
        return spoiled(raw, random)
    data = json_bytes(spoiled_value(value, random), random)
    return spoiled(data, random) if random.random() < 0.1 else data


def strict_json(data: bytes) -> Any:
    """What a strict reader takes `data` for.

    Raises:
        ValueError: not UTF-8, not JSON, or a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("too deep") from None


def same(stated: Any, read: Any) -> bool:
    """Whether a number is what a file states: 1 is not true."""
    return bool(stated == read) and isinstance(stated, bool) == isinstance(read, bool)
