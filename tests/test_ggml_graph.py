"""The ggml bindings and graph operations, against NumPy; and that bad calls raise, never abort."""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mimo_edge.cancel import Cancel
from mimo_edge.errors import BackendError, Cancelled, UsageError
from mimo_edge.kv_cache import Rows
from mimo_edge.quant.base import FORMATS
from mimo_edge.runtimes.ggml import bindings as ggml
from mimo_edge.runtimes.ggml import library
from mimo_edge.runtimes.ggml.device import BufferType, Device, Region
from mimo_edge.runtimes.ggml.graph import Context, Graph, Inputs, Tensor
from mimo_edge.runtimes.ggml.library import TYPES
from mimo_edge.runtimes.reference import attend, rms_norm, rotary_angles, rotate, silu

Array = NDArray[Any]
RNG = np.random.default_rng(0)
KINDS = {"float32": ggml.TYPE_F32, "float16": ggml.TYPE_F16, "int32": ggml.TYPE_I32}
KINDS["int64"] = ggml.TYPE_I64
COMPILED = ggml.describe_library()["compiled_for"]
# What ARM processors with f16 arithmetic and without SVE do with few rows of F16 products.
SUMS_IN_F16 = "fp16" in COMPILED and "sve" not in COMPILED


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    made = Device(1)
    yield made
    made.close()


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape, dtype=np.float32)


def run(device: Device, build: Callable[..., Tensor], *arrays: Array) -> Array:
    """Build a graph over inputs holding `arrays` (NumPy order) and return its result."""
    inputs, graph = Inputs(device), Graph(device, 128)
    tensors = [inputs.new(KINDS[a.dtype.name], *a.shape[::-1]) for a in arrays]
    inputs.allocate()
    out = graph.output(build(graph, *tensors))
    graph.finish()
    for tensor, array in zip(tensors, arrays, strict=True):
        tensor.array().reshape(array.shape)[...] = array
    graph.compute()
    result = out.array().copy()
    graph.close()
    inputs.close()
    return result


def close(found: Array, want: Array, tolerance: float = 2e-6) -> None:
    """f32 against f32: rounding of a few operations in another order."""
    assert found.shape == want.shape
    assert np.abs(found - want).max() <= tolerance * max(1.0, np.abs(want).max())


# --- loading ---


def test_a_missing_library_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="pip install llama-cpp-python"):
        ggml.Bindings(tmp_path)


def test_another_tensor_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Longer(ctypes.Structure):
        _fields_ = (*ggml.TensorStruct._fields_, ("more", ctypes.c_int64))

    monkeypatch.setattr(ggml, "TensorStruct", Longer)
    with pytest.raises(BackendError, match="bytes, expected"):
        ggml.Bindings()


def test_moved_fields_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fields: list[Any] = list(ggml.TensorStruct._fields_)
    fields[6], fields[4] = fields[4], fields[6]  # same size, flags and op swapped

    class Moved(ctypes.Structure):
        _fields_ = tuple(fields)

    monkeypatch.setattr(ggml, "TensorStruct", Moved)
    with pytest.raises(BackendError, match="reads as"):
        ggml.Bindings()


def test_a_missing_function_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ggml._CPU, "ggml_no_such_function", (None, ()))
    with pytest.raises(BackendError, match="ggml_no_such_function"):
        ggml.Bindings()


def test_the_version_is_checked_before_anything_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_loaded", {})
    monkeypatch.setattr(library, "_installed", None)
    monkeypatch.setattr(library, "GGML_VERSION", (0, 99))
    with pytest.raises(BackendError, match=r"is ggml 0\.25\.\d+, expected 0\.99\.x: pip install"):
        ggml.Bindings()


def test_a_cpu_library_over_another_base_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = iter((1, 2))
    monkeypatch.setattr(ggml, "_address", lambda lib, name: next(addresses))
    with pytest.raises(BackendError, match="linked to another libggml-base"):
        ggml.Bindings()


def test_parameters_of_another_layout_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """no_alloc read as false: the context would hold data, and the tensor shows it."""

    class Swapped(ctypes.Structure):
        _fields_ = (
            ("mem_size", ctypes.c_size_t),
            ("no_alloc", ctypes.c_size_t),
            ("mem_buffer", ctypes.c_size_t),
        )

    monkeypatch.setattr(ggml, "InitParams", lambda size, buffer, no_alloc: Swapped(size, 0, 0))
    monkeypatch.setitem(ggml._BASE, "ggml_init", (ctypes.c_void_p, (Swapped,)))
    with pytest.raises(BackendError, match="reads as"):
        ggml.Bindings()


@pytest.mark.parametrize("first", ["llama_cpp", "mimo_edge.runtimes.ggml.bindings"])
def test_llama_cpp_in_the_same_process_shares_the_library(first: str) -> None:
    """Whoever comes first: two copies would each have their own device registry and logs."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    code = f"""
import importlib
importlib.import_module({first!r})
import llama_cpp
from mimo_edge.runtimes.ggml.bindings import bindings
bindings()
lines = open("/proc/self/maps").read().splitlines()
print(len({{line.split()[-1] for line in lines if "libggml-" in line}}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "2"  # libggml-base and libggml-cpu, once each


# --- operations against NumPy ---


def test_elementwise(device: Device) -> None:
    a, b = normal(3, 5), normal(1, 5)
    close(run(device, Graph.add, a, b), a + b)
    close(run(device, Graph.mul, a, b), a * b)
    close(run(device, Graph.div, a, 1 + b * b), a / (1 + b * b))
    close(run(device, lambda g, x: g.scale(x, 2.0, 3.0), a), 2 * a + 3)
    close(run(device, Graph.sigmoid, a), 1 / (1 + np.exp(-a)))
    close(run(device, Graph.sum_rows, a), a.sum(axis=1, keepdims=True))
    close(run(device, lambda g, x, y: g.concat(x, y, 0), a, a), np.concatenate([a, a], 1))


def test_swiglu_gates_the_first_argument(device: Device) -> None:
    gate, up = 4 * normal(4, 33), normal(4, 33)
    close(run(device, Graph.swiglu, gate, up), silu(gate) * up)


def test_norm(device: Device) -> None:
    x, w = normal(5, 70), normal(70)
    close(run(device, lambda g, a, b: g.norm(a, b, 1e-5), x, w), rms_norm(x, w, 1e-5))


@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_mul_mat_f32(device: Device, tokens: int) -> None:
    w, x = normal(37, 64), normal(tokens, 64)
    close(run(device, Graph.mul_mat, w, x).reshape(tokens, 37), x @ w.T)


def test_mul_mat_f16(device: Device) -> None:
    """Sums in f16 are 32, of every 32nd product, rounded at each step: here to the bit."""
    w, x = normal(37, 512).astype(np.float16), normal(1, 512).astype(np.float16)
    found = run(device, Graph.mul_mat, w, x.astype(np.float32)).reshape(37)
    if not SUMS_IN_F16:
        close(found, w.astype(np.float32) @ x[0].astype(np.float32))
        return
    products = (w.astype(np.float64) * x).reshape(37, -1, 4, 8)  # f64 holds them, and each sum
    sums = np.zeros((37, 4, 8), np.float16)
    for step in range(products.shape[1]):
        sums = (sums + products[:, step]).astype(np.float16)
    halves = sums[:, :2] + sums[:, 2:]
    eight = (halves[:, 0] + halves[:, 1]).astype(np.float32)
    four = eight[:, :4] + eight[:, 4:]
    assert np.array_equal(found, (four[:, 0] + four[:, 1]) + (four[:, 2] + four[:, 3]))


def test_mul_mat_id(device: Device) -> None:
    stack, x = normal(6, 20, 32), normal(5, 1, 32)
    ids = np.array([[0, 5], [1, 2], [5, 4], [3, 0], [2, 2]], np.int32)
    want = np.einsum("tkfm,tm->tkf", stack[ids], x[:, 0])
    close(run(device, Graph.mul_mat_id, stack, x, ids), want)


def test_rope_rotates_the_leading_dims_in_halves(device: Device) -> None:
    x, at = normal(7, 3, 24), np.array([0, 1, 5, 17, 100, 1000, 2], np.int32)
    cos, sin = rotary_angles(at.astype(np.int64), 8, 1e4)
    want = rotate(x.copy(), cos, sin)
    # ggml multiplies frequencies up step by step: positions enter the error.
    close(run(device, lambda g, a, p: g.rope(a, p, 8, 1e4), x, at), want, 1e-4)


@pytest.mark.parametrize("tokens", [1, 4, 70])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention(device: Device, tokens: int, sinks: bool) -> None:
    heads, groups, dim, v_dim, rows, window = 4, 2, 24, 16, 75, 9
    q, k, v = normal(tokens, heads, dim), normal(groups, rows, dim), normal(groups, rows, v_dim)
    held = RNG.permutation(rows).astype(np.int64)
    at = np.arange(rows - tokens, rows, dtype=np.int64)
    behind = at[:, None] - held
    mask = np.where((behind >= 0) & (behind < window), 0, -np.inf).astype(np.float16)
    sink = normal(heads) if sinks else np.full(heads, -np.inf, np.float32)
    want = attend(q, at, Rows(k, v, held), window, sink)

    def build(g: Graph, *t: Tensor) -> Tensor:
        return g.attention(t[0], t[1], t[2], t[3], dim**-0.5, t[4] if sinks else None)

    found = run(device, build, q, k, v, mask, *([sink] if sinks else []))
    close(found.reshape(want.shape), want, 1e-5)


def test_top_k_and_get_rows(device: Device) -> None:
    scores = RNG.permutation(48).reshape(4, 12).astype(np.float32)

    def build(g: Graph, x: Tensor) -> Tensor:
        picked = g.get_rows(g.reshape(x, 1, 12, 4), g.top_k(x, 3))
        return g.reshape(picked, 3, 4)

    close(run(device, build, scores), -np.sort(-scores, axis=1)[:, :3])


def test_set_rows_writes_before_later_nodes_read(device: Device) -> None:
    def build(g: Graph, target: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        g.set_rows(target, rows, ids)
        return g.add(target, target)

    target, rows = normal(6, 4), normal(2, 4)
    want = target.copy()
    want[[5, 1]] = rows
    close(run(device, build, target, rows, np.array([5, 1], np.int64)), 2 * want)


def test_clamp_turns_nan_into_a_number(device: Device) -> None:
    x = np.array([[1.0, np.nan, -5.0, np.inf] * 9], np.float32)
    found = run(device, lambda g, a: g.clamp(a, -2.0, 3.0), x)
    assert found.reshape(-1)[:4].tolist() == [1.0, 3.0, -2.0, 3.0]


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_format_multiplies(device: Device, name: str) -> None:
    """Against the dequantised weight: what remains is rounding x to the dot product's format.

    q8_0 and q8_K round a block of 32 or 256 values to absmax / 127: for normal x the error of
    one value is at most absmax / 254, about 1.5 % of a standard deviation at 256 values, and
    errors add up like the terms themselves do. 2 % of the largest result covers it.
    """
    fmt = FORMATS[name]
    rows, columns = 24, 512
    packed = fmt.quantize(normal(rows, columns), np.ones(columns, np.float32))
    x = normal(6, columns)
    want = x @ fmt.dequantize(packed, columns).T
    context, graph, inputs = Context(device, 4), Graph(device, 16), Inputs(device)
    weight = context.new(fmt.ggml_type, (columns, rows))
    region = Region(device, packed.nbytes)
    g = device.ggml
    assert g.ggml_backend_tensor_alloc(region.buffer, weight.pointer, region.address) == 0
    g.ggml_backend_tensor_set(weight.pointer, packed.ctypes.data, 0, packed.nbytes)
    a = inputs.new(ggml.TYPE_F32, columns, 6)
    inputs.allocate()
    a.array()[...] = x
    out = graph.output(graph.mul_mat(weight, a))
    graph.finish()
    graph.compute()
    error = np.abs(out.array() - want).max() / np.abs(want).max()
    exact = {"F32": 1e-6, "F16": 2.5e-3 if SUMS_IN_F16 else 1e-3, "BF16": 8e-3}
    assert error < exact.get(name, 0.02)
    for owner in (graph, inputs, context, region):
        owner.close()


def test_huge_pages_are_asked_for_inside_a_buffer_only(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    class Libc:
        @staticmethod
        def madvise(start: ctypes.c_void_p, length: ctypes.c_size_t, advice: int) -> int:
            asked.append((start.value or 0, length.value))
            return -1  # as a kernel without huge pages

    monkeypatch.setattr(device, "_libc", Libc)
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    page = 2 << 20
    for address, nbytes in ((5 * page, 3 * page), (5 * page + 64, 3 * page), (64, page + 64)):
        device.use_huge_pages(address, nbytes)
    assert asked == [(5 * page, 3 * page), (6 * page, 2 * page)]


# --- bad calls raise ---


@pytest.mark.parametrize(
    "build",
    [
        lambda g, a, b, i: g.add(a, b),
        lambda g, a, b, i: g.add(a, i),
        lambda g, a, b, i: g.mul_mat(a, b),
        lambda g, a, b, i: g.mul_mat(i, a),
        lambda g, a, b, i: g.mul_mat_id(a, b, i),
        lambda g, a, b, i: g.norm(a, b, 1e-5),
        lambda g, a, b, i: g.swiglu(a, b),
        lambda g, a, b, i: g.reshape(a, 5, 5),
        lambda g, a, b, i: g.view(a, (8, 3), (32,), 16),
        lambda g, a, b, i: g.view(a, (0,), ()),
        lambda g, a, b, i: g.concat(a, b, 0),
        lambda g, a, b, i: g.get_rows(a, b),
        lambda g, a, b, i: g.set_rows(a, b, i),
        lambda g, a, b, i: g.top_k(a, 9),
        lambda g, a, b, i: g.rope(a, i, 4, 1e4),
        lambda g, a, b, i: g.attention(a, b, b, a, 1.0, None),
        lambda g, a, b, i: g.new(ggml.TYPE_F32, (0,)),
        lambda g, a, b, i: g.new(ggml.TYPE_F32, (1 << 41,)),
    ],
)
def test_wrong_shapes_raise(device: Device, build: Callable[..., Any]) -> None:
    inputs, graph = Inputs(device), Graph(device, 64)
    a = inputs.new(ggml.TYPE_F32, 8, 3)
    b = inputs.new(ggml.TYPE_F32, 7, 2)
    i = inputs.new(ggml.TYPE_I32, 5)
    with pytest.raises(BackendError, match="graph:"):
        build(graph, a, b, i)
    graph.close()
    inputs.close()


def test_a_full_context_raises(device: Device) -> None:
    context = Context(device, 2)
    context.new(ggml.TYPE_F32, (4,))
    context.new(ggml.TYPE_F32, (4,))
    with pytest.raises(BackendError, match="more tensors"):
        context.new(ggml.TYPE_F32, (4,))
    context.close()
    with pytest.raises(BackendError, match="closed"):
        context.new(ggml.TYPE_F32, (4,))


@pytest.mark.parametrize("threads", [0, -1, 513])
def test_thread_counts_are_checked(threads: int) -> None:
    with pytest.raises(UsageError, match="threads"):
        Device(threads)


@pytest.mark.parametrize(("name", "used"), [("AMX", False), ("CPU_REPACK", True)])
def test_amx_memory_is_left_out(name: str, used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights there would end the process at the first product: docs/decisions.md."""
    plain = Device(1).plain
    monkeypatch.setattr(ggml, "extra_buffer_types", lambda _b, _device: [plain.pointer])
    monkeypatch.setattr(
        Device, "_buffer_type", lambda _self, p: BufferType(p, name, plain.alignment)
    )
    device = Device(1)
    best = device.best_buffer_type(ggml.TYPE_F32, (32, 4), routed=False)
    assert (best is not device.plain) == used


# --- running ---


def test_graphs_share_scratch_and_know_when_it_moved() -> None:
    device = Device(2)
    small_in, big_in = Inputs(device), Inputs(device)
    x = small_in.new(ggml.TYPE_F32, 16, 2)
    y = big_in.new(ggml.TYPE_F32, 512, 64)
    small_in.allocate()
    big_in.allocate()
    small = Graph(device, 32)
    small_out = small.output(small.add(small.mul(x, x), x))
    small.finish()
    again = Graph(device, 32)
    again_out = again.output(again.mul(again.add(x, x), x))
    again.finish()
    x.array()[...] = 3
    for _ in range(3):  # neither touches what the other needs between runs
        small.compute()
        assert (small_out.array() == 12).all()
        again.compute()
        assert (again_out.array() == 18).all()
    big = Graph(device, 32)
    big_out = big.output(big.add(big.mul(y, y), y))
    big.finish()
    y.array()[...] = 2
    big.compute()
    assert (big_out.array() == 6).all()
    with pytest.raises(BackendError, match="scratch memory moved"):
        small.compute()
    for owner in (small, again, big, small_in, big_in):
        owner.close()
    device.close()
    device.close()
    with pytest.raises(BackendError, match="closed"):
        device.compute(1)


def test_a_cancelled_graph_stops_and_the_next_one_runs(device: Device) -> None:
    cancel = Cancel()
    with device.cancelled_by(cancel):
        run(device, Graph.add, normal(2, 3), normal(2, 3))
        cancel.set()
        with pytest.raises(Cancelled):
            run(device, Graph.add, normal(2, 3), normal(2, 3))
    close(run(device, Graph.add, np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)),
          np.full((2, 3), 2, np.float32))  # fmt: skip


def test_a_forked_process_is_refused(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with pytest.raises(BackendError, match="forked"):
        run(device, Graph.add, normal(2, 3), normal(2, 3))


def test_repack_is_chosen_by_what_ggml_supports(device: Device) -> None:
    for ggml_type in TYPES:
        for ne, routed in (((256, 64), False), ((256, 64, 4), True)):
            kind = device.best_buffer_type(ggml_type, ne, routed)
            assert kind.name == "CPU" or kind.name in {k.name for k in device._extra}
    # No reordering of plain floats, nor of a row count that fills no group.
    assert device.best_buffer_type(ggml.TYPE_F32, (256, 64), False).name == "CPU"
    assert device.best_buffer_type(2, (256, 63), False).name == "CPU"


def test_regions_cost_nothing_until_touched(device: Device) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    before = resident()
    region = Region(device, 1 << 32)
    assert resident() - before < 8 << 20
    memory = (ctypes.c_uint8 * region.nbytes).from_address(region.address)
    assert memory[0] == memory[(1 << 32) - 1] == 0
    region.close()
    region.close()
