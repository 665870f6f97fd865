"""Bundles: opened only when whole, damage named precisely, third-party files read too."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoint_factory import CHAT_TEMPLATE, write_bundle, write_checkpoint
from tiny import random_weights, tiny_config, tiny_mimo7b_config

from mimo_edge.bundle import Bundle, _PartSums
from mimo_edge.config import MimoConfig
from mimo_edge.errors import (
    BundleError,
    ConfigError,
    IntegrityError,
    MimoEdgeError,
    QuantError,
    UsageError,
)
from mimo_edge.export.gguf_writer import GgufLayout, PlannedTensor
from mimo_edge.export.pipeline import export_bundle
from mimo_edge.gguf_file import GgufFile
from mimo_edge.gguf_meta import architecture, config_metadata, read_config, text
from mimo_edge.heat import Heat
from mimo_edge.manifest import MANIFEST_NAME, Manifest
from mimo_edge.runtimes.weights import DictWeights


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    return write_bundle(folder, "flash", recipe="q8_0")


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


# --- A whole bundle -------------------------------------------------------------------------


def test_what_a_bundle_offers(made: Path) -> None:
    with Bundle.open(made) as opened:
        assert opened.name == "source"
        assert opened.tokenizer_path == made / "tokenizer.json"
        assert opened.chat_template == CHAT_TEMPLATE
        assert opened.heat is None
        assert opened.imatrix_path is None
        assert {f.name for f in opened.files} | {MANIFEST_NAME} == {f.name for f in made.iterdir()}
        assert opened.config.num_mtp_layers == 3
        record = opened.expert(2, 5)
        assert record.gate[0].name == record.down[0].name == "model-00002-of-00002.gguf"
        assert record.up[2] == 32 * 64 // 32 * 34
        assert record.crc32 is not None
        # The resident file holds no expert, the other one nothing else.
        for name, info in opened.tensors.items():
            assert ("_exps" in name) == (info.file.name == "model-00002-of-00002.gguf")
        seen: list[tuple[str, int, int]] = []
        report = opened.verify(lambda *step: seen.append(step))
        assert report.experts == 24
        assert seen[-1][1] == seen[-1][2] == report.nbytes
        assert report.nbytes == sum(f.stat().st_size for f in opened.files)


def test_offsets_are_whole_pages(made: Path) -> None:
    with Bundle.open(made) as opened:
        assert opened.metadata["general.alignment"] == 4096
        assert all(info.offset % 4096 == 0 for info in opened.tensors.values())


def test_a_bundle_can_be_moved(made: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(made, tmp_path / "elsewhere")
    with Bundle.open(moved) as opened:
        opened.verify()


def test_its_gguf_opens_bare_with_the_same_model(made: Path) -> None:
    with Bundle.open(made) as whole, Bundle.open(made / "model-00001-of-00002.gguf") as bare:
        assert bare.manifest is None
        assert bare.tokenizer_path is None
        assert bare.chat_template == CHAT_TEMPLATE
        assert set(bare.config.eos_token_ids) == set(whole.config.eos_token_ids)
        assert bare.config.sliding_window == whole.config.sliding_window
        a, b = bare.weights(), whole.weights()
        for name in ("blk.1.attn_k.weight", "blk.5.attn_v.weight", "output_norm.weight"):
            np.testing.assert_array_equal(a.tensor(name), b.tensor(name))
        with pytest.raises(BundleError, match="no manifest"):
            bare.verify()


# --- Damage ---------------------------------------------------------------------------------


def test_a_flipped_bit_in_an_expert_is_named(bundle: Path) -> None:
    with Bundle.open(bundle) as opened:
        record = opened.expert(3, 6)
    for part in (record.gate, record.up, record.down):
        flip(part[0], part[1] + part[2] - 1)
        damaged = pytest.raises(IntegrityError, match="layer 3, expert 6 is damaged")
        with Bundle.open(bundle) as opened, damaged:
            opened.verify()
        flip(part[0], part[1] + part[2] - 1)
    with Bundle.open(bundle) as opened:
        opened.verify()


def test_a_flipped_bit_elsewhere_is_named(bundle: Path) -> None:
    with Bundle.open(bundle) as opened:
        info = opened.tensors["blk.4.attn_qkv.weight"]
    cases = [
        (info.file.name, info.offset + 77, "tensor blk.4.attn_qkv.weight is damaged"),
        (info.file.name, info.offset + info.nbytes, "outside its tensors"),
        ("tokenizer.json", 100, "tokenizer.json differs"),
        ("chat_template.jinja", 10, "chat_template.jinja differs"),
    ]
    for name, offset, message in cases:
        flip(bundle / name, offset)
        with Bundle.open(bundle) as opened, pytest.raises(IntegrityError, match=message):
            opened.verify()
        flip(bundle / name, offset)


@pytest.mark.parametrize("what", ["tensor blk.4.attn_qkv.weight", "layer 3, expert 6"])
def test_a_wrong_checksum_in_the_manifest_is_named(bundle: Path, what: str) -> None:
    """The engine checks experts against the manifest alone, so verify must too."""
    path = bundle / MANIFEST_NAME
    raw = json.loads(path.read_bytes())
    if what.startswith("tensor"):
        raw["tensors"]["blk.4.attn_qkv.weight"]["crc32"] = "00c0ffee"
    else:
        raw["experts"]["3"][6] = "00c0ffee"
    path.write_text(json.dumps(raw), "utf-8")
    damaged = pytest.raises(IntegrityError, match=f"{MANIFEST_NAME}: the checksum of {what} is")
    with Bundle.open(bundle) as opened, damaged as caught:
        opened.verify()
    assert "00c0ffee" in caught.value.message


def test_checksums_of_parts_do_not_depend_on_how_a_file_is_read() -> None:
    data = bytes(range(256)) * 3
    parts: list[tuple[int, int, str | tuple[int, int]]]
    parts = [(5, 10, "a"), (40, 1, (0, 0)), (41, 300, (0, 1)), (700, 68, (0, 0))]
    for step in (1, 7, 64, len(data)):
        sums = _PartSums(parts)
        for start in range(0, len(data), step):
            sums.update(data[start : start + step])
        assert sums.sums == {
            "a": zlib.crc32(data[5:15]),
            (0, 0): zlib.crc32(data[40:41] + data[700:768]),
            (0, 1): zlib.crc32(data[41:341]),
        }


def test_verify_of_a_part_points_to_the_folder(bundle: Path) -> None:
    part = bundle / "model-00001-of-00002.gguf"
    with Bundle.open(part) as bare, pytest.raises(BundleError, match=f"folder {bundle}"):
        bare.verify()


def test_missing_and_shortened_files(bundle: Path) -> None:
    for file in sorted(bundle.iterdir()):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) - 2])
        with pytest.raises(BundleError, match=file.name):
            Bundle.open(bundle)
        file.unlink()
        with pytest.raises(BundleError, match=file.name):
            Bundle.open(bundle)
        file.write_bytes(content)
    Bundle.open(bundle).close()


def test_not_bundles(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no bundle"):
        Bundle.open(tmp_path / "none")
    with pytest.raises(BundleError, match=f"no {MANIFEST_NAME}"):
        Bundle.open(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"not it")
    with pytest.raises(BundleError, match="not a GGUF"):
        Bundle.open(tmp_path / "x.gguf")


Edit = Callable[[dict[str, Any]], Any]
HEX = "0" * 64
EDITS: dict[str, tuple[Edit, str]] = {
    "other version": (lambda m: m.update(schema=2), "schema version 2"),
    "no version": (lambda m: m.pop("schema"), "schema"),
    "unknown field": (lambda m: m.update(extra=1), "extra"),
    "missing field": (lambda m: m.pop("profile"), "profile"),
    "wrong type": (lambda m: m.update(tool_version=3), "tool_version"),
    "path up": (lambda m: m.update(tokenizer_file="../tokenizer.json"), "plain file name"),
    "absolute": (lambda m: m.update(model_file="/etc/passwd"), "plain file name"),
    "folder": (lambda m: m["files"].update({"a/b": {"size": 1, "sha256": HEX}}), "plain file"),
    "backslash": (lambda m: m["files"].update({"a\\b": {"size": 1, "sha256": HEX}}), "plain file"),
    "nul": (lambda m: m["files"].update({"a\0b": {"size": 1, "sha256": HEX}}), "plain file"),
    "dots": (lambda m: m["files"].update({"..": {"size": 1, "sha256": HEX}}), "plain file"),
    "itself": (lambda m: m["files"].update({MANIFEST_NAME: {"size": 1, "sha256": HEX}}), "plain"),
    "negative": (lambda m: m["files"]["tokenizer.json"].update(size=-1), "not a count"),
    "float size": (lambda m: m["files"]["tokenizer.json"].update(size=1.5), "not an integer"),
    "bool size": (lambda m: m["files"]["tokenizer.json"].update(size=True), "not an integer"),
    "sha256": (lambda m: m["files"]["tokenizer.json"].update(sha256="abc"), "sha256"),
    "unlisted": (lambda m: m["files"].pop("model-00002-of-00002.gguf"), "does not list"),
    "unlisted main": (lambda m: m["files"].pop("model-00001-of-00002.gguf"), "does not list"),
    "crc32": (lambda m: m["experts"]["1"].__setitem__(0, "xyz"), "crc32"),
    "few experts": (lambda m: m["experts"]["1"].pop(), "7 of 8"),
    "layer gone": (lambda m: m["experts"].pop("1"), "lack checksums"),
    "dense layer": (lambda m: m["experts"].update({"0": ["00000000"] * 8}), "not a layer"),
    "no layer": (lambda m: m["experts"].update({"-1": ["00000000"] * 8}), "not a layer"),
    "permutation": (lambda m: m.update(permutation={"1": [0] * 8}), "permutation"),
    "config": (lambda m: m["config"].update(sliding_window=129), "sliding_window"),
    "config field": (lambda m: m["config"].update(head_count=1), "head_count"),
    "config value": (lambda m: m["config"].update(num_hidden_layers=10**9), "num_hidden_layers"),
    "config list": (lambda m: m.update(config=[]), "not an object"),
    "tensor format": (lambda m: m["tensors"]["output.weight"].update(format="F16"), "F16"),
    "tensor gone": (lambda m: m["tensors"].pop("output.weight"), "output.weight"),
    "tensor more": (
        lambda m: m["tensors"].update(x={"format": "F32", "nbytes": 4, "crc32": None}),
        "no file holds",
    ),
    "nan error": (
        lambda m: m["tensors"]["output.weight"].update(relative_rms=float("nan")),
        "not an error",
    ),
    "not an object": (lambda m: m.update(source=[]), "not an object"),
    "skipped": (lambda m: m.update(skipped={"x": -1}), "not a count"),
}


@pytest.mark.parametrize("case", EDITS)
def test_manifests_that_are_refused(bundle: Path, case: str) -> None:
    edit, message = EDITS[case]
    path = bundle / MANIFEST_NAME
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'{"a":1,"a":2}', b"\xff\xfe", b"[" * 100_000, b"1" * 5000]
)
def test_manifests_that_are_no_json_object(bundle: Path, content: bytes) -> None:
    (bundle / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(BundleError):
        Bundle.open(bundle)


def test_manifest_survives_a_round_trip(made: Path) -> None:
    manifest = Manifest.read(made)
    assert manifest.to_bytes() == (made / MANIFEST_NAME).read_bytes()


def test_metadata_and_manifest_must_agree(bundle: Path, tmp_path: Path) -> None:
    other, _ = write_checkpoint(tmp_path / "other", "flash", tokenizer=True, rope_theta=1e6)
    export_bundle(other, tmp_path / "two", recipe="q8_0").close()
    name = "model-00001-of-00002.gguf"
    (bundle / name).write_bytes((tmp_path / "two" / name).read_bytes())
    with pytest.raises(BundleError, match="rope_theta"):
        Bundle.open(bundle)


# --- Config and metadata --------------------------------------------------------------------

CONFIGS = {
    "tiny": tiny_config(),
    "no mtp": tiny_config(num_mtp_layers=0),
    "all global": tiny_config(hybrid_layer_pattern=(0,) * 4, num_mtp_layers=0),
    "all dense": tiny_config(
        moe_layer_freq=(0,) * 4, n_routed_experts=0, num_experts_per_tok=0, moe_intermediate_size=0
    ),
    "full sinks": tiny_config(add_full_attention_sink_bias=True),
    "no sinks": tiny_config(add_swa_attention_sink_bias=False),
    "no scale": tiny_config(attention_value_scale=1.0),
    "scaled experts": tiny_config(routed_scaling_factor=2.5, norm_topk_prob=False),
    "real rotary": tiny_config(head_dim=192, partial_rotary_factor=0.334),
    "mimo7b": tiny_mimo7b_config(num_mtp_layers=0),
    "mimo7b no bias": tiny_mimo7b_config(num_mtp_layers=0, attention_bias=False),
}


def write_gguf(
    path: Path,
    weights: DictWeights,
    rename: Callable[[str], str | None] = lambda name: name,
    drop: tuple[str, ...] = (),
    extra: dict[str, Any] | None = None,
) -> Path:
    """A file by gguf's writer with our metadata, like a third party's."""
    from mimo_edge.gguf_file import GgufType

    config = weights.config
    writer = gguf.GGUFWriter(path, architecture(config))
    for key, value in config_metadata(config).items():
        if key not in drop:
            kind = gguf.GGUFValueType(int(value.type))
            item = None if value.item is None else gguf.GGUFValueType(int(value.item))
            assert (value.type == GgufType.ARRAY) == (item is not None)
            writer.add_key_value(key, value.value, kind, item)
    for name, values in {**weights._tensors, **(extra or {})}.items():
        if (new := rename(name)) is not None:
            writer.add_tensor(new, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("case", CONFIGS)
def test_config_survives_gguf_metadata(tmp_path: Path, case: str) -> None:
    config = CONFIGS[case]
    path = write_gguf(tmp_path / "m.gguf", random_weights(config))
    with Bundle.open(path) as opened:
        got = opened.config
        assert got.rotary_dim == config.rotary_dim
        assert got.layernorm_epsilon == pytest.approx(config.layernorm_epsilon, rel=1e-7)
        assert got.attention_value_scale == pytest.approx(config.attention_value_scale, rel=1e-7)
        neutral: dict[str, Any] = {
            "eos_token_ids": (),
            "partial_rotary_factor": config.partial_rotary_factor,
            "layernorm_epsilon": config.layernorm_epsilon,
            "attention_value_scale": config.attention_value_scale,
        }
        wanted: dict[str, Any] = {"eos_token_ids": ()}
        if not any(config.hybrid_layer_pattern) or config.family == "mimo":
            # Nothing slides, so nothing in the file needs these.
            for name in ("swa_num_key_value_heads", "add_swa_attention_sink_bias"):
                wanted[name] = getattr(got, name)
        assert replace(got, **neutral) == replace(config, **wanted)


def test_third_party_file_with_split_mtp_and_no_value_scale(tmp_path: Path) -> None:
    weights = random_weights(tiny_config())
    path = write_gguf(tmp_path / "m.gguf", weights, drop=("mimo2.attention.value_scale",))
    with Bundle.open(path) as opened:
        assert opened.config.attention_value_scale == 1.0
        assert opened.config.num_mtp_layers == 3
        got = opened.weights()
        for name, values in weights._tensors.items():
            if values.ndim < 3:
                np.testing.assert_array_equal(got.tensor(name), values)


def test_third_party_file_with_fused_trunk_and_other_norm_name(tmp_path: Path) -> None:
    config = tiny_config()
    weights = random_weights(config)
    fused = {
        f"blk.{i}.attn_qkv.weight": np.concatenate(
            [weights.tensor(f"blk.{i}.attn_{p}.weight") for p in "qkv"]
        )
        for i in range(7)
    }

    def rename(name: str) -> str | None:
        if any(f".attn_{p}." in name for p in "qkv"):
            return None
        return name.replace(".layer_output_norm.", ".nextn.shared_head_norm.")

    path = write_gguf(tmp_path / "m.gguf", weights, rename, extra=fused)
    with Bundle.open(path) as opened:
        got = opened.weights()
        for name, values in weights._tensors.items():
            if values.ndim < 3:
                assert got.has(name)
                np.testing.assert_array_equal(got.tensor(name), values)
        assert not got.has("blk.9.attn_q.weight")


def test_third_party_file_without_its_mtp_blocks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = random_weights(tiny_config())

    def trunk(name: str) -> str | None:
        return None if name.startswith(("blk.4.", "blk.5.", "blk.6.")) else name

    with Bundle.open(write_gguf(tmp_path / "m.gguf", weights, trunk)) as opened:
        assert opened.config.num_hidden_layers == 4
        assert opened.config.num_mtp_layers == 0
        assert "no drafting" in caplog.text

    def one_gone(name: str) -> str | None:
        return None if name.startswith("blk.5.") else name

    with pytest.raises(BundleError, match="lacks MTP block 1 of 3"):
        Bundle.open(write_gguf(tmp_path / "n.gguf", weights, one_gone))


def test_tensors_must_be_those_of_the_model(tmp_path: Path) -> None:
    weights = random_weights(tiny_config())
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"rename": lambda n: None if n == "blk.2.ffn_norm.weight" else n},
            "lacks the tensor blk.2",
        ),
        ({"extra": {"blk.2.attn_q_norm.weight": np.ones(4, np.float32)}}, "does not know"),
        ({"extra": {"blk.1.attn_q.weight": np.ones((5, 64), np.float32)}}, "has shape"),
        ({"extra": {"token_embd.weight": np.ones(64, np.float32)}}, "has the shape"),
        ({"rename": lambda n: None if n == "blk.2.attn_sinks.weight" else n}, "only some layers"),
        ({"drop": ("mimo2.attention.sliding_window",)}, "lacks the key"),
        ({"drop": ("mimo2.block_count",)}, "lacks the key"),
    ]
    for i, (changes, message) in enumerate(cases):
        path = write_gguf(tmp_path / f"{i}.gguf", weights, **changes)
        with pytest.raises(BundleError, match=message):
            Bundle.open(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mimo2.block_count", 0),
        ("mimo2.block_count", 1 << 31),
        ("mimo2.block_count", True),
        ("mimo2.block_count", "seven"),
        ("mimo2.nextn_predict_layers", 200),
        ("mimo2.attention.head_count", 0),
        ("mimo2.attention.head_count_kv", np.array([1, 2, 3, 1, 2, 2, 2], np.int32)),
        ("mimo2.attention.head_count_kv", np.array([1, 2], np.int32)),
        ("mimo2.attention.sliding_window_pattern", np.array([0, 1, 5, 0, 1, 1, 1], np.int32)),
        ("mimo2.attention.sliding_window_pattern", np.array([0.5] * 7, np.float32)),
        ("mimo2.attention.sliding_window", 0),
        ("mimo2.attention.value_scale", float("nan")),
        ("mimo2.attention.value_scale", "x"),
        ("mimo2.rope.freq_base", float("inf")),
        ("mimo2.rope.dimension_count", 25),
        ("mimo2.rope.dimension_count", 0),
        ("mimo2.expert_gating_func", 1),
        ("mimo2.expert_group_count", 4),
        ("mimo2.expert_used_count", 9),
        ("mimo2.embedding_length", 65),
        ("general.architecture", "llama"),
        ("general.architecture", None),
        ("tokenizer.ggml.tokens", "abc"),
        ("tokenizer.ggml.eos_token_id", -4),
    ],
)
def test_absurd_metadata(tmp_path: Path, key: str, value: Any) -> None:
    file = GgufFile.open(write_gguf(tmp_path / "m.gguf", random_weights(tiny_config())))
    from mimo_edge.gguf_meta import check_tensors

    metadata = {**file.metadata, key: value}
    with pytest.raises((BundleError, ConfigError)):
        check_tensors(read_config(metadata, file.tensors), file.tensors)


def test_weights_refuse_what_is_not_there(made: Path) -> None:
    with Bundle.open(made) as opened:
        weights = opened.weights()
        cases: list[tuple[Callable[[], object], type[MimoEdgeError], str]] = [
            (lambda: weights.tensor("blk.0.nothing"), BundleError, "no tensor"),
            (lambda: weights.tensor("blk.1.ffn_up_exps.weight"), BundleError, "stack of 8"),
            (lambda: weights.expert(0, 0), BundleError, "no routed experts"),
            (lambda: weights.expert(1, 8), BundleError, "expert 8"),
            (lambda: weights.embedding(np.array([9999], np.int32)), UsageError, "9999"),
            (lambda: weights.embedding(np.array([-1], np.int32)), UsageError, "-1"),
        ]
        for call, error, message in cases:
            with pytest.raises(error, match=message):
                call()
        assert weights.embedding(np.array([], np.int32)).shape == (0, 64)


def test_a_scale_that_is_nan_is_an_error(bundle: Path) -> None:
    with Bundle.open(bundle) as opened:
        info = opened.tensors["blk.2.ffn_up_exps.weight"]
    data = bytearray(info.file.read_bytes())
    data[info.offset : info.offset + 2] = b"\x00\x7e"  # f16 NaN: the first block's scale
    info.file.write_bytes(data)
    with Bundle.open(bundle) as opened, pytest.raises((BundleError, QuantError), match="scale"):
        opened.weights().expert(2, 0)


# --- Writer and heat ------------------------------------------------------------------------


def test_layout_is_read_back_by_gguf(tmp_path: Path) -> None:
    tensors = [
        PlannedTensor("a", 0, (5,)),
        PlannedTensor("b", 8, (3, 64)),
        PlannedTensor("c", 12, (2, 3, 256)),
    ]
    layout = GgufLayout({"general.architecture": text("x")}, tensors)
    data = bytearray(layout.header.ljust(layout.size, b"\0"))
    for number, tensor in enumerate(tensors):
        start = layout.offsets[tensor.name]
        data[start : start + tensor.nbytes] = bytes([number + 1]) * tensor.nbytes
    (tmp_path / "x.gguf").write_bytes(data)
    for number, found in enumerate(gguf.GGUFReader(tmp_path / "x.gguf").tensors):
        assert found.name == tensors[number].name
        assert tuple(reversed(found.shape.tolist())) == tensors[number].shape
        assert found.data_offset == layout.offsets[found.name]
        assert found.n_bytes == tensors[number].nbytes
        assert (found.data.view(np.uint8) == number + 1).all()


def test_heat_of_absurd_numbers(tmp_path: Path) -> None:
    path = tmp_path / "experts.json"
    path.write_text('{"schema": 1, "tokens": 1e999, "source": "", "layers": {}}')
    with pytest.raises(BundleError, match="is no expert heat"):
        Heat.read(path)


def test_heat_file(tmp_path: Path) -> None:
    heat = Heat(
        7,
        {1: np.array([3, 0, 9]), 4: np.array([1, 1, 1])},
        {1: np.array([0.1, 0.0, 2.5]), 4: np.array([0.2, 0.3, 0.1])},
        "文本.txt",
    )
    path = tmp_path / "experts.json"
    path.write_bytes(heat.to_bytes())
    got = Heat.read(path)
    assert got.to_bytes() == heat.to_bytes()
    assert got.order(1).tolist() == [2, 0, 1]
    assert got.order(4).tolist() == [1, 0, 2]
    assert got.unseen() == [(1, 1)]
    assert got.permuted({1: (2, 0, 1)}).counts[1].tolist() == [9, 3, 0]
    good = json.loads(path.read_text())
    bad: list[Any] = [
        [],
        {**good, "schema": 2},
        {**good, "layers": {"x": good["layers"]["1"]}},
        {**good, "layers": {"1": {"counts": [1], "mass": [0.5, 0.5]}}},
        {**good, "layers": {"1": {"counts": [-1], "mass": [0.5]}}},
        {**good, "layers": {"1": {"counts": [1.5], "mass": [0.5]}}},
        {**good, "layers": {"1": {"counts": [10**30], "mass": [0.5]}}},
        {**good, "layers": {"1": {"counts": [1], "mass": [float("nan")]}}},
        {**good, "tokens": "many"},
    ]
    for raw in bad:
        path.write_text(json.dumps(raw))
        with pytest.raises(BundleError):
            Heat.read(path)
    with pytest.raises(BundleError, match="cannot read"):
        Heat.read(tmp_path / "none.json")


def test_tied_head_is_the_embedding(tmp_path: Path) -> None:
    config: MimoConfig = tiny_mimo7b_config(num_mtp_layers=0, tie_word_embeddings=True)
    weights = random_weights(config)
    path = write_gguf(tmp_path / "m.gguf", weights, lambda n: None if n == "output.weight" else n)
    with Bundle.open(path) as opened:
        assert opened.config.tie_word_embeddings
        got = opened.weights()
        np.testing.assert_array_equal(
            got.tensor("output.weight"), weights.tensor("token_embd.weight")
        )
