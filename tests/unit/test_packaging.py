"""The installed distribution: rooms, metadata, entry points, data files, optimum's plugin."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from pathlib import Path

import pytest

import exaone_export

ROOT = Path(__file__).parents[2]
ROOMS = ("model", "exporter", "quantize", "runtime", "exaone_export")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_no_other_distribution_owns_a_room() -> None:
    owners = importlib.metadata.packages_distributions()
    # An editable install lists no packages: whatever is listed must be ours.
    assert all(set(owners.get(room, ["exaone-export"])) == {"exaone-export"} for room in ROOMS)


def test_version_is_told_in_one_voice() -> None:
    assert PROJECT["project"]["version"] == exaone_export.__version__
    assert importlib.metadata.version("exaone-export") == exaone_export.__version__


def test_licence_is_apache() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert importlib.metadata.metadata("exaone-export")["License-Expression"] == "Apache-2.0"


def test_base_install_has_no_torch() -> None:
    base = " ".join(PROJECT["project"]["dependencies"])
    assert not any(name in base for name in ("torch", "transformers", "optimum", "onnx-ir", "safetensors"))


def test_constraints_pin_every_direct_requirement() -> None:
    text = (ROOT / "constraints.txt").read_text()
    pinned = {_bare(line) for line in text.splitlines() if line and not line.startswith("#")}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = {_bare(line) for line in [*PROJECT["project"]["dependencies"], *extras["export"], *extras["dev"]]}
    assert wanted - {"exaone_export"} <= pinned


def test_low_constraints_are_the_declared_lower_bounds() -> None:
    """torch is not: one build of it is all that is tested."""
    lines = (ROOT / "constraints-low.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    extras = PROJECT["project"]["optional-dependencies"]
    names = ("export", "chat", "constrained", "plot", "video")
    wanted = [*PROJECT["project"]["dependencies"], *(line for name in names for line in extras[name])]
    bounds = {_bare(line): line.partition(">=")[2].partition(",")[0] for line in wanted}
    found = {_bare(name): version for name, version in pinned.items()}
    assert set(found) == set(bounds)
    assert {name for name, bound in bounds.items() if _numbers(found[name]) != _numbers(bound)} == {"torch"}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in [*version.split("."), "0", "0"][:3])


def test_loggers_have_one_name_above_them() -> None:
    """Their own names would be everybody's: `model`, `runtime`."""
    named = re.compile(r"getLogger\((.*?)\)")
    foreign = {"torch", "onnx_ir", "PIL"}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            for name in named.findall(path.read_text()):
                assert name.strip("\"'").partition(".")[0] in {"exaone_export", "name", *foreign}, (path, name)


def test_no_room_is_imported_by_its_bare_name() -> None:
    """`model` is what everybody calls a variable."""
    bare = re.compile(rf"^\s*import ({'|'.join(ROOMS[:-1])})\b(?!\.)", re.MULTILINE)
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    assert [str(path) for path in files if bare.search(path.read_text())] == []


def _bare(requirement: str) -> str:
    for mark in "[<>=! ":
        requirement = requirement.partition(mark)[0]
    return requirement.lower().replace("-", "_")


def test_console_script_is_the_command_line() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="exaone-export")
    assert script.load() is importlib.import_module("exaone_export.cli").main


@pytest.mark.slow
def test_sdist_and_the_wheel_made_of_it_hold_rooms_and_data_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("build")
    source = tmp_path / "source"
    keep = [*ROOMS, "plugins", "pyproject.toml", "README.md", "LICENSE"]
    for name in keep:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    names = set(_wheel_names(wheel))
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {*ROOMS, "optimum"}
    assert "optimum/commands/register/register_exaone.py" in names
    assert not any(name.startswith("optimum/") and name.endswith("__init__.py") for name in names)
    assert {f"{room}/py.typed" for room in ROOMS} <= names
    assert {"quantize/recipes/int8.toml", "quantize/recipes/int4.toml"} <= names
    assert any(name.startswith("exaone_export/demo/") and name.endswith(".safetensors") for name in names)
    assert any(name.startswith("exaone_export/demo/images/") and name.endswith(".png") for name in names)
    assert {"exaone_export/verifying/prompts.jsonl", "exaone_export/calibration/prompts.jsonl"} <= names
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    packed = {name for name in names if ".dist-info" not in name and not name.startswith("optimum/")}
    assert packed | {"pyproject.toml", "README.md", "LICENSE"} <= held


def _wheel_names(wheel: Path) -> list[str]:
    import zipfile

    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_optimum_cli_offers_the_export() -> None:
    pytest.importorskip("optimum")
    command = Path(sysconfig.get_path("scripts")) / "optimum-cli"
    done = subprocess.run(
        [str(command), "export", "exaone", "--help"], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "--model" in done.stdout
    assert "--quantize" in done.stdout


def test_optimum_cli_fails_as_our_own_command_does(tmp_path: Path) -> None:
    pytest.importorskip("optimum")
    command = Path(sysconfig.get_path("scripts")) / "optimum-cli"
    done = subprocess.run(
        [str(command), "export", "exaone", "-m", str(tmp_path / "none"), str(tmp_path / "out"), "--quantize", "int3"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode in (2, 3)
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
