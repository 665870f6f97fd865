"""The reference against committed vectors that transformers computed: needs no torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mimo_edge.config import MimoConfig
from mimo_edge.runtimes.reference import ReferenceBackend
from mimo_edge.runtimes.weights import DictWeights

FILES = sorted((Path(__file__).parent / "golden").glob("reference_*.npz"))
TOLERANCE = 1e-5  # f32 against f32, other order of sums; 1e-4 is the project's promise


def test_the_vectors_are_there() -> None:
    assert [f.stem for f in FILES] == [
        f"reference_{name}" for name in ("hybrid", "mimo7b", "narrow", "wide")
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda f: f.stem)
@pytest.mark.parametrize("chunk", [1000, 7, 1])
def test_equals_the_vector(path: Path, chunk: int) -> None:
    with np.load(path) as vector:
        config = MimoConfig.from_dict(json.loads(str(vector["config"])))
        tensors = {
            name.removeprefix("weights/"): vector[name].astype(np.float32)
            for name in vector.files
            if name.startswith("weights/")
        }
        ids, logits, hidden = vector["token_ids"], vector["logits"], vector["hidden"]
    if config.family == "mimo_v2":
        assert len(ids) > 4 * config.sliding_window
    backend = ReferenceBackend(DictWeights(config, tensors))
    cache = backend.new_cache(len(ids))
    ours = []
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        got = backend.forward(part, cache, logits_rows=len(part), hidden_rows=1)
        ours.append(got.logits)
    mine = np.concatenate(ours)
    assert np.abs(mine - logits).max() <= TOLERANCE * np.abs(logits).max()
    assert np.array_equal(mine.argmax(-1), logits.argmax(-1))
    assert np.abs(got.hidden[0] - hidden).max() <= TOLERANCE * np.abs(hidden).max()
