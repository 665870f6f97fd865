"""The server's own description, OpenAPI 3.1, at /openapi.json.

What it says of requests is what `calls.py` and `responses.py` take; a test sends what it allows and
what it does not.
"""

from __future__ import annotations

from typing import Any

from mimo_edge import __version__
from mimo_edge.logprobs import MAX_TOP
from mimo_edge.serve.calls import MAX_STOP_CHARACTERS, MAX_STOPS

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_FLAG: Schema = {"type": "boolean"}


def _object(
    required: tuple[str, ...] = (), /, *, closed: bool = False, **properties: Any
) -> Schema:
    """An object; a `closed` one is a request's, where null is as good as absent, whatever the
    name, and nothing else may be in it."""
    if closed:
        properties = {
            name: schema if name in required else _or_null(schema)
            for name, schema in properties.items()
        }
    made: Schema = {"type": "object", "properties": properties}
    if required:
        made["required"] = list(required)
    if closed:
        made["additionalProperties"] = {"type": "null"}
    return made


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


_SAMPLING: Schema = {
    "temperature": {"type": "number", "minimum": 0, "default": 0},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "top_k": _COUNT,
    "seed": _COUNT,
    "stop": {
        "anyOf": [
            {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS},
            {
                "type": "array",
                "maxItems": MAX_STOPS,
                "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS},
            },
        ]
    },
    "stop_repeats": {"anyOf": [{"const": 0}, {"type": "integer", "minimum": 2}]},
    "repetition_penalty": {"type": "number", "minimum": 0.01, "maximum": 100},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "timeout_s": {"type": "number", "exclusiveMinimum": 0},
}
# What is no schema, or cannot be held to, is refused by its content.
_JSON_SCHEMA: Schema = {"description": "a JSON schema"}
_RESPONSE_FORMAT: Schema = {
    "anyOf": [
        _object(("type",), closed=True, type={"enum": ["text", "json_object"]}),
        _object(
            ("type", "json_schema"),
            closed=True,
            type={"const": "json_schema"},
            json_schema=_object(
                ("schema",), closed=True, schema=_JSON_SCHEMA, name={}, description={}, strict={}
            ),
        ),
    ]
}
_CHOICE: Schema = {
    "anyOf": [
        {"enum": ["auto", "none", "required"]},
        _object(
            ("type", "function"),
            closed=True,
            type={"const": "function"},
            function=_object(("name",), closed=True, name=_TEXT),
        ),
    ]
}
_TOP: Schema = {"type": "integer", "minimum": 0, "maximum": MAX_TOP}
_MOST: Schema = {"type": "integer", "minimum": 1}
# Passed over unread.
_PASSED_OVER: Schema = {
    name: {}
    for name in (
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    )
}
_STREAMING: Schema = {
    "stream": _FLAG,
    "stream_options": _object(
        closed=True, include_usage=_FLAG, continuous_usage_stats=_FLAG, include_obfuscation=_FLAG
    ),
}
_TEXT_OR_PARTS: Schema = {
    "anyOf": [
        _TEXT,
        {
            "type": "array",
            "items": _object(
                ("type", "text"), type={"enum": ["input_text", "output_text", "text"]}, text=_TEXT
            ),
        },
    ]
}
_FUNCTION: Schema = _object(
    ("name",),
    name={"type": "string", "minLength": 1},
    description=_TEXT,
    parameters={"type": "object", "properties": {"properties": {"type": "object"}}},
)
_CALL: Schema = _object(
    ("id", "type", "function"),
    id=_TEXT,
    type={"const": "function"},
    function=_object(("name", "arguments"), name=_TEXT, arguments=_TEXT),
)
# A call as clients send it back: what an answer held, or less.
_SAID_CALL: Schema = _object(
    ("function",),
    id=_TEXT,
    type={"const": "function"},
    function=_object(
        ("name",),
        name=_TEXT,
        arguments={"anyOf": [_TEXT, {"type": "object"}, {"type": "null"}]},
    ),
)
_USAGE: Schema = _object(
    ("prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"),
    prompt_tokens=_COUNT,
    completion_tokens=_COUNT,
    total_tokens=_COUNT,
    prompt_tokens_details=_object(("cached_tokens",), cached_tokens=_COUNT),
)
_REASON: Schema = {"enum": ["stop", "length", "tool_calls", None]}
_CREATED: Schema = _object(
    ("id", "object", "created", "model", "choices"),
    id=_TEXT,
    object=_TEXT,
    created=_COUNT,
    model=_TEXT,
    choices={"type": "array"},
)

_SCHEMAS: Schema = {
    "Error": _object(
        ("error",),
        error=_object(
            ("message", "type", "param", "code"),
            message=_TEXT,
            type=_TEXT,
            param=_or_null(_TEXT),
            code=_or_null(_TEXT),
        ),
    ),
    "Message": _object(
        ("role",),
        closed=True,
        role={"enum": ["system", "developer", "user", "assistant", "tool"]},
        content={
            "anyOf": [
                _TEXT,
                {"type": "null"},
                {
                    "type": "array",
                    "items": _object(("text",), type={"const": "text"}, text=_TEXT),
                },
            ]
        },
        name=_TEXT,
        reasoning_content=_or_null(_TEXT),
        tool_calls={"type": "array", "items": _SAID_CALL},
        tool_call_id=_TEXT,
    ),
    "Tool": _object(("type", "function"), type={"const": "function"}, function=_FUNCTION),
    "ChatRequest": _object(
        ("messages",),
        closed=True,
        model=_TEXT,
        messages={"type": "array", "minItems": 1, "items": _ref("Message")},
        tools={"type": "array", "items": _ref("Tool")},
        tool_choice=_CHOICE,
        parallel_tool_calls=_FLAG,
        response_format=_RESPONSE_FORMAT,
        regex=_TEXT,
        logprobs=_FLAG,
        top_logprobs=_TOP,
        max_tokens=_MOST,
        max_completion_tokens=_MOST,
        chat_template_kwargs=_object(closed=True, enable_thinking=_FLAG),
        **_SAMPLING,
        **_STREAMING,
        **_PASSED_OVER,
    ),
    "ChatCompletion": {
        "allOf": [
            _CREATED,
            _object(
                ("usage",),
                object={"const": "chat.completion"},
                choices={
                    "type": "array",
                    "minItems": 1,
                    "maxItems": 1,
                    "items": _object(
                        ("index", "message", "finish_reason"),
                        index={"const": 0},
                        message=_object(
                            ("role", "content"),
                            role={"const": "assistant"},
                            content=_or_null(_TEXT),
                            reasoning_content=_TEXT,
                            tool_calls={"type": "array", "items": _CALL},
                        ),
                        finish_reason=_REASON,
                    ),
                },
                usage=_ref("Usage"),
            ),
        ]
    },
    "CompletionRequest": _object(
        ("prompt",),
        closed=True,
        model=_TEXT,
        prompt={
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "minItems": 1, "items": _COUNT},
            ]
        },
        max_tokens=_MOST,
        response_format=_RESPONSE_FORMAT,
        regex=_TEXT,
        logprobs=_TOP,
        **_SAMPLING,
        **_STREAMING,
        **_PASSED_OVER,
    ),
    "Completion": {
        "allOf": [
            _CREATED,
            _object(
                ("usage",),
                object={"const": "text_completion"},
                choices={
                    "type": "array",
                    "items": _object(
                        ("index", "text", "finish_reason"),
                        index={"const": 0},
                        text=_TEXT,
                        finish_reason=_REASON,
                    ),
                },
                usage=_ref("Usage"),
            ),
        ]
    },
    "ResponseRequest": _object(
        ("input",),
        closed=True,
        model=_TEXT,
        input={
            "anyOf": [_TEXT, {"type": "array", "minItems": 1, "items": _ref("InputItem")}],
        },
        instructions=_TEXT,
        tools={
            "type": "array",
            "items": {
                "allOf": [_FUNCTION, _object(("type",), type={"const": "function"})],
            },
        },
        tool_choice={
            "anyOf": [
                {"enum": ["auto", "none", "required"]},
                _object(("type", "name"), type={"const": "function"}, name=_TEXT),
            ]
        },
        parallel_tool_calls=_FLAG,
        text=_object(
            closed=True,
            format={
                "anyOf": [
                    _object(("type",), closed=True, type={"enum": ["text", "json_object"]}),
                    _object(
                        ("type", "schema"),
                        closed=True,
                        type={"const": "json_schema"},
                        schema=_JSON_SCHEMA,
                        name={},
                        description={},
                        strict={},
                    ),
                ]
            },
            verbosity={},
        ),
        max_output_tokens=_MOST,
        reasoning=_object(
            effort={"enum": ["none", "minimal", "low", "medium", "high"]}, closed=True
        ),
        stream=_FLAG,
        **_SAMPLING,
        **_PASSED_OVER,
    ),
    "InputItem": {
        "anyOf": [
            _object(
                ("role", "content"),
                closed=True,
                type={"const": "message"},
                role={"enum": ["system", "developer", "user", "assistant"]},
                content=_TEXT_OR_PARTS,
            ),
            _object(
                ("type", "name", "arguments", "call_id"),
                closed=True,
                type={"const": "function_call"},
                name={"type": "string", "minLength": 1},
                arguments={"type": "string", "description": "a JSON object"},
                call_id=_TEXT,
            ),
            _object(
                ("type", "output", "call_id"),
                closed=True,
                type={"const": "function_call_output"},
                output=_TEXT_OR_PARTS,
                call_id=_TEXT,
            ),
        ]
    },
    "Response": _object(
        ("id", "object", "created_at", "status", "model", "output", "usage"),
        id=_TEXT,
        object={"const": "response"},
        created_at=_COUNT,
        status={"enum": ["completed", "incomplete"]},
        model=_TEXT,
        output={
            "type": "array",
            "items": _object(
                ("id", "type", "status"),
                id=_TEXT,
                type={"enum": ["reasoning", "message", "function_call"]},
                status={"enum": ["completed", "incomplete"]},
            ),
        },
        usage=_object(
            ("input_tokens", "output_tokens", "total_tokens"),
            input_tokens=_COUNT,
            output_tokens=_COUNT,
            total_tokens=_COUNT,
        ),
    ),
    "Usage": _USAGE,
    "Model": _object(
        ("id", "object", "created", "owned_by", "context_length"),
        id=_TEXT,
        object={"const": "model"},
        created=_COUNT,
        owned_by=_TEXT,
        context_length=_MOST,
    ),
}


def description(keyed: bool) -> Schema:
    """The document; `keyed` says that an API key is asked."""
    made: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "mimo-edge",
            "version": __version__,
            "description": "OpenAI's API over one model on this machine.",
        },
        "paths": {
            "/v1/chat/completions": _asked("Answer a chat", "ChatRequest", "ChatCompletion"),
            "/v1/completions": _asked("Continue a text", "CompletionRequest", "Completion"),
            "/v1/responses": _asked("Answer input items", "ResponseRequest", "Response"),
            "/v1/models": _told(
                "The model and its aliases",
                _object(
                    ("object", "data"),
                    object={"const": "list"},
                    data={"type": "array", "minItems": 1, "items": _ref("Model")},
                ),
            ),
            "/v1/models/{name}": _told("One model", _ref("Model"), named=True),
            "/stats": _told("Totals of the runtime", {"type": "object"}),
            "/tools.json": _told(
                "What the chat page offers", _object(("tools",), tools={"type": "array"})
            ),
            "/health": _told(
                "Whether it takes requests",
                _object(("status", "model"), status={"enum": ["ok", "closing"]}, model=_TEXT),
                open_=True,
            ),
            "/metrics": _told("Counts for Prometheus", None),
            "/openapi.json": _told("This description", {"type": "object"}, open_=True),
        },
        "components": {"schemas": _SCHEMAS},
    }
    if keyed:
        made["components"] = {
            **made["components"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        }
        made["security"] = [{"key": []}]
    return made


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _refusals(*statuses: str) -> Schema:
    what = {
        "400": "the request is wrong or asks for what is not here",
        "401": "no valid key",
        "403": "the Host header does not name this machine",
        "404": "there is no such model",
        "408": "the body did not come in time",
        "413": "the body is too large",
        "415": "the body is not declared as JSON",
        "429": "too many requests wait",
        "503": "no place became free, or the server closes",
    }
    return {
        status: {"description": what[status], "content": _json(_ref("Error"))}
        for status in statuses
    }


def _asked(summary: str, request: str, answer: str) -> Schema:
    good = {**_json(_ref(answer)), "text/event-stream": {}}
    refusals = _refusals("400", "401", "403", "404", "408", "413", "415", "429", "503")
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": _json(_ref(request))},
            "responses": {
                "200": {"description": "the answer, whole or streamed", "content": good},
                **refusals,
            },
        }
    }


def _told(
    summary: str, answer: Schema | None, *, named: bool = False, open_: bool = False
) -> Schema:
    content = {"text/plain": {"schema": _TEXT}} if answer is None else _json(answer)
    statuses = ("403", "404") if named else ("403",)
    made: Schema = {
        "summary": summary,
        "responses": {
            "200": {"description": summary, "content": content},
            **_refusals(*statuses, *(() if open_ else ("401",))),
        },
    }
    if summary.startswith("Whether"):
        made["responses"]["503"] = made["responses"]["200"]
    if open_:
        made["security"] = []
    if named:
        made["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": _TEXT}]
    return {"get": made}
