"""Quantized weights put together from their parts: values, grids, and what does not fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from model.assemble import Assembled, assemble
from model.errors import CheckpointError, ExaoneError, NumericalError
from model.packed import Float8Weight, IntegerWeight
from model.quantization import Quantization, WeightScheme
from model.shards import open_shards

Tensors = dict[str, NDArray[Any]]
NAME = "model.layers.0.mlp.up_proj"
GPTQ = Quantization("gptq", (WeightScheme(4, group_size=8),), zero_points_less_one=True)
GPTQ_ASYM = Quantization("gptq", (WeightScheme(4, group_size=8, symmetric=False, act_order=True),))
AWQ = Quantization("awq", (WeightScheme(4, group_size=2, symmetric=False),))
PACKED = Quantization("compressed-tensors", (WeightScheme(4, group_size=4, symmetric=False, act_order=True),))
BYTES = Quantization("compressed-tensors", (WeightScheme(8),))
FLOAT8 = Quantization("compressed-tensors", (WeightScheme(8, "float", block=(2, 4)),))


def words(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.uint32).view(np.int32)


def gptq() -> Tensors:
    """N = 8 outputs, K = 16 inputs in two groups; output n has code n everywhere, but 15 in its last input."""
    column = [sum(n << 4 * i for i in range(8)) for n in range(8)]
    last = [sum((15 if i == 7 else n) << 4 * i for i in range(8)) for n in range(8)]
    return {
        "qweight": words(*column, *last).reshape(2, 8),
        "qzeros": words(0x77777777, 0x77777777).reshape(2, 1),
        "scales": np.stack((np.full(8, 0.5), np.arange(8) / 4)).astype(np.float16),
        "g_idx": (np.arange(16) // 8).astype(np.int32),
    }


def packed() -> Tensors:
    """N = 2, K = 8: codes 0..7 and 8..15, zero points 3, 5 and 8, 10 in groups of four."""
    return {
        "weight_packed": words(0x76543210, 0xFEDCBA98).reshape(2, 1),
        "weight_scale": np.array([[1, 0.5], [2, 4]], ml_dtypes.bfloat16),
        "weight_zero_point": words(0x00000083, 0x000000A5).reshape(1, 2),
        "weight_shape": np.array([2, 8], np.int64),
    }


def open_all(folder: Path, parts: Tensors, quantization: Quantization, shape: tuple[int, int]) -> Assembled:
    tensors = {f"{NAME}.{part}": np.ascontiguousarray(value) for part, value in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    refs, _ = open_shards(folder)
    return assemble(refs, quantization, lambda name: shape if name == f"{NAME}.weight" else None)


def open_weight(folder: Path, parts: Tensors, quantization: Quantization, shape: tuple[int, int]) -> Any:
    weight = open_all(folder, parts, quantization, shape).sources[f"{NAME}.weight"]
    assert (weight.dtype, weight.shape, weight.nbytes) == ("F32", shape, 4 * shape[0] * shape[1])
    assert (weight.file, weight.offset) == (weight.parts[0].file, weight.parts[0].offset)
    values = weight.read()
    assert values.dtype == np.float32
    for start, stop in ((0, 1), (1, shape[0]), (shape[0], shape[0])):
        assert np.array_equal(weight.rows(start, stop), values[start:stop])
        assert np.array_equal(weight.open()(start, stop), values[start:stop])
    return weight


def test_gptq(tmp_path: Path) -> None:
    weight = open_weight(tmp_path, gptq(), GPTQ, (8, 16))
    assert isinstance(weight, IntegerWeight)
    assert weight.label == "gptq int4 g8 sym"
    values = weight.read()
    assert values[3].tolist() == [-2.5] * 8 + [-3.75] * 7 + [5.25]  # (3 - 8) * 0.5, (3 - 8) * 0.75, (15 - 8) * 0.75
    assert values[:, 0].tolist() == [(n - 8) * 0.5 for n in range(8)]
    grid = weight.open_grid()(2, 5)
    assert grid.codes[:, 0].tolist() == [2, 3, 4]
    assert grid.scales.tolist() == [[0.5, 0.5], [0.5, 0.75], [0.5, 1.0]]
    assert grid.zero_points is None
    assert weight.column_groups() is None
    assert [part.name.rpartition(".")[2] for part in weight.parts] == ["qweight", "scales", "qzeros", "g_idx"]


def test_gptq_zero_points_and_columns_in_another_order(tmp_path: Path) -> None:
    # The second format stores zero points as they are; columns belong to groups alternately.
    parts = gptq() | {"qzeros": words(0x76543210, 0xFFFFFFFF).reshape(2, 1), "g_idx": (np.arange(16) % 2).astype("i4")}
    weight = open_weight(tmp_path, parts, GPTQ_ASYM, (8, 16))
    assert weight.label == "gptq int4 g8 asym act-order"
    even = [(n - n) * 0.5 for n in range(8)]
    odd = [(n - 15) * n / 4 for n in range(8)]
    values = weight.read()
    assert values[:, 0].tolist() == even
    assert values[:, 1].tolist() == odd
    assert values[:, 13].tolist() == odd
    assert values[:, 15].tolist() == [0.0] * 8
    groups = weight.column_groups()
    assert groups is not None
    assert groups.tolist() == [0, 1] * 8


def test_gptq_marked_as_the_first_format_but_saved_in_the_second(tmp_path: Path) -> None:
    # Symmetric zero points tell: 8 is stored, not 7. Readers that know of symmetry do not look at them.
    right = open_weight(tmp_path, gptq(), GPTQ, (8, 16)).read()
    wrong = gptq() | {"qzeros": words(0x88888888, 0x88888888).reshape(2, 1)}
    assert np.array_equal(open_weight(tmp_path, wrong, GPTQ, (8, 16)).read(), right)
    neither = gptq() | {"qzeros": words(0x77777777, 0x77777776).reshape(2, 1)}
    with pytest.raises(CheckpointError, match="zero points are not all 8, though the configuration says that"):
        open_weight(tmp_path, neither, GPTQ, (8, 16))


def test_gptq_single_layers_may_differ(tmp_path: Path) -> None:
    other = Quantization("gptq", (WeightScheme(8, group_size=128),), zero_points_less_one=True, overrides=True)
    weight = open_weight(tmp_path, gptq(), other, (8, 16))
    assert (weight.bits, weight.group_size) == (4, 8)
    assert weight.read()[3].tolist() == [-2.5] * 8 + [-3.75] * 7 + [5.25]


def test_gptq_zeros_as_a_bias_are_passed_over(tmp_path: Path) -> None:
    done = open_all(tmp_path, gptq() | {"bias": np.zeros(8, np.float16)}, GPTQ, (8, 16))
    assert (list(done.sources), done.ignored) == ([f"{NAME}.weight"], [f"{NAME}.bias"])
    done = open_all(tmp_path, gptq() | {"bias": np.ones(8, np.float16)}, GPTQ, (8, 16))
    assert (sorted(done.sources), done.ignored) == ([f"{NAME}.bias", f"{NAME}.weight"], [])


def test_awq(tmp_path: Path) -> None:
    # N = 8, K = 4 in two groups; input k has codes k + n, zero points n and 8 - n, in AutoAWQ's order.
    def row(values: list[int]) -> int:
        return sum(values[output] << 4 * place for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))

    parts: Tensors = {
        "qweight": words(*(row([k + n for n in range(8)]) for k in range(4))).reshape(4, 1),
        "qzeros": words(row(list(range(8))), row([8 - n for n in range(8)])).reshape(2, 1),
        "scales": np.stack((np.full(8, 2.0), np.arange(8) / 8)).astype(np.float16),
    }
    weight = open_weight(tmp_path, parts, AWQ, (8, 4))
    assert weight.label == "awq int4 g2 asym"
    expected = [[0, 2, (2 + n - 8 + n) * n / 8, (3 + n - 8 + n) * n / 8] for n in range(8)]
    assert weight.read().tolist() == expected


def test_compressed_tensors_packed(tmp_path: Path) -> None:
    weight = open_weight(tmp_path, packed(), PACKED, (2, 8))
    assert weight.label == "compressed-tensors int4 g4 asym act-order"
    assert weight.read().tolist() == [
        [-3, -2, -1, 0, -0.5, 0, 0.5, 1], [0, 2, 4, 6, 8, 12, 16, 20],
    ]  # fmt: skip
    order = packed() | {"weight_g_idx": np.array([1, 0, 1, 0, 1, 0, 1, 0], np.int32)}
    assert open_weight(tmp_path, order, PACKED, (2, 8)).read()[0].tolist() == [-2.5, -2, -1.5, 0, -0.5, 2, 0.5, 4]
    unused = packed() | {"weight_g_idx": np.full(8, -1, np.int32)}
    assert open_weight(tmp_path, unused, PACKED, (2, 8)).read()[0, 0] == -3
    old = packed() | {"weight_zero_point": np.array([[-5, -3], [0, 2]], np.int8)}  # signed, not packed
    assert open_weight(tmp_path, old, PACKED, (2, 8)).read()[1].tolist() == [0, 2, 4, 6, 8, 12, 16, 20]


def test_compressed_tensors_symmetric_with_a_scale_a_row_or_one_for_all(tmp_path: Path) -> None:
    rows = Quantization("compressed-tensors", (WeightScheme(4),))
    parts = {key: packed()[key] for key in ("weight_packed", "weight_shape")}
    scales: list[NDArray[Any]] = [np.array([[1], [2]], np.float16), np.array([1, 2], np.float16)]
    for scale in scales:
        weight = open_weight(tmp_path, parts | {"weight_scale": scale}, rows, (2, 8))
        assert weight.label == "compressed-tensors int4 per row sym"
        assert weight.read().tolist() == [list(range(-8, 0)), list(range(0, 16, 2))]
    scales = [np.array([3], np.float32), np.array(3, np.float32)]
    for scale in scales:
        weight = open_weight(tmp_path, parts | {"weight_scale": scale}, rows, (2, 8))
        assert weight.read().tolist() == [list(range(-24, 0, 3)), list(range(0, 24, 3))]


def test_compressed_tensors_bytes(tmp_path: Path) -> None:
    parts: Tensors = {
        "weight": np.array([[-128, 127, 0], [1, -1, 5]], np.int8),
        "weight_scale": np.array([[0.5], [2]], ml_dtypes.bfloat16),
    }
    weight = open_weight(tmp_path, parts, BYTES, (2, 3))
    assert isinstance(weight, IntegerWeight)
    assert weight.read().tolist() == [[-64, 63.5, 0], [2, -2, 10]]
    asymmetric = Quantization("compressed-tensors", (WeightScheme(8, symmetric=False),))
    for zero_point in (np.array([[-1], [3]], np.int8), np.array([-1, 3], np.int8)):
        weight = open_weight(tmp_path, parts | {"weight_zero_point": zero_point}, asymmetric, (2, 3))
        assert weight.read().tolist() == [[-63.5, 64, 0.5], [-4, -8, 4]]
    narrow = Quantization("compressed-tensors", (WeightScheme(4),))
    parts["weight"] = np.array([[-8, 7, 0], [1, -1, 5]], np.int8)
    weight = open_weight(tmp_path, parts, narrow, (2, 3))
    assert (weight.bits, weight.read()[0].tolist()) == (4, [-4, 3.5, 0])


@pytest.mark.parametrize(
    ("scale", "name", "factors", "label"),
    [
        (np.array(0.5, np.float32), "weight_scale", [[0.5] * 6] * 3, "per tensor"),
        (np.array([0.5], ml_dtypes.bfloat16), "weight_scale_inv", [[0.5] * 6] * 3, "per tensor"),
        (np.array([[1], [2], [4]], np.float32), "weight_scale", [[1] * 6, [2] * 6, [4] * 6], "per row"),
        (np.array([1, 2, 4], np.float32), "weight_scale", [[1] * 6, [2] * 6, [4] * 6], "per row"),
        (
            np.array([[1, 2], [4, 8]], np.float32),
            "weight_scale_inv",
            [[1, 1, 1, 1, 2, 2]] * 2 + [[4, 4, 4, 4, 8, 8]],
            "in blocks of 2x4",
        ),
    ],
)
def test_8_bit_floats(tmp_path: Path, scale: NDArray[Any], name: str, factors: list[list[float]], label: str) -> None:
    # 0x38 is 1, 0x3C is 1.5, 0xC0 is -2, 0x7E is 448, 0x01 is 2**-9, 0x80 is -0.
    codes = np.array([[0x38, 0x3C, 0xC0, 0x7E, 0x01, 0x80]] * 3, np.uint8).view(ml_dtypes.float8_e4m3fn)
    weight = open_weight(tmp_path, {"weight": codes, name: scale}, FLOAT8, (3, 6))
    assert isinstance(weight, Float8Weight)
    assert weight.label == f"compressed-tensors f8_e4m3 {label}"
    assert weight.read().tolist() == (np.array([1, 1.5, -2, 448, 2**-9, -0.0]) * np.array(factors)).tolist()


def test_8_bit_floats_of_the_other_kind_and_with_powers_of_two(tmp_path: Path) -> None:
    codes = np.array([[0x3C, 0x3E], [0xC0, 0x7B]], np.uint8).view(ml_dtypes.float8_e5m2)
    scale = np.array([[126], [129]], np.uint8).view(ml_dtypes.float8_e8m0fnu)
    weight = open_weight(tmp_path, {"weight": codes, "weight_scale": scale}, FLOAT8, (2, 2))
    assert weight.read().tolist() == [[0.5, 0.75], [-8, 4 * 57344]]
    zeros = {"weight": codes, "weight_scale": scale, "weight_zero_point": np.zeros((2, 1), np.int8)}
    assert open_weight(tmp_path, zeros, FLOAT8, (2, 2)).read()[0, 0] == 0.5
    zeros["weight_zero_point"][0] = 1
    with pytest.raises(CheckpointError, match="8-bit floats with a zero point other than 0"):
        open_weight(tmp_path, zeros, FLOAT8, (2, 2))


def test_what_only_activations_need_is_passed_over(tmp_path: Path) -> None:
    parts = gptq() | {"input_scale": np.ones(1, np.float32), "k_scale": np.ones(1, np.float32)}
    done = open_all(tmp_path, parts, GPTQ, (8, 16))
    assert (list(done.sources), sorted(done.ignored)) == (
        [f"{NAME}.weight"], [f"{NAME}.input_scale", f"{NAME}.k_scale"],
    )  # fmt: skip


def changed(parts: Tensors, **changes: NDArray[Any] | None) -> Tensors:
    return {name: value for name, value in (parts | changes).items() if value is not None}


FLOAT8_CODES = np.zeros((2, 8), ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize(
    ("parts", "quantization", "where", "why"),
    [
        (changed(gptq(), scales=None), GPTQ, "scales", "this part of a quantized weight is missing"),
        (changed(gptq(), qzeros=None), GPTQ, "qzeros", "this part of a quantized weight is missing"),
        (changed(gptq(), qweight=None), GPTQ, None, "the weight that it belongs to is missing"),
        (changed(gptq(), weight_scale=np.ones(1, "f4")), GPTQ, "weight_scale", "it is no part of a weight stored as"),
        (changed(gptq(), qweight=np.zeros((3, 8), "i4")), GPTQ, "qweight", "packed in neither 4 nor 8 bits"),
        (changed(gptq(), qweight=np.zeros((2, 8), "i8")), GPTQ, "qweight", "type I64, where I32 are expected"),
        (
            changed(gptq(), qweight=np.zeros((4, 8), "i4")),
            GPTQ,
            "scales",
            "8 bits in 2 groups .* other numbers of bits",
        ),
        (changed(gptq(), scales=np.ones((4, 8), "f2")), GPTQ, "scales", "4 bits in 4 groups .* means 2 groups"),
        (changed(gptq(), scales=np.ones((2, 4), "f2")), GPTQ, "scales", r"shape \[2, 4\], where \[2, 8\] is expected"),
        (changed(gptq(), scales=np.ones((2, 8), "i4")), GPTQ, "scales", "values of type I32, where F32 or F16 or BF16"),
        (changed(gptq(), qzeros=np.zeros((2, 2), "i4")), GPTQ, "qzeros", r"\[2, 2\], where \[2, 1\] is expected"),
        (changed(gptq(), g_idx=np.zeros(8, "i4")), GPTQ, "g_idx", r"shape \[8\], where \[16\] is expected"),
        (gptq(), BYTES, "qweight", "a part of GPTQ or AWQ, but the configuration says compressed-tensors"),
        (gptq(), AWQ, "qweight", r"shape \[2, 8\], where \[16, 1\] is expected"),
        (changed(packed(), weight_scale=None), PACKED, "weight_scale", "this part of a quantized weight is missing"),
        (changed(packed(), weight_packed=None), PACKED, None, "the weight that it belongs to is missing"),
        (changed(packed(), weight_shape=np.ones(3, "i8")), PACKED, "weight_shape", r"shape \[3\], where \[2\]"),
        (
            changed(packed(), weight_zero_point=np.zeros((2, 2), "i4")),
            PACKED,
            "weight_zero_point",
            r"shape \[2, 2\], where \[1, 2\] is expected",
        ),
        ({"weight": FLOAT8_CODES}, FLOAT8, "weight", "values of type F8_E4M3 without a scale"),
        ({"weight": np.zeros((2, 8), "i1")}, BYTES, "weight_scale", "this part of a quantized weight is missing"),
        (
            {"weight": FLOAT8_CODES, "weight_scale": np.ones((2, 8), "f4")},
            FLOAT8,
            "weight_scale",
            r"shape \[2, 8\], where \[1, 2\] is expected",
        ),
        (
            {"weight": FLOAT8_CODES, "weight_scale": np.ones((2, 1), "f4")},
            BYTES,
            "weight",
            "values of type F8_E4M3, of which the configuration says nothing",
        ),
        ({"weight": np.zeros((2, 4), "i1"), "weight_scale": np.ones(1, "f4")}, BYTES, "weight", r"where \[2, 8\] is"),
    ],
)
def test_parts_that_do_not_fit_are_named(
    tmp_path: Path, parts: Tensors, quantization: Quantization, where: str | None, why: str
) -> None:
    shape = (8, 16) if quantization in (GPTQ, AWQ) or "qweight" in parts else (2, 8)
    with pytest.raises(CheckpointError, match=why) as caught:
        open_all(tmp_path, parts, quantization, shape)
    assert caught.value.exit_code == 3
    assert where is None or caught.value.where == f"{NAME}.{where}"


@pytest.mark.parametrize(
    ("parts", "quantization", "kind", "why"),
    [
        (
            changed(gptq(), scales=np.full((2, 8), np.nan, "f2")),
            GPTQ,
            NumericalError,
            r"scales: 16 of its scales are NaN or infinite, the first at \[0, 0\]",
        ),
        (
            changed(packed(), weight_shape=np.array([8, 2], "i8")),
            PACKED,
            CheckpointError,
            r"weight_shape: \[8, 2\], but config.json means \[2, 8\]",
        ),
        (
            changed(gptq(), g_idx=(np.arange(16) % 2).astype("i4")),
            GPTQ,
            CheckpointError,
            "g_idx: columns are not in the order of their groups, though the configuration says that they are",
        ),
        (
            changed(gptq(), g_idx=np.arange(16, dtype="i4")),
            GPTQ_ASYM,
            CheckpointError,
            "g_idx: column 2 belongs to group 2, there are 2",
        ),
        (
            {"weight": np.full((2, 8), 9, "i1"), "weight_scale": np.ones((2, 1), "f4")},
            Quantization("compressed-tensors", (WeightScheme(4),)),
            CheckpointError,
            r"weight: a value outside -8\.\.7",
        ),
        (
            {"weight": FLOAT8_CODES, "weight_scale": np.full((2, 1), np.inf, "f4")},
            FLOAT8,
            NumericalError,
            "weight_scale: 2 of its scales are NaN or infinite",
        ),
    ],
)
def test_values_that_contradict_each_other_are_found_when_they_are_read(
    tmp_path: Path, parts: Tensors, quantization: Quantization, kind: type[ExaoneError], why: str
) -> None:
    shape = (8, 16) if "qweight" in parts else (2, 8)
    weight = open_all(tmp_path, parts, quantization, shape).sources[f"{NAME}.weight"]
    with pytest.raises(kind, match=why):
        weight.read()


def test_layers_the_model_does_not_have_are_left_as_they_are(tmp_path: Path) -> None:
    save_file({f"mtp.fc.{part}": value for part, value in gptq().items()}, tmp_path / "model.safetensors")
    refs, _ = open_shards(tmp_path)
    done = assemble(refs, GPTQ, lambda name: None)
    assert (done.sources, done.ignored) == (refs, [])
