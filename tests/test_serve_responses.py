"""/v1/responses with the real `openai` client: text, reasoning, calls, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("openai", reason="needs the extra dev")

import openai
from scripted import END, runtime
from serving import Served, serving

from mimo_edge.api import Runtime
from mimo_edge.nano.commands import DEMO_TOOLS

TEXT = "<think>hm</think>Hello there."
CALL = "<tool_call>\n<function=dim>\n<parameter=by>3</parameter>\n</function>\n</tool_call>"
TOOLS: Any = [
    {
        "type": "function",
        "name": "dim",
        "description": "Dim the light",
        "parameters": {"type": "object", "properties": {"by": {"type": "integer"}}},
        "strict": False,
    }
]


def client(served: Served) -> Any:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    rt, _ = runtime([TEXT + END])
    with serving(rt) as served:
        yield served


def test_an_answer(served: Served) -> None:
    with client(served) as ai:
        answer = ai.responses.create(model="scripted", input="hello", instructions="be brief")
    assert answer.output_text == "Hello there."
    assert (answer.status, answer.object) == ("completed", "response")
    thought, message = answer.output
    assert (thought.type, thought.content[0].text) == ("reasoning", "hm")
    assert message.role == "assistant"
    want = served.runtime.session(system="be brief").generate("hello")
    usage = answer.usage
    assert usage.input_tokens == want.stats.prompt_tokens
    assert usage.output_tokens == want.stats.tokens
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    tokenizer = served.runtime.tokenizer
    assert tokenizer is not None
    assert usage.output_tokens_details.reasoning_tokens == len(tokenizer.encode("hm"))


def test_a_stream_says_the_same(served: Served) -> None:
    with client(served) as ai:
        whole = ai.responses.create(model="scripted", input="hello")
        with ai.responses.stream(model="scripted", input="hello") as stream:
            events = list(stream)
            final = stream.get_final_response()
    assert final.output_text == whole.output_text == "Hello there."
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    said = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert said == "Hello there."
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done")
    assert kinds.count("response.content_part.added") == kinds.count("response.content_part.done")


def test_length(served: Served) -> None:
    with client(served) as ai:
        answer = ai.responses.create(model="scripted", input="hello", max_output_tokens=4)
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert [item.status for item in answer.output] == ["incomplete"]


def test_a_response_repeats_what_was_asked(served: Served) -> None:
    asked: Any = {
        "instructions": "Be brief.",
        "metadata": {"room": "kitchen"},
        "parallel_tool_calls": False,
        "tool_choice": "none",
        "tools": TOOLS,
    }
    with client(served) as ai:
        plain = ai.responses.create(model="scripted", input="hello")
        full = ai.responses.create(model="scripted", input="hello", **asked)
    assert (plain.instructions, plain.metadata, plain.tool_choice) == (None, {}, "auto")
    assert plain.parallel_tool_calls
    assert plain.text.format.type == "text"
    for name in ("instructions", "metadata", "parallel_tool_calls", "tool_choice"):
        assert getattr(full, name) == asked[name]


@pytest.mark.parametrize("stream", [False, True])
def test_a_round_of_tools(stream: bool) -> None:
    answers = ["<think>dark</think>Ok.\n" + CALL + CALL + END, "<think></think>Done." + END]
    rt, _ = runtime(answers)
    with serving(rt) as served, client(served) as ai:
        options: Any = {"model": "scripted", "tools": TOOLS}
        if stream:
            with ai.responses.stream(input="dim it", **options) as events:
                first = events.get_final_response()
        else:
            first = ai.responses.create(input="dim it", **options)
        kinds = [item.type for item in first.output]
        assert kinds == ["reasoning", "message", "function_call", "function_call"]
        assert first.output_text.strip() == "Ok."
        calls = first.output[2:]
        assert [json.loads(call.arguments) for call in calls] == [{"by": 3}] * 2
        assert len({call.call_id for call in calls}) == 2
        given: list[Any] = [{"role": "user", "content": "dim it"}]
        given += [item.model_dump(exclude_none=True) for item in first.output]
        given += [
            {"type": "function_call_output", "call_id": c.call_id, "output": "ok"} for c in calls
        ]
        second = ai.responses.create(input=given, **options)
    assert second.output_text == "Done."
    # The history it was sent is the one it had processed.
    assert second.usage.input_tokens_details.cached_tokens > 20


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [5]}, "no object"),
        ({"input": [{"role": "robot", "content": "x"}]}, "robot"),
        ({"input": [{"type": "web_search_call"}]}, "web_search_call"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "only text"),
        ({"input": [{"role": "user", "content": 5}]}, "neither"),
        ({"input": [{"role": "user"}]}, "neither"),
        ({"input": [{"role": "user", "content": [{"type": [], "text": "x"}]}]}, "only text"),
        ({"input": [{"type": "function_call", "arguments": "{}", "call_id": "1"}]}, "no name"),
        ({"input": [{"type": "function_call", "name": "f", "call_id": "1"}]}, "no arguments"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "no call_id"),
        (
            {"input": [{"type": "function_call", "name": "f", "arguments": "{", "call_id": "1"}]},
            "no JSON",
        ),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "no call_id"),
        ({"input": [{"type": "reasoning", "content": [5]}]}, "not text"),
        ({"input": "x", "previous_response_id": "resp_1"}, "nothing is stored"),
        ({"input": "x", "text": {"format": {"type": "grammar"}}}, "text.format"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "no function"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "mood": "good"}, "mood"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({}, "input"),
    ],
)
def test_refusals(served: Served, body: dict[str, Any], match: str) -> None:
    response = served.client.post("/v1/responses", json=body)
    assert response.status_code == 400
    assert match in response.json()["error"]["message"]


def test_an_error_inside_a_stream() -> None:
    rt, backend = runtime(["word " * 50], draft=0)
    with serving(rt) as served, client(served) as ai:
        backend.fail_after = 5
        stream = ai.responses.create(model="scripted", input="x", stream=True)
        *_, last = list(stream)
        assert last.type == "error"
        assert "internal error" in last.message


def test_the_built_in_model() -> None:
    tools: Any = [{"type": "function", **tool["function"]} for tool in DEMO_TOOLS]
    with serving(Runtime.open("mimo-nano"), thinking=False) as served, client(served) as ai:
        answer = ai.responses.create(
            model="mimo-nano", input="turn on guest wifi for two hours", tools=tools
        )
        (call,) = answer.output
        assert call.name == "set_guest_wifi"
        assert json.loads(call.arguments) == {"state": "on", "duration": 2, "unit": "hours"}


def test_forms_and_choices_of_the_built_in_model() -> None:
    """What a chat can ask for: a schema for the text, a certain tool."""
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"state": {"enum": ["on", "off"]}},
        "required": ["state"],
        "additionalProperties": False,
    }
    tools: Any = [{"type": "function", **tool["function"]} for tool in DEMO_TOOLS]
    with serving(Runtime.open("mimo-nano"), thinking=False) as served, client(served) as ai:
        answer = ai.responses.create(
            model="mimo-nano",
            input="is it on?",
            text={"format": {"type": "json_schema", "name": "state", "schema": schema}},
        )
        assert json.loads(answer.output_text)["state"] in ("on", "off")
        answer = ai.responses.create(
            model="mimo-nano",
            input="lights on in the guest room",
            tools=tools,
            tool_choice={"type": "function", "name": "set_alarm"},
        )
        assert [item.name for item in answer.output if item.type == "function_call"][:1] == [
            "set_alarm"
        ]
