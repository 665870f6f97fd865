"""`mimo-edge plan`: will a model run on a device, how fast, and what to change."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mimo_edge.cli.options import Pin
from mimo_edge.cli.output import Output
from mimo_edge.errors import UsageError
from mimo_edge.units import format_bytes, format_rate

if TYPE_CHECKING:
    from mimo_edge.planner import Plan


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("plan")(plan)


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="Bundle, .gguf file, checkpoint folder, config.json, mimo-nano, or a released "
            "model by name: MiMo-V2-Flash, MiMo-V2.5, MiMo-V2.6-Flash, MiMo-7B."
        ),
    ],
    profile: Annotated[
        str, typer.Option(help="Device profile or a .toml file; auto is this machine.")
    ] = "auto",
    ram: Annotated[
        str | None, typer.Option(help='What the process may hold, as "8GiB"; not the profile\'s.')
    ] = None,
    context: Annotated[int | None, typer.Option(help="Most tokens of a conversation.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe of the bundle; not its own or the profile's.")
    ] = None,
    kv_type: Annotated[
        str | None, typer.Option(help="Format of the KV cache: f16, q8_0 or f32.")
    ] = None,
    draft: Annotated[
        str | None, typer.Option(help="Tokens drafted per step: 0, 1, 2, 3 or auto.")
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(
            help="Tokens in the conversation while decoding; half the context, at most 2048."
        ),
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt whose prefill is shown.")] = 512,
    routes: Annotated[
        str | None,
        typer.Option(
            help="How hits of the expert cache are estimated: heat (of a calibrated bundle), "
            "typical, uniform or skewed."
        ),
    ] = None,
    acceptance: Annotated[
        str | None,
        typer.Option(help="Chance per depth that a draft is accepted, as 0.8,0.7,0.7."),
    ] = None,
    pin: Pin = 0,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...", help="Profiles or recipes to show side by side with this one."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw tok/s against memory and flash rate: .svg or .png."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Plan a model on a device before copying it there.

    Needs config and sizes only. Shows whether it fits, the memory it takes, the speed to expect
    and what limits it, and ranked changes that help.
    """
    from mimo_edge.planner import plan as make

    out = Output(json=json)
    arguments: dict[str, Any] = {
        "ram": ram,
        "context": context,
        "kv_type": kv_type,
        "draft": None if draft is None else _draft(draft),
        "depth": depth,
        "prompt": prompt,
        "routes": routes,
        "acceptance": None if acceptance is None else _shares(acceptance),
        "pin": pin,
    }
    if plot is not None:
        from mimo_edge.planner.chart import check_path

        check_path(plot)
    made = [make(model, profile, recipe=recipe, **arguments, advise=compare is None)]
    for name in [] if compare is None else _names(compare):
        what, kind = _profile_or_recipe(name, profile, recipe)
        made.append(make(model, what, recipe=kind, **arguments, advise=False))
    if plot is not None:
        from mimo_edge.planner.chart import draw

        draw(made, plot)
        out.note(f"drawn: {plot}")
    if compare is None:
        out.result(made[0].to_dict())
        print_plan(out, made[0])
    else:
        out.result({"plans": [one.to_dict() for one in made]})
        print_plans(out, made)


def _draft(text: str) -> Any:
    from mimo_edge.cli.run import parse_draft

    return parse_draft(text)


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--acceptance {text!r}", "write shares, as 0.8,0.7,0.7") from None


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    if not all(names):
        raise UsageError(f"--compare {text!r} has an empty part", "separate names by commas")
    return names


def _profile_or_recipe(name: str, profile: str, recipe: str | None) -> tuple[str, str | None]:
    """The profile and recipe of one column."""
    from mimo_edge.devices.profile import AUTO, profile_names
    from mimo_edge.quant.recipe import recipe_names

    if name == AUTO or name in profile_names() or name.endswith(".toml"):
        return name, recipe
    if name in recipe_names():
        return profile, name
    raise UsageError(
        f"--compare {name!r} is neither a profile nor a recipe",
        f"profiles: {AUTO}, {', '.join(profile_names())}; recipes: {', '.join(recipe_names())}",
    )


def print_plan(out: Output, plan: Plan) -> None:
    """One plan in full."""
    s, device = plan.settings, plan.profile
    out.text(f"{plan.model.name}, recipe {plan.model.recipe}, on {device.name}: {device.title}")
    out.text(f"verdict: {plan.verdict}")
    for reason in plan.why:
        out.text(f"  {reason}")
    out.text("")
    for name, value in _facts(plan):
        out.text(f"{name:<10} {value}")
    if plan.budget is not None:
        out.text("")
        out.table(
            plan.budget.rows(), ["memory", "bytes", f"context {s.context}, cache {s.kv_type}"]
        )
    if plan.forecast is not None and len(plan.forecast.decodes) > 1:
        out.text("")
        rows = [
            [
                d.draft,
                format_rate(d.tps),
                f"{d.tokens_per_step:.2f}",
                f"{d.flash_bytes_per_token / 1e6:,.0f}",
                f"{d.memory_bytes_per_token / 1e6:,.0f}",
                d.cost.binding,
            ]
            for d in plan.forecast.decodes
        ]
        out.table(rows, ["drafts", "tok/s", "tok/step", "flash MB", "memory MB", "bound by"])
    if plan.changes:
        out.text("")
        out.text("what helps, best first:")
        for rank, change in enumerate(plan.changes, 1):
            out.text(f"  {rank}. {change.action}: {change.verdict}, {change.effect}")
    remarks = [*plan.notes, *(f"{device.os}: {trap}" for trap in device.traps)]
    if remarks:
        out.text("")
    for remark in remarks:
        out.text(f"note: {remark}")


def _facts(plan: Plan) -> list[tuple[str, str]]:
    """Lines of name and value, also the rows of a comparison."""
    from mimo_edge.planner.planning import duration, pinned_slots

    device, found = plan.profile, plan.forecast
    facts = [
        (
            "flash",
            f"{format_bytes(plan.model.bundle_bytes)} of {format_bytes(device.storage_bytes)}: "
            + ("fits" if plan.fits_flash else "does not fit"),
        ),
        ("RAM", _ram(plan)),
        ("resident", f"{format_bytes(plan.resident_bytes)} of weights"),
    ]
    budget = plan.budget
    if budget is not None and budget.streamed and plan.fits_ram:
        share = budget.slots / budget.experts
        pinned = pinned_slots(plan.model.config, plan.settings.pin)
        pins = f", {pinned} of them pinned" if pinned else ""
        facts.append(("slots", f"{budget.slots} of {budget.experts} experts ({share:.1%}){pins}"))
    if found is None:
        return facts
    decode, prefill = found.decode, found.prefill
    drafts = ("no drafts", "1 draft")[found.draft] if found.draft < 2 else f"{found.draft} drafts"
    facts += [
        ("hits", f"{found.hits.rate:.0%} ({found.hits.source})"),
        (
            "per token",
            f"{decode.flash_bytes_per_token / 1e6:,.0f} MB from flash, "
            f"{decode.memory_bytes_per_token / 1e6:,.0f} MB from memory",
        ),
        (
            "decode",
            f"{format_rate(decode.tps)} tok/s with {drafts}, bound by {decode.cost.binding} "
            f"(hot {format_rate(found.hot_decode.tps)}; "
            f"without MTP {format_rate(found.plain.tps)})",
        ),
        (
            "prefill",
            f"{format_rate(prefill.tps)} tok/s, {prefill.tokens} tokens in "
            f"{duration(prefill.cost.seconds)}, bound by {prefill.cost.binding} "
            f"(hot {format_rate(found.hot_prefill.tps)})",
        ),
        ("load", duration(found.load_s)),
    ]
    return facts


def _ram(plan: Plan) -> str:
    limit = format_bytes(plan.settings.ram)
    if plan.need_bytes is not None:
        return f"needs {format_bytes(plan.need_bytes)}, has {limit}: does not fit"
    assert plan.budget is not None
    return f"{format_bytes(plan.budget.nbytes)} of {limit}: fits"


def print_plans(out: Output, plans: list[Plan]) -> None:
    """Several plans side by side, a column each."""
    rows: list[list[str]] = []
    columns = [dict(_columns(plan)) for plan in plans]
    for name in dict.fromkeys(name for column in columns for name in column):
        rows.append([name, *(column.get(name, "-") for column in columns)])
    head = ["", *(f"{plan.profile.name} {plan.model.recipe}" for plan in plans)]
    out.text(f"{plans[0].model.name}")
    out.table(rows, head)
    for plan in plans:
        for reason in plan.why:
            out.text(f"{plan.profile.name} {plan.model.recipe}: {reason}")


def _columns(plan: Plan) -> list[tuple[str, str]]:
    """The short form of `_facts`."""
    from mimo_edge.planner.planning import duration

    found, budget = plan.forecast, plan.budget
    cells = [
        ("verdict", plan.verdict),
        ("flash", format_bytes(plan.model.bundle_bytes)),
        ("RAM allowed", format_bytes(plan.settings.ram)),
        (
            "RAM needed",
            format_bytes(plan.need_bytes or (0 if budget is None else budget.nbytes)),
        ),
        ("resident", format_bytes(plan.resident_bytes)),
    ]
    if found is None or budget is None:
        return cells
    return [
        *cells,
        ("slots", str(budget.slots) if budget.streamed else "all"),
        ("hits", f"{found.hits.rate:.0%}"),
        ("flash MB/tok", f"{found.decode.flash_bytes_per_token / 1e6:,.0f}"),
        ("memory MB/tok", f"{found.decode.memory_bytes_per_token / 1e6:,.0f}"),
        ("decode tok/s", format_rate(found.decode.tps)),
        ("drafts", str(found.draft)),
        ("bound by", found.decode.cost.binding),
        ("without MTP", format_rate(found.plain.tps)),
        ("hot", format_rate(found.hot_decode.tps)),
        ("prefill tok/s", format_rate(found.prefill.tps)),
        ("first token", duration(found.prefill.cost.seconds)),
        ("load", duration(found.load_s)),
    ]
