"""Rows read one by one: right bytes, no mapped file, no page cache, typed errors, repair."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import zlib
from pathlib import Path

import gguf
import numpy as np
import pytest

from mimo_edge.errors import BundleError, IntegrityError
from mimo_edge.flash_file import FlashFile
from mimo_edge.gguf_file import GgufFile
from mimo_edge.row_reader import CACHE_BYTES, RowReader

ROWS, WIDTH = 20_000, 160  # rows of 640 bytes: never aligned, some across two blocks
TABLE = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    place = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(place, "mimo2")
    writer.add_tensor("other", np.ones(7, np.float32))
    writer.add_tensor("table", TABLE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return place


def values(reader: RowReader, ids: list[int]) -> np.ndarray:
    return reader.rows(np.array(ids, np.int64)).view(np.float32)


@pytest.mark.parametrize("past_cache", [False, True])
def test_rows_are_the_tables(path: Path, past_cache: bool) -> None:
    rng = np.random.default_rng(1)
    with GgufFile.open(path) as file:
        reader = RowReader(file, "table", past_cache=past_cache)
        # more rows than are kept, with repeats
        for count in (1, 4, 9000, 3):
            ids = rng.integers(0, ROWS, count).tolist()
            np.testing.assert_array_equal(values(reader, ids), TABLE[ids])
        assert len(reader._kept) * 4 * WIDTH <= CACHE_BYTES
        reader.close()
        reader.close()


def test_no_part_of_the_file_is_mapped(path: Path) -> None:
    with GgufFile.open(path) as file:
        reader = RowReader(file, "table")
        values(reader, [1, 2])
        file.raw("table")
        assert str(path) not in Path("/proc/self/maps").read_text()


def cached_bytes(path: Path) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as view:
        pages = -(-len(view) // mmap.PAGESIZE)
        vector = (ctypes.c_ubyte * pages)()
        pointer = (ctypes.c_char * len(view)).from_buffer(view)
        address = ctypes.c_void_p(ctypes.addressof(pointer))
        assert libc.mincore(address, ctypes.c_size_t(len(view)), vector) == 0
        del pointer
        return mmap.PAGESIZE * sum(v & 1 for v in vector)


def test_the_page_cache_does_not_grow(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_bytes(path):
        pytest.skip("this file system keeps its files in memory")
    with GgufFile.open(path) as model:
        model.drop_pages()
        reader = RowReader(model, "table", past_cache=True)
        ids = list(range(0, ROWS, 40))
        np.testing.assert_array_equal(values(reader, ids), TABLE[ids])
        assert model.raw("table").tobytes() == TABLE.tobytes()
        assert cached_bytes(path) <= 64 << 10


@pytest.mark.parametrize("past_cache", [False, True])
@pytest.mark.parametrize("how", ["truncated", "replaced", "gone", "changed"])
def test_a_file_that_changes_is_an_error(path: Path, how: str, past_cache: bool) -> None:
    with GgufFile.open(path) as file:
        reader = RowReader(file, "table", past_cache=past_cache)
        values(reader, [5])
        if how == "truncated":
            os.truncate(path, file.info("table").offset + 640)
        elif how == "replaced":
            shutil.copy(path, path.with_name("y"))
            os.replace(path.with_name("y"), path)
        elif how == "gone":
            path.unlink()
        else:
            os.utime(path, ns=(1, 1))
        with pytest.raises(BundleError, match=rf"row 19999 of table: .*m\.gguf.* {how}"):
            values(reader, [19_999])
        np.testing.assert_array_equal(values(reader, [5]), TABLE[[5]])  # what is kept is good


@pytest.mark.parametrize("past_cache", [False, True])
def test_a_repaired_file_works_again_when_a_checksum_vouches_for_it(
    path: Path, past_cache: bool
) -> None:
    content = path.read_bytes()
    with GgufFile.open(path) as file:
        crc = zlib.crc32(TABLE.tobytes())
        reader = RowReader(file, "table", past_cache=past_cache, crc32=crc)
        values(reader, [5])
        os.truncate(path, 4096)
        with pytest.raises(BundleError, match="truncated"):
            values(reader, [7])
        path.write_bytes(content)  # in place
        np.testing.assert_array_equal(values(reader, [7]), TABLE[[7]])
        path.unlink()
        with pytest.raises(BundleError, match="gone"):
            values(reader, [8])
        path.write_bytes(content)  # another file of the same name
        np.testing.assert_array_equal(values(reader, [8]), TABLE[[8]])
        damaged = bytearray(content)
        damaged[-1] ^= 1
        path.write_bytes(damaged)
        for row in (9, 10):
            with pytest.raises(IntegrityError, match=r"table has CRC-32 .* changed while"):
                values(reader, [row])
        path.write_bytes(content)
        np.testing.assert_array_equal(values(reader, [9, 10]), TABLE[[9, 10]])


def test_a_disk_error_names_file_and_row(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: FlashFile, targets: object, offset: int) -> int:
        raise OSError(5, os.strerror(5))

    with GgufFile.open(path) as file:
        reader = RowReader(file, "table", past_cache=True)
        monkeypatch.setattr(FlashFile, "_preadv", broken)
        with pytest.raises(BundleError, match=r"row 3 of table: .*m\.gguf.*Input/output error"):
            values(reader, [3])
        monkeypatch.undo()
        np.testing.assert_array_equal(values(reader, [3]), TABLE[[3]])
