"""Device profiles: every one loads, every figure has a source, and nonsense is refused."""

from __future__ import annotations

import logging
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mimo_edge import machine
from mimo_edge.devices import this_machine
from mimo_edge.devices.profile import (
    EVIDENCE,
    FIGURES,
    KernelRate,
    build,
    load_profile,
    plain_seconds,
    profile_names,
)
from mimo_edge.errors import ConfigError, UsageError
from mimo_edge.quant.recipe import Recipe

REQUIRED = {
    "phone-12gb", "phone-16gb", "phone-24gb", "phone-mid", "car-8155", "car-8295", "car-8255",
    "router", "router-1gb", "router-nvme", "router-8gb", "pi5", "workstation",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_probed_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def test_every_class_is_there() -> None:
    assert set(profile_names()) >= REQUIRED


@pytest.mark.parametrize("name", [*profile_names(), "auto"])
def test_every_profile_loads_with_a_source_for_every_figure(name: str, tmp_path: Path) -> None:
    profile = load_profile(name)
    assert profile.name == name
    shown = list(profile.figures())
    assert [key for key, _, _ in shown] == list(FIGURES)
    for key, value, source in shown:
        assert value, key
        assert source.evidence in EVIDENCE
        assert len(source.text) > 3, key
    assert Recipe.named(profile.recipe).name == profile.recipe
    # written out and read again it is the same
    copy = tmp_path / "copy.toml"
    copy.write_text(profile.to_toml(), "utf-8")
    assert load_profile(copy).to_dict()["figures"] == profile.to_dict()["figures"]


def test_a_profile_inherits_what_it_does_not_state() -> None:
    parent, child = load_profile("router-nvme"), load_profile("router-8gb")
    assert child.chain == ("router-nvme", "router")
    assert child.reads == parent.reads
    assert child.ram_bytes > parent.ram_bytes
    assert child.sources["reads"] == parent.sources["reads"]


def test_read_rates_between_and_beyond_the_sizes_listed() -> None:
    phone = load_profile("phone")
    mib = 1 << 20
    assert phone.read_rate(4 * mib) == 2206 * mib
    assert phone.read_rate(100 * mib) == phone.reads[-1].bytes_per_s
    assert 2206 * mib < phone.read_rate(6 * mib) < 2558 * mib
    # below the smallest size a read takes the same time, however little it brings
    small = phone.reads[0]
    assert phone.read_rate(small.block_bytes / 8) == small.bytes_per_s / 8


def test_kernel_rates_grow_with_the_rows() -> None:
    rate = KernelRate(10.0, 20.0, 40.0, 30.0)
    assert [rate.at(n) for n in (0.5, 1, 4, 32, 500)] == [10, 10, 20, 40, 40]
    assert 10 < rate.at(2) < 20 < rate.at(8) < 40
    assert [rate.stored_at(n) for n in (0.5, 1, 32, 500)] == [10, 10, 30, 30]
    assert 10 < rate.stored_at(4) < rate.stored_at(8) < 30


@pytest.mark.parametrize("seconds", [1e-9, 3.21e-4, 9.999e-4, 0.0127, 0.5, 1.0])
def test_times_are_read_back_as_they_were_written(seconds: float, tmp_path: Path) -> None:
    figures = load_profile("phone").to_dict()["figures"]
    for name in figures["cpu.engine"]["value"]:
        figures["cpu.engine"]["value"][name] = plain_seconds(seconds)
    assert build("x", "t", figures, ()).engine.step == pytest.approx(seconds, rel=1e-3)


def profile_text(changed: dict[str, str]) -> str:
    """A whole profile with some lines replaced: "memory.ram" -> what stands after "ram = "."""
    lines, section = [], ""
    for line in load_profile("phone").to_toml().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        key = line.split(" = ")[0]
        if f"{section}.{key}" in changed or (not section and key in changed):
            value = changed.get(f"{section}.{key}", changed.get(key, ""))
            line = f"{key} = {value}" if value else ""
        lines.append(line)
    return "\n".join(lines)


def figure(value: str) -> str:
    return f'{{ value = {value}, evidence = "assumed", source = "a test" }}'


ENGINE = (
    '{ step = "1 ms", layer = "2 us", layer4 = "1 us", streamed = "1 us", streamed4 = "1 us", '
    'drafting = "1 us", draft = "1 ms", logits = "1 us", row = "1 us", arrival = "1 us" }'
)

COLD = (
    '{ any = { row = "1 GMAC/s", rows4 = "1 GMAC/s", batch = "1 GMAC/s", stored = "1 GMAC/s", '
    'cold = ["1 GMAC/s", "1 GMAC/s", "1 GMAC/s", "1 GMAC/s"], cold_stored = "1 GMAC/s" } }'
)

REFUSED: list[tuple[dict[str, str], str]] = [
    ({"memory.ram": figure('"12 GB/s"')}, r"memory\.ram.*not in B"),
    ({"memory.ram": figure("12")}, "not a text with a unit"),
    ({"memory.ram": figure('"12 parsecs"')}, "not in B"),
    ({"memory.ram": figure('"1 B"')}, "outside"),
    ({"memory.bandwidth": figure('"45 GB"')}, "not in B/s"),
    ({"memory.bandwidth": figure('"45 PB/s"')}, "not in B/s"),
    ({"memory.bandwidth": figure('"900000 GB/s"')}, "outside"),
    ({"memory.process": figure('"13 GiB"')}, "more than there is"),
    ({"memory.ram": '"12 GB"'}, "value, evidence and source"),
    ({"memory.ram": '{ value = "12 GB", evidence = "assumed" }'}, "value, evidence and source"),
    ({"memory.ram": '{ value = "12 GB", evidence = "hearsay", source = "x" }'}, "hearsay"),
    ({"memory.ram": '{ value = "12 GB", evidence = "assumed", source = "" }'}, "no text"),
    ({"memory.ram": ""}, r"lacks memory\.ram"),
    ({"cpu.threads": figure("400")}, "threads on 8 cores"),
    ({"cpu.threads": figure("true")}, "whole number"),
    ({"cpu.isa": figure('["dotprod", "warp"]')}, "warp"),
    ({"cpu.cores": figure("[]")}, "list of tables"),
    ({"cpu.cores": figure('[{ kind = "A", count = 2, clock = "4 s" }]')}, "not in Hz"),
    ({"cpu.cores": figure('[{ kind = "A", count = 9000, clock = "4 GHz" }]')}, "9000 cores"),
    ({"cpu.kernels": figure('{ q4_0 = { row = "1 GMAC/s" } }')}, "row, rows4, batch"),
    ({"cpu.kernels": figure(COLD.replace('"1 GMAC/s"]', '"1 GB/s"]'))}, "not in MAC/s"),
    ({"cpu.kernels": figure(COLD.replace(', "1 GMAC/s"]', "]"))}, "rates of 1 to 4 rows"),
    ({"cpu.kernels": figure(COLD.replace('cold_stored = "1 GMAC/s"', 'x = "1 s"'))}, "cold_stored"),
    ({"cpu.engine": figure('{ step = "1 ms" }')}, "step, layer, layer4, streamed"),
    ({"cpu.engine": figure(ENGINE.replace("2 us", "3 h"))}, "not in s"),
    ({"cpu.engine": figure(ENGINE.replace("2 us", "70 s"))}, "engine cost layer = 70 s is outside"),
    ({"power.battery_low": figure("1.2")}, "outside"),
    ({"memory.stall": figure("0")}, "outside"),
    ({"thermal.zones": figure('"cpu"')}, "list of texts"),
    ({"storage.reads": figure('[{ block = "4 MiB", rate = "1 GB/s" }, '
                              '{ block = "1 MiB", rate = "1 GB/s" }]')}, "do not rise"),
    ({"storage.reads": figure('[{ block = "1 MiB", rate = "1 GB/s" }, '
                              '{ block = "2 MiB", rate = "4 GB/s" }]')}, "less time"),
    ({"storage.beside": figure("{ reads = 1.0 }")}, "reads, kernels"),
    ({"storage.beside": figure("{ reads = 1.0, kernels = 1.5 }")}, "kernels = 1.5 is outside"),
    ({"storage.beside": figure("{ reads = 0, kernels = 1.0 }")}, "reads = 0 is outside"),
    ({"storage.hot": figure("1.5")}, "outside"),
    ({"storage.hot": figure('"cool"')}, "not a number"),
    ({"thermal.limit": figure('"45 F"')}, "not in C"),
    ({"run.recipe": figure('"q9"')}, "q9"),
    ({"run.kv_type": figure('"q3"')}, "q3"),
    ({"run.draft": figure("9")}, "draft 9"),
    ({"run.context": figure("0")}, "outside"),
    ({"schema": "2"}, "schema 2"),
    ({"title": ""}, "no title"),
    ({"title": '"t"\ncolour = "red"'}, "unknown key 'colour'"),
    ({"memory.ram": figure('"12 GB"') + '\nnoise = 3'}, r"unknown figures \['memory.noise'\]"),
    ({"title": '"t"\ninherits = "auto"'}, "inherits 'auto'"),
    ({"title": '"t"\ninherits = 3'}, "inherits 3"),
    ({"title": '"t"\n]'}, "not TOML"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_nonsense_is_refused(changed: dict[str, str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(profile_text(changed), "utf-8")
    with pytest.raises(ConfigError, match=message):
        load_profile(path)


def test_profiles_that_inherit_each_other_are_refused(tmp_path: Path) -> None:
    a, b = tmp_path / "a.toml", tmp_path / "b.toml"
    for path, parent in ((a, b), (b, a)):
        path.write_text(f'schema = 1\ntitle = "t"\ninherits = "{parent}"\n', "utf-8")
    with pytest.raises(ConfigError, match=r"circle.*a\.toml -> .*b\.toml -> .*a\.toml"):
        load_profile(a)
    a.write_text(f'schema = 1\ntitle = "t"\ninherits = "{a}"\n', "utf-8")
    with pytest.raises(ConfigError, match="circle"):
        load_profile(a)


def test_names_of_no_profile_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'toaster'.*phone"):
        load_profile("toaster")
    with pytest.raises(UsageError, match="cannot read"):
        load_profile(tmp_path / "absent.toml")
    with pytest.raises(UsageError, match=r"no profile '\.\./phone'"):
        load_profile("../phone")
    with pytest.raises(UsageError, match="no profile ''"):
        load_profile("")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_profile(tmp_path / "b.toml")


# --- this machine ------------------------------------------------------------------------------


def test_this_machine_without_a_probe_says_what_it_assumes(tmp_path: Path) -> None:
    profile = load_profile("auto")
    assert profile.threads == machine.usable_cores()
    assert profile.ram_bytes == machine.memory_bytes()
    assert profile.process_bytes <= profile.ram_bytes
    assert abs(profile.storage_bytes - shutil.disk_usage(Path.cwd()).free) < 2 << 30
    for name in ("memory_bytes_per_s", "kernels", "reads"):
        assert profile.sources[name].evidence == "assumed"
        assert "probe" in profile.sources[name].text
    assert not profile.measured


def test_this_machine_with_a_probe_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = this_machine.measured_path()
    assert path.parent.parent == tmp_path / "config"
    figures = this_machine.known_figures()
    measured: dict[str, Any] = {
        "memory.bandwidth": "12.5 GB/s",
        "memory.process": "64 MiB",  # what was free then does not matter now
    }
    for key, value in measured.items():
        figures[key] = {"value": value, "evidence": "measured", "source": "a test"}
    path.parent.mkdir(parents=True)
    path.write_text(build("x", this_machine.title(), figures, ()).to_toml(), "utf-8")
    text = path.read_text("utf-8")
    # one that an older version wrote: what it did not know yet is assumed
    path.write_text("".join(x for x in text.splitlines(True) if not x.startswith("engine")))
    assert load_profile("auto").sources["engine"].evidence == "assumed"
    path.write_text(text, "utf-8")
    profile = load_profile("auto")
    assert profile.memory_bytes_per_s == 12.5e9
    assert profile.process_bytes > 64 << 20
    # one that was carried over from another machine is not used
    path.write_text(build("x", "This machine: another", figures, ()).to_toml(), "utf-8")
    with caplog.at_level(logging.WARNING):
        assert load_profile("auto").memory_bytes_per_s != 12.5e9
    assert "another machine" in caplog.text
    path.write_text("schema = 7", "utf-8")
    with pytest.raises(ConfigError, match="schema"):
        load_profile("auto")


def test_a_probe_of_another_version_is_to_be_repeated(tmp_path: Path) -> None:
    path = this_machine.measured_path()
    path.parent.mkdir(parents=True)
    whole = build("x", this_machine.title(), this_machine.known_figures(), ()).to_toml()
    lines = [line for line in whole.splitlines() if line.startswith("engine = ")]
    cut = re.sub(r', row = "[^"]*"', "", lines[0])
    path.write_text(whole.replace(lines[0], cut), "utf-8")
    with pytest.raises(ConfigError, match="run mimo-edge probe again"):
        load_profile("auto")


def test_engine_figures_are_those_of_one_probe_times_what_their_source_says() -> None:
    """As tools/engine_figures.py writes them."""
    for name in profile_names():
        profile = load_profile(name)
        factor = re.search(r"([0-9.]+) times it", profile.sources["engine"].text)
        for key, microseconds in this_machine._ENGINE_US.items():
            want = microseconds * 1e-6 * (float(factor[1]) if factor else 1.0)
            assert getattr(profile.engine, key) == pytest.approx(want, rel=0.01), (name, key)
        assert asdict(profile.beside) == this_machine._BESIDE


def test_work_and_caches_are_read(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    ticks = os.sysconf("SC_CLK_TCK")
    stat.write_text("cpu  100 20 30 5000 6000 7 8 9 3 0\ncpu0 1 2\n")
    assert machine.busy_seconds(stat) == pytest.approx(174 / ticks)
    stat.write_text("cpu 1 2\n")
    assert machine.busy_seconds(stat) is None
    assert machine.busy_seconds(tmp_path / "absent") is None
    for cpu, (level, size, shared) in enumerate(
        [(1, "32K", "0"), (2, "12288K", "0-1"), (2, "12288K", "0-1"), (2, "512K", "2")]
    ):
        folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{level}"
        folder.mkdir(parents=True)
        for key, value in (("level", level), ("size", size), ("shared_cpu_list", shared)):
            (folder / key).write_text(f"{value}\n")
    assert machine.cache_bytes(tmp_path) == (12288 + 512) << 10
    assert machine.cache_bytes(tmp_path / "absent") is None


def test_sensors_are_read_and_named(tmp_path: Path) -> None:
    for name, kind, value in (("0", "cpu", "45000"), ("1", "cpu", "51500"), ("2", "x", "what")):
        zone = tmp_path / f"thermal_zone{name}"
        zone.mkdir()
        (zone / "type").write_text(kind + "\n")
        (zone / "temp").write_text(value + "\n")
    assert machine.thermal_zones(tmp_path) == {"cpu": 45.0, "cpu (thermal_zone1)": 51.5}
    assert machine.thermal_zones(tmp_path / "absent") == {}


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_every_cgroup_above_count(version: int, tmp_path: Path) -> None:
    base = tmp_path / "memory" if version == 1 else tmp_path
    limit, used = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes")
        if version == 1
        else ("memory.max", "memory.current")
    )
    inner = base / "outer" / "inner"
    inner.mkdir(parents=True)
    membership = tmp_path / "cgroup"
    membership.write_text("4:memory:/outer/inner\n" if version == 1 else "0::/outer/inner\n")
    assert machine.cgroup_limit_bytes(tmp_path, membership) is None
    (inner / limit).write_text("max\n" if version == 2 else f"{(1 << 63) - 4096}\n")
    assert machine.cgroup_limit_bytes(tmp_path, membership) is None
    (base / "outer" / limit).write_text("1000000\n")
    (base / "outer" / used).write_text("400000\n")
    assert machine.cgroup_limit_bytes(tmp_path, membership) == 600000
    (inner / limit).write_text("500000\n")
    assert machine.cgroup_limit_bytes(tmp_path, membership) == 500000
