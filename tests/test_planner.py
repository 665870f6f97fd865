"""Plans: sizes against the specification and a real export, forecasts against arithmetic."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_factory import write_checkpoint

from mimo_edge.bundle import Bundle
from mimo_edge.config import MimoConfig
from mimo_edge.devices.profile import (
    Beside,
    DeviceProfile,
    EngineCost,
    KernelRate,
    ReadRate,
    load_profile,
    profile_names,
)
from mimo_edge.errors import BundleError, ConfigError, MimoEdgeError, UsageError
from mimo_edge.export.pipeline import export_bundle
from mimo_edge.heat import Heat
from mimo_edge.known_models import KNOWN_MODELS, known_model
from mimo_edge.planner import Plan, chart, plan
from mimo_edge.planner.forecast import LOAD_PASSES, Cost, forecast, heated
from mimo_edge.planner.hits import CURVES, distinct_experts, expected_hits
from mimo_edge.planner.model import PlannedModel, of_config, planned_model
from mimo_edge.planner.planning import VERDICTS
from mimo_edge.planner.weights import Weights

GIB = 1 << 30
PHONE, WORKSTATION = load_profile("phone-24gb"), load_profile("workstation")
FLASH = of_config("MiMo-V2-Flash", known_model("MiMo-V2-Flash"), PHONE, "q4_0")


def quick(model: Any = FLASH, profile: Any = PHONE, **arguments: Any) -> Plan:
    return plan(model, profile, advise=False, **arguments)


NO_ENGINE = EngineCost(*10 * (1e-7,))


def tps(made: Plan) -> float:
    assert made.forecast is not None
    return made.forecast.plain.tps


# --- sizes -------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_specification() -> None:
    """Spec section 6, from parameter counts; a bundle has padding and a header on top."""
    weights = Weights.of(FLASH.config, FLASH.tensors)
    assert weights.expert.total_bytes == 47 * 14_155_776
    experts = sum(t.nbytes for n, t in FLASH.tensors.items() if "_exps." in n)
    assert experts == 170_322_296_832 == 12_032 * 14_155_776
    assert 3 * weights.mtp_block.total_bytes == pytest.approx(1.049e9, rel=1e-3)
    eight = Weights.of(FLASH.config, FLASH.with_recipe("q8_0").tensors)
    scanned = eight.trunk.total_bytes + eight.head.total_bytes
    assert scanned == pytest.approx(5.840e9, rel=1e-3)
    # Q4 experts with 8 bits elsewhere; the head is Q6_K here, Q8_0 there
    assert FLASH.bundle_bytes == pytest.approx(177.9e9, rel=2e-3)
    assert FLASH.with_recipe("mxfp4").bundle_bytes == pytest.approx(168.4e9, rel=2e-3)


def test_parameters_are_those_of_the_released_model() -> None:
    total = sum(int(np.prod(t.shape)) for t in FLASH.tensors.values())
    assert total == pytest.approx(308.78e9 + 0.99e9, rel=1e-3)
    weights = Weights.of(FLASH.config, FLASH.tensors)
    macs = sum(sum(part.macs.values()) for part in (weights.trunk, weights.head))
    macs += 8 * sum(weights.expert.macs.values())
    assert macs == pytest.approx(14.82e9, rel=1e-3)  # active per token


@pytest.mark.parametrize("kind", ["flash", "v25", "v26", "7b"])
def test_a_plan_of_a_checkpoint_is_what_its_export_holds(kind: Any, tmp_path: Path) -> None:
    """Same tensors, formats and bytes, from the config alone."""
    source = write_checkpoint(tmp_path / "source", kind)[0]
    planned = planned_model(source, PHONE, "q8_0")
    with export_bundle(source, tmp_path / "out", recipe="q8_0") as made:
        for name, info in made.tensors.items():
            ours = planned.tensors[name]
            assert (ours.ggml_type, ours.shape, ours.nbytes) == (
                info.ggml_type,
                info.shape,
                info.nbytes,
            ), name
        assert set(planned.tensors) == set(made.tensors)
        weights = sum(p.stat().st_size for p in made.files if p.suffix == ".gguf")
    assert weights <= planned.bundle_bytes <= weights + 160 * planned.config.vocab_size
    # and the bundle itself is planned as it is
    bundle = planned_model(tmp_path / "out", PHONE, None)
    assert bundle.recipe == "q8_0"
    assert bundle.tensors.keys() == planned.tensors.keys()
    assert (
        quick(tmp_path / "out", WORKSTATION).budget
        == quick(source, WORKSTATION, recipe="q8_0").budget
    )
    with Bundle.open(tmp_path / "out") as opened:
        assert bundle.bundle_bytes == sum(p.stat().st_size for p in opened.files)


@pytest.mark.parametrize("name", [*KNOWN_MODELS, "mimo-nano"])
def test_every_model_by_name_can_be_planned(name: str) -> None:
    made = quick(name, WORKSTATION)
    assert made.fits
    assert json.loads(json.dumps(made.to_dict(), allow_nan=False))["verdict"] in VERDICTS


def test_a_config_alone_is_enough(tmp_path: Path) -> None:
    from importlib import resources

    raw = json.loads(
        (resources.files("mimo_edge") / "configs" / "MiMo-V2-Flash.json").read_text("utf-8")
    )
    whole = tmp_path / "model" / "config.json"
    whole.parent.mkdir()
    whole.write_text(json.dumps(raw))
    del raw["num_nextn_predict_layers"]  # as the releases have it
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(raw))
    for path in (whole, whole.parent, bare):
        found = planned_model(path, PHONE, "q4_0")
        assert found.tensors == FLASH.tensors
        assert bool(found.notes) == (path is bare)
    assert "MTP" in planned_model(bare, PHONE, None).notes[0]


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1}', "\xff"])
def test_what_is_no_config_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError):
        plan(path, PHONE)


# --- hits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CURVES)
def test_curves_rise_from_nothing_to_everything(name: str) -> None:
    rates = [expected_hits(n, 1000, name, None).rate for n in range(0, 1001, 10)]
    assert rates[0] == 0
    assert rates[-1] == 1
    assert rates == sorted(rates)
    if name != "uniform":
        assert all(rate >= n / 100 for n, rate in enumerate(rates))


def heat(counts: list[list[int]]) -> Heat:
    rows = {layer: np.array(c, np.int64) for layer, c in enumerate(counts)}
    return Heat(100, rows, {layer: c.astype(np.float64) for layer, c in rows.items()})


def test_hits_of_heat_are_those_of_the_hottest_experts() -> None:
    even = heat([[5] * 10, [5] * 10])
    assert expected_hits(5, 20, None, even).rate == pytest.approx(0.25)
    one = heat([[100, *[0] * 9], [100, *[0] * 9]])
    assert expected_hits(2, 20, None, one).rate == pytest.approx(0.98 + 0.02 / 10)
    # a layer without calibration counts as even, not as unused
    assert 0.4 < expected_hits(1, 20, None, heat([[100, *[0] * 9], [0] * 10])).rate < 0.55
    assert expected_hits(5, 20, "uniform", one).rate == 0.25
    assert expected_hits(20, 20, None, one).rate == 1


def test_neighbouring_tokens_share_experts_as_measured() -> None:
    """Spec section 6: 21 to 24 experts for 4 tokens, 34 to 39 for 8; the bank for many."""
    assert distinct_experts(256, 8, 1) == 8
    assert 21 <= distinct_experts(256, 8, 4) <= 24
    assert 34 <= distinct_experts(256, 8, 8) <= 39
    assert distinct_experts(256, 8, 128) == pytest.approx(252, abs=1)
    assert distinct_experts(256, 8, 4096) <= 256
    assert distinct_experts(0, 0, 4) == 0


# --- speed -------------------------------------------------------------------------------------


def changed(profile: DeviceProfile = PHONE, **fields: Any) -> DeviceProfile:
    return replace(profile, **fields)


def test_decoding_takes_what_bytes_over_rates_say() -> None:
    """No compute, no host work, no context: bytes from memory and from flash remain."""
    endless = {"any": KernelRate(1e15, 1e15, 1e15, 1e15)}
    device = changed(
        kernels=endless,
        engine=NO_ENGINE,
        reads=(ReadRate(1 << 19, 2e9),),
        beside=Beside(1.0, 1.0),
        memory_bytes_per_s=4e10,
    )
    made = quick(profile=device, routes="uniform", depth=0, draft=0, context=4096)
    assert made.forecast is not None
    assert made.budget is not None
    missing = 8 * (1 - made.budget.slots / 12_032)
    dense = Weights.of(FLASH.config, FLASH.tensors)
    resident, read, last = dense.trunk.total_bytes / 4e10, 14_155_776 / 2e9, 14_155_776 / 4e10
    # Flash binds in every layer. From its last expert to the next router guesses are read, the
    # first ones while the dense layer and the first attention compute; wrong ones delay by what is
    # left of the parts of 960 KiB that lanes are in.
    total, guessed = resident + dense.head.total_bytes / 4e10, 0.0
    for layer in range(47):
        before = dense.layers[layer + 1].total_bytes / 4e10 + last
        if not layer:
            before = sum(scan.total_bytes for scan in dense.layers[:2]) / 4e10
        right, ahead = 0.74 if layer else 0.51, before / read
        delay = (1 - right) * min(1.0, ahead) * device.lanes * 983_040 / 2 / 2e9
        total += read * (missing - right * ahead) + last + delay
        guessed += (1 - right) * ahead
    assert made.forecast.plain.cost.seconds == pytest.approx(total, rel=1e-3)
    wanted = 47 * missing + guessed
    assert made.forecast.plain.flash_bytes_per_token == pytest.approx(wanted * 14_155_776, rel=1e-3)
    assert made.forecast.plain.cost.binding == "flash"


def test_what_reads_and_products_leave_of_each_other_counts() -> None:
    def cost(rates: Mapping[str, Any] | None = None, **shares: float) -> Cost:
        beside = replace(Beside(1.0, 1.0), **shares)
        device = changed(beside=beside, engine=NO_ENGINE, **(rates or {}))
        made = quick(profile=device, routes="uniform", draft=0, context=4096)
        assert made.forecast is not None
        return made.forecast.plain.cost

    whole = cost()
    assert cost(reads=0.5).flash > 1.9 * whole.flash
    fast = {"reads": (ReadRate(1 << 20, 3e10),), "memory_bytes_per_s": 2e10}
    assert cost(fast, kernels=0.5).memory > 1.25 * cost(fast).memory
    late = changed(beside=Beside(1.0, 1.0), engine=replace(NO_ENGINE, arrival=0.5))
    made = quick(profile=late, routes="uniform", draft=0, context=4096)
    assert made.forecast is not None
    assert made.forecast.plain.cost.binding == "host work"


def test_kernels_that_do_not_draw_what_memory_delivers_are_the_bound() -> None:
    """Measured with weights in memory: one row slower than memory allows, four in no more time."""
    rate = KernelRate(1e15, 1e15, 1e15, 1e15, (2e10, 4e10, 6e10, 8e10), 2e10)
    device = changed(WORKSTATION, kernels={"any": rate}, engine=NO_ENGINE, memory_bytes_per_s=1e12)
    made = quick("MiMo-7B", device, depth=0, acceptance=(1.0,))
    assert made.forecast is not None
    weights = Weights.of(made.model.config, made.model.tensors)
    macs = sum(weights.trunk.macs.values()) + sum(weights.head.macs.values())
    assert made.forecast.plain.cost.seconds == pytest.approx(macs / 2e10, rel=0.01)
    assert made.forecast.plain.cost.binding == "memory bandwidth"
    block = sum(weights.mtp_block.macs.values()) + sum(weights.head.macs.values())
    assert made.forecast.decodes[1].cost.seconds == pytest.approx((macs + block) / 2e10, rel=0.01)


def test_what_the_caches_hold_does_not_come_from_memory() -> None:
    """Nothing of a model of four thirds of them, half of one as large, all of one of two thirds."""
    rate = KernelRate(1e12, 1e12, 1e12, 1e12)
    rates = {"any": rate, "ATTENTION_F16": KernelRate(1e15, 1e15, 1e15, 1e15)}
    base = changed(WORKSTATION, kernels=rates, engine=NO_ENGINE, memory_bytes_per_s=1e9)
    weights = quick("MiMo-7B", base, depth=0, draft=0)
    used = Weights.of(weights.model.config, weights.model.tensors)
    scanned = used.trunk.total_bytes + used.head.total_bytes
    macs = sum(used.trunk.macs.values()) + sum(used.head.macs.values())

    def seconds(times: float) -> float:
        made = quick("MiMo-7B", replace(base, cache_bytes=int(scanned / times)), depth=0, draft=0)
        assert made.forecast is not None
        return made.forecast.plain.cost.seconds

    assert seconds(1.4) == pytest.approx(scanned / 1e9, rel=1e-3)
    assert seconds(0.6) == pytest.approx(macs / 1e12, rel=1e-2)
    assert seconds(1.0) == pytest.approx((scanned / 1e9 + macs / 1e12) / 2, rel=1e-2)


def test_attention_has_a_rate_of_its_own() -> None:
    rates = {**WORKSTATION.kernels, "ATTENTION_F16": KernelRate(1e8, 1e8, 1e8, 1e8)}
    slow = quick("MiMo-7B", changed(WORKSTATION, kernels=rates), depth=1000, draft=0)
    usual = quick("MiMo-7B", WORKSTATION, depth=1000, draft=0)
    assert slow.forecast is not None
    assert usual.forecast is not None
    macs = 36 * 32 * 2 * 128 * 1001
    spent = slow.forecast.plain.cost.seconds - usual.forecast.plain.cost.seconds
    assert spent == pytest.approx(macs / 1e8, rel=0.05)
    assert usual.profile.attention("f16") == WORKSTATION.kernels["any"].scaled(0.25)


def test_a_step_that_drafts_costs_once_and_each_draft_a_pass_of_four_rows() -> None:
    engine = replace(NO_ENGINE, drafting=0.5, draft=0.1)
    base, more = (quick(profile=changed(WORKSTATION, engine=e)) for e in (NO_ENGINE, engine))
    assert base.forecast is not None
    assert more.forecast is not None
    spent = [
        b.cost.host - a.cost.host
        for a, b in zip(base.forecast.decodes, more.forecast.decodes, strict=True)
    ]
    assert spent == pytest.approx([0, 0.6, 0.7, 0.8], abs=1e-4)
    rate = KernelRate(1e9, 4e9, 4e9, 4e9)
    bound = changed(WORKSTATION, kernels={"any": rate}, engine=NO_ENGINE, memory_bytes_per_s=1e13)
    made = quick("MiMo-7B", bound, depth=0)
    assert made.forecast is not None
    used = Weights.of(made.model.config, made.model.tensors)
    dense = sum(used.trunk.macs.values()) + sum(used.head.macs.values())
    block = sum(used.mtp_block.macs.values())
    two = 2 * dense / rate.at(2) + 4 * block / 4e9 + sum(used.head.macs.values()) / 1e9
    assert made.forecast.decodes[1].cost.seconds == pytest.approx(two, rel=1e-2)


def test_reading_ahead_hides_no_more_than_there_is_time_for() -> None:
    """Faster than flash alone never, and slower than computing and reading in turn never, reading
    as slow as it is beside computing."""
    for gib in (7, 8, 12, 24, 48, 96, 150):
        for rate in (1e8, 1e9, 3e9, 1e10, 1e11):
            device = changed(WORKSTATION, reads=(ReadRate(1 << 20, rate),))
            made = quick(profile=device, recipe="q4_0", ram=gib * GIB, context=4096)
            assert made.forecast is not None
            whole = quick(profile=device, recipe="q4_0", context=4096).forecast
            assert whole is not None
            for found, best in zip(made.forecast.decodes, whole.decodes, strict=True):
                flash = found.flash_bytes_per_token * found.tokens_per_step / rate
                assert found.cost.seconds >= 0.99 * max(flash, 0.9 * best.cost.seconds)
                in_turn = flash / device.beside.reads + best.cost.seconds
                assert found.cost.seconds <= 1.1 * in_turn + found.cost.host


def test_a_resident_model_is_bound_by_its_bytes_in_memory() -> None:
    made = quick(profile=WORKSTATION, recipe="q4_0", depth=0)
    assert made.forecast is not None
    assert made.budget is not None
    assert not made.budget.streamed
    assert made.forecast.plain.flash_bytes_per_token == 0
    assert made.forecast.hits.rate == 1
    assert made.forecast.plain.cost.binding == "memory bandwidth"
    nbytes = made.forecast.plain.memory_bytes_per_token
    assert made.forecast.plain.tps <= WORKSTATION.memory_bytes_per_s / nbytes
    assert made.forecast.plain.tps >= 0.9 * WORKSTATION.memory_bytes_per_s / nbytes
    loaded = made.resident_bytes / min(6.5e9, WORKSTATION.memory_bytes_per_s / LOAD_PASSES)
    assert made.forecast.load_s == pytest.approx(loaded)


@pytest.mark.parametrize(
    ("fields", "binding"),
    [
        ({"reads": (ReadRate(1 << 20, 1e7),)}, "flash"),
        ({"memory_bytes_per_s": 2e8}, "memory bandwidth"),
        ({"kernels": {"any": KernelRate(1e9, 1e9, 1e9, 1e9)}}, "compute"),
        ({"engine": NO_ENGINE.scaled(5e6)}, "host work"),
    ],
)
def test_the_resource_that_binds_is_named(fields: dict[str, Any], binding: str) -> None:
    made = quick(profile=changed(**fields))
    assert made.forecast is not None
    assert made.forecast.plain.cost.binding == binding
    if binding == "flash":
        assert made.forecast.prefill.cost.binding == "flash"


def test_more_of_anything_is_never_slower() -> None:
    base = quick()

    def faster(**fields: Any) -> None:
        other = quick(profile=changed(**fields))
        assert tps(other) >= tps(base)
        assert other.forecast is not None
        assert base.forecast is not None
        assert other.forecast.prefill.tps >= base.forecast.prefill.tps
        assert other.forecast.load_s <= base.forecast.load_s

    faster(memory_bytes_per_s=2 * PHONE.memory_bytes_per_s)
    faster(reads=tuple(ReadRate(r.block_bytes, 2 * r.bytes_per_s) for r in PHONE.reads))
    faster(kernels={name: rate.scaled(2) for name, rate in PHONE.kernels.items()})
    faster(engine=PHONE.engine.scaled(0.5))
    assert tps(quick(routes="skewed")) > tps(base) > tps(quick(routes="uniform"))
    assert tps(quick(recipe="q2_k")) > tps(base)
    assert tps(quick(depth=0)) >= tps(quick(depth=4000))
    hot = quick(profile=heated(PHONE))
    assert base.forecast is not None
    assert hot.forecast is not None
    assert hot.forecast.decode.tps == pytest.approx(base.forecast.hot_decode.tps, rel=1e-6)
    assert base.forecast.hot_decode.tps < base.forecast.decode.tps


def test_more_memory_is_never_slower() -> None:
    """But for one thing: a larger prefill chunk takes memory from the slots (budget.py), so
    decoding may lose a little where the chunk doubles, and the prompt gains."""
    rates, prompts, chunks = [], [], []
    for gib in (7, 8, 10, 12, 16, 24, 48, 96, 150, 180):
        made = quick(profile=WORKSTATION, recipe="q4_0", ram=gib * GIB, context=4096)
        assert made.forecast is not None
        assert made.budget is not None
        rates.append(made.forecast.plain.tps)
        prompts.append(made.forecast.prefill.tps)
        chunks.append(made.budget.chunk)
    assert all(b >= 0.98 * a for a, b in itertools.pairwise(rates))
    assert rates[-1] > 3 * rates[0]
    assert all(b >= 0.98 * a for a, b in itertools.pairwise(prompts))
    assert chunks[0] < 512


def test_drafts_gain_what_their_acceptance_says() -> None:
    sure, never = quick(acceptance=(1, 1, 1)), quick(acceptance=(0, 0, 0))
    assert sure.forecast is not None
    assert never.forecast is not None
    assert [d.tokens_per_step for d in sure.forecast.decodes] == [1, 2, 3, 4]
    assert [d.tokens_per_step for d in never.forecast.decodes] == [1, 1, 1, 1]
    assert never.forecast.draft == 0
    assert sure.forecast.draft > 0
    assert sure.forecast.decode.tps == max(d.tps for d in sure.forecast.decodes)
    fixed = quick(draft=2)
    assert fixed.forecast is not None
    assert fixed.forecast.draft == 2
    off = quick(draft=0)
    assert off.forecast is not None
    assert [d.draft for d in off.forecast.decodes] == [0]
    assert "MTP" not in {line.name for line in off.lines}
    assert off.budget is not None
    assert fixed.budget is not None
    assert off.budget.slots > fixed.budget.slots


def test_a_prompt_reads_the_bank_once_per_chunk() -> None:
    made = quick(prompt=4096, ram=10 * GIB)
    assert made.forecast is not None
    assert made.budget is not None
    passes = -(-4096 // made.budget.chunk)
    missing = 1 - made.budget.slots / made.budget.experts
    # of the last layer the last token wants 8 of 256 experts
    bank = 170_322_296_832 * missing / 47 * 46
    assert made.forecast.prefill.flash_bytes == pytest.approx(passes * bank, rel=0.002)


def test_a_prompt_wants_one_row_of_the_last_layer() -> None:
    """With products alone: all rows of 35 layers, of the 36th and the head one."""
    rate = KernelRate(1e10, 1e10, 1e10, 1e10)
    rates = {"any": rate, "ATTENTION_F16": KernelRate(1e15, 1e15, 1e15, 1e15)}
    device = changed(WORKSTATION, kernels=rates, engine=NO_ENGINE, memory_bytes_per_s=1e13)
    made = quick("MiMo-7B", device, draft=0, prompt=100)
    assert made.forecast is not None
    used = Weights.of(made.model.config, made.model.tensors)
    *most, last = (sum(scan.macs.values()) for scan in used.layers)
    macs = 100 * sum(most) + last + sum(used.head.macs.values())
    assert made.forecast.prefill.cost.seconds == pytest.approx(macs / 1e10, rel=1e-3)


# --- what is said ------------------------------------------------------------------------------


def test_the_large_model_on_a_router_is_no_number() -> None:
    made = plan(FLASH, "router")
    assert made.verdict == "does not fit"
    assert made.forecast is None
    assert not made.fits_ram
    assert made.need_bytes is not None
    assert made.need_bytes > 6 * GIB
    assert "MiMo-V2-Flash is not practical on this device, whatever is changed" in made.why
    assert {change.action.split()[0] for change in made.changes if change.here} == set()
    assert [change.action.split()[0] for change in made.changes] == ["mimo-nano", "run"]
    assert made.to_dict()["forecast"] is None
    assert "another machine" in made.changes[-1].action


@pytest.mark.parametrize("profile", profile_names())
@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_every_model_on_every_device_ends_in_a_verdict_and_a_way(name: str, profile: str) -> None:
    """No hopeful number: what does not fit has none, what is too slow says so, and unless it is
    usable there is something to do, ranked."""
    made = plan(name, profile)
    assert (made.forecast is None) == (made.verdict == "does not fit")
    assert bool(made.why) == (made.verdict != "usable")
    if made.verdict == "usable":
        return
    assert made.changes
    order = [
        VERDICTS.index(change.verdict) for change in made.changes if "network" not in change.action
    ]
    assert order == sorted(order)
    assert made.changes[0].verdict in ("usable", "slow")
    if profile.startswith("router") and name != "MiMo-7B":
        assert made.why[-1] == f"{name} is not practical on this device, whatever is changed"
        assert not any(c.here and c.verdict in ("usable", "slow") for c in made.changes)


def test_what_does_not_fit_on_flash_is_said() -> None:
    made = plan(FLASH, "car")
    assert made.verdict == "does not fit"
    assert made.fits_ram
    assert not made.fits_flash
    assert made.forecast is None
    assert any("on flash" in reason for reason in made.why)
    assert any("MiMo-7B" in change.action for change in made.changes)
    assert any("--recipe" in change.action for change in made.changes)


def test_changes_are_ranked_and_stand_up_to_planning() -> None:
    made = plan(FLASH, PHONE)
    here = [c for c in made.changes if "another machine" not in c.action]
    order = [VERDICTS.index(change.verdict) for change in here]
    assert order == sorted(order)
    assert here
    for change in here:
        if change.action.startswith("--recipe") and "override" not in change.action:
            again = quick(recipe=change.action.split()[1])
            assert again.forecast is not None
            assert again.forecast.decode.tps == pytest.approx(change.tps)
    assert plan("MiMo-7B", PHONE).changes == ()  # usable as it is


def test_a_change_of_memory_is_one_that_does() -> None:
    phone = load_profile("phone")
    made = plan(FLASH, phone)
    assert made.verdict == "does not fit"
    first = next(change for change in made.changes if change.action.startswith("--ram"))
    again = quick(profile=phone, ram=first.action.split()[1])
    assert again.forecast is not None
    assert again.forecast.decode.tps == pytest.approx(first.tps, rel=1e-3)


def test_pins_that_do_not_fit_are_fewer() -> None:
    """Slots for them and a token: no more than there are, and what is proposed fits."""
    base = quick(ram=10 * GIB)
    assert base.budget is not None
    room = (base.budget.slots - 8) // 47
    assert quick(ram=10 * GIB, pin=room).fits
    made = plan(FLASH, PHONE, ram=10 * GIB, pin=room + 1)
    assert made.verdict == "does not fit"
    assert f"take {(room + 1) * 47 + 8} slots, there is room for {base.budget.slots}" in made.why[0]
    fewer = [change for change in made.changes if "fewer pinned" in change.action]
    assert [change.action.split()[1] for change in fewer] == [str(room)]
    assert fewer[0].tps == pytest.approx(quick(ram=10 * GIB, pin=room).forecast.decode.tps)  # type: ignore[union-attr]
    assert made.need_bytes is not None
    assert quick(ram=made.need_bytes, pin=room + 1).fits
    assert "calibrated" in " ".join(made.notes)
    # everything in memory: there is nothing to pin
    assert quick(profile=WORKSTATION, recipe="q2_k", pin=256).fits


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"pin": -1}, "pin"),
    ({"pin": 257}, "256 experts"),
    ({"pin": True}, "pin"),
    ({"ram": 0}, "no size"),
    ({"ram": "lots"}, "no size"),
    ({"ram": "100GiB"}, "which has"),
    ({"context": 0}, "context"),
    ({"context": True}, "context"),
    ({"prompt": 0}, "prompt"),
    ({"depth": -1}, "depth"),
    ({"depth": 4096, "context": 4096}, "depth"),
    ({"acceptance": (2.0,)}, "acceptance"),
    ({"acceptance": (float("nan"),)}, "acceptance"),
    ({"routes": "warm"}, "routes"),
    ({"routes": "heat"}, "no heat"),
    ({"kv_type": "q3"}, "kv_type"),
    ({"draft": 4}, "draft"),
    ({"draft": -1}, "draft"),
    ({"recipe": "q9"}, "q9"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_nonsense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        quick(**arguments)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no model"):
        plan(tmp_path / "absent", PHONE)
    with pytest.raises(BundleError, match="MiMo-V2-Flash"):
        plan("GPT-7", PHONE)
    with pytest.raises(MimoEdgeError):
        plan(tmp_path, PHONE)
    with pytest.raises(UsageError, match="toaster"):
        plan(FLASH, "toaster")


def test_the_public_names() -> None:
    import mimo_edge

    made = mimo_edge.plan("MiMo-7B", profile="car")
    assert isinstance(made, mimo_edge.Plan)
    assert made.fits
    assert made.lines
    assert made.forecast is not None


# --- pictures ----------------------------------------------------------------------------------


def test_a_picture_shows_curves_and_marks(tmp_path: Path) -> None:
    plans = [quick(profile=load_profile(name)) for name in ("phone-24gb", "router")]
    path = tmp_path / "p.svg"
    chart.draw(plans, path)
    root = ET.fromstring(path.read_text("utf-8"))
    space = "{http://www.w3.org/2000/svg}"
    texts = [element.text for element in root.iter(f"{space}text")]
    assert "phone-24gb, q4_0" in texts
    assert "router, q4_0 (does not fit)" in texts
    assert len(list(root.iter(f"{space}circle"))) == 2  # one device, in both panels
    curves = [e for e in root.iter(f"{space}polyline") if e.get("stroke-width") == "2"]
    long = [e.get("points", "").split() for e in curves if len(e.get("points", "").split()) > 5]
    assert len(long) == 3  # the router fits at no flash rate
    for points in long:
        heights = [float(point.split(",")[1]) for point in points]
        assert heights[-1] < heights[0]  # up to the right
        assert all(b <= a + 3 for a, b in itertools.pairwise(heights))


def test_a_picture_as_pixels(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    chart.draw([quick()], tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_of_other_kinds_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"\.svg or \.png"):
        chart.check_path(tmp_path / "p.gif")
    with pytest.raises(UsageError, match="cannot write"):
        chart.draw([quick()], tmp_path / "absent" / "p.svg")
    import sys

    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MimoEdgeError, match=r"mimo-edge\[plot\]"):
        chart.check_path(tmp_path / "p.png")


def test_weights_of_a_tied_model_count_the_head_once() -> None:
    config: MimoConfig = replace(known_model("MiMo-7B"), tie_word_embeddings=True)
    tied: PlannedModel = of_config("tied", config, PHONE, "q4_0")
    tensors = dict(tied.tensors)
    head = tensors.pop("output.weight")
    bare = Weights.of(config, tensors)
    assert bare.head.macs == {"Q8_0": float(np.prod(head.shape))}
    assert forecast(
        config,
        tied.tensors,
        quick(tied).budget,  # type: ignore[arg-type]
        PHONE,
        expected_hits(1, 1, None, None),
    ).plain.tps
