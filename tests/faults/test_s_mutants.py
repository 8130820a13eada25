"""Random damage to every kind of file that is read before work begins: refused, or as good as undamaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from exaone_export.usable import check_usable
from model.config import load_config
from model.errors import ExaoneError
from model.shards import INDEX, SINGLE
from model.weights import Checkpoint
from tests import tiny

COUNT = 150
TEXTS = (b"1e400", b"-1", b"NaN", b"null", b"true", b"[]", b"{}", b"9" * 20, b'""', b"\xff", b"\x00", b'"', b"{", b"]")


def mutant(raw: bytes, random: Random, end: int) -> bytes:
    """A few bytes below `end` changed, removed, doubled, or replaced by what readers stumble over."""
    changed = bytearray(raw)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at = random.randrange(end)
        kind = random.randrange(4)
        if kind == 0:
            changed[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            del changed[at : at + random.randrange(1, 20)]
        elif kind == 2:
            other = random.randrange(end)
            changed[at : at + 8] = changed[other : other + 8]
        else:
            changed[at : at + random.randrange(6)] = random.choice(TEXTS)
        end = min(end, len(changed))
    return bytes(changed)


def bound(folder: Path) -> None:
    Checkpoint.open(folder).bind(load_config(folder))


@pytest.mark.parametrize(
    ("name", "read", "kind"),
    [
        (SINGLE, bound, "hybrid"),
        (INDEX, bound, "hybrid"),
        ("config.json", bound, "vlm"),
        ("tokenizer.json", check_usable, "hybrid"),
        ("tokenizer_config.json", check_usable, "hybrid"),
        ("generation_config.json", check_usable, "hybrid"),
        ("preprocessor_config.json", check_usable, "vlm"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_damaged_files_are_refused_as_such(tmp_path: Path, name: str, read: Callable[[Path], None], kind: str) -> None:
    folder = tiny.make_checkpoint(tmp_path / "source", kind, sharded=2 if name == INDEX else 1)
    raw = (folder / name).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little") if name == SINGLE else len(raw)
    random, refused = Random(name), 0
    for _ in range(COUNT):
        (folder / name).write_bytes(mutant(raw, random, end))
        try:
            read(folder)
        except ExaoneError as reason:  # any other exception fails the test
            refused += 1
            assert reason.exit_code in (2, 3, 4)
            assert len(str(reason)) < 1000
    assert refused > COUNT // 3
