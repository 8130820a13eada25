"""What is in a bundle, or what a checkpoint would become: graphs, sizes, bits, memory. Needs neither torch nor onnx."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from exaone_export.memory_need import MemoryNeed
from model.bundle import DECODER, MANIFEST
from model.config import ExaoneConfig
from model.errors import UsageError
from model.progress import Progress
from model.tasks import IMAGE_FEATURE_EXTRACTION

CONTEXTS = (4096, 32768)


@dataclass(frozen=True)
class GraphSummary:
    """One graph. `bytes` counts its own files, a data file shared with an earlier graph not again.

    Attributes:
        name, file, bytes: of the graph.
        inputs, outputs: names.
        ops: operator → number of nodes; empty for a checkpoint, which has no graphs yet.
    """

    name: str
    file: str
    bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ops: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Outlook:
    """A bundle for one target and recipe.

    Attributes:
        dtype: of activations, keys and values.
        bytes: of its weights.
        bits_per_weight: scales and zero points included.
        memory: tokens in context → what running it takes.
    """

    dtype: str
    bytes: int
    bits_per_weight: float
    memory: Mapping[int, MemoryNeed]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        model_type, task: as in the manifest.
        graphs: of the bundle; for a checkpoint those it would be exported as, in float32.
        bits_per_weight: stored bits of all weights over their number, scales and zero points included.
        quantized: scheme ("int4 g32 sym rtn", "float"; for a checkpoint its own types) → number of weights.
        parameters: number of weights.
        bytes: of all files; for a checkpoint of its weight files.
        kv_bytes_per_token: keys and values of one token in the layers that keep every token, as the runtime keeps
            them; for a checkpoint, in float32.
        kv_window_bytes: the most that the layers which keep a window take.
        kv_bytes: tokens in context → bytes of keys and values of both.
        memory_bytes: tokens in context → bytes of memory that running the bundle takes; for a checkpoint, running it
            unquantized on the CPU.
        outlooks: target → recipe → what the bundle takes; for a checkpoint all that it could become.
        predicted_bytes: recipe → weights of the bundle for the CPU that exporting the checkpoint would give; empty for
            a bundle.
        quantization: how the checkpoint is quantized already ("awq", ...), or a bundle's recipe; "none" if it is not.
        left_out: kind → names of the checkpoint's tensors that are no part of the model (`Checkpoint.left_out`).
    """

    model_type: str
    task: str
    graphs: tuple[GraphSummary, ...]
    bits_per_weight: float
    quantized: Mapping[str, int]
    parameters: int
    bytes: int
    kv_bytes_per_token: int
    kv_window_bytes: int
    kv_bytes: Mapping[int, int]
    memory_bytes: Mapping[int, int]
    outlooks: Mapping[str, Mapping[str, Outlook]]
    predicted_bytes: Mapping[str, int] = field(default_factory=dict)
    quantization: str = "none"
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def memory(self) -> dict[str, dict[str, dict[int, int]]]:
        """Target → recipe → tokens in context → bytes."""
        return {
            target: {
                recipe: {tokens: need.total for tokens, need in outlook.memory.items()}
                for recipe, outlook in recipes.items()
            }
            for target, recipes in self.outlooks.items()
        }


def inspect(
    source: str | Path, context: int | None = None, revision: str | None = None, progress: Progress | None = None
) -> Inspection:
    """Describes a bundle or a checkpoint; no weight is read.

    Args:
        source: a bundle's folder, a checkpoint's, or the id of a model on the hub; a manifest makes it a bundle.
        context: tokens to reckon memory for; None takes 4096, 32768 and the most the model allows.
        revision: branch, tag or commit of a hub model.
        progress: told of what is fetched from the hub.

    Raises:
        UsageError: no such folder or model, neither kind, or a context beyond the model's.
        BundleError: the bundle is damaged.
        CheckpointError: the checkpoint is damaged.
        EnvironmentFault: the hub cannot be reached.
    """
    folder = Path(source)
    what, named = "cannot inspect", "Name a bundle's or a checkpoint's folder, or a hub id like owner/name"
    if not folder.is_dir():
        from exporter.source import is_hub_id

        if not is_hub_id(str(source)):
            raise UsageError(what, str(source), "it is a file" if folder.exists() else "no such folder", named)
        from exaone_export.inspect_checkpoint import inspect_checkpoint
        from exporter.placeholders import peek_source

        with peek_source(str(source), revision, progress) as peeked:
            return inspect_checkpoint(peeked, context)
    if revision is not None:
        raise UsageError(what, "--revision", "the source is a local folder, which has no revisions", "Leave it out")
    if (folder / MANIFEST).exists() or (folder / f"{DECODER}.onnx").exists():
        from exaone_export.inspect_bundle import inspect_bundle

        return inspect_bundle(folder, context)
    if not (folder / "config.json").exists():
        raise UsageError(what, str(source), f"neither {MANIFEST} nor config.json is in it", named)
    from exaone_export.inspect_checkpoint import inspect_checkpoint  # needs safetensors, which running bundles does not

    return inspect_checkpoint(folder, context)


def chosen_contexts(config: ExaoneConfig, asked: int | None) -> list[int]:
    """The numbers of tokens to reckon memory for.

    Raises:
        UsageError: more than the model takes.
    """
    most = config.text.max_position_embeddings
    if asked is not None and not 1 <= asked <= most:
        raise UsageError("cannot inspect", "--context", f"{asked} is not between 1 and the model's {most} tokens")
    if config.task == IMAGE_FEATURE_EXTRACTION:
        return [1]
    return [asked] if asked is not None else [*(n for n in CONTEXTS if n < most), most]
