"""PyTorch's side of `cuda.py`: transformers on the same device, and what the device can do at most."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers

from benchmarks.cuda_worker import Answer, noise, random_ids, resident_peak
from model.config import load_config
from runtime.image import ImageProcessor

DTYPES: Final = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TIMES: Final = 10


class Torch:
    """transformers' model of a checkpoint, with SDPA attention.

    Args:
        model: folder of the checkpoint.
        device: "cuda" or "cpu".
        dtype: "fp32", "fp16" or "bf16".
        random: make the weights on the device instead of reading them; None makes no model at all.
    """

    def __init__(self, model: Path, device: str, dtype: str = "bf16", random: bool | None = False) -> None:
        self._folder, self._device, self._dtype = model, torch.device(device), DTYPES[dtype]
        self.about: Answer = {"torch": torch.__version__, "transformers": transformers.__version__}
        self._model: Any = None
        if device == "cuda":
            self.about["device"] = torch.cuda.get_device_name()
        if random is not None:
            self._model = self._made(random).eval()
            self._vocabulary = load_config(model).text.vocab_size
            # Random ids must not end early.
            self._model.generation_config.eos_token_id = None
            self._model.generation_config.pad_token_id = 0

    def _made(self, random: bool) -> Any:
        name = json.loads((self._folder / "config.json").read_text())["architectures"][0]
        kind = getattr(transformers, name, None)
        if kind is None:
            raise SystemExit(f"transformers {transformers.__version__} has no {name}")
        if not random:
            loaded = kind.from_pretrained(self._folder, dtype=self._dtype, attn_implementation="sdpa")
            return loaded.to(self._device)
        config = kind.config_class.from_pretrained(self._folder)
        with self._device:
            return kind._from_config(config, dtype=self._dtype, attn_implementation="sdpa")

    @torch.inference_mode()
    def run(self, tokens: int, new: int, seed: int = 0) -> Answer:
        """Seconds of `generate` up to the first token, and for `new` tokens after that."""
        ids = torch.tensor([random_ids(tokens, self._vocabulary, seed)], device=self._device)
        mask = torch.ones_like(ids)

        def generate(count: int) -> float:
            start = self._now()
            self._model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False
            )
            return self._now() - start

        first = generate(1)
        return {"prefill_s": first, "decode_s": generate(new + 1) - first}

    @torch.inference_mode()
    def encode(self, side: int) -> Answer:
        """Seconds to encode an image that was scaled and cut before, and its patches."""
        values, grid = self._patches(noise(side))
        start = self._now()
        self._model.model.get_image_features(values, grid)
        return {"seconds": self._now() - start, "patches": len(values)}

    @torch.inference_mode()
    def logits(self, tokens: int, last: int, file: str, seed: int = 0) -> Answer:
        """Writes the logits at the last positions of a prompt to a file, float32 [last, vocab]."""
        ids = torch.tensor([random_ids(tokens, self._vocabulary, seed)], device=self._device)
        found = self._model(input_ids=ids, use_cache=False, logits_to_keep=last).logits[0]
        np.save(file, found.float().cpu().numpy())
        return {"rows": len(found)}

    @torch.inference_mode()
    def greedy(self, rows: list[dict[str, Any]]) -> Answer:
        """For prompts and what another made of them: where the model's own choice differs first, and by how much."""
        found = []
        for row in rows:
            ids = [*row["prompt"], *row["ids"]]
            media: dict[str, Any] = {}
            if row.get("image"):
                from PIL import Image

                with Image.open(row["image"]) as image:
                    values, grid = self._patches(np.asarray(image.convert("RGB")))
                media = {"pixel_values": values, "image_grid_thw": grid}
            inputs = torch.tensor([ids], device=self._device)
            logits = self._model(input_ids=inputs, use_cache=False, **media).logits[0].float()
            place = len(row["prompt"]) - 1
            best = logits[place:-1].argmax(-1).tolist()
            differing = [at for at, (own, other) in enumerate(zip(best, row["ids"], strict=True)) if own != other]
            margin = 0.0
            if differing:
                at = differing[0]
                margin = float(logits[place + at, best[at]] - logits[place + at, row["ids"][at]])
            found.append({"equal": not differing, "first": differing[0] if differing else None, "margin": margin})
        return {"rows": found}

    def copy(self, size: int) -> Answer:
        """Bytes per second of copying on the device, those read and those written counted; the best of several."""
        source = torch.ones(size, dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        seconds = self._best(lambda: target.copy_(source))
        return {"bytes_per_s": 2 * size / seconds}

    def multiply(self, side: int) -> Answer:
        """Floating-point operations per second of a product of square matrices of random numbers."""
        dtype = torch.bfloat16
        left, right = (torch.randn(side, side, device=self._device).to(dtype) for _ in range(2))
        seconds = self._best(lambda: left @ right)
        return {"flops_per_s": 2 * side**3 / seconds}

    def peak(self) -> Answer:
        """Most memory this process held."""
        return {"bytes": resident_peak()}

    def _patches(self, pixels: Any) -> tuple[torch.Tensor, torch.Tensor]:
        from PIL import Image

        raw = json.loads((self._folder / "preprocessor_config.json").read_text())
        vision = load_config(self._folder).vision
        assert vision is not None
        values, grid = ImageProcessor.from_config(raw, vision)(Image.fromarray(pixels))
        return torch.from_numpy(values).to(self._device, self._dtype), torch.from_numpy(grid).to(self._device)

    def _best(self, work: Callable[[], object]) -> float:
        """Seconds of the fastest of several, each after the one before has ended."""
        times = []
        for _ in range(_TIMES):
            start = self._now()
            work()
            times.append(self._now() - start)
        return min(times)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
