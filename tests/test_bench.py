"""mimo-edge bench: figures from samples, pairs with llama.cpp, caps, the table and its files."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from onnx_models import make_bundle
from random_model import random_model
from typer.testing import CliRunner

from mimo_edge.bench import page_cache, session
from mimo_edge.bench.cases import Case, Settings, grid
from mimo_edge.bench.cgroup import MemoryCgroup, _parents
from mimo_edge.bench.engine_worker import drawn_ids
from mimo_edge.bench.flash_rate import flash_rate
from mimo_edge.bench.results import COLUMNS, Result, Row, csv_rows, same_choices
from mimo_edge.bench.session import Bench
from mimo_edge.cli.main import app
from mimo_edge.errors import BundleError, DeviceError, UsageError

MIB = 1 << 20
CASE = Case("decode", 8, 16, 0, None, 1)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "MiMo-V2-Flash")


# --- what is measured --------------------------------------------------------------------------


def test_grid_is_every_combination_prefill_once_per_cap() -> None:
    cases = grid(
        prefill=[64, 128],
        decode=[8],
        depths=[16, 32],
        drafts=[0, "auto"],
        rams=[None, 1 << 30],
        threads=[1, 2],
    )
    assert len(cases) == len(set(cases)) == 2 * 2 * (2 + 2 * 2)
    assert [case.label for case in cases[:6]] == [
        "pp64", "pp128", "tg8@16", "tg8@16", "tg8@32", "tg8@32",
    ]  # fmt: skip
    assert all(case.draft == 0 for case in cases if case.kind == "prefill")


@pytest.mark.parametrize(
    "wrong",
    [
        {"prefill": [0]},
        {"decode": [-1]},
        {"depths": [-5]},
        {"prefill": [1 << 40]},
        {"threads": [0]},
        {"prefill": [], "decode": []},
    ],
)
def test_grid_refuses_lengths_that_make_no_sense(wrong: dict[str, list[int]]) -> None:
    good: dict[str, Any] = {
        "prefill": [1], "decode": [1], "depths": [1], "drafts": [0], "rams": [None], "threads": [1],
    }  # fmt: skip
    grid(**good)
    with pytest.raises(UsageError):
        grid(**good | wrong)


def test_drawn_ids_depend_on_seed_and_stream_only() -> None:
    assert drawn_ids(3, 1, 5, 100) == drawn_ids(3, 1, 5, 100)
    assert drawn_ids(3, 1, 50, 100) != drawn_ids(3, 2, 50, 100) != drawn_ids(4, 2, 50, 100)
    assert set(drawn_ids(0, 0, 1000, 7)) == set(range(7))


# --- figures -----------------------------------------------------------------------------------


def sample(tokens: int, seconds: float, **more: Any) -> dict[str, Any]:
    return {"tokens": tokens, "seconds": seconds, "first_token_s": 0.25, **more}


def test_a_row_takes_medians_and_keeps_the_extremes() -> None:
    samples = [
        sample(10, 1.0, verifies=5, hits=30, misses=10, flash_bytes=1000, read_bytes=1200),
        sample(12, 3.0, verifies=5, hits=10, misses=30, flash_bytes=3000, read_bytes=3200),
        sample(10, 2.0, verifies=10, hits=20, misses=20, flash_bytes=2400, read_bytes=None),
    ]
    runs = ({"peak_rss_bytes": 7, "flash_bytes_per_s": 4000.0, "budget": {"total": 5}},)
    row = Row("mimo-edge", CASE, True, tuple(samples), runs, kernel_peak_bytes=6)
    assert row.tps is not None
    assert (row.tps.median, row.tps.min, row.tps.max) == (5.0, 4.0, 10.0)
    assert row.tokens_per_verify == 32 / 20
    assert row.verify_ms == 6000 / 20
    assert row.hit_rate == 0.5
    assert row.flash_bytes_per_token == 200
    assert row.bound_tps == 20
    assert row.read_bytes_per_token is None  # one of them was not counted
    assert row.planned_bytes == 5
    assert row.measured_bytes == 7  # no cap: what the process held
    capped = Row("mimo-edge", Case("decode", 8, 16, 0, 9, 1), True, tuple(samples), runs, 6)
    assert capped.measured_bytes == 6  # what the kernel counted against the cap


def test_a_row_without_samples_has_no_figures() -> None:
    row = Row("mimo-edge", CASE, False, error={"type": "DeviceError", "message": "m", "hint": ""})
    figures = (row.tps, row.hit_rate, row.peak_rss_bytes, row.tokens_per_verify)
    assert figures == (None,) * 4
    fields = json.loads(json.dumps(row.to_dict()))
    assert fields["error"]["type"] == "DeviceError"
    assert set(fields) == {
        "engine", "test", "kind", "tokens", "depth", "draft", "ram", "threads",
        "backend", "context", "load_s", "draft_why", "slots", "flash_bytes_per_s", "settings",
        "continued_with", "tps", "forecast_tps", "first_token_ms", "tokens_per_verify", "verify_ms",
        "hit_rate",
        "flash_bytes_per_token", "read_bytes_per_token", "bound_tps", "peak_rss_bytes",
        "kernel_peak_bytes", "planned_bytes", "cgroup", "cached_before_bytes", "error", "notes",
        "samples",
    }  # fmt: skip


def test_ratios_are_per_pair() -> None:
    ours = Row("mimo-edge", CASE, True, (sample(8, 1.0), sample(8, 4.0), sample(8, 1.0)))
    theirs = Row("llama.cpp", CASE, True, (sample(8, 2.0), sample(8, 4.0), sample(8, 6.0)))
    result = Result(ours, theirs)
    assert result.ratios == (2.0, 1.0, 6.0)
    assert result.ratio is not None
    assert (result.ratio.median, result.ratio.min, result.ratio.max) == (2.0, 1.0, 6.0)
    # Half a pair is no pair.
    assert Result(ours, Row("llama.cpp", CASE, True, (sample(8, 2.0),))).ratio is None


def test_choices_compare_to_the_first_difference_unless_both_saw_the_same_text() -> None:
    assert same_choices([1, 2, 3, 4], [1, 9, 3, 4], forced=True) == (3, 4)
    assert same_choices([1, 2, 3, 4], [1, 9, 3, 4], forced=False) == (1, 2)
    assert same_choices([1, 2], [1, 2, 3], forced=False) == (2, 2)


def test_csv_has_one_line_per_row_and_the_ratio_with_ours() -> None:
    ours = Row("mimo-edge", CASE, True, (sample(8, 1.0),))
    theirs = Row("llama.cpp", CASE, True, (sample(8, 2.0),))
    lines = [dict(zip(COLUMNS, line, strict=True)) for line in csv_rows([Result(ours, theirs)])]
    assert [line["engine"] for line in lines] == ["mimo-edge", "llama.cpp"]
    assert [line["ratio"] for line in lines] == [2.0, ""]
    assert lines[0]["tps"] == 8.0


# --- pairs, with processes that only pretend ----------------------------------------------------


class FakeWorkers:
    """Answers in place of processes; keeps the requests."""

    def __init__(self, reply: Callable[[dict[str, Any]], tuple[int, str, str]]) -> None:
        self.requests: list[dict[str, Any]] = []
        self._reply = reply

    def __call__(self, command: list[str], request: str) -> tuple[int, str, str]:
        self.requests.append(json.loads(request))
        return self._reply(self.requests[-1])


def good(request: dict[str, Any]) -> tuple[int, str, str]:
    ours = request["engine"] == "mimo-edge"
    count = request["repetitions"]
    answer = {
        "samples": [sample(8, 1.0 if ours else 2.0)] * count,
        "peak_rss_bytes": 5,
        "prompts": [[1, 2, 3 + request.get("first", 0)]] if ours else None,
        "forced": [7, 8],
        "warmup_prompt": [9],
        "choices": [4, 5],
        "context": 64,
    }
    return 0, json.dumps(answer), ""


def bench(
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    reply: Callable[[dict[str, Any]], tuple[int, str, str]] = good,
    **options: Any,
) -> tuple[Bench, FakeWorkers]:
    workers = FakeWorkers(reply)
    monkeypatch.setattr(session, "_run", workers)
    return Bench(Settings(str(model), repetitions=3), **options), workers


def test_engines_take_turns_on_the_same_ids(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    run, workers = bench(monkeypatch, tiny, against=True)
    (result,) = run.run([CASE])
    assert [r["engine"] for r in workers.requests] == ["mimo-edge", "llama.cpp"] * 3
    assert [r["first"] for r in workers.requests[::2]] == [0, 1, 2]
    assert [r["prompts"][0][2] for r in workers.requests[1::2]] == [3, 4, 5]
    for request in workers.requests[1::2]:
        assert request["forced"] == [7, 8]
        assert request["threads"] == CASE.threads
        assert request["context"] == 64
        assert request["repack"]
    assert result.ratios == (2.0, 2.0, 2.0)
    assert result.same_choices == (6, 6)
    assert result.ours.case.depth == 3  # what it really was


def test_alone_one_process_measures_all(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    run, workers = bench(monkeypatch, tiny)
    (result,) = run.run([CASE])
    assert [r["repetitions"] for r in workers.requests] == [3]
    assert len(result.ours.samples) == 3
    assert result.theirs is None
    assert result.ratio is None


def test_a_row_says_what_its_text_does_to_it(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    def reply(forced: Any, choices: list[int], slots: int | None) -> Any:
        def answer(request: dict[str, Any]) -> tuple[int, str, str]:
            code, out, log = good(request)
            found = json.loads(out) | {"forced": forced, "choices": choices, "slots": slots}
            return code, json.dumps(found), log

        return answer

    def notes(draft: Any, *how: Any) -> str:
        run, _ = bench(monkeypatch, tiny, reply(*how))
        (result,) = run.run([Case("decode", 8, 16, draft, None, 1)])
        return " ".join(result.ours.notes)

    assert "what drafting costs" in notes(3, [1, 2], [5, 6], None)
    assert notes(0, [1, 2], [5, 6], None) == ""
    assert "2 different tokens of 10" in notes(0, None, [5, 6] * 5, 64)
    assert notes(0, None, [5, 6] * 5, None) == ""  # no experts are read
    assert notes("auto", None, [5, 6, 7], 64) == ""


def test_stock_repacks_where_its_second_copy_fits(
    monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    caps = [None, 64 * MIB, 4 << 30]
    for option, want in (("auto", [True, False, True]), ("on", [True] * 3), ("off", [False] * 3)):
        run, workers = bench(monkeypatch, tiny, against=True, repack=option)
        if run.no_cgroup:
            pytest.skip(run.no_cgroup)
        list(run.run([Case("decode", 8, 16, 0, cap, 1) for cap in caps]))
        assert [r["repack"] for r in workers.requests[1::6]] == want


def test_an_error_is_shown_in_its_row_and_the_next_case_runs(
    monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    refusal = {"type": "DeviceError", "message": "needs 9 bytes", "hint": "allow them"}

    def reply(request: dict[str, Any]) -> tuple[int, str, str]:
        if request["engine"] == "mimo-edge" and request["case"]["tokens"] == 1:
            return 0, json.dumps({"error": refusal}), ""
        if request["engine"] == "mimo-edge" and request["case"]["tokens"] == 2:
            return -6, "", "GGML_ASSERT(x) failed"
        return good(request)

    run, workers = bench(monkeypatch, tiny, reply, against=True)
    found = list(run.run([Case("decode", n, 16, 0, None, 1) for n in (1, 2, 3)]))
    assert found[0].ours.error == refusal
    assert found[0].theirs is None  # nothing to compare with
    assert found[1].ours.error is not None
    assert found[1].ours.error["type"] == "BackendError"
    assert "status -6: GGML_ASSERT(x) failed" in found[1].ours.error["message"]
    assert found[2].ratios == (2.0, 2.0, 2.0)
    assert len(workers.requests) == 1 + 1 + 6


def test_an_interrupt_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    def reply(request: dict[str, Any]) -> tuple[int, str, str]:
        if request["case"]["tokens"] == 2:
            raise KeyboardInterrupt
        return good(request)

    monkeypatch.setattr(session, "_run", FakeWorkers(reply))
    done = invoke(str(tiny), "-p", "none", "-n", "1,2,3", "-d", "16", "-v")
    assert done.exit_code == 130
    assert "tg1@3" in done.stdout
    assert "tg1@3: mimo-edge: 8.00 tok/s" in done.stderr
    assert "tg2" not in done.stdout


def test_without_a_cgroup_nothing_pretends_to_be_capped(
    monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    monkeypatch.setattr("mimo_edge.bench.cgroup._parents", lambda: [])
    run, workers = bench(monkeypatch, tiny, against=True)
    assert "no memory cgroup can be made" in run.no_cgroup
    capped, free = run.run([Case("decode", 8, 16, 0, cap, 1) for cap in (64 * MIB, None)])
    assert not capped.ours.cgroup
    assert capped.ours.kernel_peak_bytes is None
    assert any("no memory cgroup" in note for note in capped.ours.notes)
    assert capped.theirs is not None
    assert capped.theirs.error is not None
    assert "llama.cpp has no bound of its own" in capped.theirs.error["message"]
    assert not free.ours.notes
    assert free.ratios == (2.0, 2.0, 2.0)
    assert len(workers.requests) == 1 + 6


# --- caps --------------------------------------------------------------------------------------


def fake_system(
    root: Path, mounts: Sequence[str], own: Sequence[str], controllers: dict[str, str]
) -> Path:
    proc = root / "proc"
    proc.mkdir()
    (proc / "mounts").write_text("".join(f"x {root}/{line}\n" for line in mounts))
    (proc / "cgroup").write_text("".join(f"{line}\n" for line in own))
    for folder, enabled in controllers.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "cgroup.subtree_control").write_text(enabled)
    return proc


def test_version_2_goes_up_to_a_parent_that_delegates(tmp_path: Path) -> None:
    proc = fake_system(
        tmp_path,
        ["fs cgroup2 rw 0 0"],
        ["0::/user.slice/app.slice/run.scope"],
        {
            "fs": "cpu memory",
            "fs/user.slice": "memory pids",
            "fs/user.slice/app.slice": "memory",
            "fs/user.slice/app.slice/run.scope": "",
        },
    )
    root = tmp_path / "fs"
    assert _parents(proc) == [
        (root / "user.slice/app.slice", 2),
        (root / "user.slice", 2),
        (root, 2),
    ]


def test_version_1_is_found_beside_an_empty_version_2(tmp_path: Path) -> None:
    proc = fake_system(
        tmp_path,
        ["memory cgroup rw,memory 0 0", "cpu cgroup rw,cpu 0 0", "unified cgroup2 rw 0 0"],
        ["4:memory:/ours", "1:cpu:/", "0::/"],
        {"memory/ours": "", "unified": ""},
    )
    root = tmp_path / "memory"
    assert _parents(proc) == [(root / "ours", 1), (root, 1)]


def test_a_system_without_cgroups_has_no_place(tmp_path: Path) -> None:
    assert _parents(tmp_path) == []


ALLOCATE = "import sys; data = bytearray(int(sys.argv[1])); print(len(data))"


@pytest.fixture
def group() -> Any:
    try:
        found = MemoryCgroup.create(100 * MIB)
    except DeviceError as error:
        pytest.skip(str(error))
    with found:
        yield found
    assert not found.path.exists()


def test_the_kernel_keeps_the_cap_and_counts_the_peak(group: MemoryCgroup) -> None:
    command = group.command([sys.executable, "-c", ALLOCATE, str(60 * MIB)])
    assert subprocess.run(command, capture_output=True, check=True).stdout.strip() == b"62914560"
    peak = group.peak_bytes()
    assert peak is None or 60 * MIB < peak <= 100 * MIB
    assert group.kills() == 0
    command = group.command([sys.executable, "-c", ALLOCATE, str(200 * MIB)])
    assert subprocess.run(command, capture_output=True, check=False).returncode == -9
    assert group.kills() == 1


def test_dropping_a_file_from_the_page_cache_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3 * MIB + 5))
    page_cache.drop([path])
    if page_cache.cached_bytes([path]):
        pytest.skip("this file system keeps its pages")
    path.read_bytes()
    assert page_cache.cached_bytes([path]) == 3 * MIB + 5


# --- the whole command -------------------------------------------------------------------------

QUICK = ("-t", "1", "-r", "2", "--warmup", "2")


def test_against_llama_cpp_on_one_file(tiny: Path, tmp_path: Path) -> None:
    table = tmp_path / "out.csv"
    done = invoke(
        str(tiny), "--backend", "ggml", "-p", "40", "-n", "6", "-d", "20", "--draft", "0",
        "--ram", "1GiB", "--against", "llama.cpp", *QUICK, "--json", "--csv", str(table),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["schema"] == 1
    assert found["machine"]["usable_cores"] >= 1
    assert [r["rows"][0]["test"] for r in found["results"]] == ["pp40", "tg6@20"]
    if found["no_cgroup"]:
        pytest.skip(found["no_cgroup"])
    for result in found["results"]:
        ours, theirs = result["rows"]
        assert (ours["engine"], theirs["engine"]) == ("mimo-edge", "llama.cpp")
        assert ours["backend"] == "ggml"
        assert len(ours["samples"]) == len(theirs["samples"]) == len(result["ratios"]) == 2
        assert ours["tps"]["min"] <= ours["tps"]["median"] <= ours["tps"]["max"]
        assert ours["planned_bytes"] > 0
        assert ours["context"] <= theirs["context"]  # llama.cpp rounds up
        assert theirs["settings"]["mmap"]
        assert theirs["settings"]["n_ubatch"] <= 512
        # The same file and ids: the same next tokens, but for near ties of random logits, which
        # rounding of 8-bit activations decides.
        alike, compared = result["same_choices"]
        assert compared in (2, 2 * (1 + 2 + 6))
        assert alike >= 0.75 * compared
        assert ours["continued_with"] == "drawn"
        assert ours["peak_rss_bytes"] > MIB
        assert 0 < ours["kernel_peak_bytes"] < 1 << 30
    lines = list(csv.DictReader(table.read_text().splitlines()))
    assert [line["engine"] for line in lines] == ["mimo-edge", "llama.cpp"] * 2
    assert tuple(lines[0]) == COLUMNS
    assert float(lines[0]["ratio"]) > 0


def test_backends_and_llama_cpp_in_one_table(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path)
    done = invoke(
        str(path), "--backend", "onnx,ggml", "-p", "none", "-n", "4", "-d", "8", "--draft", "0",
        "--against", "llama.cpp", *QUICK, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = [row for result in json.loads(done.stdout)["results"] for row in result["rows"]]
    assert [row["backend"] for row in rows] == ["onnx", "llama.cpp", "ggml", "llama.cpp"]
    assert all(row["error"] is None and row["tps"]["median"] > 0 for row in rows)


def test_the_built_in_model_and_a_prompt() -> None:
    done = invoke(
        "mimo-nano", "--prompt", "turn on guest wifi for two hours", "-p", "none", "-n", "8",
        "--draft", "0,3", *QUICK, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    plain, drafted = (result["rows"][0] for result in json.loads(done.stdout)["results"])
    assert plain["depth"] == drafted["depth"] > 100  # the tools are in the prompt
    assert plain["tokens_per_verify"] == 1
    assert drafted["tokens_per_verify"] > 1
    assert drafted["draft"] == 3
    assert plain["continued_with"] == "greedy"
    assert plain["planned_bytes"] is None  # the reference backend does not plan


def test_a_dense_model(tmp_path: Path) -> None:
    model = random_model(tmp_path / "dense.gguf", "MiMo-7B")
    done = invoke(
        str(model), "--backend", "ggml", "-p", "none", "-n", "4", "-d", "8", "--draft", "auto",
        "--against", "llama.cpp", "-t", "1", "-r", "1",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.stdout.count("llama.cpp") == 1
    assert "tok/verify" in done.stdout


def test_a_cap_too_small_is_a_row_not_the_end(tiny: Path) -> None:
    done = invoke(
        str(tiny), "--backend", "ggml", "-p", "16", "-n", "none", "--ram", "90MiB,none",
        *QUICK, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    refused, free = (result["rows"][0] for result in json.loads(done.stdout)["results"])
    assert refused["error"]["type"] == "DeviceError"
    assert "--ram allows 90.0 MiB" in refused["error"]["message"]
    assert "--ram allows 90.0 MiB" in done.stderr
    assert refused["tps"] is None
    assert free["tps"]["median"] > 0
    alone = invoke(str(tiny), "--backend", "ggml", "-p", "16", "-n", "none", "--ram", "9MiB")
    assert alone.exit_code == 1  # nothing was measured


def test_more_than_the_model_has_positions_is_a_row(tiny: Path) -> None:
    done = invoke(str(tiny), "--backend", "ggml", "-p", "10000000", "-n", "none", *QUICK, "--json")
    assert done.exit_code == 1
    (result,) = json.loads(done.stdout)["results"]
    assert result["rows"][0]["error"]["type"] == "ContextLengthError"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("no-such-bundle",), 1, "no-such-bundle"),
        (("mimo-nano", "-p", "0"), 2, "prefill 0"),
        (("mimo-nano", "-p", "1e3"), 2, "no list of whole numbers"),
        (("mimo-nano", "-n", "4,,5"), 2, "empty part"),
        (("mimo-nano", "-p", "none", "-n", "none"), 2, "nothing to measure"),
        (("mimo-nano", "--against", "vllm"), 2, "only llama.cpp"),
        (("mimo-nano", "--against", "llama.cpp"), 2, "export it first"),
        (("mimo-nano", "--draft", "7"), 2, "--draft '7'"),
        (("mimo-nano", "--ram", "much"), 2, "no size in bytes"),
        (("mimo-nano", "-r", "0"), 2, "repetitions = 0"),
        (("mimo-nano", "--tokens", "x"), 2, "tokens = 'x'"),
        (("mimo-nano", "--prompt", "hi", "-d", "5"), 2, "--prompt sets the depth"),
        (("mimo-nano", "--repack", "maybe"), 2, "--repack 'maybe'"),
        (("mimo-nano", "--kv-type", "q3"), 2, "kv_type 'q3'"),
    ],
)
def test_errors(arguments: tuple[str, ...], code: int, message: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == code
    assert message in done.stderr
    assert done.stdout == ""


def test_flash_rate_reads_the_experts(tiny: Path, tmp_path: Path) -> None:
    assert flash_rate(str(tiny), max_s=0.05) > 0
    with pytest.raises(BundleError):
        flash_rate(str(tmp_path / "none.gguf"))


def test_forecasts_are_those_of_a_plan(tiny: Path) -> None:
    from mimo_edge.bench.forecasts import Forecasts
    from mimo_edge.devices.profile import load_profile
    from mimo_edge.planner import plan

    device = load_profile("phone")
    forecasts = Forecasts(Settings(str(tiny)), device)
    run = {"backend": "ggml", "context": 200, "tokens": "drawn"}
    case = Case("decode", 8, 32, 0, None, device.threads)
    # half-way: 32 tokens of the prompt, 16 of warm-up, and half of 3 pieces of 8
    expected = plan(
        tiny, device, device.ram_bytes, 200, draft=0, depth=60, prompt=1, advise=False
    ).forecast
    assert expected is not None
    row = Row("mimo-edge", case, False, runs=(run,))
    assert forecasts.tps(row) == pytest.approx(expected.decode.tps)
    prefill = Row("mimo-edge", Case("prefill", 64, 0, 0, None, device.threads), False, runs=(run,))
    found = forecasts.tps(prefill)
    assert found is not None
    assert found > expected.decode.tps
    # drawn ids accept no draft, a text may
    drafting = Case("decode", 8, 32, "auto", None, device.threads)
    drawn = forecasts.tps(Row("mimo-edge", drafting, False, runs=(run,)))
    text = forecasts.tps(Row("mimo-edge", drafting, False, runs=({**run, "tokens": "greedy"},)))
    assert drawn is not None
    assert text is not None
    never = plan(
        tiny, device, device.ram_bytes, 200, depth=60, acceptance=(0, 0, 0), advise=False
    ).forecast
    assert never is not None
    assert drawn == pytest.approx(never.decode.tps)
    assert text >= drawn
    # not for other backends or threads, nor where it failed
    assert forecasts.tps(Row("mimo-edge", case, False, runs=({**run, "backend": "x"},))) is None
    other = Case("decode", 8, 32, 0, None, device.threads + 1)
    assert forecasts.tps(Row("mimo-edge", other, False, runs=(run,))) is None
    assert forecasts.tps(Row("mimo-edge", case, False)) is None
    too_small = Case("decode", 8, 32, 0, 1 << 20, device.threads)
    assert forecasts.tps(Row("mimo-edge", too_small, False, runs=(run,))) is None


def test_a_forecast_stands_beside_what_was_measured() -> None:
    from mimo_edge.cli.bench import HEADER, _cells

    row = Row("mimo-edge", CASE, False, (sample(8, 2.0),), forecast_tps=5.0)
    cells = dict(zip(HEADER, _cells(Result(row), row), strict=True))
    assert cells["tok/s"] == "4.00"
    assert cells["forecast"] == "5.00 -20%"
    assert row.to_dict()["forecast_tps"] == 5.0
    bare = Row("mimo-edge", CASE, False, (sample(8, 2.0),))
    assert dict(zip(HEADER, _cells(Result(bare), bare), strict=True))["forecast"] == "-"
