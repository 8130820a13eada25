"""The picture of `bench --plot`: how time grows with the prompt, with the context and with the image.

matplotlib draws it; it comes with the `plot` extra and is not needed otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from exaone_export.benchmark.report import Bench, Growth, Spread
from model.errors import EnvironmentFault, UsageError

FORMATS: Final = (".png", ".svg", ".pdf")
_WHAT: Final = "cannot draw the plot"


def check_plot(path: Path) -> None:
    """Refuses what could not be drawn, before anything takes its time.

    Raises:
        EnvironmentFault: matplotlib is not installed.
        UsageError: the file's name has another suffix than `FORMATS`, or its folder is not there.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(_WHAT, path.name, f"it does not end in {', '.join(FORMATS)}", "Choose another name")
    if not path.parent.is_dir() or path.is_dir():
        why = "it is a folder" if path.is_dir() else "its folder is not there"
        raise UsageError(_WHAT, path.name, why, "Choose another name")
    if find_spec("matplotlib") is None:
        remedy = 'Install what plots need: pip install "exaone-export[plot]"'
        raise EnvironmentFault(_WHAT, "matplotlib", "it is not installed", remedy)


def draw(report: Bench, path: Path) -> None:
    """Draws the growth of a report, and of the one it was compared with, into a file.

    Raises:
        UsageError, EnvironmentFault: see `check_plot`; or the report has no growth.
    """
    check_plot(path)
    reports = [one for one in (report, report.compared) if one is not None]
    grown = [(one.bundle, one.growth) for one in reports if one.growth is not None]
    if not grown:
        raise UsageError(_WHAT, "report", "growth was not measured", "Measure with growth=True")
    # By name, so that types are checked alike where the extra is installed and where it is not.
    figures = import_module("matplotlib.figure")
    panels = [_prefill, _decode] + ([_vision] if grown[0][1].patches else [])
    figure = figures.Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for name, growth in grown:
            panel(axes, name, growth)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, alpha=0.3)
    if len(grown) > 1:
        figure.axes[0].legend()
    figure.suptitle(f"{' and '.join(name for name, _ in grown)}; {report.ep}, {report.threads} threads", fontsize=10)
    figure.savefig(path)


def _prefill(axes: Any, name: str, growth: Growth) -> None:
    axes.set(title="reading a prompt", xlabel="tokens", ylabel="seconds")
    _line(axes, name, growth.tokens, growth.prefill_s)


def _decode(axes: Any, name: str, growth: Growth) -> None:
    axes.set(title="decoding", xlabel="tokens in context", ylabel="milliseconds a token")
    _line(axes, name, growth.tokens, growth.decode_s, 1000.0)


def _vision(axes: Any, name: str, growth: Growth) -> None:
    axes.set(title="encoding an image", xlabel="patches", ylabel="seconds")
    _line(axes, name, growth.patches, growth.vision_s)


def _line(axes: Any, name: str, sizes: Sequence[int], values: Sequence[Spread], unit: float = 1.0) -> None:
    """Medians as a line, least to most as a band."""
    (line,) = axes.plot(sizes, [unit * value.median for value in values], marker="o", markersize=3, label=name)
    least, most = [unit * value.min for value in values], [unit * value.max for value in values]
    axes.fill_between(sizes, least, most, alpha=0.2, color=line.get_color(), linewidth=0)
