"""`mimo-edge bench`: speed and memory, alone or against stock llama.cpp."""

from __future__ import annotations

import csv as csv_writer
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mimo_edge.cli.options import Ep, EpLibrary, EpOption, Profile, provider
from mimo_edge.cli.output import Output
from mimo_edge.cli.run import parse_draft
from mimo_edge.errors import UsageError
from mimo_edge.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from mimo_edge.bench.cases import Case, Settings
    from mimo_edge.bench.forecasts import Forecasts
    from mimo_edge.bench.results import Result, Row
    from mimo_edge.bench.session import Bench

HEADER = (
    "test", "engine", "draft", "RAM", "thr", "tok/s", "min..max", "forecast", "first",
    "tok/verify", "hits", "MB/tok", "bound", "RSS", "kernel", "plan", "ratio",
)  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bench")(bench)


def bench(
    bundle: Annotated[
        str, typer.Argument(help="Bundle, .gguf file or checkpoint folder, or mimo-nano.")
    ],
    prefill: Annotated[
        str, typer.Option("--prefill", "-p", help='Prompt lengths, as "128,512"; "none".')
    ] = "512",
    decode: Annotated[
        str, typer.Option("--decode", "-n", help='Tokens to generate, as "32,128"; "none".')
    ] = "64",
    depth: Annotated[
        str | None,
        typer.Option("--depth", "-d", help='Tokens in the context before decoding; "128".'),
    ] = None,
    draft: Annotated[str, typer.Option(help='Draft settings, as "0,3,auto".')] = "auto",
    ram: Annotated[str, typer.Option(help='Caps on memory, as "none,8GiB,4GiB".')] = "none",
    threads: Annotated[
        str | None, typer.Option("--threads", "-t", help='Threads, as "1,2"; all usable cores.')
    ] = None,
    repetitions: Annotated[
        int, typer.Option("--repetitions", "-r", help="Measurements; the median is shown.")
    ] = 3,
    warmup: Annotated[int, typer.Option(help="Tokens decoded before the clock runs.")] = 16,
    tokens: Annotated[
        str,
        typer.Option(
            help="Decode on with: greedy (own choice), drawn (random ids); auto is greedy for "
            "models with a tokenizer."
        ),
    ] = "auto",
    prompt: Annotated[str | None, typer.Option(help="Answer this instead of random ids.")] = None,
    against: Annotated[
        str | None, typer.Option(help='Compare with stock "llama.cpp", by turns.')
    ] = None,
    repack: Annotated[
        str, typer.Option(help="llama.cpp's weight reordering: on, off, auto (on where it fits).")
    ] = "auto",
    context: Annotated[
        int | None, typer.Option(help="Most tokens of the conversation; what a case needs.")
    ] = None,
    profile: Profile = None,
    backend: Annotated[
        str,
        typer.Option(
            help="ggml, onnx, reference, or auto: ggml for bundles and GGUF files; several by "
            'turns, as "onnx,ggml".'
        ),
    ] = "auto",
    ep: Ep = "auto",
    ep_library: EpLibrary = None,
    ep_option: EpOption = None,
    kv_type: Annotated[
        str | None,
        typer.Option(
            help="KV cache of both engines: f16 (default; f32 where that is small), q8_0 or f32."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random ids.")] = 0,
    csv: Annotated[Path | None, typer.Option(help="Write a table to this file as well.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show each result as soon as it is there.")
    ] = False,
) -> None:
    """Measure prefill and decode: greedy, end of text ignored, each case in its own process."""
    from dataclasses import asdict, replace

    from mimo_edge import __version__, machine
    from mimo_edge.bench.cases import Settings, grid
    from mimo_edge.bench.results import SCHEMA
    from mimo_edge.bench.session import Bench

    out = Output(json=json, verbose=verbose)
    if against not in (None, "llama.cpp"):
        raise UsageError(f"--against {against!r}", "only llama.cpp is known")
    if repack not in ("auto", "on", "off"):
        raise UsageError(f"--repack {repack!r}", "use auto, on or off")
    if prompt is not None and depth is not None:
        raise UsageError("--prompt sets the depth itself", "leave --depth out")
    settings = Settings(
        model=bundle,
        profile=profile,
        backend=backend,
        **provider(ep, ep_library, ep_option),
        context=context,
        kv_type=kv_type,
        repetitions=repetitions,
        warmup=warmup,
        tokens=tokens,  # type: ignore[arg-type]  # checked there
        seed=seed,
        prompt=prompt,
    )
    cases = grid(
        prefill=_counts("--prefill", prefill),
        decode=_counts("--decode", decode),
        depths=[0] if prompt is not None else _counts("--depth", depth or "128"),
        drafts=[parse_draft(text) for text in _parts(draft)],
        rams=[None if text == "none" else parse_bytes(text) for text in _parts(ram)],
        threads=_counts("--threads", threads) if threads else [machine.usable_cores()],
    )
    runs = [
        Bench(
            replace(settings, backend=name),
            against=against is not None,
            repack=repack,  # type: ignore[arg-type]
        )
        for name in _parts(backend)
    ]
    run = runs[0]
    about = machine.describe()
    if run.no_cgroup and any(case.ram is not None for case in cases):
        out.note(f"caps are not enforced: {run.no_cgroup}")
    results: list[Result] = []

    def report() -> None:
        _print(out, results)
        if csv is not None:
            _write_csv(csv, results)
        out.result(
            {
                "schema": SCHEMA,
                "version": __version__,
                "model": bundle,
                "machine": about,
                "settings": asdict(settings),
                "no_cgroup": run.no_cgroup or None,
                "results": [result.to_dict() for result in results],
            }
        )

    forecasts = _forecasts(settings)
    if forecasts is None:
        out.note("no forecasts: mimo-edge probe measures this machine for them")
    try:
        for result in _by_turns(runs, cases, out):
            if forecasts is not None:
                ours = replace(result.ours, forecast_tps=forecasts.tps(result.ours))
                result = replace(result, ours=ours)
            results.append(result)
            for row in result.rows:
                if row.error is not None:
                    out.note(f"{row.case.label}: {row.engine}: {row.error['message']}")
                if row.tps is not None:
                    out.detail(f"{row.case.label}: {row.engine}: {row.tps.median:.2f} tok/s")
    finally:
        if results:
            report()  # also what was measured before an interrupt
    if all(result.ours.error is not None for result in results):
        raise typer.Exit(1)


def _by_turns(runs: list[Bench], cases: list[Case], out: Output) -> Iterator[Result]:
    """Results of every case on one backend after the other."""
    for index, case in enumerate(cases):
        out.progress(case.label, index, len(cases), unit="count")
        for run in runs:
            yield from run.run([case])


def _parts(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UsageError(f"{text!r} has an empty part", "separate values by commas")
    return parts


def _counts(option: str, text: str) -> list[int]:
    if text == "none":
        return []
    try:
        return [int(part) for part in _parts(text)]
    except ValueError:
        raise UsageError(f"{option} {text!r} is no list of whole numbers") from None


def _print(out: Output, results: list[Result]) -> None:
    out.table([_cells(result, row) for result in results for row in result.rows], HEADER)
    for result in results:
        for row in result.rows:
            for note in row.notes:
                out.text(f"{row.case.label}, {row.engine}: {note}")
    if alike := [result.same_choices for result in results if result.same_choices is not None]:
        same, compared = (sum(counts) for counts in zip(*alike, strict=True))
        out.text(f"both engines chose the same next token {same} of {compared} times")


def _cells(result: Result, row: Row) -> list[str]:
    case, tps = row.case, row.tps
    ours = row is result.ours
    ratio = result.ratio if ours else None
    measured, planned = row.measured_bytes, row.planned_bytes
    return [
        case.label,
        _engine(row),
        str(case.draft),
        "-" if case.ram is None else format_bytes(case.ram),
        str(case.threads),
        "-" if tps is None else f"{tps.median:.2f}",
        "-" if tps is None else f"{tps.min:.2f}..{tps.max:.2f}",
        _forecast(row),
        "-" if row.first_token_ms is None else f"{row.first_token_ms.median:.0f} ms",
        _number(row.tokens_per_verify, "{:.2f}"),
        _number(row.hit_rate, "{:.1%}"),
        _number(row.read_bytes_per_token, "{:.1f}", 1e-6),
        "-" if tps is None or row.bound_tps is None else f"{tps.median / row.bound_tps:.0%}",
        _size(row.peak_rss_bytes),
        _size(row.kernel_peak_bytes),
        "-" if not measured or not planned else f"{_size(planned)} {planned / measured:.0%}",
        "-" if ratio is None else f"{ratio.median:.2f} ({ratio.min:.2f}..{ratio.max:.2f})",
    ]


def _engine(row: Row) -> str:
    """The engine, and which backend of it ran."""
    return row.engine if row.backend in ("", row.engine) else f"{row.engine} {row.backend}"


def _forecast(row: Row) -> str:
    """What a plan said, and how far the measurement is from it."""
    if row.forecast_tps is None:
        return "-"
    off = "" if row.tps is None else f" {row.tps.median / row.forecast_tps - 1:+.0%}"
    return f"{row.forecast_tps:.2f}{off}"


def _forecasts(settings: Settings) -> Forecasts | None:
    """Forecasts of this machine, by --profile where a probe wrote it; None where none did."""
    from mimo_edge.bench.forecasts import Forecasts
    from mimo_edge.devices.profile import AUTO, load_profile

    for name in (settings.profile, AUTO):
        if name is not None and (device := load_profile(name)).measured:
            return Forecasts(settings, device)
    return None


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else form.format(value * scale)


def _size(nbytes: int | None) -> str:
    return "-" if nbytes is None else format_bytes(nbytes)


def _write_csv(path: Path, results: list[Result]) -> None:
    from mimo_edge.bench.results import COLUMNS, csv_rows

    with path.open("w", newline="", encoding="utf-8") as file:
        writer: Any = csv_writer.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(csv_rows(results))
