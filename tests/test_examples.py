"""The examples do what they say, with the built-in model."""

from __future__ import annotations

import importlib.util
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_script_has_its_section() -> None:
    page = (FOLDER / "README.md").read_text("utf-8")
    for script in FOLDER.glob("*.py"):
        assert f"[{script.name}]({script.name})" in page
        assert f"python examples/{script.name}" in page


def test_phone_assistant() -> None:
    phone = example("phone_assistant").main([])
    assert phone.alarms == [("21:15", None)]
    assert phone.timers == [(7, "minutes")]
    assert phone.sent == [("Martin", "build find"), ("罗经理", "面包披萨了")]
    assert phone.called == ["Lanfi"]


def test_car_head_unit_is_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*address: Any) -> None:
        raise AssertionError(f"asked for {address}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    car, ends = example("car_head_unit").main([], 120.0)
    assert ends == ["stop"] * 5
    assert car.climate == {"driver": 22, "all": 26}
    assert car.windows == {"rear_left": "open"}
    assert car.route == ("Present Street", None)
    assert car.defrost == {"rear": "on"}


def test_car_head_unit_gives_up_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    car, ends = example("car_head_unit").main([], 1e-6)
    assert ends == ["time"] * 5
    assert car.windows == {}
    assert capsys.readouterr().out.count("too long") == 5


def test_router_guard(capsys: pytest.CaptureFixture[str]) -> None:
    module = example("router_guard")
    router = module.main(["mimo-nano", *module.COMMANDS[:4], module.COMMANDS[5]])
    assert router.guests_until == pytest.approx(time.time() + 9 * 3600, abs=600)
    assert router.blocked == {"Owen's PC"}
    assert router.priority == {"vnug-09": "low"}
    assert router.name == "Tu-5"
    said = capsys.readouterr().out
    assert "That did not work: there is no Duxan's console here" in said
    router = module.main(["mimo-nano", module.COMMANDS[0], module.COMMANDS[4]])
    assert router.guests_until is None


def test_home_control() -> None:
    module = example("home_control")
    house = module.main([])
    assert house.lights == {"guest room": "on", "closet": 49}
    assert house.curtains == {"closet": "close"}
    assert house.vacuum == "dock"
    assert house.doors == {}
    assert module.main(["mimo-nano", module.COMMANDS[4]], lambda door: True).doors == {
        "包门": "unlock"
    }


def test_home_control_with_the_model_elsewhere() -> None:
    pytest.importorskip("httpx", reason="needs the extra remote")
    from serving import serving

    from mimo_edge.api import Runtime

    module = example("home_control")
    with serving(Runtime.open("mimo-nano"), thinking=False) as served:
        house = module.main([served.url, *module.COMMANDS[:2]])
        assert house.lights == {"guest room": "on", "closet": 49}
        assert served.runtime.stats()["generations"] == 4
