"""The command grammar of mimo-nano: an honest held-out split, well-formed calls, the files."""

import random
import re
from collections import Counter
from typing import Any

import pytest

from mimo_edge.nano import commands, phrasings, values


def _every(phrasing: str) -> set[str]:
    """All expansions of a phrasing, re-derived without the generator's own expander."""
    inner = re.search(r"\(([^()]*)\)", phrasing)
    if inner is None:
        return {" ".join(phrasing.lstrip("~").split())}
    head, tail = phrasing[: inner.start()], phrasing[inner.end() :]
    return set().union(*(_every(head + choice + tail) for choice in inner[1].split("|")))


def _strings(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(tool, parameter, value) of the free-text arguments of a record."""
    out = []
    for call in record["calls"]:
        schema = commands.TOOLS[call["name"]]["function"]["parameters"]["properties"]
        for key, value in call["arguments"].items():
            if schema[key] == {"type": "string"} and value != "all":
                out.append((call["name"], key, value))
    return out


def test_held_out_phrasings_are_not_in_training() -> None:
    for lang in commands.LANGS:
        train = set().union(
            *(_every(p) for f in phrasings.FRAMES if f.lang == lang for p in f.train)
        )
        held = set().union(*(_every(p) for f in phrasings.FRAMES if f.lang == lang for p in f.held))
        assert not train & held


def _words(phrasing: str, lang: str) -> set[str]:
    """English words, or Chinese characters, outside the slots."""
    text = re.sub(r"\{\w+\}", " ", phrasing).lower()
    return set(re.findall(r"[a-z']+" if lang == "en" else r"[\u4e00-\u9fff]", text))


def test_held_out_phrasings_use_known_words() -> None:
    """A model trained from nothing cannot know a word that no training phrasing has."""
    for lang in commands.LANGS:
        frames = [f for f in phrasings.FRAMES if f.lang == lang]
        known = set().union(*(_words(p, lang) for f in frames for p in f.train))
        known |= set("请" if lang == "zh" else ())  # a politeness prefix
        assert not set().union(*(_words(p, lang) for f in frames for p in f.held)) - known


def test_a_phrasing_means_one_tool() -> None:
    for lang in commands.LANGS:
        owner: dict[str, str] = {}
        for frame in phrasings.FRAMES:
            if frame.lang == lang:
                for text in set().union(*(_every(p) for p in (*frame.train, *frame.held))):
                    assert owner.setdefault(text, frame.tool) == frame.tool, text


def test_every_tool_is_spoken_in_both_languages() -> None:
    spoken = {(f.tool, f.lang) for f in phrasings.FRAMES}
    assert spoken == {(tool, lang) for tool in commands.TOOLS for lang in commands.LANGS}


def test_committed_held_out_set_is_what_the_generator_makes() -> None:
    assert commands.held_out() == commands.build_held_out()


def test_held_out_set_is_balanced_and_well_formed() -> None:
    records = commands.held_out()
    cells = Counter((r["lang"], r["domain"]) for r in records)
    assert set(cells.values()) == {commands.HELD_OUT_PER_CELL}
    assert len(cells) == 8
    assert (
        len({r["text"].lower() for r in records}) == len({r["id"] for r in records}) == len(records)
    )
    for r in records:
        assert bool(r["calls"]) != ("reply" in r)
        assert 3 <= len(r["tools"]) <= 7
        for call in r["calls"]:
            parameters = commands.TOOLS[call["name"]]["function"]["parameters"]
            assert call["name"] in r["tools"]
            assert (
                set(parameters["required"])
                <= set(call["arguments"])
                <= set(parameters["properties"])
            )
            for key, value in call["arguments"].items():
                spec = parameters["properties"][key]
                assert isinstance(value, int if spec["type"] == "integer" else str)
                assert value in spec.get("enum", [value])


def test_held_out_values_are_held_out() -> None:
    for r in commands.held_out():
        for _, _, value in _strings(r):
            assert values.is_held(value), value


def test_training_commands_avoid_held_out_texts_and_values() -> None:
    rng = random.Random(3)
    held = {r["text"].lower() for r in commands.held_out()}
    for _ in range(4000):
        tool, lang = rng.choice(list(commands.TOOLS)), rng.choice(commands.LANGS)
        made = commands.command(rng, tool, lang, held=False)
        assert made.text.lower() not in held
        assert not any(demo in made.text.lower() for demo in commands.DEMO_TEXTS)
        record = {"calls": [{"name": c.name, "arguments": c.arguments} for c in made.calls]}
        for _, _, value in _strings(record):
            assert not values.is_held(value), value


def test_string_values_are_copied_from_the_text() -> None:
    for r in commands.held_out():
        for _, key, value in _strings(r):
            if key != "time":
                assert value in r["text"]


@pytest.mark.parametrize(
    ("n", "en", "zh"),
    [
        (0, "zero", "零"),
        (10, "ten", "十"),
        (15, "fifteen", "十五"),
        (20, "twenty", "二十"),
        (99, "ninety nine", "九十九"),
        (100, "one hundred", "一百"),
    ],
)
def test_numbers(n: int, en: str, zh: str) -> None:
    assert (values.number_en(n), values.number_zh(n)) == (en, zh)


def test_render_call() -> None:
    call = {"name": "set_timer", "arguments": {"duration": 5, "unit": "minutes"}}
    assert commands.render_call(call) == (
        "<tool_call>\n<function=set_timer>\n<parameter=duration>5</parameter>\n"
        "<parameter=unit>minutes</parameter>\n</function>\n</tool_call>"
    )


def test_demo_tools_cover_the_demo() -> None:
    names = {t["function"]["name"] for t in commands.DEMO_TOOLS}
    assert {"adjust_light", "set_guest_wifi"} <= names
    rng = random.Random(0)
    assert len(commands.tool_list(rng, ["set_timer"])) >= 4


def test_checkpoint_files_are_installed() -> None:
    folder = commands.checkpoint_dir()
    for name in (
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
    ):
        assert (folder / name).is_file(), name
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 24_000_000
    assert "<|im_start|>user" in commands.calibration_text()
