"""What refusing a bad checkpoint looks like, and the two ways to try it: in this process, or in one under limits.

Numbers like S07 are those of the table of faults that the toolkit is tried against: a kind of fault each, with several
inputs.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from exaone_export import cli
from exporter import export as export_room
from model.bundle import Manifest, file_sha256, read_manifest
from tests import tiny
from tests.faults.quick_graphs import quick_trace

CHILD = Path(__file__).with_name("child.py")
_LARGE = 1 << 20
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{6,}")


@dataclass(frozen=True)
class Case:
    """One bad checkpoint.

    Attributes:
        name: number of its kind, then what is wrong: "s07 a list".
        spoil: is given the folder of a sound checkpoint.
        code: the exit code.
        words: what the message says, in any order.
        kind: of the sound checkpoint, see `tests.tiny`.
        shards: it has.
        options: of the command.
        traces: whether the fault is in the weights' values, so that it shows only when they are read.
        apart: whether to run it in a process of its own: it may hang, or take all memory.
        megabytes: of memory beyond an idle process.
        cpu_seconds: of computing, the imports not counted.
    """

    name: str
    spoil: Callable[[Path], object]
    code: int
    words: tuple[str, ...]
    kind: str = "hybrid"
    shards: int = 1
    options: tuple[str, ...] = ()
    traces: bool = False
    apart: bool = False
    megabytes: int = 512
    cpu_seconds: float = 10

    @property
    def row(self) -> str:
        """The number of its kind."""
        return self.name.split()[0]

    def prepare(self, root: Path) -> tuple[str, ...]:
        """Makes and spoils the checkpoint; returns the command's arguments."""
        source = root / "source"
        source.mkdir(parents=True, exist_ok=True)
        for name, content in sound_files(self.kind, self.shards).items():
            (source / name).write_bytes(content)
        self.spoil(source)
        return ("export", str(source), str(root / "out"), *self.options)


@lru_cache
def sound_files(kind: str, shards: int) -> dict[str, bytes]:
    """Name → content of a sound checkpoint's files."""
    with tempfile.TemporaryDirectory() as folder:
        made = tiny.make_checkpoint(Path(folder), kind, sharded=shards)
        return {path.name: path.read_bytes() for path in made.iterdir()}


def bad(name: str, spoil: Callable[[Path], object], *words: str, code: int = 3, **more: Any) -> Case:
    """A case of a bad checkpoint, which most are."""
    return Case(name, spoil, code, words, **more)


ALL: list[Case] = []  # of the modules that were imported


@dataclass(frozen=True)
class Outcome:
    """What a command did; `figures` as `tests.faults.child` writes them, empty if it was not run apart."""

    code: int
    stdout: str
    stderr: str
    figures: dict[str, float]


def run_here(arguments: tuple[str, ...]) -> Outcome:
    """Runs a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments)
    return Outcome(code, out.getvalue(), err.getvalue(), {})


def run_apart(arguments: tuple[str, ...], figures: Path, *, gigabytes: int = 3, cpu_seconds: int = 60) -> Outcome:
    """Runs a command in a process of its own, which is killed if it takes more than this; its figures are removed."""
    command = [sys.executable, str(CHILD), str(figures), str(gigabytes << 30), str(cpu_seconds), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    taken = json.loads(figures.read_text()) if figures.exists() else {}
    figures.unlink(missing_ok=True)
    return Outcome(done.returncode, done.stdout, done.stderr, taken)


def snapshot(root: Path) -> dict[str, object]:
    """What is under a folder, links and special files as such; a large file counts by size and time."""
    return {str(path.relative_to(root)): _look(path) for path in sorted(root.rglob("*"))}


def _look(path: Path) -> object:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return path.readlink()
    if not stat.S_ISREG(status.st_mode):
        return stat.S_IFMT(status.st_mode)
    return (status.st_size, status.st_mtime_ns) if status.st_size > _LARGE else file_sha256(path)


def check_refusal(outcome: Outcome, code: int, words: tuple[str, ...], root: Path) -> None:
    """Holds a refusal against the rules: its code, one to three lines that name the fault, no inner workings."""
    text = outcome.stderr
    assert outcome.code == code, text[-2000:]
    lines = [line for line in text.splitlines() if not line.startswith("warning: ")]
    assert 1 <= len(lines) <= 3, text[-2000:]
    assert re.match(r"error: [^:]+: .+: .+\.$", lines[0]), lines[0]
    assert [word for word in words if word not in text] == [], text
    assert len(text) < 1000
    assert all(line.isprintable() for line in lines)
    assert "Traceback" not in text
    assert "internal error" not in text
    assert not _ADDRESS.search(text)
    assert str(root) not in text
    assert outcome.stdout == ""


def no_trace(*_: object, **__: object) -> None:
    """What is wrong with headers, names and configuration is found before any work."""
    raise AssertionError("tracing began")


def check_case(case: Case, root: Path) -> Outcome:
    """Tries a case, and holds it against the rules; nothing may have changed but by the case itself."""
    arguments = case.prepare(root)
    before = snapshot(root)
    if case.apart:
        outcome = run_apart(arguments, root / "figures")
        assert outcome.figures, outcome.stderr[-2000:]
        assert outcome.figures["megabytes"] <= case.megabytes
        assert outcome.figures["cpu_seconds"] <= case.cpu_seconds
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(export_room, "_trace", quick_trace if case.traces else no_trace)
            outcome = run_here(arguments)
    check_refusal(outcome, case.code, case.words, root)
    assert snapshot(root) == before
    return outcome


def accepted(root: Path, spoil: Callable[[Path], object], *options: str, **more: Any) -> tuple[Manifest, str]:
    """What an odd but usable checkpoint becomes, its graphs not traced: the manifest, and what was said on the way."""
    arguments = Case("", spoil, 0, (), options=options, **more).prepare(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_room, "_trace", quick_trace)
        outcome = run_here(arguments)
    assert outcome.code == 0, outcome.stderr
    return read_manifest(root / "out"), outcome.stderr


def refuses(*cases: Case) -> Callable[[Case, Path], None]:
    """A test of these cases."""
    ALL.extend(cases)

    @pytest.mark.parametrize("case", [pytest.param(case, id=case.name.replace(" ", "_")) for case in cases])
    def test(case: Case, tmp_path: Path) -> None:
        check_case(case, tmp_path)

    vars(test)["cases"] = cases
    return test
