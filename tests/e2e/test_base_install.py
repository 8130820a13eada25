"""What a machine that only runs bundles installs is enough to run, check and describe them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.e2e.conftest import Bundles

# Of the extra `export`, and what comes with it alone.
ABSENT = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "optimum", "safetensors", "ml_dtypes", "requests")
PROGRAM = """
import json, sys
for name in json.loads(sys.argv[1]):
    sys.modules[name] = None  # as if it were not installed
from exaone_export.cli import main
print(json.dumps([main(argv) for argv in json.loads(sys.argv[2])]), file=sys.stderr)
"""


def run(cwd: Path, *commands: list[str]) -> tuple[list[int], str, str]:
    """Exit codes of commands run in one process without the libraries of `ABSENT`, and what they wrote."""
    arguments = [json.dumps(ABSENT), json.dumps(commands)]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{PROGRAM}", *arguments],
        capture_output=True, text=True, cwd=cwd, timeout=240, input="Hello\n",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *rest, codes = done.stderr.splitlines()
    return json.loads(codes), done.stdout, "\n".join(rest)


@pytest.mark.parametrize("kind", ["vlm", "hybrid"])
def test_bundles_run_without_what_made_them(kind: str, bundles: Bundles, tmp_path: Path) -> None:
    bundle = str(bundles.bundle(kind, "int8"))
    Image.new("RGB", (56, 56), "blue").save(tmp_path / "a.png")
    (tmp_path / "in.jsonl").write_text('{"id": "a", "prompt": "Hi"}\n')
    image = ["--image", "a.png"] if kind == "vlm" else []
    few = ["--greedy", "--max-new-tokens", "2", "-q"]
    commands: list[list[str]] = [
        ["generate", bundle, "Hi", *image, *few],
        ["verify", bundle, "-q"],
        ["inspect", bundle],
        ["batch", bundle, "in.jsonl", "out.jsonl", *few],
        ["chat", bundle, *few],
        ["generate", bundle, "Hi", "--dry-run"],
    ]
    codes, _, errors = run(tmp_path, *commands)
    assert (codes, errors) == ([0] * len(commands), "")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["a"]


def test_what_exporting_needs_is_named(bundles: Bundles, tmp_path: Path) -> None:
    source, bundle = str(bundles.source("hybrid")), str(bundles.bundle("hybrid"))
    commands = [
        ["export", source, "out"],
        ["quantize", bundle, "out", "--quantize", "int8"],
        ["verify", bundle, "--source", source],
        ["inspect", source],
    ]
    codes, out, errors = run(tmp_path, *commands)
    assert codes == [5] * len(commands), errors
    assert out == ""
    refusals = errors.splitlines()
    assert len(refusals) == len(commands)
    assert all(line.endswith('pip install "exaone-export[export]".') for line in refusals), refusals
    assert not (tmp_path / "out").exists()


def test_help_imports_nothing_that_is_installed() -> None:
    """No command's `--help` loads anything but the standard library and our own files: it stays quick."""
    program = """
import contextlib, io, json, sys
from exaone_export import cli
names = ["", *(module.__name__.rpartition(".")[2] for module in cli.COMMANDS)]
with contextlib.redirect_stdout(io.StringIO()):
    codes = [cli.main([*name.split(), "--help"]) for name in names]
loaded = {name.partition(".")[0] for name in sys.modules}
print(json.dumps([codes, len(names), sorted(loaded - set(sys.stdlib_module_names) - {"__main__", "__mp_main__"})]))
"""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{program}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    codes, count, loaded = json.loads(done.stdout)
    assert (codes, count > 10) == ([0] * count, True)
    assert set(loaded) <= {"exaone_export", "model"}, loaded
