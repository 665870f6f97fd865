"""A checkpoint as Weights: everything DictWeights offers, split and bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoint_factory import KINDS, Kind, write_checkpoint

from mimo_edge.errors import CheckpointError, UsageError
from mimo_edge.export.checkpoint import Checkpoint
from mimo_edge.export.weights import CheckpointWeights
from mimo_edge.runtimes.base import Weights


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_truth(tmp_path: Path, kind: Kind) -> None:
    folder, truth = write_checkpoint(tmp_path, kind)
    weights: Weights = CheckpointWeights(Checkpoint.open(folder))
    assert weights.config == truth.config
    for name, values in truth._tensors.items():
        assert weights.has(name)
        if "_exps." in name:
            with pytest.raises(CheckpointError, match="stack of 8 experts"):
                weights.tensor(name)
        else:
            assert np.array_equal(weights.tensor(name), values), name
    for spec in weights.config.layers:
        for e in range(weights.config.n_routed_experts if spec.moe else 0):
            for ours, theirs in zip(weights.expert(spec.index, e), truth.expert(spec.index, e),
                                    strict=True):  # fmt: skip
                assert np.array_equal(ours, theirs)


def test_embedding_reads_rows(tmp_path: Path) -> None:
    folder, truth = write_checkpoint(tmp_path, "flash")
    weights = CheckpointWeights(Checkpoint.open(folder))
    for ids in ([5], [96, 0, 5, 6, 7, 5, 96], [], list(range(97))):
        tokens = np.array(ids, dtype=np.int32)
        rows = weights.embedding(tokens)
        assert rows.shape == (len(ids), 64)
        assert rows.dtype == np.float32
        assert np.array_equal(rows, truth.embedding(tokens))
    for bad in (-1, 97):
        with pytest.raises(UsageError, match=f"token id {bad} is outside"):
            weights.embedding(np.array([0, bad], dtype=np.int32))


def test_refuses_what_is_not_there(tmp_path: Path) -> None:
    folder, _ = write_checkpoint(tmp_path, "v25")
    weights = CheckpointWeights(Checkpoint.open(folder))
    assert not weights.has("blk.0.attn_qkv.weight")  # offered split, never fused
    assert not weights.has("blk.0.attn_sinks.weight")
    with pytest.raises(CheckpointError, match="no tensor"):
        weights.tensor("blk.9.attn_q.weight")
    with pytest.raises(CheckpointError, match="layer 0 has no routed experts"):
        weights.expert(0, 0)
    with pytest.raises(CheckpointError, match="expert 8 of"):
        weights.expert(1, 8)
    weights.close()
    with pytest.raises(CheckpointError, match="is closed"):
        weights.tensor("output_norm.weight")


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_transformers_reads_the_same_values(tmp_path: Path) -> None:
    """The factory's folder is one that transformers loads whole, and it holds our values.

    The layer pattern is transformers' own, which does not read hybrid_layer_pattern; it
    ignores the MTP blocks."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder, _ = write_checkpoint(
        tmp_path,
        "flash_bf16",
        num_hidden_layers=6,
        hybrid_layer_pattern=(0, 1, 1, 1, 1, 0),
        moe_layer_freq=(0, 1, 1, 1, 1, 1),
    )
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    names = {
        "input_layernorm.weight": "attn_norm.weight",
        "post_attention_layernorm.weight": "ffn_norm.weight",
        "self_attn.q_proj.weight": "attn_q.weight",
        "self_attn.k_proj.weight": "attn_k.weight",
        "self_attn.v_proj.weight": "attn_v.weight",
        "self_attn.o_proj.weight": "attn_output.weight",
        "self_attn.sinks": "attn_sinks.weight",
        "mlp.gate.weight": "ffn_gate_inp.weight",
        "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
        "mlp.gate_proj.weight": "ffn_gate.weight",
        "mlp.up_proj.weight": "ffn_up.weight",
        "mlp.down_proj.weight": "ffn_down.weight",
    }
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    weights = CheckpointWeights(Checkpoint.open(folder))
    seen = 0
    for name, tensor in model.state_dict().items():
        theirs = tensor.float().numpy()
        if name in top:
            ours = weights.tensor(top[name])
        else:
            layer, part = name.removeprefix("model.layers.").split(".", 1)
            if part.startswith("mlp.experts."):
                experts = [weights.expert(int(layer), e) for e in range(8)]
                down = part.endswith("down_proj")
                ours = np.stack(
                    [x.down if down else np.concatenate([x.gate, x.up]) for x in experts]
                )
            else:
                ours = weights.tensor(f"blk.{layer}.{names[part]}")
        assert np.array_equal(ours, theirs), name
        seen += 1
    assert seen == 66
