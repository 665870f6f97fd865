"""The program a case runs in: a request as JSON on standard input, one JSON line as the answer.

A process per case keeps peak figures apart, lets a cgroup bound it, and contains crashes: ggml
ends the process on some errors.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from mimo_edge.errors import MimoEdgeError


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Measure what `request` describes. Raises MimoEdgeError."""
    if request["engine"] == "llama.cpp":
        from mimo_edge.bench import llamacpp_worker

        return llamacpp_worker.measure(request)
    from mimo_edge.bench import engine_worker
    from mimo_edge.bench.cases import Case, Settings

    return engine_worker.measure(
        Case(**request["case"]),
        Settings(**request["settings"]),
        request["repetitions"],
        request["first"],
    )


def main() -> None:
    """Read the request, print the answer or {"error": ...}."""
    request = json.load(sys.stdin)
    # Libraries print where they like; the answer goes to the real standard output alone.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        found = answer(request)
    except MimoEdgeError as error:
        found = {"error": error_dict(error)}
    json.dump(found, out)
    out.flush()


def error_dict(error: MimoEdgeError) -> dict[str, str]:
    """JSON-ready form of a typed error."""
    return {"type": type(error).__name__, "message": error.message, "hint": error.hint}


if __name__ == "__main__":
    main()
