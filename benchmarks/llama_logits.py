"""The process that runs llama.cpp's text model over embeddings; started by `quality_llama.py` with its environment.

    python llama_logits.py MODEL.gguf ASKED.npz RESULT.npy THREADS

ASKED has `embeddings` [tokens, hidden], float32, of all sequences one after the other, `lengths` and `kept` of each;
RESULT gets the logits of the last `kept` positions of each sequence, [sum of kept, vocabulary]. Keys and values are
kept in float32, so that nothing but the file's weights and the kernels' rounding of activations differs from float.
Beside RESULT comes a .json: name of every tensor of the file → [elements, bytes].
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
GGML_TYPE_F32 = 0


def open_model(cpp: Any, path: Path, longest: int, threads: int) -> tuple[Any, int]:
    """A context for sequences of at most so many tokens, and the size of the vocabulary."""
    cpp.llama_backend_init()
    model = cpp.llama_model_load_from_file(str(path).encode(), cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path.name}")
    parameters = cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = -(-longest // 256) * 256
    parameters.n_threads = parameters.n_threads_batch = threads
    parameters.type_k = parameters.type_v = GGML_TYPE_F32
    context = cpp.llama_init_from_model(model, parameters)
    if not context:
        raise SystemExit(f"llama.cpp makes no context for {path.name}")
    return context, int(cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(model)))


def logits_of(cpp: Any, context: Any, vocabulary: int, given: Floats, kept: int) -> Floats:
    """Logits of the last `kept` positions of one sequence of embeddings [tokens, hidden]."""
    cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
    tokens, hidden = given.shape
    batch = cpp.llama_batch_init(tokens, hidden, 1)
    try:
        ctypes.memmove(batch.embd, np.ascontiguousarray(given, np.float32).ctypes.data, given.size * 4)
        batch.n_tokens = tokens
        for at in range(tokens):
            batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0] = at, 1, 0
            batch.logits[at] = at >= tokens - kept
        if code := cpp.llama_decode(context, batch):
            raise SystemExit(f"llama_decode fails with {code}")
        rows = [np.ctypeslib.as_array(cpp.llama_get_logits_ith(context, at), (vocabulary,)).copy()
                for at in range(tokens - kept, tokens)]  # fmt: skip
    finally:
        cpp.llama_batch_free(batch)
    return np.stack(rows)


def main() -> None:
    import gguf
    import llama_cpp as cpp

    silent = cpp.llama_log_callback(lambda level, text, data: None)
    cpp.llama_log_set(silent, ctypes.c_void_p(0))
    path, threads = Path(sys.argv[1]), int(sys.argv[4])
    with np.load(sys.argv[2]) as asked:
        embeddings, lengths, kept = (asked[name] for name in ("embeddings", "lengths", "kept"))
    context, vocabulary = open_model(cpp, path, int(lengths.max()), threads)
    found = np.lib.format.open_memmap(sys.argv[3], "w+", np.float32, (int(kept.sum()), vocabulary))
    start = at = 0
    for length, last in zip(lengths.tolist(), kept.tolist(), strict=True):
        found[at : at + last] = logits_of(cpp, context, vocabulary, embeddings[start : start + length], last)
        start, at = start + length, at + last
    found.flush()
    sizes = {tensor.name: [int(tensor.n_elements), int(tensor.n_bytes)] for tensor in gguf.GGUFReader(path).tensors}
    Path(sys.argv[3]).with_suffix(".json").write_text(json.dumps(sizes))


if __name__ == "__main__":
    main()
