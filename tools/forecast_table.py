"""Forecast against measurement on this machine: is what `mimo-edge plan` says true?

    python tools/forecast_table.py --folder /tmp/forecast            # on standard output
    python tools/forecast_table.py --folder /tmp/forecast --write    # into docs/benchmarks.md

mimo-nano and models of MiMo-V2-Flash's width with random weights (5 GB in the folder) are measured
by `mimo-edge bench`, in a memory cgroup where there is a cap, and forecast from their sizes and the
profile that `mimo-edge probe` writes at the start (`--profile` takes an existing one). Takes about
five minutes on two idle cores. The rate of this disk changes from minute to minute, so rows that
read from it are forecast at the rate measured right after them; `--probe-rate` takes the probe's.

Drawn ids follow, of which no draft is right: rows with drafts show what drafting costs. Rows that
were measured stay in the folder: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from tables import Deadline, Rows, add_minutes, command, markdown, write_section

from mimo_edge.bench.cases import Case, Kind, Settings
from mimo_edge.bench.forecasts import Forecasts
from mimo_edge.bench.random_model import scaled_config, tiny_config, write_model
from mimo_edge.bench.results import Row
from mimo_edge.bench.session import Bench
from mimo_edge.budget import Budget, fit, plan
from mimo_edge.bundle import Bundle
from mimo_edge.devices.probe import probe
from mimo_edge.devices.profile import DeviceProfile, ReadRate, load_profile
from mimo_edge.errors import BackendError, UsageError
from mimo_edge.experts.reader import PART_BYTES
from mimo_edge.export.pipeline import export_bundle
from mimo_edge.nano.commands import checkpoint_dir
from mimo_edge.units import format_bytes

GOAL = 0.25
DEPTH, CONTEXT, VOCAB, WARMUP = 128, 1024, 4096, 16


@dataclass(frozen=True)
class What:
    """One row: model, drafts, the share of the experts a cap leaves room for (None: no cap), and
    whether a prompt of 512 tokens is measured instead of decoding."""

    model: str
    draft: int = 0
    share: tuple[int, int] | None = None
    kind: Kind = "decode"

    @property
    def key(self) -> str:
        part = "" if self.share is None else f" {self.share[0]}/{self.share[1]}"
        return f"{self.model}{part} {self.kind} {self.draft}"


NANO, SMALL, LARGE = "mimo-nano", "2 layers x 64", "4 layers x 64"
WIDTHS = {SMALL: (2, 64), LARGE: (4, 64)}
WHATS = (
    *(What(NANO, draft) for draft in (0, 1, 3)),
    What(NANO, kind="prefill"),
    What(SMALL),
    What(SMALL, 3),
    What(SMALL, share=(1, 4)),
    *(What(LARGE, draft) for draft in (0, 1, 3)),
    *(What(LARGE, draft, share) for share in ((1, 2), (1, 4)) for draft in (0, 3)),
    What(LARGE, kind="prefill"),
    What(LARGE, share=(1, 4), kind="prefill"),
)


class Bed:
    """Models, profile and measurements of one folder."""

    def __init__(
        self, folder: Path, profile: str | None, repetitions: int, tiny: bool, probe_rate: bool
    ) -> None:
        self._folder, self._repetitions, self._tiny = folder, repetitions, tiny
        self._profile, self._probe_rate = profile, probe_rate
        folder.mkdir(parents=True, exist_ok=True)
        for name in (NANO, *WIDTHS):
            self._model(name)

    @cached_property
    def device(self) -> DeviceProfile:
        """This machine, probed once."""
        if self._profile is not None:
            return load_profile(self._profile)
        path = self._folder / "this-machine.toml"
        if not path.exists():
            seconds = 1.0 if self._tiny else 30.0
            size = 16 << 20 if self._tiny else 256 << 20
            made = probe(self._folder, file_bytes=size, seconds=seconds)
            path.write_text(made.profile.to_toml(), "utf-8")
        return load_profile(path)

    def _model(self, name: str) -> Path:
        if name == NANO:
            path = self._folder / "nano"
            if not path.exists():
                export_bundle(checkpoint_dir(), path, recipe="q4_0").close()
            return path
        layers, experts = WIDTHS[name]
        path = self._folder / f"{layers}-{experts}.gguf"
        if not path.exists():
            config = scaled_config("MiMo-V2-Flash", layers, experts, VOCAB, 3)
            write_model(path, tiny_config("MiMo-V2-Flash", 3) if self._tiny else config)
        return path

    def _ram(self, what: What) -> int | None:
        """The least cap, to a MiB, under which that share of the experts has slots."""
        if what.share is None:
            return None
        part, of = what.share
        with Bundle.open(self._model(what.model)) as bundle:
            config = bundle.config
            if not what.draft:  # MTP blocks stay on flash
                config = replace(config, num_mtp_layers=0)
            low, high = 0, plan(config, bundle.tensors, CONTEXT).nbytes
            while high - low > 1 << 20:
                middle = (low + high) // 2
                found = fit(config, bundle.tensors, CONTEXT, middle)
                enough = isinstance(found, Budget) and (
                    not found.streamed or found.slots * of >= found.experts * part
                )
                low, high = (low, middle) if enough else (middle, high)
        return high

    def _settings(self, what: What) -> Settings:
        return Settings(
            str(self._model(what.model)),
            context=CONTEXT,
            # Milliseconds are at the mercy of whatever else happens.
            repetitions=self._repetitions * (5 if what.model == NANO else 1),
            warmup=WARMUP,
            tokens="drawn",
        )

    def measure(self, what: What) -> list[str]:
        """One row, as JSON in one cell. Raises BackendError when it cannot be measured."""
        # A small model builds graphs for every 64 tokens more: short pieces, most without.
        decoded = 16 if what.model == NANO else 32
        case = Case(
            what.kind,
            512 if what.kind == "prefill" else decoded,
            DEPTH if what.kind == "decode" else 0,
            what.draft,
            self._ram(what),
            self.device.threads,
        )
        (result,) = Bench(self._settings(what)).run([case])
        row = result.ours
        if row.error is not None or row.tps is None:
            raise BackendError(f"{what.key}: {row.error}")
        names = ("backend", "context", "tokens", "flash_bytes_per_s", "slots")
        runs = [{name: run.get(name) for name in names} for run in row.runs]
        kept = {"case": row.case.to_dict(), "samples": list(row.samples), "runs": runs}
        return [json.dumps(kept)]

    def cells(self, what: What, measured: str) -> list[str]:
        """The row of the table: the forecast for what was measured, and how far off it is."""
        kept = json.loads(measured)
        case = Case(**kept["case"])
        row = Row("", case, False, tuple(kept["samples"]), tuple(kept["runs"]))
        assert row.tps is not None
        found = Forecasts(self._settings(what), self._device_of(row)).of(row)
        if found is None:
            raise BackendError(f"{what.key} has no forecast")
        made = found.prefill if case.kind == "prefill" else found.decode
        read = found.decode.flash_bytes_per_token
        if case.kind == "prefill":
            read = found.prefill.flash_bytes / case.tokens
        off = made.tps / row.tps.median - 1
        return [
            what.model if what.model == NANO else f"{what.model} experts",
            "prompt of 512" if case.kind == "prefill" else "decode",
            "-" if case.ram is None else format_bytes(case.ram),
            str(what.draft),
            f"{made.tps:.1f}",
            f"{row.tps.median:.1f} ({row.tps.min:.1f}..{row.tps.max:.1f})",
            f"{off:+.0%}",
            made.cost.binding,
            _pair(read, row.flash_bytes_per_token),
        ]

    def _device_of(self, row: Row) -> DeviceProfile:
        """The machine as it was when `row` was measured."""
        rates = [run.get("flash_bytes_per_s") for run in row.runs]
        if self._probe_rate or not rates or not rates[0]:
            return self.device
        share = rates[0] / self.device.read_rate(PART_BYTES)
        reads = tuple(ReadRate(r.block_bytes, share * r.bytes_per_s) for r in self.device.reads)
        return replace(self.device, reads=reads)


def _pair(forecast: float, measured: float | None) -> str:
    if not measured:
        return "-"
    return f"{forecast / 1e6:.0f}, {measured / 1e6:.0f}"


def table(bed: Bed, rows: Rows, minutes: float) -> str:
    """All rows as Markdown, and how many are within the goal."""
    deadline = Deadline(minutes)
    head = [
        "model", "what", "cap", "drafts", "forecast, tok/s", "measured", "off", "bound by",
        "MB read per token, forecast and measured",
    ]  # fmt: skip
    found = list(_rows(bed, rows, deadline))
    good = sum(abs(float(row[6].rstrip("%"))) <= 100 * GOAL for row in found)
    verdict = f"\n{good} of {len(found)} within {GOAL:.0%}.\n"
    return markdown([head, *found]) + deadline.note() + verdict


def _rows(bed: Bed, rows: Rows, deadline: Deadline) -> Iterator[Sequence[str]]:
    for what in WHATS:
        measured = rows.get(what.key, deadline, partial(bed.measure, what))
        if measured:
            yield bed.cells(what, measured[0])


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--folder", type=Path, required=True, help="for models, rows, profile")
    parser.add_argument("--profile", help="of this machine, instead of a probe")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--probe-rate", action="store_true", help="flash as the probe measured it")
    parser.add_argument("--prepare", action="store_true", help="make the models, and stop")
    parser.add_argument("--tiny", action="store_true", help="models of 1 MB, to try the tool")
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    add_minutes(parser, 10)
    args = parser.parse_args(argv)
    if args.repetitions < 1:
        raise UsageError(f"--repetitions {args.repetitions}", "use 1 or more")
    bed = Bed(args.folder, args.profile, args.repetitions, args.tiny, args.probe_rate)
    if args.prepare:
        return
    text = table(bed, Rows(args.folder / "rows.json"), args.minutes)
    if args.write:
        write_section("forecasts", text, "Forecast against measurement")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
