"""Attention alone, of the 1.2B shape's layers, in several formulations: milliseconds a layer, taking turns.

    python -m benchmarks.attention [--depths 512 2048 4096] [--rounds 8] [--threads 2]

`usual` is GroupQueryAttention over a float32 cache, `int8` over one of int8 (a scale for each tensor, or for each
channel); `plain` is what `exporter.lowering_decode` makes of it for one token: the same without tiles.
`groups` takes the four heads of a key head as four rows of one product, `turned` stores the keys transposed for that,
`swapped` multiplies the keys with the queries. Every model has several layers with caches of their own, so that a cache
comes from the memory and not from the processor's caches. Prompts of 512 tokens are read in chunks by `usual`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from exporter.builder import CONTRIB
from exporter.lowering_decode import lower_decode_attention
from exporter.passes_names import name_nodes
from exporter.translations import OPSET

HEADS, KV_HEADS, WIDTH, LAYERS = 32, 8, 64, 6
GROUP = HEADS // KV_HEADS
FLOAT, INT8, INT32 = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT32
KINDS = ("usual", "plain", "groups", "turned", "swapped", "int8", "int8_channels")
PIECES = (512, 256, 128)


class _Model:
    """Layers side by side, their queries, keys, values and caches as inputs."""

    def __init__(self, kind: str) -> None:
        self.kind, self.nodes, self.constants = kind, [], {}  # type: str, list[ir.Node], dict[str, ir.Value]
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        shared = {"lengths": (INT32, [1]), "total": (INT32, []), "hidden": (FLOAT, [1, 1, 1, "slots"])}
        tables = {"cos": (FLOAT, ["positions", WIDTH // 2]), "sin": (FLOAT, ["positions", WIDTH // 2])}
        self.shared = {name: self._input(name, *what) for name, what in (shared | tables).items()}
        for layer in range(LAYERS):
            self._layer(layer)

    def _input(self, name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.inputs.append(value)
        return value

    def _output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: list[int | str]) -> None:
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(dtype)
        self.outputs.append(value)

    def _layer(self, layer: int) -> None:
        cached = INT8 if self.kind.startswith("int8") else FLOAT
        rows: list[int | str] = [1, KV_HEADS, "slots", WIDTH]
        columns: list[int | str] = [1, KV_HEADS, WIDTH, "slots"]
        query, key, value = (
            self._input(f"{name}{layer}", FLOAT, [1, "tokens", heads * WIDTH])
            for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
        )
        keys = self._input(f"past_k{layer}", cached, columns if self.kind == "turned" else rows)
        values = self._input(f"past_v{layer}", cached, rows)
        if self.kind in ("usual", "plain", "int8", "int8_channels"):
            attended, *present = self._usual([query, key, value, keys, values])
            for name, cache in zip("kv", present, strict=True):
                self._output(cache, f"present_{name}{layer}", cached, rows)
        else:
            attended = self._products(query, keys, values)
        self._output(attended, f"o{layer}", FLOAT, [1, "tokens", HEADS * WIDTH])

    def _usual(self, given: list[ir.Value]) -> tuple[ir.Value, ...]:
        attributes: dict[str, Any] = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "do_rotary": 1}
        inputs: list[ir.Value | None] = [*given, *(self.shared[n] for n in ("lengths", "total", "cos", "sin"))]
        if self.kind.startswith("int8"):
            channels = self.kind == "int8_channels"
            scale = self._constant(np.full(KV_HEADS * WIDTH if channels else 1, 0.03, np.float32))
            inputs += [None, None, None, scale, scale]
            how = "PER_CHANNEL" if channels else "PER_TENSOR"
            attributes |= {"k_quant_type": how, "v_quant_type": how, "kv_cache_bit_width": 8}
        node = ir.node("GroupQueryAttention", inputs, attributes, domain=CONTRIB, num_outputs=3)
        self.nodes.append(node)
        return tuple(node.outputs)

    def _products(self, query: ir.Value, keys: ir.Value, values: ir.Value) -> ir.Value:
        """Without rotation and without writing the cache, which cost nothing beside the rest."""
        queries = self._add("Reshape", query, np.array([1, KV_HEADS, GROUP, WIDTH]))
        scale = WIDTH**-0.5
        if self.kind == "swapped":
            turned = self._add("FusedMatMul", keys, queries, domain=CONTRIB, transB=1, alpha=scale)
            scores = self._add("Transpose", turned, perm=[0, 1, 3, 2])
        else:
            flipped = int(self.kind == "groups")
            scores = self._add("FusedMatMul", queries, keys, domain=CONTRIB, transB=flipped, alpha=scale)
        weights = self._add("Softmax", self._add("Add", scores, self.shared["hidden"]), axis=-1)
        return self._add("Reshape", self._add("MatMul", weights, values), np.array([1, 1, HEADS * WIDTH]))

    def _add(self, op_type: str, *inputs: ir.Value | np.ndarray[Any, Any], domain: str = "", **more: Any) -> ir.Value:
        given = [x if isinstance(x, ir.Value) else self._constant(x) for x in inputs]
        node = ir.node(op_type, given, more, domain=domain)
        self.nodes.append(node)
        return node.outputs[0]

    def _constant(self, array: np.ndarray[Any, Any]) -> ir.Value:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = ir.val(name, const_value=ir.tensor(array, name=name))
        return self.constants[name]

    def to_bytes(self) -> bytes:
        opsets = {"": OPSET, CONTRIB: 1}
        graph = ir.Graph(
            self.inputs, self.outputs, nodes=self.nodes, initializers=list(self.constants.values()), name=self.kind,
            opset_imports=opsets,
        )  # fmt: skip
        model = ir.Model(graph, ir_version=10)
        if self.kind == "plain":
            lower_decode_attention(model)
        name_nodes(model)
        return bytes(ir.to_proto(model).SerializeToString())


class Layers:
    """A session over layers with full caches; a call is one pass, in seconds a layer."""

    def __init__(self, kind: str, depth: int, tokens: int, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        # Sessions take turns: one that waits must not keep the cores.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = ort.InferenceSession(_Model(kind).to_bytes(), options, providers=["CPUExecutionProvider"])
        self._binding, self._kept = self._session.io_binding(), []  # type: Any, list[Any]
        random, slots = np.random.default_rng(0), depth + tokens
        angles = np.arange(slots)[:, None] * np.exp(-np.arange(WIDTH // 2) / 4)
        given: dict[str, np.ndarray[Any, Any]] = {
            "lengths": np.array([slots - 1], np.int32), "total": np.array(slots, np.int32),
            "hidden": np.zeros((1, 1, 1, slots), np.float32),
            "cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32),
        }  # fmt: skip
        sizes = {"tokens": tokens, "slots": slots}
        for entry in self._session.get_inputs():
            shape = [sizes.get(size, size) for size in entry.shape]
            array = given.get(entry.name)
            if array is None:
                array = random.standard_normal(shape, np.float32)
                array = (array * 30).astype(np.int8) if "int8" in entry.type else array
            value = ort.OrtValue.ortvalue_from_numpy(array)
            self._kept += [array, value]
            self._binding.bind_ortvalue_input(entry.name, value)
            if entry.name.startswith("past") and kind in ("usual", "plain", "int8", "int8_channels"):
                self._binding.bind_ortvalue_output(entry.name.replace("past", "present"), value)
        for layer in range(LAYERS):
            self._binding.bind_output(f"o{layer}", "cpu")

    def __call__(self) -> float:
        begin = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        return (time.perf_counter() - begin) / LAYERS


def turns(runs: dict[str, Callable[[], float]], rounds: int, together: int) -> dict[str, float]:
    """Median milliseconds of each, some passes at a time, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(0.005)
            run()
            times[name] += [run() for _ in range(together)]
    return {name: 1e3 * statistics.median(some) for name, some in times.items()}


def main() -> None:
    """Prints a line for each depth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    for depth in options.depths:
        runs: dict[str, Callable[[], float]] = {
            kind: Layers(kind, depth, 1, options.threads) for kind in dict.fromkeys(("usual", *options.kinds))
        }
        medians = turns(runs, options.rounds, 4)
        print(f"{depth:6d}  " + "  ".join(f"{k} {v:.3f} ({v / medians['usual']:.2f})" for k, v in medians.items()))
    for size in PIECES:
        starts = range(0, PIECES[0], size)
        passes = [Layers("usual", start, size, options.threads) for start in starts]
        runs = {str(start): run for start, run in zip(starts, passes, strict=True)}
        total = sum(turns(runs, options.rounds, 1).values())
        print(f"prompt of {PIECES[0]} in chunks of {size}: {total:.2f} ms a layer")


if __name__ == "__main__":
    main()
