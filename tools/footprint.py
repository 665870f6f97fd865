"""What embedding the engine costs: import time and memory, with nothing but the runtime's packages.

    python tools/footprint.py BUNDLE

Every row is the median of five processes. Memory is what is resident (VmRSS) after the step, less
what the interpreter itself takes: libraries, Python objects, and from the third row on the model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from statistics import median

from tables import markdown

STEPS = (
    ("import mimo_edge", "import mimo_edge"),
    ("the Runtime class", "from mimo_edge import Runtime"),
    ("a bundle opened", "from mimo_edge import Runtime; r = Runtime.open({bundle!r}, threads=1)"),
)
# Packages a device does not have are not there for these processes either.
_CODE = """
import json, sys, time
for name in ("tokenizers", "sentencepiece", "typer", "rich", "onnx", "onnxruntime", "llguidance"):
    sys.modules[name] = None
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
before, began = resident(), time.perf_counter()
{step}
print(json.dumps([time.perf_counter() - began, resident() - before, before]))
"""


def measure(step: str) -> tuple[float, float, float]:
    """(seconds, bytes more, bytes of the interpreter alone), medians of five processes."""
    found = []
    for _ in range(5):
        done = subprocess.run(
            [sys.executable, "-c", _CODE.format(step=step)],
            check=True,
            capture_output=True,
            text=True,
        )
        found.append(json.loads(done.stdout))
    seconds, more, before = (median(row[i] for row in found) for i in range(3))
    return seconds, more, before


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle")
    wanted = parser.parse_args()
    rows = [("step", "ms", "MiB")]
    for name, code in STEPS:
        seconds, more, before = measure(code.format(bundle=wanted.bundle))
        rows.append((name, f"{seconds * 1e3:.0f}", f"{more / 2**20:.1f}"))
    rows.append(("the interpreter alone", "", f"{before / 2**20:.1f}"))
    print(markdown(rows))


if __name__ == "__main__":
    main()
