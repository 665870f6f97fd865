"""The server keeps what its own description promises, whatever is sent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("schemathesis", reason="needs the extra dev")

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks
from scripted import END
from serving import Served, scripted

from mimo_edge.serve.openapi import description


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    # A small context ends what a high temperature never would.
    with scripted(["<think>hm</think>Hello." + END], context=300) as (server, _):
        yield server


CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
CASES = [
    (path, method, mode)
    for path, methods in description(False)["paths"].items()
    for method in methods
    for mode in GenerationMode
    if method == "post" or mode is GenerationMode.POSITIVE  # otherwise nothing can be wrong
]


@pytest.mark.parametrize("count", [25, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("path", "method", "mode"), CASES)
def test_what_it_promises(
    served: Served, path: str, method: str, mode: GenerationMode, count: int
) -> None:
    """What the description allows, and what it does not: answered as it says."""
    operation = schemathesis.openapi.from_dict(description(False))[path][method]

    @given(operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=count,
        derandomize=count < 100,  # every change is judged by the same
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    def one(case: Any) -> None:
        case.call_and_validate(base_url=served.url, checks=CHECKS)

    one()


def test_it_still_answers(served: Served) -> None:
    assert served.chat().json()["choices"][0]["message"]["content"] == "Hello."
    served.settled()


def test_every_route_is_described(served: Served) -> None:
    described = set(description(False)["paths"])
    assert set(served.client.get("/openapi.json").json()["paths"]) == described
    for path, methods in description(False)["paths"].items():
        url = path.replace("{name}", "scripted")
        for method in methods:
            status = served.client.request(method, url).status_code
            assert status not in (404, 405), (method, url)
