"""tools/quality_table.py on a tiny model: what it writes, and that it goes on where it stopped."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from checkpoint_factory import write_checkpoint

from mimo_edge.errors import UsageError
from mimo_edge.nano import commands as nano

BEGIN, END = "<!-- quality table: begin -->", "<!-- quality table: end -->"
SCRIPT = Path(__file__).parent.parent / "tools" / "quality_table.py"
COMMANDS: list[dict[str, Any]] = [
    {"id": "a", "lang": "en", "domain": "router", "tools": ["reboot_router"], "text": "restart",
     "calls": [{"name": "reboot_router", "arguments": {}}]},
    {"id": "b", "lang": "zh", "domain": "home", "tools": ["set_timer"], "text": "唱歌", "calls": [],
     "reply": "Sorry."},
]  # fmt: skip


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("quality_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "quality_table", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.os, "nice", lambda more: more)
    # Random weights never end an answer.
    monkeypatch.setattr(
        module, "evaluate_commands", partial(module.evaluate_commands, max_tokens=8)
    )
    monkeypatch.setattr(nano, "held_out", lambda: COMMANDS)
    monkeypatch.setattr(nano, "calibration_text", lambda: "turn on the light " * 20)
    return module


def run(table: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, *rows: str) -> Any:
    paths = {"--checkpoint": "checkpoint", "--json": "quality.json", "--markdown": "quality.md"}
    arguments = [part for flag, name in paths.items() for part in (flag, str(folder / name))]
    monkeypatch.setattr(
        sys, "argv", ["quality_table.py", *arguments, "--jobs", "1", "--only", *rows]
    )
    assert table.main() == 0
    return json.loads((folder / "quality.json").read_text("utf-8"))


@pytest.fixture
def folder(tmp_path: Path, table: ModuleType) -> Path:
    write_checkpoint(tmp_path / "checkpoint", tokenizer=True)
    (tmp_path / "quality.md").write_text(f"above\n{table.BEGIN}\nold\n{table.END}\nbelow\n")
    return tmp_path


def test_rows_are_written_kept_and_made_again_when_stale(
    table: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(table, monkeypatch, folder, "source", "q4_0-imatrix")
    assert set(first["rows"]) == {"source", "q4_0-imatrix"}
    source, weighted = first["rows"]["source"], first["rows"]["q4_0-imatrix"]
    assert source["text"]["mean_kl"] == 0
    assert source["text"]["top1_agreement"] == 1
    assert weighted["text"]["mean_kl"] > 0
    assert weighted["text"]["source_perplexity"] == source["text"]["perplexity"]
    assert weighted["recipe"]["calibrated"]
    page = (folder / "quality.md").read_text("utf-8")
    assert page.startswith("above\n")
    assert page.endswith("\nbelow\n")
    assert "old" not in page
    assert page.count("| source, FP8 |") == page.count("| Q4_0 with imatrix |") == 1

    # A second run measures only what is missing.
    measured = []
    really = table._measure

    def noted(row: Any, *rest: Any) -> Any:
        measured.append(row.key)
        return really(row, *rest)

    monkeypatch.setattr(table, "_measure", noted)
    second = run(table, monkeypatch, folder, "source", "q4_0", "q4_0-imatrix")
    assert measured == ["q4_0"]
    assert second["rows"]["source"] == source

    # Other commands: nothing may stay.
    monkeypatch.setattr(nano, "held_out", lambda: COMMANDS[:1])
    third = run(table, monkeypatch, folder, "source")
    assert set(third["rows"]) == {"source"}
    assert third["facts"]["commands"] == 1


def test_a_checkpoint_that_changes_meanwhile_is_noticed(
    table: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = table._measure

    def meddled(*arguments: Any) -> Any:
        result = really(*arguments)
        with (folder / "checkpoint" / "tokenizer_config.json").open("a") as file:
            file.write(" ")
        return result

    monkeypatch.setattr(table, "_measure", meddled)
    with pytest.raises(UsageError, match="changed while it was measured"):
        run(table, monkeypatch, folder, "source")
    assert not (folder / "quality.json").exists()


def test_processes_side_by_side_measure_the_same(tmp_path: Path) -> None:
    rows = []
    for jobs in ("1", "2"):
        (tmp_path / "quality.md").write_text(f"{BEGIN}\n{END}\n")
        found = tmp_path / f"{jobs}.json"
        arguments = ["--limit", "2", "--jobs", jobs, "--nice", "0", "--json", str(found)]
        arguments += ["--markdown", str(tmp_path / "quality.md"), "--only", "q8_0", "source"]
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        rows.append(json.loads(found.read_text("utf-8"))["rows"])
        assert list(rows[-1]) == ["source", "q8_0"]  # in the table's order, whoever was first
        for row in rows[-1].values():
            assert row.pop("seconds") > 0
            assert row["text"].pop("seconds") > 0
            assert row["commands"].pop("seconds") > 0
    assert rows[0] == rows[1]


def test_a_page_without_markers_is_refused(table: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("no table here")
    with pytest.raises(UsageError, match="markers"):
        table._insert(page, "table")
    assert page.read_text() == "no table here"


def test_the_page_in_the_repository_has_its_markers(table: ModuleType) -> None:
    page = (SCRIPT.parent.parent / "docs" / "quality.md").read_text("utf-8")
    assert page.count(table.BEGIN) == page.count(table.END) == 1
