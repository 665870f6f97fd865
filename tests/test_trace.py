"""Traces of running models: the routes an independent model chooses, whatever runs; a kill, a full
disk and a wrong file; and the command that replays them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from checkpoint_factory import write_bundle
from typer.testing import CliRunner

from mimo_edge.api import Runtime
from mimo_edge.bundle import Bundle
from mimo_edge.cli.main import app
from mimo_edge.errors import BundleError, UsageError
from mimo_edge.experts.table import ExpertTable
from mimo_edge.experts.trace import Phase, Trace, TraceWriter, read_trace
from mimo_edge.heat import Heat
from mimo_edge.runtimes.ggml.backend import GgmlBackend
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.expert_source import CachedExperts
from mimo_edge.runtimes.ggml.passes import TrunkPass
from mimo_edge.runtimes.ggml.raw import GgufTensors
from mimo_edge.runtimes.reference import ReferenceBackend

PROMPT = [5, 17, 3, 40, 2, 9, 33, 8] * 5


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """f32, so that no rounding moves a route."""
    folder = tmp_path_factory.mktemp("made")
    return write_bundle(folder, "flash", recipe="f32")


class Routes:
    """An observer that keeps the routes of every layer."""

    def __init__(self) -> None:
        self.by_layer: dict[int, list[np.ndarray[Any, Any]]] = {}

    def matmul(self, name: str, x: object) -> None: ...
    def expert_matmul(self, name: str, expert: int, x: object) -> None: ...
    def route(self, layer: int, ids: np.ndarray[Any, Any], weights: object) -> None:
        self.by_layer.setdefault(layer, []).append(ids.copy())


def oracle_routes(bundle: Path, tokens: list[int]) -> dict[int, np.ndarray[Any, Any]]:
    """What the reference chooses for every token of every layer, one pass over all of them."""
    with Bundle.open(bundle) as opened:
        seen = Routes()
        backend = ReferenceBackend(opened.weights(), observer=seen)
        ids = np.array(tokens, np.int32)
        backend.forward(ids, backend.new_cache(len(ids)), logits_rows=len(ids))
        return {layer: np.concatenate(found) for layer, found in seen.by_layer.items()}


def by_layer(trace: Trace, *phases: Phase) -> dict[int, list[list[int]]]:
    found: dict[int, list[list[int]]] = {layer: [] for layer in trace.header.layers}
    for route in trace.only(*phases).routes:
        found[trace.header.layers[route.row]] += np.sort(route.ids).tolist()
    return found


def streamed(bundle: Path, slots: int, writer: TraceWriter) -> tuple[GgmlBackend, Bundle]:
    opened = Bundle.open(bundle)

    def experts(device: Device) -> CachedExperts:
        return CachedExperts(device, ExpertTable.from_bundle(opened), slots)

    source = GgufTensors(opened.config, [opened.gguf])
    return GgmlBackend(source, threads=1, experts=experts, routes=writer.record), opened


@pytest.mark.parametrize("backend", ["ggml", "reference"])
def test_every_token_of_every_layer_is_recorded(bundle: Path, tmp_path: Path, backend: str) -> None:
    path = tmp_path / "t.routes"
    with Runtime.open(bundle, backend=backend, threads=1, draft=0, trace=path) as runtime:
        answer = runtime.session().generate(PROMPT, max_tokens=9).token_ids
    trace = read_trace(path)
    # The last token was chosen and never processed.
    want = oracle_routes(bundle, [*PROMPT, *answer[:-1]])
    assert sorted(want) == list(trace.header.layers)
    prompts, answers = by_layer(trace, Phase.PREFILL), by_layer(trace, Phase.DECODE)
    for layer, routes in want.items():
        # The last layer routes only the row whose logits are wanted.
        first = len(PROMPT) - len(prompts[layer])
        assert first == (len(PROMPT) - 1 if layer == max(want) and backend == "ggml" else first)
        assert len(answers[layer]) == len(answer) - 1
        found = prompts[layer] + answers[layer]
        assert found == np.sort(routes[first:]).tolist()
    assert not trace.only(Phase.VERIFY).routes


def test_streamed_layers_are_recorded_like_resident_ones(bundle: Path, tmp_path: Path) -> None:
    ids = np.array(PROMPT, np.int32)
    found = []
    for slots in (None, 4):
        path = tmp_path / f"{slots}.routes"
        with Bundle.open(bundle) as opened:
            writer = TraceWriter.of_model(path, opened.config, "m")
            if slots is None:
                source = GgufTensors(opened.config, [opened.gguf])
                backend = GgmlBackend(source, threads=1, routes=writer.record)
                held = opened
            else:
                backend, held = streamed(bundle, slots, writer)
            cache = backend.new_cache(64)
            for part in (ids[:20], ids[20:24], ids[24:25], ids[25:]):
                backend.forward(part, cache, logits_rows=len(part))
            backend.close()
            held.close()
            writer.close()
        found.append(by_layer(read_trace(path), *Phase))
    assert found[0] == found[1]
    assert all(len(routes) == len(PROMPT) for routes in found[0].values())


def test_verify_passes_are_told_apart_and_hold_all_rows(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.routes"
    with Runtime.open(bundle, backend="ggml", threads=1, draft=2, trace=path) as runtime:
        reply = runtime.session().generate(PROMPT, max_tokens=12)
    trace = read_trace(path)
    first = trace.header.layers[0]
    rows = [len(r.ids) for r in trace.only(Phase.VERIFY, Phase.DECODE).routes if r.row == 0]
    assert len(rows) == reply.stats.verifies
    assert sum(rows) == reply.stats.verifies + sum(reply.stats.drafted_by_depth)
    assert len(by_layer(trace, Phase.PREFILL)[first]) == len(PROMPT)


def test_without_a_trace_the_graph_keeps_its_routes_inside(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One node more per MoE layer with a trace, none without."""
    passes: list[TrunkPass] = []
    made = TrunkPass.__init__

    def kept(self: TrunkPass, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        passes.append(self)

    monkeypatch.setattr(TrunkPass, "__init__", kept)
    nodes = []
    for routes in (None, lambda layer, ids: None):
        with Bundle.open(bundle) as opened:
            config = opened.config
            source = GgufTensors(config, [opened.gguf])
            backend = GgmlBackend(source, threads=1, routes=routes)
            backend.forward(np.array([3], np.int32), backend.new_cache(8))
            (segment,) = passes.pop()._segments
            nodes.append(backend.device.ggml.ggml_graph_n_nodes(segment.graph._graph))
            assert len(segment.routes) == (0 if routes is None else sum(config.moe_layer_freq))
            backend.close()
    assert nodes[1] - nodes[0] == sum(config.moe_layer_freq)


# --- failures -----------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from mimo_edge.api import Runtime
runtime = Runtime.open(sys.argv[1], backend="ggml", threads=1, draft=0, trace=sys.argv[2])
for index, piece in enumerate(runtime.session().stream(list(range(1, 21)), max_tokens=50)):
    if index == 7:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_leaves_every_pass_before_the_kill(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.routes"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(bundle), str(path)], check=False, timeout=120
    )
    assert done.returncode == -9
    trace = read_trace(path)
    # 20 of the prompt; piece 7 is the eighth token, seven were processed after the prompt.
    assert trace.tokens == 27
    last = [r for r in trace.routes if r.row == len(trace.header.layers) - 1]
    assert len(last) == 1 + 7


def test_a_cut_trace_is_named_or_read_up_to_the_cut(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.routes"
    with Runtime.open(bundle, backend="ggml", threads=1, draft=0, trace=path) as runtime:
        runtime.session().generate(PROMPT, max_tokens=4)
    whole = read_trace(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(BundleError, match=r"truncated at byte \d+, after \d+ whole records"):
        read_trace(path)
    assert len(read_trace(path, partial=True).routes) == len(whole.routes) - 1
    failed = CliRunner().invoke(app, ["trace", str(path)])
    assert failed.exit_code == 1
    assert "--partial" in failed.stderr
    assert CliRunner().invoke(app, ["trace", str(path), "--partial"]).exit_code == 0


def test_only_traces_are_overwritten(bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "precious"
    other.write_text("not a trace")
    with pytest.raises(UsageError, match="is no routing trace"):
        Runtime.open(bundle, backend="ggml", threads=1, trace=other)
    assert other.read_text() == "not a trace"
    path = tmp_path / "t.routes"
    for count in (3, 2):
        with Runtime.open(bundle, backend="ggml", threads=1, draft=0, trace=path) as runtime:
            runtime.session().generate([1, 2, 3], max_tokens=count)
        assert read_trace(path).tokens == 3 + count - 1
    with pytest.raises(BundleError, match="cannot write"):
        Runtime.open(bundle, backend="ggml", threads=1, trace=tmp_path / "no" / "folder")


def test_a_full_disk_ends_the_answer_with_its_name(bundle: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    runtime = Runtime.open(bundle, backend="ggml", threads=1, draft=0, trace="/dev/full")
    with pytest.raises(BundleError, match="cannot write /dev/full"):
        runtime.session().generate(PROMPT, max_tokens=4)
    with pytest.raises(BundleError, match="cannot write /dev/full"):
        runtime.close()
    runtime.close()


def test_a_dense_model_has_no_routes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no routed experts"):
        TraceWriter.of_model(tmp_path / "t", tiny.tiny_mimo7b_config(), "dense")
    assert not (tmp_path / "t").exists()


# --- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "t.routes"
    options = ["--backend", "ggml", "--threads", "1", "--draft", "0", "--max-tokens", "20"]
    command = ["run", str(bundle), "-p", "hello", *options, "--trace", str(path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    return path


def test_the_command_replays_what_run_recorded(recorded: Path) -> None:
    from mimo_edge.experts.simulate import POLICIES, replay

    trace = read_trace(recorded)
    done = CliRunner().invoke(app, ["trace", str(recorded), "--slots", "4,9", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)[str(recorded)]
    assert found["tokens"] == trace.tokens > 0
    keys = [(entry["slots"], entry["policy"]) for entry in found["results"]]
    assert keys == [(slots, policy) for slots in (4, 9) for policy in POLICIES]
    skip = len(trace.routes) // 3
    for entry in found["results"]:
        want = replay(trace, entry["slots"], entry["policy"], skip=skip)
        assert (entry["hits"], entry["requests"]) == (want.hits, want.requests)
    shown = CliRunner().invoke(app, ["trace", str(recorded), "--decode-only", "--shares", "0.5"])
    answered = trace.only(Phase.DECODE).tokens
    assert f"{answered} tokens" in shown.stdout
    assert "belady" in shown.stdout
    assert "%" in shown.stdout


def test_the_command_starts_a_policy_from_a_bundles_heat(
    recorded: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = CliRunner().invoke(app, ["trace", str(recorded), "--heat", str(bundle)])
    assert refused.exit_code == 2
    assert "no heat" in refused.stderr
    trace = read_trace(recorded)
    counts = {
        layer: np.bincount(
            np.concatenate([r.ids.ravel() for r in trace.routes if r.row == row]),
            minlength=trace.header.experts,
        )
        for row, layer in enumerate(trace.header.layers)
    }
    heat = Heat(10, counts, {layer: c.astype(float) for layer, c in counts.items()})
    monkeypatch.setattr(Bundle, "heat", heat)
    command = ["trace", str(recorded), "--heat", str(bundle), "--slots", "6", "--warm-up", "0"]
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)[str(recorded)]
    hits = {entry["policy"]: entry["hits"] for entry in found["results"]}
    assert hits["belady"] >= hits["ours+heat"] >= hits["ours"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shares", "x"], "not a list of numbers"),
        (["--shares", "0"], "above 0"),
        (["--slots", "1"], "slots for"),
        (["--policies", "magic"], "no policy"),
        (["--warm-up", "1"], "--warm-up"),
        (["--tokens", "0"], "--tokens"),
    ],
)
def test_wrong_options(recorded: Path, arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["trace", str(recorded), *arguments])
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_file_that_is_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("{}\n")
    done = CliRunner().invoke(app, ["trace", str(path)])
    assert done.exit_code == 1
    assert "no routing trace" in done.stderr
