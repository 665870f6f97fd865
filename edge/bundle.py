"""Opening a bundle folder, or a bare GGUF file of any maker, as one model."""

from __future__ import annotations

import hashlib
import logging
import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mimo_edge.config import MimoConfig
from mimo_edge.errors import BundleError, IntegrityError
from mimo_edge.gguf_file import GgufFile, TensorInfo
from mimo_edge.gguf_meta import check_experts, check_tensors, read_config
from mimo_edge.gguf_weights import GgufWeights
from mimo_edge.heat import Heat
from mimo_edge.manifest import MANIFEST_NAME, FileEntry, Manifest
from mimo_edge.text_file import read_whole

__all__ = ["Bundle", "ExpertRecord", "Heat", "VerifyReport"]

Progress = Callable[[str, int, int], None]
"""Called with (stage, bytes done, bytes in all)."""

_log = logging.getLogger(__name__)
_CHUNK_BYTES = 4 << 20
_MAX_TEXT_BYTES = 16 << 20
_STACK = re.compile(r"blk\.(\d+)\.ffn_(?:gate|up|down)_exps\.weight")


@dataclass(frozen=True)
class ExpertRecord:
    """Where one routed expert lies: (file, offset, bytes) of gate, up and down, and the CRC-32
    over the three in that order (None without a manifest)."""

    gate: tuple[Path, int, int]
    up: tuple[Path, int, int]
    down: tuple[Path, int, int]
    crc32: int | None


@dataclass(frozen=True)
class VerifyReport:
    """What `Bundle.verify` read and found good."""

    files: int
    nbytes: int
    tensors: int
    experts: int


class Bundle:
    """An open model: config, metadata, tensor places, tokenizer and template, heat.

    Open with `Bundle.open`. `manifest` is None for a bare GGUF file. `gguf` is the underlying
    reader, `weights()` dequantises.
    """

    def __init__(
        self, path: Path, gguf: GgufFile, config: MimoConfig, manifest: Manifest | None
    ) -> None:
        self.path = path
        self.gguf = gguf
        self.config = config
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open a bundle folder or a GGUF file (any part of a split set).

        Checks the manifest, that every file is there in its full size, and that the tensors are
        exactly those the config calls for; reads no tensor data (see `verify`).
        Raises BundleError or ConfigError.
        """
        path = Path(path)
        if not path.exists():
            raise BundleError(f"there is no bundle {path}")
        if path.is_dir():
            return cls._open_folder(path)
        gguf = GgufFile.open(path)
        config = read_config(gguf.metadata, gguf.tensors, path)
        check_tensors(config, gguf.tensors, path)
        announced = gguf.metadata.get("mimo2.nextn_predict_layers", 0)
        if announced and not config.num_mtp_layers:
            _log.warning("%s announces %s MTP blocks but holds none: no drafting", path, announced)
        return cls(path, gguf, config, None)

    @classmethod
    def _open_folder(cls, folder: Path) -> Bundle:
        manifest = Manifest.read(folder)
        for name, entry in manifest.files.items():
            _check_size(folder / name, entry)
        side = [folder / manifest.mtp_file] if manifest.mtp_file else []
        gguf = GgufFile.open(folder / manifest.model_file, side)
        for file in gguf.files:
            if file.name not in manifest.files:
                raise BundleError(f"{folder}: the manifest does not list {file.name}")
        if manifest.onnx is None or manifest.onnx.gguf:
            _check_same(manifest.config, gguf, folder)
            check_tensors(manifest.config, gguf.tensors, folder)
        else:
            check_experts(manifest.config, gguf.tensors, folder)
        for name, info in gguf.tensors.items():
            listed = manifest.tensors.get(name)
            if listed is None or (listed.format, listed.nbytes) != (info.type_name, info.nbytes):
                raise BundleError(
                    f"{folder}: {name} is {info.type_name} of {info.nbytes} bytes, "
                    f"the manifest says {listed}"
                )
        if len(manifest.tensors) != len(gguf.tensors):
            raise BundleError(f"{folder}: the manifest lists tensors no file holds")
        return cls(folder, gguf, manifest.config, manifest)

    @property
    def name(self) -> str:
        """Name of the source checkpoint, or of the file."""
        if self.manifest is not None:
            return self.manifest.source_name
        name = self.metadata.get("general.name")
        return name if isinstance(name, str) and name else self.path.stem

    @property
    def metadata(self) -> Mapping[str, Any]:
        """GGUF metadata of the first file."""
        return self.gguf.metadata

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Place and format of every tensor."""
        return self.gguf.tensors

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file of the bundle, or the parts of a bare GGUF."""
        if self.manifest is None:
            return self.gguf.files
        return tuple(self.path / name for name in self.manifest.files)

    @property
    def tokenizer_path(self) -> Path | None:
        """tokenizer.json or tokenizer.model; None: use the tokenizer keys of `metadata`."""
        return self._file("tokenizer_file")

    @property
    def imatrix_path(self) -> Path | None:
        """The importance matrix the bundle was made with, if any."""
        return self._file("imatrix_file")

    @cached_property
    def chat_template(self) -> str | None:
        """The chat template's text, from its file or the GGUF metadata."""
        path = self._file("chat_template_file")
        if path is None:
            value = self.metadata.get("tokenizer.chat_template")
            return value if isinstance(value, str) else None
        return read_whole(path, _MAX_TEXT_BYTES, BundleError)

    @cached_property
    def heat(self) -> Heat | None:
        """Use of the routed experts on the calibration text, in the bundle's expert order."""
        path = self._file("heat_file")
        if path is None:
            return None
        heat = Heat.read(path)
        for layer, counts in heat.counts.items():
            if (
                layer >= self.config.num_hidden_layers
                or not self.config.layer(layer).moe
                or len(counts) != self.config.n_routed_experts
            ):
                raise BundleError(f"{path}: layer {layer} with {len(counts)} experts")
        return heat

    @property
    def resident_in_gguf(self) -> bool:
        """Whether resident tensors are in GGUF files; else only the ONNX form has them."""
        return self.manifest is None or self.manifest.onnx is None or self.manifest.onnx.gguf

    def weights(self) -> GgufWeights:
        """The weights, dequantised on demand. Closing them closes the bundle's files."""
        return GgufWeights(self.gguf, self.config)

    def tensor_crc32(self, name: str) -> int | None:
        """CRC-32 of a tensor's bytes; None for stacked experts, and without a manifest."""
        return None if self.manifest is None else self.manifest.tensors[name].crc32

    def expert(self, layer: int, expert: int) -> ExpertRecord:
        """Where a routed expert lies and what its bytes sum up to."""
        parts = [
            self.gguf.expert_slice(f"blk.{layer}.ffn_{part}_exps.weight", expert)
            for part in ("gate", "up", "down")
        ]
        crc = None if self.manifest is None else self.manifest.experts[layer][expert]
        return ExpertRecord(parts[0], parts[1], parts[2], crc)

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Read every byte and compare with the manifest.

        Raises IntegrityError naming layer and expert, tensor, or file, whichever is the smallest
        that holds the damage; BundleError when there is no manifest to compare with.
        """
        if self.manifest is None:
            raise BundleError(
                f"{self.path} has no manifest, so there are no checksums",
                f"give the bundle's folder {self.path.parent}"
                if (self.path.parent / MANIFEST_NAME).is_file()
                else "only bundles written by mimo-edge export can be verified",
            )
        total = sum(entry.size for entry in self.manifest.files.values())
        done = 0
        for name, entry in self.manifest.files.items():
            path = self.path / name
            _check_size(path, entry)
            digest, parts = hashlib.sha256(), _PartSums(self._parts_of(path))
            try:
                with path.open("rb") as file:
                    while chunk := file.read(_CHUNK_BYTES):
                        digest.update(chunk)
                        parts.update(chunk)
                        done += len(chunk)
                        if progress is not None:
                            progress("verify", done, total)
            except OSError as error:
                raise IntegrityError(f"cannot read {path}: {error.strerror}") from error
            if digest.hexdigest() != entry.sha256:
                raise self._locate(path)
            self._compare_sums(path, parts.sums)
        experts = sum(len(checksums) for checksums in self.manifest.experts.values())
        return VerifyReport(len(self.manifest.files), total, len(self.tensors), experts)

    def _parts_of(self, path: Path) -> list[_Part]:
        """What the manifest has a CRC-32 of in a file, in the file's order."""
        parts: list[_Part] = []
        for name, info in self.tensors.items():
            if info.file != path:
                continue
            match = _STACK.fullmatch(name)
            if match is None:
                parts.append((info.offset, info.nbytes, name))
                continue
            for expert in range(info.shape[0]):
                _, offset, size = self.gguf.expert_slice(name, expert)
                parts.append((offset, size, (int(match[1]), expert)))
        return sorted(parts, key=lambda part: part[0])

    def _compare_sums(self, path: Path, sums: Mapping[str | tuple[int, int], int]) -> None:
        """The file is as it was written: then the manifest's own checksums must fit it, or a
        runtime that trusts them would refuse good experts."""
        assert self.manifest is not None
        for part, found in sums.items():
            if isinstance(part, str):
                listed = self.manifest.tensors[part].crc32
                what = f"tensor {part}"
            else:
                layer, expert = part
                listed = self.manifest.experts[layer][expert]
                what = f"layer {layer}, expert {expert}"
                # Summed in the file's order, which is gate, up, down in what we write.
                if found != listed:
                    found = self._expert_crc(layer, expert)
            if found != listed:
                stated = "none" if listed is None else f"{listed:08x}"
                raise IntegrityError(
                    f"{self.path / MANIFEST_NAME}: the checksum of {what} is {stated}, "
                    f"{path.name} as a whole is intact and gives {found:08x}",
                    "copy the manifest again",
                )

    def _locate(self, path: Path) -> IntegrityError:
        """The smallest damaged thing in a file whose checksum differs."""
        assert self.manifest is not None
        for name, info in self.tensors.items():
            crc = self.manifest.tensors[name].crc32
            if info.file == path and crc is not None and self.gguf.crc32(name) != crc:
                return IntegrityError(f"{path}: tensor {name} is damaged", "copy the file again")
        for layer, checksums in self.manifest.experts.items():
            for expert, crc in enumerate(checksums):
                record = self.expert(layer, expert)
                if record.gate[0] == path and self._expert_crc(layer, expert) != crc:
                    return IntegrityError(
                        f"{path}: layer {layer}, expert {expert} is damaged "
                        f"(gate at {record.gate[1]}, up at {record.up[1]}, down at "
                        f"{record.down[1]})",
                        "copy the file again",
                    )
        return IntegrityError(
            f"{path} differs from the manifest"
            + (" outside its tensors" if path in self.gguf.files else ""),
            "copy the file again",
        )

    def _expert_crc(self, layer: int, expert: int) -> int:
        crc = 0
        for part in ("gate", "up", "down"):
            name = f"blk.{layer}.ffn_{part}_exps.weight"
            info = self.gguf.info(name)
            stride = info.nbytes // info.shape[0]
            crc = self.gguf.crc32(name, expert * stride, stride, crc)
        return crc

    def _file(self, field: str) -> Path | None:
        name = getattr(self.manifest, field) if self.manifest is not None else None
        return self.path / name if name else None

    def close(self) -> None:
        """Release the files."""
        self.gguf.close()

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_Part = tuple[int, int, "str | tuple[int, int]"]
"""(offset, bytes, tensor name or (layer, expert)) of something with a checksum of its own."""


class _PartSums:
    """CRC-32 of the parts of a file that streams by: `sums`, by tensor or expert."""

    def __init__(self, parts: list[_Part]) -> None:
        self.sums: dict[str | tuple[int, int], int] = {}
        self._parts = parts
        self._next = 0
        self._position = 0

    def update(self, chunk: bytes) -> None:
        view, start = memoryview(chunk), self._position
        self._position += len(chunk)
        while self._next < len(self._parts):
            offset, size, key = self._parts[self._next]
            if offset >= self._position:
                break
            piece = view[max(0, offset - start) : max(0, offset + size - start)]
            self.sums[key] = zlib.crc32(piece, self.sums.get(key, 0))
            if offset + size > self._position:
                break
            self._next += 1


def _check_size(path: Path, entry: FileEntry) -> None:
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    if size is None:
        raise BundleError(f"the bundle lacks {path}", "copy the whole folder again")
    if size != entry.size:
        raise IntegrityError(
            f"{path} has {size} bytes, the manifest says {entry.size}", "copy the file again"
        )


def _check_same(config: MimoConfig, gguf: GgufFile, folder: Path) -> None:
    """The manifest's config and the GGUF metadata describe the same model."""
    stored = read_config(gguf.metadata, gguf.tensors, folder)
    # What a GGUF states differently or not at all is taken from the manifest; W, thetas and
    # counts must agree, the floats in the single precision GGUF keeps.
    neutral = replace(
        stored,
        fused_qkv=config.fused_qkv,
        quantization=config.quantization,
        eos_token_ids=config.eos_token_ids,
        tie_word_embeddings=config.tie_word_embeddings,
        partial_rotary_factor=config.partial_rotary_factor,
        num_mtp_layers=config.num_mtp_layers,
        swa_num_key_value_heads=config.swa_num_key_value_heads,
        num_key_value_heads=config.num_key_value_heads,
        add_full_attention_sink_bias=config.add_full_attention_sink_bias,
        add_swa_attention_sink_bias=config.add_swa_attention_sink_bias,
    )
    ours, theirs = config.to_dict(), neutral.to_dict()
    for key, value in ours.items():
        other = theirs[key]
        same = math.isclose(value, other, rel_tol=1e-6) if type(value) is float else value == other
        if config.family == "mimo" and key in _V2_ONLY:
            continue
        if not same:
            raise BundleError(f"{folder}: the manifest says {key} = {value}, the GGUF {other}")
    if stored.rotary_dim != config.rotary_dim:
        raise BundleError(
            f"{folder}: the manifest says {config.rotary_dim} rotary dims, "
            f"the GGUF {stored.rotary_dim}"
        )


_V2_ONLY = frozenset({"sliding_window", "swa_rope_theta", "attention_value_scale"})
