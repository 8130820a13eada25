"""Tensors on a device, with the CPU as the device; the driver's memory, placement and budgets with stand-ins."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from model.bundle import FileInfo, GraphInfo, Manifest, TensorInfo, WeightInfo
from model.errors import BundleError, EnvironmentFault, ResourceError, UsageError
from runtime import device_memory
from runtime.budget import Room, layer_bytes, make_plan, workspace_bytes
from runtime.cache import CacheLayout
from runtime.device import Device, _padding, _sum_of_nothing, host_value, narrowed, widened
from runtime.device_cache import DeviceCache, cache_slots
from runtime.execution import Execution, read_ep_options
from runtime.placement import Placement, check_nodes
from runtime.providers import CPU, CUDA
from runtime.session import _load_error, _providers

BILLION = 10**9


@pytest.mark.parametrize("graph", [_padding(), _sum_of_nothing("bfloat16"), _sum_of_nothing("float16")])
def test_the_tiny_graphs_are_models(graph: bytes) -> None:
    onnx.checker.check_model(onnx.load_from_string(graph), full_check=True)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64"])
def test_what_is_written_is_read(dtype: str) -> None:
    device, array = Device(), np.arange(6).reshape(2, 3).astype(dtype)
    tensor = device.put(array)
    assert np.array_equal(device.read(tensor), array)
    device.write(tensor, array + 1)
    assert np.array_equal(device.read(tensor), array + 1)
    twin = device.twin(tensor)
    device.write(tensor, array)
    assert np.array_equal(device.read(twin), array + 1)
    device.copy(twin, tensor)
    assert np.array_equal(device.read(tensor), array + 1)


def test_bfloat16_is_read_and_made_without_numpys_help() -> None:
    values = np.array([1.0, -2.5, 0.0, 3.0e38, np.inf, 1 + 2**-8, 1 + 3 * 2**-8], np.float32)
    bits = narrowed(values)
    assert widened(bits)[:5].tolist() == [1.0, -2.5, 0.0, widened(narrowed(values[3:4]))[0], np.inf]
    assert widened(bits)[5:].tolist() == [1.0, 1 + 2**-6]  # ties to even
    assert np.isnan(widened(narrowed(np.array([np.nan], np.float32)))).all()
    device = Device()
    tensor = device.empty((7,), "bfloat16")
    tensor.value.update_inplace(host_value(values, "bfloat16"))
    assert device.read(tensor).dtype == np.float32
    assert np.array_equal(device.read(tensor), widened(bits))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint8"])
def test_growing_keeps_every_bit(dtype: str) -> None:
    device = Device()
    small = device.grown(None, (2, 3, 4, 8), dtype)
    assert not small.value.numpy().any()
    noise = np.random.default_rng(1).integers(0, 1 << 32, small.value.shape(), np.uint32)  # NaN of all kinds among them
    small.value.numpy().view(np.uint32)[...] = noise
    large = device.grown(small, (2, 3, 9, 8), dtype)
    assert large.shape == (2, 3, 9, 8)
    kept = large.value.numpy().view(np.uint32)
    assert np.array_equal(kept[:, :, :4], noise)
    assert not kept[:, :, 4:].any()


def test_rows_that_are_no_words_are_refused() -> None:
    with pytest.raises(BundleError, match="no whole words"):
        Device().grown(None, (1, 1, 4, 3), "float16")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_finite_or_not(dtype: str) -> None:
    device = Device()
    for values, finite in (([1e4, -3], True), ([1, np.nan], False), ([-np.inf, 2], False), ([], True)):
        tensor = device.empty((len(values),), dtype)
        tensor.value.update_inplace(host_value(np.array(values, np.float32), dtype))
        assert device.is_finite(tensor) is finite


def test_a_gpu_is_numbered_by_its_option() -> None:
    assert (Device(CUDA, {"device_id": "2"}).name, Device(CUDA, {"device_id": "2"}).id) == ("cuda", 2)
    assert (Device("TensorrtExecutionProvider").name, Device(CPU, {"device_id": "2"}).id) == ("cuda", 0)


def decoder(dtype: str = "float16", layers: int = 4, window: tuple[int, ...] = ()) -> GraphInfo:
    def ends(prefix: str) -> tuple[TensorInfo, ...]:
        sizes = {layer: "window_cache_length" if layer in window else "past" for layer in range(layers)}
        shape = {layer: ("batch", 2, size, 16) for layer, size in sizes.items()}
        return tuple(TensorInfo(f"{prefix}.{n}.{p}", dtype, shape[n]) for n in shape for p in ("key", "value"))

    logits = TensorInfo("logits", dtype, ("batch", "kept", 512))
    return GraphInfo("decoder", "decoder.onnx", ("d.data",), ends("past_key_values"), (logits, *ends("present")))


def cache_of(graph: GraphInfo, budget: Any = lambda held: None, limit: int = 4096) -> DeviceCache:
    return DeviceCache(graph, CacheLayout.of(graph, 8), 2, limit, Device(), (), budget)


class Binding:
    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}

    def bind_input(self, name: str, *place: Any) -> None:
        self.inputs[name] = place

    def bind_output(self, name: str, *place: Any) -> None:
        self.outputs[name] = place


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_cache_doubles_and_windows_stay(dtype: str) -> None:
    cache = cache_of(decoder(dtype, window=(1,)))
    assert cache.reserve(10, expected=300)
    assert cache.capacity == 512
    before = Binding()
    cache.bind(before)
    assert not cache.reserve(512)
    assert cache.reserve(513)
    assert cache.capacity == 1024
    after = Binding()
    cache.bind(after)
    for layer in range(4):
        for part in ("key", "value"):
            past, present = f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"
            assert after.inputs[past] == after.outputs[present]
            assert (after.inputs[past] == before.inputs[past]) == (layer == 1)
            tokens = cache.buffer if layer == 1 else 1024
            assert tuple(after.inputs[past][3]) == (2, 2, tokens, 16)
    row = Binding()
    cache.bind(row, 1)
    whole, half = after.inputs["past_key_values.0.key"], row.inputs["past_key_values.0.key"]
    assert tuple(half[3]) == (1, 2, 1024, 16)
    assert half[4] - whole[4] == 2 * 1024 * 16 * (4 if dtype == "float32" else 2)


def test_the_cache_takes_what_there_is_and_no_more() -> None:
    token = 2 * 4 * 2 * 2 * 16 * 2  # rows, layers, key and value, heads, width, bytes
    there = 700 * token
    cache = cache_of(decoder(), lambda held: there)
    cache.reserve(300)
    assert cache.capacity == 512
    assert cache.held_bytes == 512 * token
    cache.reserve(513)
    assert 513 <= cache.capacity < 700  # a doubled one would not fit
    with pytest.raises(ResourceError, match=r"2 x 900 tokens take .* are there.*At most 6\d\d tokens fit"):
        cache.reserve(900)
    with pytest.raises(UsageError, match="context exceeded"):
        cache.reserve(5000)


def test_a_cache_input_of_another_kind_is_refused() -> None:
    for tensor in (TensorInfo("past_key_values.0.key", "float64", ("b", 2, "p", 16)),
                   TensorInfo("past_key_values.0.key", "float16", ("b", "heads", "p", 16)),
                   TensorInfo("past_key_values.x.key", "float16", ("b", 2, "p", 16))):  # fmt: skip
        with pytest.raises(BundleError, match="no known type and size"):
            cache_slots(GraphInfo("decoder", "decoder.onnx", (), (tensor,), ()))


def manifest(layers: int = 4) -> Manifest:
    """A decoder of 10 GB in 4 equal layers of 2 GB and a head of 2 GB."""
    weights = {f"decoder.layers.{n}.mlp.up_proj": WeightInfo(4, 32, True, "rtn", 4 * BILLION) for n in range(layers)}
    weights["decoder.lm_head"] = WeightInfo(0, 0, True, "", 1_125_000_000)
    files = {"decoder.onnx": FileInfo(0, ""), "d.data": FileInfo(10 * BILLION, "")}
    graphs = (decoder(),)
    return Manifest(
        "1", {}, {}, "exaone4", "text-generation", "fp16", "cuda", "int4", graphs, weights, files, offload=True
    )


def test_layers_are_shared_out_by_what_they_store() -> None:
    sizes, head = layer_bytes(manifest(), 4)
    assert sizes == [2 * BILLION] * 4
    assert head == 2 * BILLION


@pytest.mark.parametrize(("budget", "host"), [(None, ()), (12, ()), (9, (0,)), (7.4, (0, 1)), (5.4, (0, 1, 2))])
def test_as_many_of_the_last_layers_as_fit(budget: float | None, host: tuple[int, ...]) -> None:
    room = Room(None if budget is None else int(budget * BILLION))
    plan = make_plan(manifest(), [decoder()], room, offload=True)
    assert plan.host_layers == host
    assert plan.weights == (10 - 2 * len(host)) * BILLION
    if plan.budget is not None:
        assert plan.cache == plan.budget - plan.weights - workspace_bytes(plan.budget)
        assert plan.weights + plan.workspace <= plan.budget


def test_what_does_not_fit_is_refused_with_both_numbers() -> None:
    with pytest.raises(ResourceError, match=r"4 layers .* take 10\.54 GB, 9\.00 GB are there.*gpu_layers=3 it fits"):
        make_plan(manifest(), [decoder()], Room(9 * BILLION))
    with pytest.raises(ResourceError, match=r"3 layers .* 7\.00 GB are there.*gpu_layers=2"):
        make_plan(manifest(), [decoder()], Room(7 * BILLION), gpu_layers=3)
    with pytest.raises(ResourceError, match=r"1 layers .* 3\.00 GB are there.*fewer bits"):
        make_plan(manifest(), [decoder()], Room(3 * BILLION), offload=True)
    with pytest.raises(UsageError, match="5 are more than the model's 4"):
        make_plan(manifest(), [decoder()], Room(None), gpu_layers=5)
    assert make_plan(manifest(), [decoder()], Room(None), gpu_layers=0).host_layers == (0, 1, 2, 3)


def test_layers_are_assigned_by_whole_names() -> None:
    entries = Placement({}, (0, 1, 10)).session_entries(CUDA)
    assert entries["session.layer_assignment_settings"] == "cpu(=layers.0, =layers.1, =layers.10)"
    assert "session.layer_assignment_settings" not in Placement().session_entries(CUDA)
    assert Placement({}, (0,)).session_entries(CPU) == {}


def test_products_of_packed_weights_are_switched_on() -> None:
    packed = "ep.cuda.fpa_intb_gemm"
    assert Placement().session_entries(CUDA)[packed] == "1"
    own = Placement({"device_id": "1", packed: "0", "ep.other": "x"})
    assert own.session_entries(CUDA)[packed] == "0"
    assert own.session_entries(CUDA)["ep.other"] == "x"
    assert own.provider_options == {"device_id": "1"}
    assert packed not in Placement().session_entries("TensorrtExecutionProvider")


def session_on(**nodes: list[str]) -> Any:
    parts = [
        SimpleNamespace(ep_name=CPU if place == "cpu" else CUDA, get_nodes=lambda kinds=kinds: kinds)
        for place, kinds in ((p, [SimpleNamespace(op_type=kind) for kind in ops]) for p, ops in nodes.items())
    ]
    return SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)


def test_work_on_the_cpu_is_never_silent() -> None:
    fine = session_on(cuda=["MatMulNBits", "GroupQueryAttention"], cpu=["Shape", "Gather", "Cast"])
    check_nodes(fine, "decoder.onnx", CUDA, Placement())
    mixed = session_on(cuda=["MatMulNBits"], cpu=["Shape", "GroupQueryAttention"])
    with pytest.raises(EnvironmentFault, match=r"cuda has no kernel for GroupQueryAttention.*--target cuda"):
        check_nodes(mixed, "decoder.onnx", CUDA, Placement())
    check_nodes(mixed, "decoder.onnx", CUDA, Placement(host_layers=(0,)))  # asked for
    for placement in (Placement(), Placement(host_layers=(0,))):
        with pytest.raises(EnvironmentFault, match="nothing of it runs on cuda"):
            check_nodes(session_on(cpu=["Add"]), "decoder.onnx", CUDA, placement)
    check_nodes(session_on(cpu=["MatMul"]), "decoder.onnx", CPU, Placement())


def test_providers_and_their_options() -> None:
    ort: Any = SimpleNamespace(get_available_providers=lambda: [CUDA, CPU])
    tensorrt = "TensorrtExecutionProvider"
    options = {"trt_fp16_enable": "1"}
    assert _providers(ort, tensorrt, Placement(options)) == [(tensorrt, options), CUDA, CPU]
    assert _providers(ort, CUDA, Placement({"device_id": "1"})) == [(CUDA, {"device_id": "1"}), CPU]
    assert _providers(ort, CPU, Placement()) == [CPU]


def test_an_unknown_option_of_a_provider_is_the_users_fault() -> None:
    error = _load_error(decoder(), RuntimeError('[ONNXRuntimeError] : 1 : Unknown provider option: "foo".'), CUDA)
    assert isinstance(error, UsageError)
    assert "cuda refuses it" in str(error)
    assert "foo" in str(error)
    assert "\n" not in str(error)


def test_options_are_read() -> None:
    assert read_ep_options(["a=1", "b=x=y", "c="]) == {"a": "1", "b": "x=y", "c": ""}
    for pairs in (["a"], ["=1"], ["a=1", "a=2"]):
        with pytest.raises(UsageError, match="--ep-option"):
            read_ep_options(pairs)
    options: dict[str, Any] = {"on": True, "id": 3}
    execution = Execution(options, gpu_memory="20GB")
    assert execution.ep_options == {"on": "1", "id": "3"}
    assert execution.memory == 20 * BILLION
    assert Execution().memory is None


@pytest.mark.parametrize(
    "options",
    [
        {"gpu_layers": -1}, {"gpu_layers": True}, {"gpu_memory": "much"}, {"gpu_memory": 0}, {"cuda_graph": "yes"},
        {"cuda_graph": "on", "gpu_layers": 3}, {"ep_options": {"a": None}}, {"ep_options": {"": 1}},
    ],
)  # fmt: skip
def test_absurd_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="bad option"):
        Execution(**options)


class Driver:
    """Stands for NVIDIA's driver: GPU 0 has 24 GB, 20 of them free."""

    def __init__(self, failing: str = "") -> None:
        self.failing = failing

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name == "cuMemGetInfo_v2":
                for reference, size in zip(arguments, (20, 24), strict=True):
                    ctypes.cast(reference, ctypes.POINTER(ctypes.c_size_t))[0] = size * BILLION
            return int(name == self.failing)

        return call


@pytest.fixture
def fresh() -> Any:
    device_memory._context.cache_clear()
    yield
    device_memory._context.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "_driver", Driver)
    assert device_memory.device_memory() == (20 * BILLION, 24 * BILLION)
    with device_memory.watched_peak() as peak:
        pass
    assert peak.bytes == 4 * BILLION


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    "failing", ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuMemGetInfo_v2", "all"]
)
def test_memory_that_nobody_can_tell(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    monkeypatch.setattr(device_memory, "_driver", lambda: None if failing == "all" else Driver(failing))
    assert device_memory.free_bytes() is None
    with device_memory.watched_peak() as peak:
        pass
    assert peak.bytes is None
