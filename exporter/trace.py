"""From a graph's module to an ONNX model without weights.

The module is built and traced under fake tensors, which have shapes and types but no data, so that tracing the
largest model costs no more memory than the smallest.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from exporter.graphs import OPTIONAL_INPUTS, GraphSpec
from exporter.passes import run_passes
from exporter.passes_names import SYMBOLS
from exporter.passes_weights import FACTOR
from exporter.translations import OPSET, translation_table

logger = logging.getLogger("exaone_export.exporter")
DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def trace_graph(
    spec: GraphSpec, dtype: torch.dtype = torch.float32, for_cpu: bool = False, int8_cache: bool = False
) -> ir.Model:
    """Traces one graph and runs the graph passes on it.

    Args:
        spec: the graph.
        dtype: of weights and activations: float32, float16 or bfloat16.
        for_cpu: whether the CPU will run it.
        int8_cache: whether keys and values are cached as integers, by window layers of their window only; the spec's
            own caches must then be of everything.

    Returns:
        A model whose weights have names, types and shapes but no data (`const_value` None). Names are those of the
        module's parameters, and `cos`, `sin` of the rotary tables. A weight with `metadata_props["transposed"]` "1"
        is declared [in, out], the transpose of the module's.
    """
    with _quiet_exporter(), FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        module = _build(spec, dtype)
        inputs = spec.dummy_inputs(DTYPE_NAMES[dtype])
        program = torch.export.export(
            module, spec.arguments(inputs), dynamic_shapes=spec.dynamic_shapes(), strict=False
        )
        onnx_program = torch.onnx.export(
            program,
            optimize=False,
            opset_version=OPSET,
            custom_translation_table=translation_table(),
            verbose=False,
        )
    if onnx_program is None:
        raise RuntimeError(f"torch.onnx.export gave no program for {spec.name}")
    model: ir.Model = onnx_program.model
    _forget_weights(model)
    _note_factors(model, module)
    _name_ends(model, spec)
    rings = _rings(spec) if int8_cache else None
    counts = run_passes(model, for_cpu, spec.numerics.device, rings, spec.numerics.shared)
    logger.debug("%s: %s", spec.name, counts)
    return model


def _rings(spec: GraphSpec) -> tuple[int, ...] | None:
    """Layers that need to cache their window only; None of a graph without a cache."""
    cached = any(name.startswith("past_key_values.") for name in spec.inputs)
    return tuple(replace(spec, window_cache=True).onnx_config().window_layers) if cached else None


def _build(spec: GraphSpec, dtype: torch.dtype) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        module = spec.build().eval()
    finally:
        torch.set_default_dtype(before)
    for name, table in list(module.named_buffers(recurse=False)):
        setattr(module, name, table.to(dtype))  # the attention kernel wants rotary tables in its own type
    return module.requires_grad_(False)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keeps torch's remarks on optional packages and its own internals from the user."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)


def _forget_weights(model: ir.Model) -> None:
    """Fake tensors cannot be read; without a value nothing tries to."""
    for value in model.graph.initializers.values():
        value.const_value = None


def _note_factors(model: ir.Model, module: nn.Module) -> None:
    """Says of the weights that are stored multiplied by what, see `model.text.scaled`."""
    for path, part in module.named_modules():
        factors: dict[str, float] = getattr(part, "factors", {})
        for name, factor in factors.items():
            value = model.graph.initializers.get(f"{path}.{name}")
            if value is not None and factor != 1.0:
                value.metadata_props[FACTOR] = repr(factor)


def _name_ends(model: ir.Model, spec: GraphSpec) -> None:
    """Gives inputs and outputs their names and shapes; an optional input gets its default."""
    graph = model.graph
    for value, (name, axes) in zip(graph.inputs, spec.inputs.items(), strict=True):
        _declare(value, name, axes)
        if name in OPTIONAL_INPUTS:
            value.const_value = ir.tensor(list(OPTIONAL_INPUTS[name]), ir.DataType.INT64, name=name)
            graph.initializers[name] = value
    if len(graph.outputs) > len(spec.outputs):
        del graph.outputs[1]  # hidden states, which only a draft head needs
    for value, (name, axes) in zip(graph.outputs, spec.outputs.items(), strict=True):
        _declare(value, name, axes)


def _declare(value: ir.Value, name: str, axes: dict[int, str]) -> None:
    if value.shape is None:
        raise RuntimeError(f"{name} has no shape after tracing")
    value.name = name
    value.metadata_props[SYMBOLS] = "|".join(str(dim) for dim in value.shape)
    value.shape = ir.Shape([axes.get(i, dim) for i, dim in enumerate(value.shape)])
