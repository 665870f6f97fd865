"""`mimo-edge eval`: how good a model is, and what quantisation cost it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mimo_edge.cli.options import BackendName, Ep, EpLibrary, EpOption, Threads, provider
from mimo_edge.cli.output import Output
from mimo_edge.cli.run import parse_draft

if TYPE_CHECKING:
    from mimo_edge.evaluate import CommandFailure, CommandQuality, TextQuality

_SHOWN_FAILURES = 10


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("eval")(evaluate)


def evaluate(
    bundle: Annotated[
        str, typer.Argument(help="Bundle, .gguf file, checkpoint folder, or mimo-nano.")
    ],
    suite: Annotated[
        str, typer.Option(help="nano-commands, or the path of a UTF-8 text.")
    ] = "nano-commands",
    against: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint to compare with; a bundle of mimo-nano finds its own.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Only so many commands, or chunks of 512 tokens of a text."),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(help="Tokens drafted per step: 0, 1, 2, 3 or auto; as many as it can."),
    ] = None,
    backend: BackendName = "auto",
    ep: Ep = "auto",
    ep_library: EpLibrary = None,
    ep_option: EpOption = None,
    threads: Threads = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show every wrong answer.")
    ] = False,
) -> None:
    """Measure how good a model is, and what quantisation cost it.

    Perplexity, KL divergence and agreement with the source checkpoint, exact-match tool calls.

    The nano-commands suite asks the held-out commands of mimo-nano, each with its own tools, and
    counts the answers that make exactly the right calls; perplexity and distance are then those
    of the right answers.
    """
    out = Output(json=json, verbose=verbose)
    setting = None if draft is None else parse_draft(draft)
    from mimo_edge.suites import evaluate_model

    report = evaluate_model(
        bundle,
        suite,
        against=against,
        limit=limit,
        draft=setting,
        backend=backend,
        **provider(ep, ep_library, ep_option),
        threads=threads,
        progress=lambda stage, done, total: out.progress(stage, done, total, unit="count"),
    )
    out.result(report.to_dict())
    out.text(f"{report.model}, {report.suite}, against {report.against or 'nothing'}")
    out.table(text_rows(report.text))
    if report.commands is not None:
        out.text("")
        out.table(command_rows(report.commands), ("commands", "exact", "of", ""))
        out.text("")
        out.table(draft_rows(report.commands))
        _show_failures(out, report.commands.failures)


def text_rows(text: TextQuality) -> list[tuple[str, str]]:
    """What `evaluate_text` found, one measure a line."""
    rows = [("tokens scored", f"{text.tokens}"), ("perplexity", f"{text.perplexity:.4f}")]
    if text.source_perplexity is not None:
        rows.append(("perplexity of the source", f"{text.source_perplexity:.4f}"))
    if text.mean_kl is not None and text.kl_p99 is not None:
        rows.append(("KL to the source, mean", f"{text.mean_kl:.6f} nats"))
        rows.append(("KL to the source, 99th percentile", f"{text.kl_p99:.6f} nats"))
    if text.top1_agreement is not None:
        rows.append(("same most likely token", f"{100 * text.top1_agreement:.2f} %"))
    return rows


def command_rows(commands: CommandQuality) -> list[tuple[str, int, int, str]]:
    """Right answers in all, by language, domain and kind."""
    groups = [("all", commands.total)]
    for table in (commands.by_language, commands.by_domain, commands.by_kind):
        groups += table.items()
    return [(name, t.exact, t.commands, f"{100 * t.rate:.2f} %") for name, t in groups]


def draft_rows(commands: CommandQuality) -> list[tuple[str, str]]:
    """What drafting gained."""
    kept = ", ".join(f"{100 * rate:.1f} %" for rate in commands.acceptance_by_depth)
    return [
        ("tokens per verify", f"{commands.tokens_per_verify:.2f}"),
        ("drafts kept, by depth", kept or "none were made"),
        ("generated tokens", f"{commands.tokens}"),
        ("time for the commands", f"{commands.seconds:.1f} s"),
    ]


def _show_failures(out: Output, failures: list[CommandFailure]) -> None:
    from mimo_edge.cli.run import show_call
    from mimo_edge.tool_calls import ToolCall

    def shown(calls: list[dict[str, object]]) -> str:
        made = [ToolCall(str(c["name"]), dict(c["arguments"])) for c in calls]  # type: ignore[call-overload]
        return " ".join(map(show_call, made)) or "no call"

    some = failures if out.verbose else failures[:_SHOWN_FAILURES]
    if some:
        out.text("")
    for failure in some:
        out.text(f"{failure.id}: {failure.text}")
        out.text(f"  wanted {shown(failure.want)}")
        got = shown(failure.got) if failure.got or not failure.answer else repr(failure.answer)
        out.text(f"  got    {got}" + (" (cut off)" if failure.finish_reason == "length" else ""))
    if len(failures) > len(some):
        out.note(f"{len(failures) - len(some)} more wrong answers: use -v or --json")
