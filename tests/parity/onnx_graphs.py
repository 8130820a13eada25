"""Traced graphs with a module's weights bound in memory, run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn

from exporter.graphs import GraphSpec, graph_specs
from exporter.trace import trace_graph
from model.config import FULL, SLIDING, ExaoneConfig, MtpConfig, RopeConfig, TextConfig, VisionConfig

WINDOW = 8
LLAMA3 = RopeConfig(1e6, "llama3", 16.0, 1.0, 4.0, 128)


def text_config(**changes: object) -> TextConfig:
    """A hybrid decoder: three window layers, one global layer without rotation."""
    values: dict[str, object] = {
        "vocab_size": 160, "hidden_size": 48, "intermediate_size": 80, "num_layers": 4, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
        "tie_word_embeddings": False, "sliding_window": WINDOW, "layer_types": (SLIDING, SLIDING, SLIDING, FULL),
        "rope": LLAMA3,
    }  # fmt: skip
    return TextConfig(**(values | changes))  # type: ignore[arg-type]


def dense_config() -> ExaoneConfig:
    """As EXAONE 4.0 1.2B: no window, rotation everywhere, head tied to the embedding."""
    text = text_config(sliding_window=None, layer_types=(FULL,) * 2, num_layers=2, tie_word_embeddings=True)
    return ExaoneConfig("exaone4", text, None, None, 1, (2,), 0)


def hybrid_config() -> ExaoneConfig:
    """As EXAONE 4.0 32B."""
    return ExaoneConfig("exaone4", text_config(), None, None, 1, (2,), 0)


def vision_config(**changes: object) -> VisionConfig:
    values: dict[str, object] = {
        "depth": 3, "hidden_size": 64, "intermediate_size": 72, "num_heads": 4, "num_kv_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 32, "fullatt_block_indexes": (1,),
        "out_hidden_size": 48, "in_channels": 3, "rope_theta": 1e4,
    }  # fmt: skip
    return VisionConfig(**(values | changes))  # type: ignore[arg-type]


def multimodal_config() -> ExaoneConfig:
    """As EXAONE 4.5, with a draft head."""
    return ExaoneConfig(
        "exaone4_5", text_config(), vision_config(), MtpConfig(1, SLIDING), 1, (2,), 0,
        image_token_id=150, video_token_id=151, vision_start_token_id=152, vision_end_token_id=153,
    )  # fmt: skip


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, norm gains and biases included, so that no mistake hides behind a one or a zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        wide = parameter.dim() > 1
        scale = 1.0 if "embed_tokens" in name else parameter.shape[-1] ** -0.5 if wide else 0.3
        parameter.data = (noise * scale + (0 if wide or name.endswith("bias") else 1)).to(parameter.dtype)
    return module.eval().requires_grad_(False)


def find_spec(config: ExaoneConfig, name: str, draft: bool = False, window_cache: bool = True) -> GraphSpec:
    return next(spec for spec in graph_specs(config, draft, window_cache) if spec.name == name)


def bind(model: ir.Model, module: nn.Module) -> ir.Model:
    """Puts a module's weights into a traced model."""
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            tensor = tensors[name].detach()
            if value.metadata_props.get("transposed") == "1":
                tensor = tensor.T.contiguous()
            assert value.shape is not None
            assert tuple(tensor.shape) == tuple(value.shape), name
            assert value.dtype is not None
            value.const_value = ir.tensor(tensor.to(_TORCH_TYPES[value.dtype]).numpy(), name=name)
    return model


_TORCH_TYPES = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16}


class Session:
    """An ONNX Runtime session over a traced graph with a module's weights."""

    def __init__(
        self, spec: GraphSpec, module: nn.Module, dtype: torch.dtype = torch.float32, for_cpu: bool = False
    ) -> None:
        self.spec, self.module = spec, module
        self.model = bind(trace_graph(spec, dtype, for_cpu), module)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        proto = ir.to_proto(self.model).SerializeToString()
        self.session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        feeds = {name: value.numpy() for name, value in inputs.items()}
        names = [output.name for output in self.session.get_outputs()]
        values: list[np.ndarray] = self.session.run(names, feeds)
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


def session_of(config: ExaoneConfig, name: str, draft: bool = False, dtype: torch.dtype = torch.float32) -> Session:
    """A graph with random weights."""
    spec = find_spec(config, name, draft)
    return Session(spec, randomize(spec.build()), dtype)


def difference(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference; shapes must be equal."""
    assert one.shape == other.shape, (one.shape, other.shape)
    return float((one.float() - other.float()).abs().max()) if one.numel() else 0.0
