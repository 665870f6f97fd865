"""The `mimo-edge` command: its subcommands, and how errors become exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Modules of commands are light:
what a command needs is imported when it runs, so that --help is quick.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mimo_edge import __version__
from mimo_edge.cli import eval, export, inspect, run, verify
from mimo_edge.cli.output import print_error
from mimo_edge.errors import MimoEdgeError

INTERRUPTED = 130


class ErrorMappingGroup(TyperGroup):
    """Turns typed errors into one line and an exit code, here and under a test runner."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MimoEdgeError as error:
            print_error(error)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt:
            sys.stderr.write("\ninterrupted\n")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader went away (`| head`): nothing more can be said, also at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None


app = typer.Typer(
    name="mimo-edge",
    cls=ErrorMappingGroup,
    help="Export Xiaomi MiMo-V2 models to edge devices and run them there.",
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


for _module in (export, run, inspect, verify, eval):
    _module.register(app)
