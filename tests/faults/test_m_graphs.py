"""M07 to M10, M12, M13 and M19: graphs that are not what an export writes, though their hashes are right.

What a graph may hold is looked at before ONNX Runtime sees it. Numbers are those of the table of faults that the
toolkit is tried against.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import exaone_export as ee
from tests.faults.harness import check_refusal, run_here
from tests.faults.hostile import (
    DATA,
    DECODER,
    ROOT,
    Bad,
    check_bad,
    check_verify,
    entry,
    external,
    graph,
    instead,
    made,
    manifest,
    moved_out,
    place_of,
    refused,
    renamed,
    sign,
    verifies,
)


def located(where: str) -> Any:
    """The first tensor lies in another file."""
    return graph(lambda model: entry(external(model), "location", where))


def nested(folder: Path) -> None:
    """The data lies in a folder below, as the manifest says, but not as it says of this graph."""
    (folder / "sub").mkdir()
    (folder / "sub" / DATA).write_bytes((folder / DATA).read_bytes())
    manifest(lambda raw: raw["files"].update({f"sub/{DATA}": raw["files"][DATA]}))(folder)
    located(f"sub/{DATA}")(folder)


def addressed(folder: Path) -> None:
    """A file of the bundle, listed and of that name, so that an offset inside it is an address in memory."""
    name = "*/_ORT_MEM_ADDR_/*"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(bytes(1 << 20))

    def listed(raw: dict[str, Any]) -> None:
        raw["files"][name] = raw["files"][DATA]
        raw["graphs"][0]["data"].append(name)

    manifest(listed)(folder)
    located(name)(folder)


def many_heads(model: onnx.ModelProto) -> None:
    """Of such a number ONNX Runtime keeps the low 32 bits, which are zero, and divides by them."""
    node = helper.make_node("GroupQueryAttention", ["a"], ["x_out"], domain="com.microsoft", num_heads=1 << 62)
    model.graph.node.append(node)


test_m08_numbers_that_no_kernel_minds = refused(Bad("m08 heads", graph(many_heads), ("GroupQueryAttention with",)))
test_m07_tensors_in_files_that_are_not_the_graphs = refused(
    Bad("m07 an address in a file of the bundle", addressed, ("_ORT_MEM_ADDR_",)),
    Bad("m07 above", located("../secret"), ("'../secret'", "not the graph's data file")),
    Bad("m07 absolute", located("/etc/passwd"), ("'/etc/passwd'", "not the graph's data file")),
    Bad("m07 another file of the bundle", located("config.json"), ("config.json",)),
    Bad("m07 nested", nested, ("not the graph's data file",)),
    Bad("m07 the same by another name", located(f"./{DATA}"), ("not the graph's data file",)),
    Bad("m07 by a detour", located(f"x/../{DATA}"), ("not the graph's data file",)),
    Bad("m07 nowhere", located(""), ("not the graph's data file",)),
    Bad("m07 with NUL", located(f"{DATA}\0x"), ("not the graph's data file",)),
    Bad("m07 an address in memory", located("*/_ORT_MEM_ADDR_/*"), ("_ORT_MEM_ADDR_",)),
    Bad("m07 an address by its mark", located("_ORT_MEM_ADDR_"), ("_ORT_MEM_ADDR_",)),
    Bad("m07 a link out", moved_out(lambda out, link: link.symlink_to(out), DATA), ("link",)),
    Bad("m07 a hard link out", moved_out(lambda out, link: link.hardlink_to(out), DATA), ("hard link",)),
    Bad("m07 a graph that is a hard link", moved_out(lambda out, link: link.hardlink_to(out), DECODER), ("hard link",)),
    Bad("m07 a pipe", instead(DATA, os.mkfifo), ("not an ordinary file",), signed=False, apart=True),
    Bad("m07 a graph that is a pipe", instead(DECODER, os.mkfifo), ("not an ordinary",), signed=False, apart=True),
    Bad("m07 a folder", instead(DATA, Path.mkdir), ("not an ordinary file",), signed=False),
    Bad("m07 a socket", instead(DATA, lambda path: os.mknod(path, 0o140600)), ("not an ordinary file",), signed=False),
    Bad("m07 empty", instead(DATA, Path.touch), ("beyond the end",)),
    Bad("m07 missing", lambda folder: (folder / DATA).unlink(), ("missing",), signed=False),
)


def test_m07_nothing_is_read_to_be_quantized_either(tmp_path: Path) -> None:
    """Another library opens the graph there, and what it reads would be written into the new bundle."""
    folder = made(tmp_path)
    located("../secret")(folder)
    sign(folder)
    (tmp_path / "secret").write_bytes(bytes(1 << 20))
    outcome = run_here(("quantize", str(folder), str(tmp_path / "out"), "--quiet"))
    check_refusal(outcome, 4, ("'../secret'", "not the graph's data file"), tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def shaped(*dims: int) -> Any:
    def change(model: onnx.ModelProto) -> None:
        tensor = external(model)
        del tensor.dims[:]
        tensor.dims.extend(dims)

    return graph(change)


def placed(key: str, value: str) -> Any:
    return graph(lambda model: entry(external(model), key, value))


def shifted(by: int) -> Any:
    """The first tensor lies a little off."""

    def change(model: onnx.ModelProto) -> None:
        tensor = external(model)
        entry(tensor, "offset", str(place_of(tensor)[0] + by))

    return graph(change)


def inside(values: int) -> Any:
    """A tensor in the graph's own file that has another number of values than its shape says."""
    tensor = TensorProto(name="x", dims=[4], data_type=TensorProto.FLOAT, raw_data=bytes(4 * values))
    return graph(lambda model: model.graph.initializer.append(tensor))


def everywhere(model: onnx.ModelProto) -> None:
    """A tensor with values of its own and a place in the data file."""
    external(model).raw_data = b"\0" * place_of(external(model))[1]


UNSOUND = "not a sound ONNX file"
test_m08_places_and_shapes_that_cannot_be = refused(
    Bad("m08 a negative offset", placed("offset", "-4096"), (UNSOUND, "offset or length")),
    Bad("m08 an offset past the end", placed("offset", str(1 << 30)), ("beyond the end",)),
    Bad("m08 an offset of 2^40", placed("offset", str(1 << 40)), ("beyond the end",)),
    Bad("m08 an offset of 2^64", placed("offset", str(1 << 64)), (UNSOUND,)),
    Bad("m08 an offset that is text", placed("offset", "abc"), (UNSOUND, "'abc'")),
    Bad("m08 an offset of other digits", placed("offset", "٣"), (UNSOUND,)),
    Bad("m08 an offset in the middle of a number", shifted(2), ("middle of a number",)),
    Bad("m08 a negative length", placed("length", "-1"), (UNSOUND,)),
    Bad("m08 a length past the end", placed("length", str(1 << 30)), ("beyond the end",)),
    Bad("m08 a length of nothing", placed("length", "0"), ("takes 0 bytes",)),
    Bad("m08 a length that is text", placed("length", "abc"), (UNSOUND, "'abc'")),
    Bad("m08 no length", graph(lambda model: external(model).external_data.pop()), ()),
    Bad("m08 dims of 2^40", shaped(1 << 40, 1 << 40), (UNSOUND, "impossible dimensions")),
    Bad("m08 dims of minus 16", shaped(-16, -16), (UNSOUND, "impossible dimensions")),
    Bad("m08 a product that overflows", shaped(1 << 32, 1 << 32), ("its shape",)),
    Bad("m08 fewer dims", shaped(3), ("its shape",)),
    Bad("m08 a hundred dims", shaped(*[1] * 100), (UNSOUND,)),
    Bad("m08 too many values inside", inside(5), (UNSOUND, "'x'")),
    Bad("m08 too few values inside", inside(3), (UNSOUND, "'x'")),
    Bad("m08 in two places", graph(everywhere), (UNSOUND, "two places")),
    Bad("m08 of no type", graph(lambda model: setattr(external(model), "data_type", 99)), (UNSOUND,)),
)


def overlapping(by: int) -> Any:
    """The second tensor begins before the first one's end."""

    def change(model: onnx.ModelProto) -> None:
        lying = sorted((t for t in model.graph.initializer if t.external_data), key=lambda t: place_of(t)[0])
        first, second = lying[0], next(t for t in lying[1:] if sum(place_of(t)) <= sum(place_of(lying[-1])) - by)
        entry(second, "offset", str(place_of(first)[0] + by))

    return graph(change)


test_m09_tensors_that_overlap = refused(
    Bad("m09 by all but a number", overlapping(4), ("overlap",)),
    Bad("m09 by a part", overlapping(64), ("overlap",)),
)

TRIES = """
import json, re, sys
from pathlib import Path
from random import Random

from model.bundle import read_manifest
from model.errors import ExaoneError
from runtime.providers import CPU
from runtime.session import GraphSession

folder, mutants = Path(sys.argv[1]), int(sys.argv[2])
manifest = read_manifest(folder)
graph = manifest.graph("decoder")
path, random = folder / graph.file, Random(11)
sound = path.read_bytes()
cuts = [sound[: i * len(sound) // 100] for i in range(100)]
found = {"ok": 0}
for i in range(100 + mutants):
    data = bytearray(cuts[i] if i < 100 else sound)
    for _ in range(random.randint(1, 6) if i >= 100 else 0):
        data[random.randrange(len(data))] = random.randrange(256)
    path.write_bytes(data)
    try:
        GraphSession(folder, graph, CPU, 1)
        name = "ok"
        assert i >= 100, "a graph that was cut short is taken"
    except ExaoneError as error:
        name = str(error.exit_code)
        text = str(error)
        assert len(text) < 600 and not re.search("0x[0-9a-f]{6}", text) and str(folder) not in text, text
    found[name] = found.get(name, 0) + 1
print(json.dumps(found))
"""


def test_m10_graphs_cut_in_a_hundred_places_and_a_thousand_mutants(tmp_path: Path) -> None:
    """In a process of its own, which must not crash, nor let anything but our errors through."""
    folder = made(tmp_path)
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TRIES, str(folder), "1000"],
        capture_output=True, text=True, timeout=300, check=False, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert sum(found.values()) == 1100
    assert found.keys() <= {"ok", "4", "5", "6"}
    assert found["4"] > 300  # many mutants are other names of values in between, or of nodes


def side(which: str, change: Callable[[dict[str, Any]], object], name: str = "") -> Any:
    """Another input or output in the manifest's entry of the decoder."""

    def edit(raw: dict[str, Any]) -> None:
        decoder = next(graph for graph in raw["graphs"] if graph["name"] == "decoder")
        change(next(tensor for tensor in decoder[which] if name in tensor["name"]))

    return manifest(edit)


def in_graph(which: str, name: str, change: Callable[[onnx.ValueInfoProto], object]) -> Any:
    """Another input or output of the graph, where the manifest stays as it is."""
    return graph(lambda model: change(next(v for v in getattr(model.graph, which) if v.name == name)))


def hidden(model: onnx.ModelProto) -> None:
    """The logits are called something else."""
    for node in model.graph.node:
        node.output[:] = ["scores" if name == "logits" else name for name in node.output]
    next(value for value in model.graph.output if value.name == "logits").name = "scores"


def another_type(value: onnx.ValueInfoProto) -> None:
    value.type.tensor_type.elem_type = TensorProto.INT32


DIFFER = (DECODER, "the manifest")
test_m12_inputs_and_outputs_that_differ_from_the_manifest = refused(
    Bad("m12 an output of another name", graph(hidden), (DECODER, "'logits' differs")),
    Bad("m12 an input of another name", side("inputs", lambda t: t.update(name="ids"), "input_ids"),
        (DECODER, "'ids' differs")),
    Bad("m12 an input too many", graph(lambda model: model.graph.input.append(
        helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))), DIFFER),
    Bad("m12 an input of another type", in_graph("input", "attention_mask", another_type), DIFFER),
    Bad("m12 a type that the graph has not", side("inputs", lambda t: t.update(dtype="int32"), "mask"), DIFFER),
    Bad("m12 an output of another rank", side("outputs", lambda t: t.update(shape=["a", 160]), "logits"), DIFFER),
    Bad("m12 a cache of other heads", side("inputs", lambda t: t["shape"].__setitem__(1, 7), ".key"),
        ("config.json",)),
    Bad("m12 a cache of a billion heads", side("inputs", lambda t: t["shape"].__setitem__(1, 10**9), ".key"),
        ("config.json",)),
    Bad("m12 a cache of another type", side("inputs", lambda t: t.update(dtype="float16"), ".key"), DIFFER),
    Bad("m12 a vocabulary of another size", side("outputs", lambda t: t["shape"].__setitem__(2, 99), "logits"),
        ("config.json",)),
)  # fmt: skip


def features(size: int) -> Any:
    """The encoder's features are of another width, as the graph and the manifest say."""

    def edit(raw: dict[str, Any]) -> None:
        encoder = next(graph for graph in raw["graphs"] if graph["name"] == "vision_encoder")
        encoder["outputs"][0]["shape"][1] = size

    def change(model: onnx.ModelProto) -> None:
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = size

    return lambda folder: (graph(change, "vision_encoder.onnx")(folder), manifest(edit)(folder))


def test_m13_an_encoder_of_another_model(tmp_path: Path) -> None:
    """Found before anything runs, by the manifest, or when the encoder is opened where the manifest hides it."""
    check_bad(
        Bad("m13", features(48), ("vision_encoder.onnx", "'image_features' has 48"), kind="vlm"), tmp_path / "open"
    )
    folder = made(tmp_path / "hidden", "vlm")
    before = json.loads((folder / "exaone_export.json").read_text())["graphs"]
    features(48)(folder)
    manifest(lambda raw: raw.update(graphs=before))(folder)
    sign(folder)
    check_verify(run_here(verifies(folder)), 4, "vision_encoder.onnx", "'image_features' differs: its size")
    with ee.load(folder) as engine, pytest.raises(ee.BundleError, match=r"vision_encoder\.onnx.*size"):
        engine.generate("x", images=[np.zeros((56, 56, 3), np.uint8)], max_new_tokens=2)


def newer(model: onnx.ModelProto) -> None:
    next(opset for opset in model.opset_import if not opset.domain).version = 99


def newer_operator(model: onnx.ModelProto) -> None:
    newer(model)
    renamed("Cos", "Cosine", "")(model)
    model.graph.node.append(helper.make_node("Cosine", [model.graph.initializer[0].name], ["x_out"]))


test_m19_graphs_that_are_newer_than_onnxruntime = refused(
    Bad("m19 opset", graph(newer), (DECODER, "opset 99", "known is up to 2"), code=5, verify=0),
    Bad(
        "m19 IR version",
        graph(lambda m: setattr(m, "ir_version", 99)),
        ("IR version 99", "known is up to 1"),
        5,
        verify=0,
    ),
    Bad("m19 an operator of a newer opset", graph(newer_operator), ("opset 99", "'Cosine'", "up to 26"), code=5),
)
