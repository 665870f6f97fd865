"""The ONNX backend inside a memory cgroup the kernel keeps: experts streamed, the plan true."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoint_factory import write_checkpoint

from mimo_edge.bench import page_cache
from mimo_edge.bench.cgroup import MemoryCgroup
from mimo_edge.errors import DeviceError
from mimo_edge.export.pipeline import export_bundle

# Opens the bundle argv[1] with the bound argv[2] and answers; drafts on.
CODE = """
import json, sys
from mimo_edge import Runtime
path, ram = sys.argv[1], int(sys.argv[2]) or None
with Runtime.open(path, backend="onnx", threads=1, context=96, ram=ram, draft=3) as rt:
    tokens = []
    for start in (3, 30):
        ids = list(range(start, start + 24))
        tokens.append(rt.session().generate(ids, max_tokens=24, temperature=0).token_ids)
    print(json.dumps({"tokens": tokens, **rt.stats()}))
"""


def started(path: Path, ram: int, group: MemoryCgroup) -> subprocess.CompletedProcess[str]:
    """CODE in `group`, with nothing of the bundle in the page cache before: what it reads counts
    too."""
    page_cache.drop([file for file in path.rglob("*") if file.is_file()])
    command = group.command([sys.executable, "-c", CODE, str(path), str(ram)])
    return subprocess.run(command, capture_output=True, text=True, check=False)


def answered(path: Path, ram: int, group: MemoryCgroup) -> dict[str, Any]:
    """What CODE prints."""
    done = started(path, ram, group)
    assert done.returncode == 0, done.stderr
    assert group.kills() == 0
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_experts_are_streamed_within_a_cap_the_kernel_keeps(tmp_path: Path) -> None:
    """113 MB of experts, room for a seventh of them: the tokens are those without a cap, and
    without the runtime's bound the kernel ends the process."""
    wide: dict[str, Any] = {
        "hidden_size": 256,
        "moe_intermediate_size": 768,
        "n_routed_experts": 16,
    }
    source, _ = write_checkpoint(tmp_path / "source", "flash_bf16", **wide)
    bundle = tmp_path / "out"
    export_bundle(source, bundle, recipe="f32", formats=("both",)).close()
    try:
        group = MemoryCgroup.create()
    except DeviceError as error:
        pytest.skip(str(error))
    with group:
        free = answered(bundle, 0, group)
    assert free["budget"]["slots"] == 48
    experts = free["budget"]["lines"]["expert slots"]
    ram = free["budget"]["total"] - experts * 4 // 5
    # The plan counts libraries whose pages other processes hold already: what the kernel counts
    # for us is less. Whoever has all experts in memory needs more than this for them alone.
    cap = min(ram, experts)
    with MemoryCgroup.create(cap) as group:
        capped = answered(bundle, ram, group)
        peak = group.peak_bytes()
    assert capped["tokens"] == free["tokens"]
    assert capped["budget"]["total"] <= ram
    assert capped["budget"]["slots"] < 48 // 4
    assert capped["experts"]["misses"] > 48  # experts are read again, not only once
    assert capped["experts"]["evictions"] > 0
    assert peak is None or peak <= cap
    with MemoryCgroup.create(cap) as group:
        assert started(bundle, 0, group).returncode == -signal.SIGKILL
        assert group.kills() > 0
