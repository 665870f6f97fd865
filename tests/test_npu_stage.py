"""The NPU stage of an export with a stand-in for the compiler: what it compiles runs on the CPU as
the graph says, unless a test has it refuse or compute something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checkpoint_factory import write_checkpoint

from mimo_edge.api import Runtime
from mimo_edge.bundle import Bundle
from mimo_edge.errors import ProviderError, UsageError
from mimo_edge.export import npu_stage, pipeline
from mimo_edge.export.pipeline import export_bundle
from mimo_edge.manifest import Manifest
from mimo_edge.npu_io import INDEX_NAME, NpuComponent, read_index
from mimo_edge.onnx_io import FOLDER, PACKAGE_MANIFEST
from mimo_edge.runtimes.onnx import npu_package, qnn
from mimo_edge.runtimes.onnx.isolated import Worker
from mimo_edge.runtimes.onnx.plain import PlainSession

Refuse = Callable[[str], None]


class StandIn:
    """A compiler that keeps the graph as it is. `refuse` is asked with COMPONENT/FILE before each
    graph; `spoil` changes outputs; `compiled` lists what was asked for."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.refuse: Refuse = lambda _: None
        self.spoil: Callable[[str, dict[str, Any]], None] = lambda _, __: None

    def call(self, function: str, /, **arguments: Any) -> Any:
        if function.endswith(":compile_graph"):
            return self._compile(Path(arguments["source"]), Path(arguments["made"]))
        model = Path(arguments["model"])
        label = f"{model.parent.parent.name}/{model.stem}"
        found = []
        for feed in arguments["feeds"]:
            names = {i.name for i in onnx.load(str(model)).graph.input}
            out = PlainSession(model).run({n: feed[n] for n in names})
            self.spoil(label, out)
            found.append(out)
        return found

    def _compile(self, source: Path, made: Path) -> list[str]:
        label = f"{made.parent.parent.name}/{made.stem}"
        self.refuse(label)
        self.compiled.append(label)
        onnx.save(onnx.load(str(source)), made)  # weights inside
        binary = made.with_name(f"{made.stem}_qnn.bin")
        binary.write_bytes(b"binary of " + label.encode())
        return [made.name, binary.name]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    monkeypatch.setattr(qnn, "why_unavailable", lambda: "")
    monkeypatch.setattr(Worker, "call", lambda self, *a, **k: made.call(*a, **k))
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, _ = write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "source", "flash")
    return folder


@pytest.fixture
def token_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """The random checkpoint has no tokenizer: int4 is calibrated on token ids."""
    plan = npu_stage.plan_npu

    def planned(request: Any, weights: Any, tokenizer: Any) -> Any:
        if request.precision == "int4":
            ids = np.arange(256, dtype=np.int32) * 7 % weights.config.vocab_size
            return npu_stage.NpuJob(request, weights, ids)
        return plan(request, weights, tokenizer)

    monkeypatch.setattr(pipeline, "plan_npu", planned)


def export(source: Path, out: Path, **options: Any) -> dict[str, NpuComponent]:
    """Components of the only target, by name."""
    options = {"npu": "v73", "npu_precision": "fp16", "npu_context": 64, **options}
    export_bundle(source, out, recipe="f32", **options).close()
    variants = read_index((out / FOLDER / INDEX_NAME).read_bytes(), "index")
    return {c.name: c for c in next(iter(variants.values())).components}


NAMES = ["layers_00", "layers_01", "layers_02", "lm_head", "mtp_0", "mtp_1", "mtp_2"]


def test_every_component_is_compiled_and_the_manifest_covers_it(
    source: Path, stand_in: StandIn, tmp_path: Path
) -> None:
    found = export(source, tmp_path / "bundle")
    assert list(found) == NAMES
    assert {c.precision for c in found.values()} == {"fp16"}
    files = Manifest.read(tmp_path / "bundle").files
    for name, component in found.items():
        for names in component.files.values():
            assert {f"{FOLDER}/{name}/qnn-v73/{file}" for file in names} <= set(files)
    with Bundle.open(tmp_path / "bundle") as bundle:
        bundle.verify()
    raw = json.loads((tmp_path / "bundle" / FOLDER / PACKAGE_MANIFEST).read_text())
    assert set(raw["components"]["layers_01"]["variants"]) == {"cpu", "qnn-v73"}
    leftovers = [p for p in tmp_path.iterdir() if p.name != "bundle"]
    assert not leftovers


def test_an_interrupted_export_compiles_only_what_is_left(
    source: Path, stand_in: StandIn, tmp_path: Path
) -> None:
    def stop(label: str) -> None:
        if label == "layers_02/t4_k64":
            raise KeyboardInterrupt

    stand_in.refuse = stop
    with pytest.raises(KeyboardInterrupt):
        export(source, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    first, stand_in.compiled = stand_in.compiled, []
    stand_in.refuse = lambda _: None
    found = export(source, tmp_path / "bundle")
    assert list(found) == NAMES
    assert {label.split("/")[0] for label in stand_in.compiled} == set(NAMES[2:])
    assert {label.split("/")[0] for label in first} == set(NAMES[:3])


def test_what_is_refused_is_halved_then_computed_by_the_cpu(
    source: Path, stand_in: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The dense layer and the one after it are one component; its second half is refused too."""

    def refuse(label: str) -> None:
        if label.startswith(("layers_00/", "layers_00b/")):
            raise ProviderError("too many nodes for this chip")

    stand_in.refuse = refuse
    found = export(source, tmp_path / "bundle")
    assert list(found)[:3] == ["layers_00a", "layers_00b", "layers_01"]
    assert found["layers_00a"].layers == (0,)
    halved = "2 layers in fp16: too many nodes for this chip"
    assert (found["layers_00a"].precision, found["layers_00a"].reason) == ("fp16", halved)
    assert found["layers_00b"].precision == "cpu"
    assert "too many nodes" in found["layers_00b"].reason
    assert "layers_00b runs on the CPU" in caplog.text


@pytest.mark.usefixtures("token_ids")
def test_int4_gives_way_to_fp16(source: Path, stand_in: StandIn, tmp_path: Path) -> None:
    wanted = "lm_head"
    seen: list[str] = []

    def refuse(label: str) -> None:
        if label.startswith(wanted):
            seen.append(label)
            if len(seen) == 1:
                raise ProviderError("no such weights")

    stand_in.refuse = refuse
    found = export(source, tmp_path / "bundle", npu_precision="int4")
    assert found[wanted].precision == "fp16"
    assert found[wanted].reason == "int4: no such weights"
    assert found["mtp_0"].precision == "int4"


class StoodIn:
    """A graph the stand-in compiled, in the place of one on the NPU."""

    def __init__(self, path: Path, *_: object) -> None:
        self._path = path
        self._names = {found.name for found in onnx.load(str(path)).graph.input}

    def run(self, feed: Any) -> dict[str, Any]:
        return PlainSession(self._path).run({name: feed[name] for name in self._names})


@pytest.mark.usefixtures("token_ids")
def test_every_step_down_is_taken_in_order_and_stats_say_so(
    source: Path,
    stand_in: StandIn,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two layers at once are refused, then one of the halves as int4, the other in fp16 as well;
    and the model answers, one component of it on the CPU."""
    tried: list[str] = []

    def refuse(label: str) -> None:
        component = label.partition("/")[0]
        tried.append(component)
        if component == "layers_00":
            raise ProviderError("too many nodes")
        if component == "layers_00a" and tried.count(component) == 1:
            raise ProviderError("no LPBQ here")
        if component == "layers_00b":
            raise ProviderError("not this layer")

    stand_in.refuse = refuse
    found = export(source, tmp_path / "bundle", npu_precision="int4")
    assert list(dict.fromkeys(tried))[:3] == ["layers_00", "layers_00a", "layers_00b"]
    assert tried.count("layers_00") == 1  # halved before another precision is tried
    assert tried.count("layers_00b") == 2  # int4, fp16
    a, b = found["layers_00a"], found["layers_00b"]
    first = "2 layers in int4: too many nodes"
    assert (a.precision, a.reason) == ("fp16", f"{first}; int4: no LPBQ here")
    why = f"{first}; int4: not this layer; fp16: not this layer"
    assert (b.precision, b.reason) == ("cpu", why)
    assert found["layers_01"].precision == "int4"
    assert "layers_00b runs on the CPU" in caplog.text

    monkeypatch.setattr(npu_package, "NpuGraph", StoodIn)
    monkeypatch.setattr(qnn.Qnn, "plugin", lambda *_: None)
    with Runtime.open(
        tmp_path / "bundle", backend="onnx", ep="qnn", context=64, threads=1
    ) as runtime:
        runtime.session().generate(list(range(3, 20)), max_tokens=4)
        stats = runtime.stats()["provider"]
    assert stats["components"] == len(found)
    assert stats["on_npu"] == len(found) - 1
    assert stats["on_cpu"] == [{"component": "layers_00b", "reason": why}]
    assert stats["reduced"] == {"layers_00a": a.reason}
    assert stats["precisions"]["layers_00a"] == "fp16"


def test_wrong_numbers_are_refused(source: Path, stand_in: StandIn, tmp_path: Path) -> None:
    """Router weights 8.8 % too large, as a Sigmoid with another scale gives."""

    def spoil(label: str, outputs: dict[str, Any]) -> None:
        if label.startswith("layers_01/"):
            outputs["weights"] *= np.float32(1.088)

    stand_in.spoil = spoil
    found = export(source, tmp_path / "bundle")
    assert found["layers_01"].precision == "cpu"
    assert "weights deviates by 8.8%" in found["layers_01"].reason
    assert found["layers_02"].precision == "fp16"


@pytest.mark.parametrize(("graphs", "single"), [(("t1",), 4), (("t1", "t4"), 0)])
def test_bits_that_depend_on_the_graph_are_noticed(
    graphs: tuple[str, ...], single: int, source: Path, stand_in: StandIn, tmp_path: Path
) -> None:
    """After its check each graph runs on the verify's rows one by one: those of `graphs` give
    another last bit than the verify did. (What the CPU gives may differ by itself.)"""
    runs: dict[str, int] = {}
    verify: dict[str, Any] = {}

    def spoil(label: str, outputs: dict[str, Any]) -> None:
        component, _, shape = label.partition("/")
        if component != "layers_01":
            return
        row = runs[shape] = runs.get(shape, -2) + 1
        if row < 0:
            if shape == "t4":
                verify.update({name: x.copy() for name, x in outputs.items()})
            return
        for name, x in outputs.items():
            if name[:3] in ("kn_", "vn_"):
                x[:, :, 0] = verify[name][:, :, row]
            else:
                x[0] = verify[name][row]
        if shape in graphs:
            outputs["h_out"] = np.nextafter(outputs["h_out"], np.float32(1e9))

    stand_in.spoil = spoil
    assert export(source, tmp_path / "bundle")["layers_01"].single == single


def test_a_target_that_takes_nothing_is_an_error(
    source: Path, stand_in: StandIn, tmp_path: Path
) -> None:
    def refuse(label: str) -> None:
        raise ProviderError("not this one")

    stand_in.refuse = refuse
    with pytest.raises(ProviderError, match=r"v73 takes no part.*not this one"):
        export(source, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_bad_requests_fail_before_any_work(
    source: Path, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, message in (
        ({"npu": "v99"}, "unknown NPU"),
        ({"npu_precision": "int3"}, "precision 'int3'"),
        ({"npu_context": 0}, "context = 0"),
        ({"npu_precision": "int4"}, "need the ranges"),
    ):
        with pytest.raises(UsageError, match=message):
            export(source, tmp_path / "bundle", **options)
    monkeypatch.setattr(qnn, "why_unavailable", lambda: "musl")
    with pytest.raises(ProviderError, match="musl"):
        export(source, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
