"""Measure a bundle's speed and memory: reading a prompt and an image, decoding, loading.

The bundle runs in a process of its own, as a user's program would run it, on random tokens. After a round that warms
up, every figure is the median over the rounds, with the least and the most. Between the runs the memory's own speed is
measured, and decoding is told as a fraction of what that allows. With --compare, two bundles take turns, and their
ratios are taken round by round.
"""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from exaone_export import flags
from exaone_export.output import print_json
from exaone_export.progress import choose_progress

if TYPE_CHECKING:
    from exaone_export.benchmark.report import Bench


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("bundle", metavar="BUNDLE", help="the bundle to measure")
    parser.add_argument("--compare", metavar="OTHER_BUNDLE", help="a second bundle, measured in turns with the first")
    group = parser.add_argument_group("what to measure")
    group.add_argument(
        "--prompt-tokens", metavar="N", type=_count(1), default=512, help="tokens to read (default: 512)"
    )
    group.add_argument("--new-tokens", metavar="N", type=_count(1), default=64, help="tokens to decode (default: 64)")
    group.add_argument(
        "--depth", metavar="N", type=_count(0), help="tokens in the context before those (default: the prompt's)"
    )
    group.add_argument("--image", metavar="WxH", type=_size, help="also an image of this size, before the prompt")
    group.add_argument("--batch", metavar="N", type=_count(1), default=1, help="prompts side by side (default: 1)")
    group.add_argument("--repeat", metavar="N", type=_count(1), default=5, help="rounds that count (default: 5)")
    flags.add_engine_flags(parser)
    parser.add_argument(
        "--plot", metavar="FILE", help="draw how time grows with length and image: .png, .svg or .pdf (plot extra)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")


def run(arguments: Namespace) -> int:
    """Measure, print the figures, and draw them."""
    if arguments.plot is not None:
        from exaone_export.benchmark.plot import check_plot

        check_plot(Path(arguments.plot))
    from exaone_export.benchmark.public import bench

    report = bench(
        arguments.bundle,
        compare=arguments.compare,
        ep=arguments.ep,
        threads=arguments.threads,
        execution=flags.execution_of(arguments),
        progress=choose_progress(wanted=not (arguments.quiet or arguments.json)),
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        depth=arguments.depth,
        image=arguments.image,
        batch=arguments.batch,
        repeat=arguments.repeat,
        growth=arguments.plot is not None,
    )
    if arguments.plot is not None:
        from exaone_export.benchmark.plot import draw

        draw(report, Path(arguments.plot))
    _print(report, arguments)
    return 0


def _print(report: Bench, arguments: Namespace) -> None:
    if arguments.json:
        print_json(report, arguments.stdout)
        return
    from exaone_export.benchmark.table import print_table

    print_table(report, arguments.stdout)


def _count(least: int) -> Callable[[str], int]:
    """A parser of whole numbers from `least` on."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or len(text) > 10 or int(text) < least:
            raise ArgumentTypeError(f"{text[:40]!r} is not a whole number from {least} on")
        return int(text)

    return parse


def _size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isascii() and side.isdecimal() and int(side[:10]) > 0 for side in sides):
        raise ArgumentTypeError(f"{text[:40]!r} is not a size like 1024x768")
    return int(sides[0][:10]), int(sides[1][:10])
