"""Runs cases: one process each, both engines taking turns, in a memory cgroup where one can be
made.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mimo_edge.bench import page_cache
from mimo_edge.bench.cases import Case, Settings
from mimo_edge.bench.cgroup import MemoryCgroup
from mimo_edge.bench.results import OURS, THEIRS, Result, Row, same_choices
from mimo_edge.bench.worker import error_dict
from mimo_edge.errors import BackendError, DeviceError, MimoEdgeError, UsageError
from mimo_edge.kv_format import DEFAULT_KV_TYPE
from mimo_edge.model_source import BUILT_IN
from mimo_edge.text_file import path_exists

Repack = Literal["auto", "on", "off"]
Progress = Callable[[str, int, int], None]

# Room llama.cpp takes besides its weights, for deciding whether repacked ones fit a cap.
_STOCK_EXTRA_BYTES = 1 << 30


@dataclass(frozen=True)
class ModelFiles:
    """Files behind a model: `gguf` is what stock llama.cpp opens, None for a checkpoint."""

    files: tuple[Path, ...]
    gguf: Path | None

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files)


def model_files(model: str) -> ModelFiles:
    """Look at a model's headers. Raises BundleError or CheckpointError when it is none."""
    from mimo_edge.bundle import Bundle

    path = Path(model)
    if not path_exists(path) and model == BUILT_IN:
        from mimo_edge.nano.commands import checkpoint_dir

        path = checkpoint_dir()
    if path.is_dir() and (path / "config.json").is_file():
        return ModelFiles(tuple(sorted(path.glob("*.safetensors"))), None)
    with Bundle.open(path) as bundle:
        return ModelFiles(bundle.files, bundle.gguf.files[0])


@dataclass
class _Outcome:
    """What came of one process."""

    answer: dict[str, Any] = field(default_factory=dict)
    error: dict[str, str] | None = None
    kernel_peak_bytes: int | None = None
    cached_before_bytes: int | None = None
    in_cgroup: bool = False
    prompt: tuple[int, ...] = ()  # ids decoding began with


class Bench:
    """A run over cases. `against` compares with stock llama.cpp: each repetition then is a pair
    of processes, ours and theirs by turns; otherwise one process measures all repetitions.

    `repack` is llama.cpp's reordering of weights: "auto" is its default, on, except where a cap
    has no room for it.
    """

    def __init__(
        self, settings: Settings, *, against: bool = False, repack: Repack = "auto"
    ) -> None:
        """Raises MimoEdgeError when the model cannot be opened, UsageError when llama.cpp cannot
        open it."""
        self.settings = settings
        self.against = against
        self._repack = repack
        self._files = model_files(settings.model)
        if against and self._files.gguf is None:
            raise UsageError(
                f"llama.cpp runs bundles and GGUF files, {settings.model} is a checkpoint",
                "export it first (mimo-edge export)",
            )
        self.no_cgroup = ""
        try:
            MemoryCgroup.create().close()
        except DeviceError as error:
            self.no_cgroup = error.message

    def run(self, cases: Sequence[Case], progress: Progress | None = None) -> Iterator[Result]:
        """Results in the order of `cases`, each as soon as it is there."""
        for index, case in enumerate(cases):
            if progress is not None:
                progress(case.label, index, len(cases))
            yield self._pairs(case) if self.against else self._alone(case)

    def _alone(self, case: Case) -> Result:
        return Result(_row(OURS, case, [self._ours(case, self.settings.repetitions, 0)]))

    def _pairs(self, case: Case) -> Result:
        ours: list[_Outcome] = []
        theirs: list[_Outcome] = []
        alike = compared = 0
        for index in range(self.settings.repetitions):
            ours.append(self._ours(case, 1, index))
            if ours[-1].error is not None:
                break
            answer = ours[-1].answer
            theirs.append(self._theirs(case, answer))
            if theirs[-1].error is not None:
                break
            choices = theirs[-1].answer["choices"]
            forced = case.kind == "prefill" or answer["forced"] is not None
            same = same_choices(answer["choices"], choices, forced)
            alike, compared = alike + same[0], compared + same[1]
        # Stock decoding does not draft.
        other = _row(THEIRS, replace(case, draft=0), theirs) if theirs else None
        return Result(_row(OURS, case, ours), other, (alike, compared) if compared else None)

    def _ours(self, case: Case, repetitions: int, first: int) -> _Outcome:
        return self._process(
            case,
            {
                "engine": OURS,
                "case": asdict(case),
                "settings": asdict(self.settings),
                "repetitions": repetitions,
                "first": first,
            },
        )

    def _theirs(self, case: Case, answer: dict[str, Any]) -> _Outcome:
        """The same work as `answer` tells of, by llama.cpp."""
        if case.ram is not None and self.no_cgroup:
            message = f"llama.cpp has no bound of its own, and {self.no_cgroup}"
            return _Outcome(error=error_dict(DeviceError(message)))
        return self._process(
            case,
            {
                "engine": THEIRS,
                "model": str(self._files.gguf),
                "kind": case.kind,
                "tokens": case.tokens,
                "warmup": self.settings.warmup,
                "repetitions": 1,
                "context": answer["context"],
                "threads": case.threads,
                "repack": self._repacks(case.ram),
                "kv_type": (answer.get("budget") or {}).get("kv_type", DEFAULT_KV_TYPE),
                "restart": self.settings.prompt is not None,
                "prompts": answer["prompts"],
                "forced": answer["forced"],
                "warmup_prompt": answer["warmup_prompt"],
            },
        )

    def _repacks(self, ram: int | None) -> bool:
        if self._repack != "auto":
            return self._repack == "on"
        return ram is None or self._files.nbytes + _STOCK_EXTRA_BYTES <= ram

    def _process(self, case: Case, request: dict[str, Any]) -> _Outcome:
        """One worker, start to end."""
        outcome = _Outcome()
        if case.ram is not None:
            page_cache.drop(self._files.files)
            outcome.cached_before_bytes = page_cache.cached_bytes(self._files.files)
        command = [sys.executable, "-m", "mimo_edge.bench.worker"]
        with ExitStack() as stack:
            group: MemoryCgroup | None = None
            if not self.no_cgroup:
                group = stack.enter_context(MemoryCgroup.create(case.ram))
                command = group.command(command)
            outcome.in_cgroup = group is not None
            code, out, log = _run(command, json.dumps(request))
            if group is not None:
                outcome.kernel_peak_bytes = group.peak_bytes()
            killed = group.kills() if group is not None else 0
        try:
            answer = json.loads(out)
        except ValueError:
            outcome.error = error_dict(_crash(request["engine"], code, log, killed, case.ram))
            return outcome
        outcome.error = answer.get("error")
        outcome.answer = {} if outcome.error else answer
        prompts = answer.get("prompts") or request.get("prompts") or [()]
        outcome.prompt = tuple(prompts[0])
        return outcome


def _run(command: list[str], request: str) -> tuple[int, str, str]:
    """Exit code, standard output and log of a process; it does not outlive us."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "GGML_NO_BACKTRACE": "1", "PYTHONUTF8": "1"},
    )
    try:
        out, log = process.communicate(request)
    except BaseException:
        process.kill()
        process.wait()
        raise
    return process.returncode, out, log


def _crash(engine: str, code: int, log: str, killed: int, ram: int | None) -> MimoEdgeError:
    if killed or (code == -signal.SIGKILL and ram is not None):
        return DeviceError(f"{engine} was killed by the kernel for more memory than {ram} bytes")
    last = " ".join(log.split())[-400:]
    return BackendError(f"{engine} ended with status {code}: {last or 'it left no message'}")


def _row(engine: str, case: Case, outcomes: list[_Outcome]) -> Row:
    good = [outcome for outcome in outcomes if outcome.error is None]
    error = next((outcome.error for outcome in outcomes if outcome.error is not None), None)
    peaks = [o.kernel_peak_bytes for o in outcomes if o.kernel_peak_bytes is not None]
    cached = [o.cached_before_bytes for o in outcomes if o.cached_before_bytes is not None]
    if good and case.kind == "decode":
        case = replace(case, depth=len(good[0].prompt))
    notes = []
    if case.ram is not None and not all(outcome.in_cgroup for outcome in outcomes):
        notes.append("no memory cgroup: the cap is only what mimo-edge keeps by itself")
    if good and engine == OURS and case.kind == "decode":
        notes += _text_notes(case, good[0].answer)
    if max(cached, default=0) > 16 << 20:
        notes.append(
            f"{max(cached) >> 20} MiB of the model were in the page cache already and count "
            "against nobody's cap: another process has them mapped"
        )
    return Row(
        engine,
        case,
        cgroup=all(outcome.in_cgroup for outcome in outcomes),
        samples=tuple(sample for outcome in good for sample in outcome.answer["samples"]),
        runs=tuple(
            {k: v for k, v in outcome.answer.items() if k not in _BULKY} for outcome in good
        ),
        kernel_peak_bytes=max(peaks, default=None),
        cached_before_bytes=max(cached, default=None),
        error=error,
        notes=tuple(notes),
    )


def _text_notes(case: Case, answer: dict[str, Any]) -> list[str]:
    """What the decoded text does to the figures."""
    if answer["forced"] is not None:
        if case.draft == 0:
            return []
        return ["the ids are drawn, so no draft is right: this is what drafting costs"]
    choices = answer["choices"]
    if 4 * len(set(choices)) >= len(choices) or answer.get("slots") is None:
        return []
    return [
        f"{len(set(choices))} different tokens of {len(choices)}: it repeats itself, and so do "
        "its experts"
    ]


_BULKY = ("samples", "prompts", "forced", "choices", "warmup_prompt")
