"""The command line's page: what `--help` says, written to docs/cli.md.

    python tools/cli_page.py [--check]

`--check` writes nothing and fails when the page is not what `--help` says now.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from typer.main import get_command
from typer.testing import CliRunner

from mimo_edge.cli.main import app

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

HEAD = """# The command line

Made from `--help` by `python tools/cli_page.py`: change the help texts, not this page.

Results go to standard output; progress, remarks and errors to standard error. With `--json` a
command prints one JSON object and nothing else. An error is one line that says what to do; the exit
code is 0 when all is done, 1 when something failed, 2 for a wrong call, 130 after Ctrl-C.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD, _help()]
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        parts += [f"## mimo-edge {name}\n", _help(name)]
        for part in getattr(command, "commands", ()):
            parts += [f"### mimo-edge {name} {part}\n", _help(name, part)]
    return "\n".join(parts)


def _help(*command: str) -> str:
    # A fixed width: the text must not depend on the terminal it is made in.
    shown = CliRunner().invoke(
        app, [*command, "--help"], env={"COLUMNS": "80"}, prog_name="mimo-edge"
    )
    if shown.exit_code:
        raise SystemExit(f"mimo-edge {' '.join(command)} --help: exit {shown.exit_code}")
    lines = [line.rstrip() for line in shown.output.strip().splitlines()]
    return "\n".join(["```", *lines, "```", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    if not parser.parse_args().check:
        PAGE.write_text(page(), "utf-8")
    elif page() != PAGE.read_text("utf-8"):
        print("docs/cli.md is not what --help says: run python tools/cli_page.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
