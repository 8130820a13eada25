"""The figures of `bench` for people: one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final, TextIO

from exaone_export.benchmark.report import Bench, Spread
from exaone_export.output import human_bytes

Row = tuple[str, str, str, str]
_HEADINGS: Final = ("", "median", "least", "most")
_LABELS: Final = {
    "prefill_tokens_per_s": "prefill, tokens/s",
    "decode_tokens_per_s": "decode, tokens/s",
    "time_to_first_token_s": "time to first token",
    "vision_s": "of that, image",
}


def print_table(report: Bench, stream: TextIO) -> None:
    """Prints one table for a bundle; for two, a table each and one of their ratios."""
    # rich takes a tenth of a second to import: only where something is drawn.
    from rich.console import Console

    console = Console(file=stream, highlight=False)
    for one in (report, report.compared):
        if one is not None:
            console.print(f"{one.bundle}: {_what(one)}", style="bold", markup=False, soft_wrap=True)
            console.print(_table(list(_rows(one))))
    if report.compared is not None:
        title = f"{report.bundle} over {report.compared.bundle}, round by round"
        console.print(title, style="bold", markup=False, soft_wrap=True)
        console.print(_table([_spread(_LABELS[name], ratio, _times) for name, ratio in report.ratios.items()]))


def _table(rows: list[Row]) -> object:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(_HEADINGS):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _what(report: Bench) -> str:
    image = f", {report.image_tokens} of them an image's" if report.image_tokens else ""
    batch = f", {report.batch} rows" if report.batch > 1 else ""
    return (
        f"{report.prompt_tokens} tokens{image}{batch}, then {report.new_tokens} after {report.depth}; "
        f"{report.ep}, {report.threads} threads, {report.repeat} rounds"
    )


def _rows(report: Bench) -> Iterator[Row]:
    yield _spread(_LABELS["prefill_tokens_per_s"], report.prefill_tokens_per_s, _rate)
    yield _spread(_LABELS["decode_tokens_per_s"], report.decode_tokens_per_s, _rate)
    yield _spread(_LABELS["time_to_first_token_s"], report.time_to_first_token_s, _seconds)
    if report.image_tokens:
        yield _spread(_LABELS["vision_s"], report.vision_s, _seconds)
    yield _spread("load", report.load_s, _seconds)
    yield _spread("memory bandwidth", report.read_bandwidth, lambda value: f"{human_bytes(value)}/s")
    if report.roofline is not None and report.roofline_fraction is not None:
        spread = replace(report.roofline, median=report.roofline_fraction)
        yield _spread("decode, of what it allows", spread, _percent)
    if report.traffic is not None and report.traffic_fraction is not None:
        spread = replace(report.traffic, median=report.traffic_fraction)
        yield _spread("with keys and values", spread, _percent)
    yield "weights read for a token", human_bytes(report.weight_bytes_per_token), "", ""
    yield "keys and values for it", human_bytes(report.cache_bytes_per_token), "", ""
    yield "bundle", human_bytes(report.bundle_bytes), "", ""
    yield "peak memory", human_bytes(report.peak_rss_bytes), "", ""


def _spread(label: str, values: Spread, shown: Callable[[float], str]) -> Row:
    return label, shown(values.median), shown(values.min), shown(values.max)


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _times(value: float) -> str:
    return f"× {value:.3f}"
