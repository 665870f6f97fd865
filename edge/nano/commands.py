"""Tools, command grammar and held-out split of mimo-nano (pure stdlib).

A command is text in English or Chinese plus the tool calls it asks for. Text comes from frames: a
tool, constant arguments, and two disjoint lists of phrasings, one for training and one held out.
Slots in a phrasing (`{room}`, `{time}`) are filled with values, which a hash splits the same way:
a held-out command uses a held-out phrasing and, wherever its slots have enough values to split,
held-out values.

Phrasing syntax: `(a|b|)` picks one alternative, `{slot}` is filled, a leading `~` marks a
statement ("it is too dark here") that takes no "could you" in front.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from mimo_edge.nano.phrasings import CHAT, FRAMES, SMALL_TALK
from mimo_edge.nano.values import FREE_TEXT, fill

DOMAINS = ("phone", "car", "router", "home")
LANGS = ("en", "zh")
SYSTEM = "You are MiMo, a helpful AI assistant engineered by Xiaomi."
REFUSAL = {"en": "Sorry, none of my tools can do that.", "zh": "抱歉，我没有能做这件事的工具。"}
DONE = {"en": "Done.", "zh": "好了。"}
FAILED = {"en": "That did not work: {reason}.", "zh": "没有成功：{reason}。"}
DEMO_TEXTS = ("把客厅的灯调暗一点", "turn on guest wifi for two hours")

_STR = {"type": "string"}
_INT = {"type": "integer"}


def _enum(*values: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(values)}


def _tool(
    name: str, description: str, optional: Sequence[str] = (), /, **properties: Any
) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": properties,
                "required": [p for p in properties if p not in optional],
            },
        },
    }


_UNIT = _enum("seconds", "minutes", "hours")
_ON_OFF = _enum("on", "off")

_BY_DOMAIN: dict[str, list[dict[str, Any]]] = {
    "phone": [
        _tool("set_alarm", "Set an alarm", ("label",), time=_STR, label=_STR),
        _tool("set_timer", "Start a countdown", duration=_INT, unit=_UNIT),
        _tool("send_message", "Send a text message", contact=_STR, text=_STR),
        _tool("call_contact", "Call someone", contact=_STR),
        _tool(
            "play_music", "Play a song or an artist", ("title", "artist"), title=_STR, artist=_STR
        ),
        _tool("add_reminder", "Add a reminder", ("time",), text=_STR, time=_STR),
        _tool("open_app", "Open an app", app=_STR),
        _tool("set_volume", "Set the volume in percent", percent=_INT),
    ],
    "car": [
        _tool(
            "set_temperature",
            "Set the car climate",
            ("zone",),
            zone=_enum("driver", "passenger", "rear"),
            degrees=_INT,
        ),
        _tool(
            "set_window",
            "Open or close a car window",
            window=_enum("driver", "passenger", "rear_left", "rear_right", "all"),
            action=_enum("open", "close"),
        ),
        _tool(
            "navigate_to",
            "Start navigation",
            ("avoid",),
            destination=_STR,
            avoid=_enum("tolls", "highways"),
        ),
        _tool(
            "set_seat_heating",
            "Set seat heating from 0 to 3",
            seat=_enum("driver", "passenger", "rear"),
            level=_INT,
        ),
        _tool("set_defrost", "Switch defrost", side=_enum("front", "rear"), state=_ON_OFF),
        _tool("set_trunk", "Open or close the trunk", action=_enum("open", "close")),
    ],
    "router": [
        _tool(
            "set_guest_wifi",
            "Switch guest wifi",
            ("duration", "unit"),
            state=_ON_OFF,
            duration=_INT,
            unit=_UNIT,
        ),
        _tool(
            "block_device",
            "Block or unblock a device",
            device=_STR,
            action=_enum("block", "unblock"),
        ),
        _tool(
            "set_priority",
            "Set network priority",
            device=_STR,
            level=_enum("high", "normal", "low"),
        ),
        _tool("reboot_router", "Restart the router"),
        _tool("run_speed_test", "Measure the internet speed"),
        _tool("rename_wifi", "Change the wifi name", name=_STR),
    ],
    "home": [
        _tool("switch_light", "Switch a light", room=_STR, state=_ON_OFF),
        _tool(
            "adjust_light",
            "Make a light brighter or dimmer",
            room=_STR,
            change=_enum("brighter", "dimmer"),
        ),
        _tool("set_brightness", "Set light brightness in percent", room=_STR, percent=_INT),
        _tool(
            "set_light_color",
            "Set light color",
            room=_STR,
            color=_enum("red", "green", "blue", "purple", "warm", "white"),
        ),
        _tool("set_curtain", "Open or close a curtain", room=_STR, action=_enum("open", "close")),
        _tool("set_thermostat", "Set the home temperature", degrees=_INT),
        _tool(
            "control_vacuum",
            "Robot vacuum",
            ("room",),
            action=_enum("start", "stop", "dock"),
            room=_STR,
        ),
        _tool("lock_door", "Lock or unlock a door", door=_STR, action=_enum("lock", "unlock")),
    ],
}

TOOLS: dict[str, dict[str, Any]] = {
    t["function"]["name"]: t for ts in _BY_DOMAIN.values() for t in ts
}
"""Every tool mimo-nano was trained on, in the OpenAI function format, by name."""
DOMAIN_OF = {t["function"]["name"]: d for d, ts in _BY_DOMAIN.items() for t in ts}
DEMO_TOOLS: list[dict[str, Any]] = [
    TOOLS[n]
    for n in (
        "switch_light",
        "adjust_light",
        "set_curtain",
        "set_guest_wifi",
        "reboot_router",
        "set_alarm",
    )
]
"""A tool list that covers both sentences of the README demo."""

# A tool asked for but not listed is refused; these must not stand in for each other.
_ALIKE: tuple[frozenset[str], ...] = (
    frozenset({"switch_light", "adjust_light", "set_brightness", "set_light_color"}),
    frozenset({"set_temperature", "set_thermostat", "set_seat_heating"}),
    frozenset({"set_window", "set_curtain", "set_trunk", "lock_door"}),
    frozenset({"set_alarm", "add_reminder", "set_timer"}),
    frozenset({"block_device", "set_priority"}),
    frozenset({"reboot_router", "set_guest_wifi", "rename_wifi"}),
    frozenset({"send_message", "call_contact"}),
)


@dataclass(frozen=True)
class Call:
    """One tool call; arguments in schema order, integers as int."""

    name: str
    arguments: dict[str, str | int]


@dataclass(frozen=True)
class Command:
    """What a user says and what the right answer is: calls, or a plain reply."""

    text: str
    lang: str
    domain: str
    calls: tuple[Call, ...]
    reply: str | None = None


# --- phrasing -----------------------------------------------------------------------------------

_PREFIX = {
    "en": [
        "please ",
        "can you ",
        "could you ",
        "hey, ",
        "could you please ",
        "ok, ",
        "I want you to ",
        "now ",
    ],
    "zh": ["请", "帮我", "麻烦", "请帮我", "你好,", "麻烦你", "能不能", "现在", "可以帮我"],
}
_NEUTRAL = {"en": ["hey, ", "ok, ", "well, "], "zh": ["你好,", "嗯,", "那个,"]}
_SUFFIX = {"en": [" please", ", thanks", " now", ", please"], "zh": ["吧", ",谢谢", "好吗", "谢谢"]}
_ALT = re.compile(r"\(([^()]*)\)")
_SLOT = re.compile(r"\{(\w+)\}")


def expand(rng: random.Random, phrasing: str) -> str:
    """Resolve the `(a|b|)` alternatives of a phrasing."""
    while m := _ALT.search(phrasing):
        phrasing = phrasing[: m.start()] + rng.choice(m[1].split("|")) + phrasing[m.end() :]
    return phrasing.replace("  ", " ").strip(" ")


def _clause(rng: random.Random, tool: str, lang: str, held: bool) -> tuple[str, Call, bool, bool]:
    """One phrasing of one tool: text, call, whether it is a statement, whether it ends in free
    text.
    """
    frames = [f for f in FRAMES if f.tool == tool and f.lang == lang]
    frame = rng.choice(frames)
    phrasing = expand(rng, rng.choice(frame.held if held else frame.train))
    statement = phrasing.startswith("~")
    values: dict[str, str | int] = {}
    text, at = "", 0
    body = phrasing.lstrip("~")
    for m in _SLOT.finditer(body):
        surface, got = fill(rng, m[1], lang, held)
        for key, v in got.items():
            values[f"${m[1]}.{key}" if key else f"${m[1]}"] = v
        text += body[at : m.start()] + surface
        at = m.end()
    text += body[at:]
    wanted = {
        k: values[v] if isinstance(v, str) and v.startswith("$") else v
        for k, v in frame.args.items()
    }
    order = TOOLS[tool]["function"]["parameters"]["properties"]
    return (
        text,
        Call(tool, {k: wanted[k] for k in order if k in wanted}),
        statement,
        _ends_free(body),
    )


def _ends_free(body: str) -> bool:
    last = re.search(r"\{(\w+)\}$", body)
    return last is not None and last[1] in FREE_TEXT


def _dress(
    rng: random.Random, text: str, lang: str, statement: bool, free_end: bool = False
) -> str:
    if rng.random() < 0.45:
        text = rng.choice((_NEUTRAL if statement else _PREFIX)[lang]) + text
    else:
        text = _case(rng, text, lang)
    if not statement and rng.random() < 0.2:
        # After free text only a suffix behind a comma leaves no doubt where the value ends.
        text += rng.choice([s for s in _SUFFIX[lang] if not free_end or s[0] == ","])
    elif rng.random() < 0.15:
        text += "." if lang == "en" else "。"
    return text


def _case(rng: random.Random, text: str, lang: str) -> str:
    return text[0].upper() + text[1:] if lang == "en" and rng.random() < 0.4 else text


def command(
    rng: random.Random, tool: str, lang: str, held: bool, second: str | None = None
) -> Command:
    """Draw one command for `tool`; with `second`, one that asks for two calls."""
    while True:
        text, call, statement, free_end = _clause(rng, tool, lang, held)
        calls = [call]
        if second:
            more, other, flat, free_end = _clause(rng, second, lang, held)
            if statement or flat:
                continue
            joint = (
                (" and ", " and then ", ", then ") if lang == "en" else (",然后", ",再", ",顺便")
            )
            text += rng.choice(joint) + more
            calls.append(other)
        if lang == "en" and rng.random() < 0.2:
            text = text.lower()
            schema = TOOLS
            calls = [
                Call(
                    c.name,
                    {
                        k: v.lower()
                        if isinstance(v, str)
                        and "enum" not in schema[c.name]["function"]["parameters"]["properties"][k]
                        else v
                        for k, v in c.arguments.items()
                    },
                )
                for c in calls
            ]
        text = _dress(rng, text, lang, statement, free_end)
        if lang == "zh" and rng.random() < 0.6:
            text = text.replace(",", "，")
        if not any(d in text.lower() for d in DEMO_TEXTS):
            return Command(text, lang, DOMAIN_OF[tool], tuple(calls))


def _relatives(tool: str) -> set[str]:
    return {tool}.union(*(group for group in _ALIKE if tool in group))


def tool_list(
    rng: random.Random, needed: Sequence[str], banned: set[str] | None = None
) -> list[str]:
    """4 to 7 tool names in random order: the needed ones, mostly neighbours of the same domain."""
    banned = banned or set()
    size = rng.randint(4, 7)
    names = list(needed)
    mixed = rng.random() < 0.4
    domain = DOMAIN_OF[needed[0]] if needed else rng.choice(DOMAINS)
    pool = [
        n for n in TOOLS if (mixed or DOMAIN_OF[n] == domain) and n not in banned and n not in names
    ]
    rng.shuffle(pool)
    names += pool[: max(0, size - len(names))]
    rng.shuffle(names)
    return names


def refusal(rng: random.Random, lang: str, held: bool, tools: Sequence[str]) -> Command | None:
    """What no tool can serve: another tool's command, a question, a greeting; None when all have
    relatives here.
    """
    r = rng.random()
    if r < 0.06:
        train, kept, reply = rng.choice(SMALL_TALK[lang])
        text = expand(rng, rng.choice(kept if held else train))
        return Command(_case(rng, text, lang), lang, "chat", (), reply)
    if r < 0.22:
        text = expand(rng, rng.choice(CHAT[lang]["held" if held else "train"]))
        return Command(_dress(rng, text, lang, True), lang, "chat", (), REFUSAL[lang])
    able = [n for n in TOOLS if not _relatives(n) & set(tools)]
    if not able:
        return None
    same = [n for n in able if tools and DOMAIN_OF[n] == DOMAIN_OF[tools[0]]]
    # Near misses are the hard ones; the others keep every tool from being called unlisted.
    near = same and rng.random() < 0.4
    asked = command(rng, rng.choice(same if near else able), lang, held)
    return Command(asked.text, lang, asked.domain, (), REFUSAL[lang])


# --- held-out set and files ---------------------------------------------------------------------

HELD_OUT_PER_CELL = 90
HELD_OUT_SEED = 20250


def build_held_out(seed: int = HELD_OUT_SEED) -> list[dict[str, Any]]:
    """Make the held-out set: 90 commands for each domain and language, about 6 % refusals, 5 %
    double calls. Another `seed` makes another set of the same phrasings and values.
    """
    rng = random.Random(seed)
    out: list[dict[str, Any]] = []
    seen: set[str] = set()
    for lang in LANGS:
        for domain in DOMAINS:
            names = [n for n in TOOLS if DOMAIN_OF[n] == domain]
            cell = 0
            while cell < HELD_OUT_PER_CELL:
                tool = names[cell % len(names)]
                kind = "refuse" if cell % 16 == 7 else "double" if cell % 20 == 11 else "single"
                if kind == "refuse":
                    tools = _domain_list(rng, tool)
                    asked = command(rng, tool, lang, True)
                    cmd = Command(asked.text, lang, domain, (), REFUSAL[lang])
                else:
                    second = (
                        rng.choice([n for n in names if n != tool]) if kind == "double" else None
                    )
                    tools = tool_list(rng, [tool, second] if second else [tool])
                    cmd = command(rng, tool, lang, True, second)
                if cmd.text.lower() in seen:
                    continue
                seen.add(cmd.text.lower())
                record: dict[str, Any] = {
                    "id": f"{domain}-{lang}-{cell:03d}",
                    "lang": lang,
                    "domain": domain,
                    "text": cmd.text,
                    "tools": tools,
                    "calls": [{"name": c.name, "arguments": c.arguments} for c in cmd.calls],
                }
                if cmd.reply is not None:
                    record["reply"] = cmd.reply
                out.append(record)
                cell += 1
    return out


def _domain_list(rng: random.Random, absent: str) -> list[str]:
    """A tool list without `absent` or anything like it."""
    return tool_list(rng, [], _relatives(absent))


def held_out() -> list[dict[str, Any]]:
    """Read the committed held-out set: id, lang, domain, text, tools (names), calls, and reply
    for refusals.
    """
    return list(_held_out())


@cache
def _held_out() -> tuple[dict[str, Any], ...]:
    return tuple(_lines(resources.files(__package__).joinpath("held_out.jsonl").read_text("utf-8")))


def _lines(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        if line:
            yield json.loads(line)


def checkpoint_dir() -> Path:
    """Folder of the mimo-nano checkpoint inside the installed package."""
    return Path(str(resources.files(__package__).joinpath("checkpoint")))


def is_nano_template(source: str) -> bool:
    """Whether a chat template is mimo-nano's: its bundles carry it, whatever they are called."""
    return source == (checkpoint_dir() / "chat_template.jinja").read_text("utf-8")


def calibration_text() -> str:
    """Rendered training-split conversations, for quantisation statistics."""
    return resources.files(__package__).joinpath("calibration.txt").read_text("utf-8")


def render_call(call: Call | dict[str, Any]) -> str:
    """Write a call the way the model does."""
    name, args = (
        (call.name, call.arguments) if isinstance(call, Call) else (call["name"], call["arguments"])
    )
    lines = "".join(f"<parameter={k}>{v}</parameter>\n" for k, v in args.items())
    return f"<tool_call>\n<function={name}>\n{lines}</function>\n</tool_call>"


def answer(record: Command | dict[str, Any]) -> str:
    """The exact text of the right assistant turn, without `<|im_end|>`."""
    if isinstance(record, Command):
        calls: Sequence[Call | dict[str, Any]] = record.calls
        reply = record.reply
    else:
        calls, reply = record["calls"], record.get("reply")
    return reply if reply is not None else "\n".join(render_call(c) for c in calls)
