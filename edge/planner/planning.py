"""The plan: does a model fit a device, what does it take, how fast will it be, what to change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mimo_edge import budget as memory
from mimo_edge.budget import RESERVE_PART, Budget, Shortfall
from mimo_edge.config import MimoConfig
from mimo_edge.devices.profile import AUTO, DeviceProfile, load_profile
from mimo_edge.errors import UsageError
from mimo_edge.planner.forecast import Forecast, forecast
from mimo_edge.planner.hits import expected_hits
from mimo_edge.planner.model import PlannedModel, planned_model
from mimo_edge.speculative import DraftSetting, check_draft
from mimo_edge.units import format_bytes, parse_bytes

Verdict = Literal["usable", "slow", "not practical", "does not fit"]
VERDICTS: tuple[Verdict, ...] = ("usable", "slow", "not practical", "does not fit")

# Below this an answer of 100 tokens takes more than three minutes: nobody waits for it.
PRACTICAL_TPS = 0.5
# About as fast as one reads aloud; slower suits work in the background.
USABLE_TPS = 3.0
ANSWER_TOKENS = 100
DEFAULT_PROMPT = 512


@dataclass(frozen=True)
class Settings:
    """What is planned besides model and device. `ram` is the bound on the process, `pin` experts of
    every layer never leave memory when experts are streamed."""

    ram: int
    context: int
    kv_type: str
    draft: DraftSetting
    depth: int
    prompt: int = DEFAULT_PROMPT
    routes: str | None = None
    acceptance: tuple[float, ...] | None = None
    pin: int = 0


@dataclass(frozen=True)
class Change:
    """Something that would help: what to do, and what the plan is then."""

    action: str
    verdict: Verdict
    tps: float
    effect: str
    here: bool = True  # the same model, on this device

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "action": self.action,
            "verdict": self.verdict,
            "tps": self.tps,
            "effect": self.effect,
            "here": self.here,
        }


@dataclass(frozen=True)
class Plan:
    """`budget` is None only where even its table could not be made; `forecast` is None when it
    does not fit. `why` says in words what stands against it, `changes` what helps, best first,
    `notes` what was assumed."""

    model: PlannedModel
    profile: DeviceProfile
    settings: Settings
    budget: Budget | None
    need_bytes: int | None  # of RAM, where more is needed than there is
    forecast: Forecast | None
    verdict: Verdict
    why: tuple[str, ...]
    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether it fits on flash and in RAM."""
        return self.forecast is not None

    @property
    def fits_flash(self) -> bool:
        """Whether the bundle fits on flash."""
        return self.model.bundle_bytes <= self.profile.storage_bytes

    @property
    def fits_ram(self) -> bool:
        """Whether it runs in the memory the process may hold."""
        return self.need_bytes is None

    @property
    def lines(self) -> tuple[memory.Line, ...]:
        """The memory budget."""
        return () if self.budget is None else self.budget.lines

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights that stay in memory whatever happens."""
        held = {"weights", "MTP"} | (
            {"experts"} if self.budget and not self.budget.streamed else set()
        )
        return sum(line.nbytes for line in self.lines if line.name in held)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        s = self.settings
        return {
            "model": self.model.name,
            "profile": self.profile.name,
            "recipe": self.model.recipe,
            "ram": s.ram,
            "context": s.context,
            "kv_type": s.kv_type,
            "draft": s.draft,
            "pin": s.pin,
            "fits": self.fits,
            "fits_flash": self.fits_flash,
            "fits_ram": self.fits_ram,
            "bundle_bytes": self.model.bundle_bytes,
            "storage_bytes": self.profile.storage_bytes,
            "need_bytes": self.need_bytes,
            "resident_bytes": self.resident_bytes,
            "budget": None if self.budget is None else self.budget.to_dict(),
            "forecast": None if self.forecast is None else self.forecast.to_dict(),
            "verdict": self.verdict,
            "why": list(self.why),
            "changes": [change.to_dict() for change in self.changes],
            "notes": list(self.notes),
        }


def plan(
    model: str | Path | PlannedModel,
    profile: str | Path | DeviceProfile = AUTO,
    ram: int | str | None = None,
    context: int | None = None,
    *,
    recipe: str | None = None,
    kv_type: str | None = None,
    draft: DraftSetting | None = None,
    depth: int | None = None,
    prompt: int = DEFAULT_PROMPT,
    routes: str | None = None,
    acceptance: Sequence[float] | None = None,
    pin: int = 0,
    advise: bool = True,
) -> Plan:
    """Plan a model on a device, from config and sizes alone.

    `model` is a bundle, a GGUF file, a checkpoint, a config.json or a released model's name;
    `profile` a name or file. `ram`, `context`, `recipe`, `kv_type` and `draft` stand for the
    profile's. Decoding is forecast `depth` tokens into a conversation (half the context, at most
    2,048) and prefill for `prompt` tokens. `routes` says how hits are estimated ("typical",
    "uniform", "skewed", "heat"), `acceptance` the chance per depth that a draft is accepted. `pin`
    experts of every layer, the hottest, stay in memory when experts are streamed.
    Without `advise` no changes are looked for.

    Raises UsageError on values out of range, and the errors of opening the model and the profile.
    """
    device = profile if isinstance(profile, DeviceProfile) else load_profile(profile)
    if isinstance(model, PlannedModel):
        found = model if recipe in (None, model.recipe) else model.with_recipe(str(recipe))
    else:
        found = planned_model(model, device, recipe)
    settings = _settings(
        found, device, ram, context, kv_type, draft, depth, prompt, routes, acceptance, pin
    )
    made = evaluate(found, device, settings)
    if not advise:
        return made
    from mimo_edge.planner.advice import changes, hopeless

    helps, why = changes(made), made.why
    if hopeless(made, helps):
        why = (*why, f"{found.name} is not practical on this device, whatever is changed")
    return replace(made, changes=helps, why=why)


def _settings(
    model: PlannedModel,
    device: DeviceProfile,
    ram: int | str | None,
    context: int | None,
    kv_type: str | None,
    draft: DraftSetting | None,
    depth: int | None,
    prompt: int,
    routes: str | None,
    acceptance: Sequence[float] | None,
    pin: int,
) -> Settings:
    config = model.config
    for name, value in (("context", context), ("prompt", prompt)):
        wrong = isinstance(value, bool) or not isinstance(value, int) or value < 1
        if value is not None and wrong:
            raise UsageError(f"{name} = {value!r}", "use 1 or more")
    length = min(device.context if context is None else context, config.max_position_embeddings)
    if depth is None:
        depth = min(length // 2, 2048)
    if isinstance(depth, bool) or not isinstance(depth, int) or not 0 <= depth < length:
        raise UsageError(f"depth = {depth!r}", f"use 0 to {length - 1}, the context less one")
    limit = device.process_bytes if ram is None else parse_bytes(ram)
    if limit > device.ram_bytes:
        raise UsageError(
            f"--ram {format_bytes(limit)} on {device.name}, which has "
            f"{format_bytes(device.ram_bytes)}",
            "name another profile",
        )
    if acceptance is not None and not all(0 <= share <= 1 for share in acceptance):
        raise UsageError(f"acceptance {list(acceptance)}", "give shares from 0 to 1")
    if draft is None:
        # A profile's fixed number may be more than this model has blocks for.
        draft = device.draft
        if isinstance(draft, int):
            draft = min(draft, config.num_mtp_layers)
    else:
        check_draft(draft, config)
    most = config.n_routed_experts
    if isinstance(pin, bool) or not isinstance(pin, int) or not 0 <= pin <= most:
        raise UsageError(f"pin = {pin!r}", f"a layer has {most} experts")
    kind = memory.usual_kv_type(device.kv_type, config, length) if kv_type is None else kv_type
    return Settings(
        limit,
        length,
        kind,
        draft,
        depth,
        min(prompt, length),
        routes,
        None if acceptance is None else tuple(acceptance),
        pin,
    )


def evaluate(model: PlannedModel, device: DeviceProfile, settings: Settings) -> Plan:
    """The plan for these very settings, without looking for better ones."""
    config = model.config
    if settings.draft == 0:  # MTP blocks stay on flash, as when it runs
        config = replace(config, num_mtp_layers=0)
    why: list[str] = []
    need: int | None = None
    found = memory.fit(
        config,
        model.tensors,
        settings.context,
        settings.ram,
        lanes=device.lanes,
        kv_type=settings.kv_type,
    )
    budget = found.budget if isinstance(found, Shortfall) else found
    if isinstance(found, Shortfall):
        need = found.need_bytes
        why.append(
            f"it needs at least {format_bytes(need)} of memory, the process may hold "
            f"{format_bytes(settings.ram)} of the device's {format_bytes(device.ram_bytes)}"
        )
    elif (lacking := _slots_lacking(config, budget, settings.pin)) > 0:
        more = lacking * budget.slot_bytes
        need = budget.nbytes + more + more // (RESERVE_PART - 1) + 1  # the reserve grows with it
        why.append(
            f"{settings.pin} pinned experts of every layer and those of a token take "
            f"{budget.slots + lacking} slots, there is room for {budget.slots}"
        )
    if model.bundle_bytes > device.storage_bytes:
        why.append(
            f"the bundle takes {format_bytes(model.bundle_bytes)} on flash, "
            f"{format_bytes(device.storage_bytes)} are free for models"
        )
    notes = _notes(model, device, settings)
    if why:
        return Plan(
            model, device, settings, budget, need, None, "does not fit", tuple(why), notes=notes
        )
    speed = forecast(
        config,
        model.tensors,
        budget,
        device,
        expected_hits(
            budget.slots if budget.streamed else 1,
            budget.experts if budget.streamed else 1,
            settings.routes,
            model.heat,
        ),
        draft=settings.draft,
        depth=settings.depth,
        prompt=settings.prompt,
        acceptance=settings.acceptance,
    )
    tps = speed.decode.tps
    verdict: Verdict = (
        "usable" if tps >= USABLE_TPS else "slow" if tps >= PRACTICAL_TPS else "not practical"
    )
    if verdict == "not practical":
        why.append(
            f"an answer of {ANSWER_TOKENS} tokens would take "
            f"{duration(ANSWER_TOKENS / tps)}, bound by {speed.decode.cost.binding}"
        )
    elif verdict == "slow":
        why.append(
            f"an answer of {ANSWER_TOKENS} tokens takes {duration(ANSWER_TOKENS / tps)}, bound by "
            f"{speed.decode.cost.binding}: for work in the background"
        )
    return Plan(model, device, settings, budget, None, speed, verdict, tuple(why), notes=notes)


def pinned_slots(config: MimoConfig, pin: int) -> int:
    """Slots of `pin` pinned experts of every layer."""
    return pin * sum(config.moe_layer_freq)


def _slots_lacking(config: MimoConfig, budget: Budget, pin: int) -> int:
    """Slots that pinned experts and those of a token need beyond what there is."""
    if not budget.streamed or not pin:
        return 0
    wanted = pinned_slots(config, pin) + config.num_experts_per_tok
    return min(wanted, budget.experts) - budget.slots


def _notes(model: PlannedModel, device: DeviceProfile, settings: Settings) -> tuple[str, ...]:
    notes = list(model.notes)
    if settings.pin and model.heat is None and model.config.n_routed_experts:
        notes.append("which experts to pin is known of a calibrated bundle (export --calibrate)")
    if model.needs_calibration:
        notes.append(f"recipe {model.recipe} needs calibration (export --calibrate)")
    guessed = sorted(
        {key for key, _, source in device.figures() if source.evidence == "assumed"}
        & {"memory.process", "memory.bandwidth", "cpu.kernels", "storage.reads", "storage.size"}
    )
    if guessed:
        notes.append(f"profile {device.name} assumes {', '.join(guessed)}: measure with probe")
    return tuple(notes)


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
