"""Execution providers: which one runs the graphs, and the variant of the package it takes.

What was asked for by name is never replaced by another. "auto" takes an NPU that is a device's own
and that the bundle has graphs for, else the CPU, and says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mimo_edge.errors import ProviderError
from mimo_edge.provider_request import AUTO, CPU, QNN, ProviderRequest
from mimo_edge.runtimes.onnx import qnn
from mimo_edge.runtimes.onnx.plugin import Plugin

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class OnCpu:
    """ONNX Runtime's own kernels; `reason`: why "auto" took them, empty when they were asked
    for."""

    reason: str = ""


@dataclass(frozen=True)
class OnNpu:
    """Compiled graphs on Qualcomm's provider; `target` None: the only one there is."""

    target: str | None
    qnn: qnn.Qnn


@dataclass(frozen=True)
class OnPlugin:
    """The graphs of the CPU on a plug-in."""

    plugin: Plugin


Choice = OnCpu | OnNpu | OnPlugin


def choose(request: ProviderRequest, compiled: Sequence[str]) -> Choice:
    """What is to run a bundle that has graphs for the NPUs `compiled`. Raises ProviderError for a
    provider that was asked for and cannot be had."""
    if request.kind == CPU:
        return OnCpu()
    if request.kind == QNN:
        found = qnn.Qnn(request.library, {**request.profile_options, **request.options})
        found.plugin(None)  # raises when there is none
        return OnNpu(request.target or _known(request, compiled), found)
    if request.kind != AUTO:
        assert request.library is not None  # ProviderRequest sees to it
        return OnPlugin(Plugin(request.ep, request.library, request.options))
    if reason := _why_no_npu(request, compiled):
        return OnCpu(reason)
    return OnNpu(_known(request, compiled), qnn.Qnn(options=dict(request.profile_options)))


def open_chosen(
    request: ProviderRequest, compiled: Sequence[str], opened: Callable[[Choice], _T]
) -> _T:
    """`opened` of the provider chosen. Where "auto" chose an NPU that then refuses, that of the
    CPU, with a warning. Raises as `choose`, and what `opened` raises."""
    choice = choose(request, compiled)
    if request.kind != AUTO or isinstance(choice, OnCpu):
        return opened(choice)
    try:
        return opened(choice)
    except ProviderError as error:
        _log.warning("the CPU runs this model, because the NPU does not: %s", error)
        return opened(OnCpu(error.message))


def _known(request: ProviderRequest, compiled: Sequence[str]) -> str | None:
    """The target of a bundle's graphs that a device profile names."""
    return next((name for name in request.targets if name in compiled), None)


def _why_no_npu(request: ProviderRequest, compiled: Sequence[str]) -> str:
    """Why "auto" leaves the NPU alone; empty when it takes it."""
    if not compiled:
        return "the bundle has no graphs for an NPU"
    if reason := qnn.why_unavailable():
        return reason
    if qnn.emulated():
        return "the only NPU here is an emulator: --ep qnn runs on it"
    if _known(request, compiled) is None and (request.targets or len(compiled) > 1):
        have = ", ".join(compiled)
        named = ", ".join(request.targets)
        return (
            f"the bundle has graphs for {have}, the device profile names {named}"
            if named
            else f"the bundle has graphs for {have}, and no device profile says which NPU this is"
        )
    return ""
