"""plan and devices on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mimo_edge.cli.main import app
from mimo_edge.devices.profile import FIGURES, load_profile, profile_names


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


ROUTER = """\
MiMo-V2-Flash, recipe q4_0, on router: Router, 2 GB, 4x Cortex-A73, USB disk
verdict: does not fit
  it needs at least * of memory, the process may hold 1.17 GiB of the device's 1.86 GiB
  MiMo-V2-Flash is not practical on this device, whatever is changed

flash      165.54 GiB of 465.66 GiB: fits
RAM        needs *, has 1.17 GiB: does not fit
resident   6.28 GiB of weights

memory *
"""


def test_a_plan_that_does_not_fit_reads_so() -> None:
    done = call("plan", "MiMo-V2-Flash", "--profile", "router")
    assert done.exit_code == 0, done.output
    shown = done.stdout.splitlines()
    for line, expected in zip(shown, ROUTER.splitlines(), strict=False):
        start, _, end = expected.partition("*")
        assert line.startswith(start)
        assert line.endswith(end)
    assert "tok/s with" not in done.stdout
    assert "what helps, best first:" in done.stdout
    assert "note: OpenWrt: musl" in done.stdout


def test_a_plan_that_fits_shows_speed_and_what_limits_it() -> None:
    done = call("plan", "MiMo-7B", "--profile", "phone", "--context", "2048")
    assert done.exit_code == 0, done.output
    assert "verdict: usable" in done.stdout
    assert "bound by memory bandwidth (hot " in done.stdout
    assert "without MTP" in done.stdout
    assert "KV cache" in done.stdout
    assert "what helps" not in done.stdout


def test_a_plan_as_json() -> None:
    done = call(
        "plan", "MiMo-V2-Flash", "--profile", "phone-24gb", "--draft", "1", "--json",
        "--recipe", "q2_k", "--routes", "uniform", "--acceptance", "0.5", "--kv-type", "q8_0",
        "--ram", "14GiB", "--depth", "100", "--prompt", "64",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert made["recipe"] == "q2_k"
    assert made["ram"] == 14 << 30
    assert made["budget"]["kv_type"] == "q8_0"
    assert made["forecast"]["depth"] == 100
    assert made["forecast"]["prefill"]["tokens"] == 64
    assert made["forecast"]["decode"]["draft"] == 1
    assert made["forecast"]["decode"]["tokens_per_step"] == 1.5
    assert made["forecast"]["hit_rate"] == pytest.approx(
        made["budget"]["slots"] / made["budget"]["experts"]
    )


def test_plans_side_by_side() -> None:
    done = call("plan", "MiMo-7B", "--profile", "phone", "--compare", "pi5,q8_0")
    assert done.exit_code == 0, done.output
    head = next(line for line in done.stdout.splitlines() if "phone q4_0" in line)
    assert head.split() == ["phone", "q4_0", "pi5", "q4_0", "phone", "q8_0"]
    assert "phone q8_0: it needs at least" in done.stdout
    done = call("plan", "MiMo-7B", "--profile", "phone", "--compare", "pi5,q8_0", "--json")
    plans = json.loads(done.stdout)["plans"]
    assert [(p["profile"], p["recipe"], p["fits"]) for p in plans] == [
        ("phone", "q4_0", True),
        ("pi5", "q4_0", True),
        ("phone", "q8_0", False),
    ]


def test_a_picture_is_written(tmp_path: Path) -> None:
    path = tmp_path / "p.svg"
    done = call("plan", "MiMo-7B", "--profile", "phone", "--plot", path, "--json")
    assert done.exit_code == 0, done.output
    assert path.read_text("utf-8").startswith("<svg")
    assert json.loads(done.stdout)["model"] == "MiMo-7B"


@pytest.mark.parametrize(
    "arguments",
    [
        ("MiMo-7B", "--profile", "toaster"),
        ("MiMo-7B", "--profile", "phone", "--compare", "toaster"),
        ("MiMo-7B", "--profile", "phone", "--compare", "pi5,"),
        ("MiMo-7B", "--profile", "phone", "--draft", "7"),
        ("MiMo-7B", "--profile", "phone", "--acceptance", "x"),
        ("MiMo-7B", "--profile", "phone", "--plot", "p.gif"),
        ("MiMo-7B", "--profile", "phone", "--ram", "1TB"),
    ],
)
def test_wrong_calls_exit_with_2(arguments: tuple[str, ...]) -> None:
    done = call("plan", *arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout


def test_a_model_that_is_not_there_exits_with_1(tmp_path: Path) -> None:
    done = call("plan", tmp_path / "absent", "--profile", "phone")
    assert done.exit_code == 1
    assert "no model" in done.stderr


def test_devices_are_listed_shown_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    done = call("devices", "list")
    assert done.exit_code == 0, done.output
    names = [line.split()[0] for line in done.stdout.splitlines()[1:]]
    assert names == ["auto", *profile_names()]
    done = call("devices", "show", "router-8gb")
    assert "inherits router-nvme -> router" in done.stdout
    for key in FIGURES:
        assert f"\n{key} = " in done.stdout
    done = call("devices", "show", "pi5", "--toml")
    copy = tmp_path / "mine.toml"
    copy.write_text(done.stdout, "utf-8")
    assert load_profile(copy).reads == load_profile("pi5").reads
    done = call("devices", "diff", "phone", "phone-16gb", "--json")
    assert set(json.loads(done.stdout)["differ"]) == {
        "memory.ram",
        "memory.process",
        "storage.size",
    }
    done = call("devices", "diff", "car", "car-8295")
    assert "same figures" in done.stdout
    done = call("devices", "show", "toaster")
    assert done.exit_code == 2


def test_devices_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    found = json.loads(call("devices", "list", "--json").stdout)["profiles"]
    assert [p["name"] for p in found] == ["auto", *profile_names()]
    shown = json.loads(call("devices", "show", "phone", "--json").stdout)
    assert shown["figures"]["run.recipe"]["value"] == "q4_0"
    assert shown["figures"]["memory.process"]["evidence"] == "derived"
