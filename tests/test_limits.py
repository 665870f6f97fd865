"""Limits of small systems: files beyond 4 GiB, little address space, large pages, wrong clocks."""

from __future__ import annotations

import mmap
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from mimo_edge import Runtime
from mimo_edge.experts.slots import SlotPool
from mimo_edge.export.gguf_writer import GgufLayout, PlannedTensor
from mimo_edge.flash_file import FlashFile
from mimo_edge.gguf_file import GgufFile
from mimo_edge.gguf_meta import text
from mimo_edge.nano.commands import DEMO_TEXTS, DEMO_TOOLS
from mimo_edge.row_reader import RowReader
from mimo_edge.runtimes.ggml import cache_memory
from mimo_edge.runtimes.ggml.device import Device, Region
from mimo_edge.units import round_up

WIDTH = 250  # rows of 1,000 bytes: hardly any begins on a page
ROWS = 6_000_000
MARKED = (0, 1, 2_147_483, 2_147_484, 4_294_967, 4_294_968, ROWS - 1)  # 2^31 and 2^32 bytes
LAST = np.arange(31, dtype=np.float32)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A GGUF file of 6 GB that takes a few pages of disk."""
    layout = GgufLayout(
        {"general.architecture": text("mimo2")},
        [PlannedTensor("table", 0, (ROWS, WIDTH)), PlannedTensor("last", 0, (31,))],
    )
    path = tmp_path_factory.mktemp("large") / "large.gguf"
    try:
        with path.open("wb") as file:
            file.truncate(layout.size)
            file.write(layout.header)
            for row in MARKED:
                file.seek(layout.offsets["table"] + row * 4 * WIDTH)
                file.write(np.full(WIDTH, row + 1, np.float32).tobytes())
            file.seek(layout.offsets["last"])
            file.write(LAST.tobytes())
    except OSError as error:
        pytest.skip(f"no sparse file can be made here: {error}")
    yield path
    path.unlink()


def test_rows_on_both_sides_of_4_gib(large: Path) -> None:
    with GgufFile.open(large) as file:
        assert file.raw("last").tobytes() == LAST.tobytes()
        for row in MARKED:
            found = file.raw_rows("table", row, row + 1).view(np.float32)
            np.testing.assert_array_equal(found, np.full((1, WIDTH), row + 1, np.float32))
        crossing = file.raw_rows("table", 4_294_960, 4_294_980).view(np.float32)
        assert np.flatnonzero(crossing[:, 0]).tolist() == [7, 8]
        for past_cache in (False, True):
            reader = RowReader(file, "table", past_cache=past_cache)
            rows = reader.rows(np.array(MARKED, np.int64)).view(np.float32)
            assert rows[:, -1].tolist() == [row + 1 for row in MARKED]
            reader.close()


@pytest.mark.parametrize("direct", [False, True])
def test_unaligned_reads_beyond_4_gib(large: Path, direct: bool) -> None:
    file = FlashFile(large, direct=direct, announce=False)
    with GgufFile.open(large) as model:
        start = model.info("table").offset
    out, bounce = bytearray(1000), memoryview(mmap.mmap(-1, 1 << 20))
    for row in MARKED:
        want = np.full(WIDTH, row + 1, np.float32).tobytes()
        file.read(start + row * 1000, [memoryview(out)[:1], memoryview(out)[1:]], bounce)
        assert bytes(out) == want
        file.load(start + row * 1000 + 3, memoryview(out)[:997])
        assert bytes(out[:997]) == want[3:]
    file.close()


def test_a_file_larger_than_the_address_space(large: Path) -> None:
    """Android gives a process 39 bits, some boards less: nothing is mapped, so files may be of any
    size."""
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
from pathlib import Path
from mimo_edge.gguf_file import GgufFile
from mimo_edge.runtimes.ggml.device import Device, Region
from mimo_edge.errors import BackendError
with GgufFile.open(Path({str(large)!r})) as file:
    print(int(file.raw_rows("table", {ROWS - 1}, {ROWS}).view("f4")[0, 0]))
device = Device(1)
try:
    Region(device, 1 << 39)
except BackendError as error:
    print(error.hint)
"""
    assert resource.getrlimit(resource.RLIMIT_AS)[1] == resource.RLIM_INFINITY
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.stdout.split("\n")[:2] == [f"{ROWS}", "use a smaller context"], done.stderr


@pytest.fixture
def device() -> Iterator[Device]:
    made = Device(1)
    yield made
    made.close()


def test_a_region_is_on_pages(device: Device) -> None:
    region = Region(device, 1)
    assert region.nbytes == mmap.PAGESIZE
    assert region.address % mmap.PAGESIZE == 0
    region.close()


def test_memory_is_laid_out_by_the_system_s_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 KiB on some phones and boards, 64 KiB on some servers."""
    pool = SlotPool(3, (5000, 4096, 70_000))
    assert pool.strides == tuple(round_up(n, mmap.PAGESIZE) for n in (5000, 4096, 70_000))
    pool.close()
    for page in (4096, 16384, 65536):
        monkeypatch.setattr(cache_memory, "PAGE", page)
        assert [cache_memory.page_offsets(sizes) for sizes in ([], [1], [page, 1, page + 1])] == [
            ([], 0),
            ([0], page),
            ([0, page, 2 * page], 4 * page),
        ]


def test_answers_do_not_depend_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A router starts in 1970 and jumps by decades when it finds the network."""

    def answer() -> tuple[list[int], float]:
        with Runtime.open("mimo-nano") as runtime:
            session = runtime.session(tools=DEMO_TOOLS, enable_thinking=False)
            reply = session.generate(DEMO_TEXTS[1], max_tokens=8, temperature=0)
        return list(reply.token_ids), reply.stats.decode_ms

    want, _ = answer()
    jumps = count()
    monkeypatch.setattr(time, "time", lambda: (0.0, 2e9, -5.0, 1e9)[next(jumps) % 4])
    found, decode_ms = answer()
    assert found == want
    assert 0 < decode_ms < 600_000
