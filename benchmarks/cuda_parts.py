"""The parts of `cuda.py`: each measures one thing, and gives rows of a table and what they are held to."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

import exaone_export as ee
from benchmarks.cuda_bench import Bench, Goal, Result, Row, cosines, in_turns, read_per_token, roofs, vision_flops
from benchmarks.cuda_memory import DeviceMemory
from benchmarks.worker import Process
from exaone_export.demo import checkpoint_folder
from model.config import load_config

COSINE: Final = 0.9999
DECODE: Final = {"33b": 0.70, "1.2b": 0.50}  # of the roof
GRAPHS: Final = 1.2
IMAGE: Final = 0.40  # of the rate of products
OVER_TORCH: Final = 3.0
MEMORY: Final = 0.10
_IMAGES, _LAST = 8, 64
_IDS: Final = 48


def models(bench: Bench) -> Result:
    """Makes every bundle, so that the other parts only measure."""
    made = [bench.models.bundle(shape, quantized=True) for shape in bench.shapes]
    return Result([{"bundle": path.name, "GB": _bytes(path) / 1e9} for path in made])


def parity(bench: Bench) -> Result:
    """Greedy ids of the demonstration checkpoint against PyTorch's own choices, in each half type."""
    result = Result()
    for dtype in ("fp16", "bf16") if bench.device == "cuda" else (bench.models.half,):
        bundle = bench.models.demonstration(dtype)
        with bench.ours(bundle, images=True) as ours:
            images, new = (2, 16) if bench.models.tiny else (_IMAGES, _IDS)
            rows = ours.ask({"call": "greedy", "new": new, "count": images})["rows"]
        with bench.torch(checkpoint_folder(), dtype) as theirs:
            found = theirs.ask({"call": "greedy", "rows": rows})["rows"]
        equal = sum(row["equal"] for row in found)
        worst = max(row["margin"] for row in found)
        ids = sum(len(row["ids"]) for row in rows)
        result.rows.append({"dtype": dtype, "images": len(found), "ids": ids, "equal": equal, "largest margin": worst})
        result.goals.append(bench.goal(f"greedy ids as PyTorch's, {dtype}", equal / len(found), 1.0))
    return result


def shapes(bench: Bench) -> Result:
    """Logits of float bundles at the true shapes against PyTorch in float32 and in the same type."""
    result = Result()
    for shape in bench.shapes:
        tokens = 100 if bench.models.tiny else (512 if shape == "1.2b" else 4096 + 256)  # past the window
        for dtype in ("fp16", "bf16") if bench.device == "cuda" else (bench.models.half,):
            bundle = bench.models.bundle(shape, quantized=False, dtype=dtype)
            own = _logits(bench.ours(bundle), bench, f"{shape}-{dtype}-ours", tokens)
            checkpoint = bench.models.checkpoint(shape, real=True)
            exact = _logits(bench.torch(checkpoint, "fp32"), bench, f"{shape}-fp32", tokens)
            same = _logits(bench.torch(checkpoint, dtype), bench, f"{shape}-{dtype}", tokens)
            least = float(cosines(own, exact).min())
            result.rows.append({
                "shape": shape, "dtype": dtype, "tokens": tokens, "least cosine with fp32": least,
                "of PyTorch in this type": float(cosines(same, exact).min()),
                "same first choice": float((own.argmax(-1) == exact.argmax(-1)).mean()),
            })  # fmt: skip
            result.goals.append(bench.goal(f"cosine of logits, {shape} {dtype}", least, COSINE))
    return result


def speed(bench: Bench) -> Result:
    """Decoding and reading prompts, with CUDA graphs and without, in turns; against the device's own speed."""
    result = Result()
    roof = roofs(bench)
    for shape in bench.shapes:
        bundle = bench.models.bundle(shape, quantized=True)
        with contextlib.ExitStack() as stack:
            runners = _opened(bench, stack, bundle, result)
            for tokens in bench.prompts:
                times = in_turns(bench, {k: _runner(process, tokens, bench.new) for k, process in runners.items()})
                floor, with_cache = (size / roof["copy"] for size in read_per_token(bundle, tokens))
                for kind, runs in times.items():
                    step = statistics.median(run["decode_s"] for run in runs) / bench.new
                    prefill = statistics.median(run["prefill_s"] for run in runs)
                    result.rows.append({
                        "shape": shape, "prompt": tokens, "graph": kind, "prefill, tokens/s": tokens / prefill,
                        "decode, tokens/s": 1 / step, "of the roof": floor / step,
                        "with keys and values": with_cache / step,
                    })  # fmt: skip
                _judge_speed(bench, result, shape, tokens, times, floor)
    result.rows.append({"shape": "device", "copy, GB/s": roof["copy"] / 1e9, "bf16, TFLOP/s": roof["multiply"] / 1e12})
    return result


def image(bench: Bench) -> Result:
    """The vision encoder on one image, against the rate of bf16 products, and against transformers, in turns."""
    result = Result()
    if "33b" not in bench.shapes:
        return result
    bundle, rate = bench.models.bundle("33b", quantized=True), roofs(bench)["multiply"]
    reference = bench.models.checkpoint("33b", real=True)
    vision = load_config(bundle).vision
    assert vision is not None
    question = {"call": "encode", "side": bench.models.side}
    with bench.ours(bundle, images=True) as ours, bench.torch(reference, _plain(bench)) as theirs:
        times = in_turns(bench, {"ours": lambda: ours.ask(question), "PyTorch": lambda: theirs.ask(question)})
    for name, runs in times.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        share = vision_flops(vision, runs[0]["patches"]) / seconds / rate
        result.rows.append({"encoder": name, "patches": runs[0]["patches"], "ms": 1e3 * seconds, "of bf16 rate": share})
        if name == "ours":
            result.goals.append(bench.goal("image encoding, of the bf16 rate", share, IMAGE))
    return result


def torch(bench: Bench) -> Result:
    """Side by side with transformers' generate (bf16, SDPA), in turns on the same device."""
    result = Result()
    for shape in bench.shapes:
        bundle, source = bench.models.bundle(shape, quantized=True), bench.models.checkpoint(shape)
        with bench.ours(bundle) as ours, bench.torch(source, _plain(bench), random=True) as theirs:
            for tokens in bench.prompts:
                runs = {"ours": _runner(ours, tokens, bench.new), "PyTorch": _runner(theirs, tokens, bench.new)}
                times = in_turns(bench, runs)
                ratio = {
                    what: statistics.median(
                        b[what] / a[what] for a, b in zip(times["ours"], times["PyTorch"], strict=True)
                    )
                    for what in ("prefill_s", "decode_s")
                }
                row: Row = {"shape": shape, "prompt": tokens}
                for name, found in times.items():
                    row[f"{name} prefill, s"] = statistics.median(run["prefill_s"] for run in found)
                    row[f"{name} ms/token"] = 1e3 * statistics.median(run["decode_s"] for run in found) / bench.new
                row |= {"prefill ratio": ratio["prefill_s"], "decode ratio": ratio["decode_s"]}
                result.rows.append(row)
                where = f"{shape} after {tokens}"
                result.goals.append(bench.goal(f"decoding over PyTorch, {where}", ratio["decode_s"], OVER_TORCH))
                result.goals.append(bench.goal(f"prefill over PyTorch, {where}", ratio["prefill_s"], 1.0))
    return result


def memory(bench: Bench) -> Result:
    """The most memory in use, against what `inspect` plans for it."""
    result = Result()
    for shape in bench.shapes:
        bundle = bench.models.bundle(shape, quantized=True)
        sees = load_config(bundle).vision is not None
        for tokens in bench.prompts:
            report = ee.inspect(bundle, context=tokens + bench.new + 1)
            need = next(iter(next(iter(report.outlooks[bench.device].values())).memory.values()))
            with DeviceMemory(bench.device) as watched, bench.ours(bundle, images=sees) as ours:
                if sees:
                    ours.ask({"call": "encode", "side": bench.models.side})
                ours.ask({"call": "run", "tokens": tokens, "new": bench.new})
                most = watched.peak or ours.ask({"call": "peak"})["bytes"]
            error = need.total / most - 1
            parts = {name: round(getattr(need, name) / 1e6) for name in ("process", "weights", "kv", "text", "image")}
            result.rows.append({
                "shape": shape, "prompt": tokens, "planned, MB": need.total / 1e6, "in use, MB": most / 1e6,
                "error, %": 100 * error, **parts,
            })  # fmt: skip
            met = abs(error) <= MEMORY if bench.device == "cuda" else None
            result.goals.append(Goal(f"memory planned, {shape} {tokens}", error, f"within {MEMORY:.0%}", met))
    return result


PARTS: Final[dict[str, Callable[[Bench], Result]]] = {
    "models": models, "parity": parity, "shapes": shapes, "speed": speed, "image": image, "torch": torch,
    "memory": memory,
}  # fmt: skip


def _opened(bench: Bench, stack: contextlib.ExitStack, bundle: Path, result: Result) -> dict[str, Process]:
    """A process for each way of decoding; one that cannot be had is told, and the other still measured."""
    found = {}
    for kind in ("on", "off") if bench.device == "cuda" else ("none",):
        try:
            found[kind] = stack.enter_context(bench.ours(bundle, graph=None if kind == "none" else kind))
        except SystemExit as reason:
            result.rows.append({"bundle": bundle.name, "graph": kind, "failed": str(reason)})
            result.goals.append(Goal(f"{bundle.name} opens with CUDA graphs {kind}", 0.0, "opens", False))
    if not found:
        raise SystemExit(f"{bundle.name} does not open")
    return found


def _judge_speed(
    bench: Bench, result: Result, shape: str, tokens: int, times: dict[str, list[Row]], floor: float
) -> None:
    best = next(iter(times))
    step = statistics.median(run["decode_s"] for run in times[best]) / bench.new
    result.goals.append(bench.goal(f"decoding of the roof, {shape} after {tokens}", floor / step, DECODE[shape]))
    if "off" in times and shape == "1.2b":
        pairs = zip(times["on"], times["off"], strict=True)
        ratio = statistics.median(off["decode_s"] / on["decode_s"] for on, off in pairs)
        result.goals.append(bench.goal(f"CUDA graph over none, {shape} after {tokens}", ratio, GRAPHS))


def _runner(process: Process, tokens: int, new: int) -> Callable[[], Row]:
    return lambda: process.ask({"call": "run", "tokens": tokens, "new": new})


def _logits(process: Process, bench: Bench, name: str, tokens: int) -> Any:
    file = bench.models.work / f"logits-{name}.npy"
    with process:
        process.ask({"call": "logits", "tokens": tokens, "last": _LAST, "file": str(file)})
    return np.load(file)


def _plain(bench: Bench) -> str:
    """PyTorch's type for timing: the CPU has no fast bfloat16 to compare with."""
    return "bf16" if bench.device == "cuda" else "fp32"


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
