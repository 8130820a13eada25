"""How much memory a bundle will take while it runs, from sizes alone.

The constants are measured with onnxruntime 1.31 (benchmarks/RESULTS.md): on the CPU the sum is the process's largest
resident size, on CUDA it is device memory, estimated by the same sizes but not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exaone_export.forecast import Weights
from model.bundle import WINDOW_SLACK
from model.config import ExaoneConfig
from model.errors import ExaoneError
from model.jsonfile import read_json_object
from model.memory import CacheSize, cache_size
from model.rotary import stores_tables
from model.tasks import GENERATION, IMAGE_FEATURE_EXTRACTION
from runtime.decode import CHUNK
from runtime.device_forward import PIECE as DEVICE_PIECE
from runtime.memory import pass_bytes, vision_bytes
from runtime.request import PUBLISHED_BOUNDS

_FLOAT: Final = 4
# Interpreter, numpy and onnxruntime; on the device the driver's context, the kernels that were loaded, and the
# workspaces of CUDA's libraries.
_PROCESS: Final = {"cpu": 80_000_000, "cuda": 600_000_000}
# Tokens of a prompt that are read in one pass.
_PIECE: Final = {"cpu": CHUNK, "cuda": DEVICE_PIECE}
_CACHE_STEP: Final = 256  # tokens in which a device's cache grows
# The CPU's kernel for quantized weights keeps the codes in an order of its own, with the scales and a sum for each
# block; the file's scales stay mapped.
_SCALE_COPIES: Final = 3


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes while a bundle runs with one sequence.

    Attributes:
        process: whatever the model is.
        weights: of the opened graphs.
        kv: of the key/value cache.
        text: working memory of a pass over the prompt.
        image: working memory of encoding the largest image that fits the context, which comes before the prompt.
        loading: on top of the weights, while the last of them are read.
    """

    process: int
    weights: int
    kv: int
    text: int
    image: int
    loading: int

    @property
    def total(self) -> int:
        """The most at any one time."""
        return self.process + self.weights + max(self.kv + self.text, self.image, self.loading)


@dataclass(frozen=True)
class Machine:
    """Where and in which type a bundle runs.

    Attributes:
        target: "cpu" or "cuda".
        float_bytes: of activations, keys and values.
        window_cache: whether window layers keep their window only.
        int8_cache: whether keys and values are kept as integers of 8 bits.
    """

    target: str
    float_bytes: int
    window_cache: bool = True
    int8_cache: bool = False

    def cache(self, config: ExaoneConfig) -> CacheSize:
        """Of the model's key/value cache; nothing for a task without one."""
        if config.task not in GENERATION:
            return CacheSize(0)
        value_bytes = 1 if self.int8_cache else self.float_bytes
        return cache_size(config.text, value_bytes, self.window_cache, WINDOW_SLACK[self.target], self.int8_cache)

    def need(self, weights: Weights, config: ExaoneConfig, context: int, max_pixels: int) -> MemoryNeed:
        """What the bundle takes with a prompt and answer of `context` tokens together.

        Args:
            weights: of the bundle.
            config: of the model, and the task.
            context: tokens.
            max_pixels: of an image after scaling.
        """
        on_device = self.target == "cuda"
        stored = stores_tables(config.text)
        # Of stored tables the CPU maps what is used, a device holds all; computed ones lie in memory as a whole.
        positions = context if stored else config.text.max_position_embeddings
        rotary = weights.tables if stored and on_device else positions * config.text.head_dim * self.float_bytes
        held = weights.codes + weights.floats + weights.scales * (1 if on_device else _SCALE_COPIES)
        cache = self.cache(config)
        # A device's buffers are there as a whole, the pages of the CPU's when they are used.
        stepped = min(-(-context // _CACHE_STEP) * _CACHE_STEP, max(context, config.text.max_position_embeddings))
        tokens, inside = (stepped, cache.window_tokens) if on_device else (context, min(context, cache.window_tokens))
        kv = tokens * cache.per_token + inside * cache.window_per_token
        return MemoryNeed(
            process=_PROCESS[self.target],
            weights=held + rotary + (weights.looked_up if on_device else 0),
            kv=kv,
            text=self._text(config, context) + (self._unpacked(config) if on_device and weights.codes else 0),
            image=self._image(config, context, max_pixels),
            loading=0 if on_device else weights.largest,
        )

    def _text(self, config: ExaoneConfig, context: int) -> int:
        text = config.text
        if config.task == IMAGE_FEATURE_EXTRACTION:
            return 0
        if config.task not in GENERATION:
            return self._scaled(pass_bytes(text, 1, context))
        tokens = min(context, _PIECE[self.target])
        logits = 2 * _FLOAT * text.vocab_size
        # The kernel puts a window and the new tokens side by side; for half precision the CPU's keeps all scores.
        window = min(context, text.sliding_window or 0) + tokens
        staging = 2 * text.num_kv_heads * text.head_dim * self.float_bytes * window if self.window_cache else 0
        if self.int8_cache:  # a layer's earlier keys and values as floats, and once more with the new ones behind them
            staging = 4 * text.num_kv_heads * text.head_dim * self.float_bytes * (context + tokens)
        halves = self.target == "cpu" and self.float_bytes < _FLOAT
        scores = _FLOAT * text.num_heads * tokens * context if halves else 0
        return self._scaled(pass_bytes(text, 1, tokens)) + logits + staging + scores

    def _unpacked(self, config: ExaoneConfig) -> int:
        """A device multiplies many rows by floats: of a layer's quantized weights one at a time is unpacked."""
        text = config.text
        widest = max(text.intermediate_size, text.num_heads * text.head_dim)
        return text.hidden_size * widest * self.float_bytes if config.task != IMAGE_FEATURE_EXTRACTION else 0

    def _image(self, config: ExaoneConfig, context: int, max_pixels: int) -> int:
        vision = config.vision
        if vision is None:
            return 0
        unit = vision.spatial_merge_size**2
        patches = max_pixels // vision.patch_size**2
        if config.task != IMAGE_FEATURE_EXTRACTION:
            patches = min(patches, unit * context)
        features = _FLOAT * vision.out_hidden_size * (patches // unit)
        return self._scaled(vision_bytes(vision, patches)) + features

    def _scaled(self, size: int) -> int:
        """Of float32 values' bytes, those of the activations' type."""
        return size * self.float_bytes // _FLOAT


def largest_image(folder: Path) -> int:
    """Pixels that a folder's ``preprocessor_config.json`` scales images down to; as published where it does not say."""
    try:
        raw = read_json_object(folder / "preprocessor_config.json")
    except ExaoneError:  # missing or damaged, which running a bundle complains of
        raw = {}
    size = raw.get("size")
    size = size if isinstance(size, dict) else {}
    for value in (raw.get("max_pixels"), size.get("longest_edge"), size.get("max_pixels")):
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return PUBLISHED_BOUNDS["max_pixels"]
