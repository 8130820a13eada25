"""Tiny checkpoints and their bundles, each exported once for all tests and all workers."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import exaone_export as ee
from tests.tiny import make_checkpoint

KINDS = ("hybrid", "dense", "vlm")


class Bundles:
    """Makes what a test asks for, in a folder that all workers share; float bundles once, others from them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def source(self, kind: str) -> Path:
        """A checkpoint; "vlm" accepts images down to 28x28 pixels."""
        folder = self.root / kind
        with self.making(folder) as missing:
            if missing:
                make_checkpoint(folder, kind, seed=7, dtype="fp32", sharded=3 if kind == "hybrid" else 1)
                self.accept_small_images(folder / "preprocessor_config.json")
        return folder

    def bundle(self, kind: str, recipe: str = "none") -> Path:
        """A bundle of that checkpoint. Treat it as read-only."""
        folder = self.root / f"{kind}-{recipe}"
        origin = self.source(kind) if recipe == "none" else self.bundle(kind)
        with self.making(folder) as missing:
            if missing and recipe == "none":
                ee.export(origin, folder)
            elif missing:
                ee.quantize(origin, folder, recipe=recipe)
        return folder

    @staticmethod
    def accept_small_images(path: Path) -> None:
        if path.exists():
            path.write_text(json.dumps(json.loads(path.read_text()) | {"min_pixels": 784}))

    @contextmanager
    def making(self, folder: Path) -> Iterator[bool]:
        """Whether the folder is to be made now; other workers wait until it is."""
        with (self.root / f".{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = self.root / f".{folder.name}.done"
            yield not done.exists()
            done.touch()


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "bundles"
    root.mkdir(exist_ok=True)
    return Bundles(root)
