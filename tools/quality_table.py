"""Quality of every recipe on mimo-nano: writes the table of docs/quality.md.

    python tools/quality_table.py [--checkpoint DIR] [--limit N] [--only ROW ...] [--dry-run]

Exports the checkpoint with each recipe and measures the source and every bundle on the whole
held-out set: the right answers teacher-forced against the source, then exact-match tool calls
with greedy drafting. Each finished row is kept in docs/quality.json and not measured again while
checkpoint, commands, calibration and recipe stay the same, so a run that was cut short goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mimo_edge
from mimo_edge.api import Runtime
from mimo_edge.errors import MimoEdgeError, UsageError
from mimo_edge.evaluate import answer_chunks, evaluate_commands, evaluate_text
from mimo_edge.export.calibrate import IMATRIX_NAME, calibrate_checkpoint
from mimo_edge.export.checkpoint import Checkpoint
from mimo_edge.export.pipeline import export_bundle
from mimo_edge.model_source import open_model
from mimo_edge.nano import commands as nano
from mimo_edge.quant.recipe import Recipe
from mimo_edge.runtimes.base import F32, Cache, ForwardResult, TokenIds
from mimo_edge.suites import spread

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- quality table: begin -->", "<!-- quality table: end -->"
SCHEMA = 1
CONTEXT = 1024
DRAFT = 3


@dataclass(frozen=True)
class Row:
    """One line of the table. `recipe` None is the source itself."""

    key: str
    title: str
    recipe: str | None
    calibrated: bool = False


ROWS = (
    Row("source", "source, FP8", None),
    Row("q8_0", "Q8_0", "q8_0"),
    Row("q4_0", "Q4_0 (default: phone, router)", "q4_0"),
    Row("q4_0-imatrix", "Q4_0 with imatrix", "q4_0", calibrated=True),
    Row("q4_k", "Q4_K (default: car, workstation)", "q4_k"),
    Row("q4_k-imatrix", "Q4_K with imatrix", "q4_k", calibrated=True),
    Row("mxfp4", "MXFP4", "mxfp4"),
    Row("q3_k", "Q3_K", "q3_k"),
    Row("q3_k-imatrix", "Q3_K with imatrix", "q3_k", calibrated=True),
    Row("q2_k", "Q2_K", "q2_k"),
    Row("q2_k-imatrix", "Q2_K with imatrix", "q2_k", calibrated=True),
)


class Remembered:
    """The source as a backend that computes every text once: all rows compare with the same logits.

    Texts must fit one call, as the right answers do; the logits of all of them take
    4 * vocabulary bytes per scored token, 144 MB for mimo-nano.
    """

    name = "remembered"

    def __init__(self, checkpoint: Path) -> None:
        self.model = open_model(checkpoint, "reference", None, CONTEXT, None)
        self.config = self.model.backend.config
        self._logits: dict[bytes, F32] = {}

    def new_cache(self, context: int, verify_rows: int = 4) -> Cache:
        """A cache of the model itself."""
        return self.model.backend.new_cache(context, verify_rows)

    def forward(
        self, token_ids: TokenIds, cache: Cache, *, logits_rows: int = 1, hidden_rows: int = 0
    ) -> ForwardResult:
        """The logits of a whole text, computed or remembered."""
        if cache.length or hidden_rows:
            raise UsageError("only whole texts, and only their logits, are remembered")
        key = token_ids.tobytes() + logits_rows.to_bytes(8, "little")
        if key not in self._logits:
            result = self.model.backend.forward(token_ids, cache, logits_rows=logits_rows)
            self._logits[key] = result.logits.copy()
        return ForwardResult(self._logits[key], np.empty((0, self.config.hidden_size), np.float32))

    def mtp_forward(
        self, depth: int, token_ids: TokenIds, hidden: F32, position: int, cache: Cache
    ) -> F32:
        """Nothing to remember."""
        raise UsageError("only whole texts are remembered")

    def close(self) -> None:
        """Release the model and what is remembered."""
        self.model.backend.close()
        self._logits.clear()


def main() -> int:
    options = _options()
    os.nice(options.nice)
    rows = [row for row in ROWS if not options.only or row.key in options.only]
    commands = spread(nano.held_out(), options.limit)
    calibration_text = nano.calibration_text().encode()
    facts = {
        "schema": SCHEMA,
        "tool_version": mimo_edge.__version__,
        "checkpoint_sha256": _folder_hash(options.checkpoint),
        "commands": len(commands),
        "commands_sha256": _hash(json.dumps(commands, sort_keys=True).encode()),
        "calibration_sha256": _hash(calibration_text),
        "draft": DRAFT,
        "backend": options.backend,
    }
    results = _finished(options.json, facts)
    source = Remembered(options.checkpoint)
    with tempfile.TemporaryDirectory(prefix="mimo-quality-") as folder:
        work = Path(folder)
        (work / "calibration.txt").write_bytes(calibration_text)
        calibration: Path | None = None
        for row in rows:
            if _recipe_of(row) == results.get(row.key, {}).get("recipe", "missing"):
                _say(f"{row.key}: kept from {options.json.name}")
                continue
            if row.calibrated and calibration is None:
                _say(f"calibrating on {len(calibration_text)} bytes of text")
                # Through files, as `export --calibrate` goes, so that the bundles are the same.
                measured = calibrate_checkpoint(
                    options.checkpoint, work / "calibration.txt", progress=_counter("calibrate")
                )
                measured.save(work / "calibration")
                calibration = work / "calibration" / IMATRIX_NAME
                _say(f"calibrated on {measured.tokens} tokens, unseen: {measured.unseen}")
            row_result = _measure(
                row, source, options.checkpoint, work, calibration, commands, options.backend
            )
            if _folder_hash(options.checkpoint) != facts["checkpoint_sha256"]:
                raise UsageError(f"{options.checkpoint} changed while it was measured")
            results[row.key] = row_result
            if not options.dry_run:
                _write(
                    options.json,
                    json.dumps({"facts": facts, "rows": results}, indent=1, ensure_ascii=False)
                    + "\n",
                )
    table = _table(results, facts)
    print(table)
    if not options.dry_run:
        _insert(options.markdown, table)
    return 0


def _measure(
    row: Row,
    source: Remembered,
    checkpoint: Path,
    work: Path,
    calibration: Path | None,
    commands: list[dict[str, Any]],
    backend: str,
) -> dict[str, Any]:
    began = time.perf_counter()
    model = checkpoint
    size = sum(p.stat().st_size for p in checkpoint.glob("*.safetensors"))
    if row.recipe is not None:
        model = work / row.key
        bundle = export_bundle(
            checkpoint,
            model,
            recipe=row.recipe,
            calibration=calibration if row.calibrated else None,
        )
        size = sum(p.stat().st_size for p in bundle.gguf.files)
        bundle.close()
    # A checkpoint has no packed weights: only the reference backend runs it.
    runs_on = "reference" if row.recipe is None else backend
    candidate = open_model(model, runs_on, None, CONTEXT, None)
    try:
        tokenizer = source.model.tokenizer
        assert tokenizer is not None
        chunks = answer_chunks(tokenizer, source.model.template, commands, nano.TOOLS)
        text = evaluate_text(
            source,
            source if row.recipe is None else candidate.backend,
            chunks,
            progress=_counter(f"{row.key}: text"),
        )
        _say(f"{row.key}: perplexity {text.perplexity:.4f}, KL {text.mean_kl:.5f}")
        answers = evaluate_commands(
            Runtime(candidate, CONTEXT, DRAFT),
            commands,
            nano.TOOLS,
            progress=_counter(f"{row.key}: commands"),
        )
    finally:
        candidate.backend.close()
    _say(
        f"{row.key}: {answers.total.exact} of {answers.total.commands} exact, "
        f"{answers.tokens_per_verify:.2f} tokens per verify, "
        f"{time.perf_counter() - began:.0f} s"
    )
    return {
        "title": row.title,
        "recipe": _recipe_of(row),
        "bytes": size,
        "text": text.to_dict(),
        "commands": answers.to_dict(),
        "machine": platform.machine(),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _recipe_of(row: Row) -> dict[str, Any] | None:
    """What a row was made with: a changed recipe makes it stale."""
    if row.recipe is None:
        return None
    return Recipe.named(row.recipe).to_dict() | {"calibrated": row.calibrated}


# --- the table -------------------------------------------------------------------------------


def _table(results: dict[str, Any], facts: dict[str, Any]) -> str:
    lines = [
        BEGIN,
        f"mimo-nano {facts['checkpoint_sha256'][:12]}, {facts['commands']} held-out commands, "
        f"greedy, {facts['draft']} drafts. "
        f"Source on the reference backend, bundles on {facts['backend']}.",
        "",
        "| weights | MB | perplexity | mean KL | 99 % KL | same top-1 | exact match "
        "| against source | tokens per verify |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    base = results.get("source")
    wrong = {f["id"] for f in base["commands"]["failures"]} if base else set()
    for row in ROWS:
        result = results.get(row.key)
        if result is None:
            continue
        text, answers = result["text"], result["commands"]
        against = ""
        if base is not None and row.key != "source":
            failed = {f["id"] for f in answers["failures"]}
            points = 100 * (answers["exact_rate"] - base["commands"]["exact_rate"])
            against = f"{points:+.2f} (-{len(failed - wrong)} +{len(wrong - failed)})"
        lines.append(
            f"| {row.title} | {result['bytes'] / 1e6:.1f} | {text['perplexity']:.4f} "
            f"| {text['mean_kl']:.5f} | {text['kl_p99']:.4f} "
            f"| {100 * text['top1_agreement']:.2f} % | {100 * answers['exact_rate']:.2f} % "
            f"| {against} | {answers['tokens_per_verify']:.2f} |"
        )
    return "\n".join([*lines, END])


def _insert(path: Path, table: str) -> None:
    """Replace what lies between the markers. Raises UsageError when they are not there."""
    content = path.read_text("utf-8")
    if content.count(BEGIN) != 1 or content.count(END) != 1:
        raise UsageError(f"{path} does not have one pair of table markers")
    head, rest = content.split(BEGIN)
    _write(path, head + table + rest.split(END)[1])


def _finished(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Rows measured before under the same conditions."""
    if not path.exists():
        return {}
    kept = json.loads(path.read_text("utf-8"))
    if kept["facts"] != facts:
        changed = [key for key in facts if kept["facts"].get(key) != facts[key]]
        _say(f"{path.name} was measured with other {', '.join(changed)}: starting over")
        return {}
    return dict(kept["rows"])


def _folder_hash(folder: Path) -> str:
    """One hash over everything a model is: weights, config, tokenizer and template."""
    with Checkpoint.open(folder) as checkpoint:
        names = {*checkpoint.files, "config.json", *checkpoint.tokenizer_files}
    total = hashlib.sha256()
    for name in sorted(names):
        total.update(f"{name}\0{_hash((folder / name).read_bytes())}\n".encode())
    return total.hexdigest()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write(path: Path, content: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(content, "utf-8")
    part.replace(path)


def _counter(what: str) -> Callable[[int, int], None]:
    """Progress on stderr, at most once in ten seconds."""
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            _say(f"{what} {done} of {total}")

    return report


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, default=nano.checkpoint_dir(), help="default: mimo-nano")
    add("--limit", type=int, help="evaluate only N of the commands")
    add("--only", nargs="*", choices=[row.key for row in ROWS], help="only these rows")
    add("--backend", choices=("ggml", "reference"), default="ggml", help="what runs the bundles")
    add("--json", type=Path, default=ROOT / "docs" / "quality.json")
    add("--markdown", type=Path, default=ROOT / "docs" / "quality.md")
    add("--nice", type=int, default=10, help="scheduling priority; 0 where nothing else runs")
    add("--dry-run", action="store_true", help="print the table, write nothing")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MimoEdgeError as error:
        sys.exit(f"error: {error}")
