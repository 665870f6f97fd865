"""The tools that write docs/benchmarks.md: what their tables are made of, not the figures."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any, ClassVar, get_args

import cache_gains
import constraint_cost
import forecast_table
import growth
import kv_growth
import numpy as np
import pytest
import tables
import tiny
from make_random_model import scaled_config, tiny_config, write_model

from mimo_edge.bench.cases import Case
from mimo_edge.bench.results import OURS, Result, Row
from mimo_edge.budget import kv_bytes
from mimo_edge.errors import BackendError, UsageError
from mimo_edge.gguf_file import GgufFile
from mimo_edge.runtimes.ggml.backend import GgmlBackend
from mimo_edge.runtimes.ggml.bindings import TensorStruct
from mimo_edge.runtimes.ggml.raw import GgufTensors

# --- tables -------------------------------------------------------------------------------------


def test_a_section_of_the_document_is_replaced_or_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tmp_path / "d.md"
    monkeypatch.setattr(tables, "DOCUMENT", document)
    document.write_text("# D\n\n<!-- a: begin -->\nold\n<!-- a: end -->\nrest\n")
    tables.write_section("a", "new\n")
    assert document.read_text() == "# D\n\n<!-- a: begin -->\nnew\n<!-- a: end -->\nrest\n"
    with pytest.raises(UsageError, match="b: begin"):
        tables.write_section("b", "x\n")
    tables.write_section("b", "x\n", "Other things")
    tables.write_section("b", "y\n", "Other things")
    added = "\n## Other things\n<!-- b: begin -->\ny\n<!-- b: end -->\n"
    assert document.read_text().endswith(f"rest\n{added}")
    document.write_text("<!-- a: begin -->")
    with pytest.raises(UsageError, match="once each"):
        tables.write_section("a", "x\n", "A")


def test_rows_outlive_the_run_and_none_begins_too_late(tmp_path: Path) -> None:
    now = 0.0
    deadline = tables.Deadline(1, lambda: now)
    rows = tables.Rows(tmp_path / "r.json")

    def never() -> list[str]:
        raise AssertionError("measured twice")

    assert rows.get("a", deadline, lambda: ["1", "2"]) == ["1", "2"]
    assert deadline.note() == ""
    now = 61.0
    again = tables.Rows(tmp_path / "r.json")
    assert again.get("a", deadline, never) == ["1", "2"]
    assert again.get("b", deadline, never) == []
    assert again.get("c", deadline, never) == []
    assert deadline.note() == "\nNot measured in time: b, c.\n"
    (tmp_path / "r.json").write_text("nonsense")
    with pytest.raises(UsageError, match="no file of rows"):
        tables.Rows(tmp_path / "r.json")
    with pytest.raises(UsageError, match="--minutes"):
        tables.Deadline(0)


# --- KV cache -----------------------------------------------------------------------------------


def test_a_pattern_says_which_layers_slide() -> None:
    config = scaled_config("MiMo-V2-Flash", 7, 8, 1024, 0, "110")
    assert config.hybrid_layer_pattern == (1, 1, 0, 1, 1, 0, 1)
    assert scaled_config("MiMo-V2-Flash", 6, 8, 1024, 0, "0").hybrid_layer_pattern == (0,) * 6
    for wrong in ("", "012", "x"):
        with pytest.raises(UsageError, match="--pattern"):
            scaled_config("MiMo-V2-Flash", 6, 8, 1024, 0, wrong)


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_a_filled_cache_is_one_that_was_decoded_into(tmp_path: Path, kv_type: str) -> None:
    """As many rows, bytes and positions as after real tokens, and finite numbers behind them."""
    config = tiny.tiny_config(head_dim=96, v_head_dim=64)
    path = tmp_path / "m.gguf"
    write_model(path, config, experts="Q8_0", dense="Q8_0", head="Q8_0")
    source = GgufTensors(config, [GgufFile.open(path)])
    backend = GgmlBackend(source, threads=1, kv_type=kv_type)
    try:
        filled, real = backend.new_cache(201), backend.new_cache(201)
        backend.forward(np.arange(200, dtype=np.int32) % config.vocab_size, real)
        kv_growth.fill(filled, kv_type, 200)
        assert filled.length == real.length == 200
        assert np.array_equal(filled.ring.positions(), real.ring.positions())
        for spec, kv in zip(config.layers, filled.layers, strict=True):
            for tensor in (kv.key, kv.value):
                data = ctypes.string_at(
                    TensorStruct.from_address(tensor.pointer).data, tensor.nb[1] * kv.rows
                )
                written = [
                    any(data[start : start + tensor.nb[1]])
                    for start in range(0, len(data), tensor.nb[1])
                ]
                rows = kv.rows if spec.sliding else 200
                assert written == [True] * rows + [False] * (kv.rows - rows)
        token = np.array([7], np.int32)
        assert np.isfinite(backend.forward(token, filled).logits).all()
        found = kv_growth.measure(backend, kv_type, 200, 1)
        assert found.kv_bytes <= kv_bytes(config, 201, kv_type)
        assert found.attention_ms > 0
        assert found.token_ms > 0
    finally:
        backend.close()


def test_wrong_contexts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert kv_growth.main(["--contexts", "0"]) == 2
    assert kv_growth.main(["--kv-types", "q3"]) == 2
    assert "q3" in capsys.readouterr().err


# --- heat and guesses ---------------------------------------------------------------------------

GUESSES: tuple[cache_gains.Guess, ...] = get_args(cache_gains.Guess)


def test_every_way_of_reading_gives_the_same_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.gguf"
    write_model(path, tiny_config("MiMo-V2-Flash", 0))
    said = []
    for guess in GUESSES:
        way = cache_gains.Way(guess, guess=guess)
        runtime, experts = cache_gains.opened(path, 6, way, 1)
        with runtime:
            found = cache_gains.answer(runtime, experts, 0, 8)
            said.append(runtime.session().generate([1, 2, 3], max_tokens=8).token_ids)
            assert found.tokens == 7
            assert 0 < found.answer[0] < found.answer[1] == 7 * 3 * 2  # layers, chosen
            assert found.nbytes > 0
    assert said == [said[0]] * len(GUESSES)
    arguments = [str(path), "--slots", "6", "--tokens", "4", "--answers", "1"]
    assert cache_gains.main([*arguments, "--part", "prefetch"]) == 0
    table = capsys.readouterr().out
    assert [table.count(f"| 6 | {guess} |") for guess in GUESSES] == [1] * len(GUESSES)


# --- growth -------------------------------------------------------------------------------------


class FakeBench:
    """Answers as a run would: every case is a token in 10 ms, or a refusal below 1 MiB."""

    cases: ClassVar[list[Case]] = []

    def __init__(self, settings: Any) -> None:
        assert Path(settings.model).exists()

    def run(self, cases: list[Case]) -> list[Result]:
        FakeBench.cases.extend(cases)
        (case,) = cases
        if case.ram is not None and case.ram < 1 << 20:
            error = {"type": "DeviceError", "message": "too small", "hint": ""}
            return [Result(Row(OURS, case, True, error=error))]
        sample = {
            "tokens": case.tokens, "seconds": case.tokens * 0.01, "verifies": case.tokens,
            "hits": 3, "misses": 1, "read_bytes": 2e6 * case.tokens, "flash_bytes": 10,
        }  # fmt: skip
        run = {"peak_rss_bytes": 3 << 30, "flash_bytes_per_s": 0.0}
        return [Result(Row(OURS, case, True, samples=(sample,), runs=(run,)))]


def test_growth_makes_every_table_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(growth, "Bench", FakeBench)
    monkeypatch.setattr(FakeBench, "cases", [])
    arguments = ["--folder", str(tmp_path / "g"), "--tiny", "--tokens", "4", "--threads", "1"]
    assert growth.main(arguments) == 0
    text = capsys.readouterr().out
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 3 + len(growth.EXPERTS) + len(growth.SHARES) + len(growth.DRAFTS)
    refused = text.count("| refused | - | - |")
    assert 0 < refused < len(growth.SHARES)
    measured = text.count("| 100.00 | 75.0% | 2.0 |")
    assert measured + refused == len(growth.EXPERTS) + len(growth.SHARES)
    assert [line[1] for line in lines[-4:]] == ["10.0"] * 4
    rams = [case.ram for case in FakeBench.cases]
    assert rams[0] is None
    assert rams[1] is not None
    drafts = [case.draft for case in FakeBench.cases[-8:]]
    assert drafts == [0, 0, 1, 1, 2, 2, 3, 3]
    assert not list((tmp_path / "g").glob("*.gguf"))
    ran = len(FakeBench.cases)
    assert growth.main(arguments) == 0
    assert capsys.readouterr().out == text
    assert len(FakeBench.cases) == ran
    (kept,) = (tmp_path / "g").glob("rows-*.json")
    rows = json.loads(kept.read_text())
    del rows["16 experts"]
    kept.write_text(json.dumps(rows))
    assert growth.main([*arguments, "--part", "experts", "--minutes", "1e-9"]) == 0
    assert "Not measured in time: 16 experts." in capsys.readouterr().out


def test_a_run_that_fails_is_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(FakeBench):
        def run(self, cases: list[Case]) -> list[Result]:
            error = {"type": "BackendError", "message": "a crash", "hint": ""}
            return [Result(Row(OURS, cases[0], True, error=error))]

    monkeypatch.setattr(growth, "Bench", Broken)
    arguments = ["--folder", str(tmp_path), "--tiny", "--threads", "1"]
    assert growth.main(arguments) == BackendError.exit_code
    assert not list(tmp_path.glob("rows-*.json"))


# --- structured output --------------------------------------------------------------------------


def test_costs_of_forms_are_of_every_state_and_of_equal_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "d.md"
    document.write_text("# D\n")
    monkeypatch.setattr(tables, "DOCUMENT", document)
    monkeypatch.setattr(constraint_cost, "VOCAB", 900)
    monkeypatch.setattr(constraint_cost, "TEXT_TOKENS", 800)
    arguments = ["--prompts", "1", "--rounds", "1", "--repeats", "2", "--threads", "1", "--write"]
    constraint_cost.main(arguments)
    text = capsys.readouterr().out
    first, _, rest = text.partition("Once per model")
    states, answers = ([r for r in t.splitlines() if r.startswith("|")] for t in (first, rest))
    assert [row.split(" | ")[0][2:] for row in states[2:]] == [s[0] for s in constraint_cost.STATES]
    assert states[2].endswith("| all |")
    assert len(answers) == 4
    assert text.strip() in document.read_text()


# --- forecasts ----------------------------------------------------------------------------------


def test_forecasts_stand_beside_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mimo_edge.devices.probe.KERNEL_FORMATS", ("Q4_0",))
    monkeypatch.setattr(
        forecast_table,
        "WHATS",
        (
            forecast_table.What(forecast_table.NANO, 3, kind="decode"),
            forecast_table.What(forecast_table.SMALL, kind="prefill"),
        ),
    )
    arguments = ["--folder", str(tmp_path), "--tiny", "--repetitions", "1"]
    assert forecast_table.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:4]]
    assert [row[:2] for row in rows] == [
        ["mimo-nano", "decode"],
        ["2 layers x 64 experts", "prompt of 512"],
    ]
    for row in rows:
        forecast, measured = float(row[4]), float(row[5].split()[0])
        assert float(row[6].rstrip("%")) == pytest.approx(100 * (forecast / measured - 1), abs=2)
    assert any("of 2 within 25%" in line for line in lines)
    # measured once, forecast again
    kept = (tmp_path / "rows.json").read_text()
    assert forecast_table.main(arguments) == 0
    assert (tmp_path / "rows.json").read_text() == kept
