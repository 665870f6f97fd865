"""mimo-nano on the ONNX backend: the answers of the other backends, and what few bits cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mimo_edge.api import Runtime
from mimo_edge.export.pipeline import export_bundle
from mimo_edge.nano.commands import DEMO_TOOLS

COMMANDS = (
    "turn on guest wifi for two hours",
    "把客厅的灯调暗一点",
    "set an alarm for 7 am tomorrow",
)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nano") / "f32"
    export_bundle("mimo-nano", path, recipe="f32", formats=("onnx",)).close()
    return path


def answers(model: str | Path, backend: str, draft: int) -> tuple[list[tuple[int, ...]], float]:
    """Token ids of every command's answer, and tokens gained per verify."""
    with Runtime.open(model, backend=backend, threads=1, context=600, draft=draft) as runtime:
        found = []
        for command in COMMANDS:
            session = runtime.session(tools=DEMO_TOOLS, enable_thinking=False)
            found.append(session.generate(command, max_tokens=40).token_ids)
        return found, runtime.stats()["tokens_per_verify"]


def test_f32_answers_are_the_reference_s_token_for_token(exact: Path) -> None:
    want, _ = answers("mimo-nano", "reference", 0)
    plain, _ = answers(exact, "onnx", 0)
    drafted, per_verify = answers(exact, "onnx", 3)
    assert plain == want
    assert drafted == want
    assert per_verify > 2  # the blocks' drafts are good, not only harmless


def test_logits_are_the_reference_s(exact: Path) -> None:
    """A prompt of many windows and several chunks, one global layer's cache grown five times."""
    with (
        Runtime.open(exact, backend="onnx", threads=1, context=600) as ours,
        Runtime.open("mimo-nano", threads=1, context=600) as reference,
    ):
        ids = np.random.default_rng(0).integers(0, ours.config.vocab_size, 300).tolist()
        found, want = ours.logits(ids), reference.logits(ids)
    assert np.abs(found - want).max() <= 1e-4 * np.abs(want).max()
