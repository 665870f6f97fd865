"""The real `openai` client, and the built-in model, against a real server."""

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

KEY = "s3cret"
TEXT = "<think>hm</think>Hello there."
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "dim",
            "parameters": {"type": "object", "properties": {"by": {"type": "integer"}}},
        },
    }
]
CALL = (
    "<think></think><tool_call>\n<function=dim>\n<parameter=by>3</parameter>\n"
    "</function>\n</tool_call>"
)
USER: Any = [{"role": "user", "content": "hello"}]


def client(served: Served, key: str = KEY) -> Any:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    rt, _ = runtime([TEXT + END])
    with serving(rt, api_key=KEY) as served:
        yield served


def test_models(served: Served) -> None:
    with client(served) as ai:
        assert [model.id for model in ai.models.list()] == ["scripted"]
        assert ai.models.retrieve("scripted").owned_by == "mimo-edge"


def test_chat(served: Served) -> None:
    with client(served) as ai:
        answer = ai.chat.completions.create(model="scripted", messages=USER, user="me")
        assert answer.choices[0].message.content == "Hello there."
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.prompt_tokens_details.cached_tokens == 0
        assert answer.usage.total_tokens > answer.usage.prompt_tokens


def test_stream(served: Served) -> None:
    with client(served) as ai:
        stream = ai.chat.completions.create(
            model="scripted",
            messages=USER,
            stream=True,
            stream_options={"include_usage": True},
        )
        *chunks, last = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "Hello there."
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.usage.completion_tokens > 0


def test_completion(served: Served) -> None:
    with client(served) as ai:
        answer = ai.completions.create(model="scripted", prompt="a b", max_tokens=4)
        assert answer.usage.completion_tokens == 4
        pieces = ai.completions.create(model="scripted", prompt="a b", max_tokens=4, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == answer.choices[0].text


def test_errors(served: Served) -> None:
    with client(served) as ai:
        with pytest.raises(openai.NotFoundError, match="is not here"):
            ai.chat.completions.create(model="gpt-4o", messages=USER)
        with pytest.raises(openai.BadRequestError) as caught:
            ai.chat.completions.create(model="scripted", messages=USER, n=3)
        assert caught.value.param == "n"
        schema: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
        with pytest.raises(openai.BadRequestError, match="cannot be enforced"):
            ai.chat.completions.create(model="scripted", messages=USER, response_format=schema)
    with client(served, "wrong") as ai, pytest.raises(openai.AuthenticationError):
        ai.models.list()


def test_an_error_inside_a_stream() -> None:
    rt, backend = runtime(["word " * 50], draft=0)
    with serving(rt) as served, client(served) as ai:
        backend.fail_after = 5
        stream = ai.chat.completions.create(model="scripted", messages=USER, stream=True)
        with pytest.raises(openai.APIError, match="internal error"):
            list(stream)


def test_leaving_a_stream() -> None:
    rt, _ = runtime(["word " * 1500], draft=0)
    with serving(rt) as served, client(served) as ai:
        stream = ai.chat.completions.create(model="scripted", messages=USER, stream=True)
        for _, _ in zip(stream, range(3), strict=False):
            pass
        stream.close()
        served.settled()
        assert served.runtime.stats()["tokens"] < 1500


@pytest.mark.parametrize("stream", [False, True])
def test_a_round_of_tools(stream: bool) -> None:
    """As an agent does it: call, result, answer; what was processed is not processed again."""
    rt, _ = runtime([CALL + END, "<think></think>Done." + END])
    with serving(rt) as served, client(served) as ai:
        options: Any = {"model": "scripted", "tools": TOOLS}
        if stream:
            with ai.chat.completions.stream(messages=USER, **options) as events:
                message = events.get_final_completion().choices[0].message
        else:
            message = ai.chat.completions.create(messages=USER, **options).choices[0].message
        (call,) = message.tool_calls
        assert json.loads(call.function.arguments) == {"by": 3}
        turn = [
            *USER,
            message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "ok"},
        ]
        answer = ai.chat.completions.create(messages=turn, **options)
    assert answer.choices[0].message.content == "Done."
    assert answer.usage.prompt_tokens_details.cached_tokens > 20


def test_structured_answers() -> None:
    """Parsed by the client itself: into a pydantic model, into a forced call's arguments."""
    from pydantic import BaseModel

    class Light(BaseModel):
        room: str
        level: int

    rt, _ = runtime(['<think></think>{"room": "客厅", "level": 3}' + END, CALL + END])
    with serving(rt) as served, client(served) as ai:
        parsed = ai.chat.completions.parse(model="scripted", messages=USER, response_format=Light)
        assert parsed.choices[0].message.parsed == Light(room="客厅", level=3)
        forced = ai.chat.completions.create(
            model="scripted",
            messages=[*USER, {"role": "assistant", "content": "hm"}, *USER],
            tools=TOOLS,
            tool_choice={"type": "function", "function": {"name": "dim"}},
            logprobs=True,
            top_logprobs=1,
        )
    (choice,) = forced.choices
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"by": 3}
    assert choice.logprobs.content[0].top_logprobs[0].token == choice.logprobs.content[0].token


def test_the_built_in_model() -> None:
    """End to end: mimo-nano turns a command into a call, and goes on from its result."""
    rt = Runtime.open("mimo-nano")
    with serving(rt, thinking=False) as served, client(served) as ai:
        options: Any = {"model": rt.name, "tools": DEMO_TOOLS, "max_tokens": 100}
        messages: Any = [{"role": "user", "content": "turn on guest wifi for two hours"}]
        first = ai.chat.completions.create(messages=messages, **options)
        (choice,) = first.choices
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        want = rt.session(tools=DEMO_TOOLS, enable_thinking=False).generate(
            messages[0]["content"], max_tokens=100
        )
        assert call.function.name == want.tool_calls[0].name
        assert json.loads(call.function.arguments) == want.tool_calls[0].arguments
        streamed = list(ai.chat.completions.create(messages=messages, stream=True, **options))
        assert streamed[-1].choices[0].finish_reason == "tool_calls"
