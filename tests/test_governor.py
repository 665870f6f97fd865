"""The governor: heat, battery and memory, with a clock and sensors made for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
from fake_backend import FakeBackend

from mimo_edge.engine import Engine
from mimo_edge.governor import Battery, Bound, Governor, Limits, MemoryReading, SystemSensors
from mimo_edge.governor.cooling import RECOVER_S, SETTLE_S, Cooling, Step, ladder
from mimo_edge.governor.events import EventLog
from mimo_edge.governor.pressure import CALM_S, GROW_EVERY_S, marks
from mimo_edge.governor.slots import SlotShares
from mimo_edge.sampling import Sampler, SamplingParams

MIB = 1 << 20
LIMITS = Limits(60.0, ("*",), 0.2, 0.1, "a test")


class Device:
    """A device whose clock and sensors a test sets; it counts how often it is asked."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.celsius: dict[str, float] = {}
        self.charge: Battery | None = None
        self.stalled_s: float | None = None
        self.bounds: tuple[Bound, ...] = ()
        self.asked = 0

    def clock(self) -> float:
        return self.now

    def temperatures(self) -> Mapping[str, float]:
        self.asked += 1
        return self.celsius

    def battery(self) -> Battery | None:
        return self.charge

    def memory(self) -> MemoryReading:
        return MemoryReading(self.stalled_s, self.bounds)


class Workers:
    """Threads that can be set."""

    def __init__(self, count: int) -> None:
        self.threads = count
        self.history = [count]

    def set_threads(self, count: int) -> None:
        self.threads = count
        self.history.append(count)


class FakeSlots:
    """Slots that are given and taken at once, all of them filled."""

    planned, slot_bytes, least = 64, MIB, 4

    def __init__(self) -> None:
        self.count = self.used = self.planned

    def resize(self, count: int, timeout_s: float) -> int:
        before, self.count = self.count, max(self.least, min(count, self.planned))
        self.used = self.count
        return max(0, before - self.count) * self.slot_bytes


class Rig:
    """A governor with everything around it."""

    def __init__(self, threads: int = 4, drafts: int = 3, limits: Limits = LIMITS) -> None:
        self.device, self.workers, self.events = Device(), Workers(threads), EventLog()
        self.slots = FakeSlots()
        self.shares = SlotShares(self.slots)
        self.drafts = [drafts]
        self.idle = 0
        self.governor = Governor(
            limits,
            self.device,
            self.events,
            threads=self.workers,
            drafts=drafts,
            limit_drafts=self.drafts.append,
            slots=self.shares,
            drop_idle=self._drop,
            clock=self.device.clock,
        )

    def _drop(self) -> int:
        dropped, self.idle = self.idle, 0
        return dropped

    def run(self, seconds: float, step: float = 1.0) -> None:
        """Tokens for that long, one every `step` seconds."""
        end = self.device.now + seconds
        while self.device.now < end:
            self.device.now += step
            self.governor.between_tokens()

    @property
    def now_used(self) -> tuple[int, int]:
        return self.workers.threads, self.drafts[-1]

    def log(self) -> list[tuple[str, str]]:
        found = self.events.to_dict()["events"]
        return [(event["cause"], event["action"]) for event in found]


@pytest.fixture
def rig() -> Rig:
    return Rig()


# --- heat --------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [None, 1, 2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_steps_take_threads_to_half_then_drafts_then_the_rest(
    threads: int | None, drafts: int
) -> None:
    steps, saving = ladder(threads, drafts)
    assert steps[0] == Step(threads, drafts)
    assert steps[-1] == Step(None if threads is None else 1, 0)
    assert len(set(steps)) == len(steps)
    assert steps[saving].drafts == 0
    half = None if threads is None else -(-threads // 2)
    assert steps[saving].threads == half
    for before, after in pairwise(steps):
        fewer_threads = before.threads != after.threads
        assert fewer_threads != (before.drafts != after.drafts)
        if fewer_threads:
            assert after.threads is not None
            assert before.threads is not None
            assert after.threads < before.threads
            # all drafts are left while there are more than half of the threads
            assert after.drafts == (drafts if before.threads > (half or 0) else 0)


def test_heat_takes_threads_then_drafts_and_gives_them_back(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.device.celsius = {"cpu": 59.0, "skin": 40.0}
    rig.run(60)
    assert rig.now_used == (4, 3)
    assert not rig.log()
    rig.device.celsius["cpu"] = 61.0
    with caplog.at_level(logging.INFO, "mimo_edge.governor"):
        rig.run(200)
    assert rig.now_used == (1, 0)
    assert rig.workers.history == [4, 3, 2, 2, 2, 2, 1]
    assert rig.drafts == [3, 3, 3, 2, 1, 0, 0]
    assert rig.log()[0] == ("temperature", "threads 4 -> 3")
    assert "temperature: threads 4 -> 3 (cpu 61.0 C, limit 60 C)" in caplog.text
    rig.device.celsius["cpu"] = 58.0  # below the limit, but not by enough
    rig.run(1000)
    assert rig.now_used == (1, 0)
    rig.device.celsius["cpu"] = 50.0
    rig.run(6 * (RECOVER_S + 1))
    assert rig.now_used == (4, 3)
    assert rig.log()[-1] == ("temperature", "threads 3 -> 4")


def test_a_step_is_given_time_to_show(rig: Rig) -> None:
    rig.device.celsius = {"cpu": 61.0}
    rig.run(SETTLE_S - 1)
    assert rig.now_used == (3, 3)
    rig.run(SETTLE_S)
    assert rig.now_used == (2, 3)


def test_far_above_the_limit_two_steps_go_at_once(rig: Rig) -> None:
    rig.device.celsius = {"cpu": 70.0}
    rig.run(1)
    assert rig.now_used == (2, 3)


def test_a_step_back_that_heats_again_is_tried_ever_more_rarely() -> None:
    """A device that is hot at step 0 and cool at step 1."""
    cooling, now, ups = Cooling(60.0, 3), 0.0, []
    level = 0
    for _ in range(4000):
        now += 1
        after = cooling.update(now, 50.0 if level else 61.0)
        if after < level:
            ups.append(now)
        level = after
    gaps = [b - a for a, b in pairwise(ups)]
    assert gaps == sorted(gaps)
    assert gaps[0] < 3 * RECOVER_S
    assert gaps[-1] > 8 * RECOVER_S


def test_threads_that_cannot_change_are_left_alone() -> None:
    device, events, drafts = Device(), EventLog(), [3]
    governor = Governor(
        LIMITS, device, events, threads=None, drafts=3, limit_drafts=drafts.append, slots=None,
        clock=device.clock,
    )  # fmt: skip
    device.celsius = {"cpu": 61.0}
    for _ in range(60):
        device.now += 1
        governor.between_tokens()
    assert drafts == [3, 2, 1, 0]
    assert governor.to_dict()["threads"] is None


# --- battery -----------------------------------------------------------------------------------


def test_a_low_battery_halves_threads_and_stops_drafts(rig: Rig) -> None:
    rig.device.charge = Battery(0.5, True)
    rig.run(60)
    assert rig.now_used == (4, 3)
    rig.device.charge = Battery(0.19, True)
    rig.run(60)
    assert rig.now_used == (2, 0)
    assert rig.log() == [("battery", "threads 4 -> 2, drafts 3 -> 0")]
    rig.device.charge = Battery(0.21, True)  # a percent is no difference
    rig.run(60)
    assert rig.now_used == (2, 0)
    rig.device.charge = Battery(0.21, False)  # plugged in
    rig.run(60)
    assert rig.now_used == (4, 3)
    assert rig.log()[-1] == ("battery", "threads 2 -> 4, drafts 0 -> 3")


def test_heat_on_a_low_battery_goes_further(rig: Rig) -> None:
    rig.device.charge = Battery(0.1, True)
    rig.device.celsius = {"cpu": 61.0}
    rig.run(60)
    assert rig.now_used == (1, 0)
    rig.device.celsius = {"cpu": 40.0}
    rig.run(20 * RECOVER_S)
    assert rig.now_used == (2, 0)


def test_a_battery_is_not_saved_where_the_profile_does_not_want_it() -> None:
    rig = Rig(limits=Limits(60.0, ("*",), 0.0, 0.1))
    rig.device.charge = Battery(0.0, True)
    rig.run(60)
    assert not rig.log()


# --- memory ------------------------------------------------------------------------------------


def test_time_spent_waiting_for_memory_gives_slots_back_until_it_stops(rig: Rig) -> None:
    rig.device.stalled_s = 100.0
    rig.run(5)
    assert rig.slots.count == 64
    for _ in range(3):
        rig.device.stalled_s += 0.2  # of a second
        rig.run(1)
    assert rig.slots.count == 64 - 3 * 8
    assert rig.log()[0] == ("memory", "expert slots 64 -> 56 of 64")
    assert "20% of the time" in rig.events.to_dict()["events"][0]["reading"]
    rig.run(CALM_S - 1)
    assert rig.slots.count == 40
    rig.run(2 + 3 * GROW_EVERY_S)
    assert rig.slots.count == 64
    assert rig.log()[-1] == ("memory", "expert slots 56 -> 64 of 64")


def test_a_stall_of_a_while_ago_says_nothing_about_now(rig: Rig) -> None:
    rig.device.stalled_s = 0.0
    rig.run(2)
    rig.device.stalled_s = 50.0
    rig.run(100, step=100)  # nobody asked for a token meanwhile
    assert rig.slots.count == 64


def test_a_bound_with_little_left_gets_what_it_lacks(rig: Rig) -> None:
    bound = Bound("cgroup /a", 640 * MIB, 9 * MIB)
    low, high = marks(bound)
    assert (low, high) == (10 * MIB, 20 * MIB)
    rig.device.bounds = (Bound("this machine", 1 << 34, 1 << 33, machine=True), bound)
    rig.run(1)
    assert rig.slots.count == 64 - 11
    assert rig.log() == [("memory", "expert slots 64 -> 53 of 64")]
    assert "9.0 MiB of 640.0 MiB left in cgroup /a" in rig.events.to_dict()["events"][0]["reading"]
    # back only as far as there is room, however calm it is
    rig.device.bounds = (Bound("cgroup /a", 640 * MIB, 23 * MIB),)
    rig.run(100)
    assert rig.slots.count == 64  # FakeSlots do not take of the room: 3 each time
    assert rig.log()[1] == ("memory", "expert slots 53 -> 56 of 64")


def test_no_slot_comes_back_where_there_is_no_room(rig: Rig) -> None:
    rig.device.bounds = (Bound("cgroup /a", 640 * MIB, 0),)
    rig.run(1)
    assert rig.slots.count == 44
    rig.device.bounds = (Bound("cgroup /a", 640 * MIB, 20 * MIB),)
    rig.run(1000)
    assert rig.slots.count == 44


def test_slots_that_hold_nothing_give_nothing_back(rig: Rig) -> None:
    rig.slots.used = 50
    rig.device.bounds = (Bound("cgroup /a", 640 * MIB, 15 * MIB, 0),)
    rig.run(1)
    rig.device.bounds = (Bound("cgroup /a", 640 * MIB, 15 * MIB, 3),)  # it was met
    rig.run(1)
    assert rig.slots.count == 64 - 14 - 5


def test_a_bound_that_is_met_by_page_cache_alone_is_none(rig: Rig) -> None:
    for hits in range(20):
        rig.device.bounds = (Bound("cgroup /a", 640 * MIB, 300 * MIB, hits),)
        rig.run(1)
    assert not rig.log()


def test_a_token_keeps_its_slots_and_that_is_said_once(rig: Rig) -> None:
    rig.device.bounds = (Bound("cgroup /a", 640 * MIB, -100 * MIB),)
    rig.run(100)
    assert rig.slots.count == rig.slots.least
    assert rig.log() == [("memory", "expert slots 64 -> 4 of 64")]


def test_pressure_that_comes_back_is_waited_for_longer(rig: Rig) -> None:
    """Growing brings pressure at once: each try comes later than the one before."""
    rig.device.stalled_s = 0.0
    ups, before = [], 64
    for _ in range(900):
        if rig.slots.count > 48:
            rig.device.stalled_s += 0.5
        rig.run(1)
        if rig.slots.count > before:
            ups.append(rig.device.now)
        before = rig.slots.count
    gaps = [b - a for a, b in pairwise(ups)]
    assert len(gaps) >= 3
    assert gaps == sorted(gaps)
    assert gaps[-1] > 4 * gaps[0]


def test_the_governor_leaves_what_the_application_asked_for(rig: Rig) -> None:
    assert rig.shares.set("application", 32) == 32 * MIB
    rig.run(100)
    assert rig.slots.count == 32
    rig.device.bounds = (Bound("cgroup /a", 640 * MIB, 0),)
    rig.run(1)
    assert rig.slots.count == 12
    rig.device.bounds = ()
    rig.run(100)
    assert rig.slots.count == 32
    rig.shares.set("application", 0)
    assert rig.slots.count == 64


def test_idle_caches_go_first(rig: Rig) -> None:
    rig.idle = 12345
    rig.device.bounds = (Bound("cgroup /a", 640 * MIB, 9 * MIB),)
    rig.run(2)
    assert rig.log()[0] == ("memory", "12345 bytes of idle caches given back")


def test_between_layers_only_memory_is_looked_at(rig: Rig) -> None:
    rig.device.celsius = {"cpu": 99.0}
    rig.device.bounds = (Bound("cgroup /a", 640 * MIB, 9 * MIB),)
    for _ in range(100):
        rig.device.now += 0.1
        rig.governor.between_layers()
    assert rig.slots.count < 64
    assert rig.now_used == (4, 3)
    assert rig.device.asked == 0


def test_while_the_application_trims_the_governor_waits() -> None:
    import threading

    rig = Rig()
    rig.device.bounds = (Bound("cgroup /a", 640 * MIB, 9 * MIB),)
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with rig.shares.changing() as mine:
            assert mine
            held.set()
            go.wait(20)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(20)
    rig.run(5)
    assert rig.slots.count == 64
    go.set()
    other.join()
    rig.run(1)
    assert rig.slots.count < 64


# --- in the engine -----------------------------------------------------------------------------


def engine_of(rig: Rig, on_call: Callable[[str, int], None]) -> Engine:
    engine = Engine(
        FakeBackend(tiny.tiny_config(), on_call=on_call), 400, 3, clock=rig.device.clock
    )
    engine.between_tokens = rig.governor.between_tokens

    def limit(count: int) -> None:
        rig.drafts.append(count)
        engine.draft_limit = count

    rig.governor._limit_drafts = limit
    return engine


def answer(engine: Engine, count: int = 150) -> list[int]:
    steps = engine.generate(
        engine.sequence(), [5, 6, 7], Sampler(SamplingParams()), max_tokens=count
    )
    return [token for step in steps for token in step]


def test_a_generation_goes_through_all_steps_with_the_same_tokens(rig: Rig) -> None:
    """A fake device that heats up with every call, and one that stays cool."""
    plain = answer(engine_of(Rig(), lambda kind, rows: None))

    def work(kind: str, rows: int) -> None:
        rig.device.now += 0.7
        rig.device.celsius = {"cpu": 30 + 0.4 * (rig.device.now - 1000)}

    engine = engine_of(rig, work)
    assert answer(engine) == plain
    assert rig.now_used == (1, 0)
    assert engine.backend.forwards[-1] == 1  # type: ignore[attr-defined]
    assert max(engine.backend.forwards) == 4  # type: ignore[attr-defined]


def test_sensors_are_read_once_a_second_however_fast_tokens_come(rig: Rig) -> None:
    def work(kind: str, rows: int) -> None:
        rig.device.now += 0.01

    answer(engine_of(rig, work), 300)
    assert rig.device.asked <= rig.device.now - 1000 + 1


def test_a_sensor_that_fails_is_said_once_and_ends_no_answer(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> Mapping[str, float]:
        raise OSError("gone")

    monkeypatch.setattr(rig.device, "temperatures", fails)
    rig.device.charge = Battery(0.1, True)

    def work(kind: str, rows: int) -> None:
        rig.device.now += 1

    answer(engine_of(rig, work))
    assert rig.log().count(("sensor", "temperatures not read any more")) == 1
    assert rig.governor.to_dict()["sensors_failed"] == ["temperatures"]
    assert rig.now_used == (2, 0)  # the battery is still read


def test_events_are_bounded_and_counted() -> None:
    log = EventLog()
    for index in range(1000):
        log.add("memory", f"{index}", "a test", relief=True)
    found = log.to_dict()
    assert found["counts"] == {"memory": 1000}
    assert len(found["events"]) == 100
    assert found["events"][-1]["action"] == "999"


# --- sensors of the system ---------------------------------------------------------------------


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """An empty sysfs and procfs."""
    for folder in ("sys/class/thermal", "sys/class/power_supply", "proc/pressure", "proc/self"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


def sensors(system: Path, *zones: str) -> SystemSensors:
    return SystemSensors(zones or ("*",), sysfs=system / "sys", procfs=system / "proc")


def test_zones_of_the_kinds_wanted_are_read(system: Path) -> None:
    for index, (kind, value) in enumerate(
        [("cpu-0", "71000"), ("sdm-skin-therm", "38500"), ("quiet-therm", "-273000"), ("pm", "x")]
    ):
        zone = system / "sys" / "class" / "thermal" / f"thermal_zone{index}"
        zone.mkdir()
        (zone / "type").write_text(f"{kind}\n")
        (zone / "temp").write_text(f"{value}\n")
    assert sensors(system).temperatures() == {"cpu-0": 71.0, "sdm-skin-therm": 38.5}
    assert sensors(system, "*skin*", "quiet*").temperatures() == {"sdm-skin-therm": 38.5}
    assert sensors(system, "none*").temperatures() == {}


def test_batteries_are_read_and_those_of_mice_are_not(system: Path) -> None:
    folder = system / "sys" / "class" / "power_supply"
    assert sensors(system).battery() is None
    supplies: list[tuple[str, dict[str, str]]] = [
        ("AC", {"type": "Mains", "online": "0"}),
        ("BAT0", {"type": "Battery", "capacity": "17", "status": "Discharging"}),
        ("mouse", {"type": "Battery", "scope": "Device", "capacity": "90", "status": "x"}),
        ("BAT1", {"type": "Battery", "capacity": "none", "status": "Charging"}),
    ]
    for name, files in supplies:
        (folder / name).mkdir()
        for key, value in files.items():
            (folder / name / key).write_text(f"{value}\n")
    assert sensors(system).battery() == Battery(0.17, True)
    (folder / "BAT0" / "status").write_text("Charging\n")
    assert sensors(system).battery() == Battery(0.17, False)


@pytest.mark.parametrize("version", [1, 2])
def test_memory_of_the_machine_and_of_cgroups_is_read(version: int, system: Path) -> None:
    proc, root = system / "proc", system / "sys" / "fs" / "cgroup"
    (proc / "meminfo").write_text("MemTotal: 1000 kB\nMemAvailable: 400 kB\n")
    (proc / "pressure" / "memory").write_text(
        "some avg10=0.00 avg60=0.00 avg300=0.00 total=2500000\nfull avg10=0 total=1\n"
    )
    group = (root / "memory" if version == 1 else root) / "box"
    group.mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("4:memory:/box\n" if version == 1 else "0::/box\n")
    limit, used, stat, hits = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_", "memory.failcnt")
        if version == 1
        else ("memory.high", "memory.current", "", "memory.events")
    )
    (group / limit).write_text(f"{100 * MIB}\n")
    (group / used).write_text(f"{90 * MIB}\n")
    (group / "memory.stat").write_text(
        f"anon 5\n{stat}inactive_file {10 * MIB}\n{stat}active_file {4 * MIB}\nworkingset 1 2\n"
    )
    (group / hits).write_text("7\n" if version == 1 else "low 9\nhigh 4\nmax 3\noom 0\n")
    found = sensors(system).memory()
    assert found.stalled_s == 2.5
    assert found.bounds == (
        Bound("this machine", 1000 << 10, 400 << 10, machine=True),
        Bound("cgroup /box", 100 * MIB, 22 * MIB, 7),
    )
    if version == 2:
        (group / "memory.max").write_text("max\n")
        (group / "memory.pressure").write_text("some avg10=1.00 total=7000000\n")
        assert sensors(system).memory().stalled_s == 7.0


def test_a_system_that_tells_nothing_is_read_as_nothing(tmp_path: Path) -> None:
    found = sensors(tmp_path)
    assert (found.temperatures(), found.battery(), found.memory()) == ({}, None, MemoryReading())


def test_the_real_system_is_readable() -> None:
    reading: Any = SystemSensors().memory()
    assert all(bound.limit_bytes > 0 for bound in reading.bounds)
