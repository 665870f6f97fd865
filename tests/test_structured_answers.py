"""Answers of a model that never learnt the grammar, with and without drafts."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import jsonschema
import pytest
from babbler import Babbler, babbling, tokenizer_of
from scripted import END, runtime

from mimo_edge.api import Runtime
from mimo_edge.chat_template import ChatTemplate
from mimo_edge.errors import ConstraintError, TokenizerError, UsageError
from mimo_edge.model_source import Model
from mimo_edge.reply import Reply
from mimo_edge.structured.wanted import _say_once
from mimo_edge.tool_calls import tool_schemas

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": ["number", "null"]}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"name": "stop", "parameters": {"type": "object", "properties": {}}},
    {
        "type": "function",
        "function": {
            "name": "go",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string"},
                    "speed": {"type": "integer", "minimum": 1, "maximum": 30},
                    "route": {"type": "array", "items": POINT, "maxItems": 3},
                    "mode": {"enum": ["walk", "ride", 3]},
                    "note": {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "boolean"}]},
                },
                "required": ["place", "speed"],
            },
        },
    },
    {
        "name": "say",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string", "pattern": "^[a-z灯 ]{2,9}$"},
                "loud": {"type": "boolean"},
                "level": {"type": "number"},
            },
            "required": ["loud"],
        },
    },
]
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 1.5, "top_p": 0.9, "min_p": 0.01, "seed": 6, "presence_penalty": 0.5},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
]


def check_calls(reply: Reply, tools: list[dict[str, Any]]) -> int:
    """Every call is one of the tools with arguments its schema accepts; how many there are."""
    schemas = tool_schemas(tools)
    for call in reply.tool_calls:
        # The format holds an object's known parameters only.
        jsonschema.validate(call.arguments, {**schemas[call.name], "additionalProperties": False})
    if reply.finish_reason != "length":
        assert not reply.malformed
    return len(reply.tool_calls)


@pytest.mark.parametrize("choice", ["required", "go", "say", "auto"])
def test_every_call_of_a_babbling_model_is_a_good_one(choice: str) -> None:
    calls = done = 0
    for seed in range(12):
        with babbling(seed, draft=seed % 4) as rt:
            reply = rt.session(tools=TOOLS).generate(
                f"turn {seed}", tool_choice=choice, max_tokens=400, temperature=1.0, seed=seed
            )
        calls += check_calls(reply, TOOLS)
        done += reply.finish_reason != "length"
        if choice != "auto" and reply.finish_reason != "length":
            assert reply.finish_reason == "tool_calls"
            assert reply.text.strip() == ""  # a line break may stand between two calls
        if choice in ("go", "say"):
            assert {call.name for call in reply.tool_calls} <= {choice}
    assert done >= 6
    assert calls >= (6 if choice != "auto" else 0)


def test_calls_in_the_free_text_of_a_babbling_model() -> None:
    """It begins calls by itself, by the tag's token and now and then in the middle of a word."""
    calls = 0
    for seed in range(12):
        tokenizer, vocab = tokenizer_of()
        backend = Babbler(tokenizer, vocab, seed=seed)
        backend.starts[tokenizer.special["<tool_call>"]] = 7
        model = Model("babbler", backend, tokenizer, ChatTemplate(), tokenizer.eos_ids)
        with Runtime(model, 3000, seed % 4) as rt:
            reply = rt.session(tools=TOOLS).generate(
                "go", max_tokens=300, temperature=1.0, seed=seed
            )
            calls += check_calls(reply, TOOLS)
            single = rt.session(tools=TOOLS).generate(
                "go", max_tokens=300, temperature=1.0, seed=seed, parallel_tool_calls=False
            )
            assert check_calls(single, TOOLS) <= 1
            none = rt.session(tools=TOOLS).generate(
                "go", max_tokens=300, temperature=1.0, seed=seed, tool_choice="none"
            )
            assert not none.tool_calls
            assert "<tool_call>" not in none.text
    assert calls > 12


@pytest.mark.parametrize("seed", range(4))
def test_json_and_regex_answers_of_a_babbling_model(seed: int) -> None:
    with babbling(seed, draft=2) as rt:
        session = rt.session(tools=TOOLS)
        for temperature in (0.0, 1.0):
            reply = session.generate(
                "where?", json_schema=POINT, tool_choice="none", temperature=temperature, seed=seed
            )
            if reply.finish_reason == "stop":
                jsonschema.validate(json.loads(reply.text), POINT)
            reply = rt.session().generate("when?", regex="[0-2][0-9]:[0-5][0-9]")
            assert re.fullmatch("[0-2][0-9]:[0-5][0-9]", reply.text)
            assert reply.finish_reason == "stop"


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    "form",
    [
        {"tool_choice": "required"},
        {"json_schema": POINT},
        {"regex": "(灯|[a-z ])*[.!]"},
        {},
    ],
    ids=str,
)
def test_drafts_never_change_a_structured_answer(
    form: dict[str, Any], settings: dict[str, Any]
) -> None:
    answers = set()
    accepted = 0
    for draft in (0, 1, 2, 3, "auto"):
        with babbling(3, draft, skill=(0.9, 0.9, 0.9)) as rt:
            reply = rt.session(tools=TOOLS).generate(
                "go on", max_tokens=60, logprobs=2, **form, **settings
            )
            answers.add((reply.token_ids, reply.finish_reason, reply.logprobs))
            accepted += sum(reply.stats.accepted_by_depth)
    assert len(answers) == 1
    assert accepted > 10 or not form  # free, it soon stops talking


def test_drafts_are_what_the_grammar_allows() -> None:
    """Every token that is verified fits the grammar, so none is computed in vain."""
    seen: list[list[int]] = []

    class Watched(Babbler):
        def forward(self, token_ids: Any, cache: Any, **options: Any) -> Any:
            if cache.tokens:
                seen.append(token_ids.tolist())
            return super().forward(token_ids, cache, **options)

    tokenizer, vocab = tokenizer_of()
    # Its blocks propose badly: unmasked, nearly no draft would fit.
    backend = Watched(tokenizer, vocab, seed=1, skill=(0.0, 0.0, 0.0))
    model = Model("babbler", backend, tokenizer, ChatTemplate(), tokenizer.eos_ids)
    with Runtime(model, 3000, 3) as rt:
        reply = rt.session().generate("x", regex="[ab]{40}")
        steps = [step for step in seen if len(step) > 1]
        letters = {tokenizer.encode(c)[0] for c in "ab"}
        assert len(steps) > 5
        for step in steps[:-1]:
            assert all(set(tokenizer.token_bytes(t)) <= set(b"ab") for t in step), step
        assert letters
    assert re.fullmatch("[ab]{40}", reply.text)


def test_a_model_that_wants_what_is_forbidden() -> None:
    """Malformed calls become good ones; free text around them stays."""
    bad = "Well. <tool_call>\n<function=fly>\n</function>\n</tool_call>"
    rt, _ = runtime([bad + END])
    with rt:
        reply = rt.session(tools=TOOLS).generate("hi", max_tokens=200)
        assert reply.text.startswith("Well. ")
        assert not reply.malformed or reply.finish_reason == "length"
    rt, _ = runtime([bad + END])
    with rt:
        reply = rt.session(tools=TOOLS, constrain_tools=False).generate("hi", max_tokens=200)
        assert reply.text == bad
        assert len(reply.malformed) == 1


def test_an_answer_is_json_or_calls() -> None:
    text = '{"x": 1, "y": null}'
    quoted = json.dumps({"a": "<tool_call>\n<function=stop>\n</function>\n</tool_call>"})
    call = "<tool_call>\n<function=stop>\n</function>\n</tool_call>"
    for said, schema in ((text, POINT), (quoted, {"type": "object"})):
        # Inside of a JSON text the tag is letters, not the token.
        rt, backend = runtime(["<think></think>" + said + END])
        backend.script[0] = [
            *backend.tokenizer.encode("<think></think>", allow_special=True),
            *backend.tokenizer.encode(said),
            *backend.tokenizer.eos_ids,
        ]
        with rt:
            reply = rt.session(tools=TOOLS).generate("hi", json_schema=schema)
        assert (reply.text, reply.tool_calls, reply.finish_reason) == (said, (), "stop")
    rt, _ = runtime([call + END])
    with rt:
        reply = rt.session(tools=TOOLS).generate("hi", json_schema=POINT)
    assert [c.name for c in reply.tool_calls] == ["stop"]
    assert reply.finish_reason == "tool_calls"


def test_reasoning_stays_free_before_a_structured_answer() -> None:
    rt, _ = runtime(["<think>{Hm} 灯</think>yes" + END, "no" + END])
    with rt:
        session = rt.session()
        reply = session.generate("?", regex="yes|no")
        assert (reply.reasoning, reply.text) == ("{Hm} 灯", "yes")
        assert session.generate("?", regex="yes|no").text == "no"


def test_wrong_wishes() -> None:
    rt, _ = runtime(["x" + END])
    with rt:
        session = rt.session(tools=TOOLS)
        for options, kind in (
            ({"json_schema": {}, "regex": "a"}, UsageError),
            ({"json_schema": [1]}, ConstraintError),
            ({"json_schema": {"type": "strnig"}}, ConstraintError),
            ({"regex": "("}, ConstraintError),
            ({"regex": ""}, ConstraintError),
            ({"regex": 5}, ConstraintError),
            ({"tool_choice": "fly"}, ConstraintError),
            ({"tool_choice": None}, UsageError),
            ({"tool_choice": "required", "regex": "a"}, UsageError),
        ):
            with pytest.raises(kind):
                session.generate("x", **options)
        assert session.messages == []
        with pytest.raises(UsageError, match="without tools"):
            rt.session().generate("x", tool_choice="required")
        odd = {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}
        with pytest.raises(ConstraintError, match="strict"):
            rt.session(tools=[odd]).generate("x")
        assert rt.session(tools=[{**odd, "strict": False}]).generate("x").text == "x"
        assert rt.session(tools=[odd], constrain_tools=False).generate("x").text == "x"


def test_without_the_library_calls_are_free_and_forms_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    _say_once.cache_clear()
    bad = "<think></think><tool_call>\n<function=fly>\n</function>\n</tool_call>"
    rt, _ = runtime([bad + END])
    with rt:
        assert rt.session(tools=TOOLS).generate("x").malformed
        rt.session(tools=TOOLS).generate("x")
        assert caplog.text.count("llguidance is not installed") == 1
        none = rt.session(tools=TOOLS).generate("x", tool_choice="none", max_tokens=60)
        assert "<tool_call>" not in none.text  # needs no grammar
        forms: list[dict[str, Any]] = [{"regex": "a"}, {"json_schema": {}}]
        for options in [*forms, {"tool_choice": "required"}]:
            with pytest.raises(ConstraintError, match="pip install llguidance"):
                rt.session(tools=TOOLS).generate("x", **options)
        with pytest.raises(ConstraintError, match="not installed"):
            rt.session(tools=TOOLS, constrain_tools=True).generate("x")
    _say_once.cache_clear()


def test_strict_is_not_shown_to_the_model() -> None:
    template = ChatTemplate()
    tool = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    messages = [{"role": "user", "content": "x"}]
    plain = template.render(messages, [tool])
    assert template.render(messages, [{**tool, "strict": True}]) == plain
    wrapped = {"type": "function", "function": {**tool, "strict": False}}
    assert template.render(messages, [wrapped]) == plain


def test_a_model_without_a_tokenizer_has_no_forms() -> None:
    tokenizer, vocab = tokenizer_of()
    model = Model("bare", Babbler(tokenizer, vocab), None, ChatTemplate(), frozenset({1}))
    with Runtime(model, 100, 0) as rt, pytest.raises(TokenizerError, match="no tokenizer"):
        rt.session().generate([5, 6], regex="a")


def test_the_built_in_model_under_its_grammar() -> None:
    """Constrained, it says what it says anyway, and what a schema makes of it is JSON."""
    from mimo_edge.nano.commands import DEMO_TEXTS, DEMO_TOOLS

    with Runtime.open("mimo-nano", threads=1) as rt:
        for text in DEMO_TEXTS:
            free, held, forced = (
                rt.session(
                    tools=DEMO_TOOLS, enable_thinking=False, constrain_tools=constrain
                ).generate(text, max_tokens=96, tool_choice=choice)
                for constrain, choice in ((False, "auto"), (True, "auto"), (True, "required"))
            )
            assert free.tool_calls
            assert free.token_ids == held.token_ids == forced.token_ids
        reply = rt.session(enable_thinking=False).generate(
            "turn on guest wifi", json_schema={"enum": ["on", "off"]}, max_tokens=20
        )
        assert reply.text in ('"on"', '"off"')
