"""`mimo-edge run`: one prompt, or a chat."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mimo_edge.cli.chat import Chat, lines, live_line, report
from mimo_edge.cli.interrupts import Interrupts, cancelled_by_interrupts
from mimo_edge.cli.options import (
    SNAPSHOT_BYTES,
    SNAPSHOTS,
    BackendName,
    Draft,
    Ep,
    EpLibrary,
    EpOption,
    Governor,
    IdleBytes,
    KvType,
    Pin,
    Profile,
    Ram,
    SnapshotBytes,
    Snapshots,
    Threads,
    kept,
    provider,
)
from mimo_edge.cli.output import Output
from mimo_edge.cli.status_line import StatusLine, is_possible
from mimo_edge.errors import MimoEdgeError, UsageError
from mimo_edge.text_file import read_json

if TYPE_CHECKING:
    from mimo_edge.api import Runtime
    from mimo_edge.reply import Piece, Reply
    from mimo_edge.session import Session
    from mimo_edge.speculative import DraftSetting
    from mimo_edge.tool_calls import ToolCall

BUILT_IN = "mimo-nano"
INTERRUPTED = 130
_MAX_JSON_BYTES = 4 << 20


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("run")(run)


def run(
    bundle: Annotated[
        str | None,
        typer.Argument(help="Bundle, .gguf file or checkpoint folder; mimo-nano when absent."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this and exit; without it, chat.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    tools: Annotated[
        Path | None, typer.Option(help="JSON file with a list of tools (OpenAI form).")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of one answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from this much of the mass.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from this many tokens; 0 is all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the best.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Divide the chance of what was said by this; 1 leaves it.")
    ] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option(help="Take this from the logits of every token that was said.")
    ] = 0.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End the answer before this text; may be repeated.")
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="JSON file: the schema that the answer must fit.")
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="Regular expression that the whole answer must match.")
    ] = None,
    tool_choice: Annotated[
        str, typer.Option(help="auto, none, required, or the tool that must be called.")
    ] = "auto",
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="End an answer after this time.")
    ] = None,
    stop_repeats: Annotated[
        int,
        typer.Option(
            metavar="N", help="End an answer that repeats the same tokens N times; 0 never does."
        ),
    ] = 0,
    think: Annotated[
        bool | None,
        typer.Option("--think/--no-think", help="Let the model reason first, or not."),
    ] = None,
    draft: Draft = "auto",
    context: Annotated[int | None, typer.Option(help="Most tokens of the conversation.")] = None,
    ram: Ram = None,
    profile: Profile = None,
    backend: BackendName = "auto",
    ep: Ep = "auto",
    ep_library: EpLibrary = None,
    ep_option: EpOption = None,
    threads: Threads = None,
    kv_type: KvType = None,
    pin: Pin = 0,
    governor: Governor = None,
    snapshots: Snapshots = SNAPSHOTS,
    snapshot_bytes: SnapshotBytes = SNAPSHOT_BYTES,
    idle_bytes: IdleBytes = None,
    trace: Annotated[
        Path | None, typer.Option(help="Record which experts every token uses, in this file.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show details.")] = False,
) -> None:
    """Ask a model, or chat with it. Tool calls are shown, not carried out."""
    out = Output(json=json, verbose=verbose)
    if json and prompt is None:
        raise UsageError("--json needs a prompt", "add -p")
    tool_list = read_tools(tools) if tools is not None else None
    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "stop": stop or (),
        "json_schema": None if json_schema is None else read_schema(json_schema),
        "regex": regex,
        "tool_choice": tool_choice,
        "timeout_s": timeout,
        "stop_repeats": stop_repeats,
    }
    from mimo_edge.api import Runtime

    with Runtime.open(
        bundle if bundle is not None else BUILT_IN,
        profile=profile,
        ram=ram,
        context=context,
        backend=backend,
        **provider(ep, ep_library, ep_option),
        threads=threads,
        draft=parse_draft(draft),
        kv_type=kv_type,
        pin=pin,
        trace=trace,
        governor=governor,
        **kept(snapshots, snapshot_bytes, idle_bytes, out),
    ) as runtime:
        from mimo_edge.nano.commands import DEMO_TOOLS, is_nano_template

        if is_nano_template(runtime.chat_template):
            # It was trained on commands with tools, without thinking.
            tool_list = DEMO_TOOLS if tool_list is None else tool_list
            think = False if think is None else think

        def start() -> Session:
            return runtime.session(system=system, tools=tool_list, enable_thinking=think)

        out.detail(
            f"{runtime.name}: backend {runtime.stats()['backend']}, context {runtime.context}, "
            f"{len(tool_list or ())} tools"
        )
        for line in runtime.memory_plan():
            out.detail(line)
        if prompt is not None:
            _answer(out, runtime, start(), prompt, options)
        else:
            _chat(out, runtime, start, tool_list or [], options)


def parse_draft(text: str) -> DraftSetting:
    """A --draft value. Raises UsageError."""
    if text == "auto":
        return "auto"
    if text in ("0", "1", "2", "3"):
        return int(text)
    raise UsageError(f"--draft {text!r}", "use 0, 1, 2, 3 or auto")


def _answer(
    out: Output, runtime: Runtime, session: Session, prompt: str, options: dict[str, Any]
) -> None:
    """One answer, printed as it comes; an interrupt keeps what is there and exits 130."""
    interrupted = _stream(out, session, prompt, options)
    reply = session.last_reply
    if reply is not None:
        out.result(_reply_json(runtime, reply))
        _remarks(out, reply)
        out.detail(f"drafting: {reply.stats.draft_why}")
        for line in (*experts_line(runtime), *event_lines(runtime)):
            out.detail(line)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _chat(
    out: Output,
    runtime: Runtime,
    start: Callable[[], Session],
    tools: list[Any],
    options: dict[str, Any],
) -> None:
    """Questions from standard input until it ends; Ctrl-C stops an answer, twice the chat.
    Commands that begin with a slash are for people: in a pipe such a line is a question."""
    interactive = sys.stdin.isatty()
    if interactive:
        out.note(f"{runtime.name}; /help lists commands, Ctrl-C stops an answer, Ctrl-D ends")
    chat = Chat(out, runtime, start, tools, options)
    for line in lines(interactive):
        try:
            for prompt in chat.prompt_of(line) if interactive else [line] * bool(line.strip()):
                interrupted = _stream(out, chat.session, prompt, options, runtime)
                if chat.session.last_reply is not None:
                    _remarks(out, chat.session.last_reply)
                    for text in (*experts_line(runtime), *event_lines(runtime)):
                        out.detail(text)
                if interactive:
                    chat.answered()
                elif interrupted:
                    raise typer.Exit(INTERRUPTED)
        except MimoEdgeError as error:
            if not interactive:
                raise
            report(out, error)
        if chat.over:
            return


def _stream(
    out: Output,
    session: Session,
    prompt: str | None,
    options: dict[str, Any],
    runtime: Runtime | None = None,
) -> bool:
    """Print an answer as it comes; whether Ctrl-C ended it. A second Ctrl-C does not wait. With a
    `runtime`, live figures are shown below it on a terminal."""
    interrupts = Interrupts()
    try:
        with cancelled_by_interrupts(session.cancel) as interrupts:
            # Checked before the first token: errors leave no half answer.
            pieces = session.stream(prompt, **options)
            if interrupts:  # before there was anything to cancel
                session.cancel()
            with StatusLine(runtime is not None and is_possible()) as status:
                if runtime is not None:
                    pieces = _with_figures(pieces, status, runtime, session)
                _print_pieces(out, pieces)
    except KeyboardInterrupt:
        session.stop()
        out.text("")
        return True
    return bool(interrupts)


def _remarks(out: Output, reply: Reply) -> None:
    for malformed in reply.malformed:
        out.note(f"unreadable tool call: {malformed.why}")
    if not out.json:
        out.note(stats_line(reply))


def _with_figures(
    pieces: Iterator[Piece], status: StatusLine, runtime: Runtime, session: Session
) -> Iterator[Piece]:
    for piece in pieces:
        status.show(lambda: live_line(runtime, session))
        yield piece


def _print_pieces(out: Output, pieces: Iterator[Piece]) -> None:
    shown = thinking = False
    for piece in pieces:
        if piece.reasoning and out.verbose:
            out.text(piece.reasoning, end="")
            thinking = True
        text = piece.text
        if thinking and text:
            out.text("\n", end="")
            thinking = False
        if not shown:
            text = text.lstrip("\n")
        if text:
            out.text(text, end="")
            shown = not text.endswith("\n")
        for call in piece.tool_calls:
            out.text(("\n" if shown else "") + show_call(call))
            shown = False
    if shown:
        out.text("")


def show_call(call: ToolCall) -> str:
    """A tool call as one readable line."""
    import json

    arguments = ", ".join(
        f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in call.arguments.items()
    )
    return f"-> {call.name}({arguments})"


def stats_line(reply: Reply) -> str:
    """Speed and memory of one answer."""
    from mimo_edge.machine import peak_rss_bytes
    from mimo_edge.units import format_bytes

    stats = reply.stats
    new = stats.prompt_tokens - stats.reused_tokens
    first = f"{stats.first_token_ms:.0f} ms" if stats.first_token_ms is not None else "never"
    return (
        f"[{stats.tokens} tokens, {stats.decode_tps:.1f} tok/s, first token {first} "
        f"({new} of {stats.prompt_tokens} prompt tokens new), "
        f"{stats.tokens_per_verify:.2f} tokens per verify, "
        f"peak {format_bytes(peak_rss_bytes())}, {reply.finish_reason}]"
    )


def experts_line(runtime: Runtime) -> list[str]:
    """Hits and reads of streamed experts so far; nothing for a resident model."""
    from mimo_edge.units import format_bytes

    found = runtime.stats()["experts"]
    if found is None:
        return []
    return [
        f"experts: {100 * found['hit_rate']:.1f} % of {found['hits'] + found['misses']} in memory, "
        f"{format_bytes(found['flash_bytes'])} read, "
        f"{format_bytes(round(found['flash_bytes_per_token']))} per token, "
        f"{found['slots_used']} of {found['slots']} slots in use"
    ]


def event_lines(runtime: Runtime) -> list[str]:
    """What the governor did so far, the newest last."""
    return [
        f"governor: {event['cause']}: {event['action']} ({event['reading']})"
        for event in runtime.stats()["events"]["events"]
    ]


def _reply_json(runtime: Runtime, reply: Reply) -> dict[str, Any]:
    from dataclasses import asdict

    from mimo_edge.machine import peak_rss_bytes

    stats = reply.stats
    return {
        "model": runtime.name,
        "text": reply.text,
        "reasoning": reply.reasoning,
        "tool_calls": [asdict(call) for call in reply.tool_calls],
        "malformed": [asdict(bad) for bad in reply.malformed],
        "finish_reason": reply.finish_reason,
        "token_ids": list(reply.token_ids),
        "stats": {
            **asdict(stats),
            "prefill_tps": stats.prefill_tps,
            "decode_tps": stats.decode_tps,
            "tokens_per_verify": stats.tokens_per_verify,
            "peak_rss_bytes": peak_rss_bytes(),
            **{name: runtime.stats()[name] for name in ("experts", "governor", "events")},
        },
    }


def read_tools(path: Path) -> list[Any]:
    """A list of tools from a JSON file. Raises UsageError."""
    tools = read_json(path, _MAX_JSON_BYTES, UsageError)
    if not isinstance(tools, list):
        raise UsageError(f"{path} holds a {type(tools).__name__}, not a list of tools")
    return tools


def read_schema(path: Path) -> dict[str, Any]:
    """A JSON schema from a file. Raises UsageError."""
    schema = read_json(path, _MAX_JSON_BYTES, UsageError)
    if not isinstance(schema, dict):
        raise UsageError(f"{path} holds a {type(schema).__name__}, not a JSON schema object")
    return schema
