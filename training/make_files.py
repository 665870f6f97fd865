"""Write edge/nano/held_out.jsonl and edge/nano/calibration.txt from the grammar (fixed seeds).

python training/make_files.py
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import training  # noqa: F401 (finds mimo_edge in a checkout)

# isort: split

from mimo_edge.nano import commands as grammar
from training import data

ROOT = Path(__file__).parent.parent
CALIBRATION_SEED, CALIBRATION_BYTES = 4711, 80_000


def main() -> None:
    """Entry point."""
    folder = ROOT / "edge" / "nano"
    lines = (json.dumps(r, ensure_ascii=False) for r in grammar.build_held_out())
    (folder / "held_out.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    rng = random.Random(CALIBRATION_SEED)
    text = ""
    while len(text.encode()) < CALIBRATION_BYTES:
        text += "".join(part for part, _ in data.conversation(rng, rng.choice((400, 700, 1000))))
        text += "\n\n"
    (folder / "calibration.txt").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
