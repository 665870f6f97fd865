"""tools/make_random_model.py: files that load, with weights and routes that flatter nobody."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mimo_edge.gguf_file import GgufFile
from mimo_edge.gguf_meta import check_tensors, read_config
from mimo_edge.gguf_weights import GgufWeights
from mimo_edge.runtimes.reference import ReferenceBackend

TOOL = Path(__file__).parent.parent / "tools" / "make_random_model.py"


def make(out: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), str(out), *args], capture_output=True, text=True, timeout=120
    )


def open_model(path: Path) -> GgufWeights:
    file = GgufFile.open(path)
    config = read_config(file.metadata, file.tensors, path)
    check_tensors(config, file.tensors, path)
    return GgufWeights(file, config)


def test_a_tiny_model_is_complete_and_zero_mean(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    done = make(path, "--tiny", "--expert-format", "Q8_0", "--dense-format", "Q4_K")
    assert done.returncode == 0, done.stderr
    assert f"{path.stat().st_size} bytes" in done.stdout
    weights = open_model(path)
    config = weights.config
    assert (config.num_hidden_layers, config.num_mtp_layers) == (4, 3)
    assert config.hybrid_layer_pattern == (0, 1, 1, 1)
    assert config.moe_layer_freq == (0, 1, 1, 1)
    for name in ("blk.0.ffn_down.weight", "blk.2.attn_output.weight", "output.weight"):
        w = weights.tensor(name)
        # The mean of n values of spread s is off by s / sqrt(n): five times that is never.
        assert abs(w.mean()) < 5 * w.std() / np.sqrt(w.size)
        assert w.std() == pytest.approx(w.shape[1] ** -0.5, rel=0.05)
    first, second = (weights.expert(1, e).gate for e in (0, 1))
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.05
    assert not list(tmp_path.glob("*.partial"))


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    for path, seed in ((a, "1"), (b, "1"), (c, "2")):
        assert make(path, "--tiny", "--seed", seed).returncode == 0
    assert a.read_bytes() == b.read_bytes()
    assert a.read_bytes() != c.read_bytes()


def test_skew_makes_favourites(tmp_path: Path) -> None:
    busiest = []
    for skew in ("0", "2"):
        path = tmp_path / f"{skew}.gguf"
        assert make(path, "--tiny", "--skew", skew, "--mtp", "0").returncode == 0
        counts = np.zeros(8)

        class Count:
            def matmul(self, name: str, x: object) -> None: ...
            def expert_matmul(self, name: str, expert: int, x: object) -> None: ...
            def route(self, layer: int, ids: np.ndarray, weights: object) -> None:
                if layer == 1:
                    counts[:] += np.bincount(ids.ravel(), minlength=8)  # noqa: B023

        backend = ReferenceBackend(open_model(path), observer=Count())
        ids = np.random.default_rng(0).integers(0, 512, 200, np.int32)
        backend.forward(ids, backend.new_cache(200))
        busiest.append(np.sort(counts)[-2:].sum() / counts.sum())
    assert busiest[0] < 0.5  # two of eight experts, 2 chosen: 0.25 when spread evenly
    assert busiest[1] > 0.9


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--layers", "0"], "--layers 0"),
        (["--layers", "99"], "1 to 48"),
        (["--tiny", "--expert-format", "Q9"], "Q9"),
        (["--experts", "4", "--layers", "2"], "8 experts per token out of 4"),
    ],
)
def test_bad_arguments_leave_nothing(tmp_path: Path, args: list[str], message: str) -> None:
    done = make(tmp_path / "x.gguf", *args)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    done = make(tmp_path / "no" / "folder.gguf", "--tiny")
    assert done.returncode == 1
    assert "cannot write" in done.stderr
