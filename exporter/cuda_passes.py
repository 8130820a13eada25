"""What the graphs for CUDA have otherwise: norms inside attention, lengths that can be captured, the next token's id.

A CUDA graph is recorded once and replayed: what the CPU computes is not computed again, and no value may be copied
between the two. So whatever decides about shapes is computed from shapes alone, on the CPU, and reaches the device
through the inputs that kernels read from the CPU's memory; everything else is computed on the device, from the sum of
the attention mask. The mask may then be wider than there are tokens.
"""

from __future__ import annotations

import onnx_ir as ir

from exporter.builder import Builder, Constant, given

NEXT_IDS = "next_ids"
_GQA = "GroupQueryAttention"
_NORM_INPUTS = 14  # of GroupQueryAttention: q_norm_weight, and behind it k_norm_weight
_INT32, _FLOAT, _BOOL = (int(kind) for kind in (ir.DataType.INT32, ir.DataType.FLOAT, ir.DataType.BOOL))


def fuse_norms(model: ir.Model) -> int:
    """Hands the norms of queries and keys to GroupQueryAttention, which normalises before it rotates; counts nodes.

    A quantized cache keeps them apart: the fast kernel for one token takes no norms then.
    """
    fused = 0
    for node in [node for node in model.graph if node.op_type == _GQA]:
        found = [_normalised(given(node, i)) for i in (0, 1)]
        if None in found or any(name in node.attributes for name in ("k_quant_type", "v_quant_type")):
            continue
        (query, query_gain, epsilon), (key, key_gain, other) = [x for x in found if x is not None]
        if epsilon != other or len(node.inputs) > _NORM_INPUTS:
            continue
        inputs = [query, key, *node.inputs[2:]]
        inputs += [None] * (_NORM_INPUTS - len(inputs)) + [query_gain, key_gain]
        attributes = [*node.attributes.values(), ir.AttrFloat32("qk_norm_epsilon", epsilon)]
        _replace(model.graph, node, ir.Node(node.domain, node.op_type, inputs, attributes, num_outputs=3))
        fused += 1
    return fused


def _normalised(value: ir.Value) -> tuple[ir.Value, ir.Value, float] | None:
    """What was normalised head by head, the gain, and epsilon."""
    joined = value.producer()
    norm = given(joined, 0).producer() if joined is not None and joined.op_type == "Reshape" else None
    if norm is None or norm.op_type != "SimplifiedLayerNormalization":
        return None
    split = given(norm, 0).producer()
    if split is None or split.op_type != "Reshape":
        return None
    return given(split, 0), given(norm, 1), norm.attributes["epsilon"].as_float()


def _replace(graph: ir.Graph, node: ir.Node, new: ir.Node) -> None:
    new.name, results = node.name, list(node.outputs)
    new.metadata_props.update(node.metadata_props)
    for before, after in zip(results, new.outputs, strict=True):
        after.shape, after.type = before.shape, before.type
        if before.is_graph_output():
            after.name = before.name
    graph.insert_before(node, [new])
    ir.convenience.replace_all_uses_with(results, list(new.outputs), replace_graph_outputs=True)
    graph.remove(node, safe=True)


class _Lengths:
    """How long rows and passes are, as nodes in front of all others.

    Attributes:
        last: int64 [batch], on the device: tokens of each row after this pass, less one.
        batch, sequence: int64 [1], from shapes.
    """

    def __init__(self, graph: ir.Graph) -> None:
        tokens, mask = graph.inputs[0], next(value for value in graph.inputs if value.name == "attention_mask")
        self.build = build = Builder({}, "lengths")
        self.last = build("Sub", build("ReduceSum", mask, [1], keepdims=0), 1)
        self.batch, self.sequence = build("Shape", tokens, start=0, end=1), build("Shape", tokens, start=1, end=2)
        self.end = build("Sub", self.sequence, 1)

    def clip(self, value: ir.Value, least: ir.Value | Constant, most: ir.Value | None = None) -> ir.Value:
        """Clip with bounds from the CPU; they are [1] if they are values."""
        bounds = [self.build("Squeeze", x) if isinstance(x, ir.Value) else x for x in (least, most) if x is not None]
        return self.build("Clip", value, *bounds)

    def windowed(self, past: ir.Value) -> ir.Value:
        """`model.text.window_lengths` for caches like `past`, int32 [batch]."""
        capacity = self.build("Shape", past, start=2, end=3)
        least = self.build("Where", self.build("Less", self.end, capacity), self.end, 0)
        return self.build("Cast", self.clip(self.last, least), to=_INT32)

    def kept(self, keep: ir.Value) -> ir.Value:
        """The rows of the flattened batch that `model.text.kept_rows` takes, int64 [batch, kept].

        A first pass ends at each row's last token, any other at the last of this pass.
        """
        build = self.build
        wanted = build("Min", keep, self.sequence)
        some = build("Greater", wanted, 0)
        count = build("Where", some, wanted, self.sequence)
        least = build("Where", some, 0, self.end)
        last = self.clip(self.last, least, self.end)
        offsets = build("Range", build("Squeeze", build("Sub", 1, count)), 1, 1)
        inside = self.clip(build("Add", build("Unsqueeze", last, [1]), offsets), 0)
        first = build(
            "Range", 0, build("Squeeze", build("Mul", self.batch, self.sequence)), build("Squeeze", self.sequence)
        )
        return build("Add", build("Unsqueeze", first, [1]), inside)


def capture_lengths(model: ir.Model) -> int:
    """Rebuilds the lengths of window layers and the choice of rows for the head; counts the inputs that it changed."""
    graph = model.graph
    attention = [node for node in graph if node.op_type == _GQA]
    windowed = [node for node in attention if "sliding_window_cache" in node.attributes]
    keep = next((value for value in graph.inputs if value.name == "logits_to_keep"), None)
    if not attention or (not windowed and keep is None):
        return 0
    lengths = _Lengths(graph)
    if windowed:
        value = lengths.windowed(given(windowed[0], 3))
        for node in windowed:
            node.replace_input_with(5, value)
    if keep is not None:
        product = graph.outputs[0].producer()
        chosen = given(product, 0).producer() if product is not None else None
        if chosen is None or chosen.op_type != "Gather":
            raise ValueError("the head reads no chosen rows")
        chosen.replace_input_with(1, lengths.kept(keep))
    for constant in lengths.build.constants.values():
        graph.register_initializer(constant)
    graph.insert_before(graph[0], lengths.build.nodes)
    return len(windowed) + (keep is not None)


def compare_without_equal(model: ir.Model) -> int:
    """Equal of whole numbers by other operators: CUDA has a kernel for older versions of the standard only."""
    found = [node for node in model.graph if node.op_type == "Equal" and node.domain == ""]
    for node in found:
        build = Builder(node.metadata_props, node.name or "equal")
        differs = build("Cast", build("Sub", given(node, 0), given(node, 1)), to=_BOOL)
        same = build("Not", differs)
        same.shape, same.type = node.outputs[0].shape, node.outputs[0].type
        model.graph.insert_before(node, build.nodes)
        node.outputs[0].replace_all_uses_with(same)
        model.graph.remove(node, safe=True)
    return len(found)


def add_next_ids(model: ir.Model) -> int:
    """Adds an output int64 [batch, kept]: the likeliest token behind each of the kept positions."""
    graph = model.graph
    logits = graph.outputs[0] if graph.outputs else None
    if logits is None or logits.name != "logits" or all(value.name != "logits_to_keep" for value in graph.inputs):
        return 0
    producer = logits.producer()
    build = Builder(producer.metadata_props if producer is not None else {}, NEXT_IDS)
    # There is no kernel for bfloat16.
    scores = build("Cast", logits, to=_FLOAT) if logits.dtype == ir.DataType.BFLOAT16 else logits
    chosen = build("ArgMax", scores, axis=-1, keepdims=0, select_last_index=0)
    chosen.name, chosen.type = NEXT_IDS, ir.TensorType(ir.DataType.INT64)
    chosen.shape = ir.Shape(list(logits.shape)[:-1]) if logits.shape is not None else None
    graph.extend(build.nodes)
    graph.outputs.append(chosen)
    return 1
