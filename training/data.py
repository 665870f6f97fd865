"""Conversations for mimo-nano: generated without end, rendered and tokenised for training."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mimo_edge.nano import commands as grammar

CALL_HELP = (
    "\n</tools>\n\nCall a function like this:\n<tool_call>\n<function=NAME>\n"
    "<parameter=KEY>VALUE</parameter>\n"
    "</function>\n</tool_call><|im_end|>"
)
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
ASSISTANT, NO_THINK = IM_START + "assistant\n", "<think></think>"
PROMPT = ASSISTANT + NO_THINK
SYSTEMS = (
    "You are a helpful assistant.",
    "You control a smart home.",
    "You are the voice assistant of a car.",
    "You are an assistant on a phone.",
    "Answer with tool calls only.",
    "你是小米的智能助手。",
    "你是车载语音助手。",
    "你是智能家居助手。",
)
"""System messages other than the default, so that the model does not depend on one."""


class Encoder(Protocol):
    """What we need of a `tokenizers.Tokenizer`."""

    def encode_batch(self, input: list[str], *, add_special_tokens: bool = ...) -> list[Any]: ...


@dataclass
class Example:
    """One conversation: token ids and, for each token, whether the assistant must produce it."""

    ids: list[int]
    loss: list[bool]
    first_end: int  # index after the first assistant turn


def render_system(names: Sequence[str], system: str = grammar.SYSTEM) -> str:
    """The system turn with its tool list, as the chat template writes it."""
    if not names:
        return f"{IM_START}system\n{system}{IM_END}"
    out = [IM_START, "system\n", system, "\n\n<tools>"]
    for name in names:
        f = grammar.TOOLS[name]["function"]
        out.append(
            f"\n<function>\n<name>{name}</name>\n<description>{f['description']}</description>\n<parameters>"
        )
        required = f["parameters"]["required"]
        for p, spec in f["parameters"]["properties"].items():
            kind = ", ".join(spec["enum"]) if "enum" in spec else spec["type"]
            out.append(f"\n{p} ({kind}{'' if p in required else ', optional'})")
        out.append("\n</parameters>\n</function>")
    return "".join(out) + CALL_HELP


def render_prompt(record: dict[str, Any]) -> str:
    """Prompt of a single-turn held-out record, up to and including `<think></think>`."""
    return render_system(record["tools"]) + f"{IM_START}user\n{record['text']}{IM_END}" + PROMPT


REASONS = {
    "en": (
        "device is offline",
        "no permission",
        "time is over",
        "not found",
        "connection lost",
        "battery is low",
    ),
    "zh": ("设备离线", "没有权限", "超时了", "找不到", "连接断开", "电量不足"),
}


def _tool_turn(rng: random.Random, lang: str) -> tuple[str, str]:
    """A tool result and the one sentence that answers it."""
    if rng.random() < 0.7:
        return '{"status": "ok"}', grammar.DONE[lang]
    if rng.random() < 0.5:
        reason = rng.choice(REASONS[lang])
    else:
        reason = grammar.fill(rng, "task", lang, False)[0]
    body = json.dumps({"status": "error", "reason": reason}, ensure_ascii=False)
    return body, grammar.FAILED[lang].format(reason=reason)


def conversation(rng: random.Random, length: int) -> list[tuple[str, bool]]:
    """Segments (text, is assistant) of one conversation of roughly `length` tokens or more."""
    tools = grammar.tool_list(rng, []) if rng.random() < 0.97 else []
    system = rng.choice(SYSTEMS) if rng.random() < 0.15 else grammar.SYSTEM
    segments: list[tuple[str, bool]] = [(render_system(tools, system), False)]
    lang_share = rng.choice((0.0, 0.5, 0.5, 1.0))
    budget = length - 200
    while budget > 0:
        lang = "zh" if rng.random() < lang_share else "en"
        made: grammar.Command | None = None
        if not tools or rng.random() < 0.25:
            made = grammar.refusal(rng, lang, False, tools)
        if made is None:
            names = rng.sample(tools, 2) if rng.random() < 0.07 else [rng.choice(tools)]
            made = grammar.command(rng, names[0], lang, False, names[1] if len(names) > 1 else None)
        segments.append((f"{IM_START}user\n{made.text}{IM_END}{ASSISTANT}", False))
        segments.append((NO_THINK + grammar.answer(made) + IM_END, True))
        budget -= 45 + 25 * max(0, len(made.calls) - 1)
        if made.calls and rng.random() < 0.12:
            result, said = _tool_turn(rng, lang)
            again = "".join(f"<tool_response>\n{result}\n</tool_response>\n" for _ in made.calls)
            segments.append((f"{IM_START}tool\n{again}{IM_END}{ASSISTANT}", False))
            segments.append((NO_THINK + said + IM_END, True))
            budget -= 25
    return segments


def example(rng: random.Random, encoder: Encoder, length: int) -> Example:
    """Draw a conversation and cut it to at most `length` tokens."""
    segments = conversation(rng, length)
    ids: list[int] = []
    loss: list[bool] = []
    first_end = 0
    encoded = encoder.encode_batch([text for text, _ in segments], add_special_tokens=False)
    for (_, mine), e in zip(segments, encoded, strict=True):
        ids += e.ids
        loss += [mine] * len(e.ids)
        if mine and not first_end:
            first_end = len(ids)
    return Example(ids[:length], loss[:length], first_end)


def drill(rng: random.Random, vocab: int, length: int) -> Example:
    """Random tokens said twice, loss on the second time: teaches copying before the commands need
    it.
    """
    ids: list[int] = []
    loss: list[bool] = []
    while len(ids) < length:
        part = [rng.randrange(vocab) for _ in range(rng.randint(4, 40))]
        mark = [rng.randrange(vocab) for _ in range(rng.randint(1, 12))]
        begin = rng.randrange(len(part) - 2)  # the second time may start anywhere
        again = part[begin : begin + rng.randint(3, 40)]
        ids += part + mark + again
        loss += [False] * (len(part) + len(mark) + 1) + [True] * (len(again) - 1)
    return Example(ids[:length], loss[:length], 0)
