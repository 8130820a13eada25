"""What a weight of a checkpoint is to those who read it, whether it is stored plainly or quantized."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from model.shards import TensorRef

RowReader = Callable[[int, int], NDArray[Any]]


class WeightSource(Protocol):
    """A weight's values, read in pieces: a `TensorRef`, or a quantized weight that is dequantized on the way."""

    @property
    def name(self) -> str:
        """As the checkpoint calls it; of a quantized layer the name that its plain weight would have."""

    @property
    def dtype(self) -> str:
        """Type of the values that `rows` gives, in safetensors' names: "F32", "F16" or "BF16"."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""

    @property
    def nbytes(self) -> int:
        """Bytes of all values; on disk it is the sum of the parts'."""

    @property
    def file(self) -> Path:
        """Where the main part lies, together with `offset`: no two weights lie at one place."""

    @property
    def offset(self) -> int:
        """See `file`."""

    @property
    def parts(self) -> tuple[TensorRef, ...]:
        """The stored tensors that the values come from, the main one first."""

    @property
    def label(self) -> str:
        """How it is quantized, e.g. "gptq int4 g128 sym"; empty for plain weights."""

    def open(self) -> RowReader:
        """As `rows`, for many calls: what has to be read whole is read once and lives as long as the function."""

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Values of rows start..stop.

        Raises:
            CheckpointError: a file cannot be read, or parts of a quantized weight contradict each other.
            NumericalError: a quantized weight's scale is NaN or infinite.
        """

    def read(self) -> NDArray[Any]:
        """All values. Raises as `rows`."""
