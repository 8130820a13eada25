"""Hard limits of size and shape, so that no file or function grows past what one reads in one go."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("model", "exporter", "quantize", "runtime", "exaone_export", "plugins")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
GRAB_BAGS = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py"}


def _functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_budgets(path: Path) -> None:
    assert path.name not in GRAB_BAGS
    assert len(path.read_text().splitlines()) <= 400
    long = [f"{path.name}:{node.lineno} {node.name}" for node in _functions(path) if _length(node) > 60]
    assert not long


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_every_room_is_typed_for_its_users() -> None:
    assert all((ROOT / room / "py.typed").exists() for room in ROOMS if room != "plugins")
