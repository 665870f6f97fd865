from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_edge.errors import UsageError
from mimo_edge.tool_calls import (
    Event,
    Malformed,
    ToolCall,
    ToolCallParser,
    cast_value,
    parse_tool_calls,
)

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "set",
            "parameters": {
                "type": "object",
                "properties": {
                    "n": {"type": "integer"},
                    "x": {"type": "number"},
                    "b": {"type": "boolean"},
                    "l": {"type": "array"},
                    "o": {"type": "object"},
                    "s": {"type": "string"},
                    "maybe": {"type": ["integer", "null"]},
                    "either": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
                    "level": {"enum": [1, 2, 3]},
                },
            },
        },
    },
    {"name": "ping", "parameters": {}},
]


def call(name: str, **arguments: str) -> str:
    body = "".join(f"<parameter={k}>{v}</parameter>\n" for k, v in arguments.items())
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


def merged(events: list[Event]) -> list[Event]:
    out: list[Event] = []
    for event in events:
        if isinstance(event, str) and out and isinstance(out[-1], str):
            out[-1] += event
        else:
            out.append(event)
    return out


def parse(text: str) -> list[Event]:
    """Parse at once and one character at a time: both must agree."""
    whole = merged(parse_tool_calls(text, TOOLS))
    parser = ToolCallParser(TOOLS)
    events = [event for character in text for event in parser.feed(character)]
    assert merged(events + parser.finish()) == whole
    return whole


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("n", "42", 42),
        ("n", " 7 ", 7),
        ("n", "3.0", 3),
        ("n", "3.5", "3.5"),
        ("n", "many", "many"),
        ("n", "true", "true"),
        ("x", "1.5", 1.5),
        ("x", "2", 2),
        ("x", "NaN", "NaN"),
        ("x", "1e999", "1e999"),
        ("b", "true", True),
        ("b", "False", False),
        ("b", "maybe", "maybe"),
        ("l", '["a", 1]', ["a", 1]),
        ("l", "a, b", "a, b"),
        ("l", "[" * 100_000, "[" * 100_000),
        ("o", '{"k": {"v": null}}', {"k": {"v": None}}),
        ("s", "42", "42"),
        ("s", "null", "null"),
        ("s", " spaces kept ", " spaces kept "),
        ("s", "a &lt; b &amp; c", "a < b & c"),
        ("s", "?a=1&copy=2&lt &#65; &#x42;", "?a=1&copy=2&lt A B"),
        ("l", '["a &lt; b"]', ["a &lt; b"]),
        ("l", "[&quot;a&quot;]", ["a"]),
        ("s", "if a < b:\n  <b>x</b>\n", "if a < b:\n  <b>x</b>\n"),
        ("s", "客厅 💡", "客厅 💡"),
        ("s", "", ""),
        ("maybe", "null", None),
        ("maybe", "5", 5),
        ("either", "5", 5),
        ("either", "five", "five"),
        ("level", "2", 2),
        ("other", "5", "5"),
    ],
)
def test_values_are_cast_by_schema(key: str, text: str, value: Any) -> None:
    got = merged(parse_tool_calls(call("set", **{key: text}), TOOLS))
    assert got == [ToolCall("set", {key: value})]
    cast = got[0].arguments[key] if isinstance(got[0], ToolCall) else None
    assert type(cast) is type(value)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("x", "1e999"),
        ("l", "[1e999]"),
        ("l", "[NaN]"),
        ("l", '["\\ud800"]'),
        ("o", '{"\\udfff": 1}'),
        ("l", "[" * 100 + "]" * 100),
        ("n", "9" * 5000),
    ],
)
def test_values_that_could_not_be_written_as_json_stay_text(key: str, text: str) -> None:
    assert parse(call("set", **{key: text})) == [ToolCall("set", {key: text})]


def test_huge_whole_numbers_and_odd_schemas() -> None:
    assert parse(call("set", n="9" * 400)) == [ToolCall("set", {"n": 10**400 - 1})]
    assert cast_value("5", {"type": [["integer"], {}, "integer"]}) == 5


def test_white_space_without_end_is_read_quickly() -> None:
    text = f"<tool_call><function=ping>{' ' * 200_000}x</tool_call>"
    (event,) = parse_tool_calls(text, TOOLS)  # quadratic reading took minutes
    assert isinstance(event, Malformed)


def test_text_and_several_calls_in_order() -> None:
    text = "Sure.\n" + call("set", n="1") + "\n" + call("ping") + " done"
    assert parse(text) == [
        "Sure.\n",
        ToolCall("set", {"n": 1}),
        "\n",
        ToolCall("ping", {}),
        " done",
    ]


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("<tool_call>\n<function=set>\n<parameter=n>1</parameter>\n</function>\n", {"n": 1}),
        ("<tool_call>\n<function=set>\n<parameter=n>1</parameter>\n", {"n": 1}),
        ("<tool_call>\n<function=set>\n<parameter=n>1\n</function>\n</tool_call>", {"n": 1}),
        ("<tool_call>\n<function=set>\n<parameter=n>1</tool_call>", {"n": 1}),
        ("<tool_call>\n<function=set>\n<parameter=n>1", {"n": 1}),
        (
            "<tool_call><function=set><parameter=n>1\n<parameter=s>a</parameter></function>",
            {"n": 1, "s": "a"},
        ),
        ("<tool_call><function=set><parameter=n>1</parameter></function></tool_call>", {"n": 1}),
        (
            "<tool_call>\n<function=set>\n<parameter=s>x</parameter> y</parameter>\n</function>",
            {"s": "x</parameter> y"},
        ),
        (
            "<tool_call>\n<function=set>\n<parameter=s>see <tool_call> here</parameter>\n"
            "</function>\n</tool_call>",
            {"s": "see <tool_call> here"},
        ),
    ],
)
def test_missing_tags_and_tags_inside_values(text: str, arguments: dict[str, Any]) -> None:
    assert parse(text) == [ToolCall("set", arguments)]


def test_a_call_without_closing_tag_ends_at_the_next_one() -> None:
    first = "<tool_call>\n<function=set>\n<parameter=n>1</parameter>\n</function>\n"
    assert parse(first + call("ping")) == [ToolCall("set", {"n": 1}), ToolCall("ping", {})]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (call("explode", n="1"), "unknown function 'explode'"),
        ("<tool_call>\n{}\n</tool_call>", "no <function=NAME>"),
        ("<tool_call>", "no <function=NAME>"),
        ("<tool_call>\n<function=set>\nhello\n</function>\n</tool_call>", "unexpected text"),
        (
            "<tool_call><function=set><parameter=n>1</parameter><parameter=n>2</parameter>"
            "</function></tool_call>",
            "twice",
        ),
    ],
)
def test_malformed_calls_stay_text_and_are_flagged(text: str, why: str) -> None:
    (event,) = parse(text)
    assert isinstance(event, Malformed)
    assert event.text == text
    assert why in event.why


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "<tool_call>",
                "</tool_call>",
                "<function=set>",
                "</function>",
                "<parameter=n>",
                "</parameter>",
                "\n",
                "a<",
                "1",
                "<tool",
                "<function=",
                "文",
                call("ping"),
            ]
        ),
        max_size=14,
    )
)
def test_any_text_parses_the_same_in_pieces_and_never_raises(parts: list[str]) -> None:
    parse("".join(parts))


def test_no_character_of_plain_text_is_lost() -> None:
    text = "a < b <tool_calls> </tool_call> <tool_cal"
    assert "".join(e for e in parse(text) if isinstance(e, str)) == text


def test_text_is_released_as_early_as_possible() -> None:
    parser = ToolCallParser(TOOLS)
    assert parser.feed("hello <to") == ["hello "]
    assert parser.feed("day>") == ["<today>"]


@pytest.mark.parametrize(
    "tools",
    [
        ["set"],
        [{"function": {}}],
        [{"name": "a"}, {"name": "a"}],
        [{"name": "a", "parameters": {"properties": []}}],
    ],
)
def test_broken_tool_lists(tools: list[Any]) -> None:
    with pytest.raises(UsageError):
        ToolCallParser(tools)
