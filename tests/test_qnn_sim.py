"""Compiled for and executed on Qualcomm's HTP emulator, each in a process of its own: a bad context
ends the interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checkpoint_factory import write_checkpoint
from npu_models import Rows, tiny_npu_config
from onnx import TensorProto, helper
from tiny import random_weights

from mimo_edge.errors import ProviderError
from mimo_edge.export.onnx.activations import Activations, measure_activations
from mimo_edge.export.onnx.npu_check import CHOICE, deviations
from mimo_edge.export.onnx.npu_compile import Compiler, NpuPlan
from mimo_edge.export.onnx.npu_graphs import components, linear_of
from mimo_edge.export.onnx.npu_model import (
    CentredBias,
    float_model,
    with_outputs,
    write_weights,
)
from mimo_edge.npu_io import NpuComponent
from mimo_edge.runtimes.onnx import qnn
from mimo_edge.runtimes.onnx.isolated import Worker
from mimo_edge.runtimes.onnx.plain import PlainSession
from mimo_edge.runtimes.onnx.qnn_targets import target

REASON = qnn.why_unavailable() or ("" if qnn.emulated() else "no HTP emulator on this processor")
pytestmark = [pytest.mark.qnn_sim, pytest.mark.skipif(bool(REASON), reason=REASON or "-")]

JOBS = "mimo_edge.runtimes.onnx.npu_jobs"
CONFIG = tiny_npu_config()
WEIGHTS = random_weights(CONFIG)
BUCKETS = (32,)
# Of fp16 against f32 through a layer: 11 bits of precision, sums of 64 products.
FP16_LIMIT = 0.01


@pytest.fixture(scope="module")
def activations(tmp_path_factory: pytest.TempPathFactory) -> Activations:
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 256).astype(np.int32)
    parts = components(CONFIG, BUCKETS, 1)
    folder = tmp_path_factory.mktemp("measure")
    return measure_activations(WEIGHTS, parts, Rows(WEIGHTS), ids, folder)


def compiler(precision: Any, npu: str, found: Activations, folder: Path) -> Compiler:
    plan = NpuPlan(CONFIG, (target(npu),), precision, BUCKETS, 8)
    return Compiler(plan, target(npu), Rows(WEIGHTS), found, folder / "made", folder / "work")


@pytest.mark.parametrize(
    ("npu", "precision"),
    [("v73", "fp16"), *((npu, "int4") for npu in ("v68", "v69", "v73", "v75", "v79", "v81"))],
)
def test_every_component_compiles_reloads_and_computes_what_it_says(
    npu: str, precision: str, activations: Activations, tmp_path: Path
) -> None:
    """The compiler compares every output of every graph, router weights by expert; here nothing
    may be refused, and fp16 graphs are compared with the f32 reference graphs once more."""
    made = compiler(precision, npu, activations, tmp_path)
    try:
        parts = components(CONFIG, BUCKETS, 8)
        found = [part for component in parts for part in made.component(component)]
    finally:
        made.close()
    assert [part.precision for part in found] == [precision] * len(parts), found
    if precision == "fp16":
        for component, part in zip(parts, found, strict=True):
            compare_with_f32(component.name, part, npu, activations, tmp_path)


def compare_with_f32(
    name: str, part: NpuComponent, npu: str, activations: Activations, folder: Path
) -> None:
    component = next(c for c in components(CONFIG, BUCKETS, 8) if c.name == name)
    shape = max(part.files)
    reader = Compiler(
        NpuPlan(CONFIG, (target(npu),), "fp16", BUCKETS, 8),
        target(npu),
        Rows(WEIGHTS),
        activations,
        folder,
        folder,
    )
    feed = reader.sample(component).feed(CONFIG, component, shape)
    graph = component.build(shape, linear_of(CONFIG, "fp16"))
    write_weights(graph, CentredBias(Rows(WEIGHTS)), folder)
    model = float_model(graph)
    choice = [n for node in model.graph.node for n in node.output if n.endswith(".router.choice")]
    onnx.save(with_outputs(model, choice), folder / "f32.onnx")
    want = PlainSession(folder / "f32.onnx").run(feed)
    if choice:
        want[CHOICE] = want.pop(choice[0])
    with Worker() as worker:
        model = folder / "made" / name / target(npu).variant / part.files[shape][0]
        have = worker.call(f"{JOBS}:run_compiled", model=str(model), npu=npu, feeds=[feed])[0]
    assert set(have) == set(want) - {CHOICE}
    off = deviations(have, want, shape.tokens, CONFIG.n_routed_experts)
    assert max(off.values()) < FP16_LIMIT, (name, off)


def matmul(folder: Path, rows: int | str) -> Path:
    """x [rows, 8] times a constant."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, (8, 8), np.eye(8).ravel())
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="the_product")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, 8])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def test_a_graph_the_npu_does_not_take_is_an_error_not_a_cpu_run(tmp_path: Path) -> None:
    path = matmul(tmp_path, "any")  # no static shape
    named = r"does not run the_product \(MatMul\): Cannot get shape"
    with Worker() as worker, pytest.raises(ProviderError, match=named):
        worker.call(
            f"{JOBS}:compile_graph", source=str(path), made=str(tmp_path / "c.onnx"), npu="v73"
        )


def test_a_plug_in_is_loaded_by_its_path(tmp_path: Path) -> None:
    """The real library, as any plug-in's: a session of ours runs on it, arrays bound."""
    path = matmul(tmp_path, 4)
    code = f"""
import numpy as np
from pathlib import Path
from mimo_edge.runtimes.onnx.library import Session
from mimo_edge.runtimes.onnx.plugin import Plugin
from mimo_edge.runtimes.onnx.qnn import Qnn
from mimo_edge.runtimes.onnx.qnn_targets import target
ours = Qnn(options={{"htp_performance_mode": "burst"}}).plugin(target("v73"))
x, y = np.arange(32, dtype=np.float32).reshape(4, 8), np.zeros((4, 8), np.float32)
session = Session(Path({str(path)!r}), 1, Plugin(ours.name, ours.library, ours.options))
session.bind({{"x": x, "y": y}}).run()
print(np.abs(y - x).max() < 0.02)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True"


def test_a_damaged_context_is_an_error(tmp_path: Path) -> None:
    path = matmul(tmp_path, 4)
    x = np.arange(32, dtype=np.float32).reshape(4, 8)
    with Worker() as worker:
        names = worker.call(
            f"{JOBS}:compile_graph", source=str(path), made=str(tmp_path / "c.onnx"), npu="v73"
        )
        call = {"model": str(tmp_path / names[0]), "npu": "v73", "feeds": [{"x": x}]}
        found = worker.call(f"{JOBS}:run_compiled", **call)[0]
        np.testing.assert_allclose(found["y"], x, rtol=1e-3)
        binary = tmp_path / names[1]
        binary.write_bytes(binary.read_bytes()[: binary.stat().st_size // 2])
        with pytest.raises(ProviderError):
            worker.call(f"{JOBS}:run_compiled", **call)


def test_a_model_generates_on_the_emulator_and_drafts_change_nothing(tmp_path: Path) -> None:
    """From checkpoint to tokens, by the commands; the dense part all on the NPU."""
    source, _ = write_checkpoint(tmp_path / "source", "flash")
    bundle = tmp_path / "bundle"
    mimo("export", source, bundle, "--npu", "v73", "--npu-precision", "fp16", "--npu-context", 64)
    code = f"""
import json
from mimo_edge import Runtime
from mimo_edge.runtimes.onnx.qnn import Qnn
from mimo_edge.runtimes.onnx import qnn
common = dict(backend="onnx", context=64)
own = dict(ep_library=Qnn().plugin(None).library, ep_options={{"htp_performance_mode": "burst"}})
found = {{}}
with Runtime.open({str(bundle)!r}, **common) as rt:
    found["auto"] = rt.stats()["provider"]
qnn.emulated = lambda: False  # as on a device
with Runtime.open({str(bundle)!r}, **common) as rt:
    found["device"] = rt.stats()["provider"]["provider"]
qnn.emulated = lambda: True
for draft, more in ((0, {{}}), (3, own)):
    with Runtime.open({str(bundle)!r}, ep="qnn", draft=draft, **common, **more) as rt:
        reply = rt.session().generate(list(range(3, 30)), max_tokens=12, temperature=0)
        found[draft] = [reply.token_ids, rt.stats()["provider"]]
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["0"][0] == found["3"][0]
    stats = found["3"][1]
    assert stats["provider"] == qnn.PROVIDER
    assert stats["emulated"]
    assert stats["on_npu"] == stats["components"]
    assert stats["on_cpu"] == []
    assert found["auto"]["provider"] == "CPUExecutionProvider"
    assert "emulator" in found["auto"]["reason"]
    assert found["device"] == qnn.PROVIDER


@pytest.mark.slow
def test_a_layer_of_real_width_compiles_and_computes_what_it_says() -> None:
    """MiMo-V2-Flash's width, one sliding layer with its router, single tokens: int4 stays int4."""
    tool = Path(__file__).parents[1] / "tools" / "npu_layer.py"
    done = subprocess.run(
        [sys.executable, str(tool), "--npu", "v79"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["precision"], found["reason"]) == ("int4", "")
    assert found["context_bytes"] < 0.6 * found["matrix_parameters"]


def mimo(*arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mimo_edge", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
