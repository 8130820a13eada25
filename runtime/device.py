"""Tensors where a graph computes: made, written, read and grown there, with onnxruntime's own interface alone.

The same calls serve a GPU and the CPU, so that what runs on a GPU can be tried without one. Two tiny graphs do what
no call of onnxruntime does: give a tensor more room without a way through the host, and say whether it is finite.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from model.errors import BundleError, EnvironmentFault, ResourceError
from model.memory import available_bytes
from runtime import protobuf
from runtime.device_memory import free_bytes
from runtime.protobuf import ELEMENTS
from runtime.providers import CPU, CUDA, faults, onnxruntime, short_name

Array = npt.NDArray[Any]

# What these providers compute with lies in the memory of an NVIDIA GPU.
NVIDIA: Final = (CUDA, "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")
_WORD: Final = 4


@dataclass(frozen=True)
class Tensor:
    """Some bytes on a device, seen as a tensor.

    Attributes:
        value: the OrtValue that keeps them; its own type and shape may be others.
        dtype: ONNX's name, "float16" for example.
        shape: of the tensor.
        start: address of the first element.
    """

    value: Any
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return math.prod(self.shape) * ELEMENTS[self.dtype][1]

    def part(self, first: int, count: int) -> Tensor:
        """Rows of the first axis."""
        skipped = first * (self.bytes // max(1, self.shape[0]))
        return Tensor(self.value, self.dtype, (count, *self.shape[1:]), self.start + skipped)


class Device:
    """Where the tensors of a graph lie.

    Args:
        provider: the execution provider that computes there.
        options: of that provider.

    Attributes:
        name: "cuda" or "cpu", as onnxruntime and a cache's layout call it.
        id: of the GPU; 0 on the CPU.
    """

    def __init__(self, provider: str = CPU, options: Mapping[str, str] | None = None) -> None:
        self.provider = provider
        self.name = "cuda" if provider in NVIDIA else "cpu"
        number = (options or {}).get("device_id", "0")
        self.id = int(number) if self.name == "cuda" and number.isdecimal() else 0

    def free_bytes(self) -> int | None:
        """What may still be taken of its memory; None where nobody can tell."""
        return free_bytes(self.id) if self.name == "cuda" else available_bytes()

    def empty(self, shape: Sequence[int], dtype: str) -> Tensor:
        """A tensor whose content has no meaning. Raises ResourceError."""
        with _guard(self.name):
            value = _values().ortvalue_from_shape_and_type(list(shape), ELEMENTS[dtype][0], self.name, self.id)
            return Tensor(value, dtype, tuple(shape), value.data_ptr())

    def put(self, array: Array) -> Tensor:
        """A tensor with an array's content, of its type."""
        tensor = self.empty(array.shape, array.dtype.name)
        self.write(tensor, array)
        return tensor

    def write(self, tensor: Tensor, array: Array) -> None:
        """Writes all of a tensor that is no part of another."""
        with _guard(self.name):
            tensor.value.update_inplace(array)

    def copy(self, tensor: Tensor, target: Tensor) -> None:
        """Copies all of a tensor to another of its type and shape, neither of them a part."""
        with _guard(self.name):
            target.value.update_inplace(tensor.value)

    def twin(self, tensor: Tensor) -> Tensor:
        """A copy, of the type and shape that its OrtValue has. Raises ResourceError."""
        shape, kind = tensor.value.shape(), tensor.value.element_type()
        with _guard(self.name):
            value = _values().ortvalue_from_shape_and_type(shape, kind, self.name, self.id)
            value.update_inplace(tensor.value)
            return Tensor(value, tensor.dtype, tensor.shape, value.data_ptr())

    def read(self, tensor: Tensor) -> Array:
        """The content of a tensor that is no part of another; bfloat16, which numpy lacks, comes as float32."""
        value = tensor.value
        with _guard(self.name):
            if tensor.dtype != "bfloat16":
                array: Array = value.numpy()
                return array
            if self.name != "cpu":
                value = Device().empty(tensor.shape, tensor.dtype).value
                value.update_inplace(tensor.value)
            halves = (ctypes.c_uint16 * math.prod(tensor.shape)).from_address(value.data_ptr())
            return widened(np.ctypeslib.as_array(halves)).reshape(tensor.shape)

    def bind_input(self, binding: Any, name: str, tensor: Tensor) -> None:
        """Lets a run read a tensor where it lies."""
        kind = ELEMENTS[tensor.dtype][0]
        binding.bind_input(name, self.name, self.id, kind, tensor.shape, tensor.start)

    def bind_output(self, binding: Any, name: str, tensor: Tensor) -> None:
        """Lets a run write a tensor where it lies."""
        kind = ELEMENTS[tensor.dtype][0]
        binding.bind_output(name, self.name, self.id, kind, tensor.shape, tensor.start)

    def grown(self, tensor: Tensor | None, shape: Sequence[int], dtype: str) -> Tensor:
        """A tensor of zeros, which begins along its third axis with another's content.

        Args:
            tensor: of the same sizes but for the third; None for zeros alone.
            shape: four sizes; those after the third take whole words of four bytes.
            dtype: of both.

        Raises:
            ResourceError: not enough memory.
            BundleError: the sizes do not make whole words.
        """
        first, second, length, width = shape
        words, rest = divmod(width * ELEMENTS[dtype][1], _WORD)
        if rest:
            why = f"{width} values of {dtype} are no whole words"
            raise BundleError("cannot run graph", "cache", why, "Export the model again")
        begun = self.put(np.zeros((first, second, 1, words), np.float32)) if tensor is None else tensor
        held = begun.shape[2]
        with _guard(self.name):
            binding = self._padding.io_binding()
            # Bytes are only moved, so all types are read as one that every provider can move.
            source = Tensor(begun.value, "float32", (first, second, held, words), begun.start)
            self.bind_input(binding, "x", source)
            binding.bind_cpu_input("pads", np.array([0, 0, 0, 0, 0, 0, length - held, 0], np.int64))
            binding.bind_output("y", self.name, self.id)
            self._padding.run_with_iobinding(binding, self._shrinking)
            value = binding.get_outputs()[0]
            return Tensor(value, dtype, tuple(shape), value.data_ptr())

    def is_finite(self, tensor: Tensor) -> bool:
        """Whether all values of a float tensor are finite; only one number leaves the device."""
        if not math.prod(tensor.shape):
            return True
        with _guard(self.name):
            session = self._session(_sum_of_nothing(tensor.dtype))
            binding = session.io_binding()
            flat = Tensor(tensor.value, tensor.dtype, (math.prod(tensor.shape),), tensor.start)
            self.bind_input(binding, "x", flat)
            binding.bind_output("y")
            session.run_with_iobinding(binding)
            return bool(binding.get_outputs()[0].numpy() == 0)

    @cached_property
    def _padding(self) -> Any:
        return self._session(_padding())

    @cached_property
    def _shrinking(self) -> Any:
        """After each run what was given back goes to the device, or old buffers would be kept beside the new."""
        options = onnxruntime().RunOptions()
        if self.name == "cuda":
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", f"gpu:{self.id}")
        return options

    def _session(self, graph: bytes) -> Any:
        ort = onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_mem_pattern = options.enable_cpu_mem_arena = False
        provider: Any = CPU
        if self.name == "cuda":
            provider = (CUDA, {"device_id": str(self.id), "arena_extend_strategy": "kSameAsRequested"})
        return ort.InferenceSession(graph, options, providers=[provider], enable_fallback=0)


def widened(halves: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Numbers of bfloat16, given as their bits, in float32: the same bits, and zeros after them."""
    return (halves.astype(np.uint32) << 16).view(np.float32)


def narrowed(array: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of bfloat16 nearest to float32 numbers, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)


def host_value(array: Array, dtype: str) -> Any:
    """An OrtValue of a graph's type in the host's memory, from float numbers; it keeps what it borrows."""
    if dtype == "bfloat16":
        return _values().ortvalue_from_numpy_with_onnx_type(narrowed(array), ELEMENTS[dtype][0])
    return _values().ortvalue_from_numpy(np.ascontiguousarray(array.astype(dtype, copy=False)))


def _values() -> Any:
    return onnxruntime().OrtValue


def _padding() -> bytes:
    """y = x with zeros around it."""
    sizes = ("a", "b", "c", "d")
    return protobuf.model(
        [protobuf.node("Pad", ["x", "pads"], ["y"])],
        [protobuf.tensor_value("x", "float32", sizes), protobuf.tensor_value("pads", "int64", (8,))],
        [protobuf.tensor_value("y", "float32", tuple(size + size for size in sizes))],
    )


def _sum_of_nothing(dtype: str) -> bytes:
    """y = the sum of x · 0: 0, or NaN where x has NaN or Inf."""
    float32 = protobuf.integer_attribute("to", ELEMENTS["float32"][0])
    nodes = [
        protobuf.node("Cast", ["x"], ["wide"], float32),
        protobuf.node("Mul", ["wide", "zero"], ["nothing"]),
        protobuf.node("ReduceSum", ["nothing"], ["y"], protobuf.integer_attribute("keepdims", 0)),
    ]
    return protobuf.model(
        nodes,
        [protobuf.tensor_value("x", dtype, ("n",))],
        [protobuf.tensor_value("y", "float32", ())],
        [protobuf.constant("zero", "float32", (), bytes(4))],
    )


@contextmanager
def _guard(device: str) -> Iterator[None]:
    """Turns onnxruntime's exceptions into ours."""
    try:
        yield
    except faults() as reason:
        text = " ".join(str(reason).split())[:160]
        if isinstance(reason, MemoryError) or any(sign in text.lower() for sign in ("alloc", "out of memory")):
            raise ResourceError("cannot hold tensor", device, "not enough memory", "Use fewer tokens") from reason
        why = f"{short_name(device)} fails to move a tensor ({text})"
        raise EnvironmentFault("cannot use device", device, why, "Check it with exaone-export doctor") from reason
