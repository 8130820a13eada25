"""Second moments of a module's inputs, summed up over the prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from model.errors import NumericalError
from quantize.scheme import Statistics

# Rows of which the product is taken at once.
_ROWS = 2048
# Sums of products of up to so many channels are float64, 512 MiB; more would be gigabytes.
_WIDEST = 8192


class Moments:
    """Sums ``weight * x.T @ x`` over rows x [K].

    Products of up to 2048 rows are float32, their sum is float64 where there are up to 8192 channels. What comes out
    depends in its last bits on the order in which BLAS adds: on the processor and the number of threads.

    Args:
        columns: K.
        hessian: whether the outer products are wanted, or their diagonal alone.
        device: where to add.
    """

    def __init__(self, columns: int, *, hessian: bool, device: torch.device) -> None:
        self._squares = torch.zeros(columns, dtype=torch.float64, device=device)
        self._products: Tensor | None = None
        if hessian:
            dtype = torch.float64 if columns <= _WIDEST else torch.float32
            self._products = torch.zeros(columns, columns, dtype=dtype, device=device)
        self._waiting: list[Tensor] = []
        self._count = 0

    def add(self, rows: Tensor, weights: Tensor) -> None:
        """Adds rows float [n, K] with weights float [n]."""
        scaled = rows.float() * weights.sqrt().unsqueeze(1)
        self._squares += scaled.double().square().sum(0)
        if self._products is None:
            return
        self._waiting.append(scaled)
        self._count += len(scaled)
        if self._count >= _ROWS:
            self._multiply()

    def result(self, where: str) -> Statistics:
        """The sums; `where` names the module in errors.

        Raises:
            NumericalError: an input was NaN or infinite.
        """
        self._multiply()
        if not bool(torch.isfinite(self._squares).all()):
            why = "its inputs become NaN or infinite on the calibration prompts"
            raise NumericalError("cannot calibrate", where, why, "Check the checkpoint with verify, or other prompts")
        squares = self._squares.float().cpu().numpy()
        products = None if self._products is None else self._products.float().cpu().numpy()
        self._products = None
        return Statistics(squares, products)

    def _multiply(self) -> None:
        if self._products is None or not self._waiting:
            return
        rows = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting)
        self._waiting, self._count = [], 0
        if self._products.dtype == rows.dtype:
            self._products.addmm_(rows.T, rows)
        else:
            self._products += rows.T @ rows
