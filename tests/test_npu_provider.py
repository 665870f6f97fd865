"""Asking for an NPU where there is none, and the check that nothing runs elsewhere."""

from __future__ import annotations

import importlib.util
import platform
from types import SimpleNamespace
from typing import Any

import pytest

from mimo_edge.errors import ProviderError
from mimo_edge.runtimes.onnx import qnn
from mimo_edge.runtimes.onnx.providers import choose


@pytest.mark.parametrize(
    ("system", "machine", "libc", "reason"),
    [
        ("Linux", "x86_64", ("glibc", "2.36"), r"not installed.*mimo-edge\[npu\]"),
        ("Linux", "x86_64", ("glibc", "2.31"), "needs glibc 2.35, this system has 2.31"),
        ("Linux", "aarch64", ("glibc", "2.34"), "not installed"),
        ("Linux", "aarch64", ("", ""), "musl"),
        ("Linux", "riscv64", ("glibc", "2.40"), "no build we use for Linux riscv64"),
        ("Darwin", "arm64", ("", ""), "no build we use for Darwin arm64"),
    ],
)
def test_a_missing_provider_says_why(
    system: str,
    machine: str,
    libc: tuple[str, str],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "libc_ver", lambda: libc)
    with pytest.raises(ProviderError, match=reason):
        choose("qnn")
    with pytest.raises(ProviderError, match=reason):
        qnn.register()


def session(*parts: tuple[str, list[tuple[str, str]]]) -> Any:
    """A session whose nodes (name, operator) are assigned as given."""
    made = [
        SimpleNamespace(
            ep_name=ep,
            get_nodes=lambda nodes=nodes: [SimpleNamespace(name=n, op_type=o) for n, o in nodes],
        )
        for ep, nodes in parts
    ]
    return SimpleNamespace(get_provider_graph_assignment_info=lambda: made)


def test_nodes_elsewhere_are_named() -> None:
    ours = (qnn.PROVIDER, [("a", "MatMul")])
    assert qnn.assert_assigned(session(ours)) == 1
    cpu = ("CPUExecutionProvider", [("L3.router.best", "TopK"), ("", "Cast")])
    with pytest.raises(ProviderError, match=r"L3\.router\.best \(TopK\) on CPU.*Cast \(Cast\)"):
        qnn.assert_assigned(session(ours, cpu))
    many = ("CPUExecutionProvider", [(f"n{i}", "Add") for i in range(11)])
    with pytest.raises(ProviderError, match=r"n7.* and 3 more"):
        qnn.assert_assigned(session(ours, many))


def test_a_session_without_the_provider_is_an_error() -> None:
    """As when its library did not load: everything runs on the CPU, and nothing says so."""
    with pytest.raises(ProviderError, match="no node at all"):
        qnn.assert_assigned(session())
