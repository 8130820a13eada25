"""Typed, bounded access to the keys of a JSON configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from model.errors import CheckpointError

_LARGEST = 1 << 31


class Reader:
    """One JSON object; every complaint is a CheckpointError that names the key with its path.

    Args:
        raw: the object.
        prefix: path of the object inside its file, with a trailing dot ("text_config.").
        where: name of the file for messages.
    """

    def __init__(self, raw: Mapping[str, Any], prefix: str, where: str) -> None:
        self.raw, self.prefix, self.where = raw, prefix, where

    def fail(self, key: str, why: str, remedy: str = "") -> CheckpointError:
        """The error to raise about `key`."""
        return CheckpointError("unusable configuration", f"{self.where}: {self.prefix}{key}", why, remedy)

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.raw.get(key) is not None

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = _LARGEST) -> int:
        """A whole number in low..high; null counts as missing, and without default is refused."""
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.fail(key, "the key is missing")
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, f"a whole number is needed, not {str(value)[:60]!r}")
        if not low <= value <= high:
            raise self.fail(key, f"{str(value)[:40]} is outside {low}..{high}")
        return value

    def optional_integer(self, key: str, low: int = 0) -> int | None:
        """A whole number, or None where the key is missing or null."""
        return self.integer(key, low=low) if self.has(key) else None

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.fail(key, "the key is missing")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fail(key, f"a number is needed, not {str(value)[:60]!r}")
        if not (abs(value) < 1e30 and math.isfinite(value) and value > 0):
            raise self.fail(key, f"{str(value)[:40]} is not a positive finite number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """A boolean; null counts as missing."""
        value = self.raw.get(key, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, f"true or false is needed, not {str(value)[:60]!r}")
        return value

    def child(self, key: str) -> Reader:
        """The object under `key`."""
        value = self.raw.get(key)
        if not isinstance(value, dict):
            raise self.fail(key, "an object is needed")
        return Reader(value, f"{self.prefix}{key}.", self.where)

    def refuse(self, key: str, allowed: tuple[object, ...]) -> None:
        """Refuses a key whose value means something that is not implemented."""
        if key in self.raw and self.raw[key] not in allowed:
            raise self.fail(key, f"{str(self.raw[key])[:60]!r} is not implemented (only {allowed[-1]!r} is)")
