"""/v1/responses: what a request asks for, in the words of a chat.

Nothing is stored here, so a conversation is sent whole: items of earlier answers among the input.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mimo_edge.chat_template import check_messages
from mimo_edge.errors import MimoEdgeError
from mimo_edge.serve.body import Fields
from mimo_edge.serve.calls import (
    Call,
    check_format,
    read_model,
    read_options,
    read_tool_options,
    read_tools,
)
from mimo_edge.serve.refusal import Refusal, refusal_of

_TEXT_PARTS = frozenset({"input_text", "output_text", "text"})
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "store",  # nothing is
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "include",  # more of what there is none of here
    }
)
_REPEATED = ("instructions", "metadata", "parallel_tool_calls", "text", "tool_choice")
_NEUTRAL: dict[str, Any] = {
    "background": False,
    "top_logprobs": 0,
    "truncation": "disabled",
}


def read_response(raw: Mapping[str, Any], models: tuple[str, ...]) -> Call:
    """A /v1/responses body, as `read_chat`. Raises Refusal."""
    fields = Fields(raw)
    model = read_model(fields, models)
    messages = _input(fields.take("input"))
    instructions = fields.text("instructions")
    if instructions is not None:
        messages.insert(0, {"role": "system", "content": instructions})
    try:
        messages = check_messages(messages)
    except MimoEdgeError as error:
        raise refusal_of(error, asked=True, param="input") from None
    _refuse_stored(fields)
    tools = read_tools(fields)
    thinking = _thinking(fields)
    stream = bool(fields.flag("stream"))
    inner = fields.inner("stream_options")
    if inner is not None:
        inner.finish(frozenset({"include_obfuscation"}))
    options = read_options(fields, ("max_output_tokens",))
    options |= _choice(fields, tools) | _format(fields)
    fields.finish(_HARMLESS, _NEUTRAL)
    asked = {name: raw[name] for name in _REPEATED if raw.get(name) is not None}
    return Call("response", model, messages, options, tools, thinking, stream, asked=asked)


def _refuse_stored(fields: Fields) -> None:
    for name in ("previous_response_id", "conversation", "prompt"):
        if fields.take(name) is not None:
            raise Refusal(
                400,
                f"{name}: nothing is stored here, send the whole conversation as input",
                param=name,
                code="unsupported",
            )


def _thinking(fields: Fields) -> bool | None:
    """`reasoning: {"effort": ...}`: "none" turns it off, every other effort is the model's own."""
    inner = fields.inner("reasoning")
    if inner is None:
        return None
    effort = inner.text("effort")
    inner.finish(frozenset({"summary", "generate_summary"}))
    return None if effort is None else effort != "none"


def _choice(fields: Fields, tools: tuple[Mapping[str, Any], ...]) -> dict[str, Any]:
    """`tool_choice`, whose function is named one level higher than in a chat."""
    choice = fields.take("tool_choice", "auto")
    if isinstance(choice, dict) and "function" not in choice:
        choice = {"type": choice.get("type"), "function": {"name": choice.get("name")}}
    rest = {"tool_choice": choice, "parallel_tool_calls": fields.flag("parallel_tool_calls")}
    return read_tool_options(Fields(rest), tools)


def _format(fields: Fields) -> dict[str, Any]:
    """`text.format`: text, json_object, or json_schema with the schema beside its type."""
    inner = fields.inner("text")
    schema: Any = None
    if inner is not None:
        form = inner.inner("format")
        if form is not None:
            kind = form.text("type")
            if kind == "json_object":
                schema = {"type": "object"}
            elif kind == "json_schema":
                schema = form.take("schema")
                if schema is None:
                    raise Refusal(400, "text.format has no schema", param="text")
            elif kind != "text":
                raise Refusal(
                    400,
                    f"text.format {(kind or '')[:40]!r} is none of text, json_object, json_schema",
                    param="text",
                )
            form.finish(frozenset({"name", "description", "strict"}))
        inner.finish(frozenset({"verbosity"}))
    return check_format(schema, None, "text")


def _input(given: Any) -> list[dict[str, Any]]:
    """Input items as messages of a chat: calls join the answer they belong to."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise Refusal(400, "input is a text or a list of items, not empty", param="input")
    messages: list[dict[str, Any]] = []
    reasoning = ""
    for index, item in enumerate(given):
        where = f"input[{index}]"
        if not isinstance(item, dict):
            raise Refusal(400, f"{where} is no object", param="input")
        kind = item.get("type", "message")
        fields = Fields({k: v for k, v in item.items() if k != "type"}, f"{where}.")
        if kind == "reasoning":
            reasoning += _reasoning(fields, where)
            continue
        if kind == "message":
            message = _message(fields, where)
        elif kind == "function_call":
            message = _function_call(fields, where)
            if messages and messages[-1]["role"] == "assistant" and not reasoning:
                messages[-1].setdefault("tool_calls", []).extend(message["tool_calls"])
                continue
        elif kind == "function_call_output":
            message = _output(fields, where)
        else:
            raise Refusal(
                400, f"{where} is a {str(kind)[:40]!r}, which is not supported", param="input"
            )
        if reasoning and message["role"] == "assistant":
            message["reasoning_content"], reasoning = reasoning, ""
        messages.append(message)
    return messages


def _message(fields: Fields, where: str) -> dict[str, Any]:
    role = fields.text("role")
    if role not in _ROLES:
        raise Refusal(400, f"{where} has the role {str(role)[:40]!r}", param="input")
    content = _text(fields.take("content"), where)
    fields.finish(frozenset({"id", "status", "phase"}))
    return {"role": _ROLES[role], "content": content}


def _function_call(fields: Fields, where: str) -> dict[str, Any]:
    name, arguments = fields.text("name"), fields.text("arguments")
    identity = _call_id(fields, where)
    fields.finish(frozenset({"id", "status"}))
    if not name or arguments is None:
        raise Refusal(400, f"{where} has no name or no arguments", param="input")
    call = {
        "id": identity,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _output(fields: Fields, where: str) -> dict[str, Any]:
    output, identity = fields.take("output"), _call_id(fields, where)
    fields.finish(frozenset({"id", "status"}))
    return {"role": "tool", "content": _text(output, where), "tool_call_id": identity}


def _call_id(fields: Fields, where: str) -> str:
    """Which call an item is, or answers."""
    identity = fields.text("call_id")
    if identity is None:
        raise Refusal(400, f"{where} has no call_id", param="input")
    return identity


def _reasoning(fields: Fields, where: str) -> str:
    parts = fields.take("content", [])
    fields.finish(frozenset({"id", "status", "summary", "encrypted_content"}))
    if not isinstance(parts, list):
        raise Refusal(400, f"{where}.content is no list", param="input")
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise Refusal(400, f"{where} has a part that is not text", param="input")
    return "".join(str(text) for text in texts)


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refusal(400, f"{where} has content that is neither text nor parts", param="input")
    texts = []
    for part in content:
        kind, text = (
            (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        )
        if not isinstance(text, str) or not isinstance(kind, str) or kind not in _TEXT_PARTS:
            raise Refusal(
                400, f"{where} has a part that is not text: only text is run here", param="input"
            )
        texts.append(text)
    return "".join(texts)


def arguments_text(arguments: Mapping[str, Any]) -> str:
    """Arguments as OpenAI's formats have them: JSON in a text."""
    return json.dumps(arguments, ensure_ascii=False)
