"""The real command under limits of memory and open files."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from exaone_export import cli
from exporter import disk
from tests.faults import crash
from tests.faults.crash import beside, child


def export(source: Path, out: Path, *, gigabytes: float, files: int = 1024) -> subprocess.CompletedProcess[str]:
    """Exports with as much address space and as many open files."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 1e9), int(gigabytes * 1e9)))
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    return subprocess.run(
        [
            sys.executable,
            "-m",
            "exaone_export",
            "export",
            str(source),
            str(out),
            "--quantize",
            "int4",
            "--threads",
            "2",
        ],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )


def test_f18_f24_a_limit_of_memory_and_of_open_files(tmp_path: Path) -> None:
    """With a tenth more than it says to take it comes through; with half of that it says so before any work."""
    source = crash.small_checkpoint(tmp_path / "source")
    little = export(source, tmp_path / "out", gigabytes=0.9)
    stated = re.search(r"the export takes about (\d+\.\d+) GB of address space, the limit is 900\.00 MB", little.stderr)
    assert stated, little.stderr
    assert little.returncode == 6
    need = float(stated[1])
    half = export(source, tmp_path / "out", gigabytes=need / 2)
    assert (half.returncode, half.stderr[:6], len(half.stderr.splitlines())) == (6, "error:", 1), half.stderr
    assert beside(tmp_path / "out") == []
    enough = export(source, tmp_path / "new\nout", gigabytes=need * 1.1, files=64)
    assert (enough.returncode, enough.stderr) == (0, ""), enough.stderr
    assert cli.main(["verify", str(tmp_path / "new\nout"), "--quiet"]) == 0


def test_f24_what_is_opened_is_closed(tmp_path: Path) -> None:
    """However many exports, failing ones included: descriptors do not add up."""
    source = crash.small_checkpoint(tmp_path / "source", assets=False)

    def many() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        before = len(os.listdir("/proc/self/fd"))
        for number in range(6):
            crash.export(source, tmp_path / f"out{number}")()
            with pytest.raises(OSError, match="full"):
                _full_at_the_end(source, tmp_path / "out")
        assert len(os.listdir("/proc/self/fd")) == before

    _, seen = child(many, tmp_path / "notes")
    assert seen.outcome == "done", seen.outcome


def _full_at_the_end(source: Path, out: Path) -> None:
    def fault(operation: str, path: Path) -> None:
        if path.name == "exaone_export.json":
            raise OSError("full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "about_to", fault)
        crash.export(source, out)()
