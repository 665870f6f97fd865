"""Find out what a path is and open it: backend, tokenizer and chat template of one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_edge import budget as memory
from mimo_edge.bundle import Bundle
from mimo_edge.chat_template import ChatTemplate
from mimo_edge.config import MimoConfig
from mimo_edge.errors import BackendError, BundleError, DeviceError, UsageError
from mimo_edge.experts.trace import TraceWriter
from mimo_edge.identity import files_identity, manifest_identity
from mimo_edge.kv_format import DEFAULT_KV_TYPE
from mimo_edge.manifest import MANIFEST_NAME
from mimo_edge.provider_request import ProviderRequest
from mimo_edge.runtimes.base import Backend, RouteSink, Weights
from mimo_edge.speculative import MAX_DRAFT
from mimo_edge.text_file import path_exists
from mimo_edge.tokenizer import Tokenizer
from mimo_edge.units import format_bytes

if TYPE_CHECKING:
    from mimo_edge.runtimes.ggml.device import Device
    from mimo_edge.runtimes.ggml.expert_source import CachedExperts
    from mimo_edge.runtimes.ggml.slots import ExpertSource

BACKENDS = ("auto", "reference", "ggml", "onnx")
BUILT_IN = "mimo-nano"
ANY_PROVIDER = ProviderRequest()
# Python, NumPy and our own code, before any weight; a little above what is measured.
_PROCESS_BYTES = 128 << 20
# Below this width NumPy's threads cost more than they give; on a busy machine, far more.
_THREADED_WIDTH = 1024


@dataclass(frozen=True)
class Model:
    """An opened model. `tokenizer` is None when it works on token ids only. `experts` is set
    when routed experts are read from flash, `budget` when the backend plans its memory, `trace`
    when routes are recorded. `identity` names the weights, see `mimo_edge.identity`."""

    name: str
    backend: Backend
    tokenizer: Tokenizer | None
    template: ChatTemplate
    eos_ids: frozenset[int]
    experts: CachedExperts | None = None
    budget: memory.Budget | None = None
    trace: TraceWriter | None = None
    identity: Callable[[], str] | None = None


@dataclass(frozen=True)
class _Source:
    """Opened weights and where their texts are."""

    name: str
    weights: Weights
    tokenizer: Tokenizer | None
    template: str | None
    identity: Callable[[], str]
    bundle: Bundle | None = None  # the packed files behind `weights`, if there are any


def open_model(
    path: str | Path,
    backend: str,
    ram: int | None,
    context: int,
    threads: int | None,
    *,
    kv_type: str | None = None,
    prefer_kv_type: str = DEFAULT_KV_TYPE,
    pin: int = 0,
    trace: Path | None = None,
    mtp: bool = True,
    ep: ProviderRequest = ANY_PROVIDER,
    idle_bytes: int = 0,
) -> Model:
    """Open a bundle folder, a GGUF file or a checkpoint folder; "mimo-nano" is the built-in one.

    Backend "auto" is ggml for bundles and GGUF files (onnx for a bundle with nothing else), the
    reference for checkpoints. `ep` is the execution provider of the onnx backend. With less
    `ram` than they would need ggml and onnx read routed experts from flash. `kv_type` is the
    format of its KV cache (None: `prefer_kv_type`, but see `budget.usual_kv_type`), `pin` how many
    hottest experts of every layer stay in memory; without `mtp` its MTP blocks are not loaded.
    `trace` is the file routes are recorded in while the model runs; whoever uses the model closes
    it. `idle_bytes` are reserved for conversations that wait. Raises UsageError, BundleError,
    CheckpointError, BackendError, or DeviceError when the model does not fit `ram`.
    """
    if backend not in BACKENDS:
        raise BackendError(f"there is no backend {backend!r} in this build", "use --backend auto")
    if threads is not None:
        _check_threads(threads)
    if isinstance(pin, bool) or not isinstance(pin, int) or pin < 0:
        raise UsageError(f"pin = {pin!r}", "give a number of experts per layer")
    source = _open_source(path)
    if backend == "auto":
        # What devices run wherever it can; a checkpoint's FP8 blocks only the reference reads.
        backend = "reference" if source.bundle is None else "ggml"
        if source.bundle is not None and not source.bundle.resident_in_gguf:
            backend = "onnx"
    writer: TraceWriter | None = None
    try:
        config = source.weights.config
        if source.tokenizer is not None:
            source.tokenizer.padding_mask(
                config.vocab_size
            )  # raises when they do not belong together
        template = ChatTemplate(source.template)
        if trace is not None:
            writer = TraceWriter.of_model(trace, config, source.name)
        routes = None if writer is None else writer.record
        experts, budget = None, None
        if backend != "onnx":
            _check_gguf(source, backend, ep)
        if backend == "onnx":
            if kv_type not in (None, "f32"):
                raise UsageError(
                    f"the onnx backend keeps its KV cache in f32, not {kv_type}",
                    "use --backend ggml, or leave --kv-type out",
                )
            opened, experts, budget = _open_onnx(
                source, ram, context, threads, ep, pin, routes, mtp, idle_bytes
            )
        elif backend == "ggml":
            kind = kv_type or memory.usual_kv_type(prefer_kv_type, config, context)
            opened, experts, budget = _open_ggml(
                source, ram, context, threads, kind, pin, routes, mtp, idle_bytes
            )
        else:
            if kv_type not in (None, "f32"):
                raise UsageError(
                    f"the reference backend keeps its KV cache in f32, not {kv_type}",
                    "use --backend ggml, or leave --kv-type out",
                )
            opened = _open_reference(source, ram, context, threads, routes, idle_bytes)
    except BaseException:
        source.weights.close()
        if writer is not None:
            writer.close()
        raise
    eos = set(config.eos_token_ids)
    if source.tokenizer is not None:
        eos |= source.tokenizer.eos_ids
    return Model(
        source.name,
        opened,
        source.tokenizer,
        template,
        frozenset(eos),
        experts,
        budget,
        writer,
        # The ONNX form of a bundle has weights of its own.
        partial(_onnx_identity, source.identity) if backend == "onnx" else source.identity,
    )


def _open_reference(
    source: _Source,
    ram: int | None,
    context: int,
    threads: int | None,
    routes: RouteSink | None,
    idle_bytes: int,
) -> Backend:
    from mimo_edge.runtimes.reference import ReferenceBackend

    config = source.weights.config
    if threads is not None:
        set_blas_threads(threads)
    elif config.hidden_size < _THREADED_WIDTH:
        with suppress(BackendError):  # a speed-up only: nobody asked for it
            set_blas_threads(1)
    if ram is not None:
        _check_ram(config, ram - idle_bytes, context)
    return ReferenceBackend(source.weights, routes=routes)


def _open_ggml(
    source: _Source,
    ram: int | None,
    context: int,
    threads: int | None,
    kv_type: str,
    pin: int,
    routes: RouteSink | None,
    mtp: bool,
    idle_bytes: int,
) -> tuple[Backend, CachedExperts | None, memory.Budget]:
    """The ggml backend: all weights resident, or routed experts on flash when `ram` demands it.
    It takes over the files behind `source`."""
    if source.bundle is None:
        raise BackendError(
            "the ggml backend runs bundles and GGUF files, not checkpoints",
            "export it first (mimo-edge export), or use --backend reference",
        )
    bundle, config = source.bundle, source.weights.config
    if not mtp:
        config = replace(config, num_mtp_layers=0)
    budget = memory.plan(
        config,
        bundle.tensors,
        context,
        ram,
        process_bytes=memory.resident_bytes(),
        kv_type=kv_type,
        idle_bytes=idle_bytes,
    )
    from mimo_edge.experts.table import ExpertTable
    from mimo_edge.runtimes.ggml.backend import GgmlBackend
    from mimo_edge.runtimes.ggml.expert_source import CachedExperts
    from mimo_edge.runtimes.ggml.raw import GgufTensors

    made: list[CachedExperts] = []

    def experts(device: Device) -> CachedExperts:
        table = ExpertTable.from_bundle(bundle)
        made.append(CachedExperts(device, table, budget.slots, pin=pin))
        return made[0]

    backend = GgmlBackend(
        GgufTensors(
            config,
            [bundle.gguf],
            bounded=ram is not None,
            table_crc32=bundle.tensor_crc32("token_embd.weight"),
        ),
        threads=threads,
        kv_type=kv_type,
        chunk=budget.chunk,
        experts=experts if budget.streamed else None,
        routes=routes,
    )
    for one in made:
        one.warm_up()  # not earlier: loading weights needs the memory of empty slots
    return backend, (made[0] if made else None), budget


def _check_gguf(source: _Source, backend: str, ep: ProviderRequest) -> None:
    """Raise unless a backend that reads GGUF files or checkpoints can open this."""
    if ep.kind != "auto":
        raise UsageError(
            f"the {backend} backend has no execution provider {ep.ep}", "use --backend onnx"
        )
    if source.bundle is not None and not source.bundle.resident_in_gguf:
        raise BackendError(
            f"{source.bundle.path} holds its resident tensors in ONNX form alone",
            "use --backend onnx, or export with --format both",
        )


def _open_onnx(
    source: _Source,
    ram: int | None,
    context: int,
    threads: int | None,
    ep: ProviderRequest,
    pin: int,
    routes: RouteSink | None,
    mtp: bool,
    idle_bytes: int,
) -> tuple[Backend, CachedExperts | None, memory.Budget]:
    """The ONNX backend over a bundle; routed experts in as many slots as `ram` allows. It takes
    over the files behind `source`."""
    from mimo_edge import onnx_budget
    from mimo_edge.runtimes.onnx.backend import OnnxBackend
    from mimo_edge.runtimes.onnx.npu_package import compiled_targets
    from mimo_edge.runtimes.onnx.package import onnx_form
    from mimo_edge.runtimes.onnx.providers import Choice, OnCpu, OnNpu, OnPlugin, open_chosen

    if source.bundle is None:
        raise BackendError(
            "the onnx backend runs bundles, not checkpoints",
            "export it first (mimo-edge export --format both), or use --backend reference",
        )
    bundle, config = source.bundle, source.weights.config
    manifest = onnx_form(bundle)
    if not mtp:
        config = replace(config, num_mtp_layers=0)
    budget = onnx_budget.plan(
        config,
        manifest,
        bundle.tensors,
        context,
        ram,
        process_bytes=memory.resident_bytes(),
        idle_bytes=idle_bytes,
    )
    from mimo_edge.experts.table import ExpertTable
    from mimo_edge.runtimes.ggml.expert_source import CachedExperts
    from mimo_edge.runtimes.ggml.raw import GgufTensors
    from mimo_edge.runtimes.ggml.resident_experts import ResidentExperts

    made: list[CachedExperts] = []

    def experts(device: Device) -> ExpertSource:
        if not budget.streamed:
            # All are in memory, in the order ggml multiplies fastest.
            tensors = GgufTensors(config, [bundle.gguf], bounded=ram is not None)
            return ResidentExperts.loaded(device, tensors)
        made.append(CachedExperts(device, ExpertTable.from_bundle(bundle), budget.slots, pin=pin))
        return made[0]

    def opened(choice: Choice) -> OnnxBackend:
        made.clear()  # those of a provider that refused were closed with it
        source_of = experts if budget.slots else None
        if isinstance(choice, OnNpu):
            from mimo_edge.runtimes.onnx.npu_backend import NpuBackend

            return NpuBackend(
                bundle,
                npu=choice.target,
                qnn=choice.qnn,
                config=config,
                threads=threads,
                experts=source_of,
                routes=routes,
            )
        return OnnxBackend(
            bundle,
            chunk=budget.chunk,
            plugin=choice.plugin if isinstance(choice, OnPlugin) else None,
            reason=choice.reason if isinstance(choice, OnCpu) else "",
            config=config,
            threads=threads,
            experts=source_of,
            routes=routes,
        )

    backend = open_chosen(ep, compiled_targets(bundle.path), opened)
    for one in made:
        one.warm_up()  # not earlier: loading weights needs the memory of empty slots
    return backend, (made[0] if made else None), budget


def _open_source(path: str | Path) -> _Source:
    place = Path(path)
    if not path_exists(place):
        if str(path) != BUILT_IN:
            raise BundleError(
                f"there is no model {path}", "give a bundle, a .gguf file or a checkpoint folder"
            )
        from mimo_edge.nano.commands import checkpoint_dir

        place = checkpoint_dir()
    if place.is_dir() and not (place / MANIFEST_NAME).exists():
        if (place / "config.json").exists():
            return _open_checkpoint(place, BUILT_IN if str(path) == BUILT_IN else None)
        raise UsageError(
            f"{place} holds neither {MANIFEST_NAME} nor config.json",
            "give a bundle, a .gguf file or a checkpoint folder",
        )
    bundle = Bundle.open(place)
    try:
        tokenizer = _bundle_tokenizer(bundle.tokenizer_path, bundle.metadata)
        return _Source(
            bundle.name,
            bundle.weights(),
            tokenizer,
            bundle.chat_template,
            partial(_bundle_identity, bundle),
            bundle,
        )
    except BaseException:
        bundle.close()
        raise


def _open_checkpoint(folder: Path, name: str | None) -> _Source:
    # The runtime needs the exporter's reader only for unconverted checkpoints.
    from mimo_edge.export.checkpoint import Checkpoint
    from mimo_edge.export.gguf_tokenizer import read_chat_template
    from mimo_edge.export.weights import CheckpointWeights

    checkpoint = Checkpoint.open(folder)
    try:
        files = checkpoint.tokenizer_files
        path = files.get("tokenizer.json") or files.get("tokenizer.model")
        tokenizer = open_tokenizer(path) if path is not None else None
        template = read_chat_template(files, checkpoint.chat_template)
        weights = [folder / name for name in checkpoint.files]
        return _Source(
            name or checkpoint.name,
            CheckpointWeights(checkpoint),
            tokenizer,
            template,
            partial(files_identity, checkpoint.config, weights),
        )
    except BaseException:
        checkpoint.close()
        raise


def _onnx_identity(bundle: Callable[[], str]) -> str:
    return f"onnx:{bundle()}"


def _bundle_identity(bundle: Bundle) -> str:
    if bundle.manifest is not None:
        return manifest_identity(bundle.manifest)
    return files_identity(bundle.config, bundle.files)


def open_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from tokenizer.json or a SentencePiece .model. Raises TokenizerError."""
    if Path(path).suffix == ".model":
        return Tokenizer.from_sentencepiece(path)
    return Tokenizer.from_file(path)


def _bundle_tokenizer(path: Path | None, metadata: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer of a bundle: its file, or what the GGUF's metadata says of the same tokenizer
    where there is no file, or no package `tokenizers` to read it (on small devices)."""
    in_metadata = metadata.get("tokenizer.ggml.model", "none")
    if path is not None and not (
        in_metadata == "gpt2" and path.suffix == ".json" and find_spec("tokenizers") is None
    ):
        return open_tokenizer(path)
    return None if in_metadata == "none" else Tokenizer.from_gguf(metadata)


# --- what the reference backend needs ---------------------------------------------------


def parameter_count(config: MimoConfig) -> int:
    """Parameters of the text model, MTP blocks included."""
    m, h = config.hidden_size, config.num_attention_heads
    total = config.vocab_size * m * (1 if config.tie_word_embeddings else 2) + m
    for index in range(config.num_hidden_layers + config.num_mtp_layers):
        spec = config.layer(index)
        g = spec.num_key_value_heads
        heads = (h + g) * config.head_dim + g * config.v_head_dim
        total += heads * m + h * config.v_head_dim * m + 2 * m
        total += heads if config.attention_bias else 0
        total += h if spec.sinks else 0
        if spec.moe:
            experts = config.n_routed_experts
            total += experts * (m + 1) + 3 * experts * m * config.moe_intermediate_size
        else:
            total += 3 * m * config.intermediate_size
        if index >= config.num_hidden_layers:
            total += 2 * m * m + 3 * m
    return total


def kv_bytes(config: MimoConfig, context: int) -> int:
    """Bytes of a full f32 cache of `context` tokens with its positions."""
    total = 0
    for index in range(config.num_hidden_layers + config.num_mtp_layers):
        spec = config.layer(index)
        # MTP rings serve one query at a time, the others a whole verify (spec section 3.5).
        spare = MAX_DRAFT if index < config.num_hidden_layers else 0
        rows = context if spec.window is None else min(context, spec.window + spare)
        row = 4 * spec.num_key_value_heads * (config.head_dim + config.v_head_dim)
        total += rows * (row + 8)
    return total


def _check_ram(config: MimoConfig, ram: int, context: int) -> None:
    weights, cache = 4 * parameter_count(config), kv_bytes(config, context)
    need = weights + cache + _PROCESS_BYTES
    if need > ram:
        raise DeviceError(
            f"the reference backend needs {format_bytes(need)} ({format_bytes(weights)} for the "
            f"weights as f32, {format_bytes(cache)} for a context of {context}), "
            f"--ram allows {format_bytes(ram)}",
            f"it keeps every weight in memory: allow {format_bytes(need)}, or use a smaller model",
        )


def set_blas_threads(threads: int) -> None:
    """Let NumPy's matrix products use `threads` threads, in the whole process.

    Raises BackendError when NumPy's library cannot be told.
    """
    _check_threads(threads)
    import ctypes

    import numpy as np

    folder = Path(np.__file__).parent.parent / "numpy.libs"
    for library in sorted(folder.glob("*openblas*")):
        loaded = ctypes.CDLL(str(library))
        for name in (
            "scipy_openblas_set_num_threads64_",
            "scipy_openblas_set_num_threads",
            "openblas_set_num_threads64_",
            "openblas_set_num_threads",
        ):
            function = getattr(loaded, name, None)
            if function is not None:
                function(ctypes.c_int(threads))
                return
    raise BackendError(
        "this NumPy does not let its threads be set", "set OMP_NUM_THREADS before starting instead"
    )


def _check_threads(threads: int) -> None:
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 4096:
        raise UsageError(f"threads = {threads!r}", "use 1 or more, at most 4096")
