"""What a request asks for: OpenAI's fields to the options of a session.

A field that changes the answer and is not understood is refused by name, also when it is unknown;
only those of `_HARMLESS` are passed over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mimo_edge.chat_template import check_messages
from mimo_edge.errors import MimoEdgeError
from mimo_edge.logprobs import MAX_TOP
from mimo_edge.sampling import SamplingParams
from mimo_edge.serve.body import Fields
from mimo_edge.serve.refusal import Refusal, refusal_of
from mimo_edge.structured.limits import check_regex, check_schema
from mimo_edge.tokenizer import check_unicode
from mimo_edge.tool_calls import tool_schemas

# Searching for them costs time for every token.
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
# What OpenAI's API gives a completion without max_tokens.
COMPLETION_TOKENS = 16

_ROLES = {"system", "user", "assistant", "tool"}
# Who asks, what is stored where, and hints that change no token.
_HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)
_NEUTRAL: dict[str, Any] = {
    "n": 1,
    "logit_bias": {},
}
_NEUTRAL_CHAT: dict[str, Any] = {**_NEUTRAL, "modalities": ["text"]}
_NEUTRAL_COMPLETION: dict[str, Any] = {**_NEUTRAL, "best_of": 1, "echo": False, "suffix": ""}


@dataclass(frozen=True)
class Call:
    """One request: `prompt` messages (chat, response), or a text or token ids (completion).

    `options` are those of `Session.stream`. `thinking` None leaves it to the server. `asked` are
    fields that a response repeats.
    """

    kind: Literal["chat", "completion", "response"]
    model: str
    prompt: list[dict[str, Any]] | str | list[int]
    options: dict[str, Any]
    tools: tuple[Mapping[str, Any], ...] = ()
    thinking: bool | None = None
    stream: bool = False
    include_usage: bool = False
    usage_so_far: bool = False
    asked: Mapping[str, Any] = field(default_factory=dict)


def read_chat(raw: Mapping[str, Any], models: tuple[str, ...]) -> Call:
    """A /v1/chat/completions body; `models` are the names this server goes by, the first its own.
    Raises Refusal."""
    fields = Fields(raw)
    model = read_model(fields, models)
    messages = _messages(fields)
    tools = read_tools(fields)
    thinking = _thinking(fields)
    stream, include_usage, so_far = _streaming(fields)
    options = read_options(fields, ("max_completion_tokens", "max_tokens"))
    options |= read_tool_options(fields, tools) | read_format(fields)
    options["logprobs"] = _chat_logprobs(fields)
    fields.finish(_HARMLESS, _NEUTRAL_CHAT)
    return Call("chat", model, messages, options, tools, thinking, stream, include_usage, so_far)


def read_completion(raw: Mapping[str, Any], models: tuple[str, ...]) -> Call:
    """A /v1/completions body, as `read_chat`."""
    fields = Fields(raw)
    model = read_model(fields, models)
    prompt = _prompt(fields)
    stream, include_usage, so_far = _streaming(fields)
    options = read_options(fields, ("max_tokens",))
    if options["max_tokens"] is None:
        options["max_tokens"] = COMPLETION_TOKENS
    options |= read_format(fields)
    options["logprobs"] = _count_within(fields, "logprobs", MAX_TOP)
    fields.finish(_HARMLESS, _NEUTRAL_COMPLETION)
    return Call(
        "completion",
        model,
        prompt,
        options,
        stream=stream,
        include_usage=include_usage,
        usage_so_far=so_far,
    )


def read_model(fields: Fields, models: tuple[str, ...]) -> str:
    """The model a request names, which must be here. Raises Refusal 404."""
    name = fields.text("model")
    if name is not None and name not in models:
        raise Refusal(
            404,
            f"the model {name[:80]!r} is not here; this server has {', '.join(models)}",
            param="model",
            code="model_not_found",
        )
    return name or models[0]


def _messages(fields: Fields) -> list[dict[str, Any]]:
    messages = fields.take("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, "messages is a list of at least one message", param="messages")
    for index, message in enumerate(messages):
        if isinstance(message, dict):
            _check_message(message, f"messages[{index}].")
    try:
        checked = check_messages(messages)
    except MimoEdgeError as error:
        raise refusal_of(error, asked=True, param="messages") from None
    for index, message in enumerate(checked):
        if message["role"] == "developer":  # OpenAI's newer name
            message["role"] = "system"
        if message["role"] not in _ROLES:
            raise Refusal(
                400, f"messages[{index}] has the role {message['role']!r}", param="messages"
            )
    return checked


def _check_message(message: dict[str, Any], where: str) -> None:
    rest = Fields(message, where)
    for known in ("role", "content", "reasoning_content"):
        rest.take(known)
    for known in ("name", "tool_call_id"):
        rest.text(known)
    calls = rest.take("tool_calls", [])
    if not isinstance(calls, list):
        raise rest.wrong("tool_calls", calls, "a list")
    rest.finish(frozenset({"refusal", "annotations"}))


def read_tools(fields: Fields) -> tuple[Mapping[str, Any], ...]:
    """`tools`. Raises Refusal."""
    tools = fields.take("tools", [])
    if not isinstance(tools, list):
        raise fields.wrong("tools", tools, "a list")
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise fields.wrong(f"tools[{index}]", tool, "an object")
        if tool.get("type", "function") != "function":
            raise Refusal(400, f"tools[{index}] is no function", param="tools")
        function = tool.get("function", tool)
        strict = function.get("strict") if isinstance(function, dict) else None
        if strict is not None and not isinstance(strict, bool):
            raise fields.wrong(f"tools[{index}].strict", strict, "true or false")
    try:
        tool_schemas(tools)
    except MimoEdgeError as error:
        raise refusal_of(error, asked=True, param="tools") from None
    return tuple(tools)


def read_tool_options(fields: Fields, tools: tuple[Mapping[str, Any], ...]) -> dict[str, Any]:
    """`tool_choice` as a session takes it, and `parallel_tool_calls`. Raises Refusal."""
    choice = fields.take("tool_choice", "auto")
    if isinstance(choice, dict):
        inner = Fields(choice, "tool_choice.")
        function = inner.inner("function")
        name = None if function is None else function.text("name")
        if inner.text("type") != "function" or function is None or name is None:
            raise Refusal(400, "tool_choice names no function", param="tool_choice")
        inner.finish()
        function.finish()
        if name not in tool_schemas(tools):
            raise Refusal(400, f"there is no tool {name[:80]!r}", param="tool_choice")
        choice = name
    elif choice not in ("auto", "none", "required"):
        raise Refusal(
            400, "tool_choice is 'auto', 'none', 'required' or a function", param="tool_choice"
        )
    if choice == "required" and not tools:
        raise Refusal(400, "tool_choice is 'required', but there are no tools", param="tool_choice")
    several = fields.flag("parallel_tool_calls")
    return {"tool_choice": choice, "parallel_tool_calls": several is not False}


def _thinking(fields: Fields) -> bool | None:
    """`chat_template_kwargs: {"enable_thinking": ...}`, as SGLang and vLLM have it."""
    inner = fields.inner("chat_template_kwargs")
    if inner is None:
        return None
    wanted = inner.flag("enable_thinking")
    inner.finish()
    return wanted


def _streaming(fields: Fields) -> tuple[bool, bool, bool]:
    """Whether to stream, with usage at the end, and with usage in every chunk (as vLLM has it)."""
    stream = bool(fields.flag("stream"))
    inner = fields.inner("stream_options")
    if inner is None:
        return stream, False, False
    if not stream:
        raise Refusal(400, "stream_options needs stream", param="stream_options")
    include_usage = bool(inner.flag("include_usage"))
    so_far = bool(inner.flag("continuous_usage_stats"))
    if so_far and not include_usage:
        raise Refusal(400, "continuous_usage_stats needs include_usage", param="stream_options")
    inner.finish(frozenset({"include_obfuscation"}))
    return stream, include_usage, so_far


def read_options(fields: Fields, max_names: tuple[str, ...]) -> dict[str, Any]:
    """Options of `Session.stream`; the most tokens go by one of `max_names`. Raises Refusal."""
    options: dict[str, Any] = {
        "temperature": fields.number("temperature", 0.0),
        "top_p": fields.number("top_p", 1.0),
        "min_p": fields.number("min_p", 0.0),
        "top_k": fields.count("top_k") or 0,
        "seed": fields.count("seed"),
        "repetition_penalty": fields.number("repetition_penalty", 1.0),
        "presence_penalty": fields.number("presence_penalty", 0.0),
        "frequency_penalty": fields.number("frequency_penalty", 0.0),
    }
    for name in options:  # one at a time, so that the refusal names it
        try:
            SamplingParams(**{name: options[name]})
        except MimoEdgeError as error:
            raise refusal_of(error, asked=True, param=name) from None
    given = [(name, most) for name in max_names if (most := fields.count(name)) is not None]
    for name, most in given:
        if most < 1:
            raise Refusal(400, f"{name} = {most}: ask for at least one", param=name)
    if len({most for _, most in given}) > 1:
        raise Refusal(400, "max_tokens and max_completion_tokens differ", param="max_tokens")
    options["max_tokens"] = given[0][1] if given else None
    options["stop"] = _stops(fields)
    options["stop_repeats"] = repeats = fields.count("stop_repeats") or 0
    if repeats < 0:
        raise Refusal(400, f"stop_repeats = {repeats}: use 0 or more", param="stop_repeats")
    timeout_s = fields.number("timeout_s", math.inf)
    if timeout_s <= 0:
        raise Refusal(400, f"timeout_s = {timeout_s}: use more than 0", param="timeout_s")
    options["timeout_s"] = None if timeout_s == math.inf else timeout_s
    return options


def _chat_logprobs(fields: Fields) -> int | None:
    wanted, top = fields.flag("logprobs"), _count_within(fields, "top_logprobs", MAX_TOP)
    if top and not wanted:
        raise Refusal(400, "top_logprobs needs logprobs", param="top_logprobs")
    return (top or 0) if wanted else None


def _count_within(fields: Fields, name: str, most: int) -> int | None:
    count = fields.count(name)
    if count is not None and not 0 <= count <= most:
        raise Refusal(400, f"{name} = {count}: use 0 to {most}", param=name)
    return count


def _stops(fields: Fields) -> tuple[str, ...]:
    stop = fields.take("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
        raise Refusal(400, "stop is a text or a list of texts", param="stop")
    if len(stops) > MAX_STOPS or any(not 0 < len(t) <= MAX_STOP_CHARACTERS for t in stops):
        raise Refusal(
            400,
            f"stop: at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARACTERS} characters",
            param="stop",
        )
    _check_unicode("stop", *stops)
    return tuple(stops)


def read_format(fields: Fields) -> dict[str, Any]:
    """`response_format`, or SGLang's `regex`, as the options of a session."""
    regex = fields.text("regex")
    inner = fields.inner("response_format")
    schema: Any = None
    if inner is not None:
        kind = inner.text("type")
        if kind == "json_object":
            schema = {"type": "object"}
        elif kind == "json_schema":
            described = inner.inner("json_schema")
            schema = None if described is None else described.take("schema")
            if described is None or schema is None:
                raise Refusal(
                    400, "response_format.json_schema has no schema", param="response_format"
                )
            described.finish(frozenset({"name", "description", "strict"}))
        elif kind != "text":
            raise Refusal(
                400,
                f"response_format {(kind or '')[:40]!r} is none of text, json_object, json_schema",
                param="response_format",
            )
        inner.finish()
    return check_format(schema, regex, "response_format")


def check_format(schema: Any, regex: str | None, param: str) -> dict[str, Any]:
    """A schema or a regular expression as the options of a session; `param` is the field the
    schema came in. Raises Refusal."""
    try:
        if schema is not None:
            schema = check_schema(schema, "the schema")
        if regex is not None:
            check_regex(regex, "regex")
    except MimoEdgeError as error:
        name = param if schema is not None else "regex"
        raise refusal_of(error, asked=True, param=name) from None
    if schema is not None and regex is not None:
        raise Refusal(400, f"{param} and regex are both given", param="regex")
    return {"json_schema": schema, "regex": regex}


def _prompt(fields: Fields) -> str | list[int]:
    prompt = fields.take("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        _check_unicode("prompt", prompt)
        return prompt
    if (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt)
    ):
        return prompt
    raise Refusal(400, "prompt is one text or one list of token ids, not empty", param="prompt")


def _check_unicode(name: str, *texts: str) -> None:
    try:
        for text in texts:
            check_unicode(text)
    except MimoEdgeError as error:
        raise refusal_of(error, asked=True, param=name) from None
