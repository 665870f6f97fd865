"""The graphs of a model as an ONNX Runtime model package: which files there are, and their bytes.

Everything but the weights follows from the config and the formats, so a package is planned whole
before any tensor is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mimo_edge
from mimo_edge.config import MimoConfig
from mimo_edge.export.onnx import layers
from mimo_edge.export.onnx.graph import Graph
from mimo_edge.export.onnx.layers import GraphForm, LinearOf
from mimo_edge.export.onnx.linear import BlockLinear, FloatLinear, Linear, TableFormat
from mimo_edge.onnx_io import (
    CPU_VARIANT,
    DATA_NAME,
    EMBED,
    FOLDER,
    HEAD,
    IR_VERSION,
    LAYERS_PER_SHARD,
    MODEL_NAME,
    OPSET,
    PACKAGE_MANIFEST,
    mtp_name,
    shards,
)
from mimo_edge.quant.base import Format

_PLAIN = ("F32", "F16", "BF16")
# Formats of up to this many bits a weight become 4-bit codes, larger ones 8-bit codes.
_FOUR_BITS = 5.0


@dataclass(frozen=True)
class Component:
    """One graph of the package in one variant; `layers` are those of a decoder shard."""

    name: str
    variant: str
    graph: Graph
    layers: tuple[int, ...] = ()

    @property
    def folder(self) -> str:
        """Relative to the package."""
        return f"{self.name}/{self.variant}"

    @property
    def data_file(self) -> str:
        """The weight file, relative to the bundle."""
        return f"{FOLDER}/{self.folder}/{DATA_NAME}"

    @property
    def model_file(self) -> str:
        """The graph, relative to the bundle."""
        return f"{FOLDER}/{self.folder}/{MODEL_NAME}"


@dataclass(frozen=True)
class Package:
    """Every component of a model; `formats` names the weight format of each matrix."""

    components: tuple[Component, ...]
    formats: Mapping[str, str]

    def side_files(self) -> dict[str, bytes]:
        """What is written whole, by name in the bundle: the graphs, and the package's manifest."""
        files = {c.model_file: c.graph.to_bytes() for c in self.components}
        files[f"{FOLDER}/{PACKAGE_MANIFEST}"] = ort_manifest(self.components)
        return files

    def manifest_entry(self) -> dict[str, Any]:
        """What the bundle's manifest says of the package."""
        found: dict[str, dict[str, Any]] = {}
        for c in self.components:
            entry = found.setdefault(c.name, {"layers": list(c.layers), "variants": []})
            entry["variants"].append(c.variant)
        return {
            "opset": OPSET,
            "ir_version": IR_VERSION,
            "components": found,
            "formats": dict(self.formats),
        }


def linear_of(fmt: Format) -> Linear:
    """How a matrix of GGUF format `fmt` is stored for CPUs: f32 as it is, 8 bits for formats above
    5 bits a weight, else 4 bits."""
    if fmt.name in _PLAIN:
        return FloatLinear()
    return BlockLinear(4 if fmt.bits_per_weight <= _FOUR_BITS else 8)


def plan_cpu(config: MimoConfig, format_of: Callable[[str], Format]) -> Package:
    """The package with variant `cpu`: any number of tokens, caches written in place.

    `format_of` names the GGUF format of a matrix by canonical name: the recipe decides here too
    where 4 bits are not enough."""
    form = GraphForm(cache="in_place")
    formats: dict[str, str] = {}

    def linear(name: str) -> Linear:
        found = linear_of(format_of(name))
        formats[name] = found.label
        return found

    table = TableFormat(None if format_of("token_embd.weight").name in _PLAIN else 8)
    made = list(build(config, linear, table, form, CPU_VARIANT))
    formats["token_embd.weight"] = table.label
    return Package(tuple(made), dict(sorted(formats.items())))


def build(
    config: MimoConfig,
    linear: LinearOf,
    table: TableFormat,
    form: GraphForm,
    variant: str,
    layers_per_shard: int = LAYERS_PER_SHARD,
) -> Sequence[Component]:
    """Every component of a model in one form."""
    found = [Component(EMBED, variant, layers.embedding(config, table, form))]
    for shard in shards(config, layers_per_shard):
        graph = layers.decoder_layers(config, shard.layers, linear, form)
        found.append(Component(shard.name, variant, graph, shard.layers))
    found.append(Component(HEAD, variant, layers.head(config, linear, form)))
    for depth in range(config.num_mtp_layers):
        graph = layers.mtp_block(config, depth, linear, form)
        found.append(Component(mtp_name(depth), variant, graph))
    return found


_EPS = {CPU_VARIANT: "CPUExecutionProvider"}


def ort_manifest(components: Sequence[Component]) -> bytes:
    """`manifest.json` of ONNX Runtime's model package. Source: onnxruntime 1.32, model_package
    (schema 1.0: unknown fields are refused, variant folders are relative)."""
    found: dict[str, Any] = {}
    for c in components:
        variants = found.setdefault(c.name, {"variants": {}})["variants"]
        variants[c.variant] = {
            "variant_directory": c.folder,
            "ep": _EPS[c.variant],
            "executor_info": {"ort": {"model_file": MODEL_NAME}},
        }
    raw = {
        "schema_version": "1.0",
        "package_name": "mimo-edge",
        "package_version": mimo_edge.__version__,
        "layout": "portable",
        "components": found,
    }
    return (json.dumps(raw, indent=1) + "\n").encode()
