"""The governor of a real runtime: what opens it, what it changes, and a cgroup that shrinks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
from checkpoint_factory import write_bundle
from make_random_model import write_model

from mimo_edge.api import Runtime
from mimo_edge.bench.cgroup import MemoryCgroup
from mimo_edge.budget import plan
from mimo_edge.bundle import Bundle
from mimo_edge.errors import DeviceError
from mimo_edge.governor import Battery, Bound, MemoryReading, governor
from mimo_edge.memory_cgroups import CgroupMemory

MIB = 1 << 20
PROMPT = [5, 17, 3, 40, 2, 9, 33, 8] * 6


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    return write_bundle(folder, "flash", recipe="f32")


class Sensors:
    """What a host application might pass."""

    def __init__(self, celsius: float = 20.0) -> None:
        self.celsius = celsius
        self.bounds: tuple[Bound, ...] = ()

    def temperatures(self) -> Mapping[str, float]:
        return {"skin": self.celsius}

    def battery(self) -> Battery | None:
        return None

    def memory(self) -> MemoryReading:
        return MemoryReading(None, self.bounds)


def opened(bundle: Path, **options: Any) -> Runtime:
    given = {"backend": "ggml", "context": 256, "threads": 2, **options}
    return Runtime.open(bundle, **given)


def test_a_profile_brings_its_governor_and_one_can_be_had_without(bundle: Path) -> None:
    with opened(bundle) as runtime:
        assert runtime.stats()["governor"] is None
        assert runtime.stats()["events"] == {"counts": {}, "events": []}
    with opened(bundle, profile="phone-24gb") as runtime:
        found = runtime.stats()["governor"]
        assert found["limits"] == "phone-24gb"
        assert found["temperature_limit_c"] == 45
        assert (found["threads"], found["threads_full"]) == (2, 2)
        assert found["drafts_full"] == 3
    with opened(bundle, profile="phone-24gb", governor=False) as runtime:
        assert runtime.stats()["governor"] is None
    with opened(bundle, governor=True, draft=1) as runtime:
        assert runtime.stats()["governor"]["limits"] == "auto"
        assert runtime.stats()["governor"]["drafts_full"] == 1


def test_readings_of_the_host_application_count(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(governor, "READ_EVERY_S", 0.0)
    monkeypatch.setattr("mimo_edge.governor.cooling.SETTLE_S", 0.0)
    with opened(bundle) as runtime:
        want = runtime.session().generate(PROMPT, max_tokens=40).token_ids
    sensors = Sensors(99.0)
    with opened(bundle, profile="phone-24gb", governor=sensors, draft=3) as runtime:
        assert runtime.session().generate(PROMPT, max_tokens=40).token_ids == want
        found = runtime.stats()
        assert found["governor"]["threads"] == runtime._model.backend.threads == 1  # type: ignore[attr-defined]
        assert found["governor"]["drafts"] == runtime.engine.draft_limit == 0
        assert found["governor"]["temperature_c"] == 99.0
        assert found["events"]["counts"]["temperature"] == len(found["events"]["events"]) == 2
        drafted = found["drafted_by_depth"]
        runtime.session().generate(PROMPT, max_tokens=10)
        assert runtime.stats()["drafted_by_depth"] == drafted


def test_other_threads_from_step_to_step_change_no_token(bundle: Path) -> None:
    """Up to 511 tokens of context not even a bit: each row of a product is one thread's."""
    with opened(bundle, draft=0) as runtime:
        ids = list(range(3, 90))
        whole = runtime.logits(ids)
        backend: Any = runtime._model.backend
        turns = [2, 1]

        def turn() -> None:
            turns.append(3 - turns[-1])
            backend.set_threads(turns[-1])

        want = runtime.session().generate(PROMPT, max_tokens=80).token_ids
        runtime.engine.between_tokens = turn
        assert runtime.session().generate(PROMPT, max_tokens=80).token_ids == want
        assert len(turns) > 80
        backend.set_threads(1)
        assert (runtime.logits(ids) == whole).all()


def test_a_trim_of_the_application_is_an_event(bundle: Path) -> None:
    """Also without a governor; and idle conversations go with the slots."""
    with opened(bundle) as runtime:
        pool = runtime.sequence_pool(4)
        session = runtime.session(pool=pool)
        session.generate(PROMPT, max_tokens=4)
        session.close()
        assert pool.idle == 1
        held = pool.nbytes()
        assert held > 0
        assert runtime.trim(0.5) == held
        assert pool.idle == 0
        assert runtime.trim(0.5) == 0
        assert not len(runtime._model.backend._idle)  # type: ignore[attr-defined]
        (event,) = runtime.stats()["events"]["events"]
        assert (event["cause"], event["reading"]) == ("application", "trim(0.5)")


# --- a cgroup that shrinks ---------------------------------------------------------------------

LARGE = tiny.streamed_config()

# Answers one prompt after the other, and says after each how many slots there are, until there is
# something on its standard input.
CHILD = """
import json, select, sys
from mimo_edge.api import Runtime
from mimo_edge.governor import governor, pressure
governor.READ_EVERY_S, pressure.CALM_S, pressure.GROW_EVERY_S = 0.02, 0.5, 0.1
path, ram, governed = sys.argv[1:]
with Runtime.open(path, backend="ggml", ram=int(ram), context=256, threads=1, draft=0,
                  governor=governed == "governed") as runtime:
    number = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        prompt = [(7 * i + 3 + number % 5) % 1000 for i in range(60)]
        answer = runtime.session().generate(prompt, max_tokens=25).token_ids
        stats = runtime.stats()["experts"]
        print(json.dumps([number % 5, answer, stats["slots"], stats["slots_used"]]), flush=True)
        number += 1
    print(json.dumps(runtime.stats()["events"]), flush=True)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF of 120 MiB, most of it routed experts."""
    path = tmp_path_factory.mktemp("large") / "m.gguf"
    write_model(path, LARGE, experts="Q8_0", dense="Q8_0", head="Q8_0")
    return path


@pytest.fixture
def group() -> Iterator[MemoryCgroup]:
    try:
        made = MemoryCgroup.create()
    except DeviceError as error:
        pytest.skip(error.message)
    with made:
        yield made


def bound(group: MemoryCgroup, limit: int) -> bool:
    """Set the limit; whether the kernel took it."""
    try:
        (group.path / group._files.limit).write_text(str(limit))
    except OSError:
        return False
    return True


def started(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def next_answer(child: subprocess.Popen[str]) -> Any:
    assert child.stdout is not None
    assert child.stderr is not None
    line = child.stdout.readline()
    assert line, child.stderr.read()
    return json.loads(line)


def test_slots_go_while_the_cgroup_shrinks_and_come_back_when_it_grows(
    large: Path, group: MemoryCgroup
) -> None:
    """The kernel takes memory away from a process that answers: it is not killed, every answer is
    the one of a model left in peace, and it uses memory again once there is some."""
    # Room for about half of the experts; an emulator's own memory counts in the cgroup, too.
    ram = (330 if "QEMU_CPU" in os.environ else 230) * MIB
    with Bundle.open(large) as files:
        slot = plan(files.config, files.tensors, 256, ram).slot_bytes
    assert bound(group, ram)
    words = [sys.executable, "-c", CHILD, str(large), str(ram)]
    child, found = started(group.command([*words, "governed"])), []
    try:

        def more() -> tuple[int, int]:
            found.append(next_answer(child))
            return found[-1][2], found[-1][3]

        for _ in range(5):
            slots, used = more()
        begun = slots
        assert begun > 60
        assert used > 40
        limit, counted = ram, CgroupMemory(group.path, group.version, "")
        for _ in range(400):  # answers; a few seconds
            # As the system does with a cgroup of less use: a little above what it holds now, files
            # not counted that the kernel can drop. (Who reads a library first has its pages.)
            usage = (counted.usage_bytes() or limit) - counted.droppable_bytes()
            if usage + 3 * MIB < limit and bound(group, usage + 3 * MIB):
                limit = usage + 3 * MIB
            slots, used = more()
            if slots < begun // 3:
                break
        assert slots < begun // 3, f"{slots} of {begun} slots under a limit of {limit} bytes"
        assert limit < ram - 40 * slot
        assert bound(group, ram)
        for _ in range(400):
            slots, used = more()
            if slots == begun:
                break
        assert slots == begun
        rest, log = child.communicate("\n", timeout=60)
    except BaseException:
        child.kill()
        child.communicate()
        raise
    assert child.returncode == 0, log
    assert group.kills() == 0
    *answers, events = [json.loads(line) for line in rest.splitlines()]
    assert events["counts"]["memory"] > 3
    assert "left in cgroup" in json.dumps(events)
    # Streamed as well, but left in peace: kernels for resident experts may round otherwise.
    other = started([*words, "alone"])
    try:
        want = [next_answer(other)[1] for _ in range(5)]
    finally:
        other.kill()
        other.communicate()
    wrong = [number for number, answer, *_ in (*found, *answers) if answer != want[number]]
    assert not wrong
