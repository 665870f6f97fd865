"""Says by its exit status whether the installed libggml leaves AMX out, as `make setup` builds it.

On a processor with AMX a library with it ends llama.cpp, the oracle of the tests and the other
side of benchmarks, with SIGSEGV (docs/decisions.md, "AMX is not used"). pip may have kept a wheel
that was built with it.
"""

from __future__ import annotations

import sys

from mimo_edge.runtimes.ggml.bindings import bindings, extra_buffer_types


def offered() -> list[str]:
    """Names of the memory types that store weights in another order."""
    ggml = bindings()
    device = ggml.ggml_backend_get_device(ggml.ggml_backend_cpu_init())
    kinds = extra_buffer_types(ggml, device)
    return [ggml.ggml_backend_buft_name(kind).decode() for kind in kinds]


if __name__ == "__main__":
    if "AMX" in offered():
        print("libggml was built with AMX, which no model survives here", file=sys.stderr)
        sys.exit(1)
