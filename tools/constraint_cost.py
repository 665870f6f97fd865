"""What holding answers to a form costs: per token by state, and of decoding as a whole.

    python tools/constraint_cost.py                 # tables on standard output
    python tools/constraint_cost.py --write         # and into docs/benchmarks.md

The first table is of a vocabulary as large as MiMo-V2's (its size, special tokens and all bytes;
the words are drawn with a seed): milliseconds of one question "may this token come?", of one mask
(where a grammar never was, and again), and of going on by a token, in the middle of each kind of
text. The second answers mimo-nano's
commands with tools, held to their grammar and free, by turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from tables import command, markdown, write_section

from mimo_edge.api import Runtime
from mimo_edge.nano import commands as nano
from mimo_edge.sampling import Constraint
from mimo_edge.structured.answers import Value
from mimo_edge.structured.grammars import Grammars
from mimo_edge.tokenizer import Tokenizer

VOCAB, TEXT_TOKENS = 152_576, 151_643
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
SPECIAL += ["<tool_call>", "</tool_call>"]
SCHEMA = {
    "type": "object",
    "properties": {
        "room": {"type": "string"},
        "level": {"type": "integer", "minimum": 0, "maximum": 100},
        "when": {"type": "string", "format": "date-time"},
    },
    "required": ["room"],
    "additionalProperties": False,
}
_CALL = "<tool_call>\n<function=set_guest_wifi>\n<parameter="
STATES: list[tuple[str, str, str]] = [
    ("free text, tools given", "calls", "The lamp in the"),
    ("the name of a tool", "calls", "<tool_call>\n<function=set_"),
    (
        "a parameter's text",
        "calls",
        "<tool_call>\n<function=send_message>\n<parameter=text>See you",
    ),
    ("one of a few values", "calls", _CALL + "state>o"),
    ("a number", "calls", _CALL + "duration>1"),
    ("JSON: a string", "schema", '{"room": "liv'),
    ("JSON: between values", "schema", '{"room": "x",'),
    ("JSON: a date", "schema", '{"room": "x", "when": "2026-'),
    ("a regular expression", "regex", "see 07"),
]


class _Letters:
    """Encodes byte by byte: enough to walk into a state."""

    def encode(self, text: str, first: bool) -> list[int]:
        return list(text.encode())


def large_vocabulary(seed: int) -> Tokenizer:
    """All bytes, words of letters, ideographs, digits and signs with and without a space before,
    as many as MiMo-V2's vocabulary has."""
    rng = np.random.default_rng(seed)
    pieces = [bytes([byte]) for byte in range(256)]
    known = set(pieces)
    signs = [
        "\n",
        "\n\n",
        '"',
        '":',
        '",',
        '"}',
        "{\n",
        "}\n",
        ">\n",
        "</",
        "<",
        "=",
        " (",
        "...",
        "://",
    ]
    alphabets = [
        "etaoinshrdlucmfwypvbgkqjxz",
        "ETAOINSHRDLU",
        "".join(map(chr, range(0x4E00, 0x5E00))),
    ]
    while len(pieces) < TEXT_TOKENS:
        alphabet = alphabets[rng.choice(3, p=[0.7, 0.1, 0.2])]
        low, high = (1, 4) if len(alphabet) > 100 else (2, 12)
        letters = rng.integers(0, len(alphabet), rng.integers(low, high))
        word = "".join(alphabet[i] for i in letters)
        word = (
            signs[rng.integers(len(signs))] if rng.random() < 0.05 else " " * rng.integers(2)
        ) + word
        data = word.encode()
        if data not in known:
            known.add(data)
            pieces.append(data)
    special = {text: TEXT_TOKENS + i for i, text in enumerate(SPECIAL)}
    return Tokenizer(_Letters(), dict(enumerate(pieces)), special, SPECIAL[:3])


def states_table(seed: int, repeats: int) -> str:
    tokenizer = large_vocabulary(seed)
    grammars = Grammars(tokenizer, VOCAB, tokenizer.eos_ids)
    tools = list(nano.TOOLS.values())
    makers: dict[str, Callable[[], Constraint]] = {
        "calls": lambda: grammars.of_calls("over", tools),
        "schema": lambda: grammars.of_answer("over", Value(schema=SCHEMA)),
        "regex": lambda: grammars.of_answer("over", Value(regex="(see|at) [0-2][0-9]:[0-5][0-9]")),
    }
    start = time.perf_counter()
    makers["regex"]()
    first = (time.perf_counter() - start) * 1e3
    rows = [["state", "question, ms", "first mask, ms", "mask, ms", "going on, ms", "allowed"]]
    compiled = {}
    for kind, make in makers.items():
        start = time.perf_counter()
        make()
        compiled[kind] = (time.perf_counter() - start) * 1e3
    for name, kind, text in STATES:
        ids = tokenizer.encode(text, allow_special=True)
        firsts = []
        for _ in range(5):  # what a grammar learnt of a state is kept with it
            grammars._compiled.clear()
            constraint = makers[kind]()
            for token in ids:
                constraint.advance(token)
            firsts.append(_ms(constraint.mask))
        masks, questions, steps = [], [], []
        allowed = "all"
        mask = constraint.mask()
        token = 97 if mask is None else int(np.flatnonzero(mask)[0])
        if mask is not None:
            allowed = f"{int(mask.sum()):,}"
        for _ in range(repeats):
            questions.append(_ms(lambda c=constraint, t=token: c.allows(t)))  # type: ignore[misc]
            masks.append(_ms(constraint.mask))
            steps.append(_ms(lambda c=constraint, t=token: c.advance(t)))  # type: ignore[misc]
            constraint.retract(1)
        times = questions, firsts, masks, steps
        rows.append(
            [
                name,
                *(f"{statistics.median(found):.3f}" for found in times),
                allowed,
            ]
        )
    notes = [
        f"{len(tools)} tools, {VOCAB:,} logits, medians of {repeats}.",
        f"Once per model: {first:.0f} ms to index the vocabulary.",
        f"Once per grammar: {compiled['calls']:.1f} ms for all tools,",
        f"{compiled['schema']:.1f} ms for the schema.",
    ]
    return markdown(rows) + "\n" + " ".join(notes) + "\n"


def _ms(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def nano_table(prompts: int, rounds: int, draft: Any, threads: int | None) -> str:
    """Decode time per token of held and free answers, by turns."""
    asked = [command for command in nano.held_out() if command["calls"]][:prompts]
    rows = [["answers", "sampling", "free, ms/token", "held, ms/token", "ratio by pair"]]
    with Runtime.open("mimo-nano", draft=draft, threads=threads) as rt:
        for temperature in (0.0, 1.0):
            per: dict[bool, list[float]] = {False: [], True: []}
            for number in range(-1, rounds):  # round -1 warms up
                spent, tokens = {False: 0.0, True: 0.0}, {False: 0, True: 0}
                for index, said in enumerate(asked):
                    tools = [nano.TOOLS[name] for name in said["tools"]]
                    for held in (True, False) if (index + number) % 2 else (False, True):
                        session = rt.session(
                            tools=tools, enable_thinking=False, constrain_tools=held
                        )
                        reply = session.generate(
                            said["text"], max_tokens=96, temperature=temperature, seed=index
                        )
                        spent[held] += reply.stats.decode_ms
                        tokens[held] += reply.stats.tokens - 1
                if number >= 0:
                    for held in per:
                        per[held].append(spent[held] / tokens[held])
            ratios = [b / a for a, b in zip(per[False], per[True], strict=True)]
            rows.append(
                [
                    f"{len(asked)} tool calls of mimo-nano",
                    "greedy" if temperature == 0 else f"temperature {temperature:g}",
                    f"{statistics.median(per[False]):.3f}",
                    f"{statistics.median(per[True]):.3f}",
                    f"{statistics.median(ratios):.3f} ({min(ratios):.3f}..{max(ratios):.3f})",
                ]
            )
    return markdown(rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--draft", default="3", choices=["0", "1", "2", "3", "auto"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="put the tables into the document")
    args = parser.parse_args(argv)
    draft = args.draft if args.draft == "auto" else int(args.draft)
    text = states_table(args.seed, args.repeats) + "\n"
    text += nano_table(args.prompts, args.rounds, draft, args.threads)
    text += f"\n`python tools/constraint_cost.py --draft {args.draft}`\n"
    print(text)
    if args.write:
        write_section("constraint_cost", text, "Structured output")


if __name__ == "__main__":
    sys.exit(command(main)())
