"""What a model card says of a bundle's quality: the figures that `verify` kept.

They are read from a file that anybody may have changed, so nothing is taken for granted: what is missing is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from exporter.card_tables import plain, table
from model.limits import MOST, NAMES

_QUALITY = {
    "tokens": "positions scored",
    "mean_kld": "KL divergence from the source, mean, nats",
    "p99_kld": "… 99th percentile",
    "p999_kld": "… 99.9th percentile",
    "max_kld": "… largest",
    "same_top": "same most likely token",
    "rms_dp": "probability of the true token, root mean square of the difference",
    "ppl": "perplexity of this bundle",
    "ppl_source": "perplexity of the source",
    "ppl_ratio": "ratio of the two",
}
_GROUPED = ("tokens", "mean_kld", "p99_kld", "same_top", "ppl_ratio")
_SHARES = ("same_top", "rms_dp", "exact")


def quality_sections(figures: Mapping[str, Any] | None) -> Iterator[str]:
    """Paragraphs and tables.

    Args:
        figures: content of verify.json, or None where nothing was measured.
    """
    if figures is None:
        yield (
            "Not measured. `exaone-export verify THIS_FOLDER --source SOURCE` compares the bundle with the checkpoint "
            "it was made from, and writes the figures here."
        )
        return
    if not figures.get("ok"):
        problems = [plain(str(problem)) for problem in figures.get("problems", ())]
        yield f"**The last comparison with the source failed**: {'; '.join(problems) or 'no reason was kept'}."
    quality, parity, layers = (figures.get(key) for key in ("quality", "parity", "layers"))
    if quality:
        yield (
            "Measured by `exaone-export verify` against the checkpoint it was made from, in float32: the distribution "
            "of the next token at every scored position, with standard errors."
        )
        yield _quality_table(quality, figures.get("limits") or {})
        if rows := list(_group_rows(quality.get("groups") or {})):
            yield table(("positions of", *(_QUALITY[name].removeprefix("… ") for name in _GROUPED)), rows)
    if figures.get("accuracy"):
        yield "Answers of the demonstration checkpoint, which is not LG's EXAONE, that are right to the letter:"
        yield table(("task", "asked", "exact", "95 % interval"), _accuracy_rows(figures["accuracy"]))
    if layers:
        yield (
            "The weights with the most noise: signal over noise of what the layer gives, its inputs weighted as they "
            "are on the prompts, and of the weight itself."
        )
        yield table(("weight", "stored as", "output, dB", "weight, dB"), _layer_rows(layers))
    if parity:
        yield "Every graph alone, on random inputs, against the same part of the source in float32:"
        yield table(("graph", "largest error", "least cosine similarity"), _parity_rows(parity))


def _quality_table(quality: Mapping[str, Any], limits: Mapping[str, Any]) -> str:
    errors = quality.get("standard_errors") or {}
    held = [name for name in NAMES if name in limits]
    rows = []
    for name, text in _QUALITY.items():
        if name in quality:
            error = f" ± {_figure(name, errors[name])}" if name in errors else ""
            bound = f"{'≤' if name in MOST else '≥'} {_figure(name, limits[name])}" if name in held else ""
            rows.append((text, f"{_figure(name, quality[name])}{error}", *((bound,) if held else ())))
    return table(("figure", "value", *(("must be",) if held else ())), rows)


def _group_rows(groups: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for members in groups.values():
        for place, figures in members.items():
            yield plain(str(place), 20), *(_figure(name, figures.get(name)) for name in _GROUPED)


def _accuracy_rows(tasks: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[str]]:
    for task in tasks:
        interval = " – ".join(_figure("exact", share) for share in task.get("interval_95", ()))
        exact = _figure("exact", task.get("exact"))
        yield plain(str(task.get("task"))), _figure("tokens", task.get("asked")), exact, interval


def _layer_rows(layers: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[str]]:
    for layer in layers:
        noise = (_figure("snr_db", layer.get(name)) for name in ("snr_db", "weight_snr_db"))
        yield f"`{plain(str(layer.get('path')))}`", plain(str(layer.get("scheme"))), *noise


def _parity_rows(parity: Mapping[str, Mapping[str, Any]]) -> Iterator[Sequence[str]]:
    for graph, figures in parity.items():
        yield graph, _figure("max_abs_error", figures.get("max_abs_error")), _figure("cosine", figures.get("cosine"))


def _figure(name: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return "–"
    if not math.isfinite(value):
        return str(value)
    if name == "tokens":
        return f"{value:,}"
    if name in _SHARES:
        return f"{100 * value:.2f} %"
    if name == "snr_db":
        return f"{value:.1f}"
    return f"{value:.6f}" if name == "cosine" else f"{value:.4g}"
