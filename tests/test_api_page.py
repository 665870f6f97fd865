"""docs/api.md is what the docstrings say, and leaves out nothing that is public."""

from __future__ import annotations

import api_page

import mimo_edge
from mimo_edge.errors import MimoEdgeError


def test_the_page_is_what_the_docstrings_say() -> None:
    assert api_page.PAGE.read_text("utf-8") == api_page.page(), (
        "a docstring changed: run python tools/api_page.py"
    )


def test_every_public_name_is_on_it() -> None:
    page = api_page.page()
    apart = {"__version__", "MimoEdgeError", "MimoConfig"}
    for name in set(mimo_edge.__all__) - apart:
        assert f"### {name} *\n" in page, name
    for error in MimoEdgeError.__subclasses__():
        assert error.__name__ in page
