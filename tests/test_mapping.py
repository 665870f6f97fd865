"""Source tensors -> canonical tensors: values bit for bit, and every tensor accounted for."""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoint_factory import KINDS, TP, Kind, stored, write_checkpoint, write_safetensors

from mimo_edge.config import MimoConfig, QuantizationConfig
from mimo_edge.errors import CheckpointError
from mimo_edge.export.checkpoint import Checkpoint
from mimo_edge.export.mapping import TensorMapping, TensorPlan, plan_tensors
from mimo_edge.known_models import known_model
from mimo_edge.quant.roles import Role
from mimo_edge.runtimes.weights import DictWeights

# (kind, what differs): odd blocks, several blocks, K-quant widths, fp16-like corners.
VARIANTS: list[tuple[Kind, dict[str, Any]]] = [
    *[(kind, {}) for kind in KINDS],
    ("flash", {"seed": 7, "hidden_size": 160, "intermediate_size": 200, "shards": 5}),
    ("flash", {"shards": 1}),
    (
        "flash",
        {"quantization": QuantizationConfig("fp8", (24, 40), "fp8"), "moe_intermediate_size": 72},
    ),
    ("flash", {"num_mtp_layers": 0, "add_full_attention_sink_bias": True}),
    ("flash_bf16", {"tie_word_embeddings": True}),
    ("v25", {"hidden_size": 256, "intermediate_size": 512, "tp_size": TP}),
    ("v26", {"hidden_size": 256, "moe_intermediate_size": 256, "seed": 5}),
    ("v25", {"quantization": QuantizationConfig(), "tp_size": TP}),
    ("mimo7b", {"num_mtp_layers": 0, "tie_word_embeddings": True}),
]
IDS = [kind + "".join(f"-{name}" for name in extra) for kind, extra in VARIANTS]


@pytest.fixture(params=VARIANTS, ids=IDS)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, DictWeights]:
    kind, extra = request.param
    return write_checkpoint(tmp_path / "model", kind, **extra)


def truth_of(plan: TensorPlan, weights: DictWeights) -> np.ndarray[Any, Any]:
    if plan.name.endswith("attn_qkv.weight"):
        block = plan.name.removesuffix("attn_qkv.weight")
        return np.concatenate([weights.tensor(f"{block}attn_{p}.weight") for p in "qkv"])
    return weights.tensor(plan.name)


def test_every_value_is_bit_exact(written: tuple[Path, DictWeights]) -> None:
    folder, weights = written
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config == weights.config
    seen = set()
    for plan in plan_tensors(checkpoint).tensors:
        truth = truth_of(plan, weights)
        assert plan.shape == truth.shape, plan.name
        if plan.is_expert_stack:
            for e in range(plan.shape[0]):
                assert np.array_equal(plan.load_expert(checkpoint, e), truth[e]), (plan.name, e)
        else:
            assert np.array_equal(plan.load(checkpoint), truth), plan.name
            rows = plan.shape[0]
            cuts = sorted({0, 1, rows // 3, rows // 2 + 1, rows - 1, rows})
            for start, stop in pairwise(cuts):
                part = plan.load_rows(checkpoint, start, stop)
                assert np.array_equal(part, truth[start:stop]), plan.name
        seen.add(plan.name)
        if plan.name.endswith("attn_qkv.weight"):
            seen |= {plan.name.replace("qkv", p) for p in "qkv"}
    assert seen >= set(weights._tensors)


def test_each_source_is_used_once_or_skipped(written: tuple[Path, DictWeights]) -> None:
    folder, weights = written
    checkpoint = Checkpoint.open(folder)
    mapping = plan_tensors(checkpoint)
    used = [s for plan in mapping.tensors for s in plan.sources]
    if weights.config.tie_word_embeddings:
        used.remove("model.embed_tokens.weight")  # the one source that two tensors share
    assert len(used) == len(set(used))
    scales = [n for n in checkpoint.tensors if n.endswith(("_scale_inv", "_scale"))]
    assert sorted([*used, *scales, *mapping.skipped]) == sorted(checkpoint.tensors)
    assert all(mapping.skipped.values())


def test_order_is_the_models_and_stable(tmp_path: Path) -> None:
    names = []
    for i, shards in enumerate((2, 5)):
        folder, _ = write_checkpoint(tmp_path / str(i), "flash", shards=shards)
        names.append([plan.name for plan in plan_tensors(Checkpoint.open(folder)).tensors])
    assert names[0] == names[1]
    assert names[0][0] == "token_embd.weight"
    assert names[0][-2:] == ["output_norm.weight", "output.weight"]
    layers = [int(name.split(".")[1]) for name in names[0] if name.startswith("blk.")]
    assert layers == sorted(layers)


def test_layouts_of_qkv(tmp_path: Path) -> None:
    def qkv(kind: Kind, layer: int) -> list[str]:
        folder, _ = write_checkpoint(tmp_path / kind, kind)
        mapping = plan_tensors(Checkpoint.open(folder))
        block = f"blk.{layer}.attn_"
        return [
            p.name.removeprefix(block)
            for p in mapping.tensors
            if p.name.startswith((block + "q", block + "k", block + "v"))
        ]

    split = ["q.weight", "k.weight", "v.weight"]
    assert qkv("flash", 1) == split
    assert qkv("flash", 4) == ["qkv.weight"]  # MTP blocks are always fused
    assert qkv("v25", 1) == ["qkv.weight"]
    assert qkv("v25", 4) == ["qkv.weight"]
    biased = [*split, "q.bias", "k.bias", "v.bias"]
    assert qkv("mimo7b", 0) == biased
    assert qkv("mimo7b", 3) == biased  # but MiMo-7B's MTP block stays split


def test_roles(tmp_path: Path) -> None:
    folder, _ = write_checkpoint(tmp_path, "flash")
    mapping = plan_tensors(Checkpoint.open(folder))
    expected = {
        "token_embd.weight": Role.EMBEDDING,
        "output.weight": Role.HEAD,
        "output_norm.weight": Role.NORM,
        "blk.0.ffn_up.weight": Role.DENSE_FFN,
        "blk.1.attn_q.weight": Role.ATTENTION,
        "blk.1.attn_output.weight": Role.ATTENTION,
        "blk.1.attn_sinks.weight": Role.SINKS,
        "blk.1.ffn_gate_inp.weight": Role.ROUTER,
        "blk.1.exp_probs_b.bias": Role.ROUTER_BIAS,
        "blk.1.ffn_down_exps.weight": Role.EXPERT,
        "blk.4.attn_qkv.weight": Role.MTP,
        "blk.4.ffn_down.weight": Role.MTP,
        "blk.4.nextn.eh_proj.weight": Role.MTP,
        "blk.4.layer_output_norm.weight": Role.NORM,
        "blk.4.attn_sinks.weight": Role.SINKS,
    }
    assert {name: mapping[name].role for name in expected} == expected
    assert mapping["blk.5.ffn_norm.weight"].layer == 5
    assert mapping["output.weight"].layer is None
    with pytest.raises(CheckpointError, match="no tensor 'x'"):
        mapping["x"]


@pytest.mark.parametrize("kind", ["flash", "v26"])
def test_names_are_llama_cpps(tmp_path: Path, kind: Kind) -> None:
    """gguf's own tables: the names arch mimo2 may hold, and where each HF name goes."""
    folder, _ = write_checkpoint(tmp_path, kind)
    checkpoint = Checkpoint.open(folder)
    c, arch = checkpoint.config, gguf.MODEL_ARCH.MIMO2
    blocks = c.num_hidden_layers + c.num_mtp_layers
    legal = {
        gguf.TENSOR_NAMES[t].format(bid=bid)
        for t in gguf.MODEL_TENSORS[arch]
        for bid in range(blocks)
    }
    names = gguf.get_tensor_name_map(arch, blocks)
    agreed = set()
    for plan in plan_tensors(checkpoint).tensors:
        base = plan.name.rsplit(".", 1)[0]
        part = base if plan.layer is None else base.split(".", 2)[2]
        template = part if plan.layer is None else f"blk.{{bid}}.{part}"
        assert template in gguf.TENSOR_NAMES.values(), plan.name
        # The gguf package lags llama.cpp: it lists neither fused qkv nor MTP blocks for mimo2.
        if part != "attn_qkv" and (plan.layer or 0) < c.num_hidden_layers:
            assert base in legal, plan.name
        source = plan.sources[0]
        if ".experts." in source:  # llama.cpp merges experts under the name without the number
            source = source.replace(".experts.0.", ".experts.")
        if source.startswith("model.mtp.layers."):
            depth, rest = source.removeprefix("model.mtp.layers.").split(".", 1)
            source = f"model.layers.{c.num_hidden_layers + int(depth)}.{rest}"
        if "attention_sink" in source:
            source += ".weight"
        source = source.replace("e_score_correction_bias", "e_score_correction.bias")
        theirs = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if theirs is not None and len(plan.sources) in (1, c.n_routed_experts):
            assert theirs == plan.name
            agreed.add(base.split(".", 2)[-1])
    assert agreed >= {
        "token_embd", "output", "output_norm", "attn_norm", "ffn_norm", "attn_output",
        "attn_sinks", "ffn_gate", "ffn_up", "ffn_down", "ffn_gate_inp", "exp_probs_b",
        "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps",
    }  # fmt: skip


def test_mxfp4_experts_pass_through(tmp_path: Path) -> None:
    folder, weights = write_checkpoint(tmp_path, "v26")
    checkpoint = Checkpoint.open(folder)
    mapping = plan_tensors(checkpoint)
    plan = mapping["blk.2.ffn_down_exps.weight"]
    assert plan.mxfp4
    assert plan.dtypes == ("U8",)
    codes, scales = plan.expert_mxfp4(checkpoint, 3)
    out, into = plan.shape[1:]
    assert codes.shape == (out, into // 2)
    assert scales.shape == (out, into // 32)
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    truth = weights.tensor(plan.name)[3]
    for r, c in ((0, 0), (0, 1), (5, 30), (out - 1, into - 1)):
        nibble = codes[r, c // 2] >> 4 if c % 2 else codes[r, c // 2] & 15
        assert truth[r, c] == table[nibble] * 2.0 ** (int(scales[r, c // 32]) - 127)
    dense = mapping["blk.0.ffn_up.weight"]
    assert not dense.mxfp4
    with pytest.raises(CheckpointError, match="holds no experts"):
        dense.expert_mxfp4(checkpoint, 0)
    with pytest.raises(CheckpointError, match="stack of experts"):
        plan.load(checkpoint)
    with pytest.raises(CheckpointError, match="expert 8 of"):
        plan.load_expert(checkpoint, 8)
    fp8_folder, _ = write_checkpoint(tmp_path / "fp8", "flash")
    fp8_checkpoint = Checkpoint.open(fp8_folder)
    with pytest.raises(CheckpointError, match="not MXFP4"):
        plan_tensors(fp8_checkpoint)["blk.1.ffn_up_exps.weight"].expert_mxfp4(fp8_checkpoint, 0)


# --- What must be refused -----------------------------------------------------------------


def edit(folder: Path, **changes: Any) -> TensorMapping:
    """Rewrite a one-file checkpoint with tensors replaced (None removes), then plan it."""
    from mimo_edge.export.safetensors_file import SafetensorsFile

    path = folder / "model.safetensors"
    file = SafetensorsFile(path)
    tensors = {n: (t.dtype, t.shape, file.read(n).tobytes()) for n, t in file.tensors.items()}
    for name, value in changes["tensors"].items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    write_safetensors(path, tensors)
    return plan_tensors(Checkpoint.open(folder))


F32 = np.float32
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
REFUSED: dict[str, tuple[Kind, dict[str, Any], str]] = {
    "missing tensor": (
        "flash",
        {"model.norm.weight": None, "lm_head.weight": None},
        "2 tensors are missing: model.norm.weight, lm_head.weight",
    ),
    "missing expert": ("flash", {EXPERT: None, EXPERT + "_scale_inv": None}, f"missing: {EXPERT}"),
    "unknown tensor": (
        "flash",
        {"model.layers.1.self_attn.q_norm.weight": stored(np.ones(4, F32))},
        "1 tensors are neither used.*q_norm",
    ),
    "sinks on a global layer": (
        "flash",
        {"model.layers.0.self_attn.attention_sink_bias": stored(np.ones(4, F32))},
        "neither used",
    ),
    "layer beyond the config": (
        "flash",
        {"model.layers.4.input_layernorm.weight": stored(np.ones(64, F32))},
        "neither used",
    ),
    "missing scale": ("flash", {EXPERT + "_scale_inv": None}, f"{EXPERT}_scale_inv is missing"),
    "stray scale": (
        "flash",
        {"model.norm.weight_scale_inv": stored(np.ones((1, 1), F32))},
        "1 scales belong to no scaled weight: model.norm.weight_scale_inv",
    ),
    "scale of another shape": (
        "flash",
        {EXPERT + "_scale_inv": stored(np.ones((2, 1), F32))},
        r"shape \[2, 1\], but F8_E4M3 \[32, 64\] needs \[1, 1\]",
    ),
    "scale of another dtype": (
        "flash",
        {EXPERT + "_scale_inv": stored(np.ones((1, 1), np.uint8))},
        "is U8, expected F32 or BF16",
    ),
    "wrong shape": (
        "flash_bf16",
        {"model.layers.2.self_attn.k_proj.weight": stored(np.ones((47, 64), F32))},
        r"k_proj.weight has shape \[47, 64\], expected \[48, 64\]",
    ),
    "transposed": (
        "flash_bf16",
        {"model.layers.2.mlp.gate.weight": stored(np.ones((64, 8), F32))},
        r"shape \[64, 8\], expected \[8, 64\]",
    ),
    "wrong rank": (
        "flash_bf16",
        {"model.norm.weight": stored(np.ones((64, 1), F32))},
        r"shape \[64, 1\], expected \[64\]",
    ),
    "wrong dtype": (
        "flash_bf16",
        {"model.norm.weight": ("I32", (64,), bytes(256))},
        "is I32, expected BF16 or F16 or F32",
    ),
    "fp8 norm": (
        "flash",
        {"model.norm.weight": ("F8_E4M3", (64,), bytes(64))},
        "is F8_E4M3, expected BF16",
    ),
    "fp8 without quantization_config": (
        "flash_bf16",
        {"model.layers.0.mlp.up_proj.weight": ("F8_E4M3", (96, 64), bytes(96 * 64))},
        "config.json has no quantization_config",
    ),
    "fp8 expert of an MXFP4 model": (
        "v26",
        {EXPERT: ("F8_E4M3", (32, 64), bytes(32 * 64))},
        "is F8_E4M3, expected U8",
    ),
    "MXFP4 scale missing": ("v26", {EXPERT + "_scale": None}, f"{EXPERT}_scale is missing"),
    "MXFP4 scale of another shape": (
        "v26",
        {EXPERT + "_scale": stored(np.ones((32, 1), np.uint8))},
        r"needs \[32, 2\]",
    ),
    "fp8 router": (
        "flash",
        {"model.layers.1.mlp.gate.weight": ("F8_E4M3", (8, 64), bytes(8 * 64))},
        "gate.weight is F8_E4M3, expected BF16",
    ),
    "fused rows missing": (
        "v25",
        {"model.layers.1.self_attn.qkv_proj.weight": ("F8_E4M3", (1535, 64), bytes(1535 * 64))},
        r"shape \[1535, 64\], expected \[1536, 64\]",
    ),
    "fused scale of the plain layout": (
        "v25",
        {"model.layers.0.self_attn.qkv_proj.weight_scale_inv": stored(np.ones((9, 1), F32))},
        r"layers.3.* is stored in \[4\] shards, the global layers before it in \[1\]",
    ),
    "fused scale that fits nothing": (
        "v25",
        {"model.layers.0.self_attn.qkv_proj.weight_scale_inv": stored(np.ones((7, 1), F32))},
        "layers.0.* no tensor-parallel shard count explains",
    ),
    "sliding scale that contradicts T": (
        "v25",
        {"model.layers.1.self_attn.qkv_proj.weight_scale_inv": stored(np.ones((9, 1), F32))},
        r"shape \[9, 1\], but F8_E4M3 \[1536, 64\] needs \[12, 1\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(tmp_path: Path, case: str) -> None:
    kind, tensors, message = REFUSED[case]
    folder, _ = write_checkpoint(tmp_path, kind, shards=1)
    with pytest.raises(CheckpointError, match=message):
        edit(folder, tensors=tensors)


def test_fused_layout_that_cannot_be_told(tmp_path: Path) -> None:
    """Without fp8 scales nothing tells T: refused, unless the index states tp_size."""
    folder, _ = write_checkpoint(tmp_path, "v25", quantization=QuantizationConfig())
    with pytest.raises(CheckpointError, match="cannot be told"):
        plan_tensors(Checkpoint.open(folder))


def test_tp_size_that_contradicts_the_scales(tmp_path: Path) -> None:
    folder, _ = write_checkpoint(tmp_path, "v25", tp_size=2)
    with pytest.raises(CheckpointError, match=r"index says tp_size 2, but .* in 4 shards"):
        plan_tensors(Checkpoint.open(folder))


def test_config_of_another_size(tmp_path: Path) -> None:
    folder, _ = write_checkpoint(tmp_path, "flash")
    config = json.loads((folder / "config.json").read_text())
    config["n_routed_experts"] = 8192
    config["num_hidden_layers"] = 1000
    config["hybrid_layer_pattern"] = config["moe_layer_freq"] = [1] * 1000
    (folder / "config.json").write_text(json.dumps(config))
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="calls for 24576000 expert tensors"):
        plan_tensors(Checkpoint.open(folder))
    assert time.perf_counter() - start < 5


def test_skipped_reasons(tmp_path: Path) -> None:
    folder, _ = write_checkpoint(tmp_path, "v25")
    skipped = plan_tensors(Checkpoint.open(folder)).skipped
    assert set(skipped) == {
        "visual.patch_embed.proj.weight",
        "visual.blocks.0.attn.qkv.weight",
        "audio_encoder.layers.0.fc1.weight",
        "audio_encoder.steps",
        "speech_embeddings.0.weight",
    }
    assert "vision" in skipped["visual.patch_embed.proj.weight"]
    tied, _ = write_checkpoint(tmp_path / "tied", "mimo7b", tie_word_embeddings=True)
    mapping = edit(tied, tensors={"lm_head.weight": stored(np.ones((97, 64), F32))})
    assert mapping.skipped == {"lm_head.weight": "tie_word_embeddings: the head is the embedding"}
    assert mapping["output.weight"].sources == ("model.embed_tokens.weight",)


# --- The real size ------------------------------------------------------------------------


def v25_tensors(c: MimoConfig) -> Iterator[tuple[str, str, tuple[int, ...], str]]:
    """(name, dtype, shape, group) of MiMo-V2.5, from the table of spec section 4.1."""

    def fp8(name: str, out: int, into: int, group: str, scale_rows: int | None = None) -> Any:
        yield name, "F8_E4M3", (out, into), group
        scale = (scale_rows or -(-out // 128), -(-into // 128))
        yield name + "_scale_inv", "F32", scale, group

    def attention(p: str, sliding: bool, group: str) -> Any:
        rows, scale_rows = (14848, 116) if sliding else (13568, 108)
        yield from fp8(p + "self_attn.qkv_proj.weight", rows, 4096, group, scale_rows)
        yield p + "self_attn.o_proj.weight", "BF16", (4096, 8192), group
        if sliding:
            yield p + "self_attn.attention_sink_bias", "BF16", (64,), group

    def dense(p: str, group: str) -> Any:
        yield from fp8(p + "mlp.gate_proj.weight", 16384, 4096, group)
        yield from fp8(p + "mlp.up_proj.weight", 16384, 4096, group)
        yield from fp8(p + "mlp.down_proj.weight", 4096, 16384, group)

    yield "model.embed_tokens.weight", "BF16", (152576, 4096), "embedding"
    yield "lm_head.weight", "BF16", (152576, 4096), "head"
    yield "model.norm.weight", "BF16", (4096,), "attention and norms"
    for i, sliding in enumerate(c.hybrid_layer_pattern):
        p = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{p}{norm}.weight", "BF16", (4096,), "attention and norms"
        yield from attention(p, bool(sliding), "attention and norms")
        if i == 0:
            yield from dense(p, "dense layer 0")
            continue
        yield p + "mlp.gate.weight", "F32", (256, 4096), "routers"
        yield p + "mlp.gate.e_score_correction_bias", "F32", (256,), "routing biases"
        for e in range(256):
            q = f"{p}mlp.experts.{e}."
            yield from fp8(q + "gate_proj.weight", 2048, 4096, "experts")
            yield from fp8(q + "up_proj.weight", 2048, 4096, "experts")
            yield from fp8(q + "down_proj.weight", 4096, 2048, "experts")
    for k in range(3):
        p = f"model.mtp.layers.{k}."
        norms = ["enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"]
        for norm in norms:
            yield f"{p}{norm}.weight", "BF16", (4096,), "MTP"
        yield p + "eh_proj.weight", "BF16", (4096, 8192), "MTP"
        yield from attention(p, True, "MTP")
        yield from dense(p, "MTP")


# Bytes read on the released V2.5 (spec section 4.2, census of x3haloed/mimo-prismwing).
V25_CENSUS = {
    "experts": 302_869_118_976,
    "attention and norms": 6_094_778_240,
    "head": 1_249_902_592,
    "embedding": 1_249_902_592,
    "MTP": 1_189_400_448,
    "dense layer 0": 201_375_744,
    "routers": 197_132_288,
    "routing biases": 48_128,
}


def test_plans_the_real_v25_in_seconds(tmp_path: Path) -> None:
    """All 73,081 index entries over 17 sparse shards of the true sizes (311 GB apparent)."""
    c = known_model("MiMo-V2.5")
    itemsize = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
    headers: list[dict[str, Any]] = [{} for _ in range(17)]
    sizes, groups, counts = [0] * 17, dict.fromkeys(V25_CENSUS, 0), [0]

    def add(name: str, dtype: str, shape: tuple[int, ...], shard: int) -> int:
        nbytes = int(np.prod(shape)) * itemsize[dtype]
        begin = sizes[shard]
        sizes[shard] += nbytes
        headers[shard][name] = {
            "dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + nbytes]
        }  # fmt: skip
        counts[0] += 1
        return nbytes

    for name, dtype, shape, group in v25_tensors(c):
        groups[group] += add(name, dtype, shape, 16 if group == "MTP" else counts[0] % 16)
    assert groups == V25_CENSUS  # the table this test uses is the released model
    for i in range(73_081 - counts[0]):  # the towers: names are made up, the count is real
        add(f"{'visual.blocks' if i % 2 else 'audio_encoder.layers'}.{i}.w", "BF16", (8,), i % 16)
    weight_map: dict[str, str] = {}
    for i, header in enumerate(headers):
        file = (
            "model_mtp.safetensors" if i == 16 else f"model_pp0_ep{i // 2}_shard{i % 2}.safetensors"
        )
        text = json.dumps(header).encode()
        (tmp_path / file).write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(tmp_path / file, 8 + len(text) + sizes[i])
        weight_map |= dict.fromkeys(header, file)
    index = {"metadata": {"save_format": "fp8", "tp_size": 4}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    source = Path(__file__).parent.parent / "edge" / "configs" / "MiMo-V2.5.json"
    (tmp_path / "config.json").write_bytes(source.read_bytes())

    start = time.perf_counter()
    checkpoint = Checkpoint.open(tmp_path)
    mapping = plan_tensors(checkpoint)
    seconds = time.perf_counter() - start
    assert checkpoint.config == replace(c, num_mtp_layers=3)
    assert len(checkpoint.tensors) == 73_081
    assert len(mapping.skipped) == 459
    assert mapping["blk.47.ffn_down_exps.weight"].shape == (256, 4096, 2048)
    assert mapping["blk.0.attn_qkv.weight"].rows[1].start == 13568 // 4
    assert mapping["blk.50.attn_qkv.weight"].shape == (14848, 4096)
    values = sum(int(np.prod(plan.shape)) for plan in mapping.tensors)
    assert round(values / 1e9, 2) == 309.77  # 308.78B + 0.99B (spec section 6)
    assert seconds < 20, f"planning took {seconds:.1f} s"

    # Rows of the 2.5 GB (f32) embedding cost the rows.
    tracemalloc.start()
    try:
        mapping["token_embd.weight"].load_rows(checkpoint, 150_000, 150_256)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 256 * 4096 * 4
