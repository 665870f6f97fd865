"""Slots of routed experts over a runtime's life: filled from heat at load, given back while the
system is short of memory, taken again. No token changes."""

from __future__ import annotations

import json
import logging
import random
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from checkpoint_factory import write_checkpoint
from expert_files import ExpertFile

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from make_random_model import write_model

from mimo_edge.api import Runtime
from mimo_edge.budget import Budget, plan, resident_bytes
from mimo_edge.bundle import Bundle
from mimo_edge.errors import BundleError, DeviceError, UsageError
from mimo_edge.experts.cache import ExpertCache
from mimo_edge.export.pipeline import export_bundle
from mimo_edge.flash_file import FlashFile

PROMPT = [5, 17, 3, 40, 2, 9, 33, 8] * 6


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small f32 bundle with heat."""
    folder = tmp_path_factory.mktemp("made")
    source, _ = write_checkpoint(folder / "source", "flash", tokenizer=True)
    text = folder / "text"
    text.write_text("turn on the light in the kitchen. " * 40)
    export_bundle(source, folder / "bundle", recipe="f32", calibration=text).close()
    return folder / "bundle"


@pytest.fixture
def few_slots(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Plans with as many slots as the list says: a tiny model would always fit."""
    slots = [6]

    def planned(config: Any, tensors: Any, context: int, *args: Any, **kwargs: Any) -> Budget:
        lines = plan(config, tensors, context).lines
        total = config.n_routed_experts * sum(config.moe_layer_freq)
        return Budget(lines, 1 << 30, context, 16, True, slots[0], 4096, total)

    monkeypatch.setattr("mimo_edge.budget.plan", planned)
    return slots


def opened(bundle: Path) -> Runtime:
    return Runtime.open(bundle, backend="ggml", ram="1GiB", context=256, threads=1, draft=0)


def cache_of(runtime: Runtime) -> ExpertCache:
    assert runtime._model.experts is not None
    return runtime._model.experts.cache


def wait_until_warm(cache: ExpertCache) -> None:
    with cache._change:
        assert cache._change.wait_for(lambda: not (cache._warming or cache._warm_reads), 20)


# --- heat ---------------------------------------------------------------------------------------


def test_heat_of_the_bundle_ranks_the_policy_and_fills_the_slots(
    bundle: Path, few_slots: list[int]
) -> None:
    with Bundle.open(bundle) as files:
        heat = files.heat
        config = files.config
    assert heat is not None
    layers = [spec.index for spec in config.layers if spec.moe]
    raw = json.loads((bundle / "experts.json").read_text())
    counts = np.array([raw["layers"][str(layer)]["counts"] for layer in layers], float)
    with opened(bundle) as runtime:
        cache = cache_of(runtime)
        value = cache._residency.policy.value()
        for row in range(len(layers)):
            for a, b in zip(*np.nonzero(counts[row][:, None] > counts[row][None, :]), strict=True):
                assert value[row, a] >= value[row, b]
            assert value[row].max() > value[row].min()
        wait_until_warm(cache)
        # The hottest of all layers are there, and nothing more than the budget allows was read.
        stats = runtime.stats()["experts"]
        assert stats["slots_used"] == few_slots[0] == cache.stats().total().loads
        there = cache._residency.settled
        assert value[there].min() >= value[~there].max()
        assert (stats["hits"], stats["misses"], stats["evictions"]) == (0, 0, 0)


def test_all_experts_are_read_when_all_fit(bundle: Path, few_slots: list[int]) -> None:
    few_slots[0] = 1000
    with opened(bundle) as runtime:
        cache = cache_of(runtime)
        wait_until_warm(cache)
        assert cache.stats().slots_used == cache.table.total
        runtime.session().generate(PROMPT, max_tokens=4)
        assert runtime.stats()["experts"]["misses"] == 0


def test_a_file_without_heat_is_not_read_ahead(tmp_path: Path, few_slots: list[int]) -> None:
    """There is no reason to think any expert better than another."""
    path = tmp_path / "m.gguf"
    write_model(path, tiny.tiny_config(), experts="F32", dense="F32", head="F32")
    with opened(path) as runtime:
        assert not cache_of(runtime)._warming
        assert cache_of(runtime).stats().slots_used == 0


class Gate:
    """Reads of a file wait for `go`; `seen` has their offsets in the order they began."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.fail_at = threading.Event(), -1
        self.seen: list[int] = []
        whole = FlashFile._preadv
        gate = self

        def preadv(file: FlashFile, targets: Sequence[memoryview], offset: int) -> int:
            gate.seen.append(offset)
            gate.go.wait(20)
            if offset == gate.fail_at:
                raise OSError(5, "Input/output error")
            return whole(file, targets, offset)

        monkeypatch.setattr(FlashFile, "_preadv", preadv)


HEAT = {row: np.arange(8, dtype=np.float64) for row in range(3)}


def offsets(file: ExpertFile, row: int, expert: int) -> list[int]:
    stacks = file.table.layers[row].stacks
    return [stack.offset + expert * stack.nbytes for stack in stacks]


def test_a_pass_goes_before_the_warm_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One lane, in the middle of the first warm read when a pass asks for a cold expert."""
    gate = Gate(monkeypatch)
    large = (768 << 10,) * 3  # too large for two in one request, small enough to be one part
    file = ExpertFile(tmp_path / "x", sizes=large, heat=HEAT, checksums=False)
    with ExpertCache(file.table, 12, lanes=1) as cache:
        assert cache.warm_up() == 12
        while not gate.seen:
            threading.Event().wait(0.001)
        with cache.begin(1, np.array([0, 1])) as ticket:
            gate.go.set()
            ticket.wait()
            wanted = offsets(file, 0, 0) + offsets(file, 0, 1)
            assert gate.seen[1 : 1 + len(wanted)] == wanted
        wait_until_warm(cache)
        assert cache.stats().slots_used == 12
        assert cache.stats().total().evictions == 0
        # the slots the pass took were not read into
        assert cache.stats().total().loads == 12


def test_the_warm_up_gives_way_when_slots_are_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    file = ExpertFile(tmp_path / "x", heat=HEAT)
    with ExpertCache(file.table, 6, lanes=1) as cache:
        cache.warm_up()
        while not gate.seen:
            threading.Event().wait(0.001)
        threading.Timer(0.05, gate.go.set).start()
        with cache.acquire(2, np.arange(6)) as ticket:  # every slot there is
            assert len(ticket.ids) == 6
        assert not cache._warming


def test_an_error_of_the_warm_up_is_told_to_who_asks_for_the_expert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate(monkeypatch)
    gate.go.set()
    file = ExpertFile(tmp_path / "x", heat=HEAT, checksums=False, sizes=(2 << 20,) * 3)
    gate.fail_at = offsets(file, 2, 7)[1]
    with ExpertCache(file.table, 6) as cache, caplog.at_level(logging.WARNING):
        cache.warm()
        assert "layer 3, expert 7" in caplog.text
        assert cache.stats().slots_used == 6 - 1
        with pytest.raises(BundleError, match="layer 3, expert 7"):
            cache.acquire(3, np.array([7]))
        gate.fail_at = -1
        cache.acquire(3, np.array([7])).release()


def test_closing_in_the_middle_of_the_warm_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    file = ExpertFile(tmp_path / "x", heat=HEAT)
    cache = ExpertCache(file.table, 20, lanes=2)
    cache.warm_up()
    threading.Timer(0.05, gate.go.set).start()
    cache.close()
    assert len(gate.seen) <= 4


# --- pins ---------------------------------------------------------------------------------------


def test_pinned_experts_are_the_hottest_and_stay(bundle: Path, few_slots: list[int]) -> None:
    with Bundle.open(bundle) as files:
        heat = files.heat
    assert heat is not None
    few_slots[0] = 10
    options: dict[str, Any] = {"backend": "ggml", "ram": "1GiB", "context": 256, "threads": 1}
    with Runtime.open(bundle, pin=1, **options) as runtime:
        cache = cache_of(runtime)
        wait_until_warm(cache)
        want = {entry.layer: int(heat.order(entry.layer)[0]) for entry in cache.table.layers}
        for _ in range(3):
            for layer, expert in want.items():
                assert expert in cache.resident(layer)
            runtime.session().generate(PROMPT, max_tokens=10)
        assert runtime.stats()["experts"]["evictions"] > 0
        assert runtime.trim(1) > 0
        for layer, expert in want.items():
            assert expert in cache.resident(layer)
        rows = len(want)
        assert cache.slots == rows + runtime.config.num_experts_per_tok


def test_wrong_pins(bundle: Path, few_slots: list[int], tmp_path: Path) -> None:
    options: dict[str, Any] = {"backend": "ggml", "ram": "1GiB", "context": 256, "threads": 1}
    wrong: tuple[Any, ...] = (-1, 1.5, True, "2", 1000)
    for pin in wrong:
        with pytest.raises(UsageError, match="pin"):
            Runtime.open(bundle, pin=pin, **options)
    with pytest.raises(DeviceError, match="pin fewer experts"):
        Runtime.open(bundle, pin=3, **options)
    path = tmp_path / "m.gguf"
    write_model(path, tiny.tiny_config(), experts="F32", dense="F32", head="F32")
    with pytest.raises(UsageError, match="no heat says"):
        Runtime.open(path, pin=1, **options)
    assert threading.active_count() == 1


# --- trim ---------------------------------------------------------------------------------------


def test_trimming_a_running_answer_changes_no_token(bundle: Path, few_slots: list[int]) -> None:
    options = {"max_tokens": 60}
    with Runtime.open(bundle, backend="ggml", context=256, threads=1, draft=0) as resident:
        want = resident.session().generate(PROMPT, **options).token_ids
    few_slots[0] = 18
    with opened(bundle) as runtime:
        stop = threading.Event()
        freed: list[int] = []
        sizes: set[int] = set()
        rng = random.Random(0)

        def press() -> None:
            while not stop.is_set():
                freed.append(runtime.trim(rng.choice((0, 0.3, 0.5, 0.9, 1))))
                sizes.add(runtime.stats()["experts"]["slots"])

        presser = threading.Thread(target=press)
        presser.start()
        try:
            answers = [runtime.session().generate(PROMPT, **options).token_ids for _ in range(4)]
        finally:
            stop.set()
            presser.join()
        assert answers == [want] * 4
        slot = cache_of(runtime).pool.slot_bytes
        assert sum(n > 0 for n in freed) > 10
        assert all(n % slot == 0 for n in freed)
        assert min(sizes) == runtime.config.num_experts_per_tok
        assert max(sizes) == 18


def test_trimmed_memory_is_gone_and_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What earlier tests left in this process is not the model's.
    monkeypatch.setattr("mimo_edge.budget.resident_bytes", lambda: None)
    # Whether guesses are made depends on the clock, and each may take a slot or leave one empty.
    monkeypatch.setattr("mimo_edge.experts.guesses.GuessRecord.worth", lambda *_: False)
    config = tiny.tiny_config(
        hidden_size=512, moe_intermediate_size=512, n_routed_experts=64, num_experts_per_tok=4
    )
    path = tmp_path / "m.gguf"
    write_model(path, config, experts="Q8_0", dense="Q8_0", head="Q8_0")
    with Bundle.open(path) as files:
        ram = plan(config, files.tensors, 256).nbytes - (40 << 20)
    # The answer wants a few experts more than there are slots, whatever its tokens are.
    options: dict[str, Any] = {
        "ram": ram,
        "context": 256,
        "threads": 1,
        "draft": 0,
        "kv_type": "f16",
    }
    with Runtime.open(path, backend="ggml", **options) as runtime:
        session = runtime.session()
        first = session.generate(PROMPT, max_tokens=60).token_ids
        stats = runtime.stats()["experts"]
        slots, slot = stats["slots"], cache_of(runtime).pool.slot_bytes
        assert slots == stats["slots_planned"]
        used = stats["slots_used"]
        assert 0.95 * slots < used <= slots
        before = resident_bytes()
        freed = runtime.trim(0.75)
        after = resident_bytes()
        assert before is not None
        assert after is not None
        assert freed == round(0.75 * slots) * slot > 8 << 20
        assert before - after > 0.95 * freed
        assert runtime.trim(0.75) == 0  # of what was planned, not of what is left
        stats = runtime.stats()["experts"]
        assert stats["slots"] == slots - round(0.75 * slots)
        assert stats["slots_planned"] == slots
        again = runtime.session().generate(PROMPT, max_tokens=60).token_ids
        assert again == first
        assert resident_bytes() < after + freed // 4  # type: ignore[operator]
        assert runtime.trim(0) == 0
        assert runtime.session().generate(PROMPT, max_tokens=60).token_ids == first
        stats = runtime.stats()["experts"]
        assert (stats["slots_used"], stats["slots"]) == (used, slots)


def test_trim_keeps_what_a_token_needs(bundle: Path, few_slots: list[int]) -> None:
    with opened(bundle) as runtime:
        cache = cache_of(runtime)
        chosen = runtime.config.num_experts_per_tok
        assert runtime.trim(1) == (few_slots[0] - chosen) * cache.pool.slot_bytes
        assert cache.slots == chosen
        assert runtime.session().generate(PROMPT, max_tokens=3).token_ids
        assert runtime.trim(0) == 0
        wait_until_warm(cache)  # the heat of the bundle says what to read again
        assert cache.stats().slots_used == few_slots[0]


def test_a_resident_model_has_nothing_to_give(bundle: Path) -> None:
    with Runtime.open(bundle, backend="ggml", threads=1) as runtime:
        assert runtime.trim(0.5) == 0
    with Runtime.open(bundle, backend="reference") as runtime:
        assert runtime.trim(0.5) == 0


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan"), "0.5", None, True, [1]])
def test_nonsense_is_refused(bundle: Path, fraction: Any) -> None:
    with Runtime.open(bundle, backend="ggml", threads=1) as runtime:
        with pytest.raises(UsageError, match=r"trim\("):
            runtime.trim(fraction)
        with pytest.raises(UsageError, match="timeout"):
            runtime.trim(0.5, timeout=-1)
    with pytest.raises(UsageError, match="closed"):
        runtime.trim(0.5)


def test_a_layer_that_does_not_end_is_not_waited_for(
    bundle: Path, few_slots: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(bundle) as runtime:
        cache = cache_of(runtime)
        wait_until_warm(cache)
        layer = cache.table.layers[0].layer
        with cache.acquire(layer, np.array([0])):
            assert runtime.trim(0.5, timeout=0.05) == 0
        assert runtime.trim(0.5) > 0
