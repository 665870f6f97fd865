"""`mimo-edge eval` on tiny bundles: the report, how the source is found, and refusals."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_factory import write_checkpoint
from typer.testing import CliRunner

from mimo_edge import suites
from mimo_edge.cli.main import app
from mimo_edge.evaluate import TextChunk, evaluate_commands, evaluate_text
from mimo_edge.export.checkpoint import Checkpoint
from mimo_edge.export.pipeline import export_bundle
from mimo_edge.export.weights import CheckpointWeights
from mimo_edge.nano import commands as nano
from mimo_edge.runtimes.reference import ReferenceBackend
from mimo_edge.suites import spread
from mimo_edge.tokenizer import Tokenizer

TEXT = "turn on the guest wifi for two hours 把客厅的灯调暗一点<|im_end|>\n" * 20


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint, a bundle that lost something, and a text."""
    folder = tmp_path_factory.mktemp("eval")
    checkpoint, _ = write_checkpoint(folder / "checkpoint", tokenizer=True)
    export_bundle(checkpoint, folder / "bundle", recipe="q4_0").close()
    (folder / "text.txt").write_text(TEXT, "utf-8")
    return {"checkpoint": checkpoint, "bundle": folder / "bundle", "text": folder / "text.txt"}


@pytest.fixture
def built_in(model: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The tiny checkpoint plays the built-in model, with three commands."""
    commands: list[dict[str, Any]] = [
        {"lang": "en", "domain": "home", "tools": ["switch_light", "lock_door"], "text": "light on",
         "calls": [{"name": "switch_light", "arguments": {"room": "all", "state": "on"}}]},
        {"lang": "zh", "domain": "router", "tools": ["reboot_router"], "text": "重启路由器",
         "calls": [{"name": "reboot_router", "arguments": {}}]},
        {"lang": "en", "domain": "phone", "tools": ["set_timer"], "text": "sing", "calls": [],
         "reply": "Sorry."},
    ]  # fmt: skip
    commands = [{"id": f"c{i}"} | c for i, c in enumerate(commands)]
    # Random weights never end an answer.
    monkeypatch.setattr(suites, "evaluate_commands", partial(evaluate_commands, max_tokens=24))
    monkeypatch.setattr(nano, "held_out", lambda: commands)
    monkeypatch.setattr(nano, "checkpoint_dir", lambda: model["checkpoint"])
    return commands


def test_a_text_against_the_source(model: dict[str, Path]) -> None:
    options = ("--against", model["checkpoint"], "--backend", "reference", "--json")
    result = invoke(model["bundle"], "--suite", model["text"], *options)
    assert result.exit_code == 0, result.output
    raw = json.loads(result.stdout)
    assert raw["suite"] == "text.txt"
    assert raw["against"] == "checkpoint"
    assert raw["commands"] is None

    # The same from the parts: our own chunks, backends and tokenizer.
    tokenizer = Tokenizer.from_file(model["checkpoint"] / "tokenizer.json")
    ids = np.asarray(tokenizer.encode(TEXT, allow_special=True), np.int32)
    assert len(ids) > 512
    from mimo_edge.bundle import Bundle

    want = evaluate_text(
        ReferenceBackend(CheckpointWeights(Checkpoint.open(model["checkpoint"]))),
        ReferenceBackend(Bundle.open(model["bundle"]).weights()),
        [TextChunk(ids[:512]), TextChunk(ids[512:])],
    )
    for key in ("tokens", "chunks", "perplexity", "source_perplexity", "mean_kl", "top1_agreement"):
        assert raw["text"][key] == pytest.approx(getattr(want, key), rel=1e-9), key
    assert raw["text"]["mean_kl"] > 0


def test_limit_takes_chunks_of_a_text(model: dict[str, Path]) -> None:
    result = invoke(model["bundle"], "--suite", model["text"], "--limit", 1, "--json")
    raw = json.loads(result.stdout)
    assert raw["text"]["tokens"] == 511
    assert raw["against"] is None
    assert raw["text"]["mean_kl"] is None


def test_commands_find_their_source_by_themselves(
    model: dict[str, Path], built_in: list[dict[str, Any]]
) -> None:
    result = invoke(model["bundle"], "--json")
    assert result.exit_code == 0, result.output
    raw = json.loads(result.stdout)
    assert raw["against"] == "mimo-nano"
    assert raw["text"]["mean_kl"] > 0
    answers = raw["commands"]
    assert answers["commands"] == 3
    assert set(answers["by_language"]) == {"en", "zh"}
    assert answers["by_kind"]["refusal"]["commands"] == 1
    assert len(answers["drafted_by_depth"]) == 3  # as many as the model has
    assert answers["exact"] + len(answers["failures"]) == 3


def test_a_bundle_of_another_model_has_no_source_of_its_own(
    model: dict[str, Path], built_in: list[dict[str, Any]], tmp_path: Path
) -> None:
    other, _ = write_checkpoint(tmp_path / "other", tokenizer=True, shards=2, seed=5)
    export_bundle(other, tmp_path / "bundle", recipe="q8_0").close()
    raw = json.loads(invoke(tmp_path / "bundle", "--limit", 2, "--json").stdout)
    assert raw["against"] is None
    assert raw["commands"]["commands"] == 2


def test_drafting_changes_the_time_not_the_answers(
    model: dict[str, Path], built_in: list[dict[str, Any]]
) -> None:
    reports = [
        json.loads(invoke(model["bundle"], "--draft", draft, "--json").stdout)["commands"]
        for draft in (0, 2)
    ]
    assert reports[0]["failures"] == reports[1]["failures"]
    assert reports[0]["tokens"] == reports[1]["tokens"]
    assert reports[0]["drafted_by_depth"] == []
    assert reports[0]["tokens_per_verify"] == 1
    assert len(reports[1]["drafted_by_depth"]) == 2


def test_the_same_report_twice(model: dict[str, Path], built_in: list[dict[str, Any]]) -> None:
    def report() -> Any:
        raw = json.loads(invoke(model["bundle"], "--json").stdout)
        for part in ("text", "commands"):
            del raw[part]["seconds"]
        return raw

    assert report() == report()


def test_people_get_tables_and_wrong_answers(
    model: dict[str, Path], built_in: list[dict[str, Any]]
) -> None:
    result = invoke(model["bundle"])
    assert result.exit_code == 0, result.output
    for part in (
        "checkpoint, nano-commands, against mimo-nano",
        "perplexity of the source",
        "same most likely token",
        "tokens per verify",
        "c0: light on",
        'wanted -> switch_light(room="all", state="on")',
        "got    ",
    ):
        assert part in result.stdout, part
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["zh", "0", "1", "0.00", "%"] in lines


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--suite", "nothing"), 2, "there is no suite or text file nothing"),
        (("--suite", "latin1.txt"), 2, "is not UTF-8: byte 0xe9 at 3"),
        (("--suite", "blank.txt"), 2, "is empty"),
        (("--suite", "one.txt"), 2, "too short to evaluate"),
        (("--suite", "."), 2, "cannot read text"),
        (("--limit", "0"), 2, "limit = 0"),
        (("--draft", "9"), 2, "--draft '9'"),
        (("--suite", "x" * 5000), 2, "File name too long"),
        (("--backend", "abacus"), 1, "abacus"),
        (("--against", "nowhere"), 1, "nowhere"),
    ],
)
def test_wrong_calls_are_one_line(
    model: dict[str, Path],
    built_in: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin1.txt").write_bytes("café".encode("latin-1"))
    Path("blank.txt").write_text(" \n")
    Path("one.txt").write_text("a")
    result = invoke(model["bundle"], *arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_drafts_the_model_cannot_make_are_refused_before_minutes_of_text(
    model: dict[str, Path], built_in: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("measured first")

    monkeypatch.setattr("mimo_edge.suites.evaluate_text", never)
    monkeypatch.setattr("mimo_edge.speculative.max_draft", lambda config: 2)
    result = invoke(model["bundle"], "--draft", "3")
    assert result.exit_code == 2, result.output
    assert "can propose 2" in result.stderr


def test_sources_that_do_not_belong_are_refused(model: dict[str, Path], tmp_path: Path) -> None:
    larger, _ = write_checkpoint(tmp_path / "larger", tokenizer=True, vocab_size=400)
    result = invoke(model["bundle"], "--suite", model["text"], "--against", larger)
    assert result.exit_code == 2
    assert "source has 400 tokens" in result.stderr
    # The same size, but other words.
    other, _ = write_checkpoint(tmp_path / "other", tokenizer=True)
    raw = json.loads((other / "tokenizer.json").read_text("utf-8"))
    vocab = raw["model"]["vocab"]
    vocab["t"], vocab["e"] = vocab["e"], vocab["t"]
    (other / "tokenizer.json").write_text(json.dumps(raw), "utf-8")
    result = invoke(model["bundle"], "--suite", model["text"], "--against", other)
    assert result.exit_code == 2
    assert "another tokenizer" in result.stderr


def test_a_model_without_a_tokenizer_is_refused(model: dict[str, Path], tmp_path: Path) -> None:
    bare, _ = write_checkpoint(tmp_path / "bare")
    result = invoke(bare, "--suite", model["text"])
    assert result.exit_code == 1
    assert "has no tokenizer" in result.stderr


def test_a_part_of_the_set_has_every_kind() -> None:
    commands = [(lang, i % 16 == 7) for lang in ("en", "zh") for i in range(360)]
    some = spread(commands, 60)
    assert len(some) == 60
    assert some == spread(commands, 60)
    assert some == sorted(some, key=lambda c: c[0])  # order kept
    assert sum(refusal for _, refusal in some) >= 2
    assert spread(commands, None) == spread(commands, 720) == commands
