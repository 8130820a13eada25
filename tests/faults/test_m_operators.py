"""M11: graphs with operators that no exported graph has, and files that two readers would understand differently.

What a graph may hold is looked at before ONNX Runtime sees it. Numbers are those of the table of faults that the
toolkit is tried against.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from model.errors import BundleError
from runtime import protobuf
from runtime.onnx_file import read_onnx
from runtime.operators import ALLOWED
from tests.faults.hostile import DECODER, Bad, graph, made, refused, renamed, sound_bundle


def with_node(op: str, domain: str = "", **attributes: Any) -> Any:
    """One node more, whose result nobody reads."""

    def change(model: onnx.ModelProto) -> None:
        if domain:
            model.opset_import.append(helper.make_opsetid(domain, 1))
        source = model.graph.initializer[0].name
        model.graph.node.append(helper.make_node(op, [source], ["x_out"], domain=domain, **attributes))

    return graph(change)


def body(op: str, domain: str = "", **attributes: Any) -> onnx.GraphProto:
    """A subgraph of one node."""
    node = helper.make_node(op, [], ["b"], domain=domain, **attributes)
    return helper.make_graph([node], "body", [], [helper.make_tensor_value_info("b", TensorProto.FLOAT, [1])])


def with_function(model: onnx.ModelProto) -> None:
    """A function of the model's own that takes the place of an operator of the standard."""
    node = helper.make_node("Identity", ["a"], ["b"])
    model.functions.append(helper.make_function("", "Cos", ["a"], ["b"], [node], [helper.make_opsetid("", 23)]))


def with_sparse(model: onnx.ModelProto) -> None:
    values = helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))


def with_training(model: onnx.ModelProto) -> None:
    model.training_info.append(onnx.TrainingInfoProto(algorithm=body("EPContext", "com.microsoft")))


OUTSIDE = helper.make_tensor("c", TensorProto.FLOAT, [1], [1.0])
OUTSIDE.ClearField("float_data")
OUTSIDE.data_location = TensorProto.EXTERNAL
OUTSIDE.external_data.append(onnx.StringStringEntryProto(key="location", value="../secret"))
FOREIGN = body("If", then_branch=body("Evil", "evil"), else_branch=body("Constant", value_float=1.0))
NOT_OURS = "which no exported graph has"
UNSOUND = "not a sound ONNX file"
test_m11_operators_that_no_exported_graph_has = refused(
    Bad("m11 another domain", with_node("Evil", "evil"), ("'evil.Evil'", NOT_OURS)),
    Bad("m11 an unknown operator", with_node("Evil"), ("'Evil'", NOT_OURS)),
    Bad("m11 one of the machine learning domain", with_node("ZipMap", "ai.onnx.ml"), (NOT_OURS,)),
    Bad("m11 compiled code", with_node("EPContext", "com.microsoft"), ("EPContext", NOT_OURS)),
    Bad("m11 code of Python", with_node("PythonOp", "com.microsoft.extensions"), ("PythonOp", NOT_OURS)),
    Bad("m11 a search of its own", with_node("BeamSearch", "com.microsoft"), ("BeamSearch", NOT_OURS)),
    Bad("m11 chance", with_node("RandomNormalLike"), ("RandomNormalLike", NOT_OURS)),
    Bad("m11 files that are images", with_node("ImageDecoder"), ("ImageDecoder", NOT_OURS)),
    Bad("m11 a name that does not print", with_node("Add\x1b[31m\n"), (NOT_OURS,)),
    Bad("m11 ours by a foreign name", graph(renamed("Gather", "Gather", "com.microsoft.x")), (NOT_OURS,)),
    Bad("m11 a function", graph(with_function), ("functions of its own",)),
    Bad("m11 If with a foreign body", with_node("If", then_branch=body("Evil", "evil")), ("'evil.Evil'", NOT_OURS)),
    Bad("m11 Loop which may have no end", with_node("Loop", body=body("Cos")), ("'Loop'", NOT_OURS)),
    Bad("m11 Scan with a foreign body", with_node("Scan", body=body("EPContext", "com.microsoft")), ("EPContext",)),
    Bad("m11 a body in a body", with_node("Scan", body=FOREIGN), ("'evil.Evil'", NOT_OURS)),
    Bad("m11 bodies in a list", with_node("Add", bodies=[body("Cos"), body("Evil")]), ("'Evil'", NOT_OURS)),
    Bad("m11 a sparse tensor", graph(with_sparse), (UNSOUND,)),
    Bad("m11 a part for training", graph(with_training), (UNSOUND,)),
    Bad("m11 a constant in a file", with_node("Constant", value=OUTSIDE), (UNSOUND,)),
)


def file(folder: Path, *more: bytes, graphs: int = 1) -> Path:
    """A model of one Add, whose node has more fields."""
    node = protobuf.content(1, protobuf.node("Add", ["a", "b"], ["c"]) + b"".join(more))
    opset = protobuf.content(8, protobuf.number(2, 23))
    (folder / "x.onnx").write_bytes(protobuf.number(1, 8) + protobuf.content(7, node) * graphs + opset)
    return folder / "x.onnx"


# protobuf takes the last of fields that come twice, keeps 32 bits of a field's number, and joins messages.
DOUBLE = {
    "op_type twice": protobuf.content(4, b"EPContext"),
    "a domain twice": protobuf.content(7, b"evil") + protobuf.content(7, b"x"),
    "a number of more than 32 bits": protobuf.variable((1 << 35) + (4 << 3 | 2)) + b"\x04Evil",
    "a field of another wire type": protobuf.variable(4 << 3 | 5) + b"Evil",
    "a field that is a number": protobuf.number(4, 1),
    "a field that nobody knows": protobuf.content(11, b""),
    "a group": bytes([4 << 3 | 3, 4 << 3 | 4]),
    "field zero": b"\x02\x01x",
    "a length of 2^63": bytes([4 << 3 | 2]) + protobuf.variable(1 << 63),
    "an attribute with two graphs": protobuf.content(5, protobuf.content(6, b"") * 2),
    "an attribute twice": protobuf.content(5, protobuf.content(1, b"axis") + protobuf.number(20, 2))
    + protobuf.integer_attribute("axis", 1),
    "a length without end": bytes([4 << 3 | 2]) + b"\xff" * 11,
}


@pytest.mark.parametrize("name", DOUBLE)
def test_m11_what_another_reader_would_understand_differently(tmp_path: Path, name: str) -> None:
    assert read_onnx(file(tmp_path)).ops == {"Add": 1}
    with pytest.raises(BundleError, match="not a sound ONNX file"):
        read_onnx(file(tmp_path, DOUBLE[name]))
    with pytest.raises(BundleError, match="several graphs"):
        read_onnx(file(tmp_path, graphs=2))


def test_m10_graphs_that_take_all_memory_to_read(tmp_path: Path) -> None:
    """Half a million empty nodes are a megabyte; a file of gigabytes is not read at all."""
    bomb = tmp_path / "x.onnx"
    bomb.write_bytes(protobuf.content(7, b"\x0a\x00" * 600_000))
    with pytest.raises(BundleError, match="more than 500000 parts"):
        read_onnx(bomb)
    os.truncate(bomb, 1 << 40)
    with pytest.raises(BundleError, match="1099511627776 bytes, more than"):
        read_onnx(bomb)


def test_the_reader_takes_what_the_onnx_library_writes_with_any_names(tmp_path: Path) -> None:
    """Names of values, nodes and documentation are anybody's."""
    rng = random.Random(3)
    model = onnx.load(made(tmp_path) / DECODER, load_external_data=False)
    for node in model.graph.node:
        node.doc_string = "".join(chr(rng.randrange(32, 0x3000)) for _ in range(5))
    path = tmp_path / "named.onnx"
    path.write_bytes(model.SerializeToString())
    found = read_onnx(path)
    assert sum(found.ops.values()) >= len(model.graph.node)
    assert found.opsets[""] == next(opset.version for opset in model.opset_import if not opset.domain)


@pytest.mark.parametrize(("kind", "recipe"), [("dense", "none"), ("dense", "int4"), ("dense", "int8-dynamic")])
def test_what_is_exported_holds_operators_of_the_list(tmp_path: Path, kind: str, recipe: str) -> None:
    """That every other test's bundles open says the same of all tasks, targets and recipes."""
    folder = made(tmp_path, kind, recipe)
    names = [name for name in sound_bundle(kind, recipe) if name.endswith(".onnx")]
    assert names
    for name in names:
        assert read_onnx(folder / name).ops.keys() <= ALLOWED
