"""The safetensors reader: against the safetensors package, and against hostile files."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_factory import KINDS, Kind, stored, write_checkpoint, write_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimo_edge.errors import CheckpointError
from mimo_edge.export import safetensors_file
from mimo_edge.export.safetensors_file import SafetensorsFile


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A container with any header: bytes as they are, anything else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + text + data)
    return path


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "U8") -> Any:
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    tensors = {
        "a": stored(np.arange(12, dtype=np.float32).reshape(3, 4)),
        "b": stored(np.arange(6, dtype=np.uint16).reshape(3, 2)),
        "empty": stored(np.zeros((0, 5), dtype=np.float32)),
        "scalar": stored(np.array(7, dtype=np.float32)),
    }
    write_safetensors(path, tensors, {"format": "pt"})
    return path


def test_reads_whole_tensors_and_rows(small: Path) -> None:
    file = SafetensorsFile(small)
    assert file.metadata == {"format": "pt"}
    assert np.array_equal(file.read("a"), np.arange(12, dtype=np.float32).reshape(3, 4))
    assert np.array_equal(file.read_rows("b", 1, 3), [[2, 3], [4, 5]])
    assert file.read_rows("a", 2, 2).shape == (0, 4)
    assert file.read("empty").shape == (0, 5)
    assert file.read_rows("empty", 0, 0).shape == (0, 5)
    assert file.read("scalar").shape == ()
    assert file.read("scalar") == 7
    assert file.tensors["b"].nbytes == 12
    assert file.tensors["b"].file == "small.safetensors"


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (2, 1), (0, 4)])
def test_refuses_rows_outside(small: Path, start: int, stop: int) -> None:
    with pytest.raises(CheckpointError, match="which has 3"):
        SafetensorsFile(small).read_rows("a", start, stop)


def test_refuses_an_unknown_name(small: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor 'c'"):
        SafetensorsFile(small).read("c")


@pytest.mark.oracle
def test_reads_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    save = pytest.importorskip("safetensors.torch").save_file
    rng = np.random.default_rng(0)
    raw = torch.from_numpy(rng.integers(0, 256, (6, 64), dtype=np.uint8))
    tensors = {
        "u8": raw,
        "bool": raw > 100,
        "i8": raw.view(torch.int8),
        "i16": raw.view(torch.int16),
        "i32": raw.view(torch.int32),
        "i64": raw.view(torch.int64),
        "f16": raw.view(torch.float16),
        "bf16": raw.view(torch.bfloat16),
        "f32": raw.view(torch.float32),
        "f64": raw.view(torch.float64),
        "e4m3": raw.view(torch.float8_e4m3fn),
        "e5m2": raw.view(torch.float8_e5m2),
        "e8m0": raw.view(torch.float8_e8m0fnu),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
    }
    path = tmp_path / "theirs.safetensors"
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save(tensors, path, {"who": "safetensors"})
    file = SafetensorsFile(path)
    assert file.metadata == {"who": "safetensors"}
    assert set(file.tensors) == set(tensors)
    for name, tensor in tensors.items():
        ours = file.read(name)
        assert ours.shape == tuple(tensor.shape)
        theirs = tensor.contiguous().flatten().view(torch.uint8).numpy()
        assert ours.tobytes() == theirs.tobytes(), name
        if tensor.ndim == 2 and len(tensor):
            assert file.read_rows(name, 2, 5).tobytes() == ours[2:5].tobytes()


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
def test_the_safetensors_package_reads_the_factory(tmp_path: Path, kind: Kind) -> None:
    """The factory writes real safetensors files, and both readers see the same bytes."""
    torch = pytest.importorskip("torch")
    safe_open = pytest.importorskip("safetensors").safe_open
    folder, _ = write_checkpoint(tmp_path, kind)
    for path in folder.glob("*.safetensors"):
        file = SafetensorsFile(path)
        with safe_open(path, framework="pt") as theirs:
            assert set(theirs.keys()) == set(file.tensors)
            for name in file.tensors:
                tensor = theirs.get_tensor(name)
                data = tensor.contiguous().flatten().view(torch.uint8).numpy()
                assert file.read(name).tobytes() == data.tobytes()


# --- Damaged and hostile files ------------------------------------------------------------

HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty file": (lambda p: p.write_bytes(b""), "too few"),
    "seven bytes": (lambda p: p.write_bytes(b"\0" * 7), "too few"),
    "length only": (lambda p: write_raw(p, b""), "does not start"),
    "header longer than the file": (lambda p: write_raw(p, {}, length=999), "999 bytes"),
    "absurd header length": (lambda p: write_raw(p, {}, length=2**63 + 5), "more than"),
    "header of 100 MB": (lambda p: write_raw(p, {}, length=100_000_000), "more than"),
    "not JSON": (lambda p: write_raw(p, b"{oops}"), "not valid JSON"),
    "a list": (lambda p: write_raw(p, []), "does not start"),
    "trailing text": (lambda p: write_raw(p, b"{} {}"), "not valid JSON"),
    "not UTF-8": (lambda p: write_raw(p, b'{"\xff": 1}'), "UTF-8"),
    "UTF-16": (lambda p: write_raw(p, "{}".encode("utf-16-le")), "not valid JSON"),
    "lone surrogate": (
        lambda p: write_raw(p, b'{"\\ud800": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
        "not Unicode",
    ),
    "nested deeply": (lambda p: write_raw(p, b'{"a":' + b"[" * 200_000), "nested too deeply"),
    "too many brackets": (lambda p: write_raw(p, b'{"a":' + b"[" * 600_000), "more than 262144"),
    "too many braces": (lambda p: write_raw(p, b"{" * 300_000), "more than 262144"),
    "huge integer": (
        lambda p: write_raw(
            p, b'{"a":{"dtype":"U8","shape":[' + b"9" * 9999 + b'],"data_offsets":[0,0]}}'
        ),
        "not valid JSON",
    ),
    "large integer": (lambda p: write_raw(p, {"a": entry(0, 0, [10**4000])}), "sizes"),
    "duplicate tensor": (
        lambda p: write_raw(
            p,
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"x",
        ),
        "'a' twice",
    ),
    "duplicate key": (
        lambda p: write_raw(
            p, b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"x"
        ),
        "'dtype' twice",
    ),
    "NaN": (lambda p: write_raw(p, b'{"a":NaN}'), "not a JSON number"),
    "metadata of numbers": (lambda p: write_raw(p, {"__metadata__": {"a": 1}}), "table of strings"),
    "metadata a list": (lambda p: write_raw(p, {"__metadata__": ["a"]}), "table of strings"),
    "entry a number": (lambda p: write_raw(p, {"a": 3}), "not described"),
    "entry lacks shape": (
        lambda p: write_raw(p, {"a": {"dtype": "U8", "data_offsets": [0, 0]}}),
        "not described",
    ),
    "entry with more": (lambda p: write_raw(p, {"a": entry(0, 0) | {"x": 1}}), "not described"),
    "unknown dtype": (lambda p: write_raw(p, {"a": entry(0, 1, dtype="Q4")}, b"x"), "dtype 'Q4'"),
    "dtype a list": (lambda p: write_raw(p, {"a": entry(0, 1) | {"dtype": []}}, b"x"), "dtype"),
    "negative size": (lambda p: write_raw(p, {"a": entry(0, 1, [-1])}, b"x"), "sizes"),
    "boolean size": (lambda p: write_raw(p, {"a": entry(0, 1, [True])}, b"x"), "sizes"),
    "float size": (lambda p: write_raw(p, {"a": entry(0, 1, [1.0])}, b"x"), "sizes"),
    "rank 9": (lambda p: write_raw(p, {"a": entry(0, 1, [1] * 9)}, b"x"), "up to 8 sizes"),
    "absurd size": (lambda p: write_raw(p, {"a": entry(0, 1, [1 << 60])}, b"x"), "sizes"),
    "overflowing product": (
        lambda p: write_raw(p, {"a": entry(0, 0, [1 << 40] * 8)}),
        "offsets span 0",
    ),
    "three offsets": (
        lambda p: write_raw(p, {"a": entry(0, 1) | {"data_offsets": [0, 1, 2]}}, b"x"),
        "two offsets",
    ),
    "negative offset": (lambda p: write_raw(p, {"a": entry(-1, 0, [1])}, b"x"), "two offsets"),
    "begin after end": (lambda p: write_raw(p, {"a": entry(2, 1, [1])}, b"xx"), "begins at byte 2"),
    "wrong nbytes": (lambda p: write_raw(p, {"a": entry(0, 5, [2], "F32")}, b"x" * 5), "needs 8"),
    "half a byte": (lambda p: write_raw(p, {"a": entry(0, 1, [3], "F4")}, b"x"), "needs 1.5"),
    "overlap": (lambda p: write_raw(p, {"a": entry(0, 2), "b": entry(1, 3)}, b"xyz"), "overlaps"),
    "same bytes": (lambda p: write_raw(p, {"a": entry(0, 2), "b": entry(0, 2)}, b"xy"), "overlaps"),
    "hole": (lambda p: write_raw(p, {"a": entry(0, 1), "b": entry(2, 3)}, b"xyz"), "hole after"),
    "hole at the start": (lambda p: write_raw(p, {"a": entry(1, 2)}, b"xy"), "hole after"),
    "bytes left over": (lambda p: write_raw(p, {"a": entry(0, 1)}, b"xy"), "the file has 2"),
    "data cut": (lambda p: write_raw(p, {"a": entry(0, 9)}, b"xy"), "the file has 2"),
    "no name": (lambda p: write_raw(p, {"": entry(0, 1)}, b"x"), "0 characters"),
    "endless name": (lambda p: write_raw(p, {"n" * 2000: entry(0, 1)}, b"x"), "2000 characters"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_refuses(tmp_path: Path, case: str) -> None:
    path = tmp_path / "bad.safetensors"
    make, message = HOSTILE[case]
    make(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFile(path)
    assert len(str(caught.value)) < 2000  # a hostile file cannot flood the terminal


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot open"):
        SafetensorsFile(tmp_path / "missing.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        SafetensorsFile(tmp_path)
    fifo = tmp_path / "fifo.safetensors"
    os.mkfifo(fifo)
    with pytest.raises(CheckpointError, match="not a regular file"):
        SafetensorsFile(fifo)


def test_notices_a_file_that_changed(small: Path) -> None:
    file = SafetensorsFile(small)
    with small.open("r+b") as handle:
        handle.truncate(small.stat().st_size - 4)
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        file.read("a")


def test_short_read_is_an_error(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that shrinks between the check and the read."""
    file = SafetensorsFile(small)
    monkeypatch.setattr(safetensors_file, "_identity", lambda info: None)
    file._identity = None  # type: ignore[assignment]
    with small.open("r+b") as handle:
        handle.truncate(file.tensors["b"].offset + 5)
    with pytest.raises(CheckpointError, match="ends 7 bytes short in 'b'"):
        file.read("b")


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_damage_is_a_typed_error_or_harmless(small: Path, data: st.DataObject) -> None:
    """Flip, cut or insert bytes: either CheckpointError, or every tensor still reads whole."""
    content = bytearray(small.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["set", "cut", "insert", "end"])):
            case "set":
                content[place] = data.draw(st.integers(0, 255))
            case "cut":
                del content[place : place + data.draw(st.integers(1, 9))]
            case "insert":
                content[place:place] = data.draw(st.binary(min_size=1, max_size=4))
            case "end":
                del content[max(place, 1) :]
        if not content:
            content = bytearray(b"\0")
    path = small.with_name("damaged.safetensors")
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
        for name, tensor in file.tensors.items():
            if safetensors_file.DTYPE_BITS[tensor.dtype] >= 8:
                assert file.read(name).nbytes == tensor.nbytes
    except CheckpointError:
        pass


def test_packed_dtypes_are_listed_but_not_read(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "f4.safetensors", {"a": entry(0, 2, [4], "F4")}, b"xy")
    file = SafetensorsFile(path)
    assert file.tensors["a"].nbytes == 2
    with pytest.raises(CheckpointError, match="F4 cannot be read"):
        file.read("a")


def test_rows_cost_the_memory_of_the_rows(tmp_path: Path) -> None:
    """64 rows out of a sparse file of 200 MB: half a MB of result, not the tensor."""
    rows, width = 25_600, 4096
    size = rows * width * 2
    path = write_raw(tmp_path / "big.safetensors", {"a": entry(0, size, [rows, width], "BF16")})
    os.truncate(path, path.stat().st_size + size)
    tracemalloc.start()
    try:
        part = SafetensorsFile(path).read_rows("a", 20_000, 20_064)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert part.nbytes == 64 * width * 2
    assert peak < part.nbytes + (1 << 20)
