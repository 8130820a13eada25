"""Features of images that stay on the device: from the vision encoder to the embedding."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.device import Device, Tensor, host_value
from runtime.session import Array, GraphSession


@dataclass
class Features:
    """Image features on the device, [tokens, hidden], filled and then used up in order."""

    tensor: Tensor
    filled: int = 0
    used: int = 0

    def take(self, count: int) -> Tensor:
        """The next `count` rows, or what is left."""
        start = self.used
        self.used = min(start + count, self.filled)
        return self.tensor.part(start, self.used - start)

    @property
    def left(self) -> int:
        """Rows not used yet."""
        return self.filled - self.used


def encode_into(session: GraphSession, device: Device, feeds: dict[str, Array], target: Tensor) -> None:
    """Runs a vision encoder; its features are written where they will be read.

    Args:
        session: the encoder's.
        device: where it computes.
        feeds: its inputs, in the host's memory.
        target: for its features, [image tokens, hidden].
    """
    types = {tensor.name: tensor.dtype for tensor in session.graph.inputs}
    binding = session.binding()
    values = {name: host_value(array, types[name]) for name, array in feeds.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    device.bind_output(binding, "image_features", target)
    session.run_bound(binding)
