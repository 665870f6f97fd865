"""Computing more rows than there are: the same bits, chosen by time alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from test_exact_rows import WIDE, rows_of
from test_ggml_backend import packed

from mimo_edge.runtimes.base import F32, VERIFY_ROWS
from mimo_edge.runtimes.ggml import bindings as ggml
from mimo_edge.runtimes.ggml import resident, row_counts
from mimo_edge.runtimes.ggml.backend import GgmlBackend
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.graph import Context, ExactRows, Graph, Inputs, Tensor
from mimo_edge.runtimes.ggml.row_counts import computed_rows, fastest


@pytest.mark.parametrize(
    ("seconds", "computed"),
    [
        ([1, 2, 3, 4], (1, 2, 3, 4)),
        ([1.2, 2.2, 3.3, 1.0], (4, 4, 4, 4)),
        ([1.0, 2.2, 3.3, 1.2], (1, 4, 4, 4)),
        ([1.0, 0.9, 1.5, 1.4], (2, 2, 4, 4)),
        ([1.0, 1.04, 1.0, 0.96], (1, 4, 3, 4)),  # a few percent decide nothing
    ],
)
def test_more_rows_only_where_they_take_less_time(
    seconds: list[float], computed: tuple[int, ...]
) -> None:
    assert fastest(seconds) == computed


class Weights:
    """Two matrices {256, 64} and {128, 32} of random f32 weights in plain memory."""

    def __init__(self) -> None:
        self.device = Device(1)
        self.context = Context(self.device, 2)
        self.inputs = Inputs(self.device)
        self.tensors = [self.inputs.new(ggml.TYPE_F32, *ne) for ne in ((256, 64), (128, 32))]
        self.inputs.allocate()
        rng = np.random.default_rng(0)
        for tensor in self.tensors:
            tensor.array()[...] = rng.standard_normal(tensor.array().shape)

    def close(self) -> None:
        self.inputs.close()
        self.context.close()
        self.device.close()


@pytest.fixture
def weights() -> Iterator[Weights]:
    made = Weights()
    yield made
    made.close()


def ticks(seconds: Sequence[float]) -> Iterator[float]:
    """Readings of a clock for runs that take `seconds` by turns."""
    now = 0.0
    while True:
        for taken in seconds:
            yield now
            now += taken
            yield now


def test_the_faster_number_is_measured(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_counts, "LEAST_BYTES", 0)
    for seconds, computed in (([3, 4, 9, 2], (4, 4, 4, 4)), ([1, 4, 9, 2], (1, 4, 4, 4))):
        clock = ticks(seconds).__next__
        assert computed_rows(weights.device, weights.tensors, clock) == computed
    assert computed_rows(weights.device, weights.tensors, ticks([1, 2, 3, 4]).__next__) == ()


def test_weights_that_caches_keep_are_left_alone(weights: Weights) -> None:
    def no_clock() -> float:
        raise AssertionError("nothing should be measured")

    assert computed_rows(weights.device, weights.tensors, no_clock) == ()


@pytest.mark.parametrize("total", [1, 2, 3, 4, 5])
def test_products_of_more_rows_are_cut_to_those_there_are(weights: Weights, total: int) -> None:
    """Views into a longer x, one product the input of a sum, one an output of the graph."""
    for weight in weights.tensors:
        weight.rows = ExactRows(computed=(4,) * VERIFY_ROWS)
    inputs, g = Inputs(weights.device), Graph(weights.device, 32)
    try:
        x = inputs.new(ggml.TYPE_F32, 384, total)
        inputs.allocate()
        x.array()[...] = np.random.default_rng(1).standard_normal(x.array().shape)
        big, small = weights.tensors
        left = g.view(x, (256, total), (x.nb[1],))
        right = g.view(x, (128, total), (x.nb[1],), 256 * 4)
        summed = g.output(g.add(g.mul_mat(big, left), g.mul_mat(big, left)))
        plain = g.output(g.mul_mat(small, right))
        g.finish()
        for _ in range(2):
            g.compute()
            rows = x.array().reshape(total, -1)
            pairs: list[tuple[Tensor, F32]] = [
                (summed, 2 * rows[:, :256] @ big.array().T),
                (plain, rows[:, 256:] @ small.array().T),
            ]
            for found, want in pairs:
                assert found.ne[:2] == (want.shape[1], total)
                np.testing.assert_allclose(
                    found.array().reshape(want.shape), want, rtol=1e-4, atol=1e-4
                )
    finally:
        g.close()
        inputs.close()


def test_an_answer_has_the_same_bits_whatever_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single passes and verifies of a model whose reordered matrices compute four rows for one,
    two or three."""

    def found(computed: tuple[int, ...], widths: bool) -> tuple[F32, F32]:
        asked: list[Tensor] = []

        def chosen(_: Device, weights: Sequence[Tensor]) -> tuple[int, ...]:
            asked.extend(weights)
            return computed

        monkeypatch.setattr(resident, "computed_rows", chosen)
        backend = GgmlBackend(packed(WIDE, "Q4_0"), threads=2)
        try:
            if backend.weight_bytes.keys() - {"CPU"}:  # ggml reorders here
                assert asked
            return rows_of(backend, widths, 40, 70)
        finally:
            backend.close()

    want = found((), False)
    for computed in ((4, 4, 4, 4), (1, 4, 4, 4), (2, 2, 4, 4)):
        for widths in (False, True):
            for a, b in zip(found(computed, widths), want, strict=True):
                assert np.array_equal(a.view(np.int32), b.view(np.int32))
