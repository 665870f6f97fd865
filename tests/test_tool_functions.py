from __future__ import annotations

import enum
import functools
from typing import Any, Literal

import pytest

from mimo_edge.errors import UsageError
from mimo_edge.tool_functions import ArgumentError, tool


class Zone(enum.Enum):
    FRONT = "front"
    REAR = "rear"


def set_climate(
    degrees: int,
    zone: Zone = Zone.FRONT,
    mode: Literal["auto", "manual"] = "auto",
    fan: float | None = None,
    names: list[str] | None = None,
) -> str:
    """Set the climate
    of the car.

    Only while the engine runs.

    Args:
        degrees: target, in degrees Celsius,
            from 16 to 30
        zone (Zone): which seats
        fan: strength

    Returns:
        what was done
    """
    return f"{degrees} {zone} {mode} {fan} {names}"


def test_the_schema_says_what_signature_and_docstring_say() -> None:
    assert tool(set_climate).spec == {
        "type": "function",
        "function": {
            "name": "set_climate",
            "description": "Set the climate of the car.",
            "parameters": {
                "type": "object",
                "properties": {
                    "degrees": {
                        "type": "integer",
                        "description": "target, in degrees Celsius, from 16 to 30",
                    },
                    "zone": {
                        "type": "string",
                        "enum": ["front", "rear"],
                        "description": "which seats",
                    },
                    "mode": {"type": "string", "enum": ["auto", "manual"]},
                    "fan": {"type": "number", "description": "strength"},
                    "names": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["degrees"],
            },
        },
    }


def test_sphinx_fields_and_bound_methods() -> None:
    class Home:
        def lamp(self, room: str, on: bool) -> bool:
            """Switch a lamp.

            :param room: where
            :param bool on: or off
            """
            return on

    made = tool(Home().lamp)
    properties = made.parameters["properties"]
    assert properties == {
        "room": {"type": "string", "description": "where"},
        "on": {"type": "boolean", "description": "or off"},
    }
    assert made.call({"room": "hall", "on": True}) is True


def test_values_reach_the_function_as_its_types() -> None:
    made = tool(set_climate)
    assert made.call({"degrees": 21, "zone": "rear"}) == "21 Zone.REAR auto None None"
    assert made.call({"degrees": 21, "fan": 2, "names": ["a"]}).endswith("2 ['a']")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({}, "needs degrees"),
        ({"degrees": "warm"}, "'warm' is not of type integer"),
        ({"degrees": True}, "not of type integer"),
        ({"degrees": 20, "zone": "trunk"}, "trunk is not one of front, rear"),
        ({"degrees": 20, "mode": "eco"}, "not one of auto, manual"),
        ({"degrees": 20, "side": "left"}, "no parameter side"),
        ({"degrees": 20, "names": ["a", 3]}, "names = 3 is not of type string"),
        ({"degrees": 20, "names": "a"}, "not of type array"),
    ],
)
def test_arguments_that_do_not_fit_never_reach_the_function(
    arguments: dict[str, Any], why: str
) -> None:
    with pytest.raises(ArgumentError, match=why):
        tool(set_climate).call(arguments)


def test_unions_of_types() -> None:
    def seek(to: int | str) -> None: ...

    made = tool(seek)
    assert made.parameters["properties"]["to"] == {
        "anyOf": [{"type": "integer"}, {"type": "string"}]
    }
    made.call({"to": 3})
    made.call({"to": "end"})
    with pytest.raises(ArgumentError, match="type integer"):
        made.call({"to": [1]})


def test_a_schema_of_ones_own() -> None:
    def anything(**values: Any) -> dict[str, Any]:
        return values

    schema = {"name": "say", "parameters": {"properties": {"text": {}}, "required": ["text"]}}
    made = tool(anything, {"type": "function", "function": schema})
    assert (made.name, made.description) == ("say", "")
    assert made.call({"text": [1]}) == {"text": [1]}
    with pytest.raises(ArgumentError, match="say needs text"):
        made.call({})


def test_what_makes_no_tool() -> None:
    def untyped(a) -> None: ...  # type: ignore[no-untyped-def]

    def many(*a: int) -> None: ...

    def odd(a: bytes) -> None: ...

    def mixed(a: Literal[1, "x"]) -> None: ...

    def unknown(a: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821, UP037

    async def later(a: int) -> None: ...

    for function, why in (
        (untyped, "parameter a has no type"),
        (many, "parameter a: a model gives parameters by name"),
        (odd, "bytes'> has no JSON form"),
        (mixed, "not all texts or all numbers"),
        (unknown, "cannot be read: name 'Nowhere'"),
        (later, "coroutine"),
        (lambda: None, "needs a name"),
        (functools.partial(set_climate, 3), "needs a name"),
        ("text", "not a function"),
    ):
        with pytest.raises(UsageError, match=why):
            tool(function)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no name"):
        tool(set_climate, {"parameters": {}})
