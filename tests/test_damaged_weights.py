"""NaN and Inf in the weights: an error when the model is opened or when it shows, never an answer;
and the session goes on where the damage is not met."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from checkpoint_factory import write_checkpoint
from streamed import open_streamed

from mimo_edge.api import Runtime
from mimo_edge.bundle import Bundle
from mimo_edge.chat_template import ChatTemplate
from mimo_edge.config import MimoConfig
from mimo_edge.errors import BundleError, GenerationError
from mimo_edge.export.pipeline import export_bundle
from mimo_edge.model_source import Model
from mimo_edge.runtimes.base import Backend
from mimo_edge.runtimes.ggml.backend import GgmlBackend
from mimo_edge.runtimes.ggml.bindings import TYPE_F32
from mimo_edge.runtimes.ggml.raw import PackedTensors, RawTensor
from mimo_edge.runtimes.reference import ReferenceBackend
from mimo_edge.runtimes.weights import DictWeights
from mimo_edge.session import Session

CONFIG = tiny.tiny_config(eos_token_ids=())
MIMO7B = tiny.tiny_mimo7b_config(eos_token_ids=())
PROMPT = [5, 17, 3, 40, 2, 9, 33, 8] * 3
BACKENDS = ("ggml", "reference")
FIRST_MTP = CONFIG.num_hidden_layers


def backend_of(kind: str, weights: DictWeights) -> Backend:
    if kind == "reference":
        return ReferenceBackend(weights)
    # Not `pack`: it refuses NaN.
    tensors = {
        name: RawTensor(TYPE_F32, values.shape, values.reshape(-1).view(np.uint8))
        for name, values in weights._tensors.items()
    }
    return GgmlBackend(PackedTensors(weights.config, tensors), threads=1)


def runtime_of(kind: str, weights: DictWeights, draft: int = 0) -> Runtime:
    model = Model("m", backend_of(kind, weights), None, ChatTemplate(), frozenset())
    return Runtime(model, 256, draft)


def damaged(config: MimoConfig, name: str, place: object, bad: float) -> DictWeights:
    weights = tiny.random_weights(config, 2)
    tensors = {n: weights.tensor(n) for n in weights._tensors}
    tensors[name] = tensors[name].copy()
    tensors[name][place] = bad  # type: ignore[call-overload]
    return DictWeights(config, tensors)


# One element of a vector or router, a row of a matrix: each meets every token.
PLACES = {
    "attn_norm.weight": 3,
    "ffn_norm.weight": 3,
    "attn_sinks.weight": 1,
    "exp_probs_b.bias": 2,
    "ffn_gate_inp.weight": (2, 5),
    "attn_q.weight": slice(None),
    "attn_k.weight": slice(None),
    "attn_v.weight": 4,
    "attn_output.weight": 4,
    "ffn_gate_exps.weight": slice(None),
    "ffn_up_exps.weight": slice(None),
    "ffn_down_exps.weight": slice(None),
}
NAMES = {f"blk.2.{name}": place for name, place in PLACES.items()} | {
    "blk.0.ffn_gate.weight": slice(None),
    "blk.0.ffn_up.weight": 4,
    "blk.0.ffn_down.weight": 4,
    "output_norm.weight": 3,
    "output.weight": 40,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_no_answer_comes_from_damaged_weights(backend: str, bad: float, name: str) -> None:
    weights = damaged(CONFIG, name, NAMES[name], bad)
    with pytest.raises((GenerationError, BundleError), match="NaN or Inf") as caught:
        runtime_of(backend, weights).session().generate(PROMPT, max_tokens=8)
    # What is small enough is checked when the model is opened, with its name.
    vector = weights.tensor(name).ndim == 1
    assert isinstance(caught.value, BundleError) == (backend == "ggml" and vector) or (
        name == "blk.2.ffn_gate_inp.weight"
    )
    if vector:
        assert name in str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_biases(backend: str, name: str) -> None:
    weights = damaged(MIMO7B, f"blk.1.attn_{name}.bias", 3, np.nan)
    with pytest.raises((GenerationError, BundleError), match="NaN or Inf"):
        runtime_of(backend, weights).session().generate(PROMPT, max_tokens=8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "name", ["nextn.eh_proj.weight", "attn_output.weight", "ffn_down.weight", "nextn.hnorm.weight"]
)
def test_a_damaged_mtp_block_stops_drafting_only(backend: str, bad: float, name: str) -> None:
    weights = damaged(CONFIG, f"blk.{FIRST_MTP}.{name}", 3, bad)
    good = runtime_of(backend, tiny.random_weights(CONFIG, 2))
    with pytest.raises((GenerationError, BundleError), match="NaN or Inf"):
        runtime_of(backend, weights, draft=3).session().generate(PROMPT, max_tokens=8)
    if name.endswith("norm.weight"):
        return  # cannot even be opened, or not without drafting
    plain = runtime_of(backend, weights, draft=0).session().generate(PROMPT, max_tokens=8)
    assert plain.token_ids == good.session().generate(PROMPT, max_tokens=8).token_ids


def goes_on(session: Session, fresh: Session, bad_token: int) -> None:
    """Meets the damage between two good turns."""
    first = session.generate(PROMPT, max_tokens=4).token_ids
    assert first == fresh.generate(PROMPT, max_tokens=4).token_ids
    for count in (1, 30):  # in a small batch, and in one that overwrites rows
        with pytest.raises(GenerationError, match="NaN or Inf"):
            session.generate([bad_token] * count, max_tokens=4)
    second = session.generate([7, 8], max_tokens=6).token_ids
    assert second == fresh.generate([7, 8], max_tokens=6).token_ids


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("draft", [0, 3])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_session_goes_on_without_the_damaged_token(
    backend: str, draft: int, bad: float
) -> None:
    token = 90
    weights = damaged(CONFIG, "token_embd.weight", token, bad)
    runtime = runtime_of(backend, weights, draft)
    fresh = runtime_of(backend, tiny.random_weights(CONFIG, 2)).session()
    goes_on(runtime.session(), fresh, token)


# --- streamed experts -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a split GGUF in f32, without a manifest and so without checksums."""
    folder = tmp_path_factory.mktemp("damaged")
    source, _ = write_checkpoint(folder / "source", "flash", tokenizer=False)
    export_bundle(source, folder / "bundle", recipe="f32").close()
    return folder / "bundle"


def without_manifest(bundle: Path, target: Path) -> Path:
    target.mkdir()
    for file in bundle.glob("*.gguf"):
        shutil.copy(file, target)
    return min(target.glob("model-*.gguf"))


@pytest.mark.parametrize("part", ["gate", "up", "down"])
@pytest.mark.parametrize("draft", [0, 3])
def test_a_damaged_expert_without_checksum(
    bare: Path, tmp_path: Path, part: str, draft: int
) -> None:
    model = without_manifest(bare, tmp_path / "m")
    runtime, _ = open_streamed(model, 4)
    with runtime:
        want = runtime.session().generate(PROMPT, max_tokens=6).token_ids
    with Bundle.open(model) as bundle:
        experts = bundle.config.n_routed_experts
        places = [getattr(bundle.expert(2, e), part) for e in range(experts)]
    saved = []
    for file, offset, nbytes in places:
        with file.open("r+b") as out:
            out.seek(offset)
            saved.append(out.read(nbytes))
            out.seek(offset)
            out.write(np.full(nbytes // 4, np.nan, np.float32).tobytes())
    runtime, _ = open_streamed(model, 4, draft)
    with runtime:
        session = runtime.session()
        with pytest.raises(GenerationError, match="NaN or Inf"):
            session.generate(PROMPT, max_tokens=6)
    for (file, offset, _), content in zip(places, saved, strict=True):
        with file.open("r+b") as out:
            out.seek(offset)
            out.write(content)
            os.fsync(out.fileno())
    runtime, _ = open_streamed(model, 4, draft)
    with runtime:
        assert runtime.session().generate(PROMPT, max_tokens=6).token_ids == want
