"""Time to the first token of a conversation's second turn, beside that of its first, which shows an image.

    python -m benchmarks.second_turn BUNDLE [--tokens 2000] [--image 1036x784] [--repeats 3] [--json]

Needs a bundle with a vision encoder and a tokenizer. The first turn shows an image and has as many tokens as asked for;
the answer is short; the second turn is a short question. A fresh conversation each time, over one engine, with another
image, so that nothing is left of the one before. The same second turn without a conversation kept, the whole history
read anew, is measured beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from runtime.conversation import Session
from runtime.engine import Chunk, Engine

WORD = "Seoul is the capital of Korea. "
QUESTION = "And what is beside it?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=2000, help="of the first turn, image included")
    parser.add_argument("--image", default="1036x784", help="width and height")
    parser.add_argument("--answer", type=int, default=16, help="tokens of each answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    width, height = map(int, arguments.image.split("x"))
    with Engine.load(arguments.bundle, threads=arguments.threads) as engine:
        engine.open()
        rounds = [
            measure(engine, picture(width, height, number), arguments.tokens, arguments.answer)
            for number in range(arguments.repeats)
        ]
    report = summary(rounds)
    if arguments.json:
        print(json.dumps({"rounds": rounds, "median": report}))
        return
    for name, value in report.items():
        print(f"{name:24} {value:.4g}")


def picture(width: int, height: int, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


def text_of(engine: Engine, image: Image.Image, tokens: int) -> str:
    """A text that makes a first turn of about so many tokens with the image."""
    bare = len(engine.prompt(WORD, [image]).token_ids)
    each = len(engine.prompt(WORD * 11, [image]).token_ids) - bare
    return WORD * (1 + max(0, round((tokens - bare) * 10 / each)))


def measure(engine: Engine, image: Image.Image, tokens: int, answer: int) -> dict[str, Any]:
    """One conversation of two turns: seconds to the first token of each, and what was read for it."""
    session = engine.session()
    settings: dict[str, Any] = {
        "preset": "none",
        "do_sample": False,
        "max_new_tokens": answer,
        "enable_thinking": False,
    }
    text = text_of(engine, image, tokens)
    first = first_token(session.stream(text, [image], **settings))
    found: dict[str, Any] = {"first_s": first} | cost(session, "first")
    history = [*session.messages, {"role": "user", "content": QUESTION}]
    found |= {"second_s": first_token(session.stream(QUESTION, **settings))} | cost(session, "second")
    found["anew_s"] = first_token(engine.stream(history, [image], **settings))
    return found | {"ratio": found["second_s"] / first, "ratio_to_anew": found["second_s"] / found["anew_s"]}


def first_token(stream: Iterator[Chunk]) -> float:
    """Seconds until a first token is there, as the result's own clock has them; the rest is read to its end."""
    started = time.perf_counter()
    result = None
    for chunk in stream:
        result = chunk.result or result
    if result is None:
        raise RuntimeError("there is no result")
    return time.perf_counter() - started - result.timings.decode_s


def cost(session: Session, name: str) -> dict[str, int]:
    if session.usage is None:
        raise RuntimeError("nothing was asked")
    return {
        f"{name}_prompt_tokens": session.usage.prompt_tokens,
        f"{name}_read_tokens": session.usage.read_tokens,
        f"{name}_encoded": session.usage.encoded_media,
    }


def summary(rounds: list[dict[str, Any]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


if __name__ == "__main__":
    main()
