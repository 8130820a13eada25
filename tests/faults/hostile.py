"""Bundles that are damaged or hostile: how they are made, and what refusing one looks like.

Somebody hostile writes the manifest too, so most are signed again: sizes and hashes are those of the files that are
there, and only what is inside can give them away.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import onnx
import pytest

import exaone_export as ee
from model.bundle import MANIFEST
from tests.faults.harness import Outcome, check_refusal, run_here
from tests.tiny import make_checkpoint

ROOT = Path(__file__).parents[2]
DECODER, DATA = "decoder.onnx", "decoder.onnx.data"
Spoil = Callable[[Path], object]
_ONE_LAYER: dict[str, Any] = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
_SMALL: dict[str, dict[str, Any]] = {
    "dense": _ONE_LAYER,
    "vlm": _ONE_LAYER | {"sliding_window": None, "draft": False, "vision": {"depth": 1, "fullatt_block_indexes": [0]}},
}


@dataclass(frozen=True)
class Bad:
    """One bad bundle.

    Attributes:
        name: number of its kind, then what is wrong.
        spoil: is given the folder of a sound bundle.
        words: what the message of `generate` says.
        code: of `generate`.
        verify: exit code of `verify`.
        kind, recipe: of the sound bundle.
        signed: whether the manifest is made to agree with the files.
        apart: whether to run it in a process of its own, because it may hang.
    """

    name: str
    spoil: Spoil
    words: tuple[str, ...] = ()
    code: int = 4
    verify: int = 4
    kind: str = "dense"
    recipe: str = "none"
    signed: bool = True
    apart: bool = False


@lru_cache
def sound_bundle(kind: str, recipe: str = "none") -> dict[str, bytes]:
    """Name → content of a sound bundle's files, of one layer."""
    with tempfile.TemporaryDirectory() as folder:
        source = make_checkpoint(Path(folder, "source"), kind, dtype="fp32", seed=5, **_SMALL[kind])
        ee.export(source, Path(folder, "bundle"), quantize=recipe)
        return {path.name: path.read_bytes() for path in Path(folder, "bundle").iterdir()}


def made(root: Path, kind: str = "dense", recipe: str = "none") -> Path:
    """A sound bundle, to be spoiled."""
    folder = root / "bundle"
    folder.mkdir(parents=True)
    for name, content in sound_bundle(kind, recipe).items():
        (folder / name).write_bytes(content)
    return folder


def sign(folder: Path) -> None:
    """Puts the true size and hash of every listed file that is an ordinary one into the manifest."""

    def change(raw: dict[str, Any]) -> None:
        for name in raw["files"]:
            path = folder / name
            if path.is_file():
                content = path.read_bytes()
                raw["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    manifest(change)(folder)


def manifest(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Another manifest."""
    return json_file(MANIFEST, change)


def json_file(name: str, change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Other values in a JSON file; NaN is written as such."""

    def spoil(folder: Path) -> None:
        raw = json.loads((folder / name).read_text(encoding="utf-8"))
        change(raw)
        (folder / name).write_text(json.dumps(raw, ensure_ascii=False), encoding="utf-8")

    return spoil


def graph(change: Callable[[onnx.ModelProto], object], name: str = DECODER) -> Spoil:
    """Another graph."""

    def spoil(folder: Path) -> None:
        model = onnx.load(folder / name, load_external_data=False)
        change(model)
        (folder / name).write_bytes(model.SerializeToString())

    return spoil


def written(name: str, change: Callable[[bytes], bytes]) -> Spoil:
    """Other bytes in a file."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def instead(name: str, make: Callable[[Path], object]) -> Spoil:
    """Something else in a file's place."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return spoil


def moved_out(link: Callable[[Path, Path], object], name: str) -> Spoil:
    """A file that lies outside the folder, and a link to it inside."""

    def spoil(folder: Path) -> None:
        outside = folder.parent / "outside"
        (folder / name).rename(outside)
        link(outside, folder / name)

    return spoil


def external(model: onnx.ModelProto, name: str = "") -> onnx.TensorProto:
    """A tensor that lies in the data file: the one of a name, or the first."""
    return next(t for t in model.graph.initializer if t.external_data and name in t.name)


def entry(tensor: onnx.TensorProto, key: str, value: str) -> None:
    """Sets one of the entries that say where a tensor lies."""
    for pair in tensor.external_data:
        if pair.key == key:
            pair.value = value


def renamed(old: str, op: str, domain: str) -> Callable[[onnx.ModelProto], None]:
    """The operators of one kind are of another."""

    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type == old:
                node.op_type, node.domain = op, domain

    return change


def place_of(tensor: onnx.TensorProto) -> tuple[int, int]:
    """Offset and length of a tensor in its file."""
    entries = {pair.key: pair.value for pair in tensor.external_data}
    return int(entries["offset"]), int(entries["length"])


def asks(folder: Path) -> tuple[str, ...]:
    """A command that runs the bundle."""
    return ("generate", str(folder), "안녕 x", "--greedy", "--max-new-tokens", "3", "--threads", "1")


def verifies(folder: Path) -> tuple[str, ...]:
    """A command that looks at all of the bundle."""
    return ("verify", str(folder), "--quiet")


def check_verify(outcome: Outcome, code: int, *words: str) -> None:
    """Holds what `verify` says against the rules: beside them, it prints what it found."""
    if code:
        check_refusal(replace(outcome, stdout=""), code, words, Path("/nowhere"))
    else:
        assert outcome.code == 0, outcome.stderr


def run_alone(arguments: tuple[str, ...], seconds: float = 60) -> Outcome:
    """Runs a command in a process of its own, which may not take longer than this."""
    command = [sys.executable, "-m", "exaone_export", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds, check=False, env=environment, cwd=ROOT
    )
    return Outcome(done.returncode, done.stdout, done.stderr, {})


def check_bad(case: Bad, root: Path) -> None:
    """Tries a bundle with `generate` and `verify`, and holds what they say against the rules."""
    folder = made(root, case.kind, case.recipe)
    case.spoil(folder)
    if case.signed:
        sign(folder)
    run = run_alone if case.apart else run_here
    check_refusal(run(asks(folder)), case.code, case.words, root / "nowhere")
    check_verify(run(verifies(folder)), case.verify)


def refused(*cases: Bad) -> Callable[[Bad, Path], None]:
    """A test of these cases."""

    @pytest.mark.parametrize("case", [pytest.param(case, id=case.name.replace(" ", "_")) for case in cases])
    def test(case: Bad, tmp_path: Path) -> None:
        check_bad(case, tmp_path)

    return test


def answer(folder: Path) -> str:
    """What a bundle that can be used says."""
    outcome = run_here(asks(folder))
    assert outcome.code == 0, outcome.stderr
    return outcome.stdout
