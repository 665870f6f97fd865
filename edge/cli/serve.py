"""`mimo-edge serve`: OpenAI's API over one model, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
from mimo_edge.cli.run import BUILT_IN, parse_draft, read_tools
from mimo_edge.errors import UsageError

_MAX_KEY_BYTES = 4096


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve")(serve)


def serve(
    bundle: Annotated[
        str | None,
        typer.Argument(help="Bundle, GGUF file or checkpoint folder; the built-in model if none."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8080,
    api_key: Annotated[
        str | None, typer.Option(help="Key clients must send; others see it in the process list.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File that holds the key instead.")
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Let other machines in without a key.")
    ] = False,
    alias: Annotated[
        list[str] | None, typer.Option(help="Further name of the model, for clients; repeatable.")
    ] = None,
    think: Annotated[
        bool | None,
        typer.Option("--think/--no-think", help="Let the model reason first, or not."),
    ] = None,
    tools: Annotated[
        Path | None, typer.Option(help="JSON file with tools the chat page offers (OpenAI form).")
    ] = None,
    concurrent: Annotated[
        int | None,
        typer.Option(help="Generations that run at a time (4, or what the memory plan has)."),
    ] = None,
    queued: Annotated[int, typer.Option(help="Requests that may wait for a place.")] = 16,
    queue_wait: Annotated[float, typer.Option(help="Seconds they wait at most.")] = 60.0,
    conversations: Annotated[
        int | None,
        typer.Option(help="Processed conversations to keep (8, or what the memory plan has)."),
    ] = None,
    max_body: Annotated[str, typer.Option(help="Largest request.")] = "2MiB",
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Longest prompt (the context).")
    ] = None,
    draft: Draft = "auto",
    context: Annotated[int | None, typer.Option(help="Most tokens of a conversation.")] = None,
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
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object once it listens.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show details.")] = False,
) -> None:
    """Serve a model to OpenAI clients on this machine."""
    from mimo_edge.serve.server import bind, check_extra, make_server, url_of

    check_extra()
    out = Output(json=json, verbose=verbose)
    key = _key(api_key, api_key_file)
    tool_list = None if tools is None else read_tools(tools)
    # Before the model is loaded: what is wrong with the address is known at once.
    bound, local = bind(host, port, key, no_auth)
    with bound:
        import uvicorn  # noqa: F401  what it takes belongs into the memory plan

        from mimo_edge.api import Runtime
        from mimo_edge.nano.commands import DEMO_TOOLS, is_nano_template
        from mimo_edge.serve.limits import Limits
        from mimo_edge.tool_calls import tool_schemas
        from mimo_edge.units import parse_bytes

        body_bytes = parse_bytes(max_body)
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
            governor=governor,
            **kept(snapshots, snapshot_bytes, idle_bytes, out),
        ) as runtime:
            room = runtime.planned_conversations or Limits.conversations
            if concurrent is None:
                concurrent = min(Limits.concurrent, room, conversations or room)
            if conversations is None:
                conversations = max(min(Limits.conversations, room), concurrent)
            limits = Limits(
                body_bytes=body_bytes,
                prompt_tokens=max_prompt_tokens,
                concurrent=concurrent,
                queued=queued,
                conversations=conversations,
                queue_wait_s=queue_wait,
            )
            if is_nano_template(runtime.chat_template):
                # It was trained on commands with tools, without thinking.
                tool_list = DEMO_TOOLS if tool_list is None else tool_list
                think = False if think is None else think
            tool_schemas(tool_list or ())
            server = make_server(
                runtime,
                limits=limits,
                api_key=key,
                local=local,
                aliases=tuple(alias or ()),
                thinking=think,
                tools=tool_list or (),
            )
            for line in runtime.memory_plan():
                out.detail(line)
            url = url_of(bound)
            out.result({"url": f"{url}/v1", "model": runtime.name, "context": runtime.context})
            out.note(
                f"{runtime.name} at {url}/v1, chat page at {url}, context {runtime.context}, "
                f"{concurrent} at a time, {queued} may wait; Ctrl-C ends"
            )
            server.run(sockets=[bound])


def _key(text: str | None, file: Path | None) -> str | None:
    if text is not None and file is not None:
        raise UsageError("--api-key and --api-key-file", "give one of them")
    if file is None:
        return text
    from mimo_edge.text_file import read_text

    return read_text(file, _MAX_KEY_BYTES, "the API key").strip()
