"""The chat in a terminal: commands, live figures, tool results played by hand."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from scripted import END, runtime

from mimo_edge.api import Runtime
from mimo_edge.cli.chat import Chat, live_line
from mimo_edge.cli.output import Output
from mimo_edge.errors import UsageError
from mimo_edge.nano.commands import DEMO_TOOLS
from mimo_edge.session import Session

CALL = "<tool_call>\n<function=dim>\n<parameter=by>3</parameter>\n</function>\n</tool_call>"
DIM = {"name": "dim", "parameters": {"type": "object", "properties": {"by": {"type": "integer"}}}}


def made(answers: list[str]) -> Chat:
    rt, _ = runtime(answers)
    options = {"max_tokens": 50, "temperature": 0.0}
    return Chat(Output(), rt, lambda: rt.session(tools=[DIM]), [DIM], options)


def test_lines_that_ask_and_lines_that_command(capsys: pytest.CaptureFixture[str]) -> None:
    chat = made(["Hi" + END])
    assert chat.prompt_of("hello / there") == ["hello / there"]
    assert chat.prompt_of("  ") == []
    for command in ("/help", "/tools", "/stats", "/memory"):
        assert chat.prompt_of(command) == []
    shown = capsys.readouterr().err
    assert "/restore FILE" in shown
    assert "dim(by)" in shown
    assert "tokens_per_verify" in shown
    chat.prompt_of("/quit")
    assert chat.over


@pytest.mark.parametrize(
    "line", ["/nothing", "/", "/set mood good", "/set top_k x", "/result ok", "/save", "/__init__"]
)
def test_commands_that_are_none(line: str) -> None:
    with pytest.raises(UsageError):
        made(["Hi" + END]).prompt_of(line)


def test_options_are_set() -> None:
    chat = made(["Hi" + END])
    chat.prompt_of("/set temperature 0.5")
    chat.prompt_of("/set max_tokens 7")
    assert chat.options == {"max_tokens": 7, "temperature": 0.5}


def test_results_go_on_after_the_last_call() -> None:
    chat = made(["<think></think>" + CALL + CALL + END, "<think></think>Done." + END])
    chat.session.generate("dim it")
    chat.answered()
    assert chat.prompt_of("/result one") == []
    assert chat.prompt_of("/result") == [None]
    assert chat.session.generate(None).text == "Done."
    results = [m["content"] for m in chat.session.messages if m["role"] == "tool"]
    assert results == ["one", '{"status": "ok"}']


def test_a_conversation_is_saved_forgotten_and_gone_on_with(tmp_path: Path) -> None:
    with Runtime.open("mimo-nano") as rt:

        def start() -> Session:
            return rt.session(tools=DEMO_TOOLS, enable_thinking=False)

        chat = Chat(Output(), rt, start, DEMO_TOOLS, {})
        (call,) = chat.session.generate("turn on guest wifi for two hours").tool_calls
        before = list(chat.session.messages)
        chat.prompt_of(f"/save {tmp_path / 'chat'}")
        chat.prompt_of("/new")
        assert chat.session.messages == []
        chat.prompt_of(f"/restore {tmp_path / 'chat'}")
        assert chat.session.messages == before
        chat.session.tool_result('{"status": "ok"}', call.name)
        assert chat.session.generate(None).text == "Done."


def test_live_figures() -> None:
    chat = made(["<think></think>" + "word " * 20 + END])
    for _ in chat.session.stream("x"):
        line = live_line(chat._runtime, chat.session)
    assert re.search(r"\d+ tokens \| [\d.]+ tok/s \| [\d.]+ accepted per verify \| .*MiB", line)


def test_in_a_terminal() -> None:
    """The real thing on a pseudo-terminal: a command, an answer with figures below, the end."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mimo_edge", "run"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"},
    )
    os.close(theirs)
    seen = ""

    def wait_for(text: str) -> None:
        nonlocal seen
        end = time.monotonic() + 300
        # On a slow machine the figures are drawn anew between any two pieces of the text.
        while text not in re.sub(r"\x1b7.*?\x1b8", "", seen, flags=re.DOTALL):
            ready, _, _ = select.select([ours], [], [], max(0, end - time.monotonic()))
            assert ready, seen
            seen += os.read(ours, 4096).decode("utf-8", "replace")

    try:
        wait_for("/help lists commands")
        os.write(ours, b"/tools\n")
        wait_for("set_guest_wifi(")
        os.write(ours, b"turn on guest wifi for two hours\n")
        wait_for('-> set_guest_wifi(state="on", duration=2, unit="hours")')
        wait_for("/result TEXT says")
        os.write(ours, b"/result\n")
        wait_for("Done.")
        os.write(ours, b"/quit\n")
        assert process.wait(60) == 0
        with suppress(OSError):  # how the end of a pseudo-terminal reads
            while more := os.read(ours, 4096):
                seen += more.decode("utf-8", "replace")
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert re.search(r"\x1b\[7m\d+ tokens", seen)
    # The region that scrolled is the whole screen again.
    assert seen.rindex("\x1b[r") > seen.rindex("\x1b[7m")
