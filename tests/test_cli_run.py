from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import mimo_edge
from mimo_edge.cli.main import app
from mimo_edge.cli.output import Output, time_left
from mimo_edge.cli.run import parse_draft, show_call
from mimo_edge.errors import UsageError
from mimo_edge.tool_calls import ToolCall

COMMAND = [sys.executable, "-m", "mimo_edge"]


def invoke(*arguments: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, list(arguments), input=stdin)


def test_version_and_help() -> None:
    assert invoke("--version").output == f"mimo-edge {mimo_edge.__version__}\n"
    top = invoke("--help")
    assert top.exit_code == 0
    assert "run" in top.output
    text = invoke("run", "--help").output
    for option in ("--prompt", "--tools", "--draft", "--ram", "--context", "--json", "--seed"):
        assert option in text


def test_one_prompt_on_the_built_in_model() -> None:
    result = invoke("run", "-p", "turn on guest wifi for two hours", "--max-tokens", "48")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()
    assert "tok/s" in result.stderr
    assert "tokens per verify" in result.stderr
    assert "first token" in result.stderr
    assert "peak" in result.stderr
    assert "tok/s" not in result.stdout


def test_json_is_one_object_and_the_same_for_every_draft() -> None:
    seen = set()
    for draft in ("0", "3", "auto"):
        result = invoke("run", "-p", "把客厅的灯调暗一点", "--json", "--draft", draft)
        assert result.exit_code == 0
        value = json.loads(result.stdout)
        assert result.stdout.count("\n") == 1
        assert value["model"] == "mimo-nano"
        assert value["stats"]["tokens"] == len(value["token_ids"])
        seen.add(tuple(value["token_ids"]))
    assert len(seen) == 1


def test_the_guard_against_repetition_is_asked() -> None:
    result = invoke("run", "-p", "hi", "--stop-repeats", "1")
    assert result.exit_code == 2
    assert "stop_repeats = 1" in result.stderr
    result = invoke("run", "-p", "hi", "--stop-repeats", "50", "--max-tokens", "4", "--json")
    assert result.exit_code == 0


def test_an_answer_of_a_form(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}')

    def answer(*options: str) -> Any:
        result = invoke("run", "-p", "hi", "--json", "--max-tokens", "600", *options)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    text = ["--tool-choice", "none", "--repetition-penalty", "1.1", "--presence-penalty", "1"]
    found = json.loads(answer("--json-schema", str(schema), *text)["text"])
    assert len(found) <= 3
    assert set(found) <= {"a", "b"}
    assert re.fullmatch("x[abc]{3}", answer("--regex", "x[abc]{3}y", "--stop", "y", *text)["text"])
    calls = answer("--tool-choice", "set_guest_wifi", "--timeout", "600")["tool_calls"]
    assert {call["name"] for call in calls} <= {"set_guest_wifi"}


def test_chat_reads_lines_and_keeps_the_conversation() -> None:
    result = invoke("run", "--max-tokens", "40", "--context", "1000", stdin="hello\n\n你好\n")
    assert result.exit_code == 0
    assert result.stderr.count("tok/s") == 2


def test_own_tools(tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text('[{"name": "ping", "parameters": {}}]')
    result = invoke("run", "-p", "ping", "--tools", str(path), "-v", "--max-tokens", "8")
    assert result.exit_code == 0
    assert "1 tools" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "/no/such/bundle", "-p", "x"], 1, "there is no model"),
        (["run", "-p", "x", "--draft", "9"], 2, "--draft '9'"),
        (["run", "-p", "x", "--ram", "much"], 2, "no size"),
        (["run", "-p", "x", "--ram", "60MiB"], 1, "--ram allows 60.0 MiB"),
        (["run", "-p", "x", "--ram", "9" * 400], 2, "no size"),
        (["run", "a prompt in place of a model " * 200], 2, "File name too long"),
        (["run", "-p", "x", "--context", "10"], 1, "context holds 10"),
        (["run", "-p", "x", "--context", "999999"], 1, "999999 exceeds"),
        (["run", "-p", "x", "--backend", "ggml2"], 1, "no backend"),
        (["run", "-p", "x", "--temperature", "-1"], 2, "temperature"),
        (["run", "-p", "x", "--tools", "/no/such.json"], 2, "cannot read"),
        (["run", "-p", "x", "--json-schema", "/no/such.json"], 2, "cannot read"),
        (["run", "-p", "x", "--regex", "("], 2, "cannot be enforced"),
        (["run", "-p", "x", "--tool-choice", "fly"], 2, "there is no tool 'fly'"),
        (["run", "-p", "x", "--repetition-penalty", "0"], 2, "repetition_penalty"),
        (["run", "-p", "x", "--timeout", "-1"], 2, "timeout"),
        (["run", "--json"], 2, "needs a prompt"),
        (["run", "--nonsense"], 2, "nonsense"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_errors_are_one_line_and_a_code(arguments: list[str], code: int, message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    if message not in ("nonsense",):
        assert result.stderr.count("\n") == 1


def test_input_that_is_not_utf8() -> None:
    for arguments, data in ((["run"], b"caf\xe9\n"), (["run", "-p", b"caf\xe9"], b"")):
        done = subprocess.run(
            [*COMMAND, *arguments],
            input=data,
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": "utf-8:strict", "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode in (1, 2), done.stderr
        assert done.stderr.startswith(b"error: "), done.stderr
        assert b"Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [*COMMAND, "inspect", "mimo-nano"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (result.returncode, result.stderr) == (1, "error: [Errno 28] No space left on device\n")


def test_a_closed_standard_output_is_no_error() -> None:
    command = "exec " + shlex.join([*COMMAND, "inspect", "mimo-nano"]) + " >&-"
    result = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_json_stays_json_whatever_the_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    Output(json=True).result({"text": "灯 é \ud800"})
    assert json.loads(raw.getvalue()) == {"text": "灯 é \ud800"}


def test_tools_file_must_be_a_list(tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    for text in ("{}", "[", '"x"'):
        path.write_text(text)
        assert invoke("run", "-p", "x", "--tools", str(path)).exit_code == 2


@pytest.mark.skipif(not hasattr(signal, "SIGINT"), reason="no interrupts here")
def test_an_interrupt_keeps_what_was_said_and_exits_130() -> None:
    arguments = ["run", "-p", "hello", "--max-tokens", "100000", "--context", "8000"]
    arguments += ["--temperature", "9", "--seed", "1", "--draft", "0"]
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    first = process.stdout.read(1)  # generation has begun
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert first
    assert b"cancelled" in err
    assert b"Traceback" not in err
    assert out.endswith(b"\n")


def test_start_up_is_quick_and_light() -> None:
    code = (
        "import sys; from mimo_edge.cli.main import app; import typer.main; "
        "typer.main.get_command(app); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"numpy", "llama_cpp", "onnx", "onnxruntime", "tokenizers", "jinja2", "rich", "asyncio"}
    assert not heavy & set(done.stdout.split())


def test_show_call_and_draft_values() -> None:
    call = ToolCall("dim", {"room": "客厅", "by": 2})
    assert show_call(call) == '-> dim(room="客厅", by=2)'
    assert [parse_draft(text) for text in ("0", "3", "auto")] == [0, 3, "auto"]
    with pytest.raises(UsageError):
        parse_draft("4")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_has_bytes_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export resumed at 400 of 1,000 MiB that writes 10 MiB a second."""
    clock, terminal = [100.0], Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    out = Output()
    for megabytes in (400, 500, 1000):
        out.progress("quantise", megabytes << 20, 1000 << 20)
        clock[0] += 10
    bars = [bar for bar in terminal.getvalue().split("\r\x1b[K") if bar]
    assert bars == [
        "quantise [#########---------------] 400.0 MiB of 1000.0 MiB, -:-- left",
        "quantise [############------------] 500.0 MiB of 1000.0 MiB, 0:50 left",
        "quantise [########################] 1000.0 MiB of 1000.0 MiB, done\n",
    ]
    assert time_left(60.0, 1, 119) == "1:59:00 left"


def test_output_tables_json_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output()
    out.table([("灯", 5), ("ab", 10)], header=("name", "n"))
    out.result({"not": "printed"})
    out.progress("write", 1, 2)  # not a terminal: nothing
    captured = capsys.readouterr()
    assert captured.out == "name   n\n灯     5\nab    10\n"
    assert captured.err == ""
    quiet = Output(json=True)
    quiet.text("nothing")
    quiet.table([("a", 1)])
    quiet.result({"灯": 1})
    quiet.note("to stderr")
    quiet.detail("hidden")
    captured = capsys.readouterr()
    assert captured.out == '{"灯": 1}\n'
    assert captured.err == "to stderr\n"
