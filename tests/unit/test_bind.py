from __future__ import annotations

import hashlib
import io
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from exporter import bind as binding
from exporter.bind import DEDUP, WeightTensor, bind, write_array
from model.config import load_config
from model.errors import NumericalError
from model.shards import open_shards
from model.weights import Checkpoint
from tests import tiny

FLOAT, HALF, BFLOAT = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16


def stored(
    folder: Path, array: np.ndarray[Any, Any], dtype: ir.DataType = FLOAT, *, transposed: bool = False
) -> WeightTensor:
    save_file({"w": array}, folder / "model.safetensors")
    ref = open_shards(folder)[0]["w"]
    shape = array.shape[::-1] if transposed else array.shape
    return WeightTensor(ref, dtype, shape, transposed=transposed, name="w")


def written(tensor: WeightTensor) -> bytes:
    stream = io.BytesIO()
    tensor.tofile(stream)
    return stream.getvalue()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "CHUNK_BYTES", 100)
    monkeypatch.setattr(binding, "_ROWS", 3)
    monkeypatch.setattr(binding, "_COLUMNS", 2)


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT])
@pytest.mark.parametrize("transposed", [False, True])
def test_converts_and_transposes_like_numpy(tmp_path: Path, kind: Any, dtype: ir.DataType, transposed: bool) -> None:
    array = np.random.default_rng(0).standard_normal((37, 11)).astype(kind)
    tensor = stored(tmp_path, array, dtype, transposed=transposed)
    wanted = array.astype(dtype.numpy())
    graph = wanted.T if transposed else wanted
    np.testing.assert_array_equal(tensor.numpy(), graph)
    assert written(tensor) == np.ascontiguousarray(graph).tobytes()
    np.testing.assert_array_equal(tensor.rows(5, 9), wanted[5:9])
    np.testing.assert_array_equal(np.concatenate(list(tensor.chunks())), wanted)
    assert tensor.nbytes == len(written(tensor))


def test_rounding_up_beyond_the_source_types_range(tmp_path: Path) -> None:
    array = np.full((3, 5), 65504, np.float16)  # 65536 in bfloat16, which float16 does not have
    assert written(stored(tmp_path, array, BFLOAT, transposed=True)) == array.astype(ml_dtypes.bfloat16).T.tobytes()


def test_what_is_transposed_is_held_in_the_smaller_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(binding, "_ROWS", 256)
    values = np.random.default_rng(0).standard_normal((1024, 1024), np.float32).astype(ml_dtypes.bfloat16)
    tensor = stored(tmp_path, values, transposed=True)
    tracemalloc.start()
    try:
        tensor.tofile(Discard())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 2 << 20 <= peak < 3 << 20  # 4 MiB in float32


class Discard:
    def write(self, data: Any) -> int:
        return memoryview(data).nbytes


def test_transposing_is_a_view(tmp_path: Path) -> None:
    tensor = stored(tmp_path, np.ones((4, 6), np.float32), transposed=True)
    assert tensor.numpy().T.flags.c_contiguous


def test_every_bfloat16_number_converts_exactly(tmp_path: Path) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = bits[(bits & 0x7F80) != 0x7F80].reshape(-1, 16)
    tensor = stored(tmp_path, bits.view(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(tensor.numpy(), bits.view(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("transposed", [False, True])
def test_nan_and_infinity_are_found_and_counted(tmp_path: Path, kind: Any, bad: float, transposed: bool) -> None:
    array = np.zeros((37, 11), kind)
    array[20, 3] = array[36, 10] = bad
    with pytest.raises(NumericalError, match=r"w: 2 values are NaN or infinite, the first at \[20, 3\]") as caught:
        written(stored(tmp_path, array, transposed=transposed))
    assert caught.value.exit_code == 7


def test_too_large_for_float16(tmp_path: Path) -> None:
    array = np.zeros((4, 4), np.float32)
    array[1, 1] = -70000
    with pytest.raises(NumericalError, match=r"w: it holds 70000, more than float16 can .* Use --dtype fp32"):
        written(stored(tmp_path, array, HALF))
    assert written(stored(tmp_path, array, BFLOAT))


def test_zeros_constants_and_denormals_pass(tmp_path: Path) -> None:
    array = np.array([[0, 0], [1, 1], [1e-45, -1e-40]], np.float32)
    np.testing.assert_array_equal(stored(tmp_path, array).numpy(), array)


def test_one_value_that_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match=r"1 value is NaN or infinite, the first at \[2\]"):
        written(stored(tmp_path, np.array([0, 0, np.nan], np.float32)))


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (50, 3), (2, 3, 5)])
def test_write_array(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    stream = io.BytesIO()
    write_array(np.asfortranarray(array), stream)
    assert stream.getvalue() == array.tobytes()


def declared(name: str, shape: tuple[int, ...], transposed: bool = False, dtype: ir.DataType = FLOAT) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    if transposed:
        value.metadata_props["transposed"] = "1"
    return value


def graph_of(values: list[ir.Value]) -> ir.Model:
    graph = ir.Graph([], [], nodes=[], initializers=[], opset_imports={"": 23})
    for value in values:
        graph.initializers[str(value.name)] = value
    return ir.Model(graph, ir_version=10)


def decoder_of(folder: Path) -> ir.Model:
    """A decoder without nodes, its initializers declared as tracing would."""
    refs = Checkpoint.open(folder).bind(load_config(folder))
    values = [declared("cos", (2048, 8)), declared("sin", (2048, 8))]
    for name, ref in refs.items():
        linear = "_proj." in name or "lm_head" in name
        shape = ref.shape[::-1] if linear else ref.shape
        values.append(declared(name.removeprefix("decoder."), shape, linear))
    return graph_of(values)


@pytest.mark.parametrize("kind", ["hybrid", "dense"])
def test_binds_every_parameter(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("torch")
    folder = tiny.make_checkpoint(tmp_path / "c", kind, dtype="bf16")
    config, tensors = load_config(folder), tiny.make_tensors(tiny.make_config(kind), dtype="bf16")
    model = decoder_of(folder)
    bind({"decoder": model}, Checkpoint.open(folder).bind(config), config)
    initializers = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert all(tensor is not None for tensor in initializers.values())
    up, head = initializers["layers.1.mlp.up_proj.weight"], initializers["lm_head.weight"]
    assert up is not None
    assert head is not None
    np.testing.assert_array_equal(up.numpy(), tensors["model.layers.1.mlp.up_proj.weight"].astype(np.float32).T)
    tied = "lm_head.weight" if kind == "hybrid" else "model.embed_tokens.weight"
    np.testing.assert_array_equal(head.numpy(), tensors[tied].astype(np.float32).T)


def test_a_parameter_without_tensor_is_a_fault(tmp_path: Path) -> None:
    folder = tiny.make_checkpoint(tmp_path / "c", "hybrid")
    config, refs = load_config(folder), Checkpoint.open(folder).bind(load_config(folder))
    with pytest.raises(ValueError, match=r"decoder\.ghost\.weight has no source"):
        bind({"decoder": graph_of([declared("ghost.weight", (2,))])}, refs, config)
    with pytest.raises(ValueError, match="does not fit"):
        bind({"decoder": graph_of([declared("norm.weight", (2,))])}, refs, config)
    with pytest.raises(ValueError, match="no graph uses"):
        bind({"decoder": graph_of([declared("norm.weight", (64,))])}, refs, config)


def test_dedup_keys_tell_orientation_and_type(tmp_path: Path) -> None:
    array = np.ones((4, 4), np.float32)
    keys = {
        stored(tmp_path, array, dtype, transposed=transposed).meta[DEDUP]
        for dtype in (FLOAT, HALF)
        for transposed in (False, True)
    }
    assert len(keys) == 4
    assert hashlib.sha256(written(stored(tmp_path, array))).digest()
