"""Importance matrices: sums against NumPy, files against gguf-py's reader and writer."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mimo_edge.errors import BundleError, ExportError, QuantError, UsageError
from mimo_edge.quant.base import get_format
from mimo_edge.quant.imatrix import Imatrix

F32 = NDArray[np.float32]
Q, GATE = "blk.0.attn_q.weight", "blk.1.ffn_gate_exps.weight"


def inputs(rows: int, cols: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def filled() -> Imatrix:
    imatrix = Imatrix(["train.txt", "命令.txt"], chunk_size=8)
    imatrix.add(Q, inputs(20, 96))
    imatrix.add(Q, inputs(13, 96, 1))
    for expert, rows in ((0, 5), (2, 9), (3, 0)):
        imatrix.add_expert(GATE, expert, 4, inputs(rows, 64, expert))
    return imatrix


def importance(imatrix: Imatrix, name: str, expert: int | None = None) -> F32:
    values = imatrix.importance(name, expert)
    assert values is not None
    return values


def test_importance_is_the_mean_square() -> None:
    imatrix = filled()
    both = np.concatenate([inputs(20, 96), inputs(13, 96, 1)]).astype(np.float64)
    np.testing.assert_allclose(importance(imatrix, Q), (both**2).mean(axis=0), rtol=1e-6)
    expert = inputs(9, 64, 2).astype(np.float64)
    np.testing.assert_allclose(importance(imatrix, GATE, 2), (expert**2).mean(axis=0), rtol=1e-6)
    assert importance(imatrix, Q).dtype == np.float32
    assert imatrix.counts(GATE).tolist() == [5, 0, 9, 0]
    assert imatrix.names == [Q, GATE]


def test_many_small_additions_do_not_drift() -> None:
    """A float32 sum would stop growing here."""
    imatrix = Imatrix()
    imatrix.add(Q, np.full((1, 4), 4096, dtype=np.float32))
    one = np.ones((1, 4), dtype=np.float32)
    for _ in range(1000):
        imatrix.add(Q, one)
    assert importance(imatrix, Q)[0] == np.float32((4096.0**2 + 1000) / 1001)


def test_what_was_never_seen_is_none_and_listed() -> None:
    imatrix = filled()
    assert imatrix.importance(GATE, 1) is None
    assert imatrix.importance(GATE, 3) is None
    assert imatrix.unseen_experts() == [(GATE, 1), (GATE, 3)]
    assert imatrix.missed() == []
    assert imatrix.importance("output.weight") is None
    assert imatrix.missed() == ["output.weight"]
    imatrix.add_expert(GATE, 1, 4, np.zeros((2, 64), dtype=np.float32))
    assert imatrix.importance(GATE, 1) is None  # seen, but it says nothing
    assert imatrix.unseen_experts() == [(GATE, 3)]


def test_wrong_calls_are_errors() -> None:
    imatrix = filled()
    with pytest.raises(QuantError, match="4 experts: say which"):
        imatrix.importance(GATE)
    with pytest.raises(QuantError, match="expert 4 of 4"):
        imatrix.importance(GATE, 4)
    with pytest.raises(QuantError, match="expert -1 of 4"):
        imatrix.importance(GATE, -1)
    with pytest.raises(QuantError, match="expert 4 of 4"):
        imatrix.add_expert(GATE, 4, 4, inputs(1, 64))
    with pytest.raises(QuantError, match=r"\[5, 64\], before \[4, 64\]"):
        imatrix.add_expert(GATE, 0, 5, inputs(1, 64))
    with pytest.raises(QuantError, match=r"\[1, 95\], before \[1, 96\]"):
        imatrix.add(Q, inputs(1, 95))
    with pytest.raises(QuantError, match="float64"):
        imatrix.add(Q, inputs(1, 96).astype(np.float64))
    with pytest.raises(QuantError, match="does not fit"):
        imatrix.add("x" * 56, inputs(1, 96))
    with pytest.raises(QuantError, match="no tensor 'z'"):
        imatrix.counts("z")
    with pytest.raises(UsageError, match="chunk_size 0"):
        Imatrix(chunk_size=0)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_broken_activations_are_refused_and_leave_nothing(value: float) -> None:
    imatrix = filled()
    before = importance(imatrix, Q)
    bad = inputs(3, 96)
    bad[1, 7] = value
    with np.errstate(over="ignore"), pytest.raises(QuantError, match="NaN, infinity"):
        imatrix.add(Q, bad)
    np.testing.assert_array_equal(importance(imatrix, Q), before)
    assert imatrix.counts(Q).tolist() == [33]


def test_file_is_what_gguf_py_reads(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    imatrix = filled()
    imatrix.write(path)
    reader = gguf.GGUFReader(path)
    assert [key for key in reader.fields if not key.startswith("GGUF.")] == [
        "general.type",
        "imatrix.datasets",
        "imatrix.chunk_count",
        "imatrix.chunk_size",
    ]
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.datasets").contents() == ["train.txt", "命令.txt"]
    assert reader.get_field("imatrix.chunk_count").contents() == imatrix.chunk_count == 33 // 8
    assert reader.get_field("imatrix.chunk_size").contents() == 8
    tensors = {t.name: t for t in reader.tensors}
    assert list(tensors) == [f"{n}.{s}" for n in (Q, GATE) for s in ("in_sum2", "counts")]
    assert tensors[f"{Q}.in_sum2"].shape.tolist() == [96]
    assert tensors[f"{Q}.counts"].shape.tolist() == [1]
    assert tensors[f"{GATE}.in_sum2"].shape.tolist() == [64, 4]
    assert tensors[f"{GATE}.counts"].shape.tolist() == [1, 4]
    assert tensors[f"{GATE}.counts"].data.ravel().tolist() == [5, 0, 9, 0]
    expected = np.square(inputs(9, 64, 2).astype(np.float64)).sum(axis=0).astype(np.float32)
    np.testing.assert_array_equal(tensors[f"{GATE}.in_sum2"].data[2], expected)


class PlainWriter(gguf.GGUFWriter):  # type: ignore[misc]
    """llama-imatrix writes no general.architecture."""

    def add_architecture(self) -> None:
        pass


def gguf_py_file(path: Path, tensors: dict[str, F32], **keys: Any) -> Path:
    writer = PlainWriter(path, "imatrix")
    writer.add_type(keys.get("kind", "imatrix"))
    writer.add_array("imatrix.datasets", keys.get("datasets", ["train.txt", "命令.txt"]))
    writer.add_uint32("imatrix.chunk_count", 4)
    writer.add_uint32("imatrix.chunk_size", keys.get("chunk_size", 8))
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_bytes_are_those_of_gguf_pys_writer(tmp_path: Path) -> None:
    ours = tmp_path / "ours.gguf"
    imatrix = filled()
    imatrix.write(ours)
    sums = [np.square(inputs(n, 64, e).astype(np.float64)).sum(0) for e, n in ((0, 5), (2, 9))]
    q = sum(np.square(inputs(n, 96, e).astype(np.float64)).sum(0) for e, n in ((0, 20), (1, 13)))
    theirs = gguf_py_file(
        tmp_path / "theirs.gguf",
        {
            f"{Q}.in_sum2": np.asarray(q, dtype=np.float32),
            f"{Q}.counts": np.array([33], dtype=np.float32),
            f"{GATE}.in_sum2": np.stack([sums[0], 0 * sums[0], sums[1], 0 * sums[0]]).astype("f4"),
            f"{GATE}.counts": np.array([[5], [0], [9], [0]], dtype=np.float32),
        },
    )
    assert ours.read_bytes() == theirs.read_bytes()


def test_reading_back_gives_the_same_importance_and_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "1.gguf", tmp_path / "2.gguf"
    filled().write(first)
    back = Imatrix.read(first)
    assert (back.names, back.datasets, back.chunk_size) == (
        [Q, GATE],
        ("train.txt", "命令.txt"),
        8,
    )
    np.testing.assert_array_equal(importance(back, Q), importance(filled(), Q))
    np.testing.assert_array_equal(importance(back, GATE, 2), importance(filled(), GATE, 2))
    assert back.unseen_experts() == [(GATE, 1), (GATE, 3)]
    back.write(second)
    assert second.read_bytes() == first.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["1.gguf", "2.gguf"]


def test_adding_to_a_file_that_was_read(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    filled().write(path)
    back = Imatrix.read(path)
    back.add_expert(GATE, 1, 4, inputs(7, 64, 8))
    back.write(path)  # over the file it was read from
    again = Imatrix.read(path)
    assert again.counts(GATE).tolist() == [5, 7, 9, 0]
    expected = np.square(inputs(7, 64, 8).astype(np.float64)).mean(axis=0)
    np.testing.assert_allclose(importance(again, GATE, 1), expected, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 70),
    st.lists(st.integers(0, 3), min_size=5, max_size=5),
    st.integers(0, 1000),
)
def test_round_trip_of_any_shape(experts: int, cols: int, rows: list[int], seed: int) -> None:
    imatrix = Imatrix()
    for expert in range(experts):
        imatrix.add_expert("t.weight", expert, experts, inputs(rows[expert], cols, seed + expert))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "i.gguf"
        imatrix.write(path)
        back = Imatrix.read(path)
        assert back.counts("t.weight").tolist() == imatrix.counts("t.weight").tolist()
        for expert in range(experts):
            a, b = imatrix.importance("t.weight", expert), back.importance("t.weight", expert)
            assert (a is None) == (b is None) == (rows[expert] == 0)
            if a is not None and b is not None:
                np.testing.assert_array_equal(a, b)


def test_a_shared_count_is_spread_over_the_experts(tmp_path: Path) -> None:
    """What conversion from the old .dat format leaves behind."""
    sums = np.square(inputs(3, 64))
    path = gguf_py_file(
        tmp_path / "i.gguf", {"t.in_sum2": sums, "t.counts": np.array([16], dtype=np.float32)}
    )
    imatrix = Imatrix.read(path)
    assert imatrix.counts("t").tolist() == [16, 16, 16]
    np.testing.assert_array_equal(importance(imatrix, "t", 2), sums[2] / 16)


def test_weighted_quantisation_uses_it(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((64, 256)) * 10.0 ** rng.uniform(-2, 0, 256)).astype(np.float32)
    imatrix = Imatrix()
    imatrix.add(Q, x)
    imatrix.write(path)
    weights = importance(Imatrix.read(path), Q)
    w, fmt = inputs(32, 256, 2), get_format("Q4_K")
    plain, weighted = fmt.quantize(w), fmt.quantize(w, weights)
    assert plain.tobytes() != weighted.tobytes()

    # The point of it all: outputs of the layer on these inputs are closer.
    def output_error(raw: NDArray[np.uint8]) -> float:
        return float(np.linalg.norm(x @ (fmt.dequantize(raw, 256) - w).T))

    assert output_error(weighted) < 0.9 * output_error(plain)


SUMS, COUNT = np.ones(64, dtype=np.float32), np.ones(1, dtype=np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"t.in_sum2": SUMS}, "no tensor 't.counts'"),
        ({"t.counts": COUNT}, "no tensor 't.in_sum2'"),
        ({"t.weight": SUMS}, "neither in_sum2 nor counts"),
        ({"t.in_sum2": SUMS, "t.counts": COUNT * np.nan}, "count that is negative or not"),
        ({"t.in_sum2": SUMS, "t.counts": -COUNT}, "count that is negative or not"),
        ({"t.in_sum2": SUMS * np.nan, "t.counts": COUNT}, "sum of squares that is negative"),
        ({"t.in_sum2": -SUMS, "t.counts": COUNT}, "sum of squares that is negative"),
        ({"t.in_sum2": SUMS, "t.counts": np.ones(3, dtype=np.float32)}, "1 matrices and 3"),
        ({"t.in_sum2": SUMS.astype(np.float16), "t.counts": COUNT}, "is F16, not F32"),
    ],
)
def test_inconsistent_files_are_errors(
    tmp_path: Path, tensors: dict[str, F32], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        Imatrix.read(gguf_py_file(tmp_path / "i.gguf", tensors))


def test_files_of_another_kind_are_errors(tmp_path: Path) -> None:
    good = {"t.in_sum2": SUMS, "t.counts": COUNT}
    with pytest.raises(BundleError, match="type 'model', not an importance"):
        Imatrix.read(gguf_py_file(tmp_path / "a.gguf", good, kind="model"))
    with pytest.raises(BundleError, match="chunk_size = 0"):
        Imatrix.read(gguf_py_file(tmp_path / "b.gguf", good, chunk_size=0))
    with pytest.raises(BundleError, match="not a list of strings"):
        Imatrix.read(gguf_py_file(tmp_path / "c.gguf", good, datasets=[1, 2]))
    with pytest.raises(BundleError, match="no file"):
        Imatrix.read(tmp_path / "missing.gguf")
    (tmp_path / "old.dat").write_bytes(b"\x01\0\0\0\x05\0\0\0hello")
    with pytest.raises(BundleError, match="GGUF"):
        Imatrix.read(tmp_path / "old.dat")


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "whole.gguf"
    filled().write(path)
    data = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    # The last tensor (4 counts) is padded to 32 bytes; losing only padding loses nothing.
    for size in [*range(0, len(data) - 16, 7), len(data) - 17]:
        cut.write_bytes(data[:size])
        with pytest.raises(BundleError):
            Imatrix.read(cut)


def test_flipped_header_bytes_never_escape_as_other_errors(tmp_path: Path) -> None:
    path = tmp_path / "whole.gguf"
    filled().write(path)
    data = path.read_bytes()
    header = data.index(b"counts", 300) + 40
    damaged = tmp_path / "damaged.gguf"
    for at in range(0, header):
        flipped = bytearray(data)
        flipped[at] ^= 0x81
        damaged.write_bytes(flipped)
        try:
            Imatrix.read(damaged)
        except BundleError:
            continue


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "imatrix.gguf"
    filled().write(path)
    before = path.read_bytes()

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    other = Imatrix()
    other.add(Q, inputs(3, 8))
    with pytest.raises(ExportError, match="No space left"):
        other.write(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["imatrix.gguf"]
    with pytest.raises(ExportError, match="cannot write"):
        other.write(tmp_path / "no folder" / "imatrix.gguf")


def test_an_empty_matrix_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(QuantError, match="empty"):
        Imatrix().write(tmp_path / "imatrix.gguf")
    assert not os.listdir(tmp_path)
