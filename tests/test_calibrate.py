"""Calibration against a naive f64 model that notes down everything its weights are multiplied
with, and against llama.cpp's file form as the gguf package reads it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoint_factory import Kind, write_checkpoint
from llamacpp_imatrix import measure
from naive_model import NaiveModel
from tiny import random_weights, tiny_config, tiny_mimo7b_config

from mimo_edge.config import MimoConfig
from mimo_edge.errors import BundleError, ExportError, GenerationError, UsageError
from mimo_edge.export import calibrate as module
from mimo_edge.export.calibrate import MIN_TOKENS, calibrate, calibrate_checkpoint
from mimo_edge.export.checkpoint import Checkpoint
from mimo_edge.export.pipeline import export_bundle
from mimo_edge.export.weights import CheckpointWeights
from mimo_edge.heat import Heat
from mimo_edge.quant.imatrix import Imatrix
from mimo_edge.runtimes.base import ExpertWeights
from mimo_edge.runtimes.weights import DictWeights


class Spied(np.ndarray[Any, Any]):
    """An array that reports what it is multiplied with; copies keep reporting."""

    report: Any = None

    def __array_finalize__(self, origin: Any) -> None:
        self.report = getattr(origin, "report", None)

    def __matmul__(self, x: Any) -> Any:
        self.report(x)
        return np.asarray(self) @ np.asarray(x)


class SpiedWeights(DictWeights):
    """Sums of squares and counts of every matrix, noted by the matrices themselves."""

    def __init__(self, weights: DictWeights) -> None:
        super().__init__(weights.config, weights._tensors)
        self.sums: dict[tuple[str, int], Any] = defaultdict(float)
        self.counts: dict[tuple[str, int], int] = defaultdict(int)

    def _spied(self, name: str, expert: int, values: Any) -> Any:
        if values.ndim == 1:
            return values  # norms, biases and sinks multiply nothing
        array = values.view(Spied)

        def report(x: Any) -> None:
            self.sums[name, expert] = self.sums[name, expert] + np.asarray(x, np.float64) ** 2
            self.counts[name, expert] += 1

        array.report = report
        return array

    def tensor(self, name: str) -> Any:
        return self._spied(name, 0, super().tensor(name))

    def expert(self, layer: int, expert: int) -> ExpertWeights:
        parts = super().expert(layer, expert)._asdict()
        return ExpertWeights(
            **{
                kind: self._spied(f"blk.{layer}.ffn_{kind}_exps.weight", expert, values)
                for kind, values in parts.items()
            }
        )


def naive(weights: DictWeights, chunks: Sequence[Any]) -> tuple[SpiedWeights, list[NaiveModel]]:
    spied = SpiedWeights(weights)
    models = []
    for ids in chunks:
        models.append(NaiveModel(spied))
        _, hidden = models[-1].run(ids)
        for depth in range(weights.config.num_mtp_layers):
            if len(ids) - 1 - depth > 0:
                models[-1].mtp(ids, hidden, depth)
    return spied, models


def some_ids(config: MimoConfig, n: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, config.vocab_size, n).astype(np.int32)


@pytest.mark.parametrize(
    "config",
    [tiny_config(), tiny_config(tie_word_embeddings=True), tiny_mimo7b_config()],
    ids=["mimo_v2", "tied", "mimo7b"],
)
def test_every_matrix_remembers_what_it_was_multiplied_with(
    config: MimoConfig, tmp_path: Path
) -> None:
    weights = random_weights(config, seed=3)
    ids = some_ids(config, 70)
    chunks = [ids[:30], ids[30:60], ids[60:]]
    spied, _ = naive(weights, chunks)
    calibrate(weights, None, ids, chunk_tokens=30).save(tmp_path)

    # gguf-py, not our reader, and llama-imatrix's names and shapes.
    reader = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_size"].contents() == 30
    want = {name for name, _ in spied.sums}
    mtp = {f"blk.{config.num_hidden_layers + k}.attn_" for k in range(config.num_mtp_layers)}
    if config.tie_word_embeddings:
        want = want - {"token_embd.weight"} | {"output.weight"}
    if config.family == "mimo_v2":  # the file has q, k and v of MTP blocks in one tensor
        want -= {f"{p}{part}.weight" for p in mtp for part in "qkv"}
        want |= {f"{p}qkv.weight" for p in mtp}
    assert {n.removesuffix(".in_sum2") for n in tensors if n.endswith(".in_sum2")} == want
    assert len(tensors) == 2 * len(want)
    for name in want:
        noted = name.replace("attn_qkv", "attn_v")
        if name == "output.weight" and config.tie_word_embeddings:
            noted = "token_embd.weight"
        matrices = config.n_routed_experts if "_exps" in name else 1
        sums = tensors[name + ".in_sum2"].reshape(matrices, -1)
        counts = tensors[name + ".counts"].reshape(matrices)
        for e in range(matrices):
            assert counts[e] == spied.counts[noted, e], (name, e)
            # f32 activations against f64 ones; a column that cancels to nearly nothing is as
            # exact as the largest one, not as itself.
            wanted = spied.sums[noted, e]
            np.testing.assert_allclose(sums[e], wanted, rtol=1e-5, atol=1e-6 * np.max(wanted))


def test_heat_counts_routes_and_their_weights(tmp_path: Path) -> None:
    config = tiny_config(num_mtp_layers=0)
    weights = random_weights(config, seed=4)
    ids = some_ids(config, 66)
    chunks = [ids[:33], ids[33:]]
    _, models = naive(weights, chunks)
    result = calibrate(weights, None, ids, chunk_tokens=33)
    assert sorted(result.heat.counts) == [1, 2, 3]
    for layer, counts in result.heat.counts.items():
        want = np.zeros(config.n_routed_experts, np.int64)
        for model in models:
            for (at, _), chosen in model.routes.items():
                if at == layer:
                    want[chosen] += 1
        np.testing.assert_array_equal(counts, want)
        assert counts.sum() == 66 * config.num_experts_per_tok
        # Weights of one token sum to the scaling factor, here 1.
        assert result.heat.mass[layer].sum() == pytest.approx(66, rel=1e-6)
        assert ((result.heat.mass[layer] > 0) == (counts > 0)).all()
    result.save(tmp_path)
    back = Heat.read(tmp_path / "experts.json")
    assert back.tokens == result.tokens == 66
    assert back.source == "token ids"
    np.testing.assert_array_equal(back.counts[2], result.heat.counts[2])


def test_router_mass_is_the_mass_of_the_right_expert() -> None:
    """Two experts chosen by force with known scores: mass must follow the score, not the slot."""
    config = tiny_config(num_mtp_layers=0, num_experts_per_tok=2)
    tensors = dict(random_weights(config, seed=4)._tensors)
    for layer in (1, 2, 3):
        tensors[f"blk.{layer}.ffn_gate_inp.weight"] = np.zeros(
            (config.n_routed_experts, config.hidden_size), np.float32
        )
        bias = np.full(config.n_routed_experts, -9, np.float32)
        bias[[2, 5]] = (1, 2)  # 5 is chosen first, both weigh the same
        tensors[f"blk.{layer}.exp_probs_b.bias"] = bias
    result = calibrate(DictWeights(config, tensors), None, some_ids(config, 80))
    np.testing.assert_allclose(result.heat.mass[1], np.eye(8)[2] * 40 + np.eye(8)[5] * 40)
    assert result.unseen == [
        f"blk.{layer} expert {e}" for layer in (1, 2, 3) for e in (0, 1, 3, 4, 6, 7)
    ]
    assert result.imatrix.importance("blk.1.ffn_down_exps.weight", 2) is not None
    assert result.imatrix.importance("blk.1.ffn_down_exps.weight", 3) is None


def test_groups_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    weights, ids = random_weights(config), some_ids(config, 90)
    whole = calibrate(weights, None, ids, chunk_tokens=64)
    monkeypatch.setattr(module, "_EXPERT_ROWS", 7)
    monkeypatch.setattr(module, "_DENSE_ROWS", 5)
    parts = calibrate(weights, None, ids, chunk_tokens=64)
    assert parts.imatrix.names == whole.imatrix.names
    for name in whole.imatrix.names:
        np.testing.assert_array_equal(parts.imatrix.counts(name), whole.imatrix.counts(name))
        for e in np.flatnonzero(whole.imatrix.counts(name)):
            a, b = (c.imatrix.importance(name, int(e)) for c in (parts, whole))
            assert a is not None
            assert b is not None
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * b.max())


def test_the_same_text_gives_the_same_bytes(tmp_path: Path) -> None:
    config = tiny_config()
    weights, ids = random_weights(config), some_ids(config, 200)
    for folder in ("a", "b"):
        calibrate(weights, None, ids).save(tmp_path / folder)
    for name in ("imatrix.gguf", "experts.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["experts.json", "imatrix.gguf"]


def test_memory_holds_one_block_at_a_time() -> None:
    """No tensor is asked for twice, and none is kept when the next block starts."""
    config = tiny_config()

    asked: list[str] = []

    class Counting(DictWeights):
        def tensor(self, name: str) -> Any:
            if "_exps" not in name:
                asked.append(name)
            return super().tensor(name)

    weights = Counting(config, random_weights(config)._tensors)
    calibrate(weights, None, some_ids(config, 200), chunk_tokens=16)
    blocks = [n.split(".")[1] for n in asked if n.startswith("blk.")]
    assert blocks == sorted(blocks, key=int)
    matrices = [n for n in asked if n != "token_embd.weight"]  # rows only, of any model
    assert len(matrices) == len(set(matrices))
    assert "output.weight" not in asked  # only what meets it matters


def test_progress_counts_blocks() -> None:
    config = tiny_config()
    seen: list[tuple[int, int]] = []
    calibrate(
        random_weights(config), None, some_ids(config, 64), progress=lambda *at: seen.append(at)
    )
    assert seen == [(i, 7) for i in range(8)]


def test_chunks_too_short_for_deep_drafts_still_count() -> None:
    config = tiny_config()
    result = calibrate(random_weights(config), None, some_ids(config, 65), chunk_tokens=2)
    assert result.tokens == 64
    assert result.chunks == 32
    assert "blk.4.attn_qkv.weight" in result.imatrix.names
    assert "blk.5.attn_qkv.weight" not in result.imatrix.names


def test_max_tokens_limits_the_text() -> None:
    config = tiny_config()
    weights, ids = random_weights(config), some_ids(config, 300)
    a = calibrate(weights, None, ids, max_tokens=100)
    b = calibrate(weights, None, ids[:100])
    assert a.tokens == b.tokens == 100
    np.testing.assert_array_equal(a.heat.counts[1], b.heat.counts[1])


# --- text files ------------------------------------------------------------------------------


class Letters:
    """One token per character."""

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        assert allow_special
        return [ord(c) % 97 for c in text]


def test_text_files_are_read_as_utf8(tmp_path: Path) -> None:
    config = tiny_config()
    path = tmp_path / "words.txt"
    path.write_text("把客厅的灯调暗一点" * 10, "utf-8")
    result = calibrate(random_weights(config), Letters(), path)
    assert result.tokens == 90
    assert result.heat.source == "words.txt"
    assert result.imatrix.datasets == ("words.txt",)


def test_a_long_file_is_read_as_far_as_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    path = tmp_path / "long.txt"
    path.write_text("灯" * 5000, "utf-8")
    for bytes_per_token in (3, 4):  # ends between and inside characters
        monkeypatch.setattr(module, "_BYTES_PER_TOKEN", bytes_per_token)
        result = calibrate(random_weights(config), Letters(), path, max_tokens=101)
        assert result.tokens == 101


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t ", "is empty"),
        (b"too short", "has 9 tokens, too few"),
        (b"good text " * 20 + b"\xff\xfe" + b"more" * 20, "not UTF-8: byte 0xff at 200"),
        (b"good text " * 20 + "灯".encode()[:2], "not UTF-8: byte 0xe7 at 200"),
    ],
)
def test_bad_text_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        calibrate(random_weights(tiny_config()), Letters(), path)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    weights = random_weights(tiny_config())
    with pytest.raises(UsageError, match=r"cannot read calibration text .*No such file"):
        calibrate(weights, Letters(), tmp_path / "none.txt")
    with pytest.raises(UsageError, match="directory"):
        calibrate(weights, Letters(), tmp_path)


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("word " * 100)
    with pytest.raises(UsageError, match="without a tokenizer"):
        calibrate(random_weights(tiny_config()), None, path)


def test_impossible_settings_are_refused() -> None:
    config = tiny_config()
    weights, ids = random_weights(config), some_ids(config, 100)
    with pytest.raises(UsageError, match="chunks of 1"):
        calibrate(weights, None, ids, chunk_tokens=1)
    with pytest.raises(UsageError, match="4096 positions"):
        calibrate(weights, None, ids, chunk_tokens=4097)
    with pytest.raises(UsageError, match="max_tokens = 10"):
        calibrate(weights, None, ids, max_tokens=10)
    with pytest.raises(UsageError, match=f"has {MIN_TOKENS - 1} tokens"):
        calibrate(weights, None, ids[: MIN_TOKENS - 1])
    with pytest.raises(UsageError, match="outside 0"):
        calibrate(weights, None, np.full(100, 97))


def test_damaged_weights_are_named() -> None:
    config = tiny_config()
    tensors = dict(random_weights(config)._tensors)
    broken = tensors["blk.2.attn_output.weight"].copy()
    broken[0, 0] = np.nan
    tensors["blk.2.attn_output.weight"] = broken
    with pytest.raises(GenerationError, match="block 2 gave NaN"):
        calibrate(DictWeights(config, tensors), None, some_ids(config, 70))


def test_nothing_half_written_when_the_folder_refuses(tmp_path: Path) -> None:
    config = tiny_config()
    result = calibrate(random_weights(config), None, some_ids(config, 70))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match="cannot write"):
        result.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "in the way"


# --- an importance matrix made elsewhere -----------------------------------------------------


def test_an_existing_imatrix_is_taken_as_it_is(tmp_path: Path) -> None:
    config = tiny_config()
    weights = random_weights(config)
    made = calibrate(weights, None, some_ids(config, 128), chunk_tokens=64)
    made.save(tmp_path)
    read = calibrate(weights, None, tmp_path / "imatrix.gguf")
    assert read.tokens == 128
    assert read.unseen == made.unseen
    assert read.heat.source == "imatrix.gguf (no router mass)"
    for layer, counts in made.heat.counts.items():
        np.testing.assert_array_equal(read.heat.counts[layer], counts)
        assert not read.heat.mass[layer].any()
    a, b = (c.imatrix.importance("blk.1.attn_q.weight") for c in (made, read))
    assert a is not None
    assert b is not None
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_an_imatrix_of_another_model_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    calibrate(random_weights(config), None, some_ids(config, 70)).save(tmp_path)
    path = tmp_path / "imatrix.gguf"
    more = random_weights(tiny_config(n_routed_experts=16))
    with pytest.raises(BundleError, match="has 8 matrices, this model 16"):
        calibrate(more, None, path)
    all_moe = random_weights(tiny_config(moe_layer_freq=(1, 1, 1, 1)))
    with pytest.raises(BundleError, match=r"has no blk\.0\.ffn_gate_exps"):
        calibrate(all_moe, None, path)


def test_other_gguf_files_are_refused(tmp_path: Path) -> None:
    weights = random_weights(tiny_config())
    path = tmp_path / "cut.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(BundleError):
        calibrate(weights, None, path)
    lone = Imatrix()
    lone.add("blk.0.attn_q.weight", np.ones((3, 64), np.float32))
    lone.write(path)
    with pytest.raises(BundleError, match="another model"):
        calibrate(weights, None, path)


# --- checkpoints, and what an export makes of it ---------------------------------------------

K_QUANT_WIDTHS: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_attention_heads": 4,
    "v_head_dim": 64,
    "head_dim": 96,
}


@pytest.mark.parametrize("kind", ["flash", "v25"])
def test_stock_llama_cpp_measures_the_same(kind: Kind, tmp_path: Path) -> None:
    """Weight by weight and expert by expert, on the very file we export."""
    path, _ = write_checkpoint(tmp_path / "checkpoint", kind, sliding_window=17)
    bundle = export_bundle(path, tmp_path / "bundle", recipe="f32")
    weights = bundle.weights()
    config = bundle.config
    ids = some_ids(config, 100)
    theirs = measure(bundle.gguf.files[0], [ids[:60], ids[60:]])
    ours = calibrate(weights, None, ids, chunk_tokens=60).imatrix
    names = {name.removesuffix(".sums") for name in theirs if name.endswith(".sums")}
    trunk = {n for n in ours.names if not n.startswith(("blk.4.", "blk.5.", "blk.6."))}
    split = {n for n in trunk if ".attn_q." in n} if config.fused_qkv else set()
    for name in sorted(names):
        if name == "output.weight":
            continue  # ours also counts what the MTP blocks send through the head
        noted = name.replace(".attn_qkv.", ".attn_q.")
        np.testing.assert_array_equal(ours.counts(noted), theirs[name + ".counts"], name)
        for e, count in enumerate(theirs[name + ".counts"]):
            mean = ours.importance(noted, e)
            if count == 0:
                assert mean is None
                continue
            assert mean is not None
            want = theirs[name + ".sums"][e] / count
            if name.endswith(".attn_output.weight"):
                # llama.cpp scales the values after this product, we before they are cached:
                # one factor for the whole matrix, which no quantiser sees.
                want = want * config.attention_value_scale**2
            # Both are f32 passes; llama.cpp rounds nothing else in this set-up.
            np.testing.assert_allclose(mean, want, rtol=1e-3, atol=1e-5 * want.max())
    # And nothing is measured that llama.cpp does not have.
    fused = {n.replace(".attn_q.", f".attn_{p}.") for n in split for p in "qkv"}
    assert trunk - fused == names - {n for n in names if ".attn_qkv." in n}
    bundle.close()


def test_an_export_uses_the_measured_importance(tmp_path: Path) -> None:
    path, _ = write_checkpoint(
        tmp_path / "checkpoint", tokenizer=True, num_mtp_layers=1, **K_QUANT_WIDTHS
    )
    text = tmp_path / "words.txt"
    text.write_text(
        "turn on the light in the living room 把客厅的灯调暗一点<|im_end|>" * 8, "utf-8"
    )
    made = calibrate_checkpoint(path, text)
    plain = export_bundle(path, tmp_path / "plain", recipe="q3_k")
    weighted = export_bundle(path, tmp_path / "weighted", recipe="q3_k", calibration=made)
    assert weighted.manifest is not None
    assert set(weighted.manifest.unweighted) == {
        f"{stack}[{e}]" for stack, e in made.imatrix.unseen_experts()
    }
    assert weighted.heat is not None
    np.testing.assert_array_equal(weighted.heat.counts[1], made.heat.counts[1])
    # What the importance is for: the error as the inputs see it gets smaller.
    source = CheckpointWeights(Checkpoint.open(path))
    a, b = plain.weights(), weighted.weights()
    errors = np.zeros(2)
    for layer in (1, 2, 3):
        for expert in range(8):
            for kind in ("gate", "up", "down"):
                mean = made.imatrix.importance(f"blk.{layer}.ffn_{kind}_exps.weight", expert)
                if mean is not None:
                    true = getattr(source.expert(layer, expert), kind)
                    for i, weights in enumerate((a, b)):
                        got = getattr(weights.expert(layer, expert), kind)
                        errors[i] += (mean * (got - true) ** 2).sum()
    assert errors[1] < 0.95 * errors[0]
    plain.close()
    weighted.close()


def test_checkpoint_without_a_tokenizer_needs_an_imatrix(tmp_path: Path) -> None:
    path, _ = write_checkpoint(tmp_path / "checkpoint")
    text = tmp_path / "words.txt"
    text.write_text("turn on the light " * 20)
    with pytest.raises(UsageError, match="without a tokenizer"):
        calibrate_checkpoint(path, text)
