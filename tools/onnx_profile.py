"""Where the time of the ONNX backend goes: operators of ONNX Runtime, experts, everything else.

    python tools/onnx_profile.py BUNDLE --prefill 512 --decode 16 --threads 2

Says for a prompt and for single tokens how many milliseconds a pass takes in each kind of node, in
the routed experts (ggml) and in Python, and which nodes take most. ONNX Runtime's own profiler
measures the nodes, which costs a little: compare shares, not speeds. A node is named as in the
graph, layers added up (L*).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from mimo_edge.api import Runtime
from mimo_edge.runtimes.onnx.experts import HostExperts

_SHOWN = 12


class Profiled:
    """Sessions made while this is entered write profiles; `experts_s` counts the experts' time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sessions: list[Any] = []
        self._original = onnxruntime.InferenceSession
        self._add = HostExperts.add
        self.experts_s = 0.0

    def __enter__(self) -> Profiled:
        def session(model: Any, options: Any, **rest: Any) -> Any:
            options.enable_profiling = True
            options.profile_file_prefix = str(self._folder / f"s{len(self._sessions)}")
            self._sessions.append(self._original(model, options, **rest))
            return self._sessions[-1]

        def add(experts: HostExperts, *arguments: Any) -> None:
            start = time.perf_counter()
            self._add(experts, *arguments)
            self.experts_s += time.perf_counter() - start

        onnxruntime.InferenceSession = session
        HostExperts.add = add  # type: ignore[assignment, method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        onnxruntime.InferenceSession = self._original
        HostExperts.add = self._add  # type: ignore[method-assign]

    def nodes(self, since_us: float) -> tuple[Counter[str], Counter[str]]:
        """Microseconds by kind of node and by node, of events begun `since_us` after the first."""
        kinds: Counter[str] = Counter()
        names: Counter[str] = Counter()
        for session in self._sessions:
            start_us = session.get_profiling_start_time_ns() / 1e3
            for event in json.loads(Path(session.end_profiling()).read_text()):
                if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
                    continue
                if start_us + event["ts"] < since_us:
                    continue
                kinds[event["args"]["op_name"]] += event["dur"]
                name = event["name"].removesuffix("_kernel_time")
                names[re.sub(r"^(/?)L\d+", r"\1L*", name)] += event["dur"]
        return kinds, names


def profile(bundle: str, what: str, count: int, threads: int) -> None:
    """Print where the time of a prompt of `count` tokens goes, or of `count` single tokens."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Profiled(Path(folder)) as profiled,
        Runtime.open(bundle, backend="onnx", threads=threads, draft=0) as runtime,
    ):
        backend = runtime.engine.backend
        ids = np.random.default_rng(0).integers(0, runtime.config.vocab_size, 640)
        cache = backend.new_cache(1024)
        backend.forward(ids[:128].astype(np.int32), cache)
        if what == "prefill":
            cache = backend.new_cache(1024)
            backend.forward(ids[:count].astype(np.int32), cache)  # graphs and pages
            cache = backend.new_cache(1024)
        else:
            backend.forward(ids[128:130].astype(np.int32), cache)
            backend.forward(ids[130:131].astype(np.int32), cache)
        profiled.experts_s = 0.0
        began_us = time.time_ns() / 1e3  # the clock of the profiles
        start = time.perf_counter()
        if what == "prefill":
            backend.forward(ids[:count].astype(np.int32), cache)
        else:
            for token in ids[131 : 131 + count]:
                backend.forward(np.array([token], np.int32), cache)
        total = time.perf_counter() - start
        kinds, names = profiled.nodes(began_us)
    passes = 1 if what == "prefill" else count
    in_nodes = sum(kinds.values()) / 1e6
    rest = total - in_nodes - profiled.experts_s
    print(f"{what} of {count}, {threads} threads: {total / passes * 1e3:.2f} ms a pass")
    rows = [("experts (ggml)", profiled.experts_s * 1e6), ("Python, calls", rest * 1e6)]
    rows += kinds.most_common()
    for name, us in sorted(rows, key=lambda row: -row[1])[:_SHOWN]:
        print(f"  {name:24} {us / passes / 1e3:9.3f} ms {us / 1e4 / total:5.1f} %")
    print("  nodes that take most:")
    for name, us in names.most_common(_SHOWN):
        print(f"    {name:40} {us / passes / 1e3:9.3f} ms {us / 1e4 / total:5.1f} %")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("bundle")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.prefill:
        profile(options.bundle, "prefill", options.prefill, options.threads)
    if options.decode:
        profile(options.bundle, "decode", options.decode, options.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
