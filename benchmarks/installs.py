"""Builds the wheel and the sdist, installs them into clean environments, and tries what each of them promises.

    make install-check
    python -m benchmarks.installs [WORK] [--only NAME...] [--python PATH...] [--out FILE.json] [--keep]

Needs the development environment and a package index. The wheel is built from the sdist, compared with one built from
the checkout, and installed with the newest tested versions (constraints.txt), with the oldest declared ones
(constraints-low.txt), with extras, and into every Python 3.11 or newer that `--python` names or PATH has. Each
environment: pip check, names on the path that are ours alone, `--help` of every command, then generate, verify,
inspect, batch and doctor on a bundle of the demonstration checkpoint; with `export`, an export; without, its refusal.
Torch is installed in one version only, that of constraints.txt.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.installs_checks import check
from benchmarks.installs_envs import Environment, Wrong, install, planned
from exaone_export.demo import checkpoint_folder

ROOT = Path(__file__).parents[1]


def main() -> int:
    """Runs everything; the exit code says whether all of it was right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", help="folder for what is built (default: a temporary one)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of these names, or beginnings of them")
    parser.add_argument("--python", nargs="+", default=[], metavar="PATH", help="interpreters (default: those on PATH)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the figures")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        return run(work, arguments)


def run(work: Path, arguments: argparse.Namespace) -> int:
    """Builds, makes each environment, prints a line for each."""
    dist = work / "dist"
    wheel, sdist = build(dist)
    print(
        f"{sdist.name} {sdist.stat().st_size / 1e6:.1f} MB, {wheel.name} {wheel.stat().st_size / 1e6:.1f} MB",
        flush=True,
    )
    bundle = bundle_of_demo(work / "bundle")
    rows: list[dict[str, Any]] = []
    for environment in planned(arguments.python):
        if arguments.only and not environment.name.startswith(tuple(arguments.only)):
            continue
        rows.append(tried(work, environment, sdist if environment.sdist else wheel, bundle, keep=arguments.keep))
        print(" · ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(rows, indent=2) + "\n")
    wrong = [row["name"] for row in rows if "wrong" in row]
    print(
        f"{len(rows) - len(wrong)} of {len(rows)} environments are right"
        + (f"; not: {', '.join(wrong)}" if wrong else "")
    )
    return 1 if wrong or not rows else 0


def build(dist: Path) -> tuple[Path, Path]:
    """Wheel and sdist, the wheel made from the sdist; fails where the checkout's own wheel holds something else."""
    shutil.rmtree(dist, ignore_errors=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir"]
    called([*command, str(dist), str(ROOT)])
    called([*command, str(dist / "direct"), "--wheel", str(ROOT)])
    (wheel,), (sdist,), (direct,) = dist.glob("*.whl"), dist.glob("*.tar.gz"), (dist / "direct").glob("*.whl")
    if contents(wheel) != contents(direct):
        raise SystemExit(f"error: the sdist does not make the wheel that the checkout makes: {wheel}, {direct}")
    return wheel, sdist


def contents(wheel: Path) -> dict[str, int]:
    """File → CRC of what is in it."""
    with zipfile.ZipFile(wheel) as archive:
        return {item.filename: item.CRC for item in archive.infolist()}


def bundle_of_demo(folder: Path) -> Path:
    """A bundle of the demonstration checkpoint, made in the development environment."""
    if not folder.exists():
        source = str(checkpoint_folder())
        called([sys.executable, "-m", "exaone_export", "export", source, str(folder), "--quantize", "int8", "-q"])
    return folder


def called(command: Sequence[str]) -> None:
    """Runs a command that has to succeed."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def tried(work: Path, environment: Environment, package: Path, bundle: Path, *, keep: bool) -> dict[str, Any]:
    """One environment's row; `wrong` says what went wrong, if anything did."""
    folder = work / "envs" / environment.name
    row: dict[str, Any] = {"name": environment.name}
    try:
        row |= install(folder, environment, package)
        row |= check(folder, environment, bundle, work / "scratch" / environment.name)
    except (Wrong, subprocess.SubprocessError, OSError) as reason:
        row["wrong"] = str(reason)[-1500:]
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    return row


if __name__ == "__main__":
    raise SystemExit(main())
