"""The server keeps what its own description promises, whatever is sent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("schemathesis", reason="needs the extra dev")

import schemathesis
from hypothesis import HealthCheck, settings
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


@pytest.fixture(scope="module")
def api(served: Served) -> Any:
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("api")

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]


@schema.parametrize()
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
def test_what_it_promises(case: Any) -> None:
    case.call_and_validate(checks=CHECKS)


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
