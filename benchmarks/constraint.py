"""What holding an answer to a form costs per token, at the vocabularies of EXAONE 4.0 and 4.5.

    python -m benchmarks.constraint [--tokens 102400 153600]

No EXAONE tokenizer is in this repository, so the vocabulary is made up: bytes, words of two to twelve letters with and
without a space before them, pairs of words (4.5's tokens span spaces), Hangul, digits, runs of spaces and pieces of
JSON. A text is drawn from random logits under each form; timed are the mask with the masked logits (`restrict`) and the
parser's step (`take`), without the sampler.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from runtime.constraint import Constraint, Constraints, Vocabulary
from runtime.options import GenerationOptions
from runtime.tokenizer import Tokenizer
from tests.tiny import SPECIAL, tokenizer_json

EOS = SPECIAL["<|endofturn|>"]
RECEIPT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "store": {"type": "string"},
        "date": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
        "items": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "price": {"type": "integer"}},
                "required": ["name", "price"],
            },
        },
        "total": {"type": "integer"},
    },
    "required": ["store", "date", "items", "total"],
}
FORMS: dict[str, dict[str, Any]] = {
    "schema of a receipt": {"json_schema": RECEIPT},
    "any JSON": {"json_schema": {"type": "object"}},
    "regex of words": {"regex": r"([a-z]{1,10} )*[0-9]+"},
    "choice of three": {"grammar": 'start: "yes" | "no" | "maybe"'},
}


def made_up_tokenizer(folder: Path, size: int) -> Tokenizer:
    """A byte-level tokenizer of `size` tokens that could be a language model's."""
    random, raw = np.random.default_rng(0), tokenizer_json()
    vocabulary: dict[str, int] = {t: i for t, i in raw["model"]["vocab"].items() if not t.startswith("<|unused")}
    visible = {byte: token for token, byte in vocabulary.items() if byte >= 100}
    pieces = [
        '"',
        '":',
        '": "',
        '",',
        '", "',
        '"},',
        '"}',
        "{",
        '{"',
        "}",
        "}]",
        "[{",
        "]",
        ",",
        ", ",
        ": ",
        "\n",
        "\n\n",
    ]
    pieces += [" " * n for n in range(1, 33)] + ["\n" + " " * n for n in range(1, 33)] + [str(n) for n in range(1000)]

    def words() -> str:
        if random.random() < 0.25:
            text = "".join(chr(random.integers(0xAC00, 0xD7A4)) for _ in range(random.integers(1, 4)))
        else:
            letters = np.array(list("etaoinshrdlcumwfgypbvkjxqz"))
            weights = np.arange(26, 0, -1) / 351
            text = "".join(random.choice(letters, random.integers(2, 13), p=weights))
        return (" " if random.random() < 0.6 else "") + text

    taken = set(vocabulary.values())
    free = iter(i for i in range(size) if i not in taken)
    while len(vocabulary) < size:
        text = pieces.pop() if pieces else words() + (words() if random.random() < 0.2 else "")
        token = "".join(visible[100 + byte] for byte in text.encode())
        if token not in vocabulary:
            vocabulary[token] = next(free)
    raw["model"]["vocab"] = vocabulary
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    return Tokenizer.load(folder)


def draw(row: Constraint, size: int, limit: int) -> tuple[list[float], list[float]]:
    """Seconds of every `restrict` and every `take` of one text."""
    random = np.random.default_rng(1)
    masks, steps = [], []
    while len(masks) < limit and not row.complete:
        logits = random.standard_normal(size, np.float32)
        logits[EOS] = -100.0
        start = time.perf_counter()
        allowed = row.restrict(logits)
        middle = time.perf_counter()
        row.take(int(allowed.argmax()))
        steps.append(time.perf_counter() - middle)
        masks.append(middle - start)
    return masks, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[102_400, 153_600])
    parser.add_argument("--length", type=int, default=400)
    arguments = parser.parse_args()
    for size in arguments.tokens:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = made_up_tokenizer(Path(folder), size)
        start = time.perf_counter()
        vocabulary = Vocabulary(tokenizer, size, {EOS})
        print(f"{size} tokens: vocabulary read once in {time.perf_counter() - start:.2f} s")
        constraints = Constraints(lambda vocabulary=vocabulary: vocabulary)  # type: ignore[misc]
        for name, form in FORMS.items():
            start = time.perf_counter()
            (row,) = constraints.rows(GenerationOptions(**form), [False])
            compiled = time.perf_counter() - start
            assert row is not None
            masks, steps = draw(row, size, arguments.length)
            told = [f"{1e3 * float(np.quantile(masks, q)):.2f}" for q in (0.5, 0.99, 1.0)]
            print(f"  {name}: compiled in {1e3 * compiled:.1f} ms; {len(masks)} tokens; mask median, p99, max "
                  f"{' / '.join(told)} ms; step median {1e3 * float(np.median(steps)):.3f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
