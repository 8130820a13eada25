"""`exaone_export.bench`: the public function, its arguments by name."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict, Unpack

from exaone_export.benchmark.report import Bench, Settings
from exaone_export.benchmark.rounds import measure
from model.progress import Progress
from runtime.execution import Execution


class BenchKeywords(TypedDict, total=False):
    """What `bench` measures; the defaults are `exaone_export.benchmark.report.Settings`'s, where each is explained."""

    prompt_tokens: int
    new_tokens: int
    depth: int | None
    image: tuple[int, int] | None
    batch: int
    repeat: int
    growth: bool


def bench(
    bundle: str | Path,
    *,
    compare: str | Path | None = None,
    ep: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    execution: Execution | None = None,
    **settings: Unpack[BenchKeywords],
) -> Bench:
    """Measure a bundle's speed and memory, in a process of its own, on random tokens.

    Args:
        bundle: folder of a bundle that generates.
        compare: a second bundle, measured in turns with the first; both are held in memory.
        ep: execution provider, as for `load`.
        threads: threads for one operator, and to measure the memory with; None leaves it to the runtime.
        progress: told of every step.
        execution: more about a provider that is not the CPU's.
        settings: prompt_tokens, new_tokens, depth, image (width, height), batch, repeat, growth.

    Raises:
        UsageError: a number makes no sense, the prompt exceeds the context, or the model does not read images.
        BundleError: a bundle is damaged.
        EnvironmentFault: the execution provider cannot be had here.
        ResourceError: a model, its cache or the image does not fit into memory.
    """
    other = None if compare is None else Path(compare)
    return measure(Path(bundle), other, Settings(**settings), ep, threads, progress, execution)
