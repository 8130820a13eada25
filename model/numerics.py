"""How a graph keeps its numbers in range, and which kernels it may count on.

Half precision ends at 65,504. In the text model every branch ends in a norm, and what is added up over the layers is
not normalised, so both the residual stream and what goes into those norms can grow beyond that. Two things keep them in
range, and neither changes what is computed:

* The residual stream is float32.
* It holds a fraction of its values, a power of two. Queries, keys and the outputs of both branches are normalised
  afterwards, so the fraction cancels there, given the norms' epsilon is scaled with it; SiLU takes it back in its
  exponent; norm gains put it in again. No product, no matrix and no kernel is added.

The vision encoder normalises before each branch instead: gains and biases carry the fraction through the branches.
"""

from __future__ import annotations

from dataclasses import dataclass

# With an eighth, 16 bits hold residuals up to 524,032 and products in front of a norm up to 4.2 million, and what is
# still held with full precision down to 0.0005 and 0.004.
_HALF_FRACTION = 2.0**-3


@dataclass(frozen=True)
class Numerics:
    """How a graph computes.

    Attributes:
        device: whether it is made for CUDA's kernels: one node for SiLU and its factor, packed attention for images.
        wide: whether the residual stream is float32, whatever the weights are.
        fraction: of its values that the residual stream of the text model holds; a power of two.
        shared: whether the CPU must have kernels for the decoder's layers too: norms of queries and keys then stay in
            front of attention, whose kernel there has none.
    """

    device: bool = False
    wide: bool = False
    fraction: float = 1.0
    shared: bool = False


PLAIN = Numerics()


def numerics_for(target: str, dtype: str, shared: bool = False) -> Numerics:
    """What graphs for a target and a type of activations need.

    Args:
        target: "cpu" or "cuda".
        dtype: "fp32", "fp16" or "bf16". bf16 has float32's range and is what the models were trained in.
        shared: whether layers must run on the CPU too.
    """
    if target != "cuda":
        return PLAIN
    return Numerics(True, dtype == "fp16", _HALF_FRACTION if dtype == "fp16" else 1.0, shared)
