"""The process that runs one bundle: loads it, and times what it is asked to.

A process of its own, so that its peak memory is the bundle's and nothing else's, and so that loading can be measured
again and again. Frames on its standard input and output are those of `runtime.template_child`: a request is the name
of a method of `Subject` and its arguments, an answer what that returned, or the parts of an error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from exaone_export import failures
from model.progress import NullProgress
from runtime.engine import Engine
from runtime.execution import Execution
from runtime.generation import Generator
from runtime.options import GenerationOptions
from runtime.providers import choose_threads, onnxruntime
from runtime.template_child import encode_frame, read_frame, write_frame

# Tokens before a round: while another bundle ran, the system may have put this one's memory away.
_WAKING: Final = 8
CALLS: Final = ("load", "run", "read", "encode", "peak")


class Subject:
    """One bundle, driven as a user's program drives it, but for end-of-turn tokens: random ids must not end early."""

    def __init__(self) -> None:
        onnxruntime()  # importing it is no part of loading a bundle
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """The bundle, once it is loaded."""
        if self._engine is None:
            raise RuntimeError("nothing is loaded")
        return self._engine

    def load(
        self, folder: str, ep: str, threads: int | None, images: bool, execution: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Opens the bundle's graphs, the vision encoder among them only for `images`; see `runtime.execution`."""
        start = time.perf_counter()
        self._engine = Engine.load(folder, ep, threads, execution=Execution(**(execution or {})))
        self.engine.graphs.open(images=images)
        seconds = time.perf_counter() - start
        return {"load_s": seconds, "ep": self.engine.ep, "threads": choose_threads(threads)}

    def run(
        self, prompt_tokens: int, new_tokens: int, depth: int | None, batch: int, image: list[int] | None, seed: int
    ) -> dict[str, Any]:
        """One round, see `exaone_export.benchmark.report.Settings`."""
        random = np.random.default_rng(seed)
        pixels = [_noise(random, *image)] if image is not None else []
        self._generate([self._ids(random, _WAKING)], [()], 1)
        start = time.perf_counter()
        rows = [self.engine.requests.scaled(pixels) for _ in range(batch)]
        scaling = time.perf_counter() - start
        counts = [self.engine.requests.image_processor.token_count(one) for one in rows[0]]
        media = [self.engine.graphs.config.image_token_id or 0] * sum(counts)
        prompts = [media + self._ids(random, prompt_tokens) for _ in range(batch)]
        length = len(prompts[0])
        together = depth is None or depth == length
        first = self._generate(prompts, rows, new_tokens if together else 0)
        second = first
        if not together:
            others = [self._ids(random, max(1, depth or 0)) for _ in range(batch)]
            second = self._generate(others, [()] * batch, new_tokens)
        vision = first.vision_s + scaling if media else 0.0
        return {
            "prefill_tokens_per_s": batch * length / first.prefill_s,
            "decode_tokens_per_s": batch * second.decode_tokens_per_s,
            "time_to_first_token_s": vision + first.prefill_s,
            "vision_s": vision,
            "prompt_tokens": length,
            "image_tokens": len(media),
        }

    def read(self, tokens: int, new_tokens: int, seed: int) -> dict[str, Any]:
        """Seconds to read one prompt of so many tokens, and of one token after it."""
        times = self._generate([self._ids(np.random.default_rng(seed), tokens)], [()], new_tokens)
        return {"prefill_s": times.prefill_s, "decode_s": 1 / times.decode_tokens_per_s}

    def encode(self, width: int, height: int, seed: int) -> dict[str, Any]:
        """Patches of one image, and seconds to scale and encode it."""
        pixels = _noise(np.random.default_rng(seed), width, height)
        start = time.perf_counter()
        scaled = self.engine.requests.scaled([pixels])
        processor = self.engine.requests.image_processor
        values, grid = processor.patches(scaled[0])
        self.engine.graphs.encode(values, grid, processor.token_count(scaled[0]))
        return {"vision_s": time.perf_counter() - start, "patches": len(values)}

    def peak(self) -> int:
        """Most memory that this process held so far, in bytes."""
        return peak_bytes()

    def _ids(self, random: np.random.Generator, count: int) -> list[int]:
        """Random tokens, none of them a placeholder."""
        media = self.engine.graphs.media_ids
        allowed = np.setdiff1d(np.arange(self.engine.graphs.config.text.vocab_size), sorted(media))
        return [int(token) for token in random.choice(allowed, count)]

    def _generate(self, prompts: list[list[int]], images: list[Any], new_tokens: int) -> Any:
        """Timings of the first row; the others run beside it. The prompt's own first token comes on top."""
        requests, options = self.engine.requests, GenerationOptions(max_new_tokens=new_tokens + 1, do_sample=False)
        rows = [requests.of_ids(ids, own, new_tokens + 1) for ids, own in zip(prompts, images, strict=True)]
        generator = Generator(self.engine.graphs, requests, (), NullProgress())
        return generator.run(rows, options)[0].timings


def _noise(random: np.random.Generator, width: int, height: int) -> NDArray[np.uint8]:
    return random.integers(0, 256, (height, width, 3), np.uint8)


def peak_bytes() -> int:
    """Most memory that this process held so far.

    VmHWM where the system has it, which starts anew with a program; else getrusage's maximum, which on Linux a child
    may inherit from its parent.
    """
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")  # with the program's name
        found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers requests until there are none left."""
    subject = Subject()
    while True:
        try:
            call = read_frame(requests)
        except EOFError:
            return
        name, arguments = call["call"], call["arguments"]
        try:
            answer = {"answer": getattr(subject, CALLS[CALLS.index(name)])(**arguments)}
        except Exception as failure:  # noqa: BLE001 - whatever it is, the parent tells the user
            sys.stderr.write(failures.debug_trace(failure))
            error = failures.explain(failure)
            answer = {"error": [type(error).__name__, error.what, error.where, error.why, error.remedy]}
        write_frame(answers, encode_frame(answer))


def main() -> None:
    """Runs the process; what libraries print goes to the standard error stream."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; this process ends with its input
    logging.getLogger("exaone_export").addHandler(logging.NullHandler())  # the parent has said it
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with contextlib.suppress(BrokenPipeError):
        serve(sys.stdin.buffer, answers)
