"""What of a graph runs where: options of a session, which layers a device has room for, and whether it was obeyed.

Layers are told apart by what the exporter wrote on every node, ``layer_ann``, which ONNX Runtime's
``session.layer_assignment_settings`` names (its documentation: docs/annotated_partitioning).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from model.bundle import DECODER, MTP, VISION_ENCODER, GraphInfo, Manifest
from model.errors import EnvironmentFault
from model.tasks import GENERATION
from runtime.providers import CPU, CUDA, short_name

# Work that grows with the model; what is not among them is bookkeeping, mostly of shapes, and cheap anywhere.
COMPUTES: Final = frozenset(
    {
        "Attention", "Conv", "FusedMatMul", "Gather", "GatherBlockQuantized", "Gelu", "Gemm", "GroupQueryAttention",
        "LayerNormalization", "MatMul", "MatMulInteger", "MatMulNBits", "MultiHeadAttention", "PackedAttention",
        "PackedMultiHeadAttention", "QuickGelu", "RMSNormalization", "RotaryEmbedding", "Sigmoid",
        "SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "Softmax",
    }
)  # fmt: skip
# Among those, what also serves the reading of a shape or a length.
_ALSO_SMALL: Final = frozenset({"Gather"})
_RECORDING: Final = "session.record_ep_graph_assignment_info"
_LAYERS: Final = "session.layer_assignment_settings"
_EXACT_SIZES: Final = "session.use_device_allocator_for_initializers"
_PACKED_PRODUCTS: Final = "ep.cuda.fpa_intb_gemm"
# Options that onnxruntime takes as entries of a session's configuration, not as a provider's, begin with this.
_ENTRY: Final = "ep."
_log = logging.getLogger("exaone_export.runtime")


@dataclass(frozen=True)
class Placement:
    """Where one session's nodes and memory go.

    Attributes:
        options: of the execution provider, and entries of the session's configuration, whose names begin with "ep.".
        host_layers: decoder layers that are left to the CPU on purpose.
        captures: whether runs are recorded and replayed (CUDA graph).
    """

    options: Mapping[str, str] = field(default_factory=dict)
    host_layers: tuple[int, ...] = ()
    captures: bool = False

    @property
    def provider_options(self) -> dict[str, str]:
        """Of the execution provider."""
        return {name: value for name, value in self.options.items() if not name.startswith(_ENTRY)}

    @property
    def device_id(self) -> str:
        """Of the GPU."""
        return self.provider_options.get("device_id", "0")

    def session_entries(self, provider: str) -> dict[str, str]:
        """Configuration of the session; none on the CPU."""
        if provider == CPU:
            return {}
        entries = {_RECORDING: "1"}
        if provider == CUDA:
            entries[_EXACT_SIZES] = "1"  # weights in an arena would take what its pieces round up to
            # Off by default: products of half precision and quantized weights without unpacking those.
            entries[_PACKED_PRODUCTS] = "1"
        if self.host_layers:
            # With "=" a name is meant whole; without, layers.1 would be layers.10 as well.
            entries[_LAYERS] = f"cpu({', '.join(f'=layers.{layer}' for layer in self.host_layers)})"
        return entries | {name: value for name, value in self.options.items() if name.startswith(_ENTRY)}


def check_kernels(manifest: Manifest, graph: GraphInfo, provider: str) -> None:
    """Refuses a graph for CUDA of which it is known that the CPU lacks its kernels.

    Raises:
        EnvironmentFault: says what to export instead.
    """
    if provider != CPU or manifest.target != "cuda":
        return
    layers = graph.name in (DECODER, MTP) and manifest.task in GENERATION and not manifest.offload
    if layers or graph.name == VISION_ENCODER or manifest.dtype == "bf16":
        why = "it was exported for cuda, and the cpu has no kernels for it"
        remedy = "Export with --target cpu; where a GPU should work, see exaone-export doctor --ep cuda"
        raise EnvironmentFault("cannot load graph", graph.file, why, remedy)


def check_nodes(session: Any, file: str, provider: str, placement: Placement) -> None:
    """Refuses a session that computes on the CPU what was meant for the device; bookkeeping there is only told.

    Raises:
        EnvironmentFault: names the operators.
    """
    if provider == CPU or not hasattr(session, "get_provider_graph_assignment_info"):
        return
    here, there = Counter[str](), 0
    for part in session.get_provider_graph_assignment_info():
        for node in part.get_nodes():
            if part.ep_name == CPU:
                here[node.op_type] += 1
            else:
                there += 1
    told = ", ".join(f"{count} {kind}" for kind, count in here.most_common(8))
    _log.info("%s: %d nodes on %s, %d on cpu%s", file, there, short_name(provider), here.total(), told and f" ({told})")
    misplaced = sorted(set(here) & (COMPUTES - _ALSO_SMALL))
    if not there:
        why = f"nothing of it runs on {short_name(provider)}"
    elif misplaced and not placement.host_layers:
        why = f"{short_name(provider)} has no kernel for {', '.join(misplaced[:4])}, which would run on the CPU"
    else:
        return
    remedy = f"Export with --target {'cuda' if provider == CUDA else 'cpu'}, or use --ep cpu"
    raise EnvironmentFault("cannot load graph", file, why, remedy)
