"""The probe: bounded, leaving nothing behind, and a profile that the others read."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from mimo_edge.bench import engine_cost as engine_costs
from mimo_edge.bench import flash_rate as flash_rates
from mimo_edge.bench.flash_rate import Targets, measure_reads
from mimo_edge.cli.main import app
from mimo_edge.devices import beside, processor
from mimo_edge.devices import probe as probing
from mimo_edge.devices.probe import LANES, Probe, probe
from mimo_edge.devices.profile import Beside, EngineCost, KernelRate, load_profile
from mimo_edge.errors import DeviceError, UsageError
from mimo_edge.experts.reader import DEFAULT_LANES
from mimo_edge.flash_file import FlashFile
from mimo_edge.quant.base import get_format
from mimo_edge.runtimes.ggml import measure as measuring
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.measure import (
    Heads,
    Products,
    attention_rates,
    kernel_rates,
    memory_rates,
)

RECORD, FILE = 128 << 10, 2 << 20


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(probing, "KERNEL_FORMATS", ("Q4_0", "F16"))
    monkeypatch.setattr(probing, "_POOL_BYTES", 16 << 20)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


@pytest.fixture
def only_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What computes is known at once, so that a probe is flash alone."""
    rate = KernelRate(1e9, 1e9, 1e9, 1e9, 4 * (1e9,), 1e9)
    known = processor.Processor({"Q4_0": 1e9}, {"Q4_0": rate}, None)
    monkeypatch.setattr(processor, "measure_processor", lambda *_: known)
    monkeypatch.setattr(beside, "measure_beside", lambda *_: Beside(1.0, 1.0))
    monkeypatch.setattr(probing, "engine_cost", lambda *_: EngineCost(*10 * (1e-4,)))


def measured(folder: Path, **arguments: Any) -> Probe:
    given = {"threads": 1, "record_bytes": RECORD, "file_bytes": FILE, "seconds": 0.1}
    return probe(folder, **{**given, **arguments})


def test_what_is_measured_becomes_a_profile(disk: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    found = measured(disk, progress=lambda _, done, total: steps.append((done, total)))
    assert not list(disk.iterdir())
    assert steps[-1][0] == steps[-1][1]
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    lanes = {lanes for block, lanes in (found.direct or found.buffered) if block == RECORD}
    assert lanes == set(LANES)
    assert {lanes for _, lanes in found.buffered} >= set(LANES)
    assert all(rate > 0 for rate in (*found.direct.values(), *found.memory.values()))
    profile = found.profile
    assert profile.measured
    assert profile.threads == 1
    assert profile.memory_bytes_per_s == pytest.approx(max(found.memory.values()), rel=1e-3)
    matrices = {name for name in profile.kernels if not name.startswith("ATTENTION_")}
    assert matrices == {"any", "Q4_0", "F16"}
    assert set(profile.kernels) - matrices == {"ATTENTION_F16", "ATTENTION_Q8_0", "ATTENTION_F32"}
    assert len(profile.kernels["Q4_0"].cold) == 4
    assert min(profile.kernels["F16"].rates()) > 0
    # blocks that do not fit the file are left out
    assert [r.block_bytes for r in profile.reads] == [128 << 10, 512 << 10, 1 << 20]
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["threads"] == 1
    assert all(0 < share <= 1 for share in asdict(profile.beside).values())
    assert profile.sources["beside"].evidence == "measured"
    path = tmp_path / "mine.toml"
    path.write_text(profile.to_toml(), "utf-8")
    assert load_profile(path).to_dict()["figures"] == profile.to_dict()["figures"]


@pytest.mark.usefixtures("only_reads")
def test_where_direct_reads_are_refused_buffered_ones_count(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FlashFile, "_open_direct", lambda self: "refused")
    found = measured(disk)
    assert not found.direct_works
    assert not found.direct
    assert {block for block, lanes in found.buffered if lanes == DEFAULT_LANES} == {
        r.block_bytes for r in found.profile.reads
    }
    assert "buffered" in found.profile.sources["reads"].text


class _Disk(NamedTuple):
    total: int
    used: int
    free: int


def test_nothing_is_written_where_there_is_no_room(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Disk(1 << 40, 0, 4 * FILE - 1))
    with pytest.raises(DeviceError, match=r"are free.*smaller --file-size"):
        measured(disk)
    assert not list(disk.iterdir())


def test_nothing_begins_without_memory(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mimo_edge.machine.available_bytes", lambda: 100 << 20)
    with pytest.raises(DeviceError, match="too little to measure with"):
        measured(disk)
    assert not list(disk.iterdir())


@pytest.mark.parametrize("after", [0, 1])
def test_a_full_disk_leaves_nothing(
    disk: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    really, calls = os.write, [0]

    def write(fd: int, data: bytes) -> int:
        calls[0] += 1
        if calls[0] > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return really(fd, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(DeviceError, match="No space left"):
        measured(disk)
    assert not list(disk.iterdir())


def test_an_interrupt_leaves_nothing(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> float:
        # Out of sight while it is read: then nothing is left whatever ends the process.
        assert not list(disk.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(probing, "measure_reads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured(disk)
    assert not list(disk.iterdir())


@pytest.mark.usefixtures("only_reads")
@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("writing", signal.SIGTERM),
        ("writing", signal.SIGKILL),
        ("reading", signal.SIGKILL),
        ("computing", signal.SIGHUP),
        ("computing", signal.SIGKILL),
    ],
)
def test_a_signal_leaves_nothing(disk: Path, stage: str, number: int) -> None:
    """A real process, ended at each stage. What a kill leaves the next run removes."""
    script = f"""
import sys, time
from mimo_edge.bench import engine_cost
from mimo_edge.devices import beside, probe, processor, profile, scratch
from mimo_edge.cli.main import app
def stop(*_):
    print("here", flush=True)
    time.sleep(60)
if {stage!r} == "writing":
    whole = scratch.os.urandom
    scratch.os.urandom = lambda n: (stop(), whole(n))[1]
elif {stage!r} == "reading":
    probe.measure_reads = stop
else:
    probe._reads = lambda *_: ({{}}, {{}})
    rate = profile.KernelRate(1e9, 1e9, 1e9, 1e9, 4 * (1e9,), 1e9)
    processor.measure_processor = lambda *_: ({{"Q4_0": 1e9}}, {{"Q4_0": rate}}, None)
    probe._rising = lambda *_: [{{"block": "1 MiB", "rate": "1 GB/s"}}]
    beside.measure_beside = lambda *_: profile.Beside(1.0, 1.0)
    engine_cost._step = stop
sys.argv = ["mimo-edge", "probe", "--dir", {str(disk)!r}, "--file-size", "16MiB", "--threads", "1"]
app()
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"here\n"
        child.send_signal(number)
        code = child.wait(30)
    finally:
        child.kill()
        child.communicate()
    killed = number == signal.SIGKILL
    assert code == (-number if killed else 128 + number)
    left = [path.name for path in disk.iterdir()]
    if killed and stage != "reading":
        assert len(left) == 1
        measured(disk)
    else:
        assert left == []
    assert not list(disk.iterdir())


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="absent"):
        measured(tmp_path / "absent")


@pytest.mark.parametrize(
    "arguments",
    [
        {"threads": 0},
        {"threads": 4096},
        {"seconds": 0},
        {"seconds": float("nan")},
        {"record_bytes": 100},
        {"file_bytes": 1000},
        {"record_bytes": 8 << 20},
    ],
)
def test_nonsense_is_refused(arguments: dict[str, Any], disk: Path) -> None:
    with pytest.raises(UsageError):
        measured(disk, **arguments)
    assert not list(disk.iterdir())


def test_reads_stop_at_the_bytes_allowed(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(1 << 20))
    counted = [0]

    class Counting(FlashFile):
        def read(self, *arguments: Any) -> int:
            count = super().read(*arguments)
            counted[0] += count
            return count

    file = Counting(path, announce=False)
    try:
        places = [(file, at << 16) for at in range(8)]
        with Targets(1 << 20) as into:
            assert measure_reads(places, 64 << 10, 2, into, 60.0, 1 << 20) > 0
    finally:
        file.close()
    assert 1 << 20 <= counted[0] <= (1 << 20) + (128 << 10)


def test_larger_reads_never_seem_to_take_less_time() -> None:
    rates = {(1 << 16, 4): 1e6, (1 << 17, 4): 5e6, (1 << 18, 4): 6e6}
    listed = probing._rising([1 << 16, 1 << 17, 1 << 18], rates)
    times = [int(item["block"].split()[0]) / float(item["rate"].split()[0]) for item in listed]
    assert times == sorted(times)
    assert times[1] > 1.0005 * times[0]  # also with the four digits of a file
    assert listed[0]["rate"] == "1 MB/s"


def test_rates_are_work_over_time() -> None:
    """With a clock that advances a second at every look."""
    device, fmt = Device(1), get_format("Q4_0")
    ticks = iter(range(10**6))

    def clock() -> float:
        return float(next(ticks))

    try:
        row, four = kernel_rates(device, fmt, (1, 4), 0.0, clock)
        assert row == 16 * 1024 * 1024
        assert four == 4 * row
        each = fmt.row_bytes(4096) * 1024
        macs = 4 * 4096 * 1024
        assert memory_rates(device, fmt, (1, 3), 4 * each, 0.0, clock) == [macs, 3 * macs]
        assert memory_rates(device, fmt, (1,), 4 * each, 0.0, clock, reorder=False) == [macs]
        assert kernel_rates(device, fmt, (4,), 0.0, clock, reorder=False) == [four]
    finally:
        device.close()


def test_attention_is_work_over_time() -> None:
    device, ticks = Device(1), iter(range(10**6))

    def clock() -> float:
        return float(next(ticks))

    try:
        heads = Heads(4, 1, 96, 64)
        for kind in ("f32", "f16"):
            one, many = attention_rates(device, kind, heads, (1, 128), 0.0, clock)
            assert one == 16 * 4 * 160 * 256  # 16 such operations over 256 tokens
            assert many == 128 * 4 * 160 * 256
    finally:
        device.close()


@pytest.mark.parametrize("disturbed", [False, True])
def test_caches_end_where_products_become_slow(
    monkeypatch: pytest.MonkeyPatch, disturbed: bool
) -> None:
    """Matrices of 1 MiB and a sixteenth; up to 16 of them take 1 each, more of them 3."""
    each = get_format("Q8_0").row_bytes(1024) * 1024

    def passes(device: Device, weights: list[Any], *_: Any) -> list[float]:
        slow = len(weights) > 16 or (disturbed and len(weights) == 4)
        return [len(weights) * (3.0 if slow else 1.0)]

    monkeypatch.setattr(measuring, "_passes", passes)
    device = Device(1)
    try:
        found = measuring.cache_bytes(device, get_format("Q8_0"), 64 * each, 1.0)
        assert found == pytest.approx(16 * each * 2**0.5, rel=1e-6)
        monkeypatch.setattr(measuring, "_passes", lambda device, weights, *_: [1.0 * len(weights)])
        assert measuring.cache_bytes(device, get_format("Q8_0"), 8 * each, 1.0) is None
    finally:
        device.close()


def test_of_two_rounds_the_better_rate_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = iter(
        [KernelRate(1, 5, 3, 4, (1, 2, 3, 4), 9), KernelRate(2, 4, 6, 1, (2, 1, 4, 3), 8)]
    )
    monkeypatch.setattr(processor, "_kernel", lambda *_: next(rounds))
    monkeypatch.setattr(processor, "_attention", lambda *_: {})
    monkeypatch.setattr(processor, "cache_bytes", lambda *_: 100 << 20)
    steps: list[None] = []
    fmt = get_format("Q8_0")
    found = processor.measure_processor(1, [fmt], 512 << 20, 1.0, lambda: steps.append(None))
    assert found.kernels == {"Q8_0": KernelRate(2, 5, 6, 4, (2, 2, 4, 4), 9)}
    assert found.memory == {"Q8_0": 9 * 34 / 32}
    assert len(steps) == 3


@pytest.mark.usefixtures("only_reads")
def test_others_that_compute_meanwhile_are_said(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.perf_counter()

    def busy() -> float:  # two cores, besides ours
        return 2 * (time.perf_counter() - began) + time.process_time()

    monkeypatch.setattr("mimo_edge.machine.busy_seconds", busy)
    assert measured(disk).others_cores == pytest.approx(2.0, abs=0.05)
    arguments = ["probe", "--dir", str(disk), "--file-size", "16MiB", "--threads", "1"]
    done = CliRunner().invoke(app, [*arguments, "--seconds", "0.1"])
    assert "other processes used 2.0 cores meanwhile" in done.stderr
    monkeypatch.setattr("mimo_edge.machine.busy_seconds", lambda: None)
    assert measured(disk).others_cores is None


@pytest.mark.parametrize("name", ["mine", "mine.txt", ".", "absent/mine.toml"])
def test_where_the_profile_cannot_go_nothing_is_measured(
    name: str, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "measure_reads", lambda *_: pytest.fail("measured"))
    done = CliRunner().invoke(app, ["probe", "--dir", str(disk), "-o", str(tmp_path / name)])
    assert done.exit_code in (1, 2)
    assert "cannot write" in done.stderr or "ends in .toml" in done.stderr


def test_a_layer_costs_what_few_and_many_of_them_differ_in(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine of known costs, measured."""
    want = EngineCost(1e-3, 1e-4, 2e-4, 3e-4, 5e-4, 1.5e-4, 4e-4, 2e-6, 7e-6, 9e-5)
    device = replace(load_profile("phone"), engine=want)

    @contextmanager
    def engine(path: Path, threads: int, streamed: bool) -> Iterator[tuple[Path, bool]]:
        yield path, streamed

    def step(engine: tuple[Path, bool], drafts: int, *_: Any) -> tuple[float, int]:
        path, streamed = engine
        return engine_costs._reckoned(path, device, 100, streamed).decodes[drafts].cost.seconds, 100

    def prompt_s(engine: tuple[Path, bool], *_: Any) -> float:
        return engine_costs._reckoned(engine[0], device, 0).prefill.cost.seconds

    monkeypatch.setattr(engine_costs, "_engine", engine)
    monkeypatch.setattr(engine_costs, "_step", step)
    monkeypatch.setattr(engine_costs, "_prompt_s", prompt_s)
    monkeypatch.setattr(engine_costs, "_arrival", lambda *_: want.arrival)
    found = engine_costs.engine_cost(disk, 1, 1.0, device)
    assert asdict(found) == pytest.approx(asdict(want), rel=1e-4)
    assert sum(path.stat().st_size for path in disk.iterdir()) < 20 << 20


def test_reads_land_in_memory_like_that_of_slots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Private memory on huge pages (the kernel gives shared memory none, and half the rate), all of
    it by turns, so that nothing lands where the caches still hold it, and no two lanes together."""
    path = tmp_path / "f"
    path.write_bytes(bytes(1 << 20))
    starts: dict[str, list[int]] = {}

    class Watching(FlashFile):
        def read(self, offset: int, targets: Any, bounce: Any = None) -> int:
            start = ctypes.addressof(ctypes.c_char.from_buffer(targets[0]))
            starts.setdefault(threading.current_thread().name, []).append(start)
            return super().read(offset, targets, bounce)

    whole, flags = mmap.mmap, []

    def mapped(*arguments: Any, **options: Any) -> mmap.mmap:
        flags.append(options.get("flags"))
        return whole(*arguments, **options)

    file, block = Watching(path, announce=False), 64 << 10
    monkeypatch.setattr("mimo_edge.bench.flash_rate.mmap.mmap", mapped)
    try:
        with Targets(8 * block + 100) as into:
            measure_reads([(file, 0)], block, 2, into, 60.0, 24 * block)
            with pytest.raises(UsageError, match="9 blocks"):
                into.of(0, 9, block)
    finally:
        file.close()
    assert flags == [mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS]
    first, second = sorted(starts.values())
    assert first[0] % (2 << 20) == 0
    assert sorted({*first, *second}) == [first[0] + at * block for at in range(8)]
    for lane in (first, second):
        assert len(lane) == 12
        assert len(set(lane)) == 4
        assert lane[:4] == lane[4:8] == lane[8:]


def test_memory_to_read_into_stays_below_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mimo_edge.machine.available_bytes", lambda: 1 << 40)
    monkeypatch.setattr("mimo_edge.machine.cgroup_limit_bytes", lambda: 400 << 20)
    assert flash_rates._target_bytes(1 << 20) == 100 << 20
    assert flash_rates._target_bytes(128 << 20) == 128 << 20  # less would measure nothing
    monkeypatch.setattr("mimo_edge.machine.cgroup_limit_bytes", lambda: None)
    assert flash_rates._target_bytes(1 << 20) == flash_rates.TARGET_BYTES


class _Disturbed:
    """Products that reads slow down to a half, beside reads at known rates."""

    def __init__(self, *_: Any) -> None: ...

    def beside(self, work: Callable[[], Any]) -> tuple[Any, float]:
        found = work()
        return found, 10.0 if found is None else 5.0

    def __enter__(self) -> _Disturbed:
        return self

    def __exit__(self, *_: object) -> None: ...


def test_what_reads_and_products_leave_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of reads alone and beside products. The middle one counts, and no share is more than
    all or less than a profile may hold."""
    rates = iter([100.0, 80.0, 100.0, 70.0, 100.0, 90.0])
    lanes: list[int] = []

    def reads(places: Any, block: int, count: int, *_: Any) -> float:
        lanes.append(count)
        return next(rates)

    monkeypatch.setattr(beside, "measure_reads", reads)
    monkeypatch.setattr(beside, "Products", _Disturbed)
    with Targets(1 << 20) as into:
        found = beside.measure_beside([], 1 << 16, 4, into, 1, 1 << 20, 0.01, 1 << 20)
    assert found == Beside(reads=0.8, kernels=0.5)
    assert lanes == [4] * 6
    for beside_rate, share in ((2.0, 1.0), (1e-9, 0.01)):
        rates = iter([1.0, beside_rate] * 3)
        with Targets(1 << 20) as into:
            found = beside.measure_beside([], 1 << 16, 1, into, 1, 1 << 20, 0.01, 1 << 20)
        assert found.reads == share


def test_products_go_on_until_the_work_beside_them_is_done() -> None:
    device, computed, threads = Device(1), [0], []
    try:
        with Products(device, get_format("Q4_0"), 16 << 20) as products:
            for graph in products._graphs:
                whole = graph.compute

                def compute(whole: Callable[[], None] = whole) -> None:
                    computed[0] += 1
                    whole()

                graph.compute = compute  # type: ignore[method-assign]

            def work() -> str:
                threads.append(threading.current_thread())
                until = computed[0] + 3
                while computed[0] < until:
                    time.sleep(1e-4)
                return "done"

            found, rate = products.beside(work)
            assert found == "done"
            assert rate > 0
            assert products.beside(lambda: None)[1] > 0  # over at once: one graph all the same
            assert threads[0] is not threading.current_thread()
            with pytest.raises(DeviceError, match="broken"):
                products.beside(lambda: exec("raise error", {"error": DeviceError("broken")}))
    finally:
        device.close()


def test_what_an_expert_costs_besides_its_read(monkeypatch: pytest.MonkeyPatch, disk: Path) -> None:
    """What steps of few and of many reads differ in, waiting not counted, over the reads."""
    found = {127: (5e-3, 2.0), 8: (45e-3, 82.0)}

    @contextmanager
    def opened(path: Path, threads: int, slots: int) -> Iterator[tuple[int, list[None]]]:
        yield slots, [None]

    monkeypatch.setattr(engine_costs, "_opened", opened)
    monkeypatch.setattr(engine_costs, "_busy", lambda slots, *_: found[slots])
    path = engine_costs._model(disk, engine_costs.MANY)
    assert engine_costs._arrival(path, 1, 0.1) == pytest.approx(0.5e-3)


def test_the_command_writes_what_auto_reads(disk: Path, tmp_path: Path) -> None:
    arguments = ["probe", "--dir", str(disk), "--file-size", "16MiB", "--threads", "1"]
    done = CliRunner().invoke(app, [*arguments, "--seconds", "0.1"])
    assert done.exit_code == 0, done.output
    assert "GMAC/s" in done.stdout
    assert "direct" in done.stdout or "buffered" in done.stdout
    assert (tmp_path / "config" / "mimo-edge" / "this-machine.toml").is_file()
    auto = load_profile("auto")
    assert auto.measured
    assert "probe" in auto.sources["kernels"].text
    named = tmp_path / "named.toml"
    done = CliRunner().invoke(app, [*arguments, "--seconds", "0.1", "-o", str(named), "--json"])
    assert json.loads(done.stdout)["path"] == str(named)
    assert load_profile(named).measured
    done = CliRunner().invoke(
        app, [*arguments, "--seconds", "0.1", "-o", str(tmp_path / "no" / "x.toml")]
    )
    assert done.exit_code == 1
    assert "cannot write" in done.stderr


@pytest.mark.usefixtures("only_reads")
def test_what_computes_is_shown(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """libggml with what it was compiled for; on ARM its variant and the kernel's words, too."""
    monkeypatch.setattr(probing, "hwcap_words", lambda: (0x8FB, 0x2))
    found = {"version": "0.25.3", "variant": "armv8.0_1", "compiled_for": ["neon"]}
    monkeypatch.setattr("mimo_edge.runtimes.ggml.bindings.describe_library", lambda: found)
    arguments = ["probe", "--dir", str(disk), "--file-size", "16MiB", "--threads", "1"]
    done = CliRunner().invoke(app, [*arguments, "--seconds", "0.1"])
    assert done.exit_code == 0, done.output
    assert "libggml     0.25.3, variant armv8.0_1, compiled for neon\n" in done.stdout
    assert "HWCAP       0x8fb, HWCAP2 0x2\n" in done.stdout
    shown = measured(disk, seconds=0.05).to_dict()
    assert (shown["hwcap"], shown["libggml"]) == (["0x8fb", "0x2"], found)
