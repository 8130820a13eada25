"""The process that runs one engine on one model; started by `peers.py` with the Python of the engine's environment.

    python peers_worker.py KIND MODEL THREADS       # KIND: ours, llama, genai, openvino

It loads the model, says how long that took, and answers each line {"ids": [...], "new": N} on its standard input by a
line {"prefill_s", "decode_s", "peak_bytes"}: from the ids to the first token, and from there to N tokens more, all of
them greedy and none of them an end. It imports nothing of the project but for KIND "ours".
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

Times = tuple[float, float]
Run = Callable[[list[int], int], Times]
CHUNK = 512  # tokens of a prompt that llama.cpp and our runtime read at a time


def ours(model: Path, threads: int) -> tuple[Run, str]:
    """Our own runtime, as `exaone_export.load` opens it; only end-of-turn tokens are ignored."""
    from model.progress import NullProgress
    from runtime.engine import Engine
    from runtime.generation import Generator
    from runtime.options import GenerationOptions

    engine = Engine.load(model, "cpu", threads)
    engine.open()
    generator = Generator(engine.graphs, engine.requests, (), NullProgress())

    def run(ids: list[int], new: int) -> Times:
        options = GenerationOptions(max_new_tokens=new + 1, do_sample=False)
        result = generator.run([engine.requests.of_ids(ids, (), new + 1)], options)[0]
        return result.timings.prefill_s, result.timings.decode_s

    return run, f"onnxruntime {version('onnxruntime')}"


def llama(model: Path, threads: int) -> tuple[Run, str]:
    """llama.cpp through its C interface; a context of the run's size, as its own benchmark makes it."""
    import llama_cpp as cpp

    silent = cpp.llama_log_callback(lambda level, text, data: None)
    cpp.llama_log_set(silent, ctypes.c_void_p(0))
    cpp.llama_backend_init()
    handle = cpp.llama_model_load_from_file(str(model).encode(), cpp.llama_model_default_params())
    if not handle:
        raise SystemExit(f"llama.cpp cannot load {model.name}")

    def run(ids: list[int], new: int) -> Times:
        parameters = cpp.llama_context_default_params()
        parameters.n_ctx = -(-(len(ids) + new + 1) // 256) * 256
        parameters.n_batch = parameters.n_ubatch = CHUNK
        parameters.n_threads = parameters.n_threads_batch = threads
        context = cpp.llama_init_from_model(handle, parameters)
        sampler = cpp.llama_sampler_init_greedy()
        try:
            start = time.perf_counter()
            for at in range(0, len(ids), CHUNK):
                _llama_pass(cpp, context, ids[at : at + CHUNK])
            token = cpp.llama_sampler_sample(sampler, context, -1)
            first = time.perf_counter()
            for _ in range(new):
                _llama_pass(cpp, context, [token])
                token = cpp.llama_sampler_sample(sampler, context, -1)
            return first - start, time.perf_counter() - first
        finally:
            cpp.llama_sampler_free(sampler)
            cpp.llama_free(context)

    run.__dict__["held"] = silent  # the library calls it as long as it lives
    return run, f"llama-cpp-python {version('llama-cpp-python')}"


def _llama_pass(cpp: Any, context: Any, ids: list[int]) -> None:
    tokens = (cpp.llama_token * len(ids))(*ids)  # the batch points to it
    code = cpp.llama_decode(context, cpp.llama_batch_get_one(tokens, len(ids)))
    if code:
        raise SystemExit(f"llama_decode fails with {code}")


def genai(model: Path, threads: int) -> tuple[Run, str]:
    """onnxruntime-genai; the cache is as large as the run needs."""
    import numpy as np
    import onnxruntime_genai as og

    config = og.Config(str(model))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    handle = og.Model(config)

    def run(ids: list[int], new: int) -> Times:
        parameters = og.GeneratorParams(handle)
        length = len(ids) + new + 1
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(handle, parameters)
        tokens = np.array(ids, np.int32)
        start = time.perf_counter()
        generator.append_tokens(tokens)
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new):
            generator.generate_next_token()
        end = time.perf_counter()
        if generator.token_count() != length:
            raise SystemExit(f"onnxruntime-genai gave {generator.token_count()} tokens, {length} were asked for")
        return first - start, end - first

    return run, f"onnxruntime-genai {version('onnxruntime-genai')}, onnxruntime {version('onnxruntime')}"


def openvino(model: Path, threads: int) -> tuple[Run, str]:
    """OpenVINO GenAI's pipeline with its defaults, told by its own clock."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    pipeline = genai.LLMPipeline(str(model), "CPU", INFERENCE_NUM_THREADS=threads)

    def run(ids: list[int], new: int) -> Times:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new + 1
        config.ignore_eos, config.do_sample = True, False
        tokens = np.array([ids], np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(tokens), ov.Tensor(np.ones_like(tokens)))
        metrics = pipeline.generate(inputs, config).perf_metrics
        times = metrics.raw_metrics.m_new_token_times  # milliseconds
        if len(times) != new + 1:
            raise SystemExit(f"OpenVINO gave {len(times)} tokens, {new + 1} were asked for")
        return metrics.get_ttft().mean / 1000, (times[-1] - times[0]) / 1000

    return run, f"openvino-genai {version('openvino-genai')}"


ENGINES = {"ours": ours, "llama": llama, "genai": genai, "openvino": openvino}
MODULES = {
    "ours": ("onnxruntime", "runtime.engine"),
    "llama": ("llama_cpp",),
    "genai": ("onnxruntime_genai",),
    "openvino": ("openvino_genai",),
}


def peak_bytes() -> int:
    """Most memory that this process held so far, mapped files included."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def main() -> None:
    kind, model, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    if kind == "ours":
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    for module in MODULES[kind]:  # which is no part of loading a model
        import_module(module)
    start = time.perf_counter()
    run, name = ENGINES[kind](model, threads)
    load_s = time.perf_counter() - start
    print(json.dumps({"load_s": load_s, "version": name, "peak_bytes": peak_bytes()}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        prefill_s, decode_s = run(request["ids"], request["new"])
        print(json.dumps({"prefill_s": prefill_s, "decode_s": decode_s, "peak_bytes": peak_bytes()}), file=answers)


if __name__ == "__main__":
    main()
