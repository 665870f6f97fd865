"""Exact tool calls of mimo-nano: reference, CPU, and Qualcomm's HTP emulator in both precisions.

    python tools/npu_exact.py FOLDER --commands 24 --npu v73 --minutes 4 [--write]

Exports what is missing into FOLDER, then asks each the same held-out commands, spread over the set,
with three drafts. The emulator takes many seconds a command: answers are kept in FOLDER, and a run
that `--minutes` ended goes on from there when it is started again. `--write` puts the table into
docs/npu.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from tables import Deadline, Rows, add_minutes, command, markdown, write_section

from mimo_edge.api import Runtime
from mimo_edge.evaluate import evaluate_commands
from mimo_edge.export.pipeline import export_bundle
from mimo_edge.nano import commands as nano
from mimo_edge.suites import CONTEXT, spread

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "npu.md"
# Attention, feed-forward and head at 4 bits, which no recipe asks of a model this small.
INT4 = [(name, "Q4_0") for name in ("blk.?.attn_*", "blk.?.ffn_*", "output.weight")]


class Kinds:
    """What is compared, opened when it is asked first."""

    def __init__(self, folder: Path, npu: str) -> None:
        self._folder = folder
        self._npu = npu
        self._open: dict[str, Runtime] = {}
        onnx = {"backend": "onnx"}
        emulated = f"HTP emulator, {{}}, {npu}"
        self.openers: dict[str, Callable[[], Runtime]] = {
            "reference, the checkpoint": lambda: self._runtime("mimo-nano", backend="reference"),
            "CPU, 8-bit dense part, int4 experts": lambda: self._runtime(
                self._bundle("int4"), ep="cpu", **onnx
            ),
            "CPU, int4 dense part, int4 experts": lambda: self._runtime(
                self._bundle("int4-dense", overrides=INT4, formats=("both",)), ep="cpu", **onnx
            ),
            emulated.format("fp16"): lambda: self._runtime(
                self._bundle("fp16", npu_precision="fp16"), ep="qnn", **onnx
            ),
            emulated.format("LPBQ int4 with u16 activations"): lambda: self._runtime(
                self._bundle("int4"), ep="qnn", **onnx
            ),
        }

    def get(self, kind: str) -> Runtime:
        """The runtime of a kind; that of another is closed."""
        if kind not in self._open:
            self.close()
            self._open[kind] = self.openers[kind]()
        return self._open[kind]

    def close(self) -> None:
        """Close what is open."""
        while self._open:
            self._open.popitem()[1].close()

    def _runtime(self, model: str | Path, **options: Any) -> Runtime:
        return Runtime.open(model, context=CONTEXT // 4, draft=3, threads=1, **options)

    def _bundle(self, name: str, **options: Any) -> Path:
        path = self._folder / name
        if not path.exists():
            text = resources.files("mimo_edge.nano") / "calibration.txt"
            if "overrides" not in options:
                options |= {"npu": self._npu, "npu_context": CONTEXT // 4}
            with resources.as_file(text) as calibration:
                export_bundle("mimo-nano", path, calibration=calibration, **options).close()
        return path


def answer(kinds: Kinds, kind: str, asked: dict[str, Any]) -> list[str]:
    """Whether one command is answered exactly, tokens, and verifies they took."""
    found = evaluate_commands(kinds.get(kind), [asked], nano.TOOLS)
    return [str(found.total.exact), str(found.tokens), str(found.verifies)]


def table(rows: Rows, kinds: Kinds, asked: list[dict[str, Any]], deadline: Deadline) -> str:
    """The table, with as many commands of each kind as there was time for."""
    lines = [["", "commands", "exact", "tokens per verify"]]
    for kind in kinds.openers:
        cells = []
        for one in asked:
            key = f"{kind}: {one['id']}"
            cells.append(rows.get(key, deadline, partial(answer, kinds, kind, one)))
        done = [[int(cell) for cell in row] for row in cells if row]
        exact, tokens, verifies = (sum(row[i] for row in done) for i in range(3))
        per = f"{tokens / verifies:.2f}" if verifies else "-"
        lines.append([kind, f"{len(done)}", f"{exact}", per])
    return markdown(lines)


@command
def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--commands", type=int, default=24)
    parser.add_argument("--npu", default="v73")
    parser.add_argument("--write", action="store_true")
    add_minutes(parser, 4)
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    kinds, deadline = Kinds(options.folder, options.npu), Deadline(options.minutes)
    asked = spread(nano.held_out(), options.commands)
    try:
        text = table(Rows(options.folder / "answers.json"), kinds, asked, deadline)
    finally:
        kinds.close()
    print(text)
    if options.write:
        write_section("exact calls", text, document=DOCUMENT)


if __name__ == "__main__":
    raise SystemExit(main())
