"""`mimo-edge inspect`: what is in a bundle, a GGUF file, a checkpoint or a released model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mimo_edge.cli.output import Output
from mimo_edge.errors import UsageError
from mimo_edge.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from mimo_edge.budget import Budget
    from mimo_edge.inventory import Inventory


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("inspect")(inspect)


def inspect(
    what: Annotated[
        str,
        typer.Argument(
            help="Bundle, .gguf file, checkpoint folder, mimo-nano, or a released model by name: "
            "MiMo-V2-Flash, MiMo-V2.5, MiMo-V2.6-Flash, MiMo-7B."
        ),
    ],
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor with its error.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show the memory a run on the ggml backend takes.")
    ] = False,
    ram: Annotated[str | None, typer.Option(help='--plan: bound on memory, as "8GiB".')] = None,
    context: Annotated[int, typer.Option(help="--plan: most tokens of a conversation.")] = 4096,
    kv_type: Annotated[
        str | None, typer.Option(help="--plan: format of the KV cache: f16, q8_0 or f32.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a bundle, file or checkpoint holds.

    Layers, experts, MTP blocks and window; bytes, formats and quantisation error by role or tensor.
    Reads headers only.
    """
    from mimo_edge.inventory import inventory

    output = Output(json=json)
    found = inventory(what)
    budget = memory_plan(what, found, ram, context, kv_type) if plan else None
    output.result(
        found.to_dict() if budget is None else {**found.to_dict(), "plan": budget.to_dict()}
    )
    print_model(output, found)
    print_roles(output, found)
    if budget is not None:
        output.text("")
        output.table(budget.rows(), ["memory", "bytes", ""])
    if tensors:
        output.text("")
        output.table(
            [
                [
                    t.name,
                    "x".join(map(str, t.shape)),
                    t.format,
                    _size(t.nbytes),
                    _percent(t.relative_rms),
                    _percent(t.worst_block),
                ]
                for t in found.tensors
            ],
            ["tensor", "shape", "format", "bytes", "error", "worst block"],
        )


def memory_plan(
    what: str, found: Inventory, ram: str | None, context: int, kv_type: str | None
) -> Budget:
    """The budget of a run. Raises UsageError for what the ggml backend does not open, DeviceError
    with the table when `ram` is too small."""
    from mimo_edge.budget import plan, usual_kv_type
    from mimo_edge.bundle import Bundle
    from mimo_edge.kv_format import DEFAULT_KV_TYPE

    if found.kind not in ("bundle", "gguf"):
        raise UsageError(
            f"--plan needs the tensors of a bundle or a .gguf file, {what} is a {found.kind}",
            "export it first",
        )
    if context < 1:
        raise UsageError(f"--context {context}", "use 1 or more")
    with Bundle.open(what) as bundle:
        limit = None if ram is None else parse_bytes(ram)
        kind = kv_type or usual_kv_type(DEFAULT_KV_TYPE, bundle.config, context)
        return plan(bundle.config, bundle.tensors, context, limit, kv_type=kind)


def print_model(output: Output, found: Inventory) -> None:
    """The model in a few lines."""
    from mimo_edge.inventory import onnx_summary

    c = found.config
    sliding = sum(c.hybrid_layer_pattern)
    window = f", {sliding} sliding over {c.sliding_window} tokens" if sliding else ""
    rows = [
        ["model", f"{found.name} ({found.kind}, {c.family})"],
        ["parameters", f"{found.parameters:,}"],
        ["layers", f"{c.num_hidden_layers}: {c.num_hidden_layers - sliding} global{window}"],
        ["width", f"{c.hidden_size}, {c.num_attention_heads} heads of {c.head_dim}/{c.v_head_dim}"],
        ["MTP blocks", f"{c.num_mtp_layers}" if c.num_mtp_layers else "none: no drafting"],
        ["vocabulary", f"{c.vocab_size:,}, stops on {', '.join(map(str, c.eos_token_ids)) or '-'}"],
        ["context", f"{c.max_position_embeddings:,}"],
    ]
    if moe := sum(c.moe_layer_freq):
        rows.insert(
            4,
            [
                "experts",
                f"{c.n_routed_experts} in {moe} layers, {c.num_experts_per_tok} per token, "
                f"width {c.moe_intermediate_size}",
            ],
        )
    if (m := found.manifest) is not None:
        rows += [
            ["made for", f"{m.profile}, recipe {m.recipe.get('name')}, by {m.tool_version}"],
            ["calibrated", _calibrated(found)],
        ]
        if m.onnx is not None:
            rows.append(["ONNX form", _onnx_line(onnx_summary(m.onnx))])
        if m.permutation:
            rows.append(["experts are", "stored hottest first"])
    for reason, count in found.skipped.items():
        rows.append(["left out", f"{count} tensors: {reason}"])
    for file in found.ignored_files:
        rows.append(["left out", f"{file}: the index does not name it"])
    for name, value in rows:
        output.text(f"{name:<12} {value}")
    output.text("")


def print_roles(output: Output, found: Inventory) -> None:
    """Tensors, parameters, bytes, formats and the largest quantisation error by role."""
    rows: list[list[object]] = []
    for role, total in found.roles().items():
        formats = "+".join(sorted(total.formats))
        rows.append(
            [
                role.value,
                total.tensors,
                f"{total.parameters:,}",
                _size(total.nbytes),
                _percent(total.worst_rms),
                formats,
            ]
        )
    rows.append(["total", len(found.tensors), f"{found.parameters:,}", _size(found.nbytes), "", ""])
    output.table(rows, ["role", "tensors", "parameters", "bytes", "error", "formats"])


def _onnx_line(found: dict[str, Any]) -> str:
    graphs = ", ".join(f"{count} graphs for {name}" for name, count in found["components"].items())
    formats = ", ".join(f"{count} {name}" for name, count in sorted(found["formats"].items()))
    alone = "" if found["gguf"] else "; resident tensors are there alone"
    return f"opset {found['opset']}, {graphs}; matrices: {formats}{alone}"


def _calibrated(found: Inventory) -> str:
    m = found.manifest
    if m is None or m.imatrix_file is None:
        return "no"
    if not m.unweighted:
        return "yes"
    return f"yes, but {len(m.unweighted)} tensors or experts were never reached"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}%"


def _size(nbytes: int | None) -> str:
    return "-" if nbytes is None else format_bytes(nbytes)
