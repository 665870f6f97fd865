"""What is asked of a session, as the body of a chat completion."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mimo_edge.answer_options import AnswerOptions
from mimo_edge.chat_template import Message
from mimo_edge.errors import UsageError
from mimo_edge.tool_calls import OPEN, Malformed, ToolCall, parse_tool_calls

# The name of a call that could not be read, in a history: servers want one.
_UNREADABLE = "unreadable"


def request_body(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    thinking: bool | None,
    options: AnswerOptions,
) -> dict[str, Any]:
    """The body of a streamed chat completion, without its model. Raises UsageError for
    log-probabilities, which are told of token ids."""
    if options.logprobs is not None:
        raise UsageError("logprobs are for local models: a server names tokens by their text")
    body: dict[str, Any] = {
        "messages": list(messages),
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": options.temperature,
        "top_p": options.top_p,
    }
    # What is not given is not sent: servers refuse what they do not know. OpenAI's own format
    # lacks min_p, top_k, repetition_penalty, regex and stop_repeats.
    usual = {
        "min_p": 0.0,
        "top_k": 0,
        "seed": None,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": None,
        "regex": None,
        "stop_repeats": 0,
        "parallel_tool_calls": True,
    }
    body |= {name: value for name in usual if (value := getattr(options, name)) != usual[name]}
    if options.stop:
        body["stop"] = list(options.stop)
    if tools:
        body["tools"] = [_wrapped(tool) for tool in tools]
    if options.tool_choice in ("none", "required"):
        body["tool_choice"] = options.tool_choice
    elif options.tool_choice != "auto":
        body["tool_choice"] = {"type": "function", "function": {"name": options.tool_choice}}
    if thinking is not None:
        body["chat_template_kwargs"] = {"enable_thinking": thinking}
    if options.json_schema is not None:
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": dict(options.json_schema), "strict": True},
        }
    return body


def to_openai(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A conversation in OpenAI's form, message by message.

    Answers of a local session hold their tool calls as text, as the model wrote them, and results
    belong to calls by their order; servers want calls apart, and ids.
    """
    made: list[dict[str, Any]] = []
    waiting: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        one = dict(message)
        if one["role"] == "assistant":
            if not one.get("tool_calls") and OPEN in one["content"] and tools:
                one |= _apart(one["content"], tools)
            waiting = [
                _with_id(call, f"call_{index}_{number}")
                for number, call in enumerate(one.pop("tool_calls", None) or ())
            ]
            if waiting:
                one["tool_calls"] = list(waiting)
        elif one["role"] == "tool":
            call = _answered(one, waiting)
            waiting.remove(call)
            one["tool_call_id"] = call["id"]
            one.pop("name", None)
        made.append(one)
    return made


def _answered(result: Mapping[str, Any], waiting: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The call a result belongs to: by id, else the first of its name, else the first."""
    if not waiting:
        raise UsageError("the result of a tool follows no call")
    for call in waiting:
        if result.get("tool_call_id") == call["id"]:
            return call
    # The loop of an agent gives no name with the result of a call that could not be read.
    name = result.get("name", _UNREADABLE)
    return next((call for call in waiting if call["function"]["name"] == name), waiting[0])


def _apart(content: str, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Text and calls of an answer as it was written. What cannot be read is a call as well: it is
    answered like one."""
    text, calls = "", []
    for event in parse_tool_calls(content, tools):
        if isinstance(event, ToolCall):
            calls.append(_call(event.name, json.dumps(event.arguments, ensure_ascii=False)))
        elif isinstance(event, Malformed):
            calls.append(_call(_UNREADABLE, json.dumps({"text": event.text}, ensure_ascii=False)))
        else:
            text += event
    return {"content": text.strip("\n") if calls else content, "tool_calls": calls}


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _with_id(call: Mapping[str, Any], made: str) -> dict[str, Any]:
    """A call with an id and its arguments as text: local templates take them as objects."""
    function = dict(call.get("function", call))
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
    return {"id": call.get("id") or made, "type": "function", "function": function}


def _wrapped(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool in the form all servers take: ours takes bare functions too."""
    if "function" in tool:
        return {"type": "function", **tool}
    return {"type": "function", "function": dict(tool)}
