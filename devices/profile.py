"""What a device class is: its memory, processor, storage and limits, each figure with its source.

A profile is one TOML file. Every figure is `{ value = ..., evidence = ..., source = ... }`: a
number without a word on where it comes from is not accepted. Quantities are texts with a unit
("6 GiB", "45 GB/s", "120 GMAC/s"), so that a slip between bytes and bytes per second is an error.
`inherits` names another profile whose figures stand where this one states none.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mimo_edge.errors import ConfigError, UsageError
from mimo_edge.kv_format import KV_FORMATS
from mimo_edge.quant.base import FORMATS
from mimo_edge.quant.recipe import recipe_names
from mimo_edge.runtimes.base import VERIFY_ROWS
from mimo_edge.runtimes.onnx.qnn_targets import TARGETS
from mimo_edge.speculative import MAX_DRAFT, DraftSetting
from mimo_edge.text_file import path_exists, read_whole

SCHEMA = 1
AUTO = "auto"
ANY = "any"  # the kernel rates of every format that has none of its own
ATTENTION = "ATTENTION_"  # and a format of a KV cache: rates of scores and values
EVIDENCE = {
    "measured": "measured on such a device",
    "published": "a specification or a report names it",
    "derived": "arithmetic on published figures, shown in the source",
    "assumed": "no source confirms it; the source says why this value",
}
ISA = (
    "neon", "fp16", "dotprod", "i8mm", "sve", "sve2", "sme",
    "avx", "avx2", "fma", "f16c", "avx512", "avx512-vnni", "avx-vnni", "amx-int8",
)  # fmt: skip
_MAX_FILE_BYTES = 1 << 20
_MAX_INHERITED = 8


@dataclass(frozen=True)
class Cores:
    """`count` cores of one kind at `hz`."""

    kind: str
    count: int
    hz: float


@dataclass(frozen=True)
class KernelRate:
    """Multiply-adds per second of all threads together in products of a weight matrix with 1 row,
    with 4 rows (a verify) and with many (a prefill), as far as the processor limits them: the
    rate at which weights come from memory is another figure. `stored` is that of many rows with
    weights in the order of the file, as those of streamed experts, which are never reordered.

    Few kernels draw all that memory delivers: `cold` are the rates of 1, 2, 3 and 4 rows with
    weights that lie in memory, `cold_stored` that of one row in the order of the file. Empty and 0
    where they were not measured: then memory's rate is the only other bound."""

    row: float
    rows4: float
    batch: float
    stored: float
    cold: tuple[float, ...] = ()
    cold_stored: float = 0.0

    def at(self, rows: float) -> float:
        """The rate for `rows` rows per matrix: between 1, 4 and 32 by their logarithm."""
        return _between(((1.0, self.row), (4.0, self.rows4), (32.0, self.batch)), rows)

    def stored_at(self, rows: float) -> float:
        """The same for weights in the order of the file."""
        return _between(((1.0, self.row), (32.0, self.stored)), rows)

    def rates(self) -> Iterator[float]:
        """All that are known."""
        yield from (self.row, self.rows4, self.batch, self.stored, *self.cold)
        if self.cold_stored:
            yield self.cold_stored

    def scaled(self, factor: float) -> KernelRate:
        """`factor` times these."""
        return KernelRate(
            self.row * factor,
            self.rows4 * factor,
            self.batch * factor,
            self.stored * factor,
            tuple(rate * factor for rate in self.cold),
            self.cold_stored * factor,
        )


def _between(points: tuple[tuple[float, float], ...], rows: float) -> float:
    if rows <= 1:
        return points[0][1]
    for (low, a), (high, b) in pairwise(points):
        if rows <= high:
            return a + (b - a) * math.log(rows / low) / math.log(high / low)
    return points[-1][1]


PROBED_WIDTH = 256
# Where the rate of attention is not known: this share of that of matrices.
_ATTENTION_SHARE = 0.25


@dataclass(frozen=True)
class EngineCost:
    """Seconds that a step of the engine takes besides the products of its weights: one that
    processes one token `step`, and every layer `layer`, or `streamed` when its experts come
    through slots, although all are in memory; `layer4` and `streamed4` when the step verifies four
    rows. A step that drafts costs `drafting` more and every draft `draft`, a row of 1,000 logits
    `logits`, a row of a prompt `row` in a layer that is PROBED_WIDTH wide, and as much more as one
    is wider. Every expert that is read costs `arrival`, besides the time to read it."""

    step: float
    layer: float
    layer4: float
    streamed: float
    streamed4: float
    drafting: float
    draft: float
    logits: float
    row: float
    arrival: float

    def scaled(self, factor: float) -> EngineCost:
        """`factor` times this."""
        return EngineCost(*(factor * getattr(self, f.name) for f in fields(self)))


@dataclass(frozen=True)
class ReadRate:
    """Random reads of blocks of `block_bytes` past the page cache deliver `bytes_per_s`."""

    block_bytes: int
    bytes_per_s: float


@dataclass(frozen=True)
class Beside:
    """What is left when all threads multiply with weights from memory and all lanes read: the share
    `reads` of the rates of reads, and `kernels` of the rates of products."""

    reads: float
    kernels: float


@dataclass(frozen=True)
class Source:
    """Where a figure comes from: `evidence` is a key of EVIDENCE."""

    evidence: str
    text: str


@dataclass(frozen=True)
class DeviceProfile:
    """A device class. Bytes, bytes per second, multiply-adds per second, hertz, seconds.

    `process_bytes` is what our process may hold of `ram_bytes`; `reads` are for `lanes` threads,
    cool; `compute_hot` and `storage_hot` are the share that is left when the device is hot. Of a
    model of `cache_bytes` a pass finds half of the weights in the processor's caches. The governor
    acts when a sensor whose kind matches one of `thermal_zones` shows more than
    `thermal_limit_c`, a battery holds less than the share `battery_low`, or something waits for
    memory more than the share `memory_stall` of the time. `npu_targets` are the NPUs that graphs
    are compiled for to run here, the best first, and `npu_options` what ONNX Runtime's provider of
    them is told. `sources[field]` says where a field comes from.
    """

    name: str
    title: str
    ram_bytes: int
    process_bytes: int
    memory_bytes_per_s: float
    cores: tuple[Cores, ...]
    threads: int
    isa: tuple[str, ...]
    kernels: Mapping[str, KernelRate]
    cache_bytes: int
    engine: EngineCost
    storage_bytes: int
    lanes: int
    reads: tuple[ReadRate, ...]
    beside: Beside
    storage_hot: float
    compute_hot: float
    thermal_limit_c: float
    thermal_zones: tuple[str, ...]
    battery_low: float
    memory_stall: float
    npu: str
    npu_limits: str
    npu_targets: tuple[str, ...]
    npu_options: Mapping[str, str]
    os: str
    traps: tuple[str, ...]
    context: int
    kv_type: str
    recipe: str
    draft: DraftSetting
    sources: Mapping[str, Source] = field(default_factory=dict)
    chain: tuple[str, ...] = ()  # what it inherits from, nearest first

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernels", MappingProxyType(dict(self.kernels)))
        object.__setattr__(self, "npu_options", MappingProxyType(dict(self.npu_options)))
        object.__setattr__(self, "sources", MappingProxyType(dict(self.sources)))
        _validate(self)

    def kernel(self, format_name: str) -> KernelRate:
        """Rates of a weight format, or those of any."""
        return self.kernels.get(format_name.upper(), self.kernels[ANY])

    def attention(self, kv_type: str) -> KernelRate:
        """Rates of scores and values over cached rows of a format, for 1, 4 and many queries."""
        found = self.kernels.get(ATTENTION + kv_type.upper())
        return self.kernels[ANY].scaled(_ATTENTION_SHARE) if found is None else found

    def read_rate(self, block_bytes: float) -> float:
        """Bytes per second of reads of this size: between the sizes listed by their logarithm, at
        the ends the nearest."""
        if block_bytes <= self.reads[0].block_bytes:
            # below the smallest size the time per read stays, the bytes do not
            return self.reads[0].bytes_per_s * block_bytes / self.reads[0].block_bytes
        for a, b in pairwise(self.reads):
            if block_bytes <= b.block_bytes:
                share = math.log(block_bytes / a.block_bytes) / math.log(
                    b.block_bytes / a.block_bytes
                )
                return a.bytes_per_s + (b.bytes_per_s - a.bytes_per_s) * share
        return self.reads[-1].bytes_per_s

    @property
    def measured(self) -> bool:
        """Whether memory, kernels and storage were measured on this very device."""
        keys = ("memory_bytes_per_s", "kernels", "reads")
        return all(self.sources[key].evidence == "measured" for key in keys if key in self.sources)

    def figures(self) -> Iterator[tuple[str, str, Source]]:
        """(key as in the file, value as text, source) of every figure."""
        for key, figure in FIGURES.items():
            yield key, figure.show(getattr(self, figure.field)), self.sources[figure.field]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form: every figure as in the file, with its source."""
        return {
            "name": self.name,
            "title": self.title,
            "inherits": list(self.chain),
            "figures": {
                key: {
                    "value": figure.plain(getattr(self, figure.field)),
                    "evidence": self.sources[figure.field].evidence,
                    "source": self.sources[figure.field].text,
                }
                for key, figure in FIGURES.items()
            },
        }

    def to_toml(self) -> str:
        """The profile as a file, complete in itself."""
        lines = [f"schema = {SCHEMA}", f"title = {_quoted(self.title)}"]
        table = ""
        for key, figure in FIGURES.items():
            section, name = key.split(".")
            if section != table:
                lines += ["", f"[{section}]"]
                table = section
            source = self.sources[figure.field]
            value = _toml(figure.plain(getattr(self, figure.field)))
            lines.append(
                f"{name} = {{ value = {value}, evidence = {_quoted(source.evidence)}, "
                f"source = {_quoted(source.text)} }}"
            )
        return "\n".join(lines) + "\n"


# --- reading values ----------------------------------------------------------------------------

_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z/°]+)")
_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


class _Wrong(Exception):
    """A value that cannot be read; the caller knows which file and key."""


def _quantity(value: Any, unit: str, prefixes: Mapping[str, float]) -> float:
    """The number of a text like "45 GB/s", in `unit` without prefix."""
    if not isinstance(value, str):
        raise _Wrong(f'{value!r} is not a text with a unit, as "1 {unit}"')
    match = _QUANTITY.fullmatch(value.strip())
    if match is None or not match[2].endswith(unit):
        raise _Wrong(f"{value!r} is not in {unit}")
    prefix = match[2][: -len(unit)]
    if prefix not in prefixes:
        raise _Wrong(f"{value!r} is not in {unit}")
    return float(match[1]) * prefixes[prefix]


def _size(value: Any) -> int:
    return int(_quantity(value, "B", _DECIMAL | _BINARY))


def _rate(value: Any) -> float:
    return _quantity(value, "B/s", _DECIMAL | _BINARY)


def _macs(value: Any) -> float:
    return _quantity(value, "MAC/s", _DECIMAL)


def _hertz(value: Any) -> float:
    return _quantity(value, "Hz", _DECIMAL)


def _seconds(value: Any) -> float:
    return _quantity(value, "s", {"": 1.0, "m": 1e-3, "u": 1e-6})


def _celsius(value: Any) -> float:
    return _quantity(value, "C", {"": 1.0, "°": 1.0})


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _Wrong(f"{value!r} is no text")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _Wrong(f"{value!r} is not a list of texts")
    return tuple(_text(item) for item in value)


def _options(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _Wrong(f"{value!r} is not a table of options")
    return {key: _text(text) for key, text in value.items()}


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _Wrong(f"{value!r} is not a whole number")
    return value


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _Wrong(f"{value!r} is not a number")
    return float(value)


def _draft(value: Any) -> DraftSetting:
    return "auto" if value == "auto" else _integer(value)


def _items(value: Any, **parsers: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """A list of tables with exactly these keys."""
    if not isinstance(value, list) or not value:
        raise _Wrong(f"{value!r} is not a list of tables")
    return [_table(item, parsers) for item in value]


def _table(value: Any, parsers: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != set(parsers):
        raise _Wrong(f"{value!r} is not a table with {', '.join(parsers)}")
    return {key: parse(value[key]) for key, parse in parsers.items()}


def _cores(value: Any) -> tuple[Cores, ...]:
    items = _items(value, kind=_text, count=_integer, clock=_hertz)
    return tuple(Cores(item["kind"], item["count"], item["clock"]) for item in items)


def _reads(value: Any) -> tuple[ReadRate, ...]:
    items = _items(value, block=_size, rate=_rate)
    return tuple(ReadRate(item["block"], item["rate"]) for item in items)


def _kernels(value: Any) -> dict[str, KernelRate]:
    if not isinstance(value, dict):
        raise _Wrong(f"{value!r} is not a table of formats")
    parsers: dict[str, Callable[[Any], Any]] = dict.fromkeys(
        ("row", "rows4", "batch", "stored"), _macs
    )
    measured = {**parsers, "cold": _cold, "cold_stored": _macs}
    return {
        name if name == ANY else name.upper(): KernelRate(
            **_table(rates, measured if isinstance(rates, dict) and "cold" in rates else parsers)
        )
        for name, rates in value.items()
    }


def _cold(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != VERIFY_ROWS:
        raise _Wrong(f"{value!r} is not a list of rates of 1 to {VERIFY_ROWS} rows")
    return tuple(_macs(rate) for rate in value)


def _engine(value: Any) -> EngineCost:
    return EngineCost(
        **_table(value, dict.fromkeys((f.name for f in fields(EngineCost)), _seconds))
    )


def _beside(value: Any) -> Beside:
    return Beside(**_table(value, dict.fromkeys((f.name for f in fields(Beside)), _share)))


# --- and writing them back ---------------------------------------------------------------------


def _si(value: float, unit: str) -> str:
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"


def _plain_size(value: int) -> str:
    """In the largest unit that gives the very number back."""
    binary = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
    for unit, factor in (*binary, ("GB", 10**9), ("MB", 10**6)):
        text = f"{value / factor:g}"
        if "e" not in text and value >= factor and int(float(text) * factor) == value:
            return f"{text} {unit}"
    return f"{value} B"


def _plain_cores(value: tuple[Cores, ...]) -> list[dict[str, Any]]:
    return [{"kind": c.kind, "count": c.count, "clock": _si(c.hz, "Hz")} for c in value]


def _plain_reads(value: tuple[ReadRate, ...]) -> list[dict[str, str]]:
    return [{"block": _plain_size(r.block_bytes), "rate": _si(r.bytes_per_s, "B/s")} for r in value]


def _plain_kernels(value: Mapping[str, KernelRate]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, rate in value.items():
        plain: dict[str, Any] = {
            key: _si(getattr(rate, key), "MAC/s") for key in ("row", "rows4", "batch", "stored")
        }
        if rate.cold:
            plain["cold"] = [_si(cold, "MAC/s") for cold in rate.cold]
            plain["cold_stored"] = _si(rate.cold_stored, "MAC/s")
        found[name.lower()] = plain
    return found


def plain_seconds(value: float) -> str:
    """A time of up to seconds, as it stands in a file."""
    return f"{value * 1e3:.4g} ms" if value >= 1e-3 else f"{value * 1e6:.4g} us"


def _plain_engine(value: EngineCost) -> dict[str, str]:
    return {f.name: plain_seconds(getattr(value, f.name)) for f in fields(value)}


@dataclass(frozen=True)
class _Figure:
    """One key of the file: the field it fills, how it is read, and how it is written."""

    field: str
    parse: Callable[[Any], Any]
    plain: Callable[[Any], Any]

    def show(self, value: Any) -> str:
        """For people, on one line."""
        plain = self.plain(value)
        if isinstance(plain, dict):
            return "; ".join(f"{k} {_joined(v)}" for k, v in plain.items()) or "none"
        if isinstance(plain, list):
            return "; ".join(_joined(item) for item in plain) or "none"
        return str(plain)


def _joined(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(map(_joined, value.values()))
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _same(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


FIGURES: Mapping[str, _Figure] = MappingProxyType(
    {
        "memory.ram": _Figure("ram_bytes", _size, _plain_size),
        "memory.process": _Figure("process_bytes", _size, _plain_size),
        "memory.bandwidth": _Figure("memory_bytes_per_s", _rate, lambda v: _si(v, "B/s")),
        "memory.stall": _Figure("memory_stall", _share, _same),
        "cpu.cores": _Figure("cores", _cores, _plain_cores),
        "cpu.threads": _Figure("threads", _integer, _same),
        "cpu.isa": _Figure("isa", _texts, _same),
        "cpu.kernels": _Figure("kernels", _kernels, _plain_kernels),
        "cpu.cache": _Figure("cache_bytes", _size, _plain_size),
        "cpu.engine": _Figure("engine", _engine, _plain_engine),
        "storage.size": _Figure("storage_bytes", _size, lambda v: _si(v, "B")),
        "storage.lanes": _Figure("lanes", _integer, _same),
        "storage.reads": _Figure("reads", _reads, _plain_reads),
        "storage.beside": _Figure("beside", _beside, asdict),
        "storage.hot": _Figure("storage_hot", _share, _same),
        "thermal.limit": _Figure("thermal_limit_c", _celsius, lambda v: f"{v:g} C"),
        "thermal.zones": _Figure("thermal_zones", _texts, _same),
        "thermal.hot": _Figure("compute_hot", _share, _same),
        "power.battery_low": _Figure("battery_low", _share, _same),
        "npu.route": _Figure("npu", _text, _same),
        "npu.limits": _Figure("npu_limits", _text, _same),
        "npu.targets": _Figure("npu_targets", _texts, _same),
        "npu.options": _Figure("npu_options", _options, dict),
        "system.os": _Figure("os", _text, _same),
        "system.traps": _Figure("traps", _texts, _same),
        "run.context": _Figure("context", _integer, _same),
        "run.kv_type": _Figure("kv_type", _text, _same),
        "run.recipe": _Figure("recipe", _text, _same),
        "run.draft": _Figure("draft", _draft, _same),
    }
)

# Outside these a figure is a slip of the pen, not a device.
_BOUNDS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "ram_bytes": (32 << 20, 64 << 40),
        "process_bytes": (16 << 20, 64 << 40),
        "memory_bytes_per_s": (1e8, 1e13),
        "threads": (1, 512),
        "cache_bytes": (4 << 10, 1 << 40),
        "storage_bytes": (1 << 20, 1 << 50),
        "lanes": (1, 64),
        "storage_hot": (0.05, 1.0),
        "compute_hot": (0.05, 1.0),
        "thermal_limit_c": (20, 125),
        "battery_low": (0.0, 1.0),
        "memory_stall": (0.001, 1.0),
        "context": (1, 1 << 26),
    }
)
_MAC_BOUNDS, _READ_BOUNDS, _CLOCK_BOUNDS = (1e6, 1e16), (1e5, 1e12), (1e7, 2e10)
_ENGINE_BOUNDS = (1e-10, 1.0)
_BESIDE_BOUNDS = (0.01, 1.0)
_ATTENTION_NAMES = frozenset(ATTENTION + kind.upper() for kind in KV_FORMATS)


def _validate(p: DeviceProfile) -> None:
    def need(good: bool, message: str) -> None:
        if not good:
            raise ConfigError(f"profile {p.name}: {message}")

    for name, (low, high) in _BOUNDS.items():
        value = getattr(p, name)
        need(low <= value <= high, f"{name} = {value:g} is outside {low:g}..{high:g}")
    need(p.process_bytes <= p.ram_bytes, "the process may hold more than there is")
    need(bool(p.cores), "it has no cores")
    for cores in p.cores:
        need(1 <= cores.count <= 512, f"{cores.count} cores of {cores.kind}")
        need(_CLOCK_BOUNDS[0] <= cores.hz <= _CLOCK_BOUNDS[1], f"{cores.kind} run at {cores.hz} Hz")
    total = sum(cores.count for cores in p.cores)
    need(p.threads <= total, f"{p.threads} threads on {total} cores")
    need(set(p.isa) <= set(ISA), f"isa {sorted(set(p.isa) - set(ISA))}; known: {', '.join(ISA)}")
    need(ANY in p.kernels, f"kernels lack the rates of {ANY!r}")
    for name, rate in p.kernels.items():
        known = name == ANY or name in FORMATS or name in _ATTENTION_NAMES
        need(known, f"kernels name the unknown format {name!r}")
        for value in rate.rates():
            need(_MAC_BOUNDS[0] <= value <= _MAC_BOUNDS[1], f"kernel rate {value:g} of {name}")
    for f in fields(p.engine):
        value = getattr(p.engine, f.name)
        good = _ENGINE_BOUNDS[0] <= value <= _ENGINE_BOUNDS[1]
        need(good, f"engine cost {f.name} = {value:g} s is outside {_ENGINE_BOUNDS[0]:g}..1")
    need(bool(p.reads), "it has no read rates")
    blocks = [read.block_bytes for read in p.reads]
    need(blocks == sorted(set(blocks)) and blocks[0] >= 512, f"read sizes {blocks} do not rise")
    for read in p.reads:
        need(_READ_BOUNDS[0] <= read.bytes_per_s <= _READ_BOUNDS[1], f"reads at {read.bytes_per_s}")
    # A rate may sag with the size, but a larger read is never done sooner.
    times = [read.block_bytes / read.bytes_per_s for read in p.reads]
    need(times == sorted(times), "a larger read takes less time than a smaller one")
    for f in fields(p.beside):
        share, (low, high) = getattr(p.beside, f.name), _BESIDE_BOUNDS
        need(low <= share <= high, f"beside {f.name} = {share:g} is outside {low:g}..{high:g}")
    need(p.kv_type in KV_FORMATS, f"kv_type {p.kv_type!r}; known: {', '.join(KV_FORMATS)}")
    unknown = sorted(set(p.npu_targets) - set(TARGETS))
    need(not unknown, f"npu.targets {unknown}; known: {', '.join(TARGETS)}")
    need(p.recipe in recipe_names(), f"recipe {p.recipe!r}; known: {', '.join(recipe_names())}")
    good = p.draft == "auto" or (isinstance(p.draft, int) and 0 <= p.draft <= MAX_DRAFT)
    need(good, f"draft {p.draft!r}: use 0 to {MAX_DRAFT} or auto")


# --- files -------------------------------------------------------------------------------------


def profile_names() -> list[str]:
    """Profiles that ship with us, without `auto`."""
    files = resources.files("mimo_edge.devices").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def load_profile(name: str | Path) -> DeviceProfile:
    """A profile by name, from a .toml file, or "auto": this machine.

    Raises UsageError when there is none of that name, ConfigError when it is malformed.
    """
    if name == AUTO:
        from mimo_edge.devices.this_machine import this_machine

        return this_machine()
    return build(str(name), *raw_profile(str(name)))


def build(
    name: str, title: str, figures: Mapping[str, Any], chain: tuple[str, ...]
) -> DeviceProfile:
    """A profile from raw figures as they stand in a file. Raises ConfigError."""
    values: dict[str, Any] = {}
    sources: dict[str, Source] = {}
    if missing := [key for key in FIGURES if key not in figures]:
        raise ConfigError(f"profile {name} lacks {', '.join(missing)}")
    for key, raw in figures.items():
        if key not in FIGURES:
            raise ConfigError(
                f"profile {name} has the unknown figure {key!r}", f"known: {', '.join(FIGURES)}"
            )
        figure = FIGURES[key]
        if not isinstance(raw, dict) or set(raw) != {"value", "evidence", "source"}:
            raise ConfigError(
                f"profile {name}: {key} is not a table of value, evidence and source",
                f"write {key.split('.')[1]} = {{ value = ..., evidence = ..., source = ... }}",
            )
        if raw["evidence"] not in EVIDENCE:
            raise ConfigError(
                f"profile {name}: {key} has the evidence {raw['evidence']!r}",
                f"use {', '.join(EVIDENCE)}",
            )
        try:
            values[figure.field] = figure.parse(raw["value"])
            sources[figure.field] = Source(raw["evidence"], _text(raw["source"]))
        except _Wrong as error:
            raise ConfigError(f"profile {name}: {key}: {error}") from None
    return DeviceProfile(name=name, title=title, sources=sources, chain=chain, **values)


def raw_profile(name: str) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """Title, figures as they stand in the files and chain of a profile. Raises as `load_profile`,
    but does not look at the figures."""
    figures: dict[str, Any] = {}
    title, at = "", name
    chain: list[str] = []
    while True:
        raw = _parse(at)
        title = title or raw["title"]
        for key, figure in raw["figures"].items():
            figures.setdefault(key, figure)
        parent = raw["inherits"]
        if parent is None:
            return title, figures, tuple(chain)
        if parent == name or parent in chain or len(chain) >= _MAX_INHERITED:
            line = " -> ".join([name, *chain, parent])
            raise ConfigError(f"profile {name} inherits in a circle or too deep: {line}")
        chain.append(parent)
        at = parent


def _parse(name: str) -> dict[str, Any]:
    """One file: title, inherits, and figures by "section.key"."""
    text = _read(name)
    try:
        raw = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"profile {name} is not TOML: {error}") from error
    schema, title = raw.pop("schema", None), raw.pop("title", None)
    inherits = raw.pop("inherits", None)
    if schema != SCHEMA:
        raise ConfigError(f"profile {name} has schema {schema!r}, this version reads {SCHEMA}")
    if not isinstance(title, str) or not title.strip():
        raise ConfigError(f"profile {name} has no title")
    if inherits is not None and (not isinstance(inherits, str) or inherits == AUTO):
        raise ConfigError(f"profile {name} inherits {inherits!r}: name a profile or a file")
    figures: dict[str, Any] = {}
    for section, table in raw.items():
        if not isinstance(table, dict):
            raise ConfigError(f"profile {name} has the unknown key {section!r}")
        figures |= {f"{section}.{key}": value for key, value in table.items()}
    if unknown := sorted(set(figures) - set(FIGURES)):
        raise ConfigError(
            f"profile {name} has unknown figures {unknown}", f"known: {', '.join(FIGURES)}"
        )
    return {"title": title, "inherits": inherits, "figures": figures}


def _read(name: str) -> str:
    if name in profile_names():
        return (resources.files("mimo_edge.devices") / f"{name}.toml").read_text("utf-8")
    path = Path(name)
    if path.suffix != ".toml":
        raise UsageError(
            f"there is no profile {name!r}",
            f"known: {AUTO}, {', '.join(profile_names())}; or a file that ends in .toml",
        )
    if not path_exists(path):
        raise UsageError(f"cannot read the profile {path}: there is no such file")
    return read_whole(path, _MAX_FILE_BYTES, ConfigError)


def _quoted(text: str) -> str:
    """A TOML basic string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _toml(value: Any) -> str:
    """A value as TOML, on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_toml(item)}' for key, item in value.items())} }}"
    return _quoted(str(value))
