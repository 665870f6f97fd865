"""The GGUF reader: against gguf.GGUFReader on good files, typed errors on damaged ones."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimo_edge.errors import BundleError
from mimo_edge.gguf_file import GGML_TYPES, GgufFile, split_name

EXPERTS = np.arange(2 * 3 * 32, dtype=np.float32).reshape(2, 3, 32)


def write_sample(path: Path, alignment: int | None = None) -> None:
    """A file by gguf's own writer, with every value type."""
    writer = gguf.GGUFWriter(path, "mimo2", use_temp_file=False)
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_uint8("k.u8", 200)
    writer.add_int8("k.i8", -5)
    writer.add_uint16("k.u16", 65535)
    writer.add_int16("k.i16", -300)
    writer.add_uint32("k.u32", 1 << 31)
    writer.add_int32("k.i32", -(1 << 30))
    writer.add_uint64("k.u64", 1 << 60)
    writer.add_int64("k.i64", -(1 << 60))
    writer.add_float32("k.f32", 0.5)
    writer.add_float64("k.f64", 0.1)
    writer.add_bool("k.yes", True)
    writer.add_bool("k.no", False)
    writer.add_string("k.text", "把灯调暗 \U0001f4a1")
    writer.add_array("k.ints", [1, -2, 3])
    writer.add_array("k.bools", [True, False, True])
    writer.add_array("k.words", ["", "a", "灯"])
    writer.add_tensor("vector", np.arange(5, dtype=np.float32))
    writer.add_tensor("half", np.arange(12, dtype=np.float16).reshape(3, 4))
    quantised = gguf.quants.quantize(EXPERTS, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("experts", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    path = tmp_path / "sample.gguf"
    write_sample(path)
    return path


def test_type_table_is_ggmls() -> None:
    for number, kind in GGML_TYPES.items():
        theirs = gguf.GGMLQuantizationType(number)
        assert theirs.name == kind.name
        assert gguf.GGML_QUANT_SIZES[theirs] == (kind.block, kind.block_bytes)


@pytest.mark.parametrize("alignment", [None, 4096])
def test_reads_what_the_reference_reader_reads(tmp_path: Path, alignment: int | None) -> None:
    path = tmp_path / "sample.gguf"
    write_sample(path, alignment)
    theirs = gguf.GGUFReader(path)
    with GgufFile.open(path) as ours:
        fields = {k: v for k, v in theirs.fields.items() if not k.startswith("GGUF.")}
        assert list(ours.metadata) == list(fields)
        for key, field in fields.items():
            value, expected = ours.metadata[key], field.contents()
            assert (list(value) if isinstance(expected, list) else value) == expected, key
        assert list(ours.tensors) == [t.name for t in theirs.tensors]
        for tensor in theirs.tensors:
            info = ours.tensors[tensor.name]
            assert info.shape == tuple(int(n) for n in reversed(tensor.shape))
            assert (info.ggml_type, info.offset, info.nbytes) == (
                tensor.tensor_type,
                tensor.data_offset,
                tensor.n_bytes,
            )
            assert ours.raw(tensor.name).tobytes() == tensor.data.tobytes()
            assert not ours.raw(tensor.name).flags.writeable


def test_one_expert_is_a_contiguous_slice(sample: Path) -> None:
    model = GgufFile.open(sample)
    for expert in range(2):
        file, offset, size = model.expert_slice("experts", expert)
        expected = gguf.quants.quantize(EXPERTS[expert], gguf.GGMLQuantizationType.Q8_0)
        assert file.read_bytes()[offset : offset + size] == expected.tobytes()
    rows = model.raw_rows("experts", 2, 4)
    assert rows.tobytes() == model.raw("experts")[2 * 34 : 4 * 34].tobytes()
    with pytest.raises(BundleError, match="expert 2"):
        model.expert_slice("experts", 2)
    with pytest.raises(BundleError, match="stacks no experts"):
        model.expert_slice("half", 0)
    with pytest.raises(BundleError, match="no tensor 'nothing'"):
        model.raw("nothing")


def test_what_was_read_survives_close_and_closed_files_refuse(sample: Path) -> None:
    model = GgufFile.open(sample)
    view = model.raw("vector")
    model.close()
    assert view.view(np.float32).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(BundleError, match="closed"):
        model.raw("vector")


def build(
    *,
    tensors: list[tuple[str, list[int], int, int]] | None = None,
    keys: list[tuple[str, int, bytes]] = (),  # type: ignore[assignment]
    data: bytes = bytes(256),
    counts: tuple[int, int] | None = None,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A hand-made GGUF file: (name, innermost-first shape, type, offset) per tensor."""
    tensors = [("a", [8], 0, 0)] if tensors is None else tensors
    text: Callable[[str], bytes] = lambda s: struct.pack("<Q", len(s.encode())) + s.encode()  # noqa: E731
    head = b"GGUF" + struct.pack("<I", version)
    head += struct.pack("<QQ", *(counts or (len(tensors), len(keys))))
    for key, kind, value in keys:
        head += text(key) + struct.pack("<I", kind) + value
    for name, shape, kind, offset in tensors:
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return head + bytes(-len(head) % alignment) + data


U32 = struct.Struct("<I").pack

BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF"),
    "other": (b"PK\x03\x04" + bytes(64), "not a GGUF"),
    "version": (build(version=2), "version 2"),
    "endian": (build(version=3 << 24), "big-endian"),
    "tensor count": (build(counts=(1 << 60, 0)), "claims"),
    "key count": (build(counts=(1, 1 << 62)), "claims"),
    "duplicate key": (build(keys=[("k", 4, U32(1)), ("k", 4, U32(2))]), "twice"),
    "empty key": (build(keys=[("", 4, U32(1))]), "empty metadata key"),
    "value type": (build(keys=[("k", 77, U32(1))]), "unknown value type"),
    "nested array": (build(keys=[("k", 9, struct.pack("<IQ", 9, 1))]), "array of items"),
    "array length": (build(keys=[("k", 9, struct.pack("<IQ", 5, 1 << 61))]), "truncated"),
    "string count": (build(keys=[("k", 9, struct.pack("<IQ", 8, 1 << 61))]), "truncated"),
    "string item": (build(keys=[("k", 9, struct.pack("<IQQ", 8, 1, 1 << 63))]), "truncated"),
    "string length": (build(keys=[("k", 8, struct.pack("<Q", (1 << 64) - 1))]), "truncated"),
    "not utf-8": (build(keys=[("k", 8, struct.pack("<Q", 1) + b"\xff")]), "UTF-8"),
    "alignment 0": (build(keys=[("general.alignment", 4, U32(0))]), "power of two"),
    "alignment 48": (build(keys=[("general.alignment", 4, U32(48))]), "power of two"),
    "alignment type": (
        build(keys=[("general.alignment", 8, struct.pack("<Q", 2) + b"32")]),
        "power of two|alignment",
    ),
    "alignment huge": (build(keys=[("general.alignment", 4, U32(1 << 31))]), "truncated"),
    "duplicate tensor": (build(tensors=[("a", [8], 0, 0), ("a", [8], 0, 32)]), "twice"),
    "empty name": (build(tensors=[("", [8], 0, 0)]), "name of 0 bytes"),
    "long name": (build(tensors=[("n" * 64, [8], 0, 0)]), "64 bytes"),
    "no dims": (build(tensors=[("a", [], 0, 0)]), "0 dimensions"),
    "many dims": (build(tensors=[("a", [1] * 5, 0, 0)]), "5 dimensions"),
    "empty shape": (build(tensors=[("a", [8, 0], 0, 0)]), "empty shape"),
    "huge shape": (build(tensors=[("a", [1 << 40, 1 << 40], 0, 0)]), "truncated"),
    "wrapping shape": (build(tensors=[("a", [1 << 62, 16], 0, 0)]), "truncated"),
    "unknown type": (build(tensors=[("a", [8], 99, 0)]), "unknown ggml type 99"),
    "partial block": (build(tensors=[("a", [40], 8, 0)]), "whole Q8_0 blocks"),
    "unaligned": (build(tensors=[("a", [8], 0, 4)]), "multiple of 32"),
    "outside": (build(tensors=[("a", [8], 0, 1 << 40)]), "truncated"),
    "overlap": (build(tensors=[("a", [16], 0, 0), ("b", [8], 0, 32)]), "overlap"),
    "short data": (build(data=bytes(31)), "truncated"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_refuses(tmp_path: Path, case: str) -> None:
    content, message = BROKEN[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=message) as caught:
        GgufFile.open(path)
    assert "bad.gguf" in str(caught.value)


def test_the_hand_made_file_is_good_without_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(build(keys=[("k", 4, U32(7))]))
    assert GgufFile.open(path).metadata == {"k": 7}


def test_every_truncation_is_refused(sample: Path) -> None:
    content = sample.read_bytes()
    end = max(i.offset + i.nbytes for i in GgufFile.open(sample).tensors.values())
    header = GgufFile.open(sample).data_start(sample)
    for size in [*range(0, header, 3), header, end - 1]:
        sample.write_bytes(content[:size])
        with pytest.raises(BundleError):
            GgufFile.open(sample)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(edits=st.lists(st.tuples(st.integers(0, 1100), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_headers_never_escape_as_other_errors(
    tmp_path: Path, edits: list[tuple[int, int]]
) -> None:
    path = tmp_path / "fuzz.gguf"
    if not (tmp_path / "seed.gguf").exists():
        write_sample(tmp_path / "seed.gguf")
    content = bytearray((tmp_path / "seed.gguf").read_bytes())
    for position, value in edits:
        content[position % len(content)] = value
    path.write_bytes(content)
    try:
        model = GgufFile.open(path)
        for name in model.tensors:
            model.raw(name)
        for value in model.metadata.values():
            if not isinstance(value, (str, int, float)):
                list(value)
    except BundleError:
        pass


def write_parts(folder: Path, count: int, **changes: Any) -> list[Path]:
    """A split set of `count` files with one tensor each."""
    paths = []
    for number in range(count):
        path = folder / split_name("m", number, count)
        writer = gguf.GGUFWriter(path, "mimo2")
        writer.add_uint16("split.no", changes.get("numbers", range(count))[number])
        writer.add_uint16("split.count", changes.get("counts", [count] * count)[number])
        writer.add_int32("split.tensors.count", changes.get("tensors", count))
        name = changes.get("names", [f"t{i}" for i in range(count)])[number]
        writer.add_tensor(name, np.full(4, number, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


def test_a_split_set_opens_as_one_from_any_part(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, 3)
    for path in paths:
        model = GgufFile.open(path)
        assert model.files == tuple(paths)
        assert [int(model.raw(f"t{i}").view(np.float32)[0]) for i in range(3)] == [0, 1, 2]


def test_split_sets_that_do_not_fit_together(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"numbers": [1, 0]}, "says it is part"),
        ({"counts": [2, 3]}, "says it is part"),
        ({"counts": [3, 2]}, "name does not say so"),
        ({"tensors": 5}, "should hold 5"),
        ({"names": ["t", "t"]}, "is in both"),
    ]
    for number, (changes, message) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        first = write_parts(folder, 2, **changes)[0]
        with pytest.raises(BundleError, match=message):
            GgufFile.open(first)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, 3)
    paths[1].unlink()
    with pytest.raises(BundleError, match=r"m-00002-of-00003\.gguf"):
        GgufFile.open(paths[0])
    renamed = paths[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(BundleError, match="name does not say so"):
        GgufFile.open(renamed)


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no file"):
        GgufFile.open(tmp_path / "none.gguf")
    with pytest.raises(BundleError, match="not a file"):
        GgufFile.open(tmp_path)
