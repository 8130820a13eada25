"""JSON that comes with a model: its configuration, its defaults, its tokenizer, and how it sees."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np
from PIL import Image

from model.config import ExaoneConfig, load_config, parse_config
from model.errors import BundleError
from model.jsonfile import read_json_object
from runtime.image import ImageProcessor
from runtime.options import GenerationOptions
from runtime.request import RequestBuilder
from runtime.tokenizer import Tokenizer
from tests.fuzz.checkpoints import named
from tests.fuzz.mutators import hostile, same, spoiled_json, strict_json
from tests.fuzz.target import Target

_HEADS = {"num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads", "num_hidden_layers": "num_layers"}


class Config(Target):
    """config.json of a text model and of one that sees."""

    name, codes = "config", frozenset({2, 3})
    long = 150_000

    def __init__(self, corpus: Path, scratch: Path) -> None:
        super().__init__(corpus, scratch)
        self._folder = scratch / "config"
        self._folder.mkdir(exist_ok=True)
        self._raw = [(corpus / kind / "config.json").read_bytes() for kind in ("text", "vision")]
        self._values = [json.loads(raw) for raw in self._raw]

    def mutant(self, random: Random) -> bytes:
        which = random.randrange(2)
        return spoiled_json(self._raw[which], self._values[which], random)

    def run(self, data: bytes) -> ExaoneConfig:
        (self._folder / "config.json").write_bytes(data)
        return load_config(self._folder)

    def judge(self, data: bytes, accepted: ExaoneConfig) -> str:
        """Every number that the file gives must come out as it stands there, and fit the others."""
        try:
            raw = strict_json(data)
        except ValueError as reason:
            return f"it is no sound JSON: {reason}"
        text, inner = accepted.text, raw if raw["model_type"] == "exaone4" else raw["text_config"]
        read = dataclasses.asdict(text) | {key: getattr(text, name) for key, name in _HEADS.items()}
        for key, value in read.items():
            stated = float(inner[key]) if isinstance(value, float) and type(inner.get(key)) is int else inner.get(key)
            if type(stated) in (int, float) and not same(stated, value):
                return f"{key} is {stated}, {value} is read"
        rope: dict[str, Any] = next((inner[key] for key in ("rope_scaling", "rope_parameters") if inner.get(key)), {})
        if float(rope.get("rope_theta") or inner.get("rope_theta")) != text.rope.theta:
            return "another rope_theta"
        listed = inner.get("layer_types")
        if listed is not None and tuple(listed[: text.num_layers]) != text.layer_types:
            return "other layer_types"
        sound = text.num_heads % text.num_kv_heads == 0 and len(text.layer_types) == text.num_layers
        tokens = [*accepted.eos_token_ids, accepted.image_token_id or 0, accepted.pad_token_id or 0]
        if not sound or not all(0 <= token < text.vocab_size for token in tokens):
            return "numbers that contradict each other"
        floats = (text.rms_norm_eps, text.rope.theta, text.rope.factor)
        return "" if all(math.isfinite(value) and value > 0 for value in floats) else "a number that is none"


class Generation(Target):
    """generation_config.json."""

    name, codes = "generation_config", frozenset({4})
    long = 60_000
    _good: Final[dict[str, Any]] = {
        "do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0, "repetition_penalty": 1.0,
        "presence_penalty": 1.5, "max_new_tokens": 64, "eos_token_id": [53, 1], "pad_token_id": 0, "x": {"y": []},
    }  # fmt: skip

    def mutant(self, random: Random) -> bytes:
        value = self._good | {random.choice(list(self._good)): hostile(random)} if random.random() < 0.5 else self._good
        return spoiled_json(json.dumps(value).encode(), value, random)

    def run(self, data: bytes) -> GenerationOptions:
        path = self.scratch / "generation_config.json"
        path.write_bytes(data)
        return GenerationOptions.from_generation_config(read_json_object(path, BundleError, "cannot open bundle"))

    def judge(self, data: bytes, accepted: GenerationOptions) -> str:
        raw = strict_json(data)
        for key in self._good:
            value = getattr(accepted, key, None)
            if isinstance(value, float) and not math.isfinite(value):
                return f"{key} is {value}"
            if hasattr(accepted, key) and raw.get(key) is not None and not same(raw[key], value):
                return f"{key} is {raw[key]!r}, {value!r} is read"
        return ""


class Preprocessor(Target):
    """preprocessor_config.json; an image is prepared with what is accepted."""

    name, codes = "preprocessor", frozenset({2, 4})
    long = 60_000

    def __init__(self, corpus: Path, scratch: Path) -> None:
        super().__init__(corpus, scratch)
        self._raw = (corpus / "vision" / "preprocessor_config.json").read_bytes()
        self._value = json.loads(self._raw)
        vision = parse_config(json.loads((corpus / "vision" / "config.json").read_bytes())).vision
        assert vision is not None
        self._vision = vision
        self._image = Image.new("RGB", (40, 30), "red")

    def mutant(self, random: Random) -> bytes:
        value = self._value
        if random.random() < 0.3:
            value = value | {"size": {"shortest_edge": hostile(random), "longest_edge": 100_000}}
        return spoiled_json(self._raw, value, random)

    def run(self, data: bytes) -> tuple[ImageProcessor, Any]:
        path = self.scratch / "preprocessor_config.json"
        path.write_bytes(data)
        processor = ImageProcessor.from_config(read_json_object(path, BundleError, "cannot open bundle"), self._vision)
        small = processor.bounded(None, 20_000)
        return processor, small.patches(small.scaled(self._image))

    def judge(self, data: bytes, accepted: tuple[ImageProcessor, Any]) -> str:
        processor, (pixels, grid) = accepted
        if not 0 < processor.min_pixels <= processor.max_pixels or not np.isfinite(processor.table).all():
            return f"bounds {processor.min_pixels}, {processor.max_pixels}, or values that are none"
        return "" if len(pixels) == int(np.prod(grid)) and np.isfinite(pixels).all() else "patches that are none"


class Words(Target):
    """tokenizer.json or tokenizer_config.json; a text is encoded and decoded with what is accepted."""

    name, codes = "tokenizer", frozenset({2, 3, 4})
    short, long = 60, 30_000
    _texts = ("가 word <|endofturn|> 😀\n\n  x", "<think>", "", "a" * 200)

    def __init__(self, corpus: Path, scratch: Path) -> None:
        super().__init__(corpus, scratch)
        self._folder = scratch / "tokenizer"
        self._folder.mkdir(exist_ok=True)
        self._raw = {
            name: (corpus / "text" / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")
        }
        self._values = {name: json.loads(raw) for name, raw in self._raw.items()}
        self._config = parse_config(json.loads((corpus / "text" / "config.json").read_bytes()))

    def mutant(self, random: Random) -> bytes:
        name = random.choice(list(self._raw))
        value = self._values[name]
        if name == "tokenizer_config.json" and random.random() < 0.4:
            flags = {"content": random.choice(("<|x|>", "<think>", "a")), "special": hostile(random)}
            value = value | {"added_tokens_decoder": {str(random.choice((3, 500, 513, "x"))): flags}}
        elif name == "tokenizer.json" and random.random() < 0.2:
            merges = [[random.choice("abc"), random.choice("abc")] for _ in range(3)]
            value = value | {"model": value["model"] | {"merges": merges}}
        return name.encode() + b"\n" + spoiled_json(self._raw[name], value, random)

    def run(self, data: bytes) -> tuple[Tokenizer, list[list[int]]]:
        name, raw = named(data)
        for other, good in self._raw.items():
            (self._folder / other).write_bytes(raw if other == name else good)
        tokenizer = RequestBuilder(self._folder, self._config).tokenizer
        found = [encode(text) for text in self._texts for encode in (tokenizer.encode, tokenizer.encode_plain)]
        for ids in found:
            tokenizer.decode(ids)
        return tokenizer, found

    def judge(self, data: bytes, accepted: tuple[Tokenizer, list[list[int]]]) -> str:
        tokenizer, found = accepted
        ids = [token for one in found for token in one]
        if not all(0 <= token < self._config.text.vocab_size for token in ids):
            return f"ids beyond the model's: {max(ids)}"
        plain = {token for one in found[1::2] for token in one}
        return "" if plain.isdisjoint(tokenizer.control_ids) else "text becomes control tokens"
