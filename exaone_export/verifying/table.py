"""What `verify` found, for people: tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from model import limits

if TYPE_CHECKING:
    from exaone_export.verification import Verification
    from exaone_export.verifying.scores import Figures, Quality

Row = Sequence[str]
# Figure → what it is called, how it is written.
_FIGURES = {
    "tokens": ("positions", "{:,}"),
    "mean_kld": ("KL divergence, mean", "{:.5f}"),
    "p99_kld": ("99 %", "{:.4f}"),
    "p999_kld": ("99.9 %", "{:.4f}"),
    "max_kld": ("largest", "{:.4f}"),
    "same_top": ("same top token, %", "{:.2f}"),
    "mean_dp": ("Δp of the true token, %, mean", "{:+.3f}"),
    "rms_dp": ("root mean square", "{:.3f}"),
    "ppl": ("perplexity", "{:.5g}"),
    "ppl_source": ("of the source", "{:.5g}"),
    "ppl_ratio": ("ratio", "{:.5f}"),
}
_PERCENT = ("same_top", "mean_dp", "rms_dp")
_WIDTH = 100  # of what is no terminal
_LAYERS = 5  # shown; more are in verify.json


def print_report(report: Verification, stream: TextIO) -> None:
    """Prints the files' state and, where a source was given, tables of all figures."""
    # rich takes a tenth of a second to import: only where something is drawn.
    from rich.console import Console

    console = Console(file=stream, highlight=False, width=None if stream.isatty() else _WIDTH)
    damaged = [name for name, sound in report.files.items() if not sound]
    lines = [f"files    {len(report.files)} checked, {len(damaged)} damaged"]
    lines += [f"         {problem}" for problem in report.problems]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    for headings, rows in _tables(report):
        console.print(_table(headings, rows))
    console.print("ok" if report.ok else "not ok", markup=False)


def _tables(report: Verification) -> Iterator[tuple[Row, Iterable[Row]]]:
    """Headings and rows of every table."""
    if report.parity:
        parity = report.parity.items()
        rows = ((name, f"{p['max_abs_error']:.3g}", f"{p['cosine']:.6f}") for name, p in parity)
        yield ("parity", "largest error", "least cosine"), rows
    if report.quality is not None:
        yield ("against the source", "all positions", "±", "limit"), _figures(report.quality, report.limits)
        headings = ("positions", "", "mean KL divergence", "99 %", "same top, %", "perplexity ratio")
        yield headings, _groups(report.quality)
    if report.layers:
        layers = (
            (noise.path, noise.scheme, f"{noise.snr_db:.1f}", f"{noise.weight_snr_db:.1f}")
            for noise in report.layers[:_LAYERS]
        )
        yield ("weights with the most noise", "stored as", "output SNR, dB", "weight SNR, dB"), layers
    if report.accuracy:
        tasks = ((a.task, f"{a.asked:,}", _percent(a.exact), _interval(a.interval_95)) for a in report.accuracy)
        yield ("demonstration checkpoint", "asked", "exact, %", "95 % interval"), tasks


def _figures(quality: Quality, held: Mapping[str, float]) -> Iterator[Row]:
    """Of every figure over all positions: its value, its standard error, and its limit."""
    for name, (label, shown) in _FIGURES.items():
        error = quality.standard_errors.get(name)
        value = shown.format(_scaled(name, getattr(quality, name)))
        spread = "" if error is None else shown.replace("+", "").format(_scaled(name, error))
        yield label, value, spread, _limit(name, held)


def _groups(quality: Quality) -> Iterator[Row]:
    """Of every group of positions, the figures that tell most."""
    for members in quality.groups.values():
        for place, figures in members.items():
            shown = (_with_error(figures, name) for name in ("mean_kld", "p99_kld", "same_top", "ppl_ratio"))
            yield place, f"{figures.tokens:,}", *shown


def _with_error(figures: Figures, name: str) -> str:
    digits = 1 if name in _PERCENT else 4
    value, error = _scaled(name, getattr(figures, name)), figures.standard_errors.get(name)
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {_scaled(name, error):.{digits}f}")


def _scaled(name: str, value: Any) -> Any:
    return 100 * value if name in _PERCENT else value


def _limit(name: str, held: Mapping[str, float]) -> str:
    if name not in held:
        return ""
    sign = "≤" if name in limits.MOST else "≥"
    return f"{sign} {_scaled(name, held[name]):g}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _interval(interval: Iterable[float]) -> str:
    return "–".join(_percent(share) for share in interval)


def _table(headings: Row, rows: Iterable[Row]) -> object:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row in _escaped(rows):
        table.add_row(*row)
    return table


def _escaped(rows: Iterable[Row]) -> Iterator[list[str]]:
    """Cells whose square brackets are no markup."""
    from rich.markup import escape

    for row in rows:
        yield [escape(cell) for cell in row]
