"""What an export is going to do, decided from names and shapes before any tensor is read."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from mimo_edge.config import MimoConfig
from mimo_edge.devices.profile import load_profile
from mimo_edge.errors import UsageError
from mimo_edge.export.checkpoint import Checkpoint
from mimo_edge.export.gguf_tokenizer import read_chat_template, tokenizer_metadata
from mimo_edge.export.gguf_writer import GgufLayout, PlannedTensor, split_keys
from mimo_edge.export.journal import Journal
from mimo_edge.export.mapping import Canonical, TensorMapping, TensorPlan, plan_tensors
from mimo_edge.gguf_file import split_name
from mimo_edge.gguf_meta import ARCH_7B_MTP, Value, architecture, config_metadata, text, u32
from mimo_edge.heat import Heat, expert_names
from mimo_edge.manifest import FileEntry, Manifest
from mimo_edge.quant.base import Format
from mimo_edge.quant.imatrix import Imatrix
from mimo_edge.quant.recipe import Choice, Recipe
from mimo_edge.quant.roles import Role

if TYPE_CHECKING:
    from mimo_edge.export.npu_stage import NpuJob
    from mimo_edge.export.onnx.stage import OnnxJob

Progress = Callable[[str, int, int], None]
"""Called with (stage, bytes done, bytes in all)."""

_log = logging.getLogger(__name__)

PART = ".partial"  # suffix of every file until the export is whole
EXPERT_PARTS = ("gate", "up", "down")
# f32 bytes of one piece of a resident tensor.
_PIECE_BYTES = 32 << 20


class Piece(NamedTuple):
    """What is quantised, written and journalled at once.

    For a resident tensor: rows start..stop. For experts (`expert` >= 0): the expert that goes to
    place `expert` of the three stacks of `layer`."""

    key: str
    tensor: str
    start: int
    stop: int
    layer: int
    expert: int
    nbytes: int


class Layout(Protocol):
    """A file that pieces fill: `header` is written last, `offsets` are those of its tensors."""

    @property
    def header(self) -> bytes: ...
    @property
    def size(self) -> int: ...
    @property
    def offsets(self) -> Mapping[str, int]: ...


class Source(Protocol):
    """What an export starts from: a checkpoint, or a bundle that gets another form beside it."""

    @property
    def path(self) -> Path: ...
    @property
    def files(self) -> Iterable[str]: ...
    @property
    def index_sha256(self) -> str: ...
    @property
    def config(self) -> MimoConfig: ...


@dataclass
class Export:
    """One export: what is fixed before it starts, and the open files while it runs.

    `layouts` are the GGUF files, then the weight files of the ONNX form, if there are any; `gguf`
    tells whether resident tensors are among the former. From a bundle, `base` is its manifest and
    `linked` are its files, which stay as they are."""

    source: Source
    name: str
    target: Path
    staging: Path
    profile: str
    recipe: Recipe
    mapping: TensorMapping
    formats: dict[str, Format]
    layouts: list[Layout]
    file_names: list[str]
    file_of: dict[str, int]
    pieces: list[Piece]
    side_files: dict[str, bytes | Path | Imatrix]
    imatrix: Imatrix | None
    permutation: dict[int, tuple[int, ...]]
    progress: Progress | None
    threads: int
    onnx: OnnxJob | None = None
    npu: NpuJob | None = None
    gguf: bool = True
    base: Manifest | None = None
    linked: dict[str, Path] = field(default_factory=dict)
    journal: Journal | None = None
    fds: list[int] = field(default_factory=list)
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)
    tensor_crcs: dict[str, int] = field(default_factory=dict)

    @property
    def config(self) -> MimoConfig:
        return self.source.config

    @property
    def checkpoint(self) -> Checkpoint:
        """The source of tensors that are quantised to GGUF."""
        assert isinstance(self.source, Checkpoint)
        return self.source

    @property
    def gguf_layouts(self) -> list[GgufLayout]:
        return [layout for layout in self.layouts if isinstance(layout, GgufLayout)]

    @property
    def compiled(self) -> list[str]:
        """Files made for NPUs, by name in the bundle."""
        return [] if self.npu is None else self.npu.files

    @property
    def folder(self) -> Path:
        """Where the bundle grows."""
        return self.staging / "bundle"

    @property
    def total_bytes(self) -> int:
        return sum(layout.size for layout in self.layouts)

    def report(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())
        if self.journal is not None:
            self.journal.close()
            self.journal = None


def prepare(
    source: Checkpoint,
    name: str,
    target: Path,
    staging: Path,
    profile: str,
    recipe: Recipe | str | None,
    overrides: tuple[tuple[str, str], ...],
    imatrix: Imatrix | None,
    heat: Heat | None,
    permute_by_heat: bool,
    progress: Progress | None,
    threads: int,
    gguf: bool = True,
    onnx: bool = False,
) -> Export:
    """Decide everything from names and shapes; no tensor data is read. `gguf`, `onnx`: in which
    form resident tensors are written; routed experts are GGUF always."""
    config = source.config
    mapping = plan_tensors(source)
    chosen = choose_recipe(recipe, load_profile(profile).recipe, config).with_overrides(overrides)
    if unused := chosen.unused_overrides(plan.name for plan in mapping.tensors):
        raise UsageError(f"the recipe's overrides {unused} match no tensor of {source.name}")
    choices = choose_formats(chosen, mapping.tensors)
    for tensor, choice in choices.items():
        if choice.fallback:
            _log.warning("%s: %s", tensor, choice.reason)
    formats = {tensor: choice.format for tensor, choice in choices.items()}
    if permute_by_heat and (heat is None or not any(config.moe_layer_freq)):
        raise UsageError(
            "there is no expert heat to order experts by", "calibrate first (--calibrate FILE)"
        )
    if heat is not None:
        _check_heat(heat, config)
        _report_unseen(heat, config)
    if chosen.requires_importance and imatrix is None:
        raise UsageError(f"recipe {chosen.name} needs an importance matrix", "add --calibrate FILE")
    if not config.norm_topk_prob or config.routed_scaling_factor != 1.0:
        _log.warning(
            "stock llama.cpp ignores norm_topk_prob = %s and routed_scaling_factor = %s for this "
            "architecture; mimo-edge applies them",
            config.norm_topk_prob,
            config.routed_scaling_factor,
        )
    permutation = (
        {n: tuple(map(int, heat.order(n))) for n in sorted(heat.counts)}
        if permute_by_heat and heat is not None
        else {}
    )
    template = read_chat_template(source.tokenizer_files, source.chat_template)
    tokenizer = tokenizer_metadata(
        source.tokenizer_files, config.vocab_size, config.eos_token_ids, template
    )
    stored = [plan for plan in mapping.tensors if gguf or plan.is_expert_stack]
    names, gguf_layouts = plan_layouts(config, name, stored, formats, chosen, tokenizer)
    file_of = {tensor: i for i, layout in enumerate(gguf_layouts) for tensor in layout.tensors}
    layouts: list[Layout] = [*gguf_layouts]
    pieces = list(_pieces(mapping, stored, formats, permutation))
    side: dict[str, bytes | Path | Imatrix] = {}
    for file in ("tokenizer.json", "tokenizer.model"):
        if file in source.tokenizer_files:
            side[file] = source.tokenizer_files[file]
            break
    if template is not None:
        side["chat_template.jinja"] = template.encode()
    if heat is not None:
        side["experts.json"] = heat.permuted(permutation).to_bytes()
    if imatrix is not None:
        side["imatrix.gguf"] = imatrix
    made = _onnx_job(source, formats, permutation) if onnx else None
    if made is not None:
        names += made.files
        layouts += made.files.values()
        pieces += onnx_pieces(made)
        side |= made.side_files
    return Export(
        source=source,
        name=name,
        target=target,
        staging=staging,
        profile=profile,
        recipe=chosen,
        mapping=mapping,
        formats=formats,
        layouts=layouts,
        file_names=names,
        file_of=file_of,
        pieces=pieces,
        side_files=side,
        imatrix=imatrix,
        permutation=permutation,
        progress=progress,
        threads=threads,
        onnx=made,
        gguf=gguf,
    )


def _onnx_job(
    source: Checkpoint, formats: Mapping[str, Format], permutation: Mapping[int, tuple[int, ...]]
) -> OnnxJob:
    from mimo_edge.export.onnx.stage import ModelRows, plan_job
    from mimo_edge.export.weights import CheckpointWeights

    reader = ModelRows(CheckpointWeights(source), source.config, permutation)
    return plan_job(source.config, lambda name: stored_format(formats, name), reader, _PIECE_BYTES)


def stored_format(formats: Mapping[str, Format], name: str) -> Format:
    """The format of a matrix by canonical name, where q, k and v may be stored as one."""
    if name in formats:
        return formats[name]
    prefix, found, last = name.rpartition("attn_")
    if found and last[:2] in ("q.", "k.", "v."):
        return formats[f"{prefix}attn_qkv.{last[2:]}"]
    return formats[name]


def onnx_pieces(job: OnnxJob) -> Iterator[Piece]:
    """The pieces of the ONNX form, after those of GGUF files."""
    for key, rows in job.pieces.items():
        yield Piece(key, rows.stored.parts[0].name, rows.start, rows.stop, -1, -1, rows.nbytes)


def choose_recipe(recipe: Recipe | str | None, default: str, config: MimoConfig) -> Recipe:
    """The recipe asked for, else that of the device. Raises UsageError on unknown names."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe is not None:
        return Recipe.named(recipe, family=config.family)
    if config.quantization.expert_store == "mxfp4":
        # The release is 4-bit already: requantising it to another 4-bit code only loses.
        default = "mxfp4"
    return Recipe.named(default, family=config.family)


def choose_formats(recipe: Recipe, tensors: Iterable[Canonical]) -> dict[str, Choice]:
    """The format of every tensor, by name."""
    return {t.name: recipe.format_for(t.role, t.shape[-1], t.name) for t in tensors}


def _check_heat(heat: Heat, config: MimoConfig) -> None:
    layers = [n for n in range(config.num_hidden_layers) if config.layer(n).moe]
    sizes = {len(counts) for counts in heat.counts.values()}
    if sorted(heat.counts) != layers or sizes - {config.n_routed_experts}:
        raise UsageError(
            f"the expert heat covers {len(heat.counts)} layers of {sorted(sizes)} experts, the "
            f"model has {len(layers)} of {config.n_routed_experts}",
            "it was measured on another model",
        )


def _report_unseen(heat: Heat, config: MimoConfig) -> None:
    """Say which experts the calibration text never reached, whatever the recipe makes of it."""
    if unseen := heat.unseen():
        _log.warning(
            "no token of the calibration reached %d of %d experts: %s",
            len(unseen),
            config.n_routed_experts * len(heat.counts),
            ", ".join(expert_names(unseen)),
        )


def plan_layouts(
    config: MimoConfig,
    name: str,
    tensors: Sequence[Canonical],
    formats: Mapping[str, Format],
    recipe: Recipe,
    tokenizer: Mapping[str, Value],
) -> tuple[list[str], list[GgufLayout]]:
    """File names and layouts: resident tensors, then routed experts, then MiMo-7B's MTP block.

    `tokenizer` holds the tokenizer.* keys (`tokenizer_metadata`)."""
    planned = {t.name: PlannedTensor(t.name, formats[t.name].ggml_type, t.shape) for t in tensors}
    experts = [t for t in tensors if t.role is Role.EXPERT]
    side = [t for t in tensors if config.family == "mimo" and _is_mtp(t, config)]
    apart = {t.name for t in (*experts, *side)}
    resident = [t for t in tensors if t.name not in apart]
    general = {
        "general.architecture": text(architecture(config)),
        "general.type": text("model"),
        "general.name": text(name),
        "general.file_type": u32(recipe.file_type),
        "general.quantization_version": u32(2),
    }
    main = general | config_metadata(config)
    if tokenizer["tokenizer.ggml.model"].value == "none":
        main[f"{architecture(config)}.vocab_size"] = u32(config.vocab_size)
    main |= tokenizer
    parts: list[tuple[dict[str, Value], list[Canonical]]] = [(main, resident)]
    if experts:
        parts.append(({"general.architecture": general["general.architecture"]}, experts))
    count, total = len(parts), len(resident) + len(experts)
    names, layouts = [], []
    for number, (keys, part) in enumerate(parts):
        split = split_keys(number, count, total) if count > 1 else {}
        names.append(split_name("model", number, count) if count > 1 else "model.gguf")
        layouts.append(GgufLayout(keys | split, [planned[t.name] for t in part]))
    if side:
        keys = general | {"general.architecture": text(ARCH_7B_MTP)}
        keys[f"{ARCH_7B_MTP}.nextn_predict_layers"] = u32(config.num_mtp_layers)
        names.append("model-mtp.gguf")
        layouts.append(GgufLayout(keys, [planned[t.name] for t in side]))
    return names, layouts


def _is_mtp(tensor: Canonical, config: MimoConfig) -> bool:
    return tensor.layer is not None and tensor.layer >= config.num_hidden_layers


def _pieces(
    mapping: TensorMapping,
    stored: Sequence[TensorPlan],
    formats: Mapping[str, Format],
    permutation: Mapping[int, tuple[int, ...]],
) -> Iterator[Piece]:
    """Every piece of `stored`, in a fixed order: tensors as planned, the experts of a layer
    together."""
    for plan in stored:
        if plan.is_expert_stack:
            if not plan.name.endswith(".ffn_gate_exps.weight"):
                continue
            assert plan.layer is not None
            stacks = [mapping[stack_name(plan.layer, part)] for part in EXPERT_PARTS]
            nbytes = sum(s.shape[1] * formats[s.name].row_bytes(s.shape[2]) for s in stacks)
            for e in range(plan.shape[0]):
                key = f"blk.{plan.layer}.expert.{e}"
                yield Piece(key, plan.name, 0, 0, plan.layer, e, nbytes)
            continue
        rows = plan.shape[0] if len(plan.shape) > 1 else 1
        size = formats[plan.name].row_bytes(plan.shape[-1])
        step = max(1, _PIECE_BYTES // (4 * plan.shape[-1]))
        if plan.layer in permutation and follows_experts(plan):
            step = rows  # rows move, so they are loaded together (a router is small)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            key = f"{plan.name}.{start}"
            yield Piece(key, plan.name, start, stop, -1, -1, (stop - start) * size)


def stack_name(layer: int, part: str) -> str:
    return f"blk.{layer}.ffn_{part}_exps.weight"


def follows_experts(plan: TensorPlan) -> bool:
    return plan.role in (Role.ROUTER, Role.ROUTER_BIAS)
