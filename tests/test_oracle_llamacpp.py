"""Stock llama.cpp on the files we write: it loads them and computes the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import pytest
from checkpoint_factory import write_checkpoint
from llamacpp_runner import LlamaCppError, run

from mimo_edge.api import Runtime
from mimo_edge.bundle import Bundle
from mimo_edge.chat_template import ChatTemplate
from mimo_edge.export.pipeline import export_bundle
from mimo_edge.nano.commands import TOOLS, held_out
from mimo_edge.quant.base import get_format
from mimo_edge.quant.recipe import Recipe
from mimo_edge.runtimes.base import F32, ExpertWeights, Weights
from mimo_edge.runtimes.reference import ReferenceBackend
from mimo_edge.tokenizer import Tokenizer

# W is 9 in the tiny models: 70 tokens are seven windows and more.
IDS = np.random.default_rng(5).integers(0, 290, 70)


class _Rounded:
    """A weight that rounds what it is multiplied with to `fmt`, as ggml's mul_mat does."""

    __array_ufunc__ = None  # so that `rows @ weight` comes here

    def __init__(self, weight: F32, fmt: str) -> None:
        self.weight, self.fmt = weight, get_format("Q8_0" if fmt == "MXFP4" else fmt)

    @property
    def T(self) -> _Rounded:
        return self

    def __rmatmul__(self, rows: F32) -> F32:
        packed = self.fmt.quantize(np.ascontiguousarray(rows))
        values: F32 = self.fmt.dequantize(packed, rows.shape[1]) @ self.weight.T
        return values


class LikeGgml(ReferenceBackend):
    """The reference model with ggml's one rounding: activations take the weight's precision.

    A matmul with F16 weights reads its input as f16, one with Q8_0 or MXFP4 weights as Q8_0
    blocks.
    """

    def __init__(self, weights: Weights, bundle: Bundle) -> None:
        super().__init__(weights)
        self._formats = {name: info.type_name for name, info in bundle.tensors.items()}

    def _format(self, name: str) -> str:
        fused = name
        for part in "qkv":
            fused = fused.replace(f".attn_{part}.", ".attn_qkv.")
        return self._formats.get(name) or self._formats[fused]

    def _linear(self, name: str, x: F32, bias: str | None = None) -> F32:
        # llama.cpp scales the values after o_proj, so what it rounds before is unscaled.
        after = self.config.attention_value_scale if name.endswith("attn_output.weight") else 1.0
        weight = cast(Any, _Rounded(self._tensor(name), self._format(name)))
        y: F32 = (x / np.float32(after)) @ weight.T * np.float32(after)
        return y + self._tensor(bias) if bias is not None else y

    def _expert(self, layer: int, expert: int) -> ExpertWeights:
        parts = []
        for part, weight in zip(
            ("gate", "up", "down"), super()._expert(layer, expert), strict=True
        ):
            parts.append(_Rounded(weight, self._formats[f"blk.{layer}.ffn_{part}_exps.weight"]))
        return ExpertWeights(*cast(Any, parts))


def reference(
    bundle: Bundle, mtp_blocks: int, weights: Weights | None = None, ids: Any = IDS
) -> dict[str, F32]:
    """What llama.cpp should answer for `ids`: logits, and every MTP block teacher-forced."""
    ids = np.asarray(ids)
    backend = LikeGgml(weights or bundle.weights(), bundle)
    cache = backend.new_cache(len(ids))
    result = backend.forward(ids, cache, logits_rows=len(ids), hidden_rows=len(ids))
    answers = {"logits": result.logits}
    for k in range(mtp_blocks):
        rows = len(ids) - 1 - k
        answers[f"mtp{k}"] = backend.mtp_rows(k, ids[1 + k :], result.hidden[:rows], 0, cache)
    return answers


# (largest difference of a logit, margin below which the first token may differ); the standard
# deviation of the logits is 1. F32: only the order of sums differs. F16 and Q8_0: most rows agree
# as in F32, but a last-bit difference just before a rounding moves an input by a whole step (2^-11,
# or 1/127 of a block's largest value) and all that follows by its share. Measured over the three
# kinds and three seeds: 3e-6, 3.1e-3, 9.7e-2; the first token differed below 1.2e-3 and 4.8e-2.
BOUNDS = {"f32": (1e-5, 0.0), "f16": (5e-3, 2e-3), "q8_0": (0.15, 0.08)}
# With this seed the router never has two experts closer than 1.1e-3 at the edge of the top-k, so
# the steps of F16 cannot change a choice. No seed is safe from those of Q8_0: where routing is
# not the question every expert is chosen, and the answer is continuous in its rounding.
SEED = 3


def assert_same(
    found: dict[str, Any],
    expected: dict[str, F32],
    recipe: str,
    bounds: dict[str, tuple[float, float]] = BOUNDS,
) -> None:
    bound, margin = bounds[recipe]
    assert set(found) == set(expected)
    for name, logits in expected.items():
        difference = np.abs(found[name] - logits)
        assert float(difference.max()) < bound, (name, float(difference.max()))
        best = np.sort(logits, axis=1)
        clear = best[:, -1] - best[:, -2] >= margin
        assert clear.mean() > 0.7
        assert (found[name].argmax(axis=1) == logits.argmax(axis=1))[clear].all(), name
    if recipe == "q8_0":  # rounded alike, the first rows agree as if nothing were rounded
        assert (np.abs(found["logits"] - expected["logits"]).max(axis=1) < 1e-4)[0]


@pytest.mark.parametrize("recipe", BOUNDS)
@pytest.mark.parametrize("kind", ["flash", "v25", "mimo7b"])
def test_same_answers_several_windows_long(tmp_path: Path, kind: Any, recipe: str) -> None:
    every: dict[str, Any] = {"num_experts_per_tok": 8} if recipe == "q8_0" else {}
    if kind == "mimo7b":
        every = {}
    folder, _ = write_checkpoint(tmp_path / "source", kind, tokenizer=True, seed=SEED, **every)
    with export_bundle(folder, tmp_path / "out", recipe=recipe) as bundle:
        blocks = 3 if kind != "mimo7b" else 0
        found = run(bundle.gguf.files[0], IDS, mtp=range(blocks))
        assert_same(found, reference(bundle, blocks), recipe)


# Four times as wide, half again as deep, logits three times as large (standard deviation 2.7 to
# 3.0): sums differ more, and no row escapes every rounding step. Which ones are hit depends on the
# order our BLAS sums in: measured 1.6e-2 with two threads of it and 2.8e-2 with one.
NANO_BOUNDS = {"f32": (1e-4, 0.0), "f16": (4e-2, 5e-3)}


@pytest.mark.parametrize("recipe", NANO_BOUNDS)
def test_mimo_nano_with_its_own_tokenizer(tmp_path: Path, recipe: str) -> None:
    text = "<|im_start|>user\n把客厅的灯调暗一点, turn on guest wifi for two hours<|im_end|>" * 6
    with export_bundle("mimo-nano", tmp_path / "out", recipe=recipe) as bundle:
        assert bundle.name == "mimo-nano"
        ids = Tokenizer.from_gguf(bundle.metadata).encode(text, allow_special=True)
        assert len(ids) > bundle.config.sliding_window
        found = run(bundle.gguf.files[0], ids, mtp=(0, 1, 2), texts=[text])
        assert found.pop("tokens0").tolist() == ids
        assert_same(found, reference(bundle, 3, ids=ids), recipe, NANO_BOUNDS)


def test_the_first_mtp_block_is_accepted_as_often_as_by_llama_cpp(tmp_path: Path) -> None:
    """Greedy answers with one draft: as many drafts, and as many right ones, as llama.cpp's own
    MTP context proposes after the same tokens. Weights in f32 leave no rounding to argue about."""
    ours, theirs = [], []
    with (
        export_bundle("mimo-nano", tmp_path / "out", recipe="f32") as bundle,
        Runtime.open(tmp_path / "out", backend="ggml", draft=1, threads=1) as runtime,
    ):
        for record in held_out()[::180]:
            messages = [{"role": "user", "content": record["text"]}]
            tools = [TOOLS[name] for name in record["tools"]]
            whole = ChatTemplate(bundle.chat_template).encode(
                Tokenizer.from_gguf(bundle.metadata), messages, tools, enable_thinking=False
            )
            # Cut in the middle of what the user says, the model is on strange ground.
            for prompt in (whole, whole[:-12]):
                reply = runtime.session().generate(prompt, max_tokens=48)
                stats = reply.stats
                ours.append((stats.drafted_by_depth[0], stats.accepted_by_depth[0]))
                ids = [*prompt, *reply.token_ids]
                found = run(bundle.gguf.files[0], ids, mtp=(0,))
                best, draft = found["logits"].argmax(axis=1), found["mtp0"].argmax(axis=1)
                assert (best[len(prompt) - 1 : -1] == reply.token_ids).all(), record["id"]
                # token at + 1 is chosen; nothing is drafted for the last one within the limit
                end = len(ids) - (reply.finish_reason == "length")
                at, drafted, accepted = len(prompt) - 1, 0, 0
                while at + 2 < end:
                    hit = int(draft[at] == best[at + 1])
                    drafted, accepted, at = drafted + 1, accepted + hit, at + 1 + hit
                theirs.append((drafted, accepted))
    assert ours == theirs
    assert 0 < sum(a for _, a in ours) < sum(n for n, _ in ours)


def test_decoding_in_batches_crosses_the_window_too(tmp_path: Path) -> None:
    folder, _ = write_checkpoint(tmp_path / "source", "flash", tokenizer=True, seed=12)
    with export_bundle(folder, tmp_path / "out", recipe="f32") as bundle:
        found = run(bundle.gguf.files[0], IDS, batch=7)
        assert np.abs(found["logits"] - reference(bundle, 0)["logits"]).max() < 1e-5


def test_a_model_without_tokenizer_loads_on_ids(tmp_path: Path) -> None:
    folder, _ = write_checkpoint(tmp_path / "source", "flash", seed=13)
    ids = (IDS % 97).astype(np.int32)
    with export_bundle(folder, tmp_path / "out", recipe="f32") as bundle:
        found = run(bundle.gguf.files[0], ids)["logits"]
        backend = ReferenceBackend(bundle.weights())
        expected = backend.forward(ids, backend.new_cache(70), logits_rows=70).logits
        assert np.abs(found - expected).max() < 1e-5


def test_mxfp4_experts_passed_through(tmp_path: Path) -> None:
    folder, truth = write_checkpoint(
        tmp_path / "source", "v26", tokenizer=True, seed=SEED, num_experts_per_tok=8
    )
    recipe = Recipe.named("f32").with_overrides([("*_exps.weight", "MXFP4")])
    with export_bundle(folder, tmp_path / "out", recipe=recipe) as bundle:
        assert bundle.tensors["blk.1.ffn_up_exps.weight"].type_name == "MXFP4"
        found = run(bundle.gguf.files[0], IDS)
        # The weights of the checkpoint, not of the bundle: codes may not have changed.
        assert_same(found, reference(bundle, 0, truth), "q8_0")


def test_a_qwen2_file_may_not_hold_the_mtp_block(tmp_path: Path) -> None:
    """Why MiMo-7B's MTP block lies in a side file: stock loaders count the tensors."""
    folder, _ = write_checkpoint(tmp_path / "source", "mimo7b", tokenizer=True)
    with export_bundle(folder, tmp_path / "out", recipe="f32") as bundle:
        assert [f.name for f in bundle.gguf.files] == ["model.gguf", "model-mtp.gguf"]
        assert bundle.config.num_mtp_layers == 1
        reader = gguf.GGUFReader(bundle.gguf.files[0])
        writer = gguf.GGUFWriter(tmp_path / "one.gguf", "qwen2")
        for field in reader.fields.values():
            if not field.name.startswith(("GGUF.", "general.arch", "general.align")):
                items = field.types[1] if len(field.types) > 1 else None
                writer.add_key_value(field.name, field.contents(), field.types[0], items)
        for part in bundle.gguf.files:
            for tensor in gguf.GGUFReader(part).tensors:
                writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    with pytest.raises(LlamaCppError, match="wrong number of tensors"):
        run(tmp_path / "one.gguf", IDS)


TEXTS = [
    "turn on the guest wifi for two hours",
    "I'll say: they've GOT 12345 things, y'all -- don't we?",
    "把客厅的灯调暗一点，温度设为23度。",
    "emoji \U0001f44d\U0001f3fd and \U0001f468\u200d\U0001f469\u200d\U0001f467 ok",
    "a\n\n\nb\r\nc\t\td   e \n f",
    "   leading and trailing   ",
    "x=1+2*3/(4-5);\n\tif (a && b) { return c[0]; }",
    "日本語とカタカナ、한국어, Русский, العربية, हिन्दी",
    "<|im_start|>user\n把灯关掉<|im_end|><think></think><tool_call>",
    "\u00a0nbsp\u3000wide\u2028line \u0085 next",
    "0 00 1.5e-3 １２ ٣٤ Ⅻ ½",
]


@pytest.mark.parametrize("nano", [False, True])
def test_llama_cpp_tokenises_as_tokenizer_json_does(tmp_path: Path, nano: bool) -> None:
    from tokenizers import Tokenizer as Library

    folder = tmp_path / "source"
    if nano:
        import mimo_edge.nano

        shipped = Path(mimo_edge.nano.__file__).parent / "checkpoint"
        size = Library.from_file(str(shipped / "tokenizer.json")).get_vocab_size()
        write_checkpoint(folder, "flash", vocab_size=size + 8)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((shipped / name).read_bytes())
    else:
        write_checkpoint(folder, "flash", tokenizer=True)
    library = Library.from_file(str(folder / "tokenizer.json"))
    with export_bundle(folder, tmp_path / "out", recipe="f32") as bundle:
        found = run(bundle.gguf.files[0], texts=TEXTS)
        ours = Tokenizer.from_gguf(bundle.metadata)
        for i, text in enumerate(TEXTS):
            expected = library.encode(text, add_special_tokens=False).ids
            assert found[f"tokens{i}"].tolist() == expected, text
            assert ours.encode(text, allow_special=True) == expected, text


def test_sentencepiece_model(tmp_path: Path) -> None:
    import sentencepiece

    folder, _ = write_checkpoint(tmp_path / "source", "flash", vocab_size=400)
    (tmp_path / "text.txt").write_text("\n".join(TEXTS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=390,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.98,
        user_defined_symbols=["<|im_start|>", "<|im_end|>"],
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    with export_bundle(folder, tmp_path / "out", recipe="f32") as bundle:
        assert bundle.tokenizer_path == tmp_path / "out" / "tokenizer.model"
        texts = [t for t in TEXTS if "\u2028" not in t and "<|" not in t]
        found = run(bundle.gguf.files[0], texts=texts)
        for i, text in enumerate(texts):
            assert found[f"tokens{i}"].tolist() == model.encode(text), text


def test_metadata_is_what_llama_cpp_converts_to(tmp_path: Path) -> None:
    """Keys, types and values of spec section 5, read by gguf's own reader."""
    folder, truth = write_checkpoint(tmp_path / "source", "flash", tokenizer=True)
    with export_bundle(folder, tmp_path / "out", recipe="q4_0") as bundle:
        reader = gguf.GGUFReader(bundle.gguf.files[0])
    u32, f32 = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32
    i32s = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
    string = gguf.GGUFValueType.STRING
    c = truth.config
    expected = {
        "general.architecture": ([string], "mimo2"),
        "general.type": ([string], "model"),
        "general.alignment": ([u32], 4096),
        "general.quantization_version": ([u32], 2),
        "general.file_type": ([u32], 2),
        "mimo2.block_count": ([u32], 7),
        "mimo2.context_length": ([u32], 4096),
        "mimo2.embedding_length": ([u32], 64),
        "mimo2.feed_forward_length": ([u32], 96),
        "mimo2.attention.head_count": ([u32], 4),
        "mimo2.attention.head_count_kv": (i32s, [1, 2, 2, 1, 2, 2, 2]),
        "mimo2.attention.key_length": ([u32], 24),
        "mimo2.attention.value_length": ([u32], 16),
        "mimo2.attention.sliding_window": ([u32], 9),
        "mimo2.attention.sliding_window_pattern": (i32s, [0, 1, 1, 0, 1, 1, 1]),
        "mimo2.attention.value_scale": ([f32], np.float32(0.707)),
        "mimo2.attention.layer_norm_rms_epsilon": ([f32], np.float32(1e-5)),
        "mimo2.rope.dimension_count": ([u32], 8),
        "mimo2.rope.freq_base": ([f32], 5e6),
        "mimo2.rope.freq_base_swa": ([f32], 1e4),
        "mimo2.expert_count": ([u32], 8),
        "mimo2.expert_used_count": ([u32], 3),
        "mimo2.expert_feed_forward_length": ([u32], 32),
        "mimo2.expert_group_count": ([u32], 1),
        "mimo2.expert_group_used_count": ([u32], 1),
        "mimo2.expert_gating_func": ([u32], 2),
        "mimo2.nextn_predict_layers": ([u32], 3),
        "tokenizer.ggml.model": ([string], "gpt2"),
        "tokenizer.ggml.pre": ([string], "qwen2"),
        "tokenizer.ggml.add_bos_token": ([gguf.GGUFValueType.BOOL], False),
        "tokenizer.ggml.eos_token_id": ([u32], c.eos_token_ids[0]),
    }
    for key, (types, value) in expected.items():
        field = reader.fields[key]
        assert (field.types, field.contents()) == (types, value), key
    raw = json.loads((folder / "tokenizer.json").read_text())
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    assert len(tokens) == len(kinds) == c.vocab_size
    for token in raw["added_tokens"]:
        assert tokens[token["id"]] == token["content"]
        assert kinds[token["id"]] == (3 if token["special"] else 4)
    for token, id_ in raw["model"]["vocab"].items():
        assert tokens[id_] == token
    padding = [i for i, kind in enumerate(kinds) if kind == 5]
    assert len(padding) == 7
    assert all(tokens[i] == f"[PAD{i}]" for i in padding)
    end = reader.fields["tokenizer.ggml.padding_token_id"].contents()
    assert tokens[end] == "<|endoftext|>"
    merges = reader.fields["tokenizer.ggml.merges"].contents()
    assert [m.split(" ") for m in merges] == [list(m) for m in raw["model"]["merges"]]
