"""What is in a bundle, a GGUF file, a checkpoint, or a released model by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mimo_edge.bundle import Bundle
from mimo_edge.config import MimoConfig
from mimo_edge.errors import BundleError
from mimo_edge.gguf_meta import expected_shapes
from mimo_edge.known_models import KNOWN_MODELS, known_model
from mimo_edge.manifest import MANIFEST_NAME, Manifest, OnnxEntry
from mimo_edge.quant.roles import Role

BUILT_IN = "mimo-nano"


@dataclass(frozen=True)
class TensorLine:
    """One tensor: `format` is a ggml type or source dtype; `nbytes` None for a known model.

    `relative_rms` and `worst_block` are the quantisation error of a bundle's tensor, over all of
    it and in its worst block; None where nothing was lost or nothing is known."""

    name: str
    role: Role
    shape: tuple[int, ...]
    format: str
    nbytes: int | None
    relative_rms: float | None = None
    worst_block: float | None = None

    @property
    def parameters(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count


@dataclass
class RoleTotal:
    """All tensors of one role; `formats` maps format to bytes."""

    tensors: int = 0
    parameters: int = 0
    nbytes: int | None = 0
    formats: dict[str, int] = field(default_factory=dict)
    worst_rms: float | None = None  # largest relative error of a tensor


@dataclass(frozen=True)
class Inventory:
    """`kind` is "bundle", "gguf", "checkpoint" or "known model".

    `skipped` counts source tensors that the text model does not use, by reason; `skipped_tensors`
    names them, and `ignored_files` the weight files its index does not name (of a checkpoint).
    """

    kind: str
    name: str
    config: MimoConfig
    tensors: tuple[TensorLine, ...]
    manifest: Manifest | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    skipped_tensors: Mapping[str, str] = field(default_factory=dict)
    ignored_files: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Parameters of the text model, MTP blocks included."""
        return sum(tensor.parameters for tensor in self.tensors)

    @property
    def nbytes(self) -> int | None:
        """Bytes of all tensors; None for a known model, of which we have only the config."""
        sizes = [tensor.nbytes for tensor in self.tensors]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def roles(self) -> dict[Role, RoleTotal]:
        """Totals by role, in the order of `Role`, without those that do not occur."""
        totals: dict[Role, RoleTotal] = {}
        for tensor in sorted(self.tensors, key=lambda t: list(Role).index(t.role)):
            total = totals.setdefault(tensor.role, RoleTotal())
            total.tensors += 1
            total.parameters += tensor.parameters
            if tensor.nbytes is None or total.nbytes is None:
                total.nbytes = None
            else:
                total.nbytes += tensor.nbytes
            total.formats[tensor.format] = total.formats.get(tensor.format, 0) + (
                tensor.nbytes or 0
            )
            if tensor.relative_rms is not None:
                total.worst_rms = max(total.worst_rms or 0.0, tensor.relative_rms)
        return totals

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        result: dict[str, Any] = {
            "kind": self.kind,
            "name": self.name,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "config": self.config.to_dict(),
            "roles": {
                role.value: {
                    "tensors": total.tensors,
                    "parameters": total.parameters,
                    "bytes": total.nbytes,
                    "formats": total.formats,
                    "worst_relative_rms": total.worst_rms,
                }
                for role, total in self.roles().items()
            },
            "tensors": {
                t.name: {
                    "format": t.format,
                    "shape": list(t.shape),
                    "bytes": t.nbytes,
                    "relative_rms": t.relative_rms,
                    "worst_block": t.worst_block,
                }
                for t in self.tensors
            },
        }
        if self.kind != "known model":
            result["skipped"] = dict(self.skipped)
        if self.kind == "checkpoint":
            result["skipped_tensors"] = dict(self.skipped_tensors)
            result["ignored_files"] = list(self.ignored_files)
        if self.manifest is not None:
            m = self.manifest
            result |= {
                "source": m.source_name,
                "profile": m.profile,
                "recipe": dict(m.recipe),
                "files": {name: entry.size for name, entry in m.files.items()},
                "calibrated": m.imatrix_file is not None,
                "unweighted": list(m.unweighted),
                "permuted": bool(m.permutation),
                "onnx": None if m.onnx is None else onnx_summary(m.onnx),
            }
        return result


def onnx_summary(entry: OnnxEntry) -> dict[str, Any]:
    """Of an ONNX form: versions, components by variant, and how many matrices have each format."""
    variants: dict[str, int] = {}
    for component in entry.components.values():
        for variant in component.variants:
            variants[variant] = variants.get(variant, 0) + 1
    return {
        "opset": entry.opset,
        "ir_version": entry.ir_version,
        "components": variants,
        "formats": dict(Counter(entry.formats.values())),
        "gguf": entry.gguf,
    }


def inventory(what: str | Path) -> Inventory:
    """List a bundle folder, a GGUF file, a checkpoint folder, or a known model's name.

    Reads headers only. Raises the errors of opening each; BundleError when it is none of them.
    """
    path = Path(what)
    if path.is_file() or (path / MANIFEST_NAME).is_file():
        return _of_bundle(path)
    if path.is_dir():
        if (path / "config.json").is_file():
            return _of_checkpoint(path, None)
        raise BundleError(
            f"{path} holds neither {MANIFEST_NAME} nor config.json",
            "give a bundle, a .gguf file or a checkpoint folder",
        )
    if str(what) == BUILT_IN:
        from mimo_edge.nano.commands import checkpoint_dir

        return _of_checkpoint(checkpoint_dir(), BUILT_IN)
    if str(what) in KNOWN_MODELS:
        return _of_known(str(what))
    raise BundleError(
        f"there is no model {what}",
        "give a bundle, a .gguf file, a checkpoint folder or one of "
        + ", ".join((BUILT_IN, *KNOWN_MODELS)),
    )


def role_of(name: str, config: MimoConfig) -> Role:
    """Role of a tensor by its canonical (GGUF) name."""
    if not name.startswith("blk."):
        table = {"token_embd": Role.EMBEDDING, "output": Role.HEAD}
        return table.get(name.split(".")[0], Role.NORM)
    index, part = int(name.split(".")[1]), name.split(".", 2)[2]
    if part.endswith("norm.weight"):
        return Role.NORM
    if part == "exp_probs_b.bias":
        return Role.ROUTER_BIAS
    if part.endswith(".bias"):
        return Role.BIAS
    if part == "attn_sinks.weight":
        return Role.SINKS
    if index >= config.num_hidden_layers:
        return Role.MTP
    if part.startswith("attn_"):
        return Role.ATTENTION
    if part == "ffn_gate_inp.weight":
        return Role.ROUTER
    return Role.EXPERT if "_exps." in part else Role.DENSE_FFN


def _of_bundle(path: Path) -> Inventory:
    with Bundle.open(path) as bundle:
        entries = bundle.manifest.tensors if bundle.manifest else {}
        lines = []
        for name, info in bundle.tensors.items():
            role = role_of(name, bundle.config)
            line = TensorLine(name, role, info.shape, info.type_name, info.nbytes)
            if (entry := entries.get(name)) is not None:
                line = replace(line, relative_rms=entry.relative_rms, worst_block=entry.worst_block)
            lines.append(line)
        kind = "bundle" if bundle.manifest else "gguf"
        skipped = bundle.manifest.skipped if bundle.manifest else {}
        return Inventory(kind, bundle.name, bundle.config, tuple(lines), bundle.manifest, skipped)


def _of_checkpoint(folder: Path, name: str | None) -> Inventory:
    from mimo_edge.export.checkpoint import Checkpoint
    from mimo_edge.export.mapping import plan_tensors

    with Checkpoint.open(folder) as checkpoint:
        mapping = plan_tensors(checkpoint)
        lines = []
        for plan in mapping.tensors:
            nbytes = 0
            for source in plan.sources:
                scale = checkpoint.scale_of(source)
                nbytes += checkpoint.stored(source).nbytes + (scale.nbytes if scale else 0)
            dtype = "MXFP4" if plan.mxfp4 else "+".join(plan.dtypes)
            lines.append(TensorLine(plan.name, plan.role, plan.shape, dtype, nbytes))
        return Inventory(
            "checkpoint",
            name or checkpoint.name,
            checkpoint.config,
            tuple(lines),
            skipped=mapping.skipped_by_reason(),
            skipped_tensors=mapping.skipped,
            ignored_files=checkpoint.ignored_files,
        )


def _of_known(name: str) -> Inventory:
    config = known_model(name)
    lines = [
        TensorLine(tensor, role_of(tensor, config), shape, "-", None)
        for tensor, shape in expected_shapes(config).items()
    ]
    return Inventory("known model", name, config, tuple(lines))
