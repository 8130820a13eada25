"""How well the demonstration checkpoint reads: exact lines and character errors on held-out rendered lines.

Greedy decoding, by the eager model with the weights as stored (bfloat16 values, float32 arithmetic) or by a bundle:

    python -m benchmarks.reading --count 2000
    python -m benchmarks.reading --count 2000 --bundle exaone-demo-int4

Every line's text is from the part of all lines that training never sees (`exaone_export.demo.texts.is_held_out`).
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from exaone_export import api
from exaone_export.demo import INSTRUCTION, checkpoint_folder
from exaone_export.demo.render import line_page, page_coverage, random_height, random_style, render_page
from exaone_export.demo.texts import KINDS, random_text
from exaone_export.verifying.accuracy import wilson
from model.exaone import Exaone
from model.load import load_exaone
from training.pixels import colored, resized, stacked, to_patches

IMAGE, END, LONGEST, BATCH = 67, 53, 40, 64
PROMPT = f"<|user|>\n<vision><|image_pad|></vision>\n{INSTRUCTION}<|endofturn|>\n<|assistant|>\n<think>\n\n</think>\n\n"
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": LONGEST}


@dataclass(frozen=True)
class Line:
    """A held-out line: image [H, W, 3] and what it shows."""

    kind: str
    text: str
    image: npt.NDArray[np.uint8]


def held_out_lines(count: int, seed: int, varied: bool = False) -> Iterator[Line]:
    """`count` lines, all kinds in turn, no text twice; `varied` adds noise, colours and resizing."""
    rng, seen, kinds = Random(seed), set[str](), list(KINDS)
    while len(seen) < count:
        kind = kinds[len(seen) % len(kinds)]
        text = random_text(rng, kind, held_out=True)
        style = random_style(rng, text, random_height(rng))
        # Of single words and times there are not enough different ones.
        if style is None or (text in seen and kind not in ("word", "time", "number")):
            continue
        seen.add(text if text not in seen else f"{text} again {len(seen)}")
        page = line_page(text, style)
        if varied:
            cover = resized(rng, page) if rng.random() < 0.3 else page_coverage(page)
            yield Line(kind, text, colored(rng, np.asarray(cover), page, varied=True))
        else:
            yield Line(kind, text, np.array(render_page(page)))


def read(model: Exaone, tokenizer: Tokenizer, images: npt.NDArray[np.uint8], prompt: str) -> list[str]:
    """Greedy answers for images [batch, H, W, 3] of one size whose sides are multiples of 28.

    Args:
        model: with an image encoder.
        tokenizer: its tokenizer.
        images: uint8.
        prompt: the rendered chat with one `<|image_pad|>`.
    """
    assert model.embedding is not None and model.vision_encoder is not None
    batch, rows, columns = images.shape[0], images.shape[1] // 14, images.shape[2] // 14
    patches = to_patches(images).unflatten(2, (3, 1, 196)).expand(-1, -1, -1, 2, -1).reshape(batch * rows * columns, -1)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    at = ids.index(IMAGE)
    ids = ids[:at] + [IMAGE] * (rows * columns // 4) + ids[at + 1 :]
    keep, past = torch.ones(1, dtype=torch.int64), model.decoder.empty_cache(batch)
    with torch.no_grad():
        features = model.vision_encoder(patches, torch.tensor([[1, rows, columns]] * batch))
        x, total = model.embedding(torch.tensor([ids] * batch), features), len(ids)
        answers = torch.zeros((batch, 0), dtype=torch.int64)
        for _ in range(LONGEST):
            logits, _, past = model.decoder(x, torch.ones((batch, total), dtype=torch.int64), past, keep)
            token = logits[:, -1].argmax(-1, keepdim=True)
            answers = torch.cat((answers, token), 1)
            if bool((answers == END).any(1).all()):
                break
            x, total = model.embedding(token, features[:0]), total + 1
    return [tokenizer.decode(cut(row), skip_special_tokens=False) for row in answers]


def cut(row: Tensor) -> list[int]:
    """An answer's ids before its end of turn."""
    ids: list[int] = row.tolist()
    return ids[: ids.index(END)] if END in ids else ids


def distance(a: str, b: str) -> int:
    """Edits from one string to the other (Levenshtein)."""
    previous = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        current = [i]
        for j, right in enumerate(b, start=1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (left != right)))
        previous = current
    return previous[-1]


def eager_answers(folder: Path, lines: list[Line]) -> list[str]:
    """What the eager model of a checkpoint folder reads, images of one size together."""
    model, tokenizer = load_exaone(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, line in enumerate(lines):
        groups[line.image.shape[:2]].append(number)
    answers = [""] * len(lines)
    for group in groups.values():
        for start in range(0, len(group), BATCH):
            part = group[start : start + BATCH]
            texts = read(model, tokenizer, stacked([lines[number].image for number in part]), PROMPT)
            for number, text in zip(part, texts, strict=True):
                answers[number] = text
    return answers


def bundle_answers(bundle: Path, lines: list[Line]) -> list[str]:
    """What an exported bundle reads, one image after the other, through the public API."""
    with api.load(bundle, threads=1) as engine:
        answers = []
        for line in lines:
            image = np.broadcast_to(line.image, (*line.image.shape[:2], 3))
            answers.append(engine.generate(INSTRUCTION, images=[np.ascontiguousarray(image)], **GREEDY).text)
    return answers


def score(lines: list[Line], answers: list[str]) -> dict[str, object]:
    """Exact lines with their interval, character errors, and the first wrong ones."""
    right, asked = defaultdict[str, int](int), defaultdict[str, int](int)
    for line, answer in zip(lines, answers, strict=True):
        for key in (line.kind, f"{line.image.shape[0]} pixels high"):
            asked[key] += 1
            right[key] += answer == line.text
    pairs = [(line.text, answer) for line, answer in zip(lines, answers, strict=True)]
    exact = sum(text == answer for text, answer in pairs)
    return {
        "lines": len(lines),
        "exact": exact / len(lines),
        "interval_95": wilson(exact, len(lines)),
        "character_error_rate": sum(distance(*pair) for pair in pairs) / sum(len(text) for text, _ in pairs),
        "kinds": {key: f"{right[key]}/{asked[key]}" for key in sorted(asked)},
        "wrong": [pair for pair in pairs if pair[0] != pair[1]][:40],
    }


def main() -> None:
    """Prints the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=checkpoint_folder(), help="a checkpoint, run eagerly")
    parser.add_argument("--bundle", type=Path, help="an exported bundle, run by ONNX Runtime, instead")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--varied", action="store_true", help="more noise and colours, and other sizes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = list(held_out_lines(options.count, options.seed, options.varied))
    if options.bundle is None:
        answers = eager_answers(options.folder, lines)
    else:
        answers = bundle_answers(options.bundle, lines)
    print(json.dumps(score(lines, answers), indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
