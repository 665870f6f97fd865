"""What a step of the engine costs besides the products of its weights: starting graphs and their
operations, Python between them, choosing a token.

Measured with the real engine on models of MiMo-V2's structure whose matrices are next to nothing:
from what a step takes the forecast of its products and attention is taken off, what differs between
few and many layers is a layer, what is left a step. So the figures hold for the build at hand,
whatever its graphs look like, and nothing counts twice.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mimo_edge.bench.random_model import tiny_config, write_model
from mimo_edge.budget import plan, usual_kv_type
from mimo_edge.bundle import Bundle
from mimo_edge.config import MimoConfig
from mimo_edge.devices.profile import PROBED_WIDTH, DeviceProfile, EngineCost
from mimo_edge.engine import Engine
from mimo_edge.experts.table import ExpertTable
from mimo_edge.kv_format import DEFAULT_KV_TYPE
from mimo_edge.planner.forecast import Forecast, forecast
from mimo_edge.planner.hits import EVEN, expected_hits
from mimo_edge.runtimes.base import VERIFY_ROWS
from mimo_edge.sampling import Sampler, SamplingParams

if TYPE_CHECKING:
    from mimo_edge.runtimes.ggml.expert_source import CachedExperts

ROUNDS = 3
FEW, MANY = 2, 8  # layers
_EXPERTS, _CHOSEN, _EXPERT_WIDTH = 16, 8, 64
_NARROW = 32
_SMALL_VOCAB, _LARGE_VOCAB = 512, 32 * 1024
_MTP_BLOCKS = 3
_DRAFTS = VERIFY_ROWS - 1
_CONTEXT, _PROMPT, _WARMUP = 512, 32, 6
_GROUP, _LEAST = 8, 2
_LEAST_S = 1e-8
_UNIFORM = 1e3  # a temperature at which every token is as likely
_ROWS = 256  # of a prompt
_MIX = (0, 1, 1, 1, 1, 0, 1, 1)  # global and sliding layers, as in the first ones of MiMo-V2-Flash
_NOTHING = EngineCost(*(1e-10 for _ in fields(EngineCost)))


def engine_cost(
    folder: Path,
    threads: int,
    seconds: float,
    device: DeviceProfile,
    clock: Callable[[], float] = time.perf_counter,
) -> EngineCost:
    """Measure it; `device` is this one, its other figures measured. Models of a few MB are written
    to `folder`, whose owner removes them. Raises BackendError when ggml refuses, ExportError when
    the disk is full."""
    each = seconds / 18 / ROUNDS
    bare = replace(device, engine=_NOTHING)
    few, many = (_model(folder, layers) for layers in (FEW, MANY))
    # As narrow as can be: the head's product is not what is asked for.
    narrow = [_model(folder, FEW, vocab, _NARROW) for vocab in (_SMALL_VOCAB, _LARGE_VOCAB)]

    def step(engine: Engine, path: Path, drafts: int, streamed: bool = False) -> float:
        taken, depth = _step(engine, drafts, each, clock)
        return taken - _reckoned(path, bare, depth, streamed).decodes[drafts].cost.seconds

    def once(path: Path, streamed: bool) -> list[float]:
        with _engine(path, threads, streamed) as engine:
            found = [step(engine, path, drafts, streamed) for drafts in (0, 1, _DRAFTS)]
            if not streamed:
                prompt = _prompt_s(engine, 2 * each, clock)
                found.append(prompt - _reckoned(path, bare, 0).prefill.cost.seconds)
            return found

    def once_narrow(path: Path) -> float:
        with _engine(path, threads, False) as engine:
            return step(engine, path, 0)

    def all_once() -> list[float]:
        models = [(few, False), (many, False), (few, True), (many, True)]
        steps = [seconds for path, streamed in models for seconds in once(path, streamed)]
        return steps + [once_narrow(path) for path in narrow]

    # What disturbs the machine for a moment hits one round.
    rounds = [all_once() for _ in range(ROUNDS)]
    usual = [statistics.median(taken) for taken in zip(*rounds, strict=True)]
    few0, few1, few3, few_rows, many0, _, many3, many_rows = usual[:8]
    few_s0, _, few_s3, many_s0, _, many_s3, small, large = usual[8:]
    logits = (large - small) / (_LARGE_VOCAB - _SMALL_VOCAB) * 1000
    row_s = logits * _SMALL_VOCAB / 1000
    layers = MANY - FEW
    layer, layer4 = (many0 - few0) / layers, (many3 - few3) / layers
    base = few0 - FEW * layer - row_s
    # What steps with one draft and with three take beyond base, layers and rows of logits.
    layer2 = layer + (layer4 - layer) / _DRAFTS
    one = few1 - base - FEW * layer2 - 3 * row_s
    three = few3 - base - FEW * layer4 - (VERIFY_ROWS + _DRAFTS) * row_s
    draft = max(0.0, three - one) / (_DRAFTS - 1)
    # On a disturbed machine a difference may come out below nothing, and four rows below one.
    layer, streamed = max(_LEAST_S, layer), max(_LEAST_S, (many_s0 - few_s0) / layers)
    return EngineCost(
        step=max(_LEAST_S, base),
        layer=layer,
        layer4=max(layer, layer4),
        streamed=streamed,
        streamed4=max(streamed, (many_s3 - few_s3) / layers),
        drafting=max(_LEAST_S, one - draft),
        draft=max(_LEAST_S, draft),
        logits=max(_LEAST_S, logits),
        row=max(_LEAST_S, ((many_rows - few_rows) / layers - layer4) / _ROWS),
        arrival=max(_LEAST_S, _arrival(many, threads, 2 * each)),
    )


def _arrival(path: Path, threads: int, seconds: float) -> float:
    """Seconds that a step spends on an expert that is read, besides waiting for it: choosing its
    slot, queueing, checking, a graph more."""
    found = []
    for slots in (_all_but_one(path), _CHOSEN):
        with _opened(path, threads, slots) as (engine, [source]):
            found.append(_busy(engine, source, seconds))
    (near, few), (far, many) = found
    return (far - near) / max(1.0, many - few)


def _busy(engine: Engine, source: CachedExperts, seconds: float) -> tuple[float, float]:
    """Median seconds of a step that are not waited for experts, and experts read in a step. Tokens
    are drawn, so that others are wanted every time."""
    steps = iter(
        engine.generate(
            engine.sequence(),
            list(range(_PROMPT)),
            Sampler(SamplingParams(temperature=_UNIFORM, seed=1)),
        )
    )
    for _ in range(_WARMUP):
        next(steps)
    samples: list[float] = []
    first, began = source.stats().total().loads, time.perf_counter()
    while len(samples) < _LEAST or time.perf_counter() - began < seconds:
        before, start = source.stats().total(), time.perf_counter()
        gained = len(list(islice(steps, _GROUP)))
        taken = time.perf_counter() - start
        if gained < _GROUP:
            break
        waited = source.stats().total().wait_s - before.wait_s
        samples.append((taken - waited) / _GROUP)
    steps.close()  # type: ignore[attr-defined]
    loads = (source.stats().total().loads - first) / (_GROUP * len(samples))
    return statistics.median(samples), loads


def _reckoned(path: Path, device: DeviceProfile, depth: int, streamed: bool = False) -> Forecast:
    """What a forecast says of the model."""
    with Bundle.open(path) as bundle:
        config, tensors = bundle.config, bundle.tensors
        kind = usual_kv_type(DEFAULT_KV_TYPE, config, _CONTEXT)
        budget = plan(config, tensors, _CONTEXT, kv_type=kind)
        if streamed:
            total = config.n_routed_experts * sum(config.moe_layer_freq)
            budget = replace(budget, streamed=True, slots=total, experts=total)
        hits = expected_hits(1, 1, EVEN, None)
        return forecast(config, tensors, budget, device, hits, draft=0, depth=depth, prompt=_ROWS)


def _config(layers: int, vocab: int, width: int) -> MimoConfig:
    return replace(
        tiny_config("MiMo-V2-Flash", _MTP_BLOCKS),
        num_hidden_layers=layers,
        hybrid_layer_pattern=_MIX[:layers],
        moe_layer_freq=(1,) * layers,
        hidden_size=width,
        n_routed_experts=_EXPERTS,
        num_experts_per_tok=_CHOSEN,
        moe_intermediate_size=_EXPERT_WIDTH,
        vocab_size=vocab,
    )


def _model(folder: Path, layers: int, vocab: int = _SMALL_VOCAB, width: int = PROBED_WIDTH) -> Path:
    path = folder / f"{layers}-{vocab}-{width}.gguf"
    write_model(path, _config(layers, vocab, width), head="Q4_0")
    return path


@contextmanager
def _engine(path: Path, threads: int, streamed: bool) -> Iterator[Engine]:
    """An engine over the model: resident, or with a slot for every expert but one."""
    # One is missing now and then: with all of them nothing would be guessed.
    with _opened(path, threads, _all_but_one(path) if streamed else None) as (engine, _):
        yield engine


def _all_but_one(path: Path) -> int:
    with Bundle.open(path) as bundle:
        return ExpertTable.from_bundle(bundle).total - 1


@contextmanager
def _opened(
    path: Path, threads: int, slots: int | None
) -> Iterator[tuple[Engine, list[CachedExperts]]]:
    """An engine, and what streams its experts through `slots`: nothing when that is None."""
    from mimo_edge.runtimes.ggml.backend import GgmlBackend
    from mimo_edge.runtimes.ggml.device import Device
    from mimo_edge.runtimes.ggml.expert_source import CachedExperts
    from mimo_edge.runtimes.ggml.raw import GgufTensors

    made: list[CachedExperts] = []
    with ExitStack() as stack:
        bundle = Bundle.open(path)
        stack.callback(bundle.close)

        def experts(device: Device) -> CachedExperts:
            assert slots is not None
            made.append(CachedExperts(device, ExpertTable.from_bundle(bundle), slots))
            return made[-1]

        source = GgufTensors(bundle.config, [bundle.gguf], bounded=slots is not None)
        backend = GgmlBackend(
            source,
            threads=threads,
            kv_type=usual_kv_type(DEFAULT_KV_TYPE, bundle.config, _CONTEXT),
            experts=None if slots is None else experts,
        )
        engine = Engine(backend, _CONTEXT)
        stack.callback(engine.close)
        yield engine, made


def _step(
    engine: Engine, drafts: int, seconds: float, clock: Callable[[], float]
) -> tuple[float, int]:
    """Seconds of a step that drafts so many tokens, the median of means of few, as a benchmark has
    it, and the tokens that were in the conversation half-way."""
    banned = np.zeros(engine.backend.config.vocab_size, np.bool_)
    banned[-1] = True
    steps = iter(
        engine.generate(
            engine.sequence(),
            [(7 * i + 3) % _SMALL_VOCAB for i in range(_PROMPT)],
            Sampler(SamplingParams(), banned),  # as of models with a tokenizer
            draft=drafts,
        )
    )
    first = _PROMPT + sum(len(next(steps)) for _ in range(_WARMUP))
    samples: list[float] = []
    gained = 0
    began = clock()
    while len(samples) < _LEAST or clock() - began < seconds:
        start = clock()
        group = list(islice(steps, _GROUP))
        if len(group) < _GROUP:
            break
        samples.append((clock() - start) / _GROUP)
        gained += sum(map(len, group))
    steps.close()  # type: ignore[attr-defined]
    return statistics.median(samples), first + gained // 2


def _prompt_s(engine: Engine, seconds: float, clock: Callable[[], float]) -> float:
    """Seconds of a prompt of _ROWS tokens: the median, after one that builds its graphs."""
    samples: list[float] = []
    began = clock()
    while len(samples) < _LEAST or clock() - began < seconds:
        ids = [(7 * i + len(samples)) % _SMALL_VOCAB for i in range(_ROWS)]
        sequence = engine.sequence()
        steps = iter(engine.generate(sequence, ids, Sampler(SamplingParams()), draft=0))
        start = clock()
        next(steps)
        samples.append(clock() - start)
        steps.close()  # type: ignore[attr-defined]
    return statistics.median(samples)
