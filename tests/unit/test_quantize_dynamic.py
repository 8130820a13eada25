from __future__ import annotations

import platform
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from exporter.bind import WeightTensor
from exporter.export import ExportOptions, export_checkpoint
from model.bundle import WeightInfo
from model.errors import NumericalError, UsageError
from model.shards import TensorRef
from quantize import lazy, rtn
from quantize.apply import Quantizer, quantize_models
from quantize.columns import ColumnWeight
from quantize.lazy import Source
from quantize.recipe import MOST_COLUMNS, Recipe, Rule, fitting_scheme, load_recipe, parse_recipe
from quantize.scheme import INT8, Scheme
from quantize.sizes import part_bytes
from runtime import saturation
from tests import tiny
from tests.unit.onnx_kernels import Array, constant, model_of, relative_error, run_model, variable

RNG = np.random.default_rng(0)
ROWS = Scheme(8, 0, activations=INT8)
RECIPE = Recipe("rows", (Rule("*", ROWS),))


def random(*shape: int, dtype: str = "float32") -> Array:
    return RNG.standard_normal(shape).astype(dtype)


def layers(x: Array, **kernels: Array) -> ir.Model:
    """The sum of x @ kernel [K, N] over the kernels, whose names are the modules'."""
    a = variable("x", x)
    weights = [constant(f"{name}.weight", kernel) for name, kernel in kernels.items()]
    nodes = [ir.node("MatMul", [a, weight], name=str(weight.name)) for weight in weights]
    for node in nodes:
        node.outputs[0].name = f"{node.name}_out"
        node.outputs[0].type = ir.TensorType(ir.DataType.from_numpy(x.dtype))
    nodes.append(ir.node("Sum", [node.outputs[0] for node in nodes], name="sum"))
    return model_of(nodes, [a], weights, ir.DataType.from_numpy(x.dtype))


def quantized(x: Array, **kernels: Array) -> ir.Model:
    model = layers(x, **kernels)
    quantize_models({"decoder": model}, RECIPE)
    return model


def expected(x: Array, kernel: Array) -> Array:
    """What `quantize.dynamic` says, in numpy: integers are exact in float64."""
    values, rows = x.astype(np.float32), kernel.T.astype(np.float32)
    weight = rtn.quantize(rows, None, Scheme(8, rows.shape[1]))
    steps = np.maximum(np.abs(values).max(-1, keepdims=True) * np.float32(1 / 127), np.finfo(np.float32).tiny)
    codes = np.clip(np.rint(values / steps), -128, 127).astype(np.float64)
    product = codes @ (weight.codes[:, 0].astype(np.float64) - 128).T
    result: Array = product * weight.scales[:, 0] * steps
    return result


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("lead", [(5,), (2, 3)])
def test_products_are_those_of_integers(lead: tuple[int, ...], dtype: str) -> None:
    x, kernel = random(*lead, 196, dtype=dtype), random(196, 40, dtype=dtype)
    model = quantized(x, fc=kernel)
    y = run_model(model, {"x": x})
    assert y.dtype == x.dtype
    assert y.shape == (*lead, 40)
    assert relative_error(y, expected(x, kernel)) < (2e-6 if dtype == "float32" else 1e-3)
    assert 1e-3 < relative_error(y, x.astype(np.float64) @ kernel.astype(np.float64)) < 0.02
    names = ["fc.weight_q", "fc.weight_scales"]
    assert [name for name in model.graph.initializers if name.startswith("fc.")] == names
    codes, scales = (model.graph.initializers[name].const_value for name in names)
    assert codes is not None
    assert scales is not None
    assert (codes.dtype, list(codes.shape)) == (ir.DataType.INT8, [196, 40])
    assert (scales.dtype, list(scales.shape)) == (ir.DataType.FLOAT, [40])


def test_what_several_modules_read_is_rounded_once() -> None:
    x, kernels = random(3, 64), {"q": random(64, 16), "k": random(64, 16), "v": random(64, 16)}
    model = quantized(x, **kernels)
    ops = [node.op_type for node in model.graph]
    assert ops.count("QuantizeLinear") == 1
    assert ops.count("MatMulIntegerToFloat") == 3
    assert (
        relative_error(run_model(model, {"x": x}), np.sum([expected(x, kernel) for kernel in kernels.values()], axis=0))
        < 2e-6
    )


def test_a_massive_activation_is_felt_in_its_own_row_only() -> None:
    x = random(2, 4, 128)
    massive = x.copy()
    massive[1, 2, 7] = 3e4
    model = quantized(x, fc=random(128, 32))
    y, disturbed = run_model(model, {"x": x}), run_model(model, {"x": massive})
    others = np.ones((2, 4), bool)
    others[1, 2] = False
    assert np.array_equal(y[others], disturbed[others])
    assert not np.array_equal(y[1, 2], disturbed[1, 2])


@pytest.mark.parametrize("columns", [12, 100, 256])
def test_rows_of_zeros_give_zeros_and_what_is_no_number_stays_so(columns: int) -> None:
    x = random(3, columns)
    x[1], x[2, 0] = 0, np.nan
    y = run_model(quantized(x, fc=random(columns, 24)), {"x": x})
    assert np.isfinite(y[0]).all()
    assert not y[1].any()
    assert np.isnan(y[2]).all()


def test_the_report() -> None:
    x = random(1, 64)
    model = layers(x, up=random(64, 16), odd=random(64, 16))
    report = quantize_models({"decoder": model}, RECIPE)
    up = report.weights[0]
    assert str(up.scheme) == "int8 by rows sym rtn, int8 activations"
    assert up.info == WeightInfo(8, 64, True, "rtn", 64 * 16, "", INT8)
    assert report.bits_per_weight == 8 * (64 * 16 + 4 * 16) / (64 * 16)
    assert sum(part_bytes((16, 64), up.scheme, 2).values()) == 64 * 16 + 4 * 16


def test_what_cannot_be_multiplied_so() -> None:
    # A row of a table is looked up, so there are no activations.
    assert fitting_scheme(ROWS, 64, table=True) == Scheme(8, 32)
    assert fitting_scheme(ROWS, 64) == Scheme(8, 64, activations=INT8)
    assert fitting_scheme(ROWS, 66) is None
    assert fitting_scheme(ROWS, MOST_COLUMNS + 4) is None
    report = quantize_models({"decoder": layers(random(1, 66), fc=random(66, 8))}, RECIPE)
    assert report.weights[0].reason == f"its 66 inputs are more than {MOST_COLUMNS}, or not a multiple of 4"


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("bits = 8\nblock_size = 32", "block_size has no meaning where activations is 'int8'"),
        ("bits = 4", "bits is 4, wanted one of 8"),
        ("symmetric = true", "bits is missing, wanted one of 8"),
        ("bits = 8\nsymmetric = false", "symmetric is False, wanted one of true"),
        ('bits = 8\nmethod = "best"', "method is 'best'"),
    ],
)
def test_rules_that_mean_nothing_are_refused(rule: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_recipe(f'name = "mine"\n[[rule]]\nmatch = "*"\nactivations = "int8"\n{rule}\n', "mine.toml")
    assert said in caught.value.why


def test_activations_are_one_of_two() -> None:
    text = 'name = "mine"\n[[rule]]\nmatch = "*"\nbits = 8\nactivations = {}\n'
    assert parse_recipe(text.format('"int8"'), "mine") == Recipe("mine", (Rule("*", ROWS),))
    assert parse_recipe(text.format('"float"'), "mine") == Recipe("mine", (Rule("*", Scheme(8)),))
    for wrong in ('"int4"', "true", "8"):
        with pytest.raises(UsageError, match=r'wanted one of "float", "int8"'):
            parse_recipe(text.format(wrong), "mine")
    mine = Recipe("mine", (Rule("a", ROWS), Rule("b", Scheme(4))))
    assert parse_recipe(mine.to_toml(), "again") == mine


@pytest.mark.parametrize(
    ("path", "activations"),
    [
        ("decoder.layers.3.self_attn.q_proj", INT8),
        ("decoder.layers.3.mlp.up_proj", INT8),
        ("decoder.layers.3.mlp.down_proj", INT8),
        ("mtp.layers.0.mlp.down_proj", INT8),
        ("vision_encoder.blocks.0.mlp.down_proj", INT8),
        ("vision_encoder.merger.mlp.0", "float"),
        ("vision_encoder.blocks.0.attn.proj", INT8),
        ("vision_encoder.blocks.0.mlp.gate_proj", INT8),
        ("decoder.lm_head", "float"),
        ("embedding.embed_tokens", "float"),
        ("mtp.fc", INT8),
        ("vision_encoder.blocks.0.attn.qkv", INT8),
        ("vision_encoder.patch_embed.proj", None),
        ("decoder.score", None),
    ],
)
def test_the_shipped_recipe(path: str, activations: str | None) -> None:
    rule = load_recipe("int8-dynamic").match(path)
    assert rule is not None
    assert (rule.scheme.activations if rule.scheme else None) == activations
    assert bool(rule.scheme and rule.scheme.rotate) == path.endswith(".down_proj")


def stored(folder: Path, rows: int, columns: int) -> tuple[WeightTensor, Array]:
    """A bfloat16 tensor in a file, as an initializer that wants it transposed, and its values."""
    values = np.random.default_rng(rows).standard_normal((rows, columns), np.float32).astype(ml_dtypes.bfloat16)
    file = folder / f"{rows}.bin"
    file.write_bytes(values.tobytes())
    ref = TensorRef("layer.weight", "BF16", (rows, columns), file, 0, 2 * rows * columns)
    tensor = WeightTensor(ref, ir.DataType.FLOAT, (columns, rows), transposed=True, name="layer.weight")
    return tensor, values.astype(np.float32)


class Sink:
    """What a writer is to a tensor."""

    def __init__(self, *, keep: bool = True) -> None:
        self.content, self.keep = bytearray(), keep

    def write(self, data: Any) -> int:
        if self.keep:
            self.content += memoryview(data).cast("B")
        return memoryview(data).nbytes


def columns_of(tensor: ir.TensorProtocol, threads: int) -> ColumnWeight:
    scheme = Scheme(8, int(tensor.shape.numpy()[0]), activations=INT8)
    return ColumnWeight(Source(tensor, True, "decoder.layer.weight"), scheme, rtn.quantize, None, threads)


def test_bytes_do_not_depend_on_threads_or_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, values = stored(tmp_path, 300, 260)
    wanted = rtn.quantize(values, None, Scheme(8, 260))
    codes = np.ascontiguousarray((wanted.codes[:, 0].astype(np.int16) - 128).astype(np.int8).T)
    for chunk, threads in ((lazy.CHUNK, 1), (3 * 260, 1), (7 * 260, 4)):
        monkeypatch.setattr(lazy, "CHUNK", chunk)
        weight, sinks = columns_of(tensor, threads), {}
        for part, shape in weight.shapes.items():
            sinks[part] = Sink()
            weight.tensor(part, part, shape).tofile(sinks[part])
        assert bytes(sinks["codes"].content) == codes.tobytes()
        assert bytes(sinks["scales"].content) == wanted.scales[:, 0].tobytes()
        again = columns_of(tensor, threads)
        assert again.tensor("codes", "codes", again.shapes["codes"]).numpy().tobytes() == codes.tobytes()


def test_memory_is_that_of_the_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "CHUNK", 1 << 15)
    monkeypatch.setattr("exporter.bind.CHUNK_BYTES", 1 << 18)
    weight = columns_of(stored(tmp_path, 8192, 1024)[0], 3)
    codes = weight.tensor("codes", "codes", weight.shapes["codes"])
    tracemalloc.start()
    try:
        codes.tofile(Sink(keep=False))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert codes.nbytes == 8 << 20
    assert peak < codes.nbytes + (3 << 20)


def test_values_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    tensor, values = stored(tmp_path, 16, 64)
    values[3, 5] = np.nan
    (tmp_path / "16.bin").write_bytes(values.astype(ml_dtypes.bfloat16).tobytes())
    with pytest.raises(NumericalError, match=r"the first at \[3, 5\]"):
        columns_of(tensor, 2).take("codes")


def test_cuda_has_no_such_products(tmp_path: Path) -> None:
    source = tiny.make_checkpoint(tmp_path / "source", "dense")
    with pytest.raises(UsageError, match='activations = "int8", which only the CPU has') as caught:
        export_checkpoint(
            source, tmp_path / "out", ExportOptions(target="cuda"), Quantizer(load_recipe("int8-dynamic"))
        )
    assert "int8 or int4" in caught.value.remedy
    assert not (tmp_path / "out").exists()
    assert Quantizer(load_recipe("int8")).for_target("cuda").target == "cuda"
    assert Quantizer(None).for_target("cuda").recipe is None


def test_the_trial_of_the_processor() -> None:
    model = onnx.load_from_string(saturation._product())
    onnx.checker.check_model(model, full_check=True)
    # The 255 * 127 * 64 that it computes is more than 16 bits hold, twice over.
    assert 2 * 255 * 127 > 2**15
    assert saturation.products_saturate() in (False, True)


@pytest.mark.parametrize(("result", "wrong"), [(255 * 127 * 64, False), (32767 * 32, True)])
def test_a_product_that_saturates_is_seen(monkeypatch: pytest.MonkeyPatch, result: int, wrong: bool) -> None:
    class Session:
        def __init__(self, *_: object, **__: object) -> None: ...

        def run(self, _: None, feeds: dict[str, Array]) -> list[Array]:
            assert (feeds["a"] == 255).all()
            return [np.full((1, 16), result, np.int32)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert saturation.products_saturate.__wrapped__() is wrong
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert saturation.products_saturate.__wrapped__() is False


def test_only_graphs_with_such_products_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saturation, "products_saturate", lambda: True)
    x = random(2, 64)
    for name, model, wanted in (
        ("float", layers(x, fc=random(64, 8)), False),
        ("int8", quantized(x, fc=random(64, 8)), True),
    ):
        ir.save(model, tmp_path / name)
        assert saturation.needs_exact_products(tmp_path / name) is wanted
    assert saturation.needs_exact_products(tmp_path / "missing") is False
