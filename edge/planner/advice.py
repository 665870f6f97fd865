"""What to change when a plan does not fit or is too slow: every proposal is planned, then ranked.

First come those that lead to the better verdict, among them those that cost less quality, among
those the faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from mimo_edge.budget import usual_kv_type
from mimo_edge.devices.profile import load_profile
from mimo_edge.inventory import BUILT_IN
from mimo_edge.known_models import known_model
from mimo_edge.kv_format import fitting_kv_type
from mimo_edge.planner.forecast import Forecast
from mimo_edge.planner.model import built_in, of_config
from mimo_edge.planner.planning import VERDICTS, Change, Plan, Settings, evaluate, pinned_slots
from mimo_edge.quant.base import get_format
from mimo_edge.quant.recipe import Recipe, recipe_names
from mimo_edge.units import format_bytes, format_rate

SMALL_MODEL = "MiMo-7B"
SERVER = "workstation"
# Smaller experts, largest first; what each costs in quality is docs/quality.md.
_RECIPES = ("q4_0", "mxfp4", "q3_k", "iq3_xxs", "q2_k", "iq2_xxs")
_SHORT_CONTEXT = 2048
# A change that brings less is not worth a word.
_GAIN = 1.15
# Attention in 4 bits halves what must stay in memory; recipes keep 8 for its quality.
_LIGHT = (("*.attn_*.weight", "Q4_0"),)
# A process that holds more of the device's memory than this is killed, or its pages are swapped.
_MOST_RAM = 0.7


class _Proposal(NamedTuple):
    action: str
    loss: int  # in quality or service; 0 is none
    plan: Plan


def changes(plan: Plan) -> tuple[Change, ...]:
    """What would help, best first; nothing when the plan is usable."""
    if plan.verdict == "usable":
        return ()
    kept = [p for p in _proposals(plan) if _helps(p.plan, plan)]
    kept.sort(key=lambda p: (VERDICTS.index(p.plan.verdict), p.loss, -_tps(p.plan)))
    found = [
        Change(
            p.action,
            p.plan.verdict,
            p.plan.forecast.decode.tps,
            _effect(p.plan.forecast),
            p.plan.model.name == plan.model.name,
        )
        for p in kept
        if p.plan.forecast is not None
    ]
    remote = _remote(plan)
    return (*found, remote) if remote is not None else tuple(found)


def hopeless(plan: Plan, found: Sequence[Change]) -> bool:
    """Whether this model on this device stays impractical with every change found."""
    bad = VERDICTS.index("not practical")
    return VERDICTS.index(plan.verdict) >= bad and all(
        VERDICTS.index(change.verdict) >= bad for change in found if change.here
    )


def _proposals(plan: Plan) -> Iterator[_Proposal]:
    model, device, settings = plan.model, plan.profile, plan.settings

    def tried(action: str, loss: int, **other: object) -> _Proposal:
        return _Proposal(action, loss, evaluate(model, device, _with(settings, other)))

    if plan.need_bytes is not None:
        more = plan.need_bytes + plan.need_bytes // 16  # reserves grow with it
        if more <= _MOST_RAM * device.ram_bytes:
            yield tried(
                f"--ram {more >> 20}MiB of the device's {format_bytes(device.ram_bytes)}, if the "
                f"system lets a process keep as much",
                1,
                ram=more,
            )
    lighter: dict[str, object] = {}
    if settings.pin:
        lighter["pin"] = 0
        yield from _fewer_pins(plan, tried)
    if settings.context > _SHORT_CONTEXT:
        lighter["context"] = _SHORT_CONTEXT
        yield tried(f"--context {_SHORT_CONTEXT}", 1, context=_SHORT_CONTEXT)
    if settings.kv_type == "f16" and fitting_kv_type("q8_0", model.config) == "q8_0":
        lighter["kv_type"] = "q8_0"
        yield tried("--kv-type q8_0", 1, kv_type="q8_0")
    if settings.draft != 0 and model.config.num_mtp_layers:
        lighter["draft"] = 0
        yield tried("--draft 0 (MTP blocks stay on flash)", 0, draft=0)
    words = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in lighter.items())
    if len(lighter) > 1:
        yield tried(words, 2, **lighter)
    for step, recipe in enumerate(dict.fromkeys((model.recipe, *_RECIPES))):
        stored = recipe == model.recipe
        if recipe not in recipe_names():
            continue  # another maker's file: its recipe has no name
        smaller = model if stored else model.with_recipe(recipe)
        if not stored and smaller.bundle_bytes >= 0.98 * model.bundle_bytes:
            continue
        made, action = plan if stored else evaluate(smaller, device, settings), ""
        if not made.fits and lighter:
            action = f", with {words}"
            made = evaluate(smaller, device, _with(settings, lighter))
        if not made.fits and model.config.family != "mimo":
            overrides = " ".join(f"--override '{glob}={kind}'" for glob, kind in _LIGHT)
            action = f" {overrides} (attention in 4 bits){action}"
            made = evaluate(model.with_recipe(recipe, _LIGHT), device, _with(settings, lighter))
        elif stored:
            continue  # proposed above
        bits = get_format(Recipe.named(recipe).bulk).bits_per_weight
        calibrate = ", needs --calibrate" if smaller.needs_calibration else ""
        weight = "expert weight" if model.config.n_routed_experts else "weight"
        action = f"--recipe {recipe} ({bits:.3g} bits per {weight}{calibrate}){action}"
        yield _Proposal(action, 3 + step, made)
    if model.config.family != "mimo" and model.name != SMALL_MODEL:
        other = of_config(SMALL_MODEL, known_model(SMALL_MODEL), device, None)
        kind = usual_kv_type(device.kv_type, other.config, settings.context)
        changed = replace(settings, acceptance=None, kv_type=kind, pin=0)
        draft = min(settings.draft, 1) if isinstance(settings.draft, int) else settings.draft
        small = evaluate(other, device, replace(changed, draft=draft))
        yield _Proposal(
            f"{SMALL_MODEL} instead (recipe {other.recipe}, {format_bytes(other.bundle_bytes)})",
            20,
            small,
        )
        if not small.fits:
            yield from _nano(plan)
    elif not plan.fits:
        yield from _nano(plan)


def _nano(plan: Plan) -> Iterator[_Proposal]:
    """What is left where no released model fits."""
    if plan.model.name == BUILT_IN:
        return
    device = plan.profile
    made = built_in(device)
    context = min(plan.settings.context, made.config.max_position_embeddings)
    settings = replace(
        plan.settings,
        context=context,
        kv_type=usual_kv_type(device.kv_type, made.config, context),
        acceptance=None,
        pin=0,
    )
    yield _Proposal(
        f"{BUILT_IN} instead (short commands to tool calls, nothing else; "
        f"{format_bytes(made.bundle_bytes)})",
        30,
        evaluate(made, device, _with(settings, {})),
    )


def _fewer_pins(plan: Plan, tried: Callable[..., _Proposal]) -> Iterator[_Proposal]:
    """As many pinned experts as there is room for; or none, where that is no number."""
    config, budget = plan.model.config, plan.budget
    if plan.fits_ram or budget is None or not budget.streamed:
        return
    each = max(1, pinned_slots(config, 1))
    room = (budget.slots - config.num_experts_per_tok) // each
    fewer = max(0, min(room, plan.settings.pin - 1))
    yield tried(f"--pin {fewer} (fewer pinned experts)", 0, pin=fewer)


def _with(settings: Settings, other: Mapping[str, Any]) -> Settings:
    """These settings with some others; what no longer fits the context is cut to it."""
    changed = replace(settings, **other)
    return replace(
        changed,
        depth=min(changed.depth, changed.context - 1),
        prompt=min(changed.prompt, changed.context),
    )


def _remote(plan: Plan) -> Change | None:
    """Run it elsewhere and talk to it from here."""
    if plan.profile.name == SERVER:
        return None
    device = load_profile(SERVER)
    settings = replace(plan.settings, ram=device.process_bytes)
    made = evaluate(plan.model, device, settings)
    if made.forecast is None:
        return None
    return Change(
        f"run it on another machine of the network ({device.title}), this device its client",
        made.verdict,
        made.forecast.decode.tps,
        _effect(made.forecast),
        here=False,
    )


def _helps(made: Plan, plan: Plan) -> bool:
    if made.forecast is None:
        return False
    if plan.forecast is None:
        return True
    return made.forecast.decode.tps >= _GAIN * plan.forecast.decode.tps


def _tps(plan: Plan) -> float:
    return 0.0 if plan.forecast is None else plan.forecast.decode.tps


def _effect(found: Forecast) -> str:
    decode = found.decode
    return f"{format_rate(decode.tps, 2)} tok/s, bound by {decode.cost.binding}"
