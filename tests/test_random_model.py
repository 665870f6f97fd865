"""tools/make_random_model.py: files that load, with the geometry asked for, and weights and routes
that flatter nobody unless asked to."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import make_random_model as tool
import numpy as np
import pytest

from mimo_edge.bundle import Bundle
from mimo_edge.gguf_file import GgufFile
from mimo_edge.gguf_meta import check_tensors, read_config
from mimo_edge.gguf_weights import GgufWeights


def make(out: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, tool.__file__, str(out), *args],
        capture_output=True,
        text=True,
        timeout=120,
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


def test_real_geometry_with_the_layers_and_experts_asked_for() -> None:
    config = tool.scaled_config("MiMo-V2-Flash", 4, 256, None, 3)
    assert (config.hidden_size, config.moe_intermediate_size) == (4096, 2048)
    assert (config.n_routed_experts, config.num_experts_per_tok) == (256, 8)
    assert sum(config.moe_layer_freq) == 3
    assert tool.scaled_config("MiMo-V2-Flash", 6, 16, 4096, 0).n_routed_experts == 16


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> dict[float, list[tool.LayerRoutes]]:
    """Routes of 96 tokens by skew, in 64 experts of which a token takes 4."""
    path = tmp_path_factory.mktemp("routes") / "m.gguf"
    config = replace(
        tool.tiny_config("MiMo-V2-Flash", 0), n_routed_experts=64, num_experts_per_tok=4
    )
    found = {}
    for skew in (0.0, 0.1, 1.0):
        tool.write_model(path, config, skew=skew)
        found[skew] = tool.routing(path, 96)
    return found


def test_zero_mean_weights_use_experts_evenly(
    used: dict[float, list[tool.LayerRoutes]],
) -> None:
    assert len(used[0.0]) == 3
    for layer in used[0.0]:
        assert layer.distinct >= 0.98 * layer.expected
        # An eighth of the experts; the busiest of even uses come out somewhat above by chance.
        assert 0.125 <= layer.busiest < 0.3
        assert layer.repeated < 2 * 4 / 64


def test_skew_makes_favourites(used: dict[float, list[tool.LayerRoutes]]) -> None:
    for even, some, much in zip(used[0.0], used[0.1], used[1.0], strict=True):
        assert even.busiest < some.busiest < much.busiest
        assert even.repeated < some.repeated < much.repeated
        assert much.distinct < even.distinct
        assert much.busiest > 0.9


def test_the_script_says_how_a_model_routes(tmp_path: Path) -> None:
    done = make(tmp_path / "m.gguf", "--tiny", "--check", "16")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" of 8 experts used by 16 tokens (evenly: 7.9)") == 3


def test_a_dense_model_has_no_mtp_blocks_and_no_routes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    done = make(path, "--tiny", "--model", "MiMo-7B", "--check", "16")
    assert done.returncode == 0, done.stderr
    assert "experts" not in done.stdout
    with Bundle.open(path) as bundle:
        assert bundle.config.num_mtp_layers == 0
    refused = make(tmp_path / "n.gguf", "--tiny", "--model", "MiMo-7B", "--mtp", "1")
    assert refused.returncode == 2
    assert "--mtp 0" in refused.stderr
