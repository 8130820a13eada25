"""The installed distribution: rooms, metadata, entry points, data files, optimum's plugin."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
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


def _bare(requirement: str) -> str:
    for mark in "[<>=! ":
        requirement = requirement.partition(mark)[0]
    return requirement.lower().replace("-", "_")


def test_console_script_is_the_command_line() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="exaone-export")
    assert script.load() is importlib.import_module("exaone_export.cli").main


@pytest.mark.slow
def test_wheel_holds_rooms_and_data_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("build")
    source = tmp_path / "source"
    keep = [*ROOMS, "plugins", "pyproject.toml", "README.md", "LICENSE"]
    for name in keep:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(_wheel_names(wheel))
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {*ROOMS, "optimum"}
    assert "optimum/commands/register/register_exaone.py" in names
    assert not any(name.startswith("optimum/") and name.endswith("__init__.py") for name in names)
    assert {f"{room}/py.typed" for room in ROOMS} <= names
    assert {"quantize/recipes/int8.toml", "quantize/recipes/int4.toml"} <= names
    assert any(name.startswith("exaone_export/demo/") and name.endswith(".safetensors") for name in names)


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
