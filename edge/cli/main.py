"""The `mimo-edge` command: its subcommands, and how errors become exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Modules of commands are light:
what a command needs is imported when it runs, so that --help is quick.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from mimo_edge import __version__
from mimo_edge.cli import (
    bench,
    devices,
    eval,
    export,
    inspect,
    plan,
    probe,
    run,
    serve,
    trace,
    verify,
)
from mimo_edge.cli.output import print_error
from mimo_edge.errors import MimoEdgeError

INTERRUPTED = 130


class ErrorMappingGroup(TyperGroup):
    """Turns typed errors into one line and an exit code, here and under a test runner."""

    def invoke(self, ctx: Any) -> Any:
        _replace_closed_streams()
        try:
            return super().invoke(ctx)
        except MimoEdgeError as error:
            print_error(error)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt:
            if sys.stderr.isatty():
                sys.stderr.write("\n")  # after the terminal's own ^C
            sys.stderr.write("interrupted\n")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader went away (`| head`): nothing more can be said, also at exit.
            _silence(sys.stdout, sys.stderr)
            raise typer.Exit(1) from None
        except OSError as error:
            # The machine's doing, not a bug: a full disk, a path that may not be read.
            if error.filename is None:  # one of our own streams
                _silence(sys.stdout)
            print_error(MimoEdgeError(str(error)))
            raise typer.Exit(MimoEdgeError.exit_code) from error


def _silence(*streams: TextIO) -> None:
    """Point streams that cannot be written to nowhere, so that the flush at exit succeeds."""
    for stream in streams:
        with suppress(OSError, ValueError):  # replaced by a test runner: it has no descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _replace_closed_streams() -> None:
    """Python has no stream at all for a descriptor that was closed (`>&-`)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


app = typer.Typer(
    name="mimo-edge",
    cls=ErrorMappingGroup,
    help="Export Xiaomi MiMo-V2 models to edge devices and run them there.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"mimo-edge {__version__}\n")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


for _module in (export, run, serve, bench, plan, probe, devices, inspect, verify, eval, trace):
    _module.register(app)
