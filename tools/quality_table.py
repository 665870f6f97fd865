"""Quality of every recipe on mimo-nano: writes the table of docs/quality.md.

    python tools/quality_table.py [--checkpoint DIR] [--limit N] [--only ROW ...] [--jobs N]
        [--dry-run]

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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

import mimo_edge
from mimo_edge.api import Runtime
from mimo_edge.cache_rows import CacheLayout, LayerRows
from mimo_edge.cancel import Cancel
from mimo_edge.config import MimoConfig
from mimo_edge.errors import MimoEdgeError, UsageError
from mimo_edge.evaluate import TextChunk, answer_chunks, evaluate_commands, evaluate_text
from mimo_edge.export.calibrate import IMATRIX_NAME, calibrate_checkpoint
from mimo_edge.export.checkpoint import Checkpoint
from mimo_edge.export.pipeline import export_bundle
from mimo_edge.model_source import Model, open_model
from mimo_edge.nano import commands as nano
from mimo_edge.quant.recipe import Recipe
from mimo_edge.runtimes.base import F32, VERIFY_ROWS, Backend, Cache, ForwardResult, TokenIds
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


class Recorder:
    """A backend that keeps the logits of every text it is given."""

    def __init__(self, backend: Backend) -> None:
        self.name = "recorder"
        self.config = backend.config
        self.texts: dict[bytes, F32] = {}
        self._backend = backend

    def new_cache(self, context: int, verify_rows: int = VERIFY_ROWS) -> Cache:
        """A cache of the model itself."""
        return self._backend.new_cache(context, verify_rows)

    def forward(
        self,
        token_ids: TokenIds,
        cache: Cache,
        *,
        logits_rows: int = 1,
        hidden_rows: int = 0,
        cancel: Cancel | None = None,
    ) -> ForwardResult:
        """The model's own, kept."""
        key = _key(token_ids, cache, logits_rows, hidden_rows)
        result = self._backend.forward(token_ids, cache, logits_rows=logits_rows)
        self.texts[key] = result.logits.copy()
        return result

    def mtp_forward(
        self,
        depth: int,
        token_ids: TokenIds,
        hidden: F32,
        position: int,
        cache: Cache,
        *,
        cancel: Cancel | None = None,
    ) -> F32:
        """Nothing to keep."""
        raise UsageError("only whole texts are recorded")

    def save(self, folder: Path) -> None:
        """All logits as one array, and where each text lies in it."""
        ends = np.cumsum([len(logits) for logits in self.texts.values()]).tolist()
        np.save(folder / "logits.npy", np.concatenate(list(self.texts.values())))
        places = {key.hex(): end for key, end in zip(self.texts, ends, strict=True)}
        (folder / "places.json").write_text(json.dumps(places), "utf-8")

    def close(self) -> None:
        """Release the model."""
        self._backend.close()


class _NoRows:
    """The cache of a model that computes nothing."""

    length = 0
    capacity = CONTEXT
    layout = CacheLayout((), (), True)

    def rollback(self, n: int) -> None:
        """Nothing to undo."""

    def begin_mtp(self, depth: int, position: int) -> None:
        """There are no blocks."""

    def rows(self) -> tuple[LayerRows, ...]:
        """Nothing is held."""
        return ()

    def restore(self, length: int, rows: Iterable[LayerRows]) -> None:
        """Nothing is restored."""

    def nbytes(self) -> int:
        """Nothing is held."""
        return 0

    def held_bytes(self) -> int:
        """Nothing is held."""
        return 0

    def close(self) -> None:
        """Nothing is held."""


class Remembered:
    """The source as a backend that answers from a recording: it is computed once, and all rows,
    in whatever process, compare with the same logits. They stay on disk, mapped."""

    name = "remembered"

    def __init__(self, folder: Path, config: MimoConfig) -> None:
        self.config = config
        self._logits: F32 = np.load(folder / "logits.npy", mmap_mode="r")
        self._places: dict[str, int] = json.loads((folder / "places.json").read_text("utf-8"))

    def new_cache(self, context: int, verify_rows: int = VERIFY_ROWS) -> Cache:
        """A cache without rows."""
        return _NoRows()

    def forward(
        self,
        token_ids: TokenIds,
        cache: Cache,
        *,
        logits_rows: int = 1,
        hidden_rows: int = 0,
        cancel: Cancel | None = None,
    ) -> ForwardResult:
        """The logits of a whole text, as they were recorded."""
        end = self._places.get(_key(token_ids, cache, logits_rows, hidden_rows).hex())
        if end is None:
            raise UsageError("a text that was not recorded")
        no_states = np.empty((0, self.config.hidden_size), np.float32)
        return ForwardResult(self._logits[end - logits_rows : end], no_states)

    def mtp_forward(
        self,
        depth: int,
        token_ids: TokenIds,
        hidden: F32,
        position: int,
        cache: Cache,
        *,
        cancel: Cancel | None = None,
    ) -> F32:
        """Nothing to remember."""
        raise UsageError("only whole texts are remembered")

    def close(self) -> None:
        """Nothing is held but the map."""


def _key(token_ids: TokenIds, cache: Cache, logits_rows: int, hidden_rows: int) -> bytes:
    """What tells one recorded call from another."""
    if cache.length or hidden_rows:
        raise UsageError("only whole texts, and only their logits, are remembered")
    return hashlib.sha256(token_ids.tobytes() + logits_rows.to_bytes(8, "little")).digest()


@dataclass(frozen=True)
class Job:
    """What every row is measured with. `work` holds the calibration text and the recording."""

    checkpoint: Path
    work: Path
    commands: list[dict[str, Any]]
    backend: str
    threads: int

    @property
    def calibration(self) -> Path:
        """The importance matrix, once it was made."""
        return self.work / "calibration" / IMATRIX_NAME


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
    todo = []
    for row in rows:
        if _recipe_of(row) == results.get(row.key, {}).get("recipe", "missing"):
            _say(f"{row.key}: kept from {options.json.name}")
        else:
            todo.append(row)
    with tempfile.TemporaryDirectory(prefix="mimo-quality-") as folder:
        job = Job(options.checkpoint, Path(folder), commands, options.backend, options.threads)
        if todo:
            _record(job)
        if any(row.calibrated for row in todo):
            _calibrate(job, calibration_text)
        for row, result in _measured(todo, job, options.jobs):
            if _folder_hash(options.checkpoint) != facts["checkpoint_sha256"]:
                raise UsageError(f"{options.checkpoint} changed while it was measured")
            results[row.key] = result
            results = {known.key: results[known.key] for known in ROWS if known.key in results}
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


def _record(job: Job) -> None:
    """Compute the source's logits of every right answer."""
    began = time.perf_counter()
    model = open_model(job.checkpoint, "reference", None, CONTEXT, job.threads)
    recorder = Recorder(model.backend)
    try:
        evaluate_text(None, recorder, _chunks(model, job), progress=_counter("source: logits"))
    finally:
        recorder.close()
    recorder.save(job.work)
    _say(f"recorded {len(recorder.texts)} texts, {time.perf_counter() - began:.0f} s")


def _calibrate(job: Job, text: bytes) -> None:
    """Measure importance, through files as `export --calibrate` goes, so that the bundles are
    the same."""
    _say(f"calibrating on {len(text)} bytes of text")
    (job.work / "calibration.txt").write_bytes(text)
    measured = calibrate_checkpoint(
        job.checkpoint, job.work / "calibration.txt", progress=_counter("calibrate")
    )
    measured.save(job.calibration.parent)
    _say(f"calibrated on {measured.tokens} tokens, unseen: {measured.unseen}")


def _chunks(model: Model, job: Job) -> list[TextChunk]:
    if model.tokenizer is None:
        raise UsageError(f"{model.name} has no tokenizer")
    return answer_chunks(model.tokenizer, model.template, job.commands, nano.TOOLS)


def _measured(rows: list[Row], job: Job, jobs: int) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Every row with its result as soon as it is there, `jobs` of them measured at a time."""
    if jobs == 1:
        for row in rows:
            yield row, _measure(row, job)
        return
    # Fresh processes: ggml's threads do not survive a fork.
    pool = ProcessPoolExecutor(jobs, get_context("spawn"))
    try:
        running = {pool.submit(_measure, row, job): row for row in rows}
        for future in as_completed(running):
            yield running[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _measure(row: Row, job: Job) -> dict[str, Any]:
    began = time.perf_counter()
    model = job.checkpoint
    size = sum(p.stat().st_size for p in model.glob("*.safetensors"))
    if row.recipe is not None:
        model = job.work / row.key
        bundle = export_bundle(
            job.checkpoint,
            model,
            recipe=row.recipe,
            calibration=job.calibration if row.calibrated else None,
        )
        size = sum(p.stat().st_size for p in bundle.gguf.files)
        bundle.close()
    # A checkpoint has no packed weights: only the reference backend runs it.
    runs_on = "reference" if row.recipe is None else job.backend
    candidate = open_model(model, runs_on, None, CONTEXT, job.threads)
    try:
        source = Remembered(job.work, candidate.backend.config)
        text = evaluate_text(
            source,
            source if row.recipe is None else candidate.backend,
            _chunks(candidate, job),
            progress=_counter(f"{row.key}: text"),
        )
        _say(f"{row.key}: perplexity {text.perplexity:.4f}, KL {text.mean_kl:.5f}")
        answers = evaluate_commands(
            Runtime(candidate, CONTEXT, DRAFT),
            job.commands,
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


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not 1 or more")
    return int(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, default=nano.checkpoint_dir(), help="default: mimo-nano")
    add("--limit", type=int, help="evaluate only N of the commands")
    add("--only", nargs="*", choices=[row.key for row in ROWS], help="only these rows")
    add("--backend", choices=("ggml", "reference"), default="ggml", help="what runs the bundles")
    add("--json", type=Path, default=ROOT / "docs" / "quality.json")
    add("--markdown", type=Path, default=ROOT / "docs" / "quality.md")
    add("--jobs", type=_positive, default=os.cpu_count() or 1, help="rows measured at a time")
    add("--threads", type=_positive, default=1, help="threads of each; more of them mostly wait")
    add("--nice", type=int, default=10, help="scheduling priority; 0 where nothing else runs")
    add("--dry-run", action="store_true", help="print the table, write nothing")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MimoEdgeError as error:
        sys.exit(f"error: {error}")
