"""docs/cli.md is what `--help` says."""

from __future__ import annotations

import cli_page
import pytest


def test_the_page_is_what_help_says() -> None:
    assert cli_page.PAGE.read_text("utf-8") == cli_page.page(), (
        "a help text changed: run python tools/cli_page.py"
    )


@pytest.mark.parametrize("command", ["export", "run", "inspect", "verify", "eval"])
def test_every_command_has_its_part(command: str) -> None:
    part = cli_page.page().split(f"## mimo-edge {command}\n")[1].split("## mimo-edge ")[0]
    assert f"Usage: mimo-edge {command} " in part
    assert "--json" in part
    for line in part.splitlines():
        assert len(line) <= 80
        assert not line.endswith("...")
