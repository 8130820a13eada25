"""What an import loads, and what it refuses."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "onnxruntime", "onnx", "onnx_ir", "optimum", "numpy", "rich")


def _python(code: str, *, cwd: Path = ROOT, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    program = f"import sys; sys.path.append({str(path)!r})\n{code}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=cwd, timeout=120)


@pytest.mark.parametrize("module", ["exaone_export", "exaone_export.cli", "exaone_export.api", "model.errors"])
def test_the_front_door_loads_nothing_heavy(module: str) -> None:
    done = _python(f"import {module}; print(sorted(set({HEAVY!r}) & set(sys.modules)))")
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_the_runtime_never_loads_torch() -> None:
    foreign = (
        "torch",
        "transformers",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "safetensors",
        "optimum",
        "exporter",
        "quantize",
    )
    start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = _python(f"import runtime.engine; print(sorted(set({foreign!r}) & set(sys.modules)))")
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
    assert seconds < 3  # of the processor, which other programs do not lengthen; about a third of one


def test_telemetry_is_off_by_default_but_not_forced() -> None:
    look = "import os; import exaone_export; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert _python(f"import os; os.environ.pop('ORT_DISABLE_TELEMETRY', 0)\n{look}").stdout.strip() == "1"
    assert _python(f"import os; os.environ['ORT_DISABLE_TELEMETRY'] = '0'\n{look}").stdout.strip() == "0"


@pytest.mark.parametrize("room", ["model", "exporter", "quantize", "runtime"])
def test_a_stray_file_that_hides_a_room_is_named(room: str, tmp_path: Path) -> None:
    (tmp_path / f"{room}.py").write_text("")
    done = _python("import exaone_export", cwd=tmp_path)
    assert done.returncode != 0
    assert f"{room}.py: it hides exaone-export's own '{room}' package" in done.stderr


@pytest.mark.parametrize("room", ["model", "runtime"])
def test_a_package_that_hides_a_room_is_named_and_a_folder_of_files_is_none(room: str, tmp_path: Path) -> None:
    (tmp_path / room / "weights").mkdir(parents=True)
    assert _python("import exaone_export, runtime.options", cwd=tmp_path).returncode == 0
    (tmp_path / room / "__init__.py").write_text("")
    done = _python("import exaone_export", cwd=tmp_path)
    assert f"{room}/__init__.py: it hides exaone-export's own '{room}' package" in done.stderr


def test_a_room_that_another_distribution_took_away_is_named(tmp_path: Path) -> None:
    """pip removes the files of a package that has one of our names, ours with them."""
    for room in ("exaone_export", "model", "exporter", "quantize", "runtime"):
        (tmp_path / room).mkdir()
        if room != "model":
            (tmp_path / room / "__init__.py").write_text((ROOT / room / "__init__.py").read_text())
    program = f"import sys; sys.path[:] = [{str(tmp_path)!r}, *sys.path[1:]]\nimport exaone_export"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, timeout=60)
    assert "/model: its files are gone" in done.stderr
    assert "pip install --force-reinstall --no-deps exaone-export" in done.stderr


def test_python_dash_m_names_it_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "exaone_export", "--version"],
        capture_output=True, text=True, cwd=tmp_path, timeout=60,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 5
    assert done.stderr.startswith("error: cannot import exaone_export: ")
    assert "Traceback" not in done.stderr
