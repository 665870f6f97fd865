"""export, inspect and verify on the command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoint_factory import KINDS, write_checkpoint
from typer.testing import CliRunner, Result

from mimo_edge.bundle import Bundle
from mimo_edge.cli.main import app
from mimo_edge.known_models import KNOWN_MODELS
from mimo_edge.quant.imatrix import Imatrix


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", "flash", tokenizer=True)[0]


def test_export_then_verify_then_inspect(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call("export", source, out, "--recipe", "q8_0", "--override", "*.attn_v.*=F16", "-v")
    assert done.exit_code == 0, done.output
    assert "model-00002-of-00002.gguf" in done.stdout
    assert "expert" in done.stdout
    done = call("verify", out)
    assert done.exit_code == 0
    assert "24 experts" in done.stdout
    done = call("inspect", out, "--tensors")
    assert done.exit_code == 0
    assert "4: 2 global, 2 sliding over 9 tokens" in done.stdout
    lines = done.stdout.splitlines()
    assert any(line.startswith("tensor ") and line.endswith("worst block") for line in lines)
    (line,) = (line for line in lines if line.startswith("blk.1.ffn_up_exps.weight "))
    with Bundle.open(out) as bundle:
        assert bundle.tensors["blk.1.attn_v.weight"].type_name == "F16"
        assert bundle.manifest is not None
        entry = bundle.manifest.tensors["blk.1.ffn_up_exps.weight"]
        assert entry.relative_rms is not None
        assert entry.worst_block is not None
        assert line.split()[-2:] == [
            f"{100 * entry.relative_rms:.2f}%",
            f"{100 * entry.worst_block:.2f}%",
        ]
    listed = json.loads(call("inspect", out, "--json").stdout)["tensors"]
    assert listed["blk.1.ffn_up_exps.weight"]["relative_rms"] == entry.relative_rms
    assert listed["blk.1.ffn_up_exps.weight"]["worst_block"] == entry.worst_block
    assert listed["output_norm.weight"]["relative_rms"] is None


def test_json_is_one_object(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call("export", source, out, "--recipe", "q4_0", "--json")
    exported = json.loads(done.stdout)
    assert exported["path"] == str(out)
    assert exported["roles"]["expert"]["formats"].keys() == {"Q4_0"}
    # The head's rows are no whole Q6_K blocks in this small model, and that is said.
    assert any("Q6_K" in warning for warning in exported["warnings"])
    inspected = json.loads(call("inspect", out, "--json").stdout)
    assert inspected["bytes"] == sum(t["bytes"] for t in inspected["tensors"].values())
    assert inspected["config"]["sliding_window"] == 9
    assert json.loads(call("verify", out, "--json").stdout)["ok"] is True


def test_errors_are_one_line(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call("export", source, out).exit_code == 0
    cases: list[tuple[tuple[object, ...], int, str]] = [
        (("export", source, out), 1, "exists"),
        (("export", source, tmp_path / "b", "--recipe", "q9"), 2, "q9"),
        (("export", source, tmp_path / "b", "--override", "x"), 2, "GLOB=FORMAT"),
        (("export", source, tmp_path / "b", "--calibrate", tmp_path / "no.txt"), 2, "no.txt"),
        (("export", tmp_path / "none", tmp_path / "b"), 1, "none"),
        (("verify", source), 1, "not a bundle"),
        (("inspect", tmp_path / "none"), 1, "MiMo-V2-Flash"),
        (("inspect", tmp_path), 1, "holds neither"),
    ]
    for arguments, code, message in cases:
        done = call(*arguments)
        assert (done.exit_code, message in done.stderr) == (code, True), (arguments, done.output)
        assert len(done.stderr.strip().splitlines()) == 1
    with Bundle.open(out) as bundle:
        file, offset, _ = bundle.expert(2, 7).up
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)
    done = call("verify", out)
    assert done.exit_code == 1
    assert "layer 2, expert 7 is damaged" in done.stderr


def test_an_interrupted_export_exits_130_and_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mimo_edge", "export", "mimo-nano", str(tmp_path / "out")]
    command += ["--recipe", "q4_k", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        journal = tmp_path / ".out.partial" / "journal.jsonl"
        while not (journal.exists() and journal.stat().st_size):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b""), err
    assert err.decode().splitlines() == [
        "finished pieces are kept: the same command goes on from here",
        "interrupted",
    ]
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_calibrated_on_a_text_and_permuted(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("turn on the guest wifi for two hours, 把客厅的灯调暗一点\n" * 8)
    arguments = ("export", source, tmp_path / "out", "--calibrate", text, "--permute-by-heat")
    done = call(*arguments, "--recipe", "iq4_nl")
    assert done.exit_code == 0, done.output
    with Bundle.open(tmp_path / "out") as bundle:
        assert bundle.heat is not None
        assert bundle.heat.source == "text.txt"
        assert bundle.manifest is not None
        assert bundle.manifest.permutation
        assert bundle.imatrix_path is not None
        imatrix = bundle.imatrix_path
        assert "blk.1.ffn_up_exps.weight" in Imatrix.read(imatrix).names
    # A bundle's calibration serves again, whatever order its experts are in.
    done = call("export", source, tmp_path / "plain", "--calibrate", text, "--recipe", "iq4_nl")
    assert done.exit_code == 0, done.output
    done = call("export", source, tmp_path / "two", "--calibrate", imatrix, "--recipe", "iq4_nl")
    assert done.exit_code == 0, done.output
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_importance_of_another_model_is_refused(source: Path, tmp_path: Path) -> None:
    import numpy as np

    imatrix = Imatrix(("other",))
    imatrix.add("blk.0.attn_q.weight", np.ones((4, 128), np.float32))
    imatrix.write(tmp_path / "other.gguf")
    done = call("export", source, tmp_path / "out", "--calibrate", tmp_path / "other.gguf")
    assert done.exit_code != 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_counts_a_checkpoint(tmp_path: Path, kind: Any) -> None:
    folder, truth = write_checkpoint(tmp_path / "source", kind)
    found = json.loads(call("inspect", folder, "--json").stdout)
    assert found["kind"] == "checkpoint"
    assert found["parameters"] == sum(v.size for v in truth._tensors.values())
    assert sum(found["skipped"].values()) == len(found["skipped_tensors"])
    assert set(found["skipped_tensors"].values()) == set(found["skipped"])


def test_what_was_left_out_is_listed_with_its_reason(tmp_path: Path) -> None:
    folder, _ = write_checkpoint(tmp_path / "source", "v25")
    vision = "vision tower: the text model does not use it"
    found = json.loads(call("inspect", folder, "--json").stdout)
    assert found["skipped_tensors"]["visual.patch_embed.proj.weight"] == vision
    assert found["ignored_files"] == ["audio_tokenizer/"]
    shown = call("inspect", folder).stdout
    assert f"left out     {found['skipped'][vision]} tensors: {vision}\n" in shown
    assert "left out     audio_tokenizer/: the index does not name it\n" in shown
    done = call("export", folder, tmp_path / "out")
    assert f"left out: {found['skipped'][vision]} tensors: {vision}\n" in done.stdout
    assert (
        json.loads(call("inspect", tmp_path / "out", "--json").stdout)["skipped"]
        == (found["skipped"])
    )


@pytest.mark.parametrize(
    ("name", "billions"),
    # Spec section 6 and 1.2: 308.78 B and 0.99 B of MTP, 7.62 B and 0.21 B.
    [("MiMo-V2-Flash", 309.77), ("MiMo-7B", 7.83)],
)
def test_inspect_released_models_by_name(name: str, billions: float) -> None:
    found = json.loads(call("inspect", name, "--json").stdout)
    assert found["kind"] == "known model"
    assert found["bytes"] is None
    assert found["parameters"] / 1e9 == pytest.approx(billions, abs=0.02)


def test_inspect_knows_every_released_model() -> None:
    for name in KNOWN_MODELS:
        assert call("inspect", name).exit_code == 0
