"""`mimo-edge.json`: what a bundle is made of, from what, and the checksums of every part.

A folder is a bundle only if this file is there; the exporter writes it last. Reading is strict:
unknown fields, other schema versions and file names that leave the folder are refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mimo_edge.config import MimoConfig
from mimo_edge.errors import BundleError, ConfigError
from mimo_edge.onnx_io import FOLDER
from mimo_edge.text_file import read_json

MANIFEST_NAME = "mimo-edge.json"
SCHEMA = 1
_MAX_BYTES = 64 << 20
_MOST_FOLDERS = 4
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CRC32 = re.compile(r"[0-9a-f]{8}")
_T = TypeVar("_T")


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and sha256 (hex) of one file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True)
class TensorEntry:
    """How one tensor is stored and what that cost.

    `crc32` covers its bytes, None for stacked experts, which have one checksum per expert.
    `relative_rms` is sqrt(sum (x - d)^2 / sum x^2) against the source, `worst_block` the largest
    of that ratio over blocks; None where nothing was lost or measured (codes passed through).
    """

    format: str
    nbytes: int
    crc32: int | None
    relative_rms: float | None = None
    worst_block: float | None = None


@dataclass(frozen=True)
class OnnxComponent:
    """One graph of the model in its variants; `layers` are the decoder layers it holds."""

    layers: tuple[int, ...]
    variants: tuple[str, ...]


@dataclass(frozen=True)
class OnnxEntry:
    """The ONNX form of the resident tensors (mimo_edge.onnx_io). `formats` names the format of each
    matrix by canonical name; `gguf`: the resident tensors are in GGUF files as well."""

    opset: int
    ir_version: int
    components: Mapping[str, OnnxComponent]
    formats: Mapping[str, str]
    gguf: bool


@dataclass(frozen=True)
class Manifest:
    """Everything `mimo-edge.json` states.

    `experts[layer][e]` is the CRC-32 of expert e's gate, up and down bytes, in that order.
    `permutation[layer][i]` is the source's number of the expert stored at place i.
    `onnx` describes the ONNX form, if there is one.
    `unweighted` names tensors, or experts as `blk.L.ffn_gate_exps.weight[e]`, that were
    quantised without importance although the export was calibrated. `skipped` maps reasons to the
    number of source tensors left out for them.
    """

    tool_version: str
    source_name: str
    source_index_sha256: str
    config: MimoConfig
    profile: str
    recipe: Mapping[str, Any]
    model_file: str
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]
    experts: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    mtp_file: str | None = None
    tokenizer_file: str | None = None
    chat_template_file: str | None = None
    heat_file: str | None = None
    imatrix_file: str | None = None
    permutation: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    unweighted: tuple[str, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)
    onnx: OnnxEntry | None = None

    def to_bytes(self) -> bytes:
        """The file's content: the same bytes for the same manifest."""
        raw = {
            "schema": SCHEMA,
            "tool_version": self.tool_version,
            "source": {"name": self.source_name, "index_sha256": self.source_index_sha256},
            "profile": self.profile,
            "model_file": self.model_file,
            "mtp_file": self.mtp_file,
            "tokenizer_file": self.tokenizer_file,
            "chat_template_file": self.chat_template_file,
            "heat_file": self.heat_file,
            "imatrix_file": self.imatrix_file,
            "files": {n: {"size": f.size, "sha256": f.sha256} for n, f in self.files.items()},
            "config": self.config.to_dict(),
            "recipe": dict(self.recipe),
            "skipped": dict(self.skipped),
            "unweighted": list(self.unweighted),
            "tensors": {name: _tensor_json(t) for name, t in self.tensors.items()},
            "experts": {
                str(n): [f"{crc:08x}" for crc in checksums] for n, checksums in self.experts.items()
            },
            "permutation": {str(n): list(order) for n, order in self.permutation.items()},
        }
        if self.onnx is not None:
            raw["onnx"] = _onnx_json(self.onnx)
        return (_dump(raw) + "\n").encode()

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check the manifest of a bundle folder.

        Raises BundleError when it is missing, malformed or of another schema version.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise BundleError(
                f"{folder} is not a bundle: it has no {MANIFEST_NAME}",
                "an export that was cut short leaves none: run it again",
            )
        return cls.from_json(read_json(path, _MAX_BYTES, BundleError, _no_duplicates), path)

    @classmethod
    def from_json(cls, raw: Any, where: object) -> Manifest:
        """Check a parsed manifest. Raises BundleError naming the field."""
        top = _Fields(raw, f"{where}")
        schema = top.take("schema", _integer)
        if schema != SCHEMA:
            raise BundleError(
                f"{where} has schema version {schema}, this version reads {SCHEMA}",
                "export again, or use the version that wrote it",
            )
        source = _Fields(top.take("source", _mapping), f"{where}: source")
        try:
            config = MimoConfig.from_dict(top.take("config", _mapping))
        except ConfigError as error:
            raise BundleError(f"{where}: {error.message}", error.hint) from error
        layers = {n for n in range(config.num_hidden_layers) if config.layer(n).moe}
        experts = config.n_routed_experts
        manifest = cls(
            tool_version=top.take("tool_version", _string),
            source_name=source.take("name", _string),
            source_index_sha256=source.take("index_sha256", _sha256),
            config=config,
            profile=top.take("profile", _string),
            recipe=top.take("recipe", _mapping),
            model_file=top.take("model_file", plain_name),
            mtp_file=top.take("mtp_file", _optional(plain_name)),
            tokenizer_file=top.take("tokenizer_file", _optional(plain_name)),
            chat_template_file=top.take("chat_template_file", _optional(plain_name)),
            heat_file=top.take("heat_file", _optional(plain_name)),
            imatrix_file=top.take("imatrix_file", _optional(plain_name)),
            files={
                inner_name(name): _file_entry(entry, f"{where}: file {name}")
                for name, entry in top.take("files", _mapping).items()
            },
            tensors={
                name: _tensor_entry(entry, f"{where}: tensor {name}")
                for name, entry in top.take("tensors", _mapping).items()
            },
            experts=_by_layer(top.take("experts", _mapping), layers, experts, _crc32, where),
            permutation=_by_layer(
                top.take("permutation", _mapping), layers, experts, _integer, where
            ),
            unweighted=tuple(_string(name) for name in top.take("unweighted", _list)),
            skipped={k: _count(v) for k, v in top.take("skipped", _mapping).items()},
            onnx=top.take_optional("onnx", lambda raw: _onnx_entry(raw, f"{where}: onnx")),
        )
        source.finish()
        top.finish()
        manifest._check(where, layers)
        return manifest

    def _check(self, where: object, moe_layers: set[int]) -> None:
        if set(self.experts) != moe_layers:
            raise BundleError(f"{where}: experts of {len(moe_layers)} layers lack checksums")
        for layer, order in self.permutation.items():
            if sorted(order) != list(range(self.config.n_routed_experts)):
                raise BundleError(f"{where}: permutation of layer {layer} is none")
        named = (self.model_file, self.mtp_file, self.tokenizer_file, self.chat_template_file)
        for name in (*named, self.heat_file, self.imatrix_file):
            if name is not None and name not in self.files:
                raise BundleError(f"{where} names {name} but does not list it under files")


def plain_name(value: Any) -> str:
    """A file name that stays in its folder. Raises BundleError on anything else."""
    if (
        not isinstance(value, str)
        or not 0 < len(value) <= 255
        or value in (".", "..", MANIFEST_NAME)
        or any(c in "/\\:" or ord(c) < 32 for c in value)
    ):
        raise BundleError(f"{value!r} is not a plain file name")
    return value


def inner_name(value: Any) -> str:
    """The name of a file in the bundle's folder, or below its `onnx` folder with parts joined by
    "/". Raises BundleError on anything that could leave the folder."""
    if not isinstance(value, str) or not value.startswith(f"{FOLDER}/"):
        return plain_name(value)
    if value.count("/") > _MOST_FOLDERS:
        raise BundleError(f"{value!r} is not a plain file name in a folder of the bundle")
    for part in value.split("/"):
        plain_name(part)
    return value


def _tensor_json(entry: TensorEntry) -> dict[str, Any]:
    raw: dict[str, Any] = {"format": entry.format, "nbytes": entry.nbytes}
    raw["crc32"] = None if entry.crc32 is None else f"{entry.crc32:08x}"
    if entry.relative_rms is not None:
        raw["relative_rms"] = entry.relative_rms
    if entry.worst_block is not None:
        raw["worst_block"] = entry.worst_block
    return raw


def _dump(raw: dict[str, Any]) -> str:
    """JSON with one line per entry of the big tables: readable, and diffs name the tensor."""
    lines = []
    for key, value in raw.items():
        if isinstance(value, dict) and value and key in ("files", "tensors", "experts"):
            rows = [f"    {json.dumps(k)}: {_compact(v)}" for k, v in value.items()]
            lines.append(f"  {json.dumps(key)}: {{\n" + ",\n".join(rows) + "\n  }")
        else:
            lines.append(f"  {json.dumps(key)}: {_compact(value)}")
    return "{\n" + ",\n".join(lines) + "\n}"


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return result


class _Fields:
    """An object whose fields must all be taken."""

    def __init__(self, raw: Any, where: str) -> None:
        if not isinstance(raw, dict):
            raise BundleError(f"{where} is a {type(raw).__name__}, not an object")
        self._raw = dict(raw)
        self._where = where

    def take(self, key: str, check: Callable[[Any], _T]) -> _T:
        if key not in self._raw:
            raise BundleError(f"{self._where} lacks {key!r}")
        try:
            return check(self._raw.pop(key))
        except BundleError as error:
            raise BundleError(f"{self._where}: {key}: {error.message}") from None

    def take_optional(self, key: str, check: Callable[[Any], _T]) -> _T | None:
        return self.take(key, check) if key in self._raw else None

    def finish(self) -> None:
        if self._raw:
            raise BundleError(f"{self._where} has unknown fields {sorted(self._raw)}")


def _refuse(value: Any, what: str) -> BundleError:
    shown = repr(value)
    return BundleError(f"{shown if len(shown) < 80 else shown[:80] + '...'} is not {what}")


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _refuse(value, "an integer")
    return value


def _count(value: Any) -> int:
    if _integer(value) < 0:
        raise _refuse(value, "a count")
    return int(value)


def _error(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _refuse(value, "a number")
    if not (math.isfinite(value) and value >= 0):
        raise _refuse(value, "an error")
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refuse(value, "true or false")
    return value


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise _refuse(value, "a string")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _refuse(value, "an object")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _refuse(value, "a list")
    return value


def _sha256(value: Any) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise _refuse(value, "a sha256")
    return value


def _crc32(value: Any) -> int:
    if not isinstance(value, str) or not _CRC32.fullmatch(value):
        raise _refuse(value, "a crc32")
    return int(value, 16)


def _optional(check: Callable[[Any], _T]) -> Callable[[Any], _T | None]:
    return lambda value: None if value is None else check(value)


def _file_entry(raw: Any, where: str) -> FileEntry:
    fields = _Fields(raw, where)
    entry = FileEntry(fields.take("size", _count), fields.take("sha256", _sha256))
    fields.finish()
    return entry


def _tensor_entry(raw: Any, where: str) -> TensorEntry:
    fields = _Fields(raw, where)
    entry = TensorEntry(
        format=fields.take("format", _string),
        nbytes=fields.take("nbytes", _count),
        crc32=fields.take("crc32", _optional(_crc32)),
        relative_rms=fields.take_optional("relative_rms", _error),
        worst_block=fields.take_optional("worst_block", _error),
    )
    fields.finish()
    return entry


def _onnx_json(entry: OnnxEntry) -> dict[str, Any]:
    return {
        "opset": entry.opset,
        "ir_version": entry.ir_version,
        "gguf": entry.gguf,
        "components": {
            name: {"layers": list(c.layers), "variants": list(c.variants)}
            for name, c in entry.components.items()
        },
        "formats": dict(entry.formats),
    }


def _onnx_entry(raw: Any, where: str) -> OnnxEntry:
    fields = _Fields(raw, where)
    components: dict[str, OnnxComponent] = {}
    for name, value in fields.take("components", _mapping).items():
        one = _Fields(value, f"{where}: {name}")
        components[plain_name(name)] = OnnxComponent(
            tuple(_count(layer) for layer in one.take("layers", _list)),
            tuple(plain_name(variant) for variant in one.take("variants", _list)),
        )
        one.finish()
    entry = OnnxEntry(
        opset=fields.take("opset", _count),
        ir_version=fields.take("ir_version", _count),
        components=components,
        formats={k: _string(v) for k, v in fields.take("formats", _mapping).items()},
        gguf=fields.take("gguf", _flag),
    )
    fields.finish()
    return entry


def _by_layer(
    raw: dict[str, Any],
    layers: set[int],
    experts: int,
    check: Callable[[Any], int],
    where: object,
) -> dict[int, tuple[int, ...]]:
    result = {}
    for key, values in raw.items():
        if not (key.isascii() and key.isdigit()) or int(key) not in layers:
            raise BundleError(f"{where}: {key!r} is not a layer with experts")
        if len(_list(values)) != experts:
            raise BundleError(f"{where}: layer {key} lists {len(values)} of {experts} experts")
        result[int(key)] = tuple(check(value) for value in values)
    return result
