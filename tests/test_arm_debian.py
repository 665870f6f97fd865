"""Where `make test-arm` gets packages of another release of Debian from."""

from __future__ import annotations

import pytest
from arm.debian import of_release
from arm.paths import ProgramError

ABOUT = 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nVERSION_CODENAME=bookworm\nID=debian\n'


def test_of_the_same_servers_with_their_updates() -> None:
    text = (
        "# bookworm is Debian 12\nTypes: deb\nURIs: http://mirror.invalid/bookworm/debian\n"
        "Suites: bookworm bookworm-updates\nComponents: main\n"
    )
    assert of_release(text, ABOUT, "trixie") == (
        "# trixie is Debian 12\nTypes: deb\nURIs: http://mirror.invalid/bookworm/debian\n"
        "Suites: trixie trixie-updates\nComponents: main\n"
    )


def test_one_line_per_source() -> None:
    text = "deb [trusted=yes] http://mirror.invalid/debian bookworm main\n"
    assert of_release(text, ABOUT, "trixie") == text.replace("bookworm", "trixie")


@pytest.mark.parametrize("about", ["ID=ubuntu\nVERSION_CODENAME=noble\n", "ID=debian\n", ""])
def test_another_system_has_none(about: str) -> None:
    with pytest.raises(ProgramError, match="this is not Debian"):
        of_release("deb http://mirror.invalid noble main\n", about, "trixie")
