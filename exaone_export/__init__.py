"""exaone-export: EXAONE checkpoints to ONNX, quantized to int8 or int4, and run with ONNX Runtime.

    import exaone_export as ee
    ee.export("LGAI-EXAONE/EXAONE-4.5-33B", "exaone45-int4", quantize="int4")
    with ee.load("exaone45-int4") as engine:
        print(engine.generate("Describe the picture.", images=["cat.jpg"]).text)

Names are looked up on first use, so that importing this package loads neither torch nor ONNX Runtime.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exaone_export.api import export, inspect, load, push, quantize, verify
    from exaone_export.benchmark.public import bench
    from exaone_export.benchmark.report import Bench
    from model.errors import (
        BundleError,
        CheckpointError,
        EnvironmentFault,
        ExaoneError,
        LockedError,
        NumericalError,
        ResourceError,
        UsageError,
    )
    from runtime.answers import Answer, Classification, LabelScore, TokenLabel
    from runtime.conversation import Session
    from runtime.encoder import Encoder
    from runtime.engine import Chunk, Engine, Result
    from runtime.logprobs import TokenLogprob
    from runtime.options import GenerationOptions
    from runtime.video_frames import Frames

# A default only: onnxruntime reports usage on some platforms unless this is set before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Bench",
    "BundleError",
    "CheckpointError",
    "Chunk",
    "Classification",
    "Encoder",
    "Engine",
    "EnvironmentFault",
    "ExaoneError",
    "Frames",
    "GenerationOptions",
    "LabelScore",
    "LockedError",
    "NumericalError",
    "ResourceError",
    "Result",
    "Session",
    "TokenLabel",
    "TokenLogprob",
    "UsageError",
    "__version__",
    "bench",
    "export",
    "inspect",
    "load",
    "push",
    "quantize",
    "verify",
]

_HOMES = {
    "exaone_export.api": ("export", "inspect", "load", "push", "quantize", "verify"),
    "exaone_export.benchmark.public": ("bench",),
    "exaone_export.benchmark.report": ("Bench",),
    "runtime.answers": ("Answer", "Classification", "LabelScore", "TokenLabel"),
    "runtime.conversation": ("Session",),
    "runtime.encoder": ("Encoder",),
    "runtime.engine": ("Chunk", "Engine", "Result"),
    "runtime.logprobs": ("TokenLogprob",),
    "runtime.options": ("GenerationOptions",),
    "runtime.video_frames": ("Frames",),
    "model.errors": tuple(name for name in __all__ if name.endswith(("Error", "Fault"))),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _refuse_shadowed_rooms() -> None:
    """Say so when a stray `model.py` (or exporter, quantize, runtime) would be imported instead of our own."""
    root = Path(__file__).resolve().parent.parent
    for room in ("model", "exporter", "quantize", "runtime"):
        spec = find_spec(room)
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found == root / room / "__init__.py":
            continue
        message = (
            f"cannot import exaone_export: {found}: it hides exaone-export's own '{room}' package. "
            "Rename it or run from another folder."
            if found is not None
            else f"cannot import exaone_export: {root / room}: its files are gone, as when a package that has a "
            f"'{room}' too is removed. Install again: pip install --force-reinstall --no-deps exaone-export"
        )
        if sys.argv[:1] == ["-m"]:  # python -m exaone_export: the command line is not there yet to say it
            print(f"error: {message}", file=sys.stderr)  # noqa: T201
            raise SystemExit(5)
        raise ImportError(message)


_refuse_shadowed_rooms()
