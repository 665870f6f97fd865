"""The memory budget against what the backend really allocates, and its refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from make_random_model import write_model

from mimo_edge.budget import CHUNKS, Budget, graph_bytes, kv_bytes, plan
from mimo_edge.config import MimoConfig
from mimo_edge.errors import DeviceError, UsageError
from mimo_edge.experts.table import ExpertTable
from mimo_edge.gguf_file import GgufFile, TensorInfo
from mimo_edge.gguf_meta import expected_shapes
from mimo_edge.known_models import known_model
from mimo_edge.kv_format import KV_FORMATS
from mimo_edge.runtimes.ggml.backend import GgmlBackend
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.expert_source import CachedExperts
from mimo_edge.runtimes.ggml.raw import GgufTensors

MIB = 1 << 20
WIDE = tiny.tiny_config(
    hidden_size=256,
    num_attention_heads=8,
    num_key_value_heads=2,
    swa_num_key_value_heads=4,
    head_dim=48,
    v_head_dim=32,
    intermediate_size=1024,
    moe_intermediate_size=128,
    n_routed_experts=24,
    num_experts_per_tok=4,
    sliding_window=32,
    vocab_size=2000,
)
CONFIGS = {
    "tiny": tiny.tiny_config(),
    "wide": WIDE,
    "dense": tiny.tiny_mimo7b_config(num_mtp_layers=0),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for name, config in CONFIGS.items():
        made[name] = folder / f"{name}.gguf"
        write_model(made[name], config, experts="Q8_0", dense="Q8_0", head="Q8_0")
    return made


def line(budget: Budget, name: str) -> int:
    return next(line.nbytes for line in budget.lines if line.name == name)


def opened(path: Path, config: MimoConfig, streamed: bool, chunk: int) -> GgmlBackend:
    file = GgufFile.open(path)

    def experts(device: Device) -> CachedExperts:
        return CachedExperts(device, ExpertTable.from_gguf(file, config), 8)

    return GgmlBackend(
        GgufTensors(config, [file]),
        threads=1,
        chunk=chunk,
        experts=experts if streamed else None,
    )


@pytest.mark.parametrize(
    ("name", "streamed"),
    [("tiny", False), ("tiny", True), ("wide", False), ("wide", True), ("dense", False)],
)
@pytest.mark.parametrize("chunk", [32, 256])
def test_graphs_take_what_was_planned(
    files: dict[str, Path], name: str, streamed: bool, chunk: int
) -> None:
    """Scratch and kept graphs after every kind of pass: no more than planned, and not far less
    (the plan counts every kept graph at its largest, and one that is being replaced)."""
    config, context = CONFIGS[name], 1200
    backend = opened(files[name], config, streamed, chunk)
    try:
        cache = backend.new_cache(context, 4)
        rng = np.random.default_rng(0)
        sizes = [chunk, *range(1, 17), chunk, chunk - 1, 4]
        for size in sizes:
            ids = rng.integers(0, config.vocab_size, size).astype(np.int32)
            found = backend.forward(ids, cache, logits_rows=min(4, size), hidden_rows=size)
            for depth in range(config.num_mtp_layers):
                backend.mtp_forward(depth, ids, found.hidden, cache.length - size, cache)
        for size in range(1, 17):  # the larger graphs last: they are kept
            ids = rng.integers(0, config.vocab_size, size).astype(np.int32)
            backend.forward(ids, cache, logits_rows=min(4, size), hidden_rows=size)
        real = backend.scratch_bytes + cache.graphs.nbytes
        planned = graph_bytes(config, context, chunk, streamed)
        assert real <= planned < 6 * real
    finally:
        backend.close()


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_take_what_was_planned(files: dict[str, Path], name: str) -> None:
    config = CONFIGS[name]
    with GgufFile.open(files[name]) as file:
        budget = plan(config, file.tensors, 256)
    for streamed in (False, True) if config.n_routed_experts else (False,):
        backend = opened(files[name], config, streamed, 64)
        try:
            real = sum(backend.weight_bytes.values())
            planned = line(budget, "weights")
            if config.num_mtp_layers:
                planned += line(budget, "MTP")
            if not streamed and config.n_routed_experts:
                planned += line(budget, "experts")
            assert real <= planned < 1.1 * real
        finally:
            backend.close()


# Heads of whole q8_0 blocks, two global and two sliding layers.
BLOCKS = {
    "hybrid": tiny.tiny_config(head_dim=96, v_head_dim=64),
    "dense": tiny.tiny_mimo7b_config(hidden_size=128, head_dim=32, v_head_dim=32, num_mtp_layers=0),
}


@pytest.mark.parametrize("kv_type", KV_FORMATS)
@pytest.mark.parametrize("name", BLOCKS)
def test_caches_take_what_was_planned(tmp_path: Path, name: str, kv_type: str) -> None:
    config = BLOCKS[name]
    path = tmp_path / "m.gguf"
    write_model(path, config, experts="Q8_0", dense="Q8_0", head="Q8_0")
    file = GgufFile.open(path)
    planned = kv_bytes(config, 256, kv_type)
    assert line(plan(config, file.tensors, 256, kv_type=kv_type), "KV cache") == planned
    backend = GgmlBackend(GgufTensors(config, [file]), threads=1, kv_type=kv_type)
    try:
        cache = backend.new_cache(256, 4)
        ids = np.zeros(256, np.int32)
        hidden = backend.forward(ids, cache, hidden_rows=256).hidden
        for depth in range(config.num_mtp_layers):
            backend.mtp_forward(depth, ids, hidden, 0, cache)
        assert cache.nbytes() <= planned < cache.nbytes() + 20 * 4096
        real = backend.scratch_bytes + cache.graphs.nbytes
        assert real <= graph_bytes(config, 256, 512, False, kv_type)
    finally:
        backend.close()


def test_a_quantised_cache_of_the_real_model_takes_about_half() -> None:
    """Per token: 9 global layers of 4 heads of 192 + 128 (spec section 6)."""
    config = known_model("MiMo-V2-Flash")
    sizes = {}
    for kv_type in KV_FORMATS:
        short, long = (kv_bytes(config, n, kv_type) for n in (8192, 16384))
        sizes[kv_type] = (long - short) / 8192
    assert sizes == {"f16": 23040, "q8_0": 9 * 4 * 320 / 32 * 34, "f32": 46080}
    with pytest.raises(UsageError, match="kv_type 'q4_0'"):
        plan(*flash(), 4096, kv_type="q4_0")
    with pytest.raises(UsageError, match="head_dim = 24"):
        plan(tiny.tiny_config(), {}, 4096, kv_type="q8_0")


# --- What is left for experts -------------------------------------------------------------------


def flash(experts: int = 256) -> tuple[MimoConfig, dict[str, TensorInfo]]:
    """MiMo-V2-Flash with 4-bit matrices, as tensors of no file."""
    config = known_model("MiMo-V2-Flash")
    tensors = {}
    for name, shape in expected_shapes(config).items():
        elements = int(np.prod(shape, dtype=np.int64))
        if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):
            kind, nbytes = 0, 4 * elements
        else:
            kind, nbytes = 2, elements // 32 * 18
        tensors[name] = TensorInfo(name, kind, shape, 4096, nbytes, Path("x"))
    return config, tensors


def test_the_real_model_in_phone_memory() -> None:
    config, tensors = flash()
    for gib in (8, 12, 16):
        budget = plan(config, tensors, 4096, gib << 30)
        assert budget.streamed
        assert gib << 30 >= budget.nbytes > (gib << 30) - budget.slot_bytes - MIB
        assert budget.slots * budget.slot_bytes == line(budget, "expert slots")
        assert budget.chunk in CHUNKS
    assert budget.experts == 47 * 256
    assert budget.slot_bytes == 3 * 4096 * 2048 // 32 * 18
    more = plan(config, tensors, 4096, 16 << 30).slots
    assert more > plan(config, tensors, 4096, 12 << 30).slots
    assert more > plan(config, tensors, 65536, 16 << 30).slots


def test_too_little_memory_is_refused_with_the_table() -> None:
    config, tensors = flash()
    with pytest.raises(DeviceError) as caught:
        plan(config, tensors, 4096, 1 << 30)
    message = str(caught.value)
    for word in ("weights", "KV cache", "expert slots", "graphs", "process", "allow"):
        assert word in message
    # what it asks for is enough, and a slot less is not
    need = int(message.split(" bytes)")[0].rsplit("(", 1)[1])
    assert plan(config, tensors, 4096, need + need // 16).slots >= config.num_experts_per_tok
    with pytest.raises(DeviceError):
        plan(config, tensors, 4096, need - need // 16)


def test_without_a_bound_or_with_enough_everything_is_resident() -> None:
    config, tensors = flash()
    whole = plan(config, tensors, 4096)
    assert not whole.streamed
    assert whole.ram is None
    assert plan(config, tensors, 4096, whole.nbytes).lines == whole.lines
    assert plan(config, tensors, 4096, whole.nbytes - 1).streamed


def test_a_model_without_experts_is_refused(files: dict[str, Path]) -> None:
    config = CONFIGS["dense"]
    with GgufFile.open(files["dense"]) as file:
        whole = plan(config, file.tensors, 256).nbytes
        with pytest.raises(DeviceError, match="no experts"):
            plan(config, file.tensors, 256, whole - 1)


def test_what_the_process_holds_already_counts(files: dict[str, Path]) -> None:
    config = CONFIGS["wide"]
    with GgufFile.open(files["wide"]) as file:
        small = plan(config, file.tensors, 256, process_bytes=100 * MIB)
        large = plan(config, file.tensors, 256, process_bytes=300 * MIB)
    assert large.nbytes - small.nbytes == 200 * MIB


def test_the_table_is_printable_and_json_ready() -> None:
    import json

    config, tensors = flash()
    budget = plan(config, tensors, 4096, 8 << 30)
    data = json.loads(json.dumps(budget.to_dict()))
    assert sum(data["lines"].values()) == data["total"] == budget.nbytes
    assert [row[0] for row in budget.rows()] == [*data["lines"], "total"]
