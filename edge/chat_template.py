"""Messages to a prompt, so that no message can pretend to be markup.

A template writes text, and text is then searched for special tokens. So that a message
saying "<|im_end|>" stays text, every character of a message that a special token could be
made of ('<', '|' and '>' for MiMo) is rendered as a stand-in nobody else uses, and becomes
itself again after the special tokens were cut out. Ordinary messages give exactly the ids of
a plain rendering, because the text that is encoded is the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mimo_edge.errors import TokenizerError, UsageError
from mimo_edge.jinja_sandbox import SandboxedTemplate
from mimo_edge.mimo_template import DEFAULT_SYSTEM, MIMO_TEMPLATE
from mimo_edge.tokenizer import Tokenizer, check_unicode
from mimo_edge.tool_calls import tool_schemas

__all__ = ["DEFAULT_SYSTEM", "MIMO_TEMPLATE", "ChatTemplate", "Message", "check_messages"]

Message = Mapping[str, Any]

# Non-characters: Unicode reserves them for a program's own use, so no real text has them.
_STAND_INS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
# An assistant's own turn may hold its own format; nothing that ends or opens a turn.
_ASSISTANT_MARKUP = re.compile(r"(</?think>|</?tool_call>)")
_ROLE = re.compile(r"[a-z][a-z_]{0,31}")
_MAX_DEPTH = 64


class ChatTemplate:
    """A chat template: the model's own, or MiMo's when it has none.

    Raises TokenizerError when `source` does not compile.
    """

    def __init__(self, source: str | None = None) -> None:
        self.source = MIMO_TEMPLATE if source is None else source
        self._template = SandboxedTemplate(self.source)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt as plain text: for people and for comparison, see `encode`.

        `enable_thinking` None leaves the choice to the template. Raises UsageError on
        malformed messages or tools, TokenizerError when the template fails.
        """
        return self._render(
            check_messages(messages), _checked_tools(tools), enable_thinking, add_generation_prompt
        )

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Ids of the prompt, in which special tokens come from the template alone."""
        checked, listed = check_messages(messages), _checked_tools(tools)
        guarded = _guarded_characters(tokenizer)
        free = (c for c in _STAND_INS if not any(c in text for text in _texts([checked, listed])))
        stand_ins = dict(zip(guarded, free, strict=False))
        if len(stand_ins) < len(guarded):
            raise TokenizerError("the messages use Unicode's non-characters throughout")
        hide = str.maketrans(stand_ins)
        show = str.maketrans({new: old for old, new in stand_ins.items()})
        text = self._render(
            [_hidden_message(message, hide) for message in checked],
            _hidden(listed, hide),
            enable_thinking,
            add_generation_prompt,
        )
        parts = tokenizer.split_special(text)
        return tokenizer.encode_parts(
            [part.translate(show) if isinstance(part, str) else part for part in parts]
        )

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any],
        enable_thinking: bool | None,
        add_generation_prompt: bool,
    ) -> str:
        variables: dict[str, Any] = {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        if tools:
            variables["tools"] = tools
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        return self._template.render(variables)


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages in the one form templates get: `content` a string, arguments an object.

    Content given as parts is joined; only text parts are understood. Raises UsageError on
    anything else, TokenizerError on text that is not Unicode.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise UsageError("messages are a list of {'role': ..., 'content': ...}")
    checked = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UsageError(f"message {index} is a {type(message).__name__}, not an object")
        role = message.get("role")
        if not isinstance(role, str) or _ROLE.fullmatch(role) is None:
            raise UsageError(f"message {index} has the role {role!r}", "use user, tool, ...")
        one = {str(key): value for key, value in message.items()}
        one["content"] = _content(message.get("content"), index)
        reasoning = one.get("reasoning_content")
        if reasoning is not None and not isinstance(reasoning, str):
            raise UsageError(f"reasoning_content of message {index} is not text")
        if one.get("tool_calls"):
            one["tool_calls"] = [_checked_call(call, index) for call in _items(one, index)]
        checked.append(one)
    for text in _texts(checked):
        check_unicode(text)
    return checked


def _items(message: Mapping[str, Any], index: int) -> list[Any]:
    calls = message["tool_calls"]
    if isinstance(calls, (str, Mapping)) or not isinstance(calls, Sequence):
        raise UsageError(f"tool_calls of message {index} is not a list")
    return list(calls)


def _content(content: Any, index: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, (bytes, Mapping)):
        raise UsageError(f"content of message {index} is a {type(content).__name__}, not text")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str) or part.get("type", "text") != "text":
            raise UsageError(
                f"message {index} has a part that is not text", "only text is run here"
            )
        texts.append(text)
    return "".join(texts)


def _checked_call(call: Any, index: int) -> dict[str, Any]:
    """{"function": {"name", "arguments": object}}; arguments may come as JSON text."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UsageError(f"a tool call of message {index} has no function name")
    if call.get("type", "function") != "function" or not isinstance(call.get("id", ""), str):
        raise UsageError(
            f"a tool call of message {index} has the type {call.get('type')!r} and the id "
            f"{call.get('id')!r}",
            'give "function" and a text, or neither',
        )
    arguments = function.get("arguments")
    if arguments is None:
        arguments = {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise UsageError(
                f"a tool call of message {index} has arguments that are no JSON"
            ) from None
    if not isinstance(arguments, Mapping):
        raise UsageError(f"a tool call of message {index} has arguments that are no object")
    return {"function": {"name": function["name"], "arguments": dict(arguments)}}


def _checked_tools(tools: Sequence[Mapping[str, Any]]) -> list[Any]:
    tool_schemas(tools)
    for text in _texts(list(tools)):
        check_unicode(text)
    return [_shown(tool) for tool in tools]


def _shown(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool without "strict", which is meant for the runtime and not for the model."""
    function = tool.get("function", tool)
    if "strict" not in function:
        return tool
    rest = {key: value for key, value in function.items() if key != "strict"}
    return {**tool, "function": rest} if "function" in tool else rest


def _texts(value: Any, depth: int = 0) -> Iterable[str]:
    """Every string inside a JSON-like value, keys included."""
    if depth > _MAX_DEPTH:
        raise UsageError(f"messages or tools are nested more than {_MAX_DEPTH} deep")
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key, depth + 1)
            yield from _texts(item, depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item, depth + 1)


def _guarded_characters(tokenizer: Tokenizer) -> list[str]:
    """Characters no special token can be spelled without.

    Letters and the commonest punctuation are left alone, since templates compare them. Raises
    TokenizerError for a special token made of those alone: it could not be guarded.
    """
    guarded: set[str] = set()
    for token in tokenizer.special:
        marks = {c for c in token if not c.isalnum() and c not in "_-./ "}
        if not marks:
            raise TokenizerError(f"the special token {token!r} could be typed by a user")
        guarded |= marks
    return sorted(guarded)


def _hidden(value: Any, table: Mapping[int, str]) -> Any:
    if isinstance(value, str):
        return value.translate(table)
    if isinstance(value, Mapping):
        return {_hidden(key, table): _hidden(item, table) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_hidden(item, table) for item in value]
    return value


def _hidden_message(message: dict[str, Any], table: Mapping[int, str]) -> dict[str, Any]:
    hidden: dict[str, Any] = _hidden(message, table)
    if message["role"] == "assistant":
        pieces = _ASSISTANT_MARKUP.split(message["content"])
        hidden["content"] = "".join(
            piece if index % 2 else piece.translate(table) for index, piece in enumerate(pieces)
        )
    return hidden
