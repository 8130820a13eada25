"""The writers of quantized checkpoints against words worked out by hand, and what the usual misreadings would cost."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.quantized_writers_packing import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    AnyArray,
    Draws,
    Floats,
    Grid,
    awq_gemm,
    float8,
    gptq,
    int_quantized,
    make_grid,
    pack_quantized,
    pack_words,
)

EIGHT = np.arange(8, dtype=np.uint8)


def grid_of(codes: AnyArray, zero_points: AnyArray, bits: int = 4) -> Grid:
    rows, columns = codes.shape
    return Grid(bits, codes, np.ones((rows, 1), np.float32), zero_points, np.zeros(columns, np.int32))


def words(array: AnyArray) -> list[str]:
    return [f"{word:08x}" for word in array.view(np.uint32).ravel()]


def test_the_first_code_is_in_the_lowest_bits() -> None:
    assert words(pack_words(EIGHT[None], 4)) == ["76543210"]
    assert words(pack_words(EIGHT[None], 8)) == ["03020100", "07060504"]
    assert words(pack_words(np.array([[1, 2, 3]], np.uint8), 4)) == ["00000321"]


def test_compressed_tensors() -> None:
    layer = pack_quantized(grid_of(EIGHT[None].repeat(8, 0), EIGHT[:, None]), BFLOAT16, symmetric=False)
    assert words(layer.tensors["weight_packed"]) == ["76543210"] * 8  # signed -8 .. -1
    assert words(layer.tensors["weight_zero_point"]) == ["76543210"]  # along the outputs
    assert layer.tensors["weight_zero_point"].shape == (1, 1)
    assert layer.tensors["weight_shape"].tolist() == [8, 8]
    signed = int_quantized(grid_of(np.array([[0, 128, 255]], np.uint8), np.array([[128]], np.uint8), 8), BFLOAT16)
    assert signed.tensors["weight"].tolist() == [[-128, 0, 127]]
    assert signed.weight.tolist() == [[-128, 0, 127]]


def test_awq_interleaves_eight_outputs() -> None:
    layer = awq_gemm(grid_of(EIGHT[:, None].repeat(3, 1), EIGHT[:, None]))
    assert words(layer.tensors["qweight"]) == ["75316420"] * 3
    assert words(layer.tensors["qzeros"]) == ["75316420"]
    assert layer.tensors["qweight"].shape == (3, 1)
    assert layer.tensors["scales"].shape == (1, 8)


def test_gptq_packs_codes_along_inputs_and_zero_points_along_outputs() -> None:
    points = np.array([[0], [8], [1], [8], [8], [8], [8], [8]], np.uint8)
    grid = grid_of(EIGHT[None].repeat(8, 0), points)
    second, first = gptq(grid, 2).tensors, gptq(grid, 1).tensors
    assert words(second["qweight"]) == ["76543210"] * 8
    assert second["qweight"].shape == (1, 8)
    assert words(second["qzeros"]) == ["88888180"]
    assert words(first["qzeros"]) == ["7777706f"]  # the zero point 0 borrows from its neighbour, which was 8
    eight = gptq(grid_of(EIGHT[None].repeat(4, 0), np.full((4, 1), 128, np.uint8), 8), 1).tensors
    assert words(eight["qzeros"]) == ["7f7f7f7f"]


def test_float8_scales_are_factors_and_edges_are_smaller_blocks() -> None:
    weight = np.random.default_rng(0).standard_normal((200, 130)).astype(np.float32)
    layer = float8(weight, (128, 128), suffix="weight_scale_inv", scale_type=FLOAT32, axes=2)
    scales = layer.tensors["weight_scale_inv"]
    assert scales.shape == (2, 2)
    assert scales[1, 1] == np.float32(np.abs(weight[128:, 128:]).max() / 448)
    np.testing.assert_allclose(layer.weight, weight, atol=np.abs(weight).max() / 16, rtol=0)
    for axes, shape in ((0, ()), (1, (1,)), (2, (1, 1))):
        one = float8(weight, (-1, -1), suffix="weight_scale", scale_type=BFLOAT16, axes=axes)
        assert one.tensors["weight_scale"].shape == shape


@pytest.mark.parametrize("bits", [4, 8])
def test_grids_use_every_zero_point_and_stay_near_the_weight(bits: int) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((256, 512)).astype(np.float32)
    affine = make_grid(weight, bits, 32, symmetric=False, scale_type=FLOAT16, draws=Draws(rng, rng))
    assert {0, (1 << bits) - 1} <= set(affine.zero_points.ravel().tolist())
    even = make_grid(weight, bits, 32, symmetric=True, scale_type=FLOAT16, draws=Draws(rng, rng), shuffled=True)
    error = np.abs(even.dequantized() - weight).max()
    assert error < 1.01 * even.scales.max()
    assert not np.array_equal(even.groups, np.sort(even.groups))
    assert (np.bincount(even.groups) == 32).all()


# Each with the columns' groups, zero points, codes that the mistake gives.
MISTAKES: dict[str, Callable[[Grid], Grid]] = {
    "act-order ignored": lambda g: Grid(g.bits, g.codes, g.scales, g.zero_points, np.sort(g.groups)),
    "zero points off by one": lambda g: Grid(g.bits, g.codes, g.scales, g.zero_points + 1, g.groups),
    "zero points taken for symmetric": lambda g: Grid(g.bits, g.codes, g.scales, g.zero_points * 0 + 8, g.groups),
    "outputs not put back in order": lambda g: Grid(
        g.bits,
        g.codes.reshape(-1, 8, 128)[:, (0, 2, 4, 6, 1, 3, 5, 7)].reshape(-1, 128),
        g.scales,
        g.zero_points,
        g.groups,
    ),
    "borrows taken lane by lane": lambda g: Grid(g.bits, g.codes, g.scales, lane_by_lane(g.zero_points), g.groups),
}


def lane_by_lane(zero_points: AnyArray) -> AnyArray:
    stored = gptq(grid_of(np.zeros((len(zero_points), 8), np.uint8), zero_points), 1).tensors["qzeros"]
    lanes = (stored.view(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
    found: AnyArray = ((lanes.reshape(len(stored), -1) + 1) & 15).T.astype(np.uint8)
    return found


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_misreading_is_far_outside_the_tolerance(mistake: str) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((32, 128)).astype(np.float32)
    grid = make_grid(weight, 4, 32, symmetric=False, scale_type=FLOAT16, draws=Draws(rng, rng), shuffled=True)
    inputs = np.random.default_rng(1).standard_normal((128, 4)).astype(np.float32)
    right: Floats = grid.dequantized() @ inputs
    wrong = MISTAKES[mistake](grid).dequantized() @ inputs
    assert np.abs(right - wrong).max() > 1000 * 1e-4
