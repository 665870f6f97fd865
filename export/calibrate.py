"""Calibration: what a text tells about the weights, before they are quantised.

Text goes through the reference model and every matrix remembers the squares of what it is
multiplied with (its importance, `imatrix.gguf`); every routed expert also how often it was chosen
and with how much router weight (its heat, `experts.json`).

The model is walked block by block, all of the text through one before the next is loaded: one
pass over the checkpoint. Memory is one block, one expert, the sums of the importance matrix and
the residual stream of every token (4 * hidden_size bytes each), whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mimo_edge.config import LayerSpec, MimoConfig
from mimo_edge.errors import BundleError, ExportError, GenerationError, UsageError
from mimo_edge.export.checkpoint import Checkpoint, text_name
from mimo_edge.export.weights import CheckpointWeights
from mimo_edge.heat import Heat, expert_names
from mimo_edge.kv_cache import FullCache
from mimo_edge.model_source import open_tokenizer
from mimo_edge.quant.imatrix import Imatrix
from mimo_edge.runtimes.base import F32, TokenIds, Weights
from mimo_edge.runtimes.checks import check_ids
from mimo_edge.runtimes.reference import ReferenceBackend, rms_norm
from mimo_edge.text_file import read_text
from mimo_edge.tokenizer import Tokenizer

IMATRIX_NAME = "imatrix.gguf"
HEAT_NAME = "experts.json"

# Fewer tokens say nothing about which inputs matter.
MIN_TOKENS = 64
# What the residual streams of all tokens may take, unless max_tokens says otherwise:
# 32,768 tokens at hidden size 4096.
_STREAM_BYTES = 512 << 20
# No tokenizer makes a token of more bytes on average; bounds what is read of a huge file.
_BYTES_PER_TOKEN = 32
# Rows per call of routed experts: every call reads each expert of the layer once.
_EXPERT_ROWS = 8192
# Rows per call of a dense FFN, whose intermediate values are the wide ones.
_DENSE_ROWS = 512

Span = tuple[int, int]


class Encoder(Protocol):
    """What calibration needs of a tokenizer: edge/tokenizer.Tokenizer has it."""

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]: ...


class Collector:
    """The observer of a calibration run: importance of every matrix, heat of every expert.

    Names are those of the exported file, which fuses q, k and v of MTP blocks (MiMo-V2).
    """

    def __init__(self, config: MimoConfig, imatrix: Imatrix) -> None:
        self.imatrix = imatrix
        self.counts = {
            spec.index: np.zeros(config.n_routed_experts, np.int64)
            for spec in config.layers
            if spec.moe
        }
        self.mass = {layer: np.zeros(config.n_routed_experts) for layer in self.counts}
        self._n_experts = config.n_routed_experts
        self._fused: dict[str, str | None] = {}
        if config.family == "mimo_v2":
            for k in range(config.num_mtp_layers):
                p = f"blk.{config.num_hidden_layers + k}.attn_"
                # The three meet the same input: count it once.
                self._fused |= {
                    p + "q.weight": p + "qkv.weight",
                    p + "k.weight": None,
                    p + "v.weight": None,
                }

    def matmul(self, name: str, x: F32) -> None:
        """Add x f32 [T, in] to the importance of `name`."""
        exported = self._fused.get(name, name)
        if exported is not None:
            self.imatrix.add(exported, x)

    def expert_matmul(self, name: str, expert: int, x: F32) -> None:
        """Add x f32 [T', in] to the importance of slice `expert` of the stack `name`."""
        self.imatrix.add_expert(name, expert, self._n_experts, x)

    def route(self, layer: int, ids: NDArray[np.int64], weights: F32) -> None:
        """Count the chosen experts ids [T, K] and add up their weights f32 [T, K]."""
        flat, size = ids.ravel(), self._n_experts
        self.counts[layer] += np.bincount(flat, minlength=size)
        self.mass[layer] += np.bincount(flat, weights=weights.ravel(), minlength=size)


class Walker(ReferenceBackend):
    """The reference model, one layer at a time over many sequences.

    `h` is always the residual streams of all chunks one after another, f32 [N, M]; `spans` are
    the (start, stop) rows of each chunk. Weights are dropped as soon as a step is done.
    """

    def __init__(self, weights: Weights, observer: Collector) -> None:
        super().__init__(weights, max_cached_experts=0, observer=observer)

    def embed(self, token_ids: TokenIds) -> F32:
        return self._source().embedding(check_ids(token_ids, self.config))

    def block(self, spec: LayerSpec, h: F32, spans: Sequence[tuple[int, int]]) -> None:
        """h <- block(h), in place."""
        p, c = f"blk.{spec.index}.", self.config
        with np.errstate(over="ignore", invalid="ignore"):
            for start, stop in spans:
                rows = stop - start
                # A whole chunk is at hand: full rows, and the mask does the window.
                cache = FullCache(spec.num_key_value_heads, c.head_dim, c.v_head_dim, rows)
                x = self._norm(p + "attn_norm.weight", h[start:stop])
                h[start:stop] += self._attention(spec, x, 0, cache, rows)
            self._tensors.clear()
            self._check_finite(spec, h)
            step = _EXPERT_ROWS if spec.moe else _DENSE_ROWS
            for start in range(0, len(h), step):
                rows_of = h[start : start + step]
                rows_of += self._feed_forward(spec, self._norm(p + "ffn_norm.weight", rows_of))
            self._tensors.clear()
        self._check_finite(spec, h)

    def join(self, depth: int, token_ids: TokenIds, hidden: F32) -> F32:
        """Input of MTP block `depth`: rows of token_ids [n] and target states hidden [n, M]."""
        p, c = f"blk.{self.config.num_hidden_layers + depth}.nextn.", self.config
        e = self._norm(p + "enorm.weight", self.embed(token_ids))
        h = self._norm(p + "hnorm.weight", hidden)
        pair = (e, h) if c.family == "mimo_v2" else (h, e)
        z = self._linear(p + "eh_proj.weight", np.concatenate(pair, axis=-1))
        self._tensors.clear()
        return z

    def _check_finite(self, spec: LayerSpec, h: F32) -> None:
        if not np.isfinite(h).all():
            raise GenerationError(
                f"block {spec.index} gave NaN or Inf during calibration",
                "the weights of this block are damaged",
            )

    def observe_head(self, norm: str, h: F32) -> None:
        """Show the collector what the head is multiplied with; the product is not needed."""
        weight, collector = self._tensor(norm), self.observer
        assert collector is not None
        for start in range(0, len(h), _EXPERT_ROWS):
            rows = h[start : start + _EXPERT_ROWS]
            collector.matmul("output.weight", rms_norm(rows, weight, self.config.layernorm_epsilon))
        self._tensors.clear()


@dataclass(frozen=True)
class Calibration:
    """What was measured: `imatrix` for the quantiser, `heat` for the bundle; both number the
    experts as the source does."""

    imatrix: Imatrix
    heat: Heat
    chunks: int

    @property
    def tokens(self) -> int:
        """Tokens that went through the model."""
        return self.heat.tokens

    @property
    def unseen(self) -> list[str]:
        """Experts no token was routed to, as "blk.3 expert 7". They have no importance: they
        are quantised without it."""
        return expert_names(self.heat.unseen())

    def save(self, folder: Path) -> None:
        """Write imatrix.gguf and experts.json into `folder`, each whole or not at all.

        Raises ExportError when they cannot be written."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.imatrix.write(folder / IMATRIX_NAME)
            temporary = folder / f".{HEAT_NAME}.part"
            try:
                temporary.write_bytes(self.heat.to_bytes())
                temporary.replace(folder / HEAT_NAME)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise ExportError(f"cannot write to {folder}: {error.strerror}") from error


def calibrate(
    weights: Weights,
    tokenizer: Encoder | None,
    text: str | Path | Sequence[int] | NDArray[np.integer],
    *,
    chunk_tokens: int = 512,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Run text through the model and collect importance and heat.

    `text` is the path of a UTF-8 text (special tokens in it count as such), the path of an
    existing imatrix GGUF, or token ids [N]. It is cut into contexts of `chunk_tokens`; tokens
    past `max_tokens` (None: as many as 512 MiB of residual streams hold) are left out. MTP
    blocks run teacher-forced on the same text. `progress(done, all)` counts blocks. The same
    input gives the same result. `weights` stay open.

    Raises UsageError on a text that is missing, empty, too short or not UTF-8; BundleError on a
    damaged imatrix or one of another model; GenerationError when the weights give NaN.
    """
    config = weights.config
    if chunk_tokens < 2:
        raise UsageError(f"calibration chunks of {chunk_tokens} tokens", "use 2 or more")
    if chunk_tokens > config.max_position_embeddings:
        raise UsageError(
            f"calibration chunks of {chunk_tokens} tokens for a model of "
            f"{config.max_position_embeddings} positions"
        )
    if max_tokens is None:
        max_tokens = max(MIN_TOKENS, _STREAM_BYTES // (4 * config.hidden_size))
    elif max_tokens < MIN_TOKENS:
        raise UsageError(f"max_tokens = {max_tokens} is too few to calibrate", f"use {MIN_TOKENS}")
    name = "token ids"
    if isinstance(text, (str, Path)):
        path = Path(text)
        name = text_name(path.name)
        if is_gguf(path):
            return _from_imatrix(path, config)
        if tokenizer is None:
            raise UsageError(f"{path} cannot be read without a tokenizer", "give token ids")
        content = read_text(path, max_tokens * _BYTES_PER_TOKEN, "calibration text")
        ids = np.asarray(tokenizer.encode(content, allow_special=True), np.int32)
    else:
        ids = np.asarray(text, np.int32)
    ids = ids[:max_tokens]
    if ids.ndim != 1 or len(ids) < MIN_TOKENS:
        raise UsageError(
            f"{name} has {ids.size} tokens, too few to calibrate on",
            f"give at least {MIN_TOKENS}, better several thousand",
        )
    spans = _spans(len(ids), chunk_tokens)
    collector = Collector(config, Imatrix((name,), chunk_tokens))
    _walk(Walker(weights, collector), ids[: spans[-1][1]], spans, progress)
    heat = Heat(spans[-1][1], collector.counts, collector.mass, name)
    return Calibration(collector.imatrix, heat, len(spans))


def calibrate_checkpoint(
    checkpoint: str | Path,
    file: str | Path,
    *,
    chunk_tokens: int = 512,
    max_tokens: int | None = None,
    window: int | None = None,
    ignore_config_keys: Iterable[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Calibrate a checkpoint folder on `file`, with the checkpoint's own tokenizer.

    `window` and `ignore_config_keys` as for the export, the rest as `calibrate`, which says
    what it raises; also CheckpointError, ConfigError and TokenizerError.
    """
    opened = Checkpoint.open(checkpoint, window=window, ignore_config_keys=ignore_config_keys)
    weights = CheckpointWeights(opened)
    try:
        return calibrate(
            weights,
            read_tokenizer(opened),
            Path(file),
            chunk_tokens=chunk_tokens,
            max_tokens=max_tokens,
            progress=progress,
        )
    finally:
        weights.close()


def read_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer a checkpoint brings, None without one. Raises TokenizerError."""
    files = checkpoint.tokenizer_files
    path = files.get("tokenizer.json") or files.get("tokenizer.model")
    return None if path is None else open_tokenizer(path)


def _spans(length: int, chunk_tokens: int) -> list[Span]:
    """(start, stop) of each chunk; a last chunk of one token has no context and is left out."""
    spans = [(a, min(a + chunk_tokens, length)) for a in range(0, length, chunk_tokens)]
    return [(a, b) for a, b in spans if b - a >= 2]


def _walk(
    walker: Walker,
    ids: TokenIds,
    spans: list[Span],
    progress: Callable[[int, int], None] | None,
) -> None:
    config = walker.config
    steps = config.num_hidden_layers + config.num_mtp_layers

    def report(done: int) -> None:
        if progress is not None:
            progress(done, steps)

    report(0)
    h = walker.embed(ids)
    for spec in config.layers:
        walker.block(spec, h, spans)
        report(spec.index + 1)
    walker.observe_head("output_norm.weight", h)
    for depth in range(config.num_mtp_layers):
        # Row i takes H_i and x_{i+1+depth}: each chunk loses its last 1 + depth rows.
        rows, shifted = _mtp_spans(spans, depth)
        if not shifted:
            continue  # chunks shorter than the draft depth
        hidden = np.concatenate([h[a:b] for a, b in rows])
        tokens = np.concatenate([ids[a + 1 + depth : b + 1 + depth] for a, b in rows])
        index = config.num_hidden_layers + depth
        z = walker.join(depth, tokens, hidden)
        walker.block(config.layer(index), z, shifted)
        walker.observe_head(f"blk.{index}.layer_output_norm.weight", z)
        report(index + 1)


def _mtp_spans(spans: list[Span], depth: int) -> tuple[list[Span], list[Span]]:
    """(rows of H that MTP block `depth` takes, the same rows where they lie end to end)."""
    rows = [(a, b - 1 - depth) for a, b in spans if b - 1 - depth > a]
    ends = np.cumsum([b - a for a, b in rows]).tolist()
    return rows, list(zip([0, *ends[:-1]], ends, strict=True)) if rows else []


# --- reading ---------------------------------------------------------------------------------


def is_gguf(path: Path) -> bool:
    """Whether a file is an importance matrix rather than a text. Raises UsageError when it cannot
    be read."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        raise UsageError(f"cannot read calibration text {path}: {error.strerror}") from error


def _from_imatrix(path: Path, config: MimoConfig) -> Calibration:
    """An importance matrix made elsewhere. It counts how often experts were chosen, but has no
    router mass: that is 0 in the heat."""
    imatrix = Imatrix.read(path)
    for name, matrices in _expected(config):
        if name not in imatrix.names:
            continue
        found = len(imatrix.counts(name))
        if found != matrices:
            raise BundleError(
                f"{path}: {name} has {found} matrices, this model {matrices}",
                "the importance matrix belongs to another model",
            )
    counts = {}
    for spec in config.layers:
        if not spec.moe:
            continue
        name = f"blk.{spec.index}.ffn_gate_exps.weight"
        if name not in imatrix.names:
            raise BundleError(
                f"{path} has no {name}", "the importance matrix belongs to another model"
            )
        counts[spec.index] = imatrix.counts(name)
    chosen = [int(c.sum()) for c in counts.values()]
    tokens = max(chosen, default=0) // max(1, config.num_experts_per_tok)
    mass = {layer: np.zeros(len(c)) for layer, c in counts.items()}
    heat = Heat(tokens, counts, mass, f"{text_name(path.name)} (no router mass)")
    return Calibration(imatrix, heat, imatrix.chunk_count)


def _expected(config: MimoConfig) -> Iterator[tuple[str, int]]:
    for spec in config.layers:
        kinds = ("gate", "up", "down")
        suffix, size = ("_exps", config.n_routed_experts) if spec.moe else ("", 1)
        for kind in kinds:
            yield f"blk.{spec.index}.ffn_{kind}{suffix}.weight", size
