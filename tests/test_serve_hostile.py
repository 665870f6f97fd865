"""Whatever is sent, the answer is an error of the client's or an answer, and the server goes on."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import END, runtime
from serving import Served, scripted, serving, until
from test_leaks import MIB, held

from mimo_edge.serve.limits import Limits

FIELDS = [
    "model", "messages", "prompt", "tools", "tool_choice", "stream", "stream_options", "stop",
    "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "max_completion_tokens", "n",
    "response_format", "logprobs", "logit_bias", "user", "metadata", "chat_template_kwargs",
    "regex", "top_logprobs", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "parallel_tool_calls", "timeout_s",
]  # fmt: skip
WORDS = ["system", "user", "assistant", "tool", "role", "content", "function", "name", "type"]
WORDS += [
    "parameters",
    "properties",
    "text",
    "auto",
    "tool_calls",
    "arguments",
    "object",
    "<think>",
]

texts = st.one_of(
    st.sampled_from([*WORDS, "\ud800", "\x00", "﷐" * 40, "<|im_end|>", "9" * 400]),
    st.text(max_size=8),
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**63, -(2**64), 10**300, 10**4000, 0.5, 1e308, -0.0, float("nan")]),
    st.floats(),
    texts,
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
bodies = st.dictionaries(st.sampled_from(FIELDS) | texts, values, max_size=5)
messages = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "name", "tool_calls"]), values), max_size=3
)
tools = st.lists(
    st.fixed_dictionaries({"type": st.just("function"), "function": values})
    | st.fixed_dictionaries(
        {"function": st.fixed_dictionaries({"name": texts, "parameters": values})}
    ),
    max_size=3,
)
GOOD = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    # A small context ends what a high temperature never would.
    with scripted(["Hello." + END], context=300) as (served, _):
        yield served


def check(server: Served, raw: bytes, path: str = "/v1/chat/completions") -> None:
    response = server.post(raw, path)
    assert response.status_code in (200, 400, 404, 413), (raw[:200], response.text)
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["message"]
        assert error["type"] in ("invalid_request_error", "not_found_error")


slow = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@slow
@given(raw=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_bytes(server: Served, raw: bytes) -> None:
    check(server, raw)


@slow
@given(body=bodies, path=st.sampled_from(["/v1/chat/completions", "/v1/completions"]))
def test_any_fields(server: Served, body: dict[str, Any], path: str) -> None:
    check(server, json.dumps(body).encode(), path)


@slow
@given(field=st.sampled_from(FIELDS), value=values)
def test_one_bad_field(server: Served, field: str, value: Any) -> None:
    check(server, json.dumps({"messages": GOOD, "max_tokens": 2, field: value}).encode())
    check(
        server, json.dumps({"prompt": "a", "max_tokens": 2, field: value}).encode(),
        "/v1/completions",
    )  # fmt: skip


@slow
@given(said=messages, given_tools=tools)
def test_messages_and_tools(server: Served, said: Any, given_tools: Any) -> None:
    body = {"messages": [*GOOD, *said], "tools": given_tools, "max_tokens": 2}
    check(server, json.dumps(body).encode())


KEYWORDS = [
    "type", "properties", "items", "enum", "const", "anyOf", "allOf", "oneOf", "$ref", "$defs",
    "required", "pattern", "minLength", "maxItems", "additionalProperties", "minimum", "format",
    "patternProperties", "multipleOf", "not", "x-guidance",
]  # fmt: skip
schemas = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYWORDS) | texts, inner, max_size=4)
    ),
    max_leaves=10,
)


@slow
@given(schema=schemas, regex=texts | st.text("()[]{}*+?|\\^$.ab", max_size=12))
def test_forms(server: Served, schema: Any, regex: str) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    body = {"messages": GOOD, "response_format": form, "max_tokens": 4}
    check(server, json.dumps(body).encode())
    check(server, json.dumps({"messages": GOOD, "regex": regex, "max_tokens": 4}).encode())
    tool = {"name": "f", "parameters": {"properties": {"a": schema}}}
    check(server, json.dumps({"messages": GOOD, "tools": [tool], "max_tokens": 2}).encode())


@pytest.mark.parametrize("token", [2**80, -(2**80), -1, 2**31, 10**9])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 2.0}, {"regex": "a*"}])
def test_ids_that_are_no_tokens(server: Served, token: int, options: dict[str, Any]) -> None:
    body = {"prompt": [1, token, 2], "max_tokens": 2, **options}
    response = server.post(json.dumps(body).encode(), "/v1/completions")
    assert response.status_code == 400, response.text


def test_it_still_answers(server: Served) -> None:
    (choice,) = server.chat().json()["choices"]
    assert choice["message"]["content"] == "Hello."
    server.settled()


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 40
        + b"\r\nContent-Type: application/json\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 20_000,
        b"GET /" + b"a" * 100_000,
    ],
    ids=range(7),
)  # fmt: skip
def test_bytes_that_are_no_http(server: Served, raw: bytes) -> None:
    with server.raw() as connection:
        try:
            connection.sendall(raw)
            answer = connection.recv(100)
        except ConnectionError:
            answer = b""  # thrown out while it was still talking
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer
    assert server.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("count", "rss"), [(120, 4 * MIB), pytest.param(3000, 8 * MIB, marks=pytest.mark.slow)]
)
def test_soak(count: int, rss: int) -> None:
    """Answers, streams, errors and clients that leave at any time: nothing is left behind."""
    rt, _ = runtime([f"<think></think>answer {n} " * 3 + END for n in range(3)])
    # Some send half a body and wait.
    limits = Limits(concurrent=3, queued=50, conversations=4, body_wait_s=0.2)
    with serving(rt, limits=limits) as served:

        def one(number: int) -> None:
            rng = random.Random(number)
            said = [{"role": "user", "content": f"question {number % 7}"}]
            kind = number % 5
            if kind == 0:
                assert served.chat(messages=said).status_code == 200
            elif kind == 1:
                assert served.chat(messages=said, n=2).status_code == 400
            elif kind == 2:
                assert "[DONE]" in served.chat(messages=said, stream=True).text
            else:
                raw = json.dumps({"messages": said, "stream": kind == 3}).encode()
                with served.raw() as connection:
                    connection.sendall(
                        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                        b"Content-Type: application/json\r\n"
                        b"Content-Length: %d\r\n\r\n"
                        % len(raw)
                        + raw[: rng.choice([len(raw), len(raw), 10])]
                    )
                    if rng.random() < 0.5:
                        connection.recv(rng.choice([1, 300]))
                    else:
                        time.sleep(rng.random() * 0.01)

        def batch(first: int, size: int) -> None:
            errors: list[BaseException] = []

            def some(start: int) -> None:
                try:
                    for number in range(start, first + size, 3):
                        one(number)
                except BaseException as error:
                    errors.append(error)

            threads = [threading.Thread(target=some, args=(first + n,)) for n in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not errors
            served.settled()

        batch(0, 60)
        before = held()
        batch(60, count)
        after = held()
        until(lambda: held().files <= before.files and held().threads <= before.threads + 3)
        after = held()
        assert after.rss <= before.rss + rss, (before, after)
        assert served.metric("conversations_idle") <= 4
        assert served.metric("abandoned_total") > 10
