"""tools/make_random_model.py: the geometry asked for, experts used evenly or as skewed as asked."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import make_random_model as TOOL
import pytest
from random_model import ROOT

from mimo_edge.bundle import Bundle


def test_real_geometry_with_the_layers_and_experts_asked_for() -> None:
    config = TOOL.scaled_config("MiMo-V2-Flash", 4, 256, None, 3)
    assert (config.hidden_size, config.moe_intermediate_size) == (4096, 2048)
    assert (config.n_routed_experts, config.num_experts_per_tok) == (256, 8)
    assert sum(config.moe_layer_freq) == 3
    assert TOOL.scaled_config("MiMo-V2-Flash", 6, 16, 4096, 0).n_routed_experts == 16


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> dict[float, list[TOOL.LayerRoutes]]:
    """Routes of 96 tokens by skew, in 64 experts of which a token takes 4."""
    path = tmp_path_factory.mktemp("routes") / "m.gguf"
    config = replace(
        TOOL.tiny_config("MiMo-V2-Flash", 0), n_routed_experts=64, num_experts_per_tok=4
    )
    found = {}
    for skew in (0.0, 0.1, 1.0):
        TOOL.write_model(path, config, skew=skew)
        found[skew] = TOOL.routing(path, 96)
    return found


def test_zero_mean_weights_use_experts_evenly(
    used: dict[float, list[TOOL.LayerRoutes]],
) -> None:
    assert len(used[0.0]) == 3
    for layer in used[0.0]:
        assert layer.distinct >= 0.98 * layer.expected
        # An eighth of the experts; the busiest of even uses come out somewhat above by chance.
        assert 0.125 <= layer.busiest < 0.3
        assert layer.repeated < 2 * 4 / 64


def test_skew_makes_favourites(used: dict[float, list[TOOL.LayerRoutes]]) -> None:
    for even, some, much in zip(used[0.0], used[0.1], used[1.0], strict=True):
        assert even.busiest < some.busiest < much.busiest
        assert even.repeated < some.repeated < much.repeated
        assert much.distinct < even.distinct
        assert much.busiest > 0.9


def test_the_script_writes_a_model_and_says_how_it_routes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    command = [sys.executable, str(ROOT / "tools" / "make_random_model.py"), str(path), "--tiny"]
    done = subprocess.run([*command, "--check", "16"], capture_output=True, text=True, check=True)
    assert done.stdout.count(" of 8 experts used by 16 tokens (evenly: 7.9)") == 3
    with Bundle.open(path) as bundle:
        assert bundle.config.n_routed_experts == 8
    assert list(tmp_path.iterdir()) == [path]  # no temporary file left
    refused = subprocess.run([*command, "--layers", "99"], capture_output=True, check=False)
    assert refused.returncode == 0  # --tiny has its own layers
    command.remove("--tiny")
    refused = subprocess.run([*command, "--layers", "99"], capture_output=True, check=False)
    assert refused.returncode == 2
    assert b"--layers 99" in refused.stderr
