"""Memory and graphs of ended conversations go to the next ones, and nothing else of them does."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
from test_fork import in_child
from test_ggml_backend import ids_of, packed

from mimo_edge.config import MimoConfig
from mimo_edge.runtimes.base import F32
from mimo_edge.runtimes.ggml import backend as backend_module
from mimo_edge.runtimes.ggml import cache_memory
from mimo_edge.runtimes.ggml.backend import GgmlBackend
from mimo_edge.runtimes.ggml.cache import GgmlCache
from mimo_edge.runtimes.ggml.mtp_passes import MtpPass
from mimo_edge.runtimes.ggml.passes import TrunkPass

CONFIG = tiny.tiny_config()
SEVEN = tiny.tiny_mimo7b_config()


@pytest.fixture
def backend() -> Iterator[GgmlBackend]:
    made = GgmlBackend(packed(CONFIG, "Q8_0"), threads=1)
    yield made
    made.close()


def converse(backend: GgmlBackend, cache: GgmlCache, seed: int = 0) -> list[F32]:
    """Logits of a prompt, of drafts after it, of a verify, a rejection and a plain step."""
    config = backend.config
    ids = ids_of(config, 30, seed)
    first = backend.forward(ids[:21], cache, hidden_rows=21)
    found = [first.logits]
    for depth in range(config.num_mtp_layers):
        shifted = ids[1 + depth : 22 + depth]
        found.append(backend.mtp_forward(depth, shifted, first.hidden, 0, cache))
    found.append(backend.forward(ids[21:25], cache, logits_rows=4, hidden_rows=4).logits)
    cache.rollback(2)
    found.append(backend.forward(ids[23:24], cache).logits)
    return found


def content(cache: GgmlCache) -> bytes:
    """Every byte of keys and values."""
    tensors = [t for kv in (*cache.layers, *cache.mtp) for t in (kv.key, kv.value)]
    return b"".join(ctypes.string_at(t.address, t.ne[1] * t.nb[1]) for t in tensors)


def resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.parametrize("config", [CONFIG, SEVEN], ids=["v2", "7b"])
@pytest.mark.parametrize("kv_type", ["f16", "f32"])
def test_a_conversation_in_used_memory_is_one_in_new_memory(
    config: MimoConfig, kv_type: str
) -> None:
    used = GgmlBackend(packed(config, "Q8_0"), threads=1, kv_type=kv_type)
    want = []
    for seed in (1, 2):
        fresh = GgmlBackend(packed(config, "Q8_0"), threads=1, kv_type=kv_type)
        want.append(converse(fresh, fresh.new_cache(300), seed))
        fresh.close()
    cache = used.new_cache(300)
    used.forward(ids_of(config, 290), cache, hidden_rows=4)  # more rows than the next one writes
    memory = cache.memory
    del cache
    for seed in (1, 2):
        cache = used.new_cache(300)
        assert cache.memory is memory
        assert not any(content(cache))
        assert (cache.length, cache.ring.length, cache.full.length) == (0, 0, 0)
        found = converse(used, cache, seed)
        for a, b in zip(found, want[seed - 1], strict=True):
            assert np.array_equal(a.view(np.int32), b.view(np.int32))
        assert any(content(cache))
        del cache
    used.close()


def test_numbers_that_are_none_do_not_stay(backend: GgmlBackend) -> None:
    want = converse(backend, backend.new_cache(64))
    cache = backend.new_cache(64)
    converse(backend, cache)
    for kv in (*cache.layers, *cache.mtp):
        rows = kv.rows if kv.rows < 64 else 25  # of global layers those that were written
        for tensor in (kv.key, kv.value):
            ctypes.memset(tensor.address, 0xFF, rows * tensor.nb[1])
    cache.close()
    for a, b in zip(converse(backend, backend.new_cache(64)), want, strict=True):
        assert np.array_equal(a, b)


def test_graphs_are_built_once(backend: GgmlBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    for kind in (TrunkPass, MtpPass):

        class Counted(kind):  # type: ignore[misc, valid-type]
            def __init__(self, *args: object) -> None:
                built.append(self)
                super().__init__(*args)

        monkeypatch.setattr(backend_module, kind.__name__, Counted)
    converse(backend, backend.new_cache(64), 1)
    first = len(built)
    assert first == 3 + CONFIG.num_mtp_layers
    for seed in range(3):
        converse(backend, backend.new_cache(64), seed)
    assert len(built) == first


def test_live_conversations_share_nothing(backend: GgmlBackend) -> None:
    caches = [backend.new_cache(64) for _ in range(3)]
    assert len({id(cache.memory) for cache in caches}) == 3
    kept = caches.pop()
    want = converse(backend, kept)
    caches.clear()
    again = [backend.new_cache(64) for _ in range(3)]
    assert all(cache.memory is not kept.memory for cache in again)
    for a, b in zip(converse(backend, again[0]), want, strict=True):
        assert np.array_equal(a, b)
    assert kept.length == 24


def test_idle_memory_never_adds_to_what_was_in_use(backend: GgmlBackend) -> None:
    first, second = backend.new_cache(64), backend.new_cache(64)
    idle = backend._idle
    del first, second
    assert len(idle) == 2
    other = backend.new_cache(128)  # of another size: they are freed before it is made
    assert len(idle) == 0
    del other
    kept = backend.new_cache(128)
    assert len(idle) == 0
    del kept
    many = [backend.new_cache(128) for _ in range(cache_memory.IDLE_MOST + 3)]
    many.clear()
    assert len(idle) == cache_memory.IDLE_MOST


def test_what_is_large_is_not_kept(backend: GgmlBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = backend.new_cache(600)
    converse(backend, cache)
    graphs, rows = cache.graphs.nbytes, cache.nbytes()
    small = graphs
    cache.graphs.drop_large()
    small = cache.graphs.nbytes
    assert 0 < small < graphs  # the prompt's graph is the largest
    del cache
    assert backend._idle.nbytes == rows + small
    monkeypatch.setattr(cache_memory, "IDLE_BYTES", rows + small)
    for keeps in (True, False):
        cache = backend.new_cache(600)
        converse(backend, cache)
        cache.close()
        assert len(backend._idle) == keeps
        assert backend._idle.nbytes == keeps * (rows + small)
        monkeypatch.setattr(cache_memory, "IDLE_BYTES", rows + small - 1)


def test_a_cache_that_outlives_its_backend_is_freed() -> None:
    made = GgmlBackend(packed(CONFIG, "Q8_0"), threads=1)
    idle, cache = made._idle, made.new_cache(64)
    other = made.new_cache(64)
    del other
    assert len(idle) == 1
    made.close()
    assert len(idle) == 0
    region = cache.memory._region
    cache.close()
    cache.close()
    assert len(idle) == 0
    assert not region.buffer


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_takes_and_gives_nothing(backend: GgmlBackend) -> None:
    idle, cache = backend._idle, backend.new_cache(64)
    converse(backend, cache)

    def child() -> None:
        nonlocal cache
        del cache
        gc.collect()
        assert len(idle) == 0

    in_child(child)
    want = converse(backend, backend.new_cache(64))
    del cache
    for a, b in zip(converse(backend, backend.new_cache(64)), want, strict=True):
        assert np.array_equal(a, b)


def test_conversations_that_end_in_other_threads(backend: GgmlBackend) -> None:
    """The collector ends them wherever it runs; making new ones meanwhile must not lose any."""
    pages = resident_pages()
    stop = threading.Event()
    dropped: list[GgmlCache] = []

    def drop() -> None:
        while not stop.is_set() or dropped:
            if dropped:
                dropped.pop()

    threads = [threading.Thread(target=drop) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(300):
        dropped.append(backend.new_cache(64 + 64 * (number % 2)))
    stop.set()
    for thread in threads:
        thread.join()
    gc.collect()
    assert len(backend._idle) <= cache_memory.IDLE_MOST + 1
    assert resident_pages() - pages < 2048
    converse(backend, backend.new_cache(64))
