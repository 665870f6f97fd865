"""Execution providers that are plug-ins of ONNX Runtime: libraries loaded by path.

What is asked of such a provider runs there or fails: sessions are made with the CPU as a fallback
forbidden, and the assignment of every node is looked at afterwards, because a provider that does
not load, or refuses a node, otherwise leaves a session that silently computes on the CPU.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mimo_edge.errors import ProviderError
from mimo_edge.runtimes.onnx.library import first_line, onnxruntime

_RECORDED = ("session.record_ep_graph_assignment_info", "1")
_NO_FALLBACK = ("session.disable_cpu_ep_fallback", "1")
_VERBOSE = 0
_SHOWN_NODES = 8
# Two lines in which a provider's log says why it leaves a node out (onnxruntime-qnn's).
_LOGGED_NODE = re.compile(r"Node name: (\S+) Node index")
_LOGGED_REASON = re.compile(r"REASON : (.+)")

Nodes = list[tuple[str, str]]
"""Nodes by (name, operator)."""


@dataclass(frozen=True)
class Plugin:
    """A provider, as it calls itself, the file it is in, and its options. `hint` says what to do
    when it cannot be used."""

    name: str
    library: Path
    options: Mapping[str, str] = field(default_factory=dict)
    hint: str = "use --ep cpu"

    def devices(self) -> list[Any]:
        """What it can run on here; its library is loaded into this process, once. Raises
        ProviderError when the file does not load or finds no device."""
        ort = onnxruntime()
        if found := _devices(self.name):
            return found
        if not self.library.is_file():
            raise ProviderError(f"{self.name}: there is no file {self.library}", self.hint)
        before = {device.ep_name for device in ort.get_ep_devices()}
        try:
            ort.register_execution_provider_library(self.name, str(self.library))
        except Exception as error:  # onnxruntime raises its own and RuntimeError
            raise ProviderError(
                f"{self.name}: {self.library} does not load: {first_line(error)}", self.hint
            ) from error
        if found := _devices(self.name):
            return found
        others = sorted({device.ep_name for device in ort.get_ep_devices()} - before)
        ort.unregister_execution_provider_library(self.name)
        raise ProviderError(
            f"{self.library} is the provider {', '.join(others)}, not {self.name}"
            if others
            else f"{self.name} finds no device on this machine",
            self.hint,
        )

    def session(
        self, model: Path | bytes, options: Any, config: Mapping[str, str] | None = None
    ) -> Any:
        """A session with every node on the provider; `options` are its session options so far,
        `config` further entries. Raises ProviderError naming the nodes that are not, with the
        reason the provider gives, if it does."""
        devices = self.devices()
        source = model if isinstance(model, bytes) else str(model)
        for key, value in (_NO_FALLBACK, _RECORDED, *(config or {}).items()):
            options.add_session_config_entry(key, value)
        try:
            options.add_provider_for_devices(devices, dict(self.options))
            session = onnxruntime().InferenceSession(source, options)
        except Exception as error:  # its exceptions share no base class but Exception
            raise self._refusal(source, config or {}, error) from error
        session.disable_fallback()
        self.assert_assigned(session)
        return session

    def assert_assigned(self, session: Any) -> int:
        """Check that all of a session's nodes are the provider's; the number of partitions.

        Raises ProviderError with the first nodes that are not."""
        partitions, elsewhere = self._assignment(session)
        if elsewhere or not partitions:
            raise self._not_used(elsewhere, {})
        return partitions

    @contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """Errors of ONNX Runtime in the block as ProviderError: "the model could not be `what`"."""
        try:
            yield
        except ProviderError:
            raise
        except Exception as error:
            raise ProviderError(
                f"the model could not be {what} by {self.name}: {first_line(error)}", self.hint
            ) from error

    def _assignment(self, session: Any) -> tuple[int, Nodes]:
        """Partitions on the provider, and the nodes that are elsewhere."""
        partitions, elsewhere = 0, []
        for part in session.get_provider_graph_assignment_info():
            if part.ep_name == self.name:
                partitions += 1
            else:
                elsewhere += [
                    (node.name or node.op_type, node.op_type) for node in part.get_nodes()
                ]
        return partitions, elsewhere

    def _refusal(
        self, source: str | bytes, config: Mapping[str, str], error: Exception
    ) -> ProviderError:
        """What to say of a model that does not open. ONNX Runtime names no node: so it is asked
        once more, with the CPU allowed, which nodes it would run there, and what the provider logs
        about them is read."""
        other = ProviderError(
            f"the model could not be opened by {self.name}: {first_line(error)}", self.hint
        )
        if "fallback" not in str(error):
            return other
        ort = onnxruntime()
        options = ort.SessionOptions()
        # Nothing is compiled into a file for this.
        entries = {key: value for key, value in config.items() if not key.startswith("ep.context")}
        for key, value in (_RECORDED, *entries.items()):
            options.add_session_config_entry(key, value)
        options.log_severity_level = _VERBOSE
        try:
            with _said() as said:
                options.add_provider_for_devices(self.devices(), dict(self.options))
                session = ort.InferenceSession(source, options)
        except Exception:
            return other
        return self._not_used(self._assignment(session)[1], _reasons(said))

    def _not_used(self, elsewhere: Nodes, reasons: Mapping[str, str]) -> ProviderError:
        shown = [
            f"{name} ({op})" + (f": {reasons[name]}" if name in reasons else "")
            for name, op in elsewhere[:_SHOWN_NODES]
        ]
        more = len(elsewhere) - _SHOWN_NODES
        return ProviderError(
            f"{self.name} was asked for and does not run "
            + (", ".join(shown) or "anything: no node at all was given to it")
            + (f" and {more} more nodes" if more > 0 else ""),
            self.hint,
        )


def _devices(name: str) -> list[Any]:
    return [device for device in onnxruntime().get_ep_devices() if device.ep_name == name]


def _reasons(lines: Iterable[str]) -> dict[str, str]:
    """By node, why a provider's log says it is left out."""
    found: dict[str, str] = {}
    node = ""
    for line in lines:
        if match := _LOGGED_NODE.search(line):
            node = match[1]
        elif (match := _LOGGED_REASON.search(line)) and node:
            found.setdefault(node, match[1].strip())
            node = ""
    return found


@contextmanager
def _said() -> Iterator[list[str]]:
    """Lines that libraries write to standard error meanwhile, known afterwards: ONNX Runtime's
    default logger writes nowhere else."""
    made: list[str] = []
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        kept = os.dup(2)
        try:
            os.dup2(file.fileno(), 2)
            yield made
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            made += file.read().decode(errors="replace").splitlines()
