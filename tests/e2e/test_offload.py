"""Bundles for CUDA whose layers the CPU can take over: here it takes over all of them, so what the graphs for CUDA
compute is seen as it is, through ONNX Runtime's own kernels, and so is every part of the driver but the GPU's.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import exaone_export as ee
from exporter.export import ExportOptions, export_checkpoint, rewrite_bundle
from model.bundle import DECODER, MTP, VISION_ENCODER, FileInfo, GraphInfo, Manifest, read_manifest
from model.errors import EnvironmentFault, ResourceError, UsageError
from quantize.apply import Quantizer
from quantize.recipe import load_recipe
from runtime.budget import Room, make_plan
from runtime.device_forward import NEXT_IDS, DeviceForward
from runtime.engine import Engine
from runtime.execution import Execution
from runtime.placement import check_kernels
from runtime.providers import CPU, CUDA
from tests import tiny

RECIPES = ("none", "int8", "int4")
PROMPT = [(7 * i) % 390 + 100 for i in range(40)]  # five windows
NEW = 24
TOLERANCE = 0.02  # of the largest logit, after four layers in 11 bits


class Pairs:
    """Of each recipe a bundle for CUDA that shares its layers, and one for the CPU with the same rules."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # What bfloat16 holds, both float32 and float16 hold: the same codes come of it.
        self.source = tiny.make_checkpoint(root / "source", "hybrid", seed=7, dtype="bf16")
        self.cpu, self.cuda = root / "cpu-none", root / "cuda-none"
        export_checkpoint(self.source, self.cpu)
        export_checkpoint(self.source, self.cuda, ExportOptions(target="cuda", offload=True))

    def bundle(self, target: str, recipe: str) -> Path:
        origin = self.cuda if target == "cuda" else self.cpu
        folder = self.root / f"{target}-{recipe}"
        if recipe == "none":
            return origin
        if not folder.exists():
            quantizer = Quantizer(load_recipe(recipe)).for_target("cuda")
            rewrite_bundle(origin, folder, lambda models: quantizer(models))  # on the CPU too, products are exact
        return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return Pairs(tmp_path_factory.mktemp("offload"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_cpu_runs_what_cuda_would(pairs: Pairs, recipe: str) -> None:
    """Logits within half precision's of float32's, and the same greedy ids where float32 has no near tie."""
    with Engine.load(pairs.bundle("cpu", recipe), "cpu", 1) as exact:
        ids = exact.generate_ids(PROMPT, max_new_tokens=NEW, do_sample=False).token_ids
        expected = exact.logits([*PROMPT, *ids])
    with Engine.load(pairs.bundle("cuda", recipe), "cpu", 1) as shared:
        got = shared.logits([*PROMPT, *ids])
        answer = shared.generate_ids(PROMPT, max_new_tokens=NEW, do_sample=False).token_ids
    bound = TOLERANCE * float(np.abs(expected).max())
    assert float(np.abs(got - expected).max()) <= bound
    assert float(np.abs(got - expected).mean()) <= bound / 20
    second, first = np.sort(expected, -1)[:, -2:].T
    clear = first - second > 2 * bound
    assert clear.sum() > len(expected) // 4
    assert (got.argmax(-1) == expected.argmax(-1))[clear].all()
    ties = np.flatnonzero(~clear[len(PROMPT) - 1 :])
    until = int(ties[0]) if len(ties) else NEW
    assert answer[:until] == ids[:until]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_driver_of_a_device_answers_the_same(pairs: Pairs, recipe: str) -> None:
    """Fixed buffers, a mask as wide as the cache, ids from the graph: what a GPU is given, on the CPU."""
    folder = pairs.bundle("cuda", recipe)
    answers = []
    for execution in (None, Execution(fixed_buffers=True), Execution(fixed_buffers=True, gpu_layers=1)):
        with Engine.load(folder, "cpu", 1, execution=execution) as engine:
            forward = engine.graphs.forward(1)
            assert isinstance(forward, DeviceForward) == (execution is not None)
            del forward
            rows = [PROMPT[:1], PROMPT, PROMPT * 3]
            batch = engine.generate_ids(rows, max_new_tokens=NEW, do_sample=False)
            alone = engine.generate_ids(PROMPT, max_new_tokens=NEW, do_sample=False)
            answers.append([*(result.token_ids for result in batch), alone.token_ids])
    assert answers[0] == answers[1] == answers[2]


def test_the_manifest_says_so(pairs: Pairs) -> None:
    for recipe in RECIPES:
        manifest = read_manifest(pairs.bundle("cuda", recipe))
        assert manifest.offload
        decoder = manifest.graph(DECODER)
        assert decoder is not None
        assert NEXT_IDS in {tensor.name for tensor in decoder.outputs}
    assert "--target cuda" in (pairs.cuda / "README.md").read_text()
    assert "--offload" in (pairs.cuda / "README.md").read_text()
    other = json.loads((pairs.cpu / "exaone_export.json").read_bytes())
    assert "offload" not in other  # bundles for the CPU are what they were


def test_only_half_precision_on_cuda_is_shared(tmp_path: Path, pairs: Pairs) -> None:
    for options in (ExportOptions(offload=True), ExportOptions(dtype="bf16", target="cuda", offload=True)):
        with pytest.raises(UsageError, match="--offload.*fp16 only.*Use --target cuda"):
            export_checkpoint(pairs.source, tmp_path / "out", options)


def described(manifest: Manifest, **changes: object) -> Manifest:
    return Manifest(**(vars(manifest) | changes))


def test_layers_stay_on_the_gpu_where_the_cpu_has_no_kernels(pairs: Pairs) -> None:
    shared = read_manifest(pairs.cuda)
    fused, decoder = described(shared, offload=False), shared.graph(DECODER)
    assert decoder is not None
    assert make_plan(shared, [decoder], Room(None), gpu_layers=1).host_layers == (0, 1, 2)
    assert make_plan(fused, [decoder], Room(None), gpu_layers=4).host_layers == ()
    with pytest.raises(UsageError, match="kernels on the GPU only.*Export it with --target cuda --offload"):
        make_plan(fused, [decoder], Room(None), gpu_layers=1)
    large = {name: FileInfo(info.size * 50_000, "") for name, info in shared.files.items()}
    room = Room(20 * 10**9)
    assert make_plan(described(shared, files=large), [decoder], room, offload=True).host_layers
    with pytest.raises(ResourceError, match=r"Export it with --target cuda --offload: with gpu_layers=\d it fits"):
        make_plan(described(fused, files=large), [decoder], room, offload=True)


def test_graphs_for_cuda_are_refused_on_the_cpu(pairs: Pairs) -> None:
    shared = read_manifest(pairs.cuda)
    fused = described(shared, offload=False)

    def refused(manifest: Manifest, name: str, provider: str = CPU) -> bool:
        try:
            check_kernels(manifest, GraphInfo(name, f"{name}.onnx", (), (), ()), provider)
        except EnvironmentFault as error:
            assert "Export with --target cpu" in str(error)
            return True
        return False

    assert refused(fused, DECODER)
    assert refused(fused, MTP)
    assert refused(shared, VISION_ENCODER)
    assert refused(described(shared, dtype="bf16"), DECODER)
    assert not refused(fused, DECODER, CUDA)
    assert not refused(shared, DECODER)
    assert not refused(described(fused, target="cpu"), DECODER)
    assert not refused(described(fused, task="feature-extraction"), DECODER)


def test_verify_takes_the_cpu_where_it_can(pairs: Pairs) -> None:
    report = ee.verify(pairs.cuda, source=pairs.source)
    assert report.ok
