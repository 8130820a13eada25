from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from exporter.bind import WeightTensor
from exporter.parallel import in_order, thread_count
from model.errors import NumericalError, UsageError
from model.shards import TensorRef
from quantize import lazy, rtn
from quantize.lazy import LazyWeight, Source
from quantize.scheme import Scheme

SCHEMES = [Scheme(4), Scheme(4, 64, symmetric=False), Scheme(8, 16), Scheme(8, 128, symmetric=False)]


class Sink:
    """What a writer is to a tensor, and how large the pieces are that it is given."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.largest = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.content += memoryview(data).cast("B")
        self.largest = max(self.largest, size)
        return size


def stored(folder: Path, rows: int, columns: int, *, bad: int | None = None) -> WeightTensor:
    """A bfloat16 tensor in a file, as an initializer that wants it transposed; `bad` is where it holds NaN."""
    values = np.random.default_rng(rows).standard_normal(rows * columns, np.float32)
    if bad is not None:
        values[bad] = np.nan
    file = folder / f"{rows}-{bad}.bin"
    file.write_bytes(values.astype(ml_dtypes.bfloat16).tobytes())
    ref = TensorRef("layer.weight", "BF16", (rows, columns), file, 0, 2 * rows * columns)
    return WeightTensor(ref, ir.DataType.FLOAT, (columns, rows), transposed=True, name="layer.weight")


def written(tensor: ir.TensorProtocol, scheme: Scheme, threads: int) -> dict[str, bytes]:
    weight = LazyWeight(Source(tensor, True, "decoder.layer.weight"), scheme, rtn.quantize, None, threads)
    parts = {}
    for part, shape in weight.shapes.items():
        sink = Sink()
        weight.tensor(f"layer.{part}", part, shape).tofile(sink)
        parts[part] = bytes(sink.content)
    return parts


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "CHUNK", 3 * 256)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_any_number_of_threads_gives_the_same_bytes(tmp_path: Path, scheme: Scheme) -> None:
    tensor = stored(tmp_path, 100, 256)
    alone = written(tensor, scheme, 1)
    assert all(alone.values())
    assert written(tensor, scheme, 2) == alone
    assert written(tensor, scheme, 7) == alone
    # And the same as the tensors' arrays.
    weight = LazyWeight(Source(tensor, True, "decoder.layer.weight"), scheme, rtn.quantize, None, 3)
    for part, shape in weight.shapes.items():
        assert weight.tensor(part, part, shape).numpy().tobytes() == alone[part]


def test_a_fault_is_told_alike_by_any_number_of_threads(tmp_path: Path) -> None:
    tensor = stored(tmp_path, 64, 256, bad=40 * 256 + 3)
    said = set()
    for threads in (1, 2, 5):
        with pytest.raises(NumericalError) as caught:
            written(tensor, Scheme(4), threads)
        said.add(str(caught.value))
    assert len(said) == 1
    assert "the first at [40, 3]" in said.pop()
    assert not _workers()


def test_codes_are_written_piece_by_piece_and_small_parts_kept(tmp_path: Path) -> None:
    tensor = stored(tmp_path, 300, 256)
    reads: list[int] = []
    weight = LazyWeight(Source(tensor, True, "decoder.layer.weight"), Scheme(4), _counting(reads), None, 2)
    sink = Sink()
    weight.tensor("codes", "codes", weight.shapes["codes"]).tofile(sink)
    assert len(sink.content) == 300 * 128
    assert sink.largest == 3 * 128  # three rows, as CHUNK says
    assert len(reads) == 100
    scales = weight.take("scales")
    assert len(reads) == 100
    # What was handed out is forgotten, and comes again without the codes.
    assert (weight.take("scales") == scales).all()
    assert len(reads) == 200


def test_memory_is_that_of_a_few_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "CHUNK", 1 << 15)
    weight = LazyWeight(Source(stored(tmp_path, 16384, 1024), True, "x"), Scheme(4), rtn.quantize, None, 3)
    codes = weight.tensor("codes", "codes", weight.shapes["codes"])
    tracemalloc.start()
    try:
        codes.tofile(Discard())
        peak = tracemalloc.get_traced_memory()[1] - weight.take("scales").nbytes
    finally:
        tracemalloc.stop()
    assert codes.nbytes == 8 << 20
    assert peak < 3 << 20  # four pieces at a time, each some 0.5 MiB with all that is made of it


class Discard:
    def write(self, data: Any) -> int:
        return memoryview(data).nbytes


def test_results_come_in_order_and_not_too_early() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for i in range(20):
            taken.append(i)
            yield i

    def slow_first(i: int) -> int:
        time.sleep(0.01 if i % 4 == 0 else 0)
        return i * i

    results = in_order(slow_first, items(), 3)
    assert next(results) == 0
    assert len(taken) <= 4
    assert list(results) == [i * i for i in range(1, 20)]
    assert not _workers()


def test_one_thread_is_the_callers_own() -> None:
    assert set(in_order(lambda _: threading.get_ident(), range(5), 1)) == {threading.get_ident()}


def test_the_first_failure_in_order_is_the_one_that_counts() -> None:
    def fail(i: int) -> int:
        if i == 2:
            time.sleep(0.02)
        if i in (2, 3):
            raise ValueError(str(i))
        return i

    results = in_order(fail, range(100), 4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="2"):
        next(results)
    assert not _workers()


def test_threads_end_when_nobody_wants_more_results() -> None:
    results = in_order(lambda i: i, range(1000), 2)
    assert next(results) == 0
    del results
    assert not _workers()


def test_how_many_threads() -> None:
    assert 1 <= thread_count(None) <= 16
    assert thread_count(3) == 3
    for wrong in (0, -1, 10_000):
        with pytest.raises(UsageError, match=f"--threads: {wrong} is not between 1 and 256"):
            thread_count(wrong)


def _workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("quantize")]


def _counting(reads: list[int]) -> Any:
    def method(*arguments: Any) -> Any:
        reads.append(1)
        return rtn.quantize(*arguments)

    return method
