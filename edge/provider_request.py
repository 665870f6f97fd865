"""Which execution provider of ONNX Runtime is to run a model, as its user asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from mimo_edge.errors import UsageError

AUTO, CPU, QNN = "auto", "cpu", "qnn"


@dataclass(frozen=True)
class ProviderRequest:
    """`ep` is "auto", "cpu", "qnn", "qnn:NPU" (a target such as v73 or sa8255), or the name that
    the plug-in in the file `library` gives its provider; with "qnn" that file is used instead of
    the one in the package onnxruntime-qnn. `options` are the provider's own.

    `profile_options` and `targets` come from a device profile: options of its NPU's provider, which
    `options` win over, and the targets it is, the best first. Raises UsageError.
    """

    ep: str = AUTO
    library: Path | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    profile_options: Mapping[str, str] = field(default_factory=dict)
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("options", "profile_options"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        kind, colon, target = self.ep.partition(":")
        if (kind != QNN and colon) or (colon and not target) or not kind:
            raise UsageError(f"execution provider {self.ep!r}", "use cpu, auto, qnn or qnn:NPU")
        if kind in (AUTO, CPU):
            for what, given in (("a library", self.library), ("options", self.options)):
                if given:
                    raise UsageError(
                        f"{what} of an execution provider without one: ep is {kind!r}",
                        "name the provider: --ep qnn, or the plug-in's",
                    )
        elif kind != QNN and self.library is None:
            raise UsageError(
                f"execution provider {self.ep!r}",
                "use cpu, auto, qnn or qnn:NPU; any other is a plug-in: give its --ep-library",
            )

    @property
    def kind(self) -> str:
        """`ep` without a target."""
        return self.ep.partition(":")[0]

    @property
    def target(self) -> str:
        """The NPU that was named; empty when none was."""
        return self.ep.partition(":")[2]
