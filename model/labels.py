"""What a classifier's outputs are called, as config.json says it (no torch)."""

from __future__ import annotations

from dataclasses import dataclass

from model.reader import Reader

REGRESSION, SINGLE_LABEL, MULTI_LABEL = "regression", "single_label_classification", "multi_label_classification"
_LARGEST = 1 << 20


@dataclass(frozen=True)
class LabelConfig:
    """The head of a classifier; the defaults are transformers'.

    Attributes:
        names: of the outputs, in their order.
        problem_type: "regression", "single_label_classification", "multi_label_classification" or None.
        token_bias: whether a token classifier's head has a bias.
    """

    names: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    problem_type: str | None = None
    token_bias: bool = True


TWO_LABELS = LabelConfig()


def parse_labels(reader: Reader) -> LabelConfig:
    """Reads ``id2label`` (else ``num_labels``, else two labels), ``problem_type`` and ``token_classification_bias``.

    Raises:
        CheckpointError: a value makes no sense, or two contradict each other.
    """
    problem = reader.raw.get("problem_type")
    if problem not in (None, REGRESSION, SINGLE_LABEL, MULTI_LABEL):
        raise reader.fail("problem_type", f"{str(problem)[:60]!r} is not known")
    names = _names(reader)
    if problem == SINGLE_LABEL and len(names) == 1:
        raise reader.fail("problem_type", f"{SINGLE_LABEL!r} needs two labels or more, there is one")
    return LabelConfig(names, problem, reader.boolean("token_classification_bias", True))


def _names(reader: Reader) -> tuple[str, ...]:
    if not reader.has("id2label"):
        return tuple(f"LABEL_{i}" for i in range(reader.integer("num_labels", 2, high=_LARGEST)))
    listed = reader.child("id2label").raw
    names = {str(key): name for key, name in listed.items()}  # numbers where it comes from Python
    if not 1 <= len(names) <= _LARGEST or any(str(i) not in names for i in range(len(names))):
        raise reader.fail("id2label", f"its {len(names)} labels are not numbered from 0 on")
    if reader.integer("num_labels", len(names)) != len(names):
        raise reader.fail("num_labels", f"{reader.raw['num_labels']}, but id2label has {len(names)}")
    ordered = [names[str(i)] for i in range(len(names))]
    if not all(isinstance(name, str) for name in ordered):
        raise reader.fail("id2label", "a label is not a text")
    return tuple(ordered)
