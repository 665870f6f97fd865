"""Routed experts streamed from a bundle: same answers with any number of slots, bounded memory,
typed errors that leave the session usable, nothing left behind."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from checkpoint_factory import write_bundle, write_checkpoint
from streamed import open_streamed
from typer.testing import CliRunner

from mimo_edge.api import Runtime
from mimo_edge.budget import Budget, plan
from mimo_edge.bundle import Bundle
from mimo_edge.cli.main import app
from mimo_edge.errors import BundleError, DeviceError, IntegrityError, UsageError
from mimo_edge.experts.cache import ExpertCache
from mimo_edge.export.pipeline import export_bundle
from mimo_edge.runtimes.ggml.backend import GgmlBackend
from mimo_edge.sampling import Sampler, SamplingParams

ROOT = Path(__file__).parents[1]
MIB = 1 << 20
PROMPT = [5, 17, 3, 40, 2, 9, 33, 8] * 6


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    source, _ = write_checkpoint(folder / "source", "flash", tokenizer=False)
    bundles = {}
    for recipe in ("f32", "q8_0"):
        bundles[recipe] = folder / recipe
        export_bundle(source, bundles[recipe], recipe=recipe).close()
    return bundles


@pytest.mark.parametrize("recipe", ["f32", "q8_0"])
def test_any_number_of_slots_gives_the_resident_answer(made: dict[str, Path], recipe: str) -> None:
    resident, _ = open_streamed(made[recipe], None)
    with resident:
        config = resident.config
        want = resident.logits(PROMPT)
        answer = resident.session().generate(PROMPT, max_tokens=12).token_ids
    total = config.n_routed_experts * sum(config.moe_layer_freq)
    logits = []
    for slots in (config.num_experts_per_tok, total // 3, total):
        for draft in (0, 3):
            runtime, experts = open_streamed(made[recipe], slots, draft)
            with runtime:
                assert runtime.session().generate(PROMPT, max_tokens=12).token_ids == answer
                assert experts is not None
                stats = experts.stats()
                assert stats.slots_used <= slots
                if slots < total:
                    assert stats.total().misses > 0
                if slots == total:
                    assert stats.total().evictions == 0
                    assert stats.total().loads <= total
                logits.append(runtime.logits(PROMPT))
    scale = float(np.abs(want).max())
    for found in logits:
        assert np.array_equal(found, logits[0])  # grouping changes no bit
        assert float(np.abs(found - want).max()) < 1e-6 * scale


@pytest.mark.parametrize("chunk", [3, 16, 17, 40])
def test_chunks_larger_than_the_slots_are_walked_in_groups(
    made: dict[str, Path], chunk: int
) -> None:
    outputs = []
    for slots in (None, 4):
        runtime, _ = open_streamed(made["f32"], slots, chunk=chunk)
        with runtime:
            outputs.append(runtime.logits(PROMPT))
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-5, rtol=0)


def test_a_long_pass_reads_into_the_layer_that_runs_next(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int | None]] = []
    whole = ExpertCache.stream

    def stream(self: ExpertCache, layer: int, *args: Any, **options: Any) -> Any:
        told.append((layer, options["then"]))
        return whole(self, layer, *args, **options)

    monkeypatch.setattr(ExpertCache, "stream", stream)
    runtime, experts = open_streamed(made["f32"], 6, chunk=64)
    with runtime:
        backend = runtime._model.backend
        assert isinstance(backend, GgmlBackend)
        assert experts is not None
        layers = sorted(experts.slots.layouts)
        cache = backend.new_cache(100)
        ids = np.array(PROMPT, np.int32)
        for _ in range(2):
            backend.forward(ids, cache, logits_rows=len(ids))
        assert told == [*zip(layers, [*layers[1:], None], strict=True)] * 2


# --- Errors ---------------------------------------------------------------------------------


def damage(path: Path, layer: int, flipped: bool) -> tuple[Path, bytes]:
    """Flip one bit in every expert of a layer, or cut the file before them; the file and what it
    held."""
    with Bundle.open(path) as bundle:
        records = [bundle.expert(layer, e) for e in range(bundle.config.n_routed_experts)]
    file = records[0].gate[0]
    content = file.read_bytes()
    if flipped:
        changed = bytearray(content)
        for record in records:
            changed[record.up[1] + 7] ^= 0x10
        with file.open("r+b") as out:
            out.write(changed)
    else:
        os.truncate(file, min(record.gate[1] for record in records))
    return file, content


def test_a_flipped_bit_stops_the_answer_and_the_session_goes_on(
    made: dict[str, Path], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(made["q8_0"], tmp_path / "bundle"))
    runtime, _ = open_streamed(path, None)
    with runtime:
        session = runtime.session()
        first = session.generate(PROMPT, max_tokens=6).token_ids
        second = session.generate([7], max_tokens=6).token_ids
    file, content = damage(path, 2, flipped=True)
    runtime, experts = open_streamed(path, 4)
    with runtime:
        session = runtime.session()
        with pytest.raises(IntegrityError, match=r"layer 2, expert \d"):
            session.generate(PROMPT, max_tokens=6)
        with file.open("r+b") as out:  # the same file, repaired in place
            out.write(content)
        assert experts is not None
    runtime, _ = open_streamed(path, 4)
    with runtime:
        session = runtime.session()
        assert session.generate(PROMPT, max_tokens=6).token_ids == first
        assert session.generate([7], max_tokens=6).token_ids == second


@pytest.mark.parametrize("rows", [1, 4, 20])
def test_a_failing_read_leaves_the_cache_at_the_last_good_token(
    made: dict[str, Path], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EIO in the middle: the error names layer and expert, and the same call works again."""
    from mimo_edge.flash_file import FlashFile

    whole = FlashFile._preadv
    runtime, experts = open_streamed(made["f32"], 4)
    want, _ = open_streamed(made["f32"], None)
    with runtime, want:
        backend, oracle = runtime._model.backend, want._model.backend
        ids = np.array(PROMPT, np.int32)
        cache, theirs = backend.new_cache(64, 4), oracle.new_cache(64, 4)
        backend.forward(ids[:20], cache)
        oracle.forward(ids[:20], theirs)
        count = itertools.count()

        def broken(self: FlashFile, targets: Any, offset: int) -> int:
            # embedding rows are in the other file
            if "-00002-of" in self.path.name and next(count) % 3 == 0:
                raise OSError(5, os.strerror(5))
            return whole(self, targets, offset)

        monkeypatch.setattr(FlashFile, "_preadv", broken)
        with pytest.raises(BundleError, match=r"layer \d+, expert \d+ .*Input/output error"):
            backend.forward(ids[20 : 20 + rows], cache)
        monkeypatch.undo()
        assert cache.length == 20
        if rows <= 4:
            found = backend.forward(ids[20 : 20 + rows], cache, logits_rows=rows)
            expected = oracle.forward(ids[20 : 20 + rows], theirs, logits_rows=rows)
            np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5, rtol=0)
        assert experts is not None


@pytest.mark.parametrize("draft", [0, 3])
def test_a_disk_error_in_an_answer_leaves_the_session_usable(
    made: dict[str, Path], draft: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mimo_edge.flash_file import FlashFile

    whole = FlashFile._preadv
    resident, _ = open_streamed(made["f32"], None)
    with resident:
        session = resident.session()
        turns = [session.generate(p, max_tokens=8).token_ids for p in (PROMPT, [7, 8])]
    runtime, _ = open_streamed(made["f32"], 4, draft)
    with runtime:
        session = runtime.session()
        assert session.generate(PROMPT, max_tokens=8).token_ids == turns[0]
        count = itertools.count()

        def broken(self: FlashFile, targets: Any, offset: int) -> int:
            if "-00002-of" in self.path.name and next(count) >= 12:
                raise OSError(5, os.strerror(5))
            return whole(self, targets, offset)

        monkeypatch.setattr(FlashFile, "_preadv", broken)
        with pytest.raises(BundleError, match=r"layer \d+, expert \d+"):
            session.generate([7, 8], max_tokens=8)
        monkeypatch.undo()
        assert session.generate([7, 8], max_tokens=8).token_ids == turns[1]


def test_a_truncated_file_is_named(made: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(made["f32"], tmp_path / "bundle"))
    runtime, _ = open_streamed(path, 4)
    with runtime:
        session = runtime.session()
        session.generate(PROMPT, max_tokens=2)
        damage(path, 1, flipped=False)
        with pytest.raises(BundleError, match=r"layer \d+, expert \d+ .*truncated"):
            session.generate([7, 8, 9], max_tokens=30)
        assert runtime.session() is not None


def test_a_file_replaced_between_two_turns(made: dict[str, Path], tmp_path: Path) -> None:
    """By an equal one: nobody notices. By a damaged one: an error that names the expert, and the
    session goes on from where it was when a good one is back."""
    path = Path(shutil.copytree(made["q8_0"], tmp_path / "bundle"))
    turns = [PROMPT, [7], [8, 9]]
    resident, _ = open_streamed(path, None)
    with resident:
        session = resident.session()
        want = [session.generate(turn, max_tokens=12).token_ids for turn in turns]
    runtime, _ = open_streamed(path, 4)
    with runtime:
        session = runtime.session()
        assert session.generate(turns[0], max_tokens=12).token_ids == want[0]
        damaged = Path(shutil.copytree(path, tmp_path / "damaged"))
        spare, content = damage(damaged, 2, flipped=True)
        file = path / spare.name
        (tmp_path / "equal").write_bytes(content)
        os.replace(tmp_path / "equal", file)
        assert session.generate(turns[1], max_tokens=12).token_ids == want[1]
        os.replace(spare, file)
        with pytest.raises(IntegrityError, match=r"layer 2, expert \d"):
            session.generate(turns[2], max_tokens=12)
        (tmp_path / "good").write_bytes(content)
        os.replace(tmp_path / "good", file)
        assert session.generate(turns[2], max_tokens=12).token_ids == want[2]


# --- Opening by a bound on memory ---------------------------------------------------------------

LARGE = tiny.streamed_config()

# Joins the cgroup before anything is imported, so that every page is counted.
IN_CGROUP = """
import json, os, sys
path, ram, group = sys.argv[1:4]
if group:
    with open(group + "/cgroup.procs", "w") as file:
        file.write(str(os.getpid()))
from mimo_edge.api import Runtime
options = {"ram": int(ram), "context": 256, "kv_type": "f16", "threads": 1, "draft": 0}
with Runtime.open(path, backend="ggml", **options) as runtime:
    session = runtime.session()
    ids = [(7 * i + 3) % 1000 for i in range(150)]
    answer = session.generate(ids, max_tokens=40).token_ids
    answer += session.generate([5, 6], max_tokens=20).token_ids
    print(json.dumps({"answer": answer, "stats": runtime.stats()}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF of 120 MiB, most of it routed experts, not in the page cache."""
    spec = importlib.util.spec_from_file_location(
        "make_random_model_streaming", ROOT / "tools" / "make_random_model.py"
    )
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = tool
    spec.loader.exec_module(tool)
    path = tmp_path_factory.mktemp("large") / "m.gguf"
    tool.write_model(path, LARGE, experts="Q8_0", dense="Q8_0", head="Q8_0")
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """An empty memory cgroup below ours."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = {entry.split(":")[1]: entry.split(":")[2].lstrip("/") for entry in lines}
    root = Path("/sys/fs/cgroup")
    group = root / "memory" / own["memory"] if "memory" in own else root / own.get("", "")
    group = group / f"mimo-edge-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    if not any((group / name).exists() for name in ("memory.max", "memory.limit_in_bytes")):
        group.rmdir()
        pytest.skip("the memory controller is not on in this cgroup")
    yield group
    group.rmdir()


def bound(group: Path, limit: int) -> None:
    v1 = group / "memory.limit_in_bytes"
    (v1 if v1.exists() else group / "memory.max").write_text(str(limit))


def peak(group: Path) -> int:
    v1 = group / "memory.max_usage_in_bytes"
    return int((v1 if v1.exists() else group / "memory.peak").read_text())


def planned(path: Path, ram: int | None = None, kv_type: str = "f16") -> Budget:
    with Bundle.open(path) as bundle:
        return plan(bundle.config, bundle.tensors, 256, ram, kv_type=kv_type)


def smallest(path: Path) -> int:
    """A bound that leaves room for about a token's experts."""
    low, high = 100 << 20, planned(path).nbytes
    while high - low > MIB:
        middle = (low + high) // 2
        try:
            planned(path, middle)
            high = middle
        except DeviceError:
            low = middle
    return high


@pytest.mark.parametrize("extra", [2, 40])
def test_the_kernel_never_counts_more_than_was_allowed(
    large: Path, cgroup: Path, extra: int
) -> None:
    """A real process in a memory cgroup of the size it was told: not killed, never at the limit,
    and the answer of one that no cgroup bounds."""
    ram = smallest(large) + extra * MIB
    assert planned(large, ram).streamed

    def answered(group: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-c", IN_CGROUP, str(large), str(ram), group],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    bound(cgroup, ram)
    found = answered(str(cgroup))
    experts, budget = found["stats"]["experts"], found["stats"]["budget"]
    # a wrong guess of what a layer will want leaves its slot empty, as many as the clock allows
    empty = experts["slots"] - experts["slots_used"]
    assert 0 <= empty <= max(2, experts["slots"] // 10)
    assert experts["slots"] < budget["experts"]
    assert experts["flash_bytes"] > 0
    assert peak(cgroup) < ram
    # Streamed as well: resident experts go through another operation, which may round otherwise.
    free = answered("")
    assert free["stats"]["budget"]["chunk"] == budget["chunk"]
    assert found["answer"] == free["answer"]


def test_without_drafts_mtp_blocks_stay_in_the_file(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their memory goes to expert slots, and the answer stays."""
    # What earlier tests left in this process is not the model's.
    monkeypatch.setattr("mimo_edge.budget.resident_bytes", lambda: None)
    ram, found = smallest(large) + 40 * MIB, []
    for draft in (0, "auto"):
        with Runtime.open(
            large, backend="ggml", ram=ram, context=256, threads=1, draft=draft
        ) as runtime:
            budget = runtime.stats()["budget"]
            answer = runtime.session().generate(PROMPT, max_tokens=8).token_ids
            found.append((budget["slots"], "MTP" in budget["lines"], answer))
            if draft == 0:
                with pytest.raises(UsageError, match="draft = 1"):
                    runtime._engine.generate(
                        runtime._engine.sequence(), [1], Sampler(SamplingParams()), draft=1
                    )
    (without, no_mtp, plain), (with_mtp, mtp, drafted) = found
    assert (no_mtp, mtp) == (False, True)
    assert without > with_mtp
    assert plain == drafted


def test_a_bound_too_small_is_refused_before_anything_is_loaded(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(GgmlBackend, "__init__", loaded)
    with pytest.raises(DeviceError, match="expert slots"):
        Runtime.open(large, backend="ggml", ram="150MiB", context=256)


def test_opening_and_closing_leaves_nothing(large: Path) -> None:
    gc.collect()  # what earlier tests left to the collector is not counted

    def counts() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    before = None
    for _ in range(4):
        runtime, experts = open_streamed(large, 8)
        runtime.session().generate([1, 2, 3], max_tokens=2)
        assert experts is not None
        runtime.close()
        runtime.close()
        with pytest.raises(UsageError):
            experts.cache.resident(1)
        before = before or counts()
        assert counts() == before


# --- Command line -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a tokenizer."""
    folder = tmp_path_factory.mktemp("spoken")
    return write_bundle(folder, "flash", recipe="f32")


def test_run_shows_plan_and_hits_and_says_the_same(
    spoken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["run", str(spoken), "-p", "hello", "--backend", "ggml", "--max-tokens", "8"]
    options += ["--threads", "1", "--draft", "0"]
    whole = CliRunner().invoke(app, [*options, "--json"])
    assert whole.exit_code == 0, whole.output
    whole_json = json.loads(whole.stdout)
    assert whole_json["stats"]["experts"] is None

    def few_slots(config: Any, tensors: Any, context: int, *args: Any, **kwargs: Any) -> Budget:
        lines = plan(config, tensors, context).lines
        return Budget(lines, 1 << 30, context, 16, True, 4, 4096, 8)

    monkeypatch.setattr("mimo_edge.budget.plan", few_slots)  # a tiny model always fits
    streamed = CliRunner().invoke(app, [*options, "--ram", "1GiB", "--json"])
    assert streamed.exit_code == 0, streamed.output
    found = json.loads(streamed.stdout)
    assert found["token_ids"] == whole_json["token_ids"]
    assert found["stats"]["experts"]["slots"] == 4
    shown = CliRunner().invoke(app, [*options, "--ram", "1GiB", "-v"])
    assert re.search(r"KV cache +[0-9.]+ [KM]iB +\d+ tokens", shown.stderr)
    assert re.search(r"experts: [0-9.]+ % of \d+ in memory, .* read, .* per token", shown.stderr)


def test_the_cache_format_is_chosen_shown_and_checked(
    spoken: Path, large: Path, tmp_path: Path
) -> None:
    options = ["-p", "hello", "--max-tokens", "2", "--draft", "0", "-v"]
    shown = CliRunner().invoke(
        app, ["run", str(spoken), *options, "--backend", "ggml", "--kv-type", "f32"]
    )
    assert shown.exit_code == 0, shown.output
    assert re.search(r"KV cache +[0-9.]+ [KM]iB +\d+ tokens, f32", shown.stderr)
    for backend, kv_type, message in (
        ("ggml", "q8_0", "head_dim = 24 is not whole blocks"),
        ("ggml", "q4_0", "choose one of"),
        ("reference", "q8_0", "reference backend keeps its KV cache in f32"),
    ):
        refused = CliRunner().invoke(
            app, ["run", str(spoken), *options, "--backend", backend, "--kv-type", kv_type]
        )
        assert refused.exit_code == 2
        assert message in refused.stderr
    plans = []
    for kv_type in ("f16", "f32"):
        command = ["inspect", str(large), "--plan", "--kv-type", kv_type, "--json"]
        plans.append(json.loads(CliRunner().invoke(app, command).stdout)["plan"])
    assert [plan["kv_type"] for plan in plans] == ["f16", "f32"]
    short, long = (plan["lines"]["KV cache"] for plan in plans)
    assert 1.9 * short < long <= 2 * short  # every tensor takes whole pages


def test_inspect_plans_without_loading(large: Path) -> None:
    def invoke(*options: str) -> Any:
        return CliRunner().invoke(app, ["inspect", str(large), "--context", "256", *options])

    ram = smallest(large) + 20 * MIB
    shown = invoke("--plan", "--ram", str(ram))
    assert shown.exit_code == 0, shown.output
    assert re.search(r"expert slots .* \d+ of 192 experts", shown.stdout)
    found = json.loads(invoke("--plan", "--ram", str(ram), "--json").stdout)["plan"]
    assert found == planned(large, ram, "f32").to_dict()  # 256 tokens take little
    refused = invoke("--plan", "--ram", "120MiB")
    assert refused.exit_code == DeviceError.exit_code
    assert "expert slots" in refused.stderr
    named = CliRunner().invoke(app, ["inspect", "MiMo-V2-Flash", "--plan"])
    assert named.exit_code == UsageError.exit_code
    assert "known model" in named.stderr
