"""The process that encodes random pictures with one encoder; started by `vision.py` and `mtmd.py`.

    python -m benchmarks.vision_worker KIND MODEL THREADS RESULT      # KIND: ours, mtmd

It loads the model, encodes a small picture, says so, and answers each line {"count", "side", "together"} on its
standard input by a line {"seconds", "grown", "most"}; the features are then in RESULT. Only the encoder is timed,
pictures have been cut and scaled before. `grown` is what the process takes at most beyond what it takes before the
picture, `most` the largest size it ever had, loading included, both in bytes. KIND "mtmd" runs with the Python of
llama.cpp's environment and imports nothing of the project.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pictures = NDArray[np.uint8]
Features = NDArray[np.float32]
Encode = Callable[[Pictures, bool], tuple[float, Features]]
SEED = 1
SMALL = 112  # pixels: one window
MMPROJ, TEXT = "mmproj.gguf", "text.gguf"


def pictures(count: int, side: int) -> Pictures:
    """Noise [count, side, side, 3], the same in every process."""
    return np.random.default_rng(SEED).integers(0, 256, (count, side, side, 3), np.uint8)


def ours(model: Path, threads: int) -> Encode:
    """A bundle's encoder; pictures go through it in one run, or one by one."""
    from PIL import Image

    from runtime.graphs import Graphs
    from runtime.request import RequestBuilder

    graphs = Graphs(model, threads=threads)
    processor = RequestBuilder(model, graphs.config).image_processor

    def encode(images: Pictures, together: bool) -> tuple[float, Features]:
        cut = [processor.patches(Image.fromarray(image)) for image in images]
        values, grids = np.concatenate([one for one, _ in cut]), np.concatenate([grid for _, grid in cut])
        cut.clear()
        parts = 1 if together else len(images)
        started = time.perf_counter()
        found = [
            graphs.encode(part, grid, len(part) // processor.merge_size**2)
            for part, grid in zip(np.split(values, parts), np.split(grids, parts), strict=True)
        ]
        return time.perf_counter() - started, np.concatenate(found)

    return encode


def mtmd(model: Path, threads: int) -> Encode:
    """llama.cpp's encoder through its C interface, one picture after the other."""
    cpp, mtmd_cpp = import_module("llama_cpp"), import_module("llama_cpp.mtmd_cpp")
    cpp.llama_backend_init()
    only_words = cpp.llama_model_default_params()
    text = cpp.llama_model_load_from_file(str(model / TEXT).encode(), only_words)
    if not text:
        raise SystemExit(f"llama.cpp cannot load {model / TEXT}")
    width = cpp.llama_model_n_embd(text)
    parameters = mtmd_cpp.mtmd_context_params_default()
    parameters.use_gpu, parameters.warmup, parameters.n_threads = False, False, threads
    context = mtmd_cpp.mtmd_init_from_file(str(model / MMPROJ).encode(), text, parameters)
    if not context:
        raise SystemExit(f"llama.cpp cannot load {model / MMPROJ}")

    def encode(images: Pictures, together: bool) -> tuple[float, Features]:
        seconds, found = 0.0, []
        for image in images:
            chunks, chunk = _mtmd_chunk(mtmd_cpp, context, image)
            tokens = mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk)
            started = time.perf_counter()
            code = mtmd_cpp.mtmd_encode_chunk(context, chunk)
            seconds += time.perf_counter() - started
            if code:
                raise SystemExit(f"mtmd_encode_chunk fails with {code}")
            values = np.ctypeslib.as_array(mtmd_cpp.mtmd_get_output_embd(context), (tokens, width))
            found.append(values.copy())
            mtmd_cpp.mtmd_input_chunks_free(chunks)
        return seconds, np.concatenate(found)

    return encode


def _mtmd_chunk(mtmd_cpp: Any, context: Any, image: Pictures) -> tuple[Any, Any]:
    """A prompt of one picture, in pieces, and the piece that is the picture, cut and scaled."""
    height, width, _ = image.shape
    data = np.ascontiguousarray(image).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    bitmap = mtmd_cpp.mtmd_bitmap_init(width, height, data)
    marker = mtmd_cpp.mtmd_default_marker()
    prompt = mtmd_cpp.mtmd_input_text(marker, len(marker), False, True)
    chunks = mtmd_cpp.mtmd_input_chunks_init()
    bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
    code = mtmd_cpp.mtmd_tokenize(context, chunks, ctypes.byref(prompt), bitmaps, 1)
    mtmd_cpp.mtmd_bitmap_free(bitmap)
    if code:
        raise SystemExit(f"mtmd_tokenize fails with {code}")
    for i in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
        chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, i)
        if mtmd_cpp.mtmd_input_chunk_get_type(chunk) == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE:
            return chunks, chunk
    raise SystemExit("the prompt has no picture")


def memory(key: str) -> int:
    """Bytes of this process, as the kernel counts them."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key + ":"))


def main() -> None:
    """Answers until the standard input ends."""
    kind, model, threads, result = sys.argv[1:]
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    encode = {"ours": ours, "mtmd": mtmd}[kind](Path(model), int(threads))
    encode(pictures(1, SMALL), True)  # so that what is only set up once is there before
    most = memory("VmHWM")
    print(json.dumps({"most": most}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        images = pictures(asked["count"], asked["side"])
        Path("/proc/self/clear_refs").write_text("5")  # forgets the largest size so far
        before = memory("VmRSS")
        seconds, features = encode(images, asked["together"])
        now = memory("VmHWM")
        most = max(most, now)
        np.save(result, features)
        print(json.dumps({"seconds": seconds, "grown": now - before, "most": most}), file=answers, flush=True)


if __name__ == "__main__":
    main()
