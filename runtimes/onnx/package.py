"""The ONNX form in a bundle, opened: its sessions, checked against the model's config."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mimo_edge.bundle import Bundle
from mimo_edge.config import LayerSpec, MimoConfig
from mimo_edge.errors import BackendError, BundleError
from mimo_edge.manifest import Manifest
from mimo_edge.onnx_io import (
    EMBED,
    FOLDER,
    HEAD,
    IR_VERSION,
    MODEL_NAME,
    OPSET,
    Shard,
    kind_of,
    mtp_name,
)
from mimo_edge.runtimes.onnx.library import Opener, Session

Shape = tuple[int | None, ...]


def onnx_form(bundle: Bundle) -> Manifest:
    """The manifest of a bundle that has an ONNX form. Raises BackendError when it has none."""
    if bundle.manifest is None or bundle.manifest.onnx is None:
        raise BackendError(
            f"{bundle.path} has no ONNX form",
            "export with --format both, or use --backend ggml",
        )
    return bundle.manifest


class Package:
    """Every session of a model in variant `variant`; `shards` are its decoder layers in order."""

    def __init__(
        self,
        bundle: Bundle,
        config: MimoConfig,
        variant: str,
        threads: int,
        provider: Opener | None = None,
    ) -> None:
        """`config` may leave out MTP blocks, which are then not loaded. `provider` None: the CPU;
        the embedding is always the CPU's. Raises BackendError when there is no ONNX form or not
        this variant, BundleError when it does not fit the model, ProviderError."""
        entry = onnx_form(bundle).onnx
        assert entry is not None
        if entry.opset > OPSET or entry.ir_version > IR_VERSION:
            raise BundleError(
                f"{bundle.path}: graphs of opset {entry.opset}, IR version {entry.ir_version}; "
                f"this version reads {OPSET} and {IR_VERSION}",
                "use the version that wrote them",
            )
        self._folder = bundle.path / FOLDER
        self._config = config
        self._threads = threads
        names = {name for name, c in entry.components.items() if variant in c.variants}
        if not names:
            have = sorted({v for c in entry.components.values() for v in c.variants})
            raise BackendError(
                f"{bundle.path} has no graphs for {variant}, only for {', '.join(have)}"
            )
        self.shards = tuple(
            Shard(name, c.layers, config.layer(c.layers[-1]).moe)
            for name, c in entry.components.items()
            if name in names and c.layers and c.layers[-1] < config.num_hidden_layers
        )
        self._check_shards(bundle.path)
        wanted = [EMBED, *(s.name for s in self.shards), HEAD]
        wanted += [mtp_name(depth) for depth in range(config.num_mtp_layers)]
        if missing := [name for name in wanted if name not in names]:
            raise BundleError(f"{bundle.path} lacks the graph {missing[0]} for {variant}")
        self._variant = variant
        self._provider = provider
        self.embed = self._open(EMBED, _embed_io(config))
        self.layers = tuple(self._open(s.name, _layer_io(config, s)) for s in self.shards)
        self.head = self._open(HEAD, _head_io(config))
        self.mtp = tuple(
            self._open(mtp_name(depth), _mtp_io(config, depth))
            for depth in range(config.num_mtp_layers)
        )

    def _check_shards(self, where: Path) -> None:
        """Decoder layers, each once and in order, and a router only where a shard ends."""
        found = [layer for shard in self.shards for layer in shard.layers]
        if found != list(range(self._config.num_hidden_layers)):
            raise BundleError(f"{where}: the graphs hold layers {found}")
        for shard in self.shards:
            if any(self._config.layer(layer).moe for layer in shard.layers[:-1]):
                raise BundleError(f"{where}: {shard.name} goes on after a router")

    def _open(self, name: str, expected: dict[str, Shape]) -> Session:
        path = self._folder / name / self._variant / MODEL_NAME
        session = Session(path, self._threads, None if name == EMBED else self._provider)
        found = {io.name: io for io in (*session.inputs, *session.outputs)}
        if set(found) != set(expected):
            other = sorted(set(found) ^ set(expected))
            raise BundleError(
                f"{path}: inputs and outputs differ from the model's in {', '.join(other)}",
                "it was made for another model or version: export again",
            )
        for key, shape in expected.items():
            io = found[key]
            fits = len(io.shape) == len(shape) and all(
                want is None or have == want for have, want in zip(io.shape, shape, strict=True)
            )
            if not fits or io.dtype is None:
                raise BundleError(
                    f"{path}: {key} has the shape {list(io.shape)}, the model's is "
                    f"{['any' if n is None else n for n in shape]}",
                    "it was made for another model: export again",
                )
        return session


def _embed_io(c: MimoConfig) -> dict[str, Shape]:
    return {"tokens": (None,), "h": (None, c.hidden_size)}


def _head_io(c: MimoConfig) -> dict[str, Shape]:
    return {"h": (None, c.hidden_size), "norm": (1,), "logits": (None, c.vocab_size)}


def _layer_io(c: MimoConfig, shard: Shard) -> dict[str, Shape]:
    rows = (None, c.hidden_size)
    found: dict[str, Shape] = {"h": rows, "h_out": rows}
    for layer in shard.layers:
        found |= dict(_attention_io(c, c.layer(layer)))
    if shard.cut:
        chosen = (None, c.num_experts_per_tok)
        found |= {"x": rows, "ids": chosen, "weights": chosen}
    return found


def _mtp_io(c: MimoConfig, depth: int) -> dict[str, Shape]:
    rows = (None, c.hidden_size)
    found: dict[str, Shape] = {"e": rows, "hidden": rows, "h_out": rows}
    return found | dict(_attention_io(c, c.layer(c.num_hidden_layers + depth)))


def _attention_io(c: MimoConfig, spec: LayerSpec) -> Iterator[tuple[str, Shape]]:
    kind, i, groups = kind_of(spec), spec.index, spec.num_key_value_heads
    for name in ("cos", "sin"):
        yield f"{name}_{kind}", (1, None, c.rotary_dim // 2)
    yield f"mask_{kind}", (None, None)
    yield f"at_{kind}", (1,)
    for part, dim in (("k", c.head_dim), ("v", c.v_head_dim)):
        for name in (f"p{part}_{i}", f"c{part}_{i}"):
            yield name, (1, groups, None, dim)
