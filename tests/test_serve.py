"""OpenAI's API over HTTP: answers, streams, tools, errors, limits, clients that leave."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from scripted import END, runtime
from serving import Served, events, scripted, serving, until

from mimo_edge.serve.limits import Limits

THOUGHT = "<think>it is polite</think>Hello there."
CALL = (
    "<tool_call>\n<function=dim>\n<parameter=room>客厅</parameter>\n"
    "<parameter=by>3</parameter>\n</function>\n</tool_call>"
)
DIM = {
    "type": "function",
    "function": {
        "name": "dim",
        "parameters": {
            "type": "object",
            "properties": {"room": {"type": "string"}, "by": {"type": "integer"}},
        },
    },
}
USER = [{"role": "user", "content": "dim the light"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    """Answers every first turn with THOUGHT."""
    with scripted([THOUGHT + END]) as (served, _):
        yield served


class TestAnswers:
    def test_chat(self, server: Served) -> None:
        response = server.chat(user="me", metadata={"a": "b"})
        body = response.json()
        assert response.status_code == 200
        assert body["object"] == "chat.completion"
        assert body["model"] == "scripted"
        (choice,) = body["choices"]
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["role"] == "assistant"
        assert choice["message"]["content"] == "Hello there."
        assert choice["message"]["reasoning_content"] == "it is polite"
        assert "tool_calls" not in choice["message"]
        usage = body["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        tokenizer = server.runtime.tokenizer
        assert tokenizer is not None
        said = tokenizer.encode(THOUGHT + END, allow_special=True)
        assert usage["completion_tokens"] == len(said)

    def test_a_stream_says_the_same(self, server: Served) -> None:
        response = server.chat(stream=True, stream_options={"include_usage": True})
        assert response.headers["content-type"].startswith("text/event-stream")
        found = events(response)
        assert {e["object"] for e in found} == {"chat.completion.chunk"}
        assert len({e["id"] for e in found}) == 1
        *chunks, last = found
        deltas = [e["choices"][0]["delta"] for e in chunks]
        assert deltas[0]["role"] == "assistant"
        assert len(deltas) > 4
        assert "".join(d.get("content", "") for d in deltas) == "Hello there."
        assert "".join(d.get("reasoning_content", "") for d in deltas) == "it is polite"
        assert [e["choices"][0]["finish_reason"] for e in chunks[-2:]] == [None, "stop"]
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] > 4
        assert all(e["usage"] is None for e in chunks)

    def test_no_usage_unless_asked(self, server: Served) -> None:
        found = events(server.chat(stream=True))
        assert all("usage" not in e and e["choices"] for e in found)

    @pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
    def test_length(self, server: Served, name: str) -> None:
        body = server.chat(**{name: 3}).json()
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == 3

    def test_repetition(self) -> None:
        with scripted(["a b" * 300 + END]) as (served, _):
            body = served.chat(stop_repeats=4).json()
            assert body["choices"][0]["finish_reason"] == "length"
            assert body["usage"]["completion_tokens"] < 100
            assert served.chat(stop_repeats=-1).status_code == 400

    def test_stop(self, server: Served) -> None:
        for stop in ("there", ["nowhere", "there"]):
            (choice,) = server.chat(stop=stop).json()["choices"]
            assert choice["message"]["content"] == "Hello "
            assert choice["finish_reason"] == "stop"

    def test_sampling_reaches_the_model(self, server: Served) -> None:
        """At a temperature where the script hardly matters, equal seeds agree, others do not."""
        hot: dict[str, Any] = {"temperature": 1e4, "max_tokens": 12}
        texts = [server.chat(seed=seed, **hot).json()["choices"] for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]
        for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
            body = server.chat(temperature=1e4, **narrow, stop="there").json()
            assert body["choices"][0]["message"]["content"] == "Hello "

    def test_completion(self, server: Served) -> None:
        prompt = "<|im_start|>assistant\n"  # as text it is no markup: the script does not begin
        body = server.client.post("/v1/completions", json={"prompt": prompt}).json()
        assert body["object"] == "text_completion"
        assert body["usage"]["completion_tokens"] == 16
        assert body["choices"][0]["finish_reason"] == "length"
        assert "Hello" not in body["choices"][0]["text"]

    def test_completion_of_ids(self, server: Served) -> None:
        tokenizer = server.runtime.tokenizer
        assert tokenizer is not None
        begun = tokenizer.encode("<|im_start|>assistant\n", allow_special=True)
        for prompt in (begun, [begun]):
            body = server.client.post(
                "/v1/completions", json={"prompt": prompt, "max_tokens": 99}
            ).json()
            assert body["choices"][0]["text"].endswith("Hello there.")

    def test_completion_stream(self, server: Served) -> None:
        body = {"prompt": "a b", "stream": True, "max_tokens": 5}
        whole = server.client.post("/v1/completions", json={**body, "stream": False}).json()
        found = events(server.client.post("/v1/completions", json=body))
        assert "".join(e["choices"][0]["text"] for e in found) == whole["choices"][0]["text"]
        assert found[-1]["choices"][0]["finish_reason"] == "length"

    def test_models(self, server: Served) -> None:
        (model,) = server.client.get("/v1/models").json()["data"]
        assert model["id"] == "scripted"
        assert model["context_length"] == 2000
        assert server.client.get("/v1/models/scripted").json() == model
        assert server.client.get("/v1/models/other").status_code == 404
        assert server.chat(model="scripted").status_code == 200

    def test_health(self, server: Served) -> None:
        assert server.client.get("/health").json() == {"status": "ok", "model": "scripted"}

    def test_metrics(self, server: Served) -> None:
        before = server.metric("tokens_total")
        used = server.chat().json()["usage"]["completion_tokens"]
        assert server.metric("tokens_total") == before + used
        assert server.metric('requests_total{route="/v1/chat/completions",status="200"}') >= 1
        assert server.metric("requests_running") == 0
        assert server.metric("resident_bytes") > 1 << 20
        page = server.client.get("/metrics")
        assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
        for line in page.text.splitlines():
            if not line.startswith("#"):
                float(line.rpartition(" ")[2])

    def test_paths_of_clients_make_no_labels(self, server: Served) -> None:
        assert server.client.get("/x/evil").status_code == 404
        assert "evil" not in server.client.get("/metrics").text


class TestTools:
    def test_calls(self) -> None:
        with scripted(["Ok. " + CALL + CALL + END]) as (served, _):
            (choice,) = served.chat(messages=USER, tools=[DIM]).json()["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "Ok. "
        calls = choice["message"]["tool_calls"]
        assert len({call["id"] for call in calls}) == 2
        for call in calls:
            assert call["type"] == "function"
            assert call["function"]["name"] == "dim"
            assert json.loads(call["function"]["arguments"]) == {"room": "客厅", "by": 3}

    def test_only_a_call_has_no_content(self) -> None:
        with scripted([CALL + END]) as (served, _):
            (choice,) = served.chat(messages=USER, tools=[DIM]).json()["choices"]
        assert choice["message"]["content"] is None

    def test_streamed_calls(self) -> None:
        with scripted([CALL + CALL + END]) as (served, _):
            found = events(served.chat(messages=USER, tools=[DIM], stream=True))
        deltas = [e["choices"][0]["delta"] for e in found]
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        assert [call["index"] for call in calls] == [0, 1]
        assert json.loads(calls[1]["function"]["arguments"]) == {"room": "客厅", "by": 3}
        assert found[-1]["choices"][0]["finish_reason"] == "tool_calls"

    def test_choice_none(self) -> None:
        with scripted([CALL + END]) as (served, _):
            (choice,) = served.chat(messages=USER, tools=[DIM], tool_choice="none").json()[
                "choices"
            ]
        assert choice["finish_reason"] == "stop"
        assert "tool_calls" not in choice["message"]
        assert "<tool_call>" not in choice["message"]["content"]

    def test_results_are_read(self) -> None:
        """A whole round: the second turn goes on from what the first one processed."""
        with scripted(["<think></think>" + CALL + END, "<think></think>Done." + END]) as (
            served,
            _,
        ):
            first = served.chat(messages=USER, tools=[DIM]).json()
            message = first["choices"][0]["message"]
            turn = [
                *USER,
                message,
                {
                    "role": "tool",
                    "tool_call_id": message["tool_calls"][0]["id"],
                    "content": "dimmed",
                },
            ]
            second = served.chat(messages=turn, tools=[DIM]).json()
        assert second["choices"][0]["message"]["content"] == "Done."
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        # All but the end token, which was chosen and never processed.
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == (
            first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"] - 1
        )


class TestForms:
    """Answers held to a form; the model itself would say something else."""

    POINT: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {"x": {"enum": ["on", "off"]}},
        "required": ["x"],
        "additionalProperties": False,
    }

    def test_a_schema(self) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "point", "schema": self.POINT}}
        with scripted(['{"x": 5}' + END]) as (served, _):
            body = {"messages": USER, "response_format": form, "max_tokens": 40}
            (choice,) = served.chat(**body).json()["choices"]
            found = events(served.chat(**body, stream=True))
        value = json.loads(choice["message"]["content"])
        assert value["x"] in ("on", "off")
        text = "".join(e["choices"][0]["delta"].get("content", "") for e in found)
        assert text == choice["message"]["content"]

    def test_an_object(self) -> None:
        with scripted(['{"a": [1, null]}' + END, "[1]" + END]) as (served, _):
            form = {"type": "json_object"}
            (choice,) = served.chat(messages=USER, response_format=form).json()["choices"]
            assert json.loads(choice["message"]["content"]) == {"a": [1, None]}

    def test_a_regex(self, server: Served) -> None:
        body = {"prompt": "x", "regex": "(yes|no)", "max_tokens": 9}
        response = server.client.post("/v1/completions", json=body)
        assert response.json()["choices"][0]["text"] in ("yes", "no")

    @pytest.mark.parametrize(
        "choice", ["required", {"type": "function", "function": {"name": "stop"}}], ids=str
    )
    def test_forced_calls(self, choice: Any) -> None:
        stop = {"type": "function", "function": {"name": "stop", "strict": True}}
        want = "<tool_call>\n<function=stop>\n</function>\n</tool_call>"
        for said in ("I would rather talk." + END, want + END):
            with scripted([said], thinking=False) as (served, _):
                tools = [stop] if isinstance(choice, str) else [DIM, stop]
                (answer,) = served.chat(messages=USER, tools=tools, tool_choice=choice).json()[
                    "choices"
                ]
            calls = answer["message"]["tool_calls"]
            assert {call["function"]["name"] for call in calls} == {"stop"}
            assert answer["finish_reason"] in ("tool_calls", "length")

    def test_one_call(self) -> None:
        with scripted([CALL + CALL + END]) as (served, _):
            (choice,) = served.chat(
                messages=USER, tools=[DIM], parallel_tool_calls=False, max_tokens=120
            ).json()["choices"]
        assert len(choice["message"]["tool_calls"]) == 1

    def test_loose_tools_keep_their_values_free(self) -> None:
        loose = {"function": {**DIM["function"], "strict": False}}  # type: ignore[dict-item]
        odd = CALL.replace(">3<", ">three<")
        with scripted([odd + END]) as (served, _):
            (choice,) = served.chat(messages=USER, tools=[loose]).json()["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"])["by"] == "three"


class TestLogprobs:
    def test_chat(self, server: Served) -> None:
        body = {"messages": USER, "logprobs": True, "top_logprobs": 2}
        (choice,) = server.chat(**body).json()["choices"]
        content = choice["logprobs"]["content"]
        text = b"".join(bytes(entry["bytes"]) for entry in content).decode()
        assert text == THOUGHT
        for entry in content:
            assert entry["token"].encode() == bytes(entry["bytes"])
            assert len(entry["top_logprobs"]) == 2
            best = entry["top_logprobs"][0]
            assert (best["token"], best["logprob"]) == (entry["token"], entry["logprob"])
            assert -1e-6 < entry["logprob"] <= 0
        found = events(server.chat(**body, stream=True))
        streamed = [
            entry
            for event in found
            if event["choices"][0]["logprobs"]
            for entry in event["choices"][0]["logprobs"]["content"]
        ]
        assert streamed == content

    def test_only_when_asked(self, server: Served) -> None:
        assert server.chat(messages=USER).json()["choices"][0]["logprobs"] is None
        (choice,) = server.chat(messages=USER, logprobs=True).json()["choices"]
        assert {len(e["top_logprobs"]) for e in choice["logprobs"]["content"]} == {0}

    def test_completion(self, server: Served) -> None:
        body = {"prompt": "turn on", "max_tokens": 5, "logprobs": 3}
        (choice,) = server.client.post("/v1/completions", json=body).json()["choices"]
        shown = choice["logprobs"]
        assert len(shown["tokens"]) == len(shown["token_logprobs"]) == len(shown["text_offset"])
        assert "".join(shown["tokens"]) == choice["text"]
        assert shown["text_offset"][0] == 0
        for token, logprob, top in zip(
            shown["tokens"], shown["token_logprobs"], shown["top_logprobs"], strict=True
        ):
            assert top[token] == logprob == max(top.values())


class TestTime:
    def test_a_deadline_is_an_end(self) -> None:
        with scripted(["word " * 500], draft=0) as (served, backend):
            whole = backend.next_logits

            def slow(tokens: list[int]) -> Any:
                time.sleep(0.002)
                return whole(tokens)

            backend.next_logits = slow  # type: ignore[method-assign]
            body = served.chat(messages=USER, timeout_s=0.2).json()
        assert body["choices"][0]["finish_reason"] == "length"
        assert 0 < body["usage"]["completion_tokens"] < 500


ANSWERS = [f"<think></think>answer {n}" + END for n in range(4)]


class TestReuse:
    @staticmethod
    def ask(served: Served, *texts: str) -> tuple[list[str], int]:
        """A conversation of these questions, re-sent with every turn; texts and last cached."""
        messages: list[dict[str, str]] = []
        said, cached = [], 0
        for text in texts:
            messages.append({"role": "user", "content": text})
            body = served.chat(messages=messages).json()
            messages.append(
                {"role": "assistant", "content": body["choices"][0]["message"]["content"]}
            )
            said.append(messages[-1]["content"])
            cached = body["usage"]["prompt_tokens_details"]["cached_tokens"]
        return said, cached

    def test_interleaved_conversations(self) -> None:
        with scripted(ANSWERS) as (served, _):
            histories: list[list[dict[str, str]]] = [[], [], []]
            for turn in range(3):
                for number, messages in enumerate(histories):
                    messages.append({"role": "user", "content": f"question {number} {turn}"})
                    body = served.chat(messages=messages).json()
                    text = body["choices"][0]["message"]["content"]
                    assert text == f"answer {turn}"
                    messages.append({"role": "assistant", "content": text})
                    cached = body["usage"]["prompt_tokens_details"]["cached_tokens"]
                    assert (cached > 0) == (turn > 0)
            assert served.metric("conversations_idle") == 3

    def test_the_number_is_bounded(self) -> None:
        with scripted(ANSWERS, Limits(conversations=2, concurrent=2)) as (served, _):
            for number in range(5):
                self.ask(served, f"other {number}")
                assert served.metric("conversations_idle") <= 2
            assert self.ask(served, "one", "two")[1] > 0

    def test_off_by_one_conversation(self) -> None:
        """With room for one, a new conversation replaces it, and its own next turn is fast."""
        with scripted(ANSWERS, Limits(conversations=1, concurrent=1)) as (served, _):
            said, cached = self.ask(served, "one", "two", "three")
            assert said == ["answer 0", "answer 1", "answer 2"]
            assert cached > 0
            assert self.ask(served, "else")[1] == 0
            assert served.metric("conversations_idle") == 1


REFUSED: list[tuple[dict[str, Any], str | None]] = [
    ({"n": 2}, "n"),
    ({"n": True}, "n"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": "x"}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"timeout_s": 0}, "timeout_s"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "dim", "tools": [DIM]}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {}}, "tools": [DIM]}, "tool_choice"),
    (
        {"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [DIM]},
        "tool_choice",
    ),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}, "response_format"),
    ({"response_format": {"type": "yaml"}}, "response_format"),
    ({"response_format": {"type": "json_object"}, "regex": "a"}, "regex"),
    ({"regex": ""}, "regex"),
    ({"regex": "("}, None),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
        None,
    ),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"temprature": 1}, "temprature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"seed": -1}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": "\ud800"}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [5]}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages"),
    ({"messages": [{"role": "user", "content": "\udfff"}]}, "messages"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages",
    ),
    ({"messages": [{"role": "user", "content": "x", "audio": {}}]}, "messages[0].audio"),
    ({"messages": [{"role": "system", "content": "only"}]}, None),
    ({"tools": {}}, "tools"),
    ({"tools": [{"type": "custom"}]}, "tools"),
    ({"tools": [DIM, DIM]}, "tools"),
    ({"tools": [{"function": {"name": "f", "strict": "yes"}}]}, "tools[0].strict"),
    ({"tools": [{"function": {"name": "f", "parameters": {"not": {}}}}]}, None),
    ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs.x"),
    ({"model": 5}, "model"),
]


class TestRefusals:
    @pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda v: str(v)[:40])
    def test_bad_fields(self, server: Served, fields: dict[str, Any], param: str | None) -> None:
        base = {"messages": USER}
        response = server.post(json.dumps({**base, **fields}).encode())
        error = response.json()["error"]
        assert response.status_code == 400, error
        assert error["param"] == param
        assert error["type"] == "invalid_request_error"
        assert error["message"]

    def test_values_that_change_nothing_are_taken(self, server: Served) -> None:
        response = server.chat(
            n=1,
            logprobs=False,
            presence_penalty=0.0,
            logit_bias={},
            parallel_tool_calls=True,
            response_format={"type": "text"},
            stop=None,
            tools=None,
            store=True,
            max_tokens=3.0,
            messages=[{"role": "developer", "content": "be brief"}, *USER],
        )
        assert response.status_code == 200

    @pytest.mark.parametrize(
        "raw",
        [
            b"",
            b"null",
            b"[]",
            b"{",
            b'{"messages": NaN}',
            b'{"temperature": -Infinity}',
            b'{"temperature": 1e999}',
            b'{"seed": ' + b"9" * 5000 + b"}",
            b'{"messages": "\xff\xfe"}',
            b"[" * 100_000,
            b'{"metadata": ' + b'{"a":' * 900 + b"1" + b"}" * 901,
            b'{"metadata": ' + b"[" * 500 + b"]" * 500 + b"}",
        ],
        ids=range(12),
    )
    def test_bad_json(self, server: Served, raw: bytes) -> None:
        response = server.post(raw)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"

    @pytest.mark.parametrize(
        "body",
        [
            {},
            {"prompt": ""},
            {"prompt": []},
            {"prompt": ["a", "b"]},
            {"prompt": [1.5]},
            {"prompt": [True]},
            {"prompt": [10**6]},
            {"prompt": [-1]},
            {"prompt": "\ud800"},
            {"prompt": "a", "echo": True},
            {"prompt": "a", "best_of": 2},
            {"prompt": "a", "logprobs": 21},
            {"prompt": "a", "logprobs": True},
            {"prompt": "a", "regex": "("},
            {"prompt": "a", "suffix": "x"},
        ],
    )
    def test_bad_completions(self, server: Served, body: dict[str, Any]) -> None:
        response = server.post(json.dumps(body).encode(), "/v1/completions")
        assert response.status_code == 400, response.text

    def test_other_model(self, server: Served) -> None:
        response = server.chat(model="gpt-4o")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"

    def test_content_type(self, server: Served) -> None:
        assert server.client.post("/v1/completions", content=b"{}").status_code == 415

    def test_other_methods_and_paths(self, server: Served) -> None:
        assert server.client.get("/v1/chat/completions").status_code == 405
        assert server.client.get("/v1/chat/completions").json()["error"]["message"]
        assert server.client.get("/nothing").status_code == 404

    def test_a_page_of_another_name_is_kept_out(self, server: Served) -> None:
        for host, status in (
            ("evil.example", 403),
            ("localhost:1", 200),
            ("[::1]:80", 200),
            ("127.0.0.1", 200),
        ):
            assert server.client.get("/health", headers={"host": host}).status_code == status

    def test_key(self) -> None:
        rt, _ = runtime([THOUGHT + END])
        with serving(rt, api_key="s3cret", aliases=("gpt-4o",)) as served:
            assert served.client.get("/health").status_code == 200
            for value in ("", "Bearer", "Bearer wrong", "Bearer s3cret2", "Basic s3cret"):
                response = served.client.get("/v1/models", headers={"authorization": value})
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
            assert served.client.get("/metrics").status_code == 401
            served.client.headers["authorization"] = "Bearer s3cret"
            assert served.client.get("/metrics").status_code == 200
            assert served.chat(model="gpt-4o").json()["model"] == "gpt-4o"


class Slow:
    """Holds the model at its next pass while `hold` is set."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.reached = threading.Semaphore(0)
        self.go.set()

    def __call__(self, kind: str, rows: int) -> None:
        if not self.go.is_set():
            self.reached.release()
            assert self.go.wait(60)


class TestLimits:
    def test_body(self) -> None:
        with scripted([THOUGHT + END], Limits(body_bytes=1000)) as (served, _):
            fits = b'{"messages": [{"role": "user", "content": "x"}]}'
            assert served.post(fits.ljust(1000)).status_code == 200
            assert served.post(fits.ljust(1001)).status_code == 413

            def parts() -> Iterator[bytes]:  # of no declared length
                for _ in range(5):
                    yield b" " * 300

            headers = {"content-type": "application/json"}
            response = served.client.post("/v1/completions", content=parts(), headers=headers)
            assert response.status_code == 413

    def test_slow_body(self) -> None:
        limits = Limits(body_wait_s=0.1)
        with scripted([THOUGHT + END], limits) as (served, _), served.raw() as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
            )
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
            assert served.chat().status_code == 200

    def test_prompt(self) -> None:
        with scripted([THOUGHT + END], Limits(prompt_tokens=60)) as (served, _):
            assert served.chat().status_code == 200
            response = served.chat(messages=[{"role": "user", "content": "word " * 60}])
            assert response.status_code == 400
            assert response.json()["error"]["code"] == "context_length_exceeded"

    def test_context(self, server: Served) -> None:
        for stream in (False, True):  # found before a stream begins
            response = server.chat(
                messages=[{"role": "user", "content": "word " * 3000}], stream=stream
            )
            assert response.status_code == 400
            assert response.json()["error"]["code"] == "context_length_exceeded"

    def test_queue(self) -> None:
        slow = Slow()
        limits = Limits(concurrent=1, queued=1)
        with scripted([THOUGHT + END], limits, on_call=slow) as (served, _):
            slow.go.clear()
            codes: list[int] = []
            threads = [
                threading.Thread(target=lambda: codes.append(served.chat().status_code))
                for _ in range(2)
            ]
            threads[0].start()
            assert slow.reached.acquire(timeout=60)
            threads[1].start()
            until(lambda: served.metric("requests_queued") == 1)
            refused = served.chat()
            assert served.client.get("/health").status_code == 200
            slow.go.set()
            for thread in threads:
                thread.join()
        assert refused.status_code == 429
        assert refused.headers["retry-after"]
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert codes == [200, 200]

    def test_waiting_has_an_end(self) -> None:
        slow = Slow()
        limits = Limits(concurrent=1, queued=1, queue_wait_s=0.05)
        with scripted([THOUGHT + END], limits, on_call=slow) as (served, _):
            slow.go.clear()
            codes: list[int] = []
            thread = threading.Thread(target=lambda: codes.append(served.chat().status_code))
            thread.start()
            assert slow.reached.acquire(timeout=60)
            response = served.chat()
            slow.go.set()
            thread.join()
        assert (response.status_code, codes) == (503, [200])
        assert response.json()["error"]["code"] == "queue_timeout"


def request_bytes(**body: Any) -> bytes:
    raw = json.dumps({"messages": USER, **body}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    )
    return head.encode() + raw


class TestLeaving:
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_client_that_leaves_stops_its_generation(self, stream: bool) -> None:
        passes = 0
        slow = Slow()

        def on_call(kind: str, rows: int) -> None:
            nonlocal passes
            passes += kind == "forward"
            slow(kind, rows)

        long = "word " * 1500
        with scripted([long], Limits(concurrent=1), draft=0, on_call=on_call) as (served, _):
            slow.go.clear()
            with served.raw() as connection:
                connection.sendall(request_bytes(stream=stream))
                assert slow.reached.acquire(timeout=60)
            until(lambda: served.metric("abandoned_total") == 1)
            before = passes
            slow.go.set()
            served.settled()
            assert passes <= before + 1
            assert served.chat(max_tokens=2).status_code == 200  # its place is free again

    def test_leaving_the_queue(self) -> None:
        slow = Slow()
        with scripted([THOUGHT + END], Limits(concurrent=1), on_call=slow) as (served, _):
            slow.go.clear()
            with served.raw() as first:
                first.sendall(request_bytes())
                assert slow.reached.acquire(timeout=60)
                with served.raw() as second:
                    second.sendall(request_bytes())
                    until(lambda: served.metric("requests_queued") == 1)
                until(lambda: served.metric("requests_queued") == 0)
                slow.go.set()
                assert first.recv(100).startswith(b"HTTP/1.1 200 ")
            assert served.metric("generations_total") == 1

    def test_a_client_that_does_not_read_keeps_no_place(self) -> None:
        limits = Limits(concurrent=1)
        with scripted(["word " * 1500], limits) as (served, _), served.raw() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(request_bytes(stream=True))
            until(lambda: served.metric("requests_running") == 1)
            served.settled()
            assert served.chat(max_tokens=2).status_code == 200

    def test_closing(self) -> None:
        """Running answers end with an error, what waits is refused, and nothing hangs."""
        slow = Slow()
        rt, _ = runtime(["word " * 1500], draft=0, on_call=slow)
        found: list[Any] = []
        with serving(rt, limits=Limits(concurrent=1)) as served:
            slow.go.clear()

            def streamed() -> None:
                body = {"messages": USER, "stream": True}
                with served.client.stream("POST", "/v1/chat/completions", json=body) as response:
                    found.append([line for line in response.iter_lines() if line])

            def whole() -> None:
                found.append(served.chat().status_code)

            first = threading.Thread(target=streamed)
            first.start()
            assert slow.reached.acquire(timeout=60)
            second = threading.Thread(target=whole)
            second.start()
            until(lambda: served.metric("requests_queued") == 1)
            served.server.should_exit = True
            until(lambda: served.server.should_exit)
            threading.Timer(0.5, slow.go.set).start()
            first.join(60)
            second.join(60)
        assert 503 in found
        (lines,) = (f for f in found if isinstance(f, list))
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "closing"


class TestFailures:
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_model_that_fails(self, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
        with scripted(["word " * 50], draft=0) as (served, backend):
            backend.fail_after = 5
            response = served.chat(stream=stream)
            if stream:
                lines = [line for line in response.text.splitlines() if line]
                error = json.loads(lines[-1].removeprefix("data: "))["error"]
            else:
                assert response.status_code == 500
                error = response.json()["error"]
            assert error["type"] == "server_error"
            assert "device went away" not in error["message"]
            backend.fail_after = None
            assert served.chat(max_tokens=3).status_code == 200
        assert "the device went away" in caplog.text

    def test_keep_alive(self) -> None:
        slow = Slow()
        limits = Limits(keep_alive_s=0.02)
        with scripted([THOUGHT + END], limits, on_call=slow) as (served, _):
            slow.go.clear()
            body = {"messages": USER, "stream": True}
            with served.client.stream("POST", "/v1/chat/completions", json=body) as response:
                lines = response.iter_lines()
                while not next(lines).startswith(":"):
                    pass
                slow.go.set()
                assert list(lines)[-2:] == ["data: [DONE]", ""]
