"""How long a token takes: from bytes and multiply-adds, against a profile's rates.

Every product of a weight matrix takes the longer of two times: its bytes from memory, or its
multiply-adds in the processor; only the latter for what the processor's caches still hold from the
pass before. What the engine does besides comes on top, as it was measured.

Experts that are missing come from flash while others compute (overlap.py): what is not hidden by
that is waited for. Whatever limits a step is named by the seconds it accounts for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from mimo_edge.budget import Budget
from mimo_edge.config import LayerSpec, MimoConfig
from mimo_edge.devices.profile import PROBED_WIDTH, DeviceProfile, ReadRate
from mimo_edge.experts.reader import part_bytes
from mimo_edge.gguf_file import TensorInfo
from mimo_edge.kv_format import KV_FORMATS, ring_type
from mimo_edge.planner.hits import Hits, distinct_experts
from mimo_edge.planner.overlap import Streamed, few_tokens, many_tokens
from mimo_edge.planner.weights import Scan, Weights
from mimo_edge.runtimes.base import VERIFY_ROWS
from mimo_edge.speculative import DraftSetting, max_draft
from mimo_edge.units import even_part

Resource = Literal["flash", "memory bandwidth", "compute", "host work"]

# A byte of weights loaded crosses memory about this many times (read, reordered, written): 1.4 to
# 2 GB/s were measured where kernels draw 20 to 26 GB/s.
LOAD_PASSES = 13.0
# Passes of more tokens compute experts one by one with many rows each (runtimes/ggml/streamed.py),
# if a matrix has so many weights (runtimes/ggml/expert_matrix.py).
FEW_TOKENS, LARGE_EXPERT = 16, 1 << 19
# A model of so many times the caches' size has all its weights in them, or none.
ALL_CACHED, NONE_CACHED = 2 / 3, 4 / 3
# Chance that the draft of each depth is accepted when the shallower ones were: MiMo-V2.5 on a
# GPU, all blocks on the target's state (spec); MiMo-7B's one block on prose and code together.
ACCEPTANCE: Mapping[str, tuple[float, ...]] = {"mimo_v2": (0.82, 0.75, 0.78), "mimo": (0.7,)}


@dataclass(frozen=True)
class Cost:
    """Seconds by what they are spent on."""

    flash: float = 0.0
    memory: float = 0.0
    compute: float = 0.0
    host: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flash + other.flash,
            self.memory + other.memory,
            self.compute + other.compute,
            self.host + other.host,
        )

    def scaled(self, factor: float) -> Cost:
        """`factor` times it."""
        return Cost(*(factor * n for n in (self.flash, self.memory, self.compute, self.host)))

    @property
    def seconds(self) -> float:
        """All of them."""
        return self.flash + self.memory + self.compute + self.host

    @property
    def binding(self) -> Resource:
        """What most of the time goes to."""
        shares: dict[Resource, float] = {
            "flash": self.flash,
            "memory bandwidth": self.memory,
            "compute": self.compute,
            "host work": self.host,
        }
        return max(shares, key=lambda name: shares[name])


@dataclass(frozen=True)
class Decode:
    """Decoding with `draft` drafted tokens: one step costs `cost` and gains `tokens_per_step`."""

    draft: int
    tokens_per_step: float
    cost: Cost
    flash_bytes_per_token: float
    memory_bytes_per_token: float

    @property
    def tps(self) -> float:
        """Tokens per second."""
        return self.tokens_per_step / self.cost.seconds

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "draft": self.draft,
            "tps": self.tps,
            "tokens_per_step": self.tokens_per_step,
            "binding": self.cost.binding,
            "seconds": asdict(self.cost),
            "flash_bytes_per_token": self.flash_bytes_per_token,
            "memory_bytes_per_token": self.memory_bytes_per_token,
        }


@dataclass(frozen=True)
class Prefill:
    """A prompt of `tokens` tokens, from an empty conversation."""

    tokens: int
    cost: Cost
    flash_bytes: float

    @property
    def tps(self) -> float:
        """Tokens per second."""
        return self.tokens / self.cost.seconds

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "tokens": self.tokens,
            "tps": self.tps,
            "first_token_s": self.cost.seconds,
            "binding": self.cost.binding,
            "seconds": asdict(self.cost),
            "flash_bytes": self.flash_bytes,
        }


@dataclass(frozen=True)
class Forecast:
    """`decodes[k]` drafts k tokens; `draft` is the one that runs: the fastest, or the one set.
    `hot_*` are the same device hot. `depth` tokens are in the conversation."""

    decodes: tuple[Decode, ...]
    draft: int
    prefill: Prefill
    load_s: float
    hits: Hits
    depth: int
    hot_decode: Decode
    hot_prefill: Prefill

    @property
    def decode(self) -> Decode:
        """The way it runs."""
        return next(d for d in self.decodes if d.draft == self.draft)

    @property
    def plain(self) -> Decode:
        """Without drafts."""
        return self.decodes[0]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "decode": self.decode.to_dict(),
            "by_draft": [d.to_dict() for d in self.decodes],
            "prefill": self.prefill.to_dict(),
            "load_s": self.load_s,
            "hit_rate": self.hits.rate,
            "hit_rate_source": self.hits.source,
            "depth": self.depth,
            "hot": {"decode": self.hot_decode.to_dict(), "prefill": self.hot_prefill.to_dict()},
        }


def forecast(
    config: MimoConfig,
    tensors: Mapping[str, TensorInfo],
    budget: Budget,
    profile: DeviceProfile,
    hits: Hits,
    *,
    draft: DraftSetting = "auto",
    depth: int = 0,
    prompt: int = 512,
    acceptance: Sequence[float] | None = None,
) -> Forecast:
    """Forecast of a model whose memory is planned as `budget`.

    `config` has as many MTP blocks as are loaded. `acceptance` is the chance per depth that a
    draft is accepted (default: the family's).
    """
    chances = ACCEPTANCE[config.family] if acceptance is None else tuple(acceptance)
    weights = Weights.of(config, tensors)
    warm = heated(profile)

    def decode(device: DeviceProfile, drafts: int) -> Decode:
        machine = _Machine(config, weights, budget, device, hits, depth, drafts > 0)
        return machine.decode(drafts, depth, chances)

    limit = max_draft(config)
    decodes = tuple(decode(profile, drafts) for drafts in range(limit + 1))
    fastest = max(decodes, key=lambda d: d.tps).draft
    chosen = fastest if draft == "auto" else min(draft, limit)
    cool, hot = (_Machine(config, weights, budget, p, hits, prompt) for p in (profile, warm))
    return Forecast(
        decodes,
        chosen,
        cool.prefill(prompt),
        cool.load_s(),
        hits,
        depth,
        decode(warm, chosen),
        hot.prefill(prompt),
    )


def heated(profile: DeviceProfile) -> DeviceProfile:
    """The profile of the same device, hot."""
    slower, storage = profile.compute_hot, profile.storage_hot
    return replace(
        profile,
        memory_bytes_per_s=profile.memory_bytes_per_s * slower,
        kernels={name: rate.scaled(slower) for name, rate in profile.kernels.items()},
        reads=tuple(ReadRate(r.block_bytes, r.bytes_per_s * storage) for r in profile.reads),
        engine=profile.engine.scaled(1 / slower),
    )


def _longer(times: Sequence[tuple[float, float]], cached: float) -> Cost:
    """Of every pair (seconds of memory, of compute) the longer one, but for the share `cached` of
    the weights that of compute."""
    from_memory = sum(memory for memory, compute in times if memory >= compute)
    in_its_shadow = sum(compute for memory, compute in times if memory >= compute)
    computed = sum(compute for memory, compute in times if memory < compute)
    return Cost(memory=(1 - cached) * from_memory, compute=cached * in_its_shadow + computed)


class _Machine:
    """One model on one device: the cost of passes with about `depth` tokens in the cache, and with
    drafts or without."""

    def __init__(
        self,
        config: MimoConfig,
        weights: Weights,
        budget: Budget,
        profile: DeviceProfile,
        hits: Hits,
        depth: float,
        drafting: bool = False,
    ) -> None:
        self.config, self.weights, self.budget, self.profile = config, weights, budget, profile
        self.hits = hits
        self.moe_layers = sum(config.moe_layer_freq)
        # one expert of every layer is three matrices per layer, read in parts
        self.expert_bytes = weights.expert.total_bytes / max(1, self.moe_layers)
        self.part_bytes = part_bytes(round(self.expert_bytes / 3)) if budget.streamed else 0
        self.flash_bytes_per_s = (
            profile.read_rate(self.part_bytes) if budget.streamed else float("inf")
        )
        self.cached = self.cached_share(depth, drafting)

    def cached_share(self, depth: float, drafting: bool) -> float:
        """How much of what passes look at stays in the caches from one to the next."""
        weights, c = self.weights, self.config
        used = weights.trunk.total_bytes + weights.head.total_bytes
        used += sum(nbytes for _, nbytes, _ in self.seen(c.layers, depth))
        if self.budget.streamed:
            used += self.budget.slots * self.expert_bytes
        else:
            used += c.n_routed_experts * weights.expert.total_bytes
        if drafting:
            used += c.num_mtp_layers * weights.mtp_block.total_bytes
        times = used / self.profile.cache_bytes
        return min(1.0, max(0.0, (NONE_CACHED - times) / (NONE_CACHED - ALL_CACHED)))

    def matrices(self, scan: Scan, rows: float) -> Cost:
        """Products of every matrix of a scan with `rows` rows."""
        times = []
        for kind, nbytes in scan.nbytes.items():
            rate, macs = self.profile.kernel(kind), scan.macs[kind]
            few = min(int(rows), VERIFY_ROWS)
            # More rows than there are, where that is faster (runtimes/ggml/row_counts.py).
            counts = enumerate(rate.cold[few - 1 :], few)
            cold = min((count * macs / speed for count, speed in counts), default=0.0)
            memory = max(nbytes / self.profile.memory_bytes_per_s, cold)
            times.append((memory, rows * macs / rate.at(rows)))
        return _longer(times, self.cached)

    def experts(self, distinct: float, rows: float) -> Cost:
        """Products of the routed experts of all layers, `distinct` in each, for `rows` tokens."""
        c, streamed, times = self.config, self.budget.streamed, []
        per_expert = rows * c.num_experts_per_tok / distinct
        # Kernels for many rows are of use where an expert is large and a pass is long.
        large = c.hidden_size * c.moe_intermediate_size >= LARGE_EXPERT and rows > FEW_TOKENS
        for kind, nbytes in self.weights.expert.nbytes.items():
            rate, macs = self.profile.kernel(kind), distinct * self.weights.expert.macs[kind]
            cold = (rate.cold_stored if streamed else rate.cold[0]) if rate.cold else 0.0
            memory = max(
                distinct * nbytes / self.profile.memory_bytes_per_s, macs / cold if cold else 0.0
            )
            speed = rate.row
            if large:
                speed = rate.stored_at(per_expert) if streamed else rate.at(per_expert)
            times.append((memory, per_expert * macs / speed))
        return _longer(times, self.cached)

    def seen(self, layers: Iterable[LayerSpec], depth: float) -> Iterator[tuple[str, float, float]]:
        """The cache's format in every layer, its bytes there that a query looks at, and the
        multiply-adds it does with them."""
        c = self.config
        for spec in layers:
            tokens = depth + 1 if spec.window is None else min(depth + 1, spec.window)
            kind = self.budget.kv_type if spec.window is None else ring_type(self.budget.kv_type)
            dims = (c.head_dim, c.v_head_dim)
            nbytes = sum(KV_FORMATS[kind].row_bytes(spec.num_key_value_heads, n) for n in dims)
            yield kind, tokens * nbytes, tokens * c.num_attention_heads * sum(dims)

    def attention(self, layers: Iterable[LayerSpec], rows: float, depth: float) -> Cost:
        """Scores and values of `rows` queries over about `depth` tokens in each layer."""
        times = [
            (
                nbytes / self.profile.memory_bytes_per_s,
                rows * macs / self.profile.attention(kind).at(rows),
            )
            for kind, nbytes, macs in self.seen(layers, depth)
        ]
        return _longer(times, self.cached)

    def distinct(self, rows: float) -> float:
        """Experts of a layer that `rows` tokens use together."""
        c = self.config
        return distinct_experts(
            c.n_routed_experts, c.num_experts_per_tok, rows, self.hits.independent
        )

    def trunk(self, layers: Iterable[LayerSpec], rows: float, depth: float) -> Cost:
        """What these layers take besides routed experts and what the engine does."""
        specs = list(layers)
        cost = self.attention(specs, rows, depth)
        for spec in specs:
            cost = cost + self.matrices(self.weights.layers[spec.index], rows)
        return cost

    def layers(
        self, layers: Sequence[LayerSpec], rows: float, depth: float, around: Cost, hit_rate: float
    ) -> tuple[Cost, float]:
        """These layers for `rows` tokens, `around` being what they take besides routed experts; and
        the bytes read from flash."""
        count = sum(spec.moe for spec in layers)
        if not count:
            return around, 0.0
        distinct = self.distinct(rows)
        computed = self.experts(distinct, rows).scaled(count / self.moe_layers)
        if not self.budget.streamed or hit_rate >= 1.0:
            return around + computed, 0.0
        device = self.profile
        rate = self.flash_bytes_per_s * device.beside.reads
        pass_ = Streamed(
            before=self.before(layers, rows, depth),
            wanted=distinct,
            missing=1.0 - hit_rate,
            compute_s=computed.seconds / distinct / count,
            read_s=self.expert_bytes / rate,
            arrival_s=device.engine.arrival,
            slowed=1.0 / device.beside.kernels - 1.0,
            # a part in every lane, half-way on average
            late_s=device.lanes * self.part_bytes / 2 / rate,
        )
        walked = many_tokens(pass_) if rows > FEW_TOKENS else few_tokens(pass_)
        done = walked.computing / computed.seconds
        cost = Cost(
            walked.flash, done * computed.memory + walked.lost, done * computed.compute, walked.host
        )
        return around + cost, walked.experts * self.expert_bytes

    def before(self, layers: Sequence[LayerSpec], rows: float, depth: float) -> list[float]:
        """Seconds that each of these layers that has routed experts takes before they are chosen,
        with the dense layers in front of it."""
        host = self.host(rows).seconds / self.config.num_hidden_layers
        found, seconds = [], 0.0
        for spec in layers:
            seconds += self.trunk([spec], rows, depth).seconds + host
            if spec.moe:
                found.append(seconds)
                seconds = 0.0
        return found

    def host(self, rows: float) -> Cost:
        """What the engine does in the layers besides products, for a pass of `rows` rows."""
        engine = self.profile.engine
        more = (min(rows, VERIFY_ROWS) - 1) / (VERIFY_ROWS - 1)
        layer = engine.layer + more * (engine.layer4 - engine.layer)
        slots = engine.streamed + more * (engine.streamed4 - engine.streamed)
        streamed = self.moe_layers if self.budget.streamed else 0
        layers = self.config.num_hidden_layers
        host = (layers - streamed) * layer + streamed * slots
        if rows > VERIFY_ROWS:
            host += layers * rows * engine.row * self.config.hidden_size / PROBED_WIDTH
        return Cost(host=host)

    def head(self, rows: float) -> Cost:
        """The head for `rows` rows, and what is done with their logits."""
        logits = rows * self.config.vocab_size / 1000 * self.profile.engine.logits
        return self.matrices(self.weights.head, rows) + Cost(host=logits)

    def block(self, number: int, depth: int) -> Cost:
        """A pass of an MTP block, which writes as many rows as a verify has, and its draft."""
        spec = self.config.layer(self.config.num_hidden_layers + number)
        pass_ = self.matrices(self.weights.mtp_block, VERIFY_ROWS)
        return pass_ + self.attention([spec], VERIFY_ROWS, depth) + self.head(1)

    def decode(self, draft: int, depth: int, acceptance: Sequence[float]) -> Decode:
        """One step: draft, and verify all of it at once."""
        rows = draft + 1.0
        trunk = self.config.layers
        around = self.matrices(self.weights.trunk, rows) + self.attention(trunk, rows, depth)
        around = around + self.host(rows)
        cost, flash = self.layers(trunk, rows, depth, around, self.hits.rate)
        cost = cost + self.head(rows) + Cost(host=self.profile.engine.step)
        if draft:
            cost = cost + Cost(host=self.profile.engine.drafting)
        for block in range(draft):
            cost = cost + self.block(block, depth) + Cost(host=self.profile.engine.draft)
        gained = chance = 1.0
        for k in range(draft):
            chance *= acceptance[k] if k < len(acceptance) else 0.0
            gained += chance
        scanned = self.weights.trunk.total_bytes + (1 + draft) * self.weights.head.total_bytes
        scanned += draft * self.weights.mtp_block.total_bytes
        scanned += self.distinct(rows) * self.weights.expert.total_bytes
        return Decode(draft, gained, cost, flash / gained, scanned / gained)

    def prefill(self, tokens: int) -> Prefill:
        """A prompt in chunks; each costs a pass over the experts that are not in memory. Of the
        last layer only the last token is wanted (runtimes/ggml/passes.py)."""
        cost, flash, done = Cost(), 0.0, 0
        *layers, last = self.config.layers
        # nearly every expert is wanted, so what is in memory counts by its number
        resident = min(1.0, self.budget.slots / max(1, self.budget.experts))
        while done < tokens:
            rows = even_part(tokens - done, self.budget.chunk)
            middle = done + rows / 2
            around = self.trunk(layers, rows, middle) + self.host(rows)
            passed, read = self.layers(layers, rows, middle, around, resident)
            cost = cost + passed + Cost(host=self.profile.engine.step)
            flash, done = flash + read, done + rows
        passed, read = self.layers([last], 1, tokens, self.trunk([last], 1, tokens), resident)
        return Prefill(tokens, cost + passed + self.head(1), flash + read)

    def load_s(self) -> float:
        """Seconds to read what is resident and store it as the kernels want it."""
        held = {"weights", "MTP", "experts"}
        nbytes = sum(line.nbytes for line in self.budget.lines if line.name in held)
        rate = min(
            self.profile.reads[-1].bytes_per_s, self.profile.memory_bytes_per_s / LOAD_PASSES
        )
        return nbytes / rate
