"""M14 and M15: quantized weights whose parts are wrong, though their hashes are right.

No kernel minds a scale that is NaN: the answer would be the first token for ever. Numbers are those of the table of
faults that the toolkit is tried against.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from tests.faults.harness import run_here
from tests.faults.hostile import (
    DATA,
    DECODER,
    Bad,
    Spoil,
    answer,
    asks,
    check_verify,
    graph,
    made,
    place_of,
    refused,
    sign,
    verifies,
)

INT4, CODES, SCALES = "int4", "up_proj.weight_q", "up_proj.weight_scales"


def tensor(model: onnx.ModelProto, name: str) -> TensorProto:
    """An initializer, which lies in the data file or, if it is small, in the graph's."""
    return next(found for found in model.graph.initializer if name in found.name)


def values(name: str, change: Callable[[Any], object]) -> Spoil:
    """Other numbers in a float32 tensor."""

    def spoil(folder: Path) -> None:
        found = tensor(onnx.load(folder / DECODER, load_external_data=False), name)
        content = bytearray((folder / DATA).read_bytes())
        if found.external_data:
            offset, length = place_of(found)
            change(np.frombuffer(content, np.float32, length // 4, offset))
            (folder / DATA).write_bytes(content)
            return
        numbers = np.frombuffer(found.raw_data, np.float32).copy()
        change(numbers)
        graph(lambda model: setattr(tensor(model, name), "raw_data", numbers.tobytes()))(folder)

    return spoil


def one(value: float, place: int = -1) -> Callable[[Any], None]:
    def change(numbers: Any) -> None:
        numbers[place] = value

    return change


def lengthened(name: str, by: int) -> Spoil:
    """A tensor of another number of rows, with as many bytes."""

    def change(model: onnx.ModelProto) -> None:
        found = tensor(model, name)
        size = place_of(found)[1] if found.external_data else len(found.raw_data)
        width = size // found.dims[0]
        found.dims[0] += by
        if not found.external_data:
            found.raw_data = (found.raw_data + bytes(width))[: width * found.dims[0]]
            return
        for pair in found.external_data:
            if pair.key == "length":
                pair.value = str(width * found.dims[0])
            elif pair.key == "offset" and by > 0:  # where nothing else lies
                pair.value = str(1 << 20)

    def spoil(folder: Path) -> None:
        graph(change)(folder)
        content = (folder / DATA).read_bytes()
        (folder / DATA).write_bytes(content + bytes((2 << 20) - len(content)))

    return spoil


def kind(name: str, data_type: int) -> Spoil:
    """The same bytes are numbers of another type, as wide."""
    return graph(lambda model: setattr(tensor(model, name), "data_type", data_type))


def matmul(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == "MatMulNBits" and CODES in node.input[1])


def with_input(place: int, tensor: TensorProto) -> Spoil:
    """One more input of a product of quantized weights."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(tensor)
        node = matmul(model)
        node.input.extend([""] * (place + 1 - len(node.input)))
        node.input[place] = tensor.name

    return graph(change)


def number(name: str, value: int) -> Spoil:
    """Another attribute of a product of quantized weights."""

    def change(model: onnx.ModelProto) -> None:
        next(a for a in matmul(model).attribute if a.name == name).i = value

    return graph(change)


def computed(model: onnx.ModelProto) -> None:
    """Scales that a node gives instead of the file."""
    node = matmul(model)
    model.graph.node.insert(0, onnx.helper.make_node("Neg", [node.input[2]], ["x_scales"]))
    node.input[2] = "x_scales"


def by_numbers(name: str, as_constant: bool = False) -> Spoil:
    """A tensor that ends with NaN, as a list of numbers in the graph's own file, or as a node's attribute."""

    def spoil(folder: Path) -> None:
        values(name, one(np.nan))(folder)
        model = onnx.load(folder / DECODER, load_external_data=True)
        found = tensor(model, name)
        numbers = onnx.numpy_helper.to_array(found)
        written = onnx.helper.make_tensor(found.name, TensorProto.FLOAT, numbers.shape, numbers.flatten())
        if as_constant:
            constant = onnx.numpy_helper.from_array(numbers, "value")
            node = onnx.helper.make_node("Constant", [], [found.name], value=constant)

        def change(model: onnx.ModelProto) -> None:
            if as_constant:
                model.graph.initializer.remove(tensor(model, name))
                model.graph.node.insert(0, node)
            else:
                tensor(model, name).CopyFrom(written)

        graph(change)(folder)

    return spoil


def single(kind: int) -> Any:
    """A scale of a whole tensor that is not in bytes but in the field for numbers of its type."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(onnx.helper.make_tensor("more_scale", kind, [], [np.nan]))
        model.graph.initializer.append(onnx.helper.make_tensor("more_code", TensorProto.INT8, [], [1]))
        nodes = [onnx.helper.make_node("DequantizeLinear", ["more_code", "more_scale"], ["more_weight"])]
        model.graph.node.extend(nodes)

    return graph(change)


NAN = ("scales that are NaN or infinite",)
test_m14_scales_that_are_none = refused(
    Bad("m14 the last is NaN", values(SCALES, one(np.nan)), (SCALES, *NAN), recipe=INT4),
    Bad("m14 the first is infinite", values(SCALES, one(np.inf, 0)), (SCALES, *NAN), recipe=INT4),
    Bad("m14 minus infinity", values(SCALES, one(-np.inf, 7)), (SCALES, *NAN), recipe=INT4),
    Bad("m14 all of them", values(SCALES, lambda numbers: numbers.fill(np.nan)), (SCALES, *NAN), recipe=INT4),
    Bad("m14 of the table", values("embed_tokens.weight_scales", one(np.nan)), NAN, recipe=INT4),
    Bad("m14 too many", lengthened(SCALES, 1), ("scales have the shape",), recipe=INT4),
    Bad("m14 too few", lengthened(SCALES, -1), ("scales have the shape",), recipe=INT4),
    Bad("m14 of another type", kind(SCALES, TensorProto.INT32), ("scales have the shape",), recipe=INT4),
    Bad("m14 codes of another type", kind(CODES, TensorProto.INT8), ("codes have the shape",), recipe=INT4),
    Bad("m14 too many codes", lengthened(CODES, 1), ("codes have the shape",), recipe=INT4),
    Bad("m14 blocks of another size", number("block_size", 16), ("have the shape",), recipe=INT4),
    Bad("m14 blocks of no power of two", number("block_size", 33), ("blocks of 33",), recipe=INT4),
    Bad("m14 blocks of zero", number("block_size", 0), ("blocks of 0",), recipe=INT4),
    Bad("m14 more rows than there are", number("N", 1 << 20), ("codes have the shape",), recipe=INT4),
    Bad("m14 minus one column", number("K", -1), ("weights of 4 bits",), recipe=INT4),
    Bad("m14 bits that no kernel has", number("bits", 3), ("3 bits",), recipe=INT4),
    Bad("m14 computed", graph(computed), ("are computed",), recipe=INT4),
    Bad("m14 number by number", by_numbers(SCALES), ("floats written as numbers",), recipe=INT4),
    Bad("m14 weights number by number", by_numbers("norm.weight"), ("floats written as numbers",)),
    Bad("m14 weights in a node", by_numbers("norm.weight", as_constant=True), ("NaN or an infinity",)),
    Bad("m14 a single one, as a number", single(TensorProto.FLOAT), NAN, recipe=INT4),
    Bad("m14 a single double, as a number", single(TensorProto.DOUBLE), NAN, recipe=INT4),
    Bad("m14 a single half, as bits", single(TensorProto.FLOAT16), ("as a whole number",), recipe=INT4),
    Bad("m14 of whole products", values("up_proj.weight_scales", one(np.nan)), NAN, recipe="int8-dynamic"),
)


def test_m14_negative_scales_are_ordinary(tmp_path: Path) -> None:
    """They let a block reach one step further down than up; with zero for all its weights a block has any scale."""
    folder = made(tmp_path, recipe=INT4)
    values(SCALES, lambda numbers: np.negative(numbers, out=numbers))(folder)
    sign(folder)
    assert answer(folder) != ""
    assert run_here(verifies(folder)).code == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_m14_weights_that_are_no_numbers(tmp_path: Path, bad: float) -> None:
    """In floats `verify` finds them; what runs ends at the first token, with no text."""
    folder = made(tmp_path)
    values("norm.weight", one(bad))(folder)
    sign(folder)
    outcome = run_here(asks(folder))
    assert (outcome.code, outcome.stdout) == (7, "")
    assert "NaN" in outcome.stderr
    check_verify(run_here(verifies(folder)), 4, "norm.weight' holds NaN or an infinity")


FOUR = onnx.helper.make_tensor("zeros", TensorProto.UINT8, [4], bytes(4), raw=True)
FLOATS = onnx.helper.make_tensor(
    "zeros", TensorProto.FLOAT, [2], np.array([np.nan, 99], np.float32).tobytes(), raw=True
)
ORDER = onnx.helper.make_tensor("order", TensorProto.INT32, [64], np.arange(64, dtype=np.int32).tobytes(), raw=True)
test_m15_zero_points_and_orders = refused(
    Bad("m15 zero points of another number", with_input(3, FOUR), ("zero points have the shape [4]",), recipe=INT4),
    Bad("m15 zero points that are floats", with_input(3, FLOATS), ("or another type than uint8",), recipe=INT4),
    Bad("m15 columns in another order", with_input(4, ORDER), ("g_idx",), recipe=INT4),
)
