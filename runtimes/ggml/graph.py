"""Tensors and graphs: the ggml operations we use, each checked before ggml would abort.

A `Context` owns tensor descriptions (no data). `Graph` adds the operations and, once
`finish`ed, can run. Shapes here are ggml's `ne`: innermost dimension first, always four.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from itertools import pairwise
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mimo_edge.errors import BackendError
from mimo_edge.runtimes.base import VERIFY_ROWS
from mimo_edge.runtimes.ggml import bindings as ggml
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.library import TYPES

Ne = tuple[int, int, int, int]

_NUMPY: dict[int, np.dtype[Any]] = {
    ggml.TYPE_F32: np.dtype(np.float32),
    ggml.TYPE_F16: np.dtype(np.float16),
    ggml.TYPE_I32: np.dtype(np.int32),
    ggml.TYPE_I64: np.dtype(np.int64),
}


# The head of a TensorStruct: type, buffer, ne, nb. One unpacking takes a quarter of the time that
# its fields take one by one, and a graph has hundreds of tensors.
_HEAD = Struct("@iP4q4N")
# freq_scale, ext_factor, attn_factor, beta_fast, beta_slow of ggml_rope_ext: plain RoPE
_NO_SCALING = (1.0, 0.0, 1.0, 0.0, 0.0)


class ExactRows(NamedTuple):
    """How a weight multiplies rows so that each gets the bits it gets alone: `together` of them
    in one product, or any number when each is a `planes` of its own. A product of n rows is
    computed as one of `computed[n - 1]`, where that takes less time; no entry: as it is."""

    together: int = VERIFY_ROWS
    planes: bool = False
    computed: tuple[int, ...] = ()


_ANY_ROWS = ExactRows()
# Queries up to which attention over f32 rows is computed as products.
FEW_QUERIES = 16


class Tensor:
    """A handle: pointer, type, ne and nb (strides in bytes) of one ggml tensor. `rows`, of a
    weight: see `Graph.mul_mat`."""

    __slots__ = ("_view", "nb", "ne", "pointer", "rows", "type")

    def __init__(self, pointer: int | None) -> None:
        if not pointer:
            raise BackendError("ggml has no room for another tensor")
        head = _HEAD.unpack(ctypes.string_at(pointer, _HEAD.size))
        self.pointer = pointer
        self.type: int = head[0]
        self.ne: Ne = head[2:6]
        self.nb: Ne = head[6:10]
        self.rows = _ANY_ROWS
        self._view: NDArray[Any] | None = None

    def __repr__(self) -> str:
        return f"<Tensor type {self.type} ne {list(self.ne)}>"

    @property
    def address(self) -> int:
        """Where its memory begins; 0 before it has any."""
        return ggml.TensorStruct.from_address(self.pointer).data or 0

    def array(self) -> NDArray[Any]:
        """The tensor's memory as a NumPy view, outermost dimension first, ones dropped in front.

        Valid while the buffer behind it lives; only for contiguous tensors of plain types that
        have been allocated.
        """
        if self._view is None:
            struct = ggml.TensorStruct.from_address(self.pointer)
            dtype = _NUMPY[self.type]
            _require(self.contiguous and bool(struct.data), "{} has no memory of its own", self)
            shape = list(reversed(self.ne))
            while len(shape) > 1 and shape[0] == 1:
                shape.pop(0)
            size = math.prod(shape) * dtype.itemsize
            memory = (ctypes.c_uint8 * size).from_address(struct.data)
            view: NDArray[Any] = np.ctypeslib.as_array(memory).view(dtype)
            self._view = view.reshape(shape)
        return self._view

    def bytes(self) -> NDArray[np.uint8]:
        """The tensor's memory as u8 [n]; otherwise as `array`."""
        struct = ggml.TensorStruct.from_address(self.pointer)
        _require(self.contiguous and bool(struct.data), "{} has no memory of its own", self)
        size = self.ne[3] * self.nb[3]
        memory = (ctypes.c_uint8 * size).from_address(struct.data)
        return np.ctypeslib.as_array(memory)

    @property
    def contiguous(self) -> bool:
        """Whether elements of a plain type follow each other without gaps."""
        expected = self.nb[0]
        for n, stride in zip(self.ne, self.nb, strict=True):
            if n != 1 and stride != expected:
                return False
            expected *= n
        return True


def _require(condition: bool, message: str, *what: object) -> None:
    """`what` fills the braces of the message: describing tensors takes longer than checking them,
    and building a graph checks hundreds."""
    if not condition:
        raise BackendError(f"graph: {message.format(*what)}")


class Context:
    """Room for `tensors` tensor descriptions (and one graph when `nodes` is given)."""

    def __init__(self, device: Device, tensors: int, nodes: int = 0) -> None:
        self.device = device
        self._left = tensors
        g = device.ggml
        size = int(g.ggml_tensor_overhead()) * tensors
        if nodes:
            size += int(g.ggml_graph_overhead_custom(nodes, False))
        self.pointer: int = g.ggml_init(ggml.InitParams(size, None, True)) or 0
        if not self.pointer:
            raise BackendError(f"ggml could not make a context of {size} bytes: out of memory")
        self.context_bytes = size

    def take(self) -> int:
        """The context pointer, after checking that one more tensor fits."""
        _require(bool(self.pointer), "the context is closed")
        _require(self._left > 0, "more tensors than the context was sized for")
        self._left -= 1
        return self.pointer

    def new(self, ggml_type: int, ne: Sequence[int]) -> Tensor:
        """A tensor without memory."""
        _require(
            1 <= len(ne) <= ggml.MAX_DIMS and all(0 < n < 1 << 40 for n in ne), "shape {}", list(ne)
        )
        shape = ggml.Ne(*ne, *(1,) * (ggml.MAX_DIMS - len(ne)))
        g = self.device.ggml
        return Tensor(g.ggml_new_tensor(self.take(), ggml_type, ggml.MAX_DIMS, shape))

    def close(self) -> None:
        """Free the descriptions. Twice is harmless."""
        if self.pointer:
            self.device.ggml.ggml_free(self.pointer)
            self.pointer = 0


class Inputs:
    """Tensors the host fills before each run, in memory of their own.

    An input the graph allocator placed could be overwritten by a later node of the same run.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._context = Context(device, 32)
        self._buffer = 0
        self._tensors: list[Tensor] = []
        self.nbytes = 0

    def new(self, ggml_type: int, *ne: int) -> Tensor:
        """A tensor that gets its memory at `allocate`."""
        tensor = self._context.new(ggml_type, ne)
        self._tensors.append(tensor)
        return tensor

    def allocate(self) -> None:
        """Place every tensor."""
        self.nbytes = place(self._device, self._tensors, self._make)

    def _make(self, size: int) -> tuple[int, int]:
        g = self._device.ggml
        self._buffer = g.ggml_backend_buft_alloc_buffer(self._device.plain.pointer, size) or 0
        if not self._buffer:
            raise BackendError(f"{size} bytes for graph inputs could not be allocated")
        return self._buffer, int(g.ggml_backend_buffer_get_base(self._buffer))

    def close(self) -> None:
        """Free the memory. Twice is harmless."""
        if self._buffer:
            self._device.ggml.ggml_backend_buffer_free(self._buffer)
            self._buffer = 0
        self._context.close()


def place(device: Device, tensors: Sequence[Tensor], make: Any, alignment: int = 0) -> int:
    """Lay `tensors` out one after the other in the buffer `make(size)` -> (buffer, base)."""
    g = device.ggml
    alignment = alignment or device.plain.alignment
    offsets, size = [], 0
    for tensor in tensors:
        offsets.append(size)
        needed = int(g.ggml_backend_buft_get_alloc_size(device.plain.pointer, tensor.pointer))
        size += -(-needed // alignment) * alignment
    buffer, base = make(max(size, alignment))
    for tensor, offset in zip(tensors, offsets, strict=True):
        if g.ggml_backend_tensor_alloc(buffer, tensor.pointer, base + offset) != 0:
            raise BackendError("ggml could not place a tensor")
    return size


class Graph(Context):
    """A graph under construction, then a runnable one.

    `exact`: every row of a product gets the bits it has when it is the only one.
    """

    def __init__(self, device: Device, nodes: int, exact: bool = False) -> None:
        super().__init__(device, nodes, nodes)
        self._exact = exact
        self._filled: dict[tuple[int, int], Tensor] = {}  # by tensor and rows: see `_filled_up`
        self._g = device.ggml
        self._graph: int = self._g.ggml_new_graph_custom(self.pointer, nodes, False)
        self._nodes = nodes
        self.epoch = -1

    # --- finishing ---

    def run_now(self, tensor: Tensor) -> None:
        """Put `tensor`, and what it needs, into the graph at this point of the order."""
        self._g.ggml_build_forward_expand(self._graph, tensor.pointer)

    def output(self, tensor: Tensor) -> Tensor:
        """Keep the tensor's memory until the run is over, and compute it."""
        self._g.ggml_set_output(tensor.pointer)
        whole = ggml.TensorStruct.from_address(tensor.pointer).view_src
        if whole:
            self._g.ggml_set_output(whole)  # whose memory it is
        self.run_now(tensor)
        return tensor

    def finish(self) -> None:
        """Allocate scratch memory; afterwards `compute` may be called."""
        finish_together([self])

    def compute(self) -> None:
        """Run the graph on the device."""
        _require(self.epoch == self.device.epoch, "scratch memory moved: build the graph again")
        self.device.compute(self._graph)

    # --- elementwise ---

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        self._check_broadcast("add", a, b)
        return Tensor(self._g.ggml_add(self.take(), a.pointer, b.pointer))

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        self._check_broadcast("mul", a, b)
        return Tensor(self._g.ggml_mul(self.take(), a.pointer, b.pointer))

    def div(self, a: Tensor, b: Tensor) -> Tensor:
        self._check_broadcast("div", a, b)
        return Tensor(self._g.ggml_div(self.take(), a.pointer, b.pointer))

    def scale(self, a: Tensor, factor: float, bias: float = 0.0) -> Tensor:
        _require(a.contiguous and a.type == ggml.TYPE_F32, "scale of {}", a)
        return Tensor(self._g.ggml_scale_bias(self.take(), a.pointer, factor, bias))

    def clamp(self, a: Tensor, low: float, high: float) -> Tensor:
        """NaN becomes `high`."""
        _require(a.type == ggml.TYPE_F32, "clamp of {}", a)
        return Tensor(self._g.ggml_clamp(self.take(), a.pointer, low, high))

    def sigmoid(self, a: Tensor) -> Tensor:
        _require(a.contiguous and a.type == ggml.TYPE_F32, "sigmoid of {}", a)
        return Tensor(self._g.ggml_sigmoid(self.take(), a.pointer))

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up."""
        _require(
            gate.ne == up.ne
            and gate.type == up.type == ggml.TYPE_F32
            and gate.contiguous
            and up.contiguous,
            "swiglu of {} and {}",
            gate,
            up,
        )
        return Tensor(self._g.ggml_swiglu_split(self.take(), gate.pointer, up.pointer))

    def norm(self, a: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm over the innermost dimension; ggml fuses the pair into one pass."""
        _require(
            a.type == weight.type == ggml.TYPE_F32
            and weight.ne == (a.ne[0], 1, 1, 1)
            and a.nb[0] == 4,
            "norm of {} by {}",
            a,
            weight,
        )
        normed = Tensor(self._g.ggml_rms_norm(self.take(), a.pointer, eps))
        return self.mul(normed, weight)

    # --- matrices ---

    def mul_mat(self, weight: Tensor, x: Tensor) -> Tensor:
        """weight {in, out} and x {in, T} -> {out, T}, f32."""
        _require(
            weight.ne[0] == x.ne[0]
            and x.type == ggml.TYPE_F32
            and x.ne[2] % weight.ne[2] == 0
            and x.ne[3] % weight.ne[3] == 0
            and weight.nb[0] <= weight.nb[1],
            "mul_mat of {} and {}",
            weight,
            x,
        )
        total = x.ne[1]
        if not self._exact or total <= weight.rows.together:
            rows = total
            if total <= len(weight.rows.computed) and x.ne[2:] == (1, 1):
                rows = weight.rows.computed[total - 1]
            if rows > total:
                x = self._filled_up(x, rows)
            product = Tensor(self._g.ggml_mul_mat(self.take(), weight.pointer, x.pointer))
            if rows > total:
                product = self.view(product, (product.ne[0], total), (product.nb[1],))
            return product
        if weight.rows.planes:
            x = self.view(x, (x.ne[0], 1, total), (x.nb[1], x.nb[1]))
            product = Tensor(self._g.ggml_mul_mat(self.take(), weight.pointer, x.pointer))
            return self.reshape(product, weight.ne[1], total)
        pieces = -(-total // weight.rows.together)
        bounds = [total * i // pieces for i in range(pieces + 1)]
        views = [
            self.view(x, (x.ne[0], end - start), (x.nb[1],), start * x.nb[1])
            for start, end in pairwise(bounds)
        ]
        return self.concat_all([self.mul_mat(weight, piece) for piece in views], 1)

    def _filled_up(self, x: Tensor, rows: int) -> Tensor:
        """x {n, T} and whatever behind it, {n, rows}; made once for all products of x."""
        key = x.pointer, rows
        if key not in self._filled:
            width, total = x.ne[:2]
            if rows % total:
                made = self._g.ggml_pad(self.take(), x.pointer, 0, rows - total, 0, 0)
            else:  # ggml copies whole rows here, and number by number above
                made = self._g.ggml_repeat_4d(self.take(), x.pointer, width, rows, 1, 1)
            self._filled[key] = Tensor(made)
        return self._filled[key]

    def mul_mat_id(self, stack: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        """stack {in, out, E}, x {in, 1 or K, T}, ids i32 {K, T} -> {out, K, T}.

        The ids themselves must lie in 0..E-1: whoever fills them checks that.
        """
        _require(
            stack.ne[0] == x.ne[0]
            and stack.ne[3] == x.ne[3] == 1
            and x.type == ggml.TYPE_F32
            and ids.type == ggml.TYPE_I32
            and ids.ne[1:] == (x.ne[2], 1, 1)
            and ids.ne[0] % x.ne[1] == 0
            and ids.ne[0] <= stack.ne[2],
            "mul_mat_id of {}, {} by {}",
            stack,
            x,
            ids,
        )
        return Tensor(self._g.ggml_mul_mat_id(self.take(), stack.pointer, x.pointer, ids.pointer))

    # --- shapes ---

    def view(
        self, a: Tensor, ne: Sequence[int], strides: Sequence[int] = (), offset: int = 0
    ) -> Tensor:
        """A window on `a`: `strides` are nb[1:] in bytes, as many as dimensions less one."""
        _require(1 <= len(ne) <= 3 and len(strides) == len(ne) - 1, "view {} of {}", list(ne), a)
        _require(all(n > 0 for n in ne) and offset >= 0, "view {} of {} at {}", list(ne), a, offset)
        last = (
            offset
            + self._row_bytes(a, ne[0])
            + sum((n - 1) * s for n, s in zip(ne[1:], strides, strict=True))
        )
        size = int(self._g.ggml_nbytes(a.pointer))
        _require(
            last <= size,
            "view {} at {} ends at {} of {} bytes of {}",
            list(ne),
            offset,
            last,
            size,
            a,
        )
        function = (self._g.ggml_view_1d, self._g.ggml_view_2d, self._g.ggml_view_3d)[len(ne) - 1]
        return Tensor(function(self.take(), a.pointer, *ne, *strides, offset))

    @staticmethod
    def _row_bytes(a: Tensor, elements: int) -> int:
        """Bytes of `elements` neighbours in a row of `a`, which must be whole blocks."""
        block = TYPES[a.type].blck_size if a.type in TYPES else 1
        _require(elements % block == 0, "{} elements of {} split a block of {}", elements, a, block)
        return elements // block * a.nb[0]

    def reshape(self, a: Tensor, *ne: int) -> Tensor:
        count = math.prod(a.ne)
        _require(
            len(ne) in (2, 3) and math.prod(ne) == count and a.contiguous,
            "reshape of {} to {}",
            a,
            list(ne),
        )
        function = self._g.ggml_reshape_2d if len(ne) == 2 else self._g.ggml_reshape_3d
        return Tensor(function(self.take(), a.pointer, *ne))

    def swap_rows(self, a: Tensor) -> Tensor:
        """{a, b, c} seen as {a, c, b}."""
        return Tensor(self._g.ggml_permute(self.take(), a.pointer, 0, 2, 1, 3))

    def contiguous(self, a: Tensor) -> Tensor:
        return Tensor(self._g.ggml_cont(self.take(), a.pointer))

    def copy_to(self, target: Tensor, a: Tensor) -> None:
        """Copy `a` into `target`, a persistent tensor of the same shape and type, now."""
        _require(a.ne == target.ne and a.type == target.type, "copy of {} to {}", a, target)
        self.run_now(Tensor(self._g.ggml_cpy(self.take(), a.pointer, target.pointer)))

    def cast(self, a: Tensor, ggml_type: int) -> Tensor:
        _require(a.type in _NUMPY, "cast of {}", a)
        return Tensor(self._g.ggml_cast(self.take(), a.pointer, ggml_type))

    def concat(self, a: Tensor, b: Tensor, dim: int) -> Tensor:
        same = all(x == y for d, (x, y) in enumerate(zip(a.ne, b.ne, strict=True)) if d != dim)
        _require(
            0 <= dim < 4 and same and a.type == b.type, "concat of {} and {} along {}", a, b, dim
        )
        return Tensor(self._g.ggml_concat(self.take(), a.pointer, b.pointer, dim))

    def concat_all(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """One or more tensors behind each other."""
        whole = parts[0]
        for part in parts[1:]:
            whole = self.concat(whole, part, dim)
        return whole

    def sum_rows(self, a: Tensor) -> Tensor:
        """{n, ...} -> {1, ...}."""
        _require(a.type == ggml.TYPE_F32 and a.nb[0] == 4, "sum_rows of {}", a)
        return Tensor(self._g.ggml_sum_rows(self.take(), a.pointer))

    # --- rows by index ---

    def get_rows(self, a: Tensor, ids: Tensor) -> Tensor:
        _require(
            ids.type == ggml.TYPE_I32
            and a.ne[2] == ids.ne[1]
            and a.ne[3] == ids.ne[2]
            and ids.ne[3] == 1,
            "get_rows of {} by {}",
            a,
            ids,
        )
        return Tensor(self._g.ggml_get_rows(self.take(), a.pointer, ids.pointer))

    def set_rows(self, target: Tensor, rows: Tensor, ids: Tensor) -> None:
        """Write rows {n, T} (f32) into target {n, R} at row ids i64 {T}, now.

        The ids must differ and lie in 0..R-1: whoever fills them checks that.
        """
        _require(
            target.ne[0] == rows.ne[0]
            and target.ne[2:] == rows.ne[2:] == (1, 1)
            and rows.type == ggml.TYPE_F32
            and rows.nb[0] == 4
            and ids.type == ggml.TYPE_I64
            and ids.ne == (rows.ne[1], 1, 1, 1)
            and rows.ne[1] <= target.ne[1],
            "set_rows of {} into {} by {}",
            rows,
            target,
            ids,
        )
        written = self._g.ggml_set_rows(self.take(), target.pointer, rows.pointer, ids.pointer)
        self.run_now(Tensor(written))

    def top_k(self, a: Tensor, k: int) -> Tensor:
        """a f32 {n, T} -> indices of the k largest, best first, i32 {k, T} (not contiguous).

        NaN is not allowed: the sort behind it would read out of bounds.
        """
        _require(
            a.type == ggml.TYPE_F32 and a.contiguous and 0 < k <= a.ne[0], "top {} of {}", k, a
        )
        order = Tensor(self._g.ggml_argsort(self.take(), a.pointer, ggml.SORT_DESCENDING))
        return self.view(order, (k, order.ne[1]), (order.nb[1],))

    def argmax(self, a: Tensor) -> Tensor:
        """a f32 {n, T} -> index of the largest of each row, i32 {T}; with NaN any index."""
        _require(a.type == ggml.TYPE_F32 and a.contiguous and a.ne[2:] == (1, 1), "argmax of {}", a)
        return Tensor(self._g.ggml_argmax(self.take(), a.pointer))

    # --- attention ---

    def rope(self, a: Tensor, positions: Tensor, dims: int, theta: float) -> Tensor:
        """Rotate the leading `dims` of a {D, heads, T}, pairs (d, d + dims/2), by position."""
        _require(
            a.type == ggml.TYPE_F32
            and a.nb[0] == 4
            and positions.type == ggml.TYPE_I32
            and positions.ne == (a.ne[2], 1, 1, 1)
            and 0 < dims <= a.ne[0]
            and dims % 2 == 0,
            "rope of {} by {}",
            a,
            positions,
        )
        return Tensor(
            self._g.ggml_rope_ext(
                self.take(),
                a.pointer,
                positions.pointer,
                None,
                dims,
                ggml.ROPE_NEOX,
                0,
                theta,
                *_NO_SCALING,
            )
        )

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, sinks: Tensor | None
    ) -> Tensor:
        """q {D, H, T} over k {D, S, G} and v {Dv, S, G} with f16 mask {S, T} -> {Dv, H, T}.

        No row of k and v may hold NaN or Inf, masked ones neither, where they are f32.
        """
        _require(
            q.ne[0] == k.ne[0]
            and k.ne[1:] == v.ne[1:]
            and q.ne[1] % k.ne[2] == 0
            and q.ne[3] == k.ne[3] == 1
            and q.type == ggml.TYPE_F32
            and q.contiguous
            and mask.type == ggml.TYPE_F16
            and mask.ne == (k.ne[1], q.ne[2], 1, 1)
            and mask.contiguous
            and (sinks is None or (sinks.type == ggml.TYPE_F32 and sinks.ne == (q.ne[1], 1, 1, 1))),
            "attention of {} over {}, {} with mask {} and sinks {}",
            q,
            k,
            v,
            mask,
            sinks,
        )
        if k.type == v.type == ggml.TYPE_F32 and q.ne[2] <= FEW_QUERIES:
            return self._attention_in_products(q, k, v, mask, scale, sinks)
        q = self.swap_rows(q)
        out = Tensor(
            self._g.ggml_flash_attn_ext(
                self.take(), q.pointer, k.pointer, v.pointer, mask.pointer, scale, 0.0, 0.0
            )
        )
        if sinks is not None:
            self._g.ggml_flash_attn_ext_add_sinks(out.pointer, sinks.pointer)
        return out

    def _attention_in_products(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, sinks: Tensor | None
    ) -> Tensor:
        """Of few queries over f32 rows: ggml's own operation takes a head and a row at a time, a
        product takes all rows and all heads that share a KV head."""
        g = self._g
        dim, heads, total = q.ne[:3]
        rows, groups = k.ne[1:3]
        shared = heads // groups
        # One product for each KV head, of the queries of all tokens: threads wait for each other
        # twice in every one. Whether a token's bits depend on the others, `rows.py` tries.
        if total > 1:
            q = self.contiguous(self.swap_rows(q))  # {D, T, H}
        queries = self._reshape_4d(q, dim, total * shared, groups, 1)
        found = Tensor(g.ggml_mul_mat(self.take(), k.pointer, queries.pointer))
        found = self._reshape_4d(found, rows, total, heads, 1)
        sees = self._reshape_4d(mask, rows, total, 1, 1)
        found = Tensor(g.ggml_soft_max_ext(self.take(), found.pointer, sees.pointer, scale, 0.0))
        if sinks is not None:
            g.ggml_soft_max_add_sinks(found.pointer, sinks.pointer)
        found = self._reshape_4d(found, rows, total, shared, groups)
        # {shared, S, G, T}
        weights = Tensor(g.ggml_permute(self.take(), found.pointer, 1, 3, 0, 2))
        # The sum over rows of value times weight.
        out = Tensor(g.ggml_out_prod(self.take(), v.pointer, weights.pointer))
        return self.reshape(out, v.ne[0], heads, total)

    def _reshape_4d(self, a: Tensor, *ne: int) -> Tensor:
        _require(math.prod(ne) == math.prod(a.ne) and a.contiguous, "reshape of {}", a)
        return Tensor(self._g.ggml_reshape_4d(self.take(), a.pointer, *ne))

    def _check_broadcast(self, name: str, a: Tensor, b: Tensor) -> None:
        _require(
            a.type == b.type == ggml.TYPE_F32
            and all(x % y == 0 for x, y in zip(a.ne, b.ne, strict=True))
            and a.nb[0] == b.nb[0] == 4,
            "{} of {} and {}",
            name,
            a,
            b,
        )


def finish_together(graphs: Sequence[Graph]) -> None:
    """Allocate scratch memory for graphs that run one after the other in one pass."""
    epoch = graphs[0].device.allocate([graph._graph for graph in graphs])
    for graph in graphs:
        graph.epoch = epoch
