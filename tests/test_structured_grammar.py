"""Grammars against texts: what they let through is what the parser and the schema accept."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers_made as made
from babbler import tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_edge.errors import ConstraintError, GenerationError, UsageError
from mimo_edge.sampling import Constraint
from mimo_edge.structured.answers import Value
from mimo_edge.structured.bridge import make_vocabulary
from mimo_edge.structured.grammars import Grammars
from mimo_edge.structured.values import FORMATS
from mimo_edge.tokenizer import Tokenizer
from mimo_edge.tool_calls import Malformed, ToolCall, parse_tool_calls

TOKENIZER, VOCAB = tokenizer_of()
GRAMMARS = Grammars(TOKENIZER, VOCAB, TOKENIZER.eos_ids)
EOS = min(TOKENIZER.eos_ids)


def say(constraint: Constraint, text: str) -> bool:
    """Whether the constraint lets the text through as a whole answer, token by token; the mask
    must agree with the single question each time."""
    for token in [*TOKENIZER.encode(text, allow_special=True), EOS]:
        allowed = constraint.allows(token)
        mask = constraint.mask()
        assert allowed == (mask is None or bool(mask[token])), (text, token)
        if not allowed:
            return False
        constraint.advance(token)
    assert constraint.ended
    return True


def fits(schema: Any, text: str) -> bool:
    return say(GRAMMARS.of_answer("over", Value(schema=schema)), text)


def matches(regex: str, text: str) -> bool:
    return say(GRAMMARS.of_answer("over", Value(regex=regex)), text)


def tool(properties: dict[str, Any], required: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(required), **more}
    return {"type": "function", "function": {"name": "act", "parameters": parameters}}


def call(*values: tuple[str, str], name: str = "act") -> str:
    lines = "".join(f"<parameter={key}>{value}</parameter>\n" for key, value in values)
    return f"<tool_call>\n<function={name}>\n{lines}</function>\n</tool_call>"


def takes(schema: Any, text: str) -> bool:
    """Whether a tool with one parameter of this schema may be called with that text for it."""
    return say(GRAMMARS.of_calls("over", [tool({"p": schema}, ["p"])]), call(("p", text)))


# --- the vocabulary ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["json", "gguf"])
def test_every_token_has_its_own_bytes(kind: str, tmp_path: Path) -> None:
    if kind == "json":
        tokenizer = Tokenizer.from_file(made.write_json(tmp_path))
    else:
        tokenizer = Tokenizer.from_gguf(made.gguf_metadata(padding=3))
    size = tokenizer.size + 4
    found = make_vocabulary(tokenizer, size, tokenizer.eos_ids)
    assert found.vocab_size == size
    special = set(tokenizer.special.values())
    for token in range(size):
        # The byte that is in no UTF-8 text is what the library marks special tokens with.
        marked = tokenizer.token_bytes(token).startswith(b"\xff")
        assert found.is_special_token(token) == (token in special or marked), token
        if token not in special and not marked and tokenizer.token_bytes(token):
            assert found.decode_bytes([token]) == tokenizer.token_bytes(token)
    text = "把客厅的灯调暗一点, it's <tool_call> \x00\n"
    assert found.tokenize_str(text) == tokenizer.encode(text)


def test_a_model_without_an_end_is_refused() -> None:
    with pytest.raises(ConstraintError, match="no end-of-text"):
        make_vocabulary(TOKENIZER, VOCAB, frozenset())


WORDS = ["on", "only", "off", "灯", "灯光", "a b", ""]


def test_masks_are_exactly_what_may_still_become_one_of_the_words() -> None:
    """By enumeration, for every token at every place of a finite language."""
    regex = "|".join(map(re.escape, WORDS))
    words = [word.encode() for word in WORDS]
    said: list[list[int]] = [[]]
    seen = 0
    while said:
        prefix = said.pop()
        before = b"".join(TOKENIZER.token_bytes(token) for token in prefix)
        constraint = GRAMMARS.of_answer("over", Value(regex=regex))
        for token in prefix:
            constraint.advance(token)
        mask = constraint.mask()
        assert mask is not None
        for token in range(VOCAB):
            data = TOKENIZER.token_bytes(token)
            if token in TOKENIZER.eos_ids:
                want = before in words
            elif token in TOKENIZER.special.values() or not data:
                want = False
            else:
                want = any(word.startswith(before + data) for word in words)
            assert mask[token] == want == constraint.allows(token), (before, data)
            if want and token not in TOKENIZER.eos_ids:
                said.append([*prefix, token])
        seen += 1
    assert seen > 20


# --- JSON and regular expressions -------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ('{"name": "Wei"}', True),
        ('{\n  "name": "灯",\n  "age": 150\n}', True),
        ('{"name":"x","tags":["a","b"]}', True),
        ('{"name": "Wei", "age": 151}', False),
        ('{"age": 3}', False),
        ('{"name": "much too long"}', False),
        ('{"name": "x", "tags": ["c"]}', False),
        ('{"name": "x", "more": 1}', False),
        ('{"name": "x"', False),
        (' {"name": "x"}', False),
        ('{"name": "x"}.', False),
        ('{"name":' + " " * 100 + '"x"}', False),
    ],
)
def test_answers_of_a_schema(text: str, good: bool) -> None:
    assert fits(PERSON, text) == good


@pytest.mark.parametrize(
    ("regex", "good", "bad"),
    [
        (r"[0-9]{2}:[0-9]{2}", "07:30", "7:30"),
        (r"(on|off)/\w+", "off/灯", "off"),
        (r"a\/b", "a/b", "a\\/b"),
        (r"[^/]*", "灯 x\n", "a/b"),
        (r"(?i)yes", "YeS", "no"),
        ("line\nbreak", "line\nbreak", "line break"),
    ],
)
def test_answers_of_a_regex(regex: str, good: str, bad: str) -> None:
    assert matches(regex, good)
    assert not matches(regex, bad)


@pytest.mark.parametrize("thinking", ["open", "possible", "over"])
def test_reasoning_comes_before_and_is_free(thinking: Any) -> None:
    def begins(text: str) -> bool:
        return say(GRAMMARS.of_answer(thinking, Value(regex="yes|no")), text)

    assert begins("yes") == (thinking != "open")
    assert begins("<think>Hm: {no}\n灯</think>yes") == (thinking == "possible")
    assert begins("Hm, no. </think>no") == (thinking == "open")
    assert not begins("<think>x</think>maybe")


# --- tool calls -------------------------------------------------------------------------

LIGHT = {
    "type": "function",
    "function": {
        "name": "set_light",
        "parameters": {
            "type": "object",
            "properties": {
                "room": {"type": "string"},
                "level": {"type": "integer", "minimum": 0, "maximum": 100},
                "mode": {"enum": ["warm", "cold"]},
            },
            "required": ["room"],
        },
    },
}
TOOLS = [LIGHT, {"name": "reboot", "parameters": {"type": "object", "properties": {}}}]


@pytest.mark.parametrize(
    ("text", "good"),
    [
        (call(name="reboot"), True),
        (call(("room", "客厅 <b>\n2"), name="set_light"), True),
        (call(("level", "5"), ("mode", "warm"), ("room", ""), name="set_light"), True),
        ("Ok.\n" + call(name="reboot") + "\n" + call(name="reboot") + " Done.", True),
        ("no call at all <tool_response>", True),
        ("a < b, <tool_cal, <think>", True),
        (call(name="fly"), False),
        (call(name="set_light"), False),
        (call(("room", "a"), ("room", "b"), name="set_light"), False),
        (call(("room", "a"), ("speed", "1"), name="set_light"), False),
        (call(("room", "a"), ("level", "101"), name="set_light"), False),
        (call(("room", "a"), ("mode", "hot"), name="set_light"), False),
        (call(("room", "a</tool_call>"), name="set_light"), False),
        (call(("room", "a\n<parameter=mode>"), name="set_light"), False),
        ("<tool_call>", False),
        ("<tool_call> reboot", False),
        ("<tool_call>\n<function=reboot>\n</function>", False),
    ],
)
def test_calls_in_free_text(text: str, good: bool) -> None:
    assert say(GRAMMARS.of_calls("possible", TOOLS), text) == good
    if good:
        assert not any(isinstance(e, Malformed) for e in parse_tool_calls(text, TOOLS))


def test_a_call_spelled_in_letters_is_a_call() -> None:
    for opening in ("<tool_call>", "x <tool_call>", "\n<t<tool_call>"):
        constraint = GRAMMARS.of_calls("possible", TOOLS)
        for token in TOKENIZER.encode(opening):  # no special token comes out of this
            assert constraint.allows(token)
            constraint.advance(token)
        want = [t for t in range(VOCAB) if constraint.allows(t)]
        assert want
        assert all(b"\n<function=".startswith(TOKENIZER.token_bytes(t)[:11]) for t in want)


def test_tokens_that_run_past_the_opening_tag_are_not_allowed() -> None:
    """A vocabulary with a token that holds the end of the tag and more."""
    pieces = {i: bytes([i]) for i in range(256)}
    pieces |= {
        256: b"ll>\n<",
        257: b"ll>",
        258: b" <tool_call>",
        259: b"<tool_call>x",
        260: b"ll>z",
    }
    odd = Tokenizer(None, pieces, {"<|im_end|>": 261}, ["<|im_end|>"])  # type: ignore[arg-type]
    grammars = Grammars(odd, 262, odd.eos_ids)
    constraint = grammars.of_calls("possible", TOOLS)
    assert constraint.allows(258)
    assert constraint.allows(256)
    assert not constraint.allows(259)
    for byte in b"so <tool_ca":
        constraint.advance(byte)
    mask = constraint.mask()
    assert mask is not None
    assert [t for t in range(262) if not mask[t]] == [256, 259, 260]
    assert [constraint.allows(t) for t in (256, 257, 258, 259, 260)] == [
        False,
        True,
        True,
        False,
        False,
    ]
    constraint.advance(257)
    assert constraint.allows(ord("\n"))
    assert not constraint.allows(ord("x"))
    none = grammars.of_calls("possible", TOOLS, allowed=False)
    for byte in b"so <tool_ca":
        none.advance(byte)
    mask = none.mask()
    assert mask is not None
    assert [t for t in range(262) if not mask[t]] == [256, 257, 258, 259, 260]


def test_calls_may_be_forbidden_forced_or_single() -> None:
    one = call(name="reboot")
    assert not say(GRAMMARS.of_calls("possible", TOOLS, allowed=False), one)
    assert say(GRAMMARS.of_calls("possible", TOOLS, allowed=False), "a < b")
    assert say(GRAMMARS.of_calls("possible", TOOLS, several=False), "a " + one + " b")
    assert not say(GRAMMARS.of_calls("possible", TOOLS, several=False), one + one)
    forced = GRAMMARS.of_answer
    assert say(forced("possible", None, TOOLS), one)
    assert say(forced("possible", None, TOOLS), "<think>x</think>" + one + "\n" + one)
    assert not say(forced("possible", None, TOOLS), "Ok. " + one)
    assert not say(forced("possible", None, TOOLS), one + " Ok.")
    assert not say(forced("over", None, TOOLS, several=False), one + one)
    assert not say(forced("over", None, [LIGHT]), one)
    both = forced("over", Value(schema={"type": "array"}), TOOLS)
    assert say(both, "[1, 2]")
    assert say(forced("over", Value(schema={"type": "array"}), TOOLS), one)
    assert not say(forced("over", Value(schema={"type": "array"}), TOOLS), "[1]" + one)


def test_in_a_think_block_a_tag_is_only_text() -> None:
    for thinking, text in (("open", "so "), ("possible", "<think>so ")):
        constraint = GRAMMARS.of_calls(thinking, TOOLS)  # type: ignore[arg-type]
        assert say(constraint, text + "<tool_call> maybe </think>" + call(name="reboot"))


# --- values -----------------------------------------------------------------------------

STRING, INTEGER, BOOLEAN = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
VALUES: list[tuple[Any, str, bool]] = [
    (STRING, "any thing; a < b && </param>", True),
    (STRING, "a &amp; b", True),
    ({}, '{"a": [1', True),
    (INTEGER, "-12", True),
    (INTEGER, "007", False),
    (INTEGER, "1.5", False),
    (INTEGER, "five", False),
    ({"type": "number"}, "-1.25e-3", True),
    ({"type": "number"}, "1e999", False),
    ({"type": "number", "minimum": 0}, "3.5", True),
    ({"type": "number", "minimum": 0}, "-3.5", False),
    (BOOLEAN, "true", True),
    (BOOLEAN, "False", True),
    (BOOLEAN, "yes", False),
    ({"type": "null"}, "null", True),
    ({"enum": ["a&lt;b", "x"]}, "a&amp;lt;b", True),
    ({"enum": ["a&lt;b", "x"]}, "a&lt;b", False),
    ({"enum": [1, "one", None, True]}, "one", True),
    ({"enum": [1, "one", None, True]}, "null", True),
    ({"enum": [1, "one", None, True]}, "two", False),
    ({"const": {"k": [1]}}, '{"k": [1]}', True),
    ({"type": "string", "enum": ["on", "only", 5]}, "only", True),
    ({"type": "string", "enum": ["on", "only", 5]}, "5", False),
    ({"type": "string", "pattern": "^[a-z]+$"}, "abc", True),
    ({"type": "string", "pattern": "^[a-z]+$"}, "abC", False),
    ({"type": "string", "pattern": "b+"}, "abbc", True),
    ({"type": "string", "pattern": "^(a|b)$"}, "b", True),
    ({"type": "string", "pattern": "a\\$"}, "xa$y", True),
    ({"type": "string", "minLength": 2, "maxLength": 3}, "灯光", True),
    ({"type": "string", "minLength": 2, "maxLength": 3}, "灯", False),
    ({"type": "string", "minLength": 2}, "&lt;", False),  # one character once it is read
    ({"type": "string", "maxLength": 9}, "&copy=1", True),
    ({"type": "string", "maxLength": 9}, "&copy;=1", False),
    ({"type": "string", "maxLength": 9}, "a&b=1", True),
    ({"type": "string", "format": "date"}, "2026-02-28", True),
    ({"type": "string", "format": "date"}, "2026-13-01", False),
    ({"type": "string", "format": "date-time"}, "2026-02-28T07:30:00+01:00", True),
    ({"type": "string", "format": "ipv4"}, "192.168.1.255", True),
    ({"type": "string", "format": "ipv4"}, "192.168.1.256", False),
    ({"type": ["string", "null"]}, "null", True),
    ({"type": ["string", "integer"]}, "5 apples", True),
    ({"type": ["string", "integer"]}, "5", True),
    ({"anyOf": [{"type": "string", "maxLength": 3}, INTEGER]}, "12345", True),
    ({"anyOf": [{"type": "string", "maxLength": 3}, INTEGER]}, "1.5", False),
    ({"anyOf": [STRING, {"type": "array", "items": INTEGER}]}, "[1, 2]", True),
    ({"anyOf": [STRING, {"type": "array", "items": INTEGER}]}, "[x]", False),
    ({"anyOf": [STRING, {"type": "array", "items": INTEGER}]}, "x [1]", True),
    ({"anyOf": [{"enum": ["auto"]}, {"type": "integer", "minimum": 1}]}, "auto", True),
    ({"anyOf": [{"enum": ["auto"]}, {"type": "integer", "minimum": 1}]}, "7", True),
    ({"anyOf": [{"enum": ["auto"]}, {"type": "integer", "minimum": 1}]}, "0", False),
    ({"type": "array", "items": STRING}, '["a &lt; b", "c"]', True),
    ({"type": "array", "items": STRING}, '["a", 5]', False),
    ({"type": "object", "properties": {"a": INTEGER}, "required": ["a"]}, '{"a": 1}', True),
    ({"type": "object", "properties": {"a": INTEGER}, "required": ["a"]}, "{}", False),
    ({"oneOf": [{"type": "null"}, INTEGER]}, "null", True),
    ({"allOf": [INTEGER]}, "3", True),
]


@pytest.mark.parametrize(("schema", "text", "good"), VALUES, ids=str)
def test_values_of_parameters(schema: Any, text: str, good: bool) -> None:
    assert takes(schema, text) == good
    if good:
        (read,) = parse_tool_calls(call(("p", text)), [tool({"p": schema}, ["p"])])
        assert isinstance(read, ToolCall)
        jsonschema.validate(read.arguments["p"], schema)


def test_definitions_are_found() -> None:
    defs: dict[str, Any] = {"Level": {"type": "integer", "maximum": 3}, "Tree": {"type": "array"}}
    defs["Tree"]["items"] = {"$ref": "#/$defs/Tree"}
    parameters = {"p": {"$ref": "#/$defs/Level"}, "q": {"$ref": "#/$defs/Tree"}}
    tools = [tool(parameters, (), **{"$defs": defs})]
    for values, good in (
        ((("p", "3"),), True),
        ((("p", "4"),), False),
        ((("q", "[[], [[]]]"),), True),
        ((("q", "[1]"),), False),
    ):
        assert say(GRAMMARS.of_calls("over", tools), call(*values)) == good
    (read,) = parse_tool_calls(call(("p", "3"), ("q", "[[]]")), tools)
    assert read == ToolCall("act", {"p": 3, "q": [[]]})


def test_a_loose_tool_keeps_only_names() -> None:
    loose = {"name": "act", "strict": False, "parameters": {"properties": {"p": {"not": {}}}}}
    assert say(GRAMMARS.of_calls("over", [loose]), call(("p", "anything")))
    assert not say(GRAMMARS.of_calls("over", [loose]), call(("q", "anything")))
    assert not say(GRAMMARS.of_calls("over", [loose]), call(name="other"))


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_what_the_schema_means(name: str) -> None:
    """Random texts of each format, against the validator's own checks."""
    rng = random.Random(name)
    samples = {
        "date": lambda: (
            f"{rng.randrange(1, 9999):04}-{rng.randrange(14):02}-{rng.randrange(30):02}"
        ),
        "time": lambda: f"{rng.randrange(26):02}:{rng.randrange(62):02}:{rng.randrange(60):02}Z",
        "date-time": lambda: f"2026-{rng.randrange(1, 14):02}-11T{rng.randrange(25):02}:00:00Z",
        "uuid": lambda: "".join(
            rng.choice("0f-") if i in (8, 13, 18, 23) else "a" for i in range(36)
        ),
        "ipv4": lambda: ".".join(str(rng.randrange(280)) for _ in range(4)),
        "email": lambda: rng.choice(["a", "a.b", ""]) + "@" + rng.choice(["b.cn", "x"]),
        "uri": lambda: rng.choice(["http", "mailto", ""]) + rng.choice([":", ""]) + "//a.b/c?d=e",
    }
    oracle = {
        "date": r"\d{4}-(0[1-9]|1[012])-(0[1-9]|[12]\d|3[01])",
        "time": r"([01]\d|2[0-3]):[0-5]\d:[0-5]\dZ",
        "date-time": r"2026-(0[1-9]|1[012])-11T([01]\d|2[0-3]):00:00Z",
        "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
        "ipv4": None,
        "email": r"[a.b]+@b\.cn",
        "uri": r"(http|mailto)://a\.b/c\?d=e",
    }
    outcomes = set()
    for _ in range(40):
        text = samples[name]()
        good = takes({"type": "string", "format": name}, text)
        rule = oracle[name]
        if rule is None:
            want = all(int(part) < 256 for part in text.split("."))
        else:
            want = re.fullmatch(rule, text) is not None
        assert good == want, text
        outcomes.add(good)
    assert outcomes == {True, False}


# --- what cannot be enforced ------------------------------------------------------------

NEVER: list[tuple[Any, str]] = [
    ({"type": "string", "format": "color"}, "format 'color'"),
    ({"type": "string", "pattern": "(?=a)b"}, "cannot be enforced"),
    ({"type": "string", "pattern": "(a)\\1"}, "cannot be enforced"),
    ({"type": "string", "pattern": "^a|b$"}, "write"),
    ({"type": "string", "pattern": 5}, "is no text"),
    ({"type": "string", "minLength": -1}, "length of -1"),
    ({"type": "string", "contentSchema": {}}, "contentSchema"),
    ({"type": "strnig"}, "type 'strnig'"),
    ({"minimum": 3}, "type None"),
    ({"not": {}}, "type None"),
    (False, "nothing fits"),
    ({"enum": []}, "empty"),
    ({"enum": ["5"], "type": "integer"}, "empty"),
    ({"anyOf": [{"const": "5"}, INTEGER]}, "would be read as 5"),
    ({"anyOf": [STRING, {"type": "integer", "minimum": 0}]}, "texts beside numbers"),
    ({"anyOf": []}, "no list"),
    ({"oneOf": [INTEGER, {"type": "integer"}]}, "overlap"),
    ({"allOf": [INTEGER, {"minimum": 0}]}, "allOf"),
    ({"$ref": "#/$defs/None"}, "\\$ref"),
    ({"$ref": "http://elsewhere"}, "\\$ref"),
    ({"type": "array", "items": {"not": {"type": "null"}}}, "cannot be enforced"),
    ({"type": "integer", "minimum": 5, "maximum": 4}, "cannot be enforced"),
    ({"type": "array", "minItems": 10**9}, "minItems"),
]


@pytest.mark.parametrize(("schema", "why"), NEVER, ids=str)
def test_what_cannot_be_enforced_is_said_before_the_answer(schema: Any, why: str) -> None:
    with pytest.raises(ConstraintError, match=why):
        GRAMMARS.of_calls("over", [tool({"p": schema})])


def deep(levels: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE: dict[str, Any] = {
    "deep": deep(5000),
    "large": {"enum": ["x" * 300_000]},
    "many": {"anyOf": [{"const": i} for i in range(30_000)]},
    "not json": {"default": {1, 2}},
    "nan": {"minimum": float("nan")},
    "list": [1],
    "repeats": {"type": "string", "maxLength": 10**7},
    "long pattern": {"type": "string", "pattern": "a?" * 5000},
    "remote": {"$ref": "https://example.com/schema.json"},
    "loop": {"$ref": "#"},
    "impossible": {"type": "object", "properties": {"a": False}, "required": ["a"]},
    "unknown": {"type": "object", "dependentSchemas": {}},
    "anchors": {"properties": {"p": {"$ref": "#/$defs/x"}}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_are_refused(name: str) -> None:
    with pytest.raises(ConstraintError):
        GRAMMARS.of_answer("over", Value(schema=HOSTILE[name]))


def exploding(width: int) -> dict[str, Any]:
    """Alternatives multiplied out: width to the power of width combinations."""
    return {
        "allOf": [
            {"anyOf": [{"properties": {f"p{i}{k}": {"const": k}}} for k in range(width)]}
            for i in range(width)
        ]
    }


WORK: dict[str, Value] = {
    "states": Value(regex="(.*a.{20})*b"),
    "catastrophe": Value(regex="(a+)+(a|aa)+(a|a?)+c"),
    "alternatives": Value(regex="|".join(f"(x{i}|y{i})*" for i in range(300))),
    "classes": Value(regex=r"(\w\d\s){0,400}\pL{0,300}"),
    "product": Value(schema=exploding(9)),
    "optional": Value(schema={"properties": {f"p{i}": {"type": "string"} for i in range(2000)}}),
    "items": Value(schema={"type": "array", "items": {"enum": list(range(2000))}, "minItems": 999}),
    "pattern names": Value(
        schema={"patternProperties": {f"^a.{{{i}}}b.*c": {"type": "null"} for i in range(1, 40)}}
    ),
    "tree": Value(schema={"type": "array", "items": {"$ref": "#"}}),
    "nested repeats": Value(schema={"type": "string", "pattern": "((((a{99}){99}){99}){99}){99}"}),
}


# Keywords with values of the right kind and of any other.
_ANY: st.SearchStrategy[Any] = st.sampled_from([
    None, True, False, 0, -1, 7, 2**63, 10**300, 0.5, "", "a", "string", "\ud800", "\x00", "^a|b$",
    "(", "/", "date", "#/$defs/a", "#/properties/a", [], {}, ["a"], ["string", "null"], [{}], [[]],
])  # fmt: skip
_TYPES: st.SearchStrategy[Any] = st.sampled_from([
    "string", "integer", "number", "boolean", "null", "array", "object", ["string", "null"],
    ["integer", "string"], ["array", "string"], [], {}, [{}], [["string"]], 3, "text",
])  # fmt: skip


def _schema(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    some = inner | _ANY
    named = st.dictionaries(
        st.sampled_from(["a", "b", "$ref", "type", "x y", ""]), some, max_size=3
    )
    lists = st.lists(some, max_size=3)
    keywords: dict[str, st.SearchStrategy[Any]] = {
        "type": _TYPES, "properties": named, "items": some, "enum": lists, "const": some,
        "anyOf": lists, "oneOf": lists, "allOf": lists, "$ref": _ANY, "$defs": named,
        "definitions": named, "required": lists, "pattern": _ANY, "format": _ANY,
        "minLength": _ANY, "maxLength": _ANY, "minimum": _ANY, "maximum": _ANY, "minItems": _ANY,
        "maxItems": _ANY, "additionalProperties": some, "patternProperties": named,
        "multipleOf": _ANY, "not": some, "x-guidance": some, "title": _ANY, "prefixItems": lists,
    }  # fmt: skip
    right = st.fixed_dictionaries({}, optional=keywords)
    return right | st.dictionaries(st.sampled_from(list(keywords)), some, max_size=3)


@settings(max_examples=250, deadline=None)
@given(schema=st.recursive(_ANY, _schema, max_leaves=8))
def test_any_schema_at_all_is_compiled_or_refused(schema: Any) -> None:
    parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    strict = {"function": {"name": "f", "parameters": parameters}}
    whole = {"function": {"name": "f", "parameters": schema}}
    makers: list[Callable[[], Constraint]] = [
        lambda: GRAMMARS.of_answer("over", Value(schema=schema)),
        lambda: GRAMMARS.of_calls("over", [strict]),
        lambda: GRAMMARS.of_calls("over", [whole]),
    ]
    for make in makers:
        try:
            make().mask()
        except (ConstraintError, UsageError):
            continue


@pytest.mark.parametrize("name", WORK)
def test_hard_work_ends(name: str) -> None:
    """Refused, or followed for a while; never a hang: the compiler's own bounds hold."""
    rng = np.random.default_rng(0)
    try:
        constraint = GRAMMARS.of_answer("over", WORK[name])
        for _ in range(12):
            mask = constraint.mask()
            assert mask is not None
            assert mask.any()
            tokens = np.flatnonzero(mask)
            token = int(rng.choice(tokens))
            constraint.advance(token)
            if constraint.ended:
                break
    except (ConstraintError, GenerationError):
        pass


def test_tools_beyond_the_limits() -> None:
    many = [{"name": f"t{i}"} for i in range(300)]
    with pytest.raises(ConstraintError, match="300 tools"):
        GRAMMARS.of_calls("over", many)
    with pytest.raises(ConstraintError, match="65 parameters"):
        GRAMMARS.of_calls("over", [tool({f"p{i}": STRING for i in range(65)})])
    with pytest.raises(ConstraintError, match="cannot be called"):
        GRAMMARS.of_calls("over", [{"name": "a>b"}])
    with pytest.raises(ConstraintError, match="parameter called"):
        GRAMMARS.of_calls("over", [tool({" p": STRING})])
    with pytest.raises(ConstraintError, match="'anyOf'"):
        GRAMMARS.of_calls("over", [tool({}, anyOf=[{}])])
    largest = tool({f"p{i}": STRING for i in range(64)}, [f"p{i}" for i in range(0, 64, 2)])
    values = [(f"p{i}", "v") for i in range(0, 64, 2)]
    assert say(GRAMMARS.of_calls("over", [largest]), call(*reversed(values)))
    assert not say(GRAMMARS.of_calls("over", [largest]), call(*values[1:]))


def test_going_back_is_as_if_nothing_had_been_said() -> None:
    text = "Ok <tool_call>\n<function=set_light>\n<parameter=room>a b</parameter>\n"
    tokens = TOKENIZER.encode(text + "</function>\n</tool_call> x", allow_special=True)
    for constraint in (
        GRAMMARS.of_calls("possible", TOOLS),
        GRAMMARS.of_answer("over", Value(regex="(?s)Ok.*")),
    ):
        if not isinstance(constraint.mask(), type(None)):
            tokens = TOKENIZER.encode("Ok, that is all.")
        for at in range(len(tokens)):
            masks = []
            ahead = [*tokens[at : at + 3], EOS][:4]
            said = 0
            for token in ahead:
                masks.append(constraint.mask())
                if not constraint.allows(token):
                    break
                constraint.advance(token)
                said += 1
            ended = constraint.ended
            constraint.retract(said)
            assert not constraint.ended
            again = []
            for token in ahead[: said + 1]:
                again.append(constraint.mask())
                if not constraint.allows(token):
                    break
                constraint.advance(token)
            assert constraint.ended == ended
            for a, b in zip(masks, again, strict=False):
                np.testing.assert_array_equal(a, b)
            constraint.retract(said)
            constraint.advance(tokens[at])


def test_a_compiled_grammar_is_kept_and_its_followers_are_apart() -> None:
    grammars = Grammars(TOKENIZER, VOCAB, TOKENIZER.eos_ids)
    first = grammars.of_answer("over", Value(regex="ab|cd"))
    second = grammars.of_answer("over", Value(regex="ab|cd"))
    assert len(grammars._compiled) == 1
    (a,) = TOKENIZER.encode("a")
    (c,) = TOKENIZER.encode("c")
    first.advance(a)
    assert second.allows(c)
    assert not first.allows(c)
    for number in range(40):
        grammars.of_answer("over", Value(regex=f"x{number}"))
    assert len(grammars._compiled) == 32
    with pytest.raises(GenerationError, match="does not fit"):
        first.advance(c)


def test_the_text_of_a_schema_is_read_again() -> None:
    """Strings with every kind of character survive the way into the grammar."""
    odd = ['quote " and \\', "line\nbreak\ttab", "灯 😀 \u2028", "/slash/", "</tool>"]
    properties = {name: {"const": name} for name in odd}
    schema: dict[str, Any] = {"type": "object", "properties": properties, "required": odd}
    schema["additionalProperties"] = False
    assert fits(schema, json.dumps({name: name for name in odd}, ensure_ascii=False))
    assert fits({"const": "DEL\x7f"}, json.dumps("DEL\x7f").replace("\x7f", "\\u007f"))
    named = ['quote " and \\', "灯 😀", "/slash/", "DEL\x7f"]
    tools = [tool({name: {"const": name} for name in named}, named[2:])]
    assert say(GRAMMARS.of_calls("over", tools), call(*zip(named, named, strict=True)))
