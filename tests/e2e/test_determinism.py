"""The same input gives the same bytes, and the same bundle the same bits, however many threads compute them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.determinism import compute, differences
from exaone_export.demo import checkpoint_folder
from tests.e2e.conftest import Bundles
from tests.faults.crash import PLAIN_LOCALE

ROOT = Path(__file__).parents[2]
# Float, rounded later, calibrated.
PROGRAM = """
import json, os, sys
os.umask(int(sys.argv[1], 8))
import exaone_export as ee
source, out, prompts, threads = sys.argv[2:5] + [int(sys.argv[5])]
ee.export(source, f"{out}/float", threads=threads)
ee.quantize(f"{out}/float", f"{out}/later", recipe="int4")
ee.export(source, f"{out}/calibrated", quantize="int4-quality", calibration=prompts, threads=1)
"""
PROMPTS = [{"text": "The quick brown fox"}, {"messages": [{"role": "user", "content": "Hi"}]}]


def exported(source: Path, out: Path, cwd: Path, threads: int, umask: str, **environment: str) -> dict[str, str]:
    """Every file of the bundles that a fresh process makes, and its hash."""
    out.mkdir(parents=True)
    prompts = cwd / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))
    # Only what calibrates depends on threads: BLAS sums in another order.
    clean = {
        name: value for name, value in os.environ.items() if name not in ("LANG", "LC_ALL", "TZ", "PYTHONHASHSEED")
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, umask, str(source), str(out), str(prompts), str(threads)],
        capture_output=True, text=True, cwd=cwd, timeout=280,
        env={**clean, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_same_bytes_from_another_folder_locale_umask_hash_seed_and_number_of_threads(
    bundles: Bundles, tmp_path: Path
) -> None:
    """Real graphs, traced anew each time; tests/faults has the same for killed and resumed exports."""
    source = bundles.source("hybrid")
    (tmp_path / "one").mkdir()
    (tmp_path / "다른 곳").mkdir()
    first = exported(
        source, tmp_path / "a", tmp_path / "one", 1, "022", PYTHONHASHSEED="0", TZ="UTC", LC_ALL=PLAIN_LOCALE
    )  # fmt: skip
    second = exported(
        source, tmp_path / "번들" / "b", tmp_path / "다른 곳", 2, "077",
        PYTHONHASHSEED="4711", TZ="Asia/Seoul", LC_ALL="C.UTF-8",
    )  # fmt: skip
    assert {name.partition("/")[0] for name in first} == {"float", "later", "calibrated"}
    assert [name for name in first if first[name] != second.get(name)] == []
    assert first == second


@pytest.mark.parametrize("recipe", ["none", "int8", "int4", "int8-dynamic"])
@pytest.mark.parametrize("kind", ["hybrid", "vlm"])
def test_same_bits_with_one_two_and_three_threads(kind: str, recipe: str, bundles: Bundles) -> None:
    """Logits, greedy tokens and image features; lengths that no number of threads divides, beyond the window."""
    bundle = bundles.bundle(kind, recipe)
    lengths, image = (1, 7, 37, 101), (84, 56) if kind == "vlm" else None
    one = compute(bundle, 1, lengths, 6, image)
    assert one.features is None or len(one.features) > 0
    for threads in (2, 3):
        assert differences(one, compute(bundle, threads, lengths, 6, image)) == (0, 0, 0)


def test_same_bits_of_the_demonstration_checkpoint(bundles: Bundles) -> None:
    """A trained model, wider than one tile of the kernels."""
    source = bundles.root / "demonstration"
    with bundles.making(source) as missing:
        if missing:
            import exaone_export as ee

            ee.export(checkpoint_folder(), source, quantize="int4")
    one, two = (compute(source, threads, (5, 300), 8, (140, 84)) for threads in (1, 2))
    assert differences(one, two) == (0, 0, 0)
