"""What a step of one token is bound to, for as long as its cache stays where it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime.device import Tensor
from runtime.device_cache import DeviceCache
from runtime.rows import Ids


@dataclass
class Step:
    """Everything a step of one token is bound to; it can serve one request after another.

    Attributes:
        cache: the rows' keys and values.
        records: whether to record the step at all.
        tensors: by their names in the graphs.
        binding, embedding: of the decoder and of the embedding.
        sent: inputs that a graph reads on the host, with its binding; they are bound anew for each step.
        mask: as it was written last; `marked` has each row's length in it.
        recording, thread: number under which the step was recorded, and in which thread; None where it was not.
    """

    cache: DeviceCache
    records: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)
    binding: Any = None
    embedding: Any = None
    sent: dict[str, Any] = field(default_factory=dict)
    mask: Ids = field(default_factory=lambda: np.zeros((1, 0), np.int64))
    marked: list[int] = field(default_factory=list)
    recording: int | None = None
    thread: int = 0
