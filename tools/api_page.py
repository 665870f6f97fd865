"""The API's page: signatures and docstrings of what the package offers, written to docs/api.md.

    python tools/api_page.py [--check]

`--check` writes nothing and fails when the page is not what the docstrings say now.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mimo_edge import errors
from mimo_edge.agent import Agent, AgentResult, Step
from mimo_edge.api import Runtime
from mimo_edge.bundle import Bundle
from mimo_edge.conversation import Conversation
from mimo_edge.engine import GenerationStats
from mimo_edge.export.pipeline import export_bundle
from mimo_edge.governor import Battery, Bound, MemoryReading, Sensors, SystemSensors
from mimo_edge.planner import Plan, plan
from mimo_edge.remote.address import Connection
from mimo_edge.remote.policy import Choice, Policy
from mimo_edge.remote.routed import RoutedRuntime, RoutedSession
from mimo_edge.remote.runtime import RemoteRuntime
from mimo_edge.remote.session import RemoteSession
from mimo_edge.reply import Piece, Reply
from mimo_edge.sampling import SamplingParams
from mimo_edge.session import Session
from mimo_edge.tool_calls import Malformed, ToolCall
from mimo_edge.tool_functions import Tool, tool

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"

HEAD = """# API reference

Made from the docstrings by `python tools/api_page.py`: change those, not this page. Names marked
with * are at the top, as `mimo_edge.Runtime`; the others are what these give or raise.
"""

PARTS: dict[str, list[Any]] = {
    "Runtimes and sessions": [
        Runtime,
        Session,
        Conversation,
        Piece,
        Reply,
        GenerationStats,
        SamplingParams,
    ],
    "Tools and agents": [tool, Tool, ToolCall, Malformed, Agent, AgentResult, Step],
    "Models on other machines": [
        Connection,
        RemoteRuntime,
        RemoteSession,
        Policy,
        RoutedRuntime,
        RoutedSession,
        Choice,
    ],
    "Heat, battery and memory of a device": [
        Sensors,
        SystemSensors,
        MemoryReading,
        Bound,
        Battery,
    ],
    "Bundles and plans": [export_bundle, Bundle, plan, Plan],
}


def page() -> str:
    """The whole page."""
    import mimo_edge

    lines = [HEAD]
    for title, members in PARTS.items():
        lines.append(f"## {title}\n")
        for member in members:
            mark = " *" if member.__name__ in mimo_edge.__all__ else ""
            lines.append(f"### {member.__name__}{mark}\n")
            lines += _described(member)
    lines += ["## Errors\n", *_text(errors)]
    return "\n".join(lines).rstrip() + "\n"


def _described(member: Any) -> Iterator[str]:
    yield _code(_signature(member.__name__, member))
    yield from _text(member)
    if not inspect.isclass(member):
        return
    if Conversation in member.__bases__:
        yield f"And what every `{Conversation.__name__}` has.\n"
    for name, value in vars(member).items():
        if name.startswith("_"):
            continue
        if isinstance(value, property):
            yield f"**`{name}`** {_line(value)}\n"
            continue
        function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if inspect.isfunction(function):
            yield f"#### {member.__name__}.{name}\n"
            yield _code(_signature(name, function))
            yield from _text(function)


def _signature(name: str, member: Any) -> str:
    signature = inspect.signature(member)
    shown = [p for n, p in signature.parameters.items() if n not in ("self", "cls")]
    parts = list(_parameters(shown))
    ending = ""
    if signature.return_annotation is not inspect.Signature.empty and not inspect.isclass(member):
        ending = f" -> {_type(signature.return_annotation)}"
    text = f"{name}({', '.join(parts)}){ending}"
    if len(text) <= 96:
        return text
    inner = ",\n".join(f"    {part}" for part in parts)
    return f"{name}(\n{inner},\n){ending}"


def _parameters(parameters: list[inspect.Parameter]) -> Iterator[str]:
    keyword = False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword:
            keyword = True
            yield "*"
        text = parameter.name
        if parameter.kind is parameter.VAR_POSITIONAL:
            text = f"*{text}"
        elif parameter.kind is parameter.VAR_KEYWORD:
            text = f"**{text}"
        if parameter.annotation is not parameter.empty:
            text += f": {_type(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            default = repr(parameter.default)
            # What is made anew each time has no name of its own.
            text += f" = {'...' if default.startswith('<') else default}"
        yield text


def _type(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "Any")


def _code(text: str) -> str:
    return f"```python\n{text}\n```\n"


def _text(member: Any) -> Iterator[str]:
    """A docstring; what is indented in it is code."""
    text = inspect.getdoc(member) or ""
    if text.startswith(f"{getattr(member, '__name__', '')}("):
        return  # what a dataclass without a docstring gets
    block: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("    ") or (line[:1] in "├│└" and line):
            block.append(line.removeprefix("    "))
            continue
        if block:
            yield _code("\n".join(block)).replace("```python", "```")
            block = []
        yield line
    if block:
        yield _code("\n".join(block))


def _line(member: Any) -> str:
    return " ".join((inspect.getdoc(member) or "").split())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    if not parser.parse_args().check:
        PAGE.write_text(page(), "utf-8")
    elif page() != PAGE.read_text("utf-8"):
        print("docs/api.md is not what the docstrings say: run tools/api_page.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
