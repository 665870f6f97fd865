"""Slots as ggml tensors: layers of different formats multiply from the same memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from expert_files import ExpertFile
from numpy.typing import NDArray

from mimo_edge.experts.cache import ExpertCache
from mimo_edge.quant.base import get_format
from mimo_edge.runtimes.ggml import bindings as ggml
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.graph import Context, Graph, Inputs, Tensor

WIDTH, ROWS, EXPERTS = 96, 40, 6  # no matrix fills whole pages
FORMATS = ("Q4_0", "Q8_0", "F16")
F32 = NDArray[np.float32]


def product(device: Device, stack: Tensor, x: F32, ids: NDArray[np.int32]) -> F32:
    """mul_mat_id of x [T, in] by ids [T, K] -> [T, K, out]."""
    inputs, graph = Inputs(device), Graph(device, 16)
    rows = inputs.new(ggml.TYPE_F32, x.shape[1], 1, x.shape[0])
    chosen = inputs.new(ggml.TYPE_I32, *ids.shape[::-1])
    inputs.allocate()
    out = graph.output(graph.mul_mat_id(stack, rows, chosen))
    graph.finish()
    rows.array().reshape(x.shape)[...] = x
    chosen.array().reshape(ids.shape)[...] = ids
    graph.compute()
    result: F32 = out.array().reshape(*ids.shape, -1).copy()
    graph.close()
    inputs.close()
    return result


def test_slots_are_tensors_of_every_layers_format(tmp_path: Path) -> None:
    """A region seen with a layer's type and the pool's stride as nb[2] gives, bit for bit, what
    the layer's own contiguous stack gives."""
    rng = np.random.default_rng(0)
    formats = [get_format(name) for name in FORMATS]
    packed = [
        fmt.quantize(rng.standard_normal((EXPERTS * ROWS, WIDTH), dtype=np.float32))
        for fmt in formats
    ]
    sizes = [(data.nbytes // EXPERTS,) * 3 for data in packed]
    file = ExpertFile(tmp_path / "x", rows=3, experts=EXPERTS, sizes=sizes, checksums=False)
    content = bytearray(file.path.read_bytes())
    for data, layer in zip(packed, file.table.layers, strict=True):
        for stack in layer.stacks:
            content[stack.offset : stack.offset + data.nbytes] = data.tobytes()
    file.path.write_bytes(content)
    device = Device(1)
    context = Context(device, 32)
    buffers = []
    try:
        with ExpertCache(file.table, 4) as cache:
            pool, g = cache.pool, device.ggml
            for step in range(12):
                row, kind = step % 3, step % 2
                ids = np.stack([rng.permutation(EXPERTS)[:2] for _ in range(2)])
                with cache.acquire(row + 1, ids) as ticket:
                    base, size = pool.address(kind), pool.region_bytes(kind)
                    buffers.append(g.ggml_backend_cpu_buffer_from_ptr(base, size))
                    made = context.new(formats[row].ggml_type, (WIDTH, ROWS, pool.count))
                    struct = ggml.TensorStruct.from_address(made.pointer)
                    struct.nb[2] = pool.strides[kind]
                    struct.nb[3] = pool.strides[kind] * pool.count
                    assert g.ggml_backend_tensor_alloc(buffers[-1], made.pointer, base) == 0
                    x = rng.standard_normal((2, WIDTH), dtype=np.float32)
                    found = product(device, Tensor(made.pointer), x, ticket.slot_ids)
                inputs = Inputs(device)
                whole = inputs.new(formats[row].ggml_type, WIDTH, ROWS, EXPERTS)
                inputs.allocate()
                g.ggml_backend_tensor_set(
                    whole.pointer, packed[row].ctypes.data, 0, packed[row].nbytes
                )
                expected = product(device, whole, x, ids.astype(np.int32))
                inputs.close()
                np.testing.assert_array_equal(found, expected)
            assert cache.stats().total().evictions > 0
            for buffer in buffers:
                g.ggml_backend_buffer_free(buffer)
    finally:
        context.close()
        device.close()
