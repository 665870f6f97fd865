"""Exporting: the right bytes, whatever stops it on the way."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_factory import KINDS, write_checkpoint

from mimo_edge.bundle import Bundle
from mimo_edge.errors import CheckpointError, ExportError, MimoEdgeError, QuantError, UsageError
from mimo_edge.export import job, pieces, pipeline
from mimo_edge.export.calibrate import Calibration
from mimo_edge.export.checkpoint import Checkpoint
from mimo_edge.export.journal import NAME as JOURNAL_NAME
from mimo_edge.export.journal import Journal
from mimo_edge.export.mapping import plan_tensors
from mimo_edge.export.pipeline import export_bundle
from mimo_edge.heat import Heat
from mimo_edge.quant.base import get_format
from mimo_edge.quant.imatrix import Imatrix
from mimo_edge.quant.recipe import Recipe
from mimo_edge.runtimes.base import Weights
from mimo_edge.runtimes.reference import full_logits

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", "flash", tokenizer=True)[0]


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def leftovers(out: Path) -> list[str]:
    return [p.name for p in out.parent.iterdir() if p.name.startswith(".")]


def same_weights(ours: Weights, theirs: Weights, order: dict[int, tuple[int, ...]]) -> None:
    """Every tensor bit for bit; `order[layer][i]` is the expert of `theirs` at place i."""
    from mimo_edge.gguf_meta import expected_shapes

    config = theirs.config
    for name, shape in expected_shapes(config).items():
        layer = int(name.split(".")[1]) if name.startswith("blk.") else -1
        moved = list(order.get(layer, range(config.n_routed_experts)))
        if len(shape) == 3:
            continue
        expected = theirs.tensor(name)
        if ".ffn_gate_inp." in name or ".exp_probs_b." in name:
            expected = expected[moved]
        np.testing.assert_array_equal(ours.tensor(name), expected, name)
    for spec in config.layers:
        if spec.moe:
            moved = list(order.get(spec.index, range(config.n_routed_experts)))
            for i, e in enumerate(moved):
                for a, b in zip(
                    ours.expert(spec.index, i), theirs.expert(spec.index, e), strict=True
                ):
                    np.testing.assert_array_equal(a, b)


# --- The right bytes ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_f32_export_is_the_checkpoint_bit_for_bit(tmp_path: Path, kind: Any) -> None:
    folder, truth = write_checkpoint(tmp_path / "source", kind)
    with export_bundle(folder, tmp_path / "out", recipe="f32") as bundle:
        assert bundle.config == truth.config
        same_weights(bundle.weights(), truth, {})
        ids = np.array([5, 0, 96, 5], np.int32)
        np.testing.assert_array_equal(bundle.weights().embedding(ids), truth.embedding(ids))
        assert leftovers(tmp_path / "out") == []
        assert bundle.manifest is not None
        assert sum(bundle.manifest.skipped.values()) == (5 if kind in ("v25", "v26") else 0)


def test_every_tensor_has_the_format_of_the_recipe(tmp_path: Path) -> None:
    folder, truth = write_checkpoint(tmp_path / "source", "flash", **WIDE)
    recipe = Recipe.named("q4_k")
    with export_bundle(folder, tmp_path / "out", recipe=recipe) as bundle:
        assert bundle.manifest is not None
        for plan in plan_tensors(Checkpoint.open(folder)).tensors:
            choice = recipe.format_for(plan.role, plan.shape[-1], plan.name)
            assert bundle.tensors[plan.name].type_name == choice.format.name, plan.name
            values = truth.tensor(plan.name) if "qkv" not in plan.name else None
            if values is None:
                continue
            rows = values.reshape(-1, plan.shape[-1])
            packed = choice.format.quantize(np.ascontiguousarray(rows))
            assert bundle.gguf.raw(plan.name).tobytes() == packed.tobytes(), plan.name
            entry = bundle.manifest.tensors[plan.name]
            if choice.format.name == "F32":
                assert entry.relative_rms is None
                continue
            got = choice.format.dequantize(packed, rows.shape[1]).astype(np.float64)
            error = np.sqrt(((got - rows) ** 2).sum() / (rows.astype(np.float64) ** 2).sum())
            assert entry.relative_rms == pytest.approx(error, rel=1e-4), plan.name
            assert entry.relative_rms is not None
            assert entry.worst_block is not None
            assert entry.worst_block >= entry.relative_rms


def test_the_same_bytes_whatever_threads_and_pieces(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_bundle(source, tmp_path / "a", recipe="q4_0", threads=1).close()
    monkeypatch.setattr(job, "_PIECE_BYTES", 3000)
    export_bundle(source, tmp_path / "b", recipe="q4_0", threads=3).close()
    a, b = digests(tmp_path / "a"), digests(tmp_path / "b")
    # Sums of errors are made piece by piece, so only the manifest's last digits may differ.
    assert {n: d for n, d in a.items() if n != "mimo-edge.json"} == {
        n: d for n, d in b.items() if n != "mimo-edge.json"
    }


def test_mxfp4_is_passed_through_by_default(tmp_path: Path) -> None:
    folder, truth = write_checkpoint(tmp_path / "source", "v26")
    with export_bundle(folder, tmp_path / "out") as bundle:
        assert bundle.tensors["blk.2.ffn_down_exps.weight"].type_name == "MXFP4"
        for expert in range(8):
            for ours, theirs in zip(
                bundle.weights().expert(2, expert), truth.expert(2, expert), strict=True
            ):
                np.testing.assert_array_equal(ours, theirs)
        assert bundle.manifest is not None
        assert bundle.manifest.tensors["blk.2.ffn_down_exps.weight"].relative_rms is None


def test_window_override(source: Path, tmp_path: Path) -> None:
    with export_bundle(source, tmp_path / "out", window=5) as bundle:
        assert bundle.config.sliding_window == 5
        assert bundle.metadata["mimo2.attention.sliding_window"] == 5


def measured(folder: Path, unseen: list[tuple[int, int]]) -> Calibration:
    """A made-up calibration in which some experts saw nothing."""
    rng = np.random.default_rng(3)
    config = Checkpoint.open(folder).config
    imatrix = Imatrix(("made up",))
    counts, mass = {}, {}
    for plan in plan_tensors(Checkpoint.open(folder)).tensors:
        if plan.is_expert_stack:
            assert plan.layer is not None
            for e in range(plan.shape[0]):
                rows = 0 if (plan.layer, e) in unseen else 4 + e
                x = rng.standard_normal((rows, plan.shape[-1]), dtype=np.float32)
                imatrix.add_expert(plan.name, e, plan.shape[0], x)
        elif len(plan.shape) == 2 and plan.name != "token_embd.weight":
            name = plan.name.replace(".attn_qkv.", ".attn_q.")
            imatrix.add(name, rng.standard_normal((6, plan.shape[1]), dtype=np.float32))
    for layer in (n for n in range(config.num_hidden_layers) if config.layer(n).moe):
        n = rng.permutation(config.n_routed_experts).astype(np.int64) + 1
        for unseen_layer, e in unseen:
            if unseen_layer == layer:
                n[e] = 0
        counts[layer], mass[layer] = n, n / 3
    return Calibration(imatrix, Heat(100, counts, mass, "made up"), 1)


def test_importance_is_used_per_expert_and_its_absence_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, truth = write_checkpoint(tmp_path / "source", "flash", **WIDE)
    calibration = measured(folder, [(2, 5)])
    with export_bundle(folder, tmp_path / "out", recipe="q4_k", calibration=calibration) as bundle:
        name, fmt = "blk.2.ffn_up_exps.weight", get_format("Q4_K")
        raw = bundle.gguf.raw(name).reshape(8, -1)
        values = truth.tensor(name)
        for e in range(8):
            importance = calibration.imatrix.importance(name, e)
            assert (importance is None) == (e == 5)
            assert raw[e].tobytes() == fmt.quantize(values[e], importance).tobytes()
        assert raw[0].tobytes() != fmt.quantize(values[0]).tobytes()
        assert bundle.manifest is not None
        stacks = [f"blk.2.ffn_{part}_exps.weight[5]" for part in ("gate", "up", "down")]
        assert bundle.manifest.unweighted == tuple(stacks)
        reached, packed = caplog.messages
        assert reached == "no token of the calibration reached 1 of 24 experts: blk.2 expert 5"
        assert packed.endswith("and were quantised unweighted: blk.2 expert 5")
        assert bundle.heat is not None
        assert bundle.heat.unseen() == [(2, 5)]
        assert bundle.imatrix_path is not None
        assert Imatrix.read(bundle.imatrix_path).names == calibration.imatrix.names


def test_experts_never_seen_are_named_by_every_recipe(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = write_checkpoint(tmp_path / "source", "flash")
    unseen = measured(folder, [(1, 0), (3, 7)])
    with export_bundle(folder, tmp_path / "out", recipe="q8_0", calibration=unseen) as bundle:
        assert bundle.manifest is not None
        assert bundle.manifest.unweighted == ()  # Q8_0 has no use for importance
    assert caplog.messages == [
        "no token of the calibration reached 2 of 24 experts: blk.1 expert 0, blk.3 expert 7"
    ]


def test_calibration_from_files(tmp_path: Path) -> None:
    folder, _ = write_checkpoint(tmp_path / "source", "flash", **WIDE)
    calibration = measured(folder, [])
    calibration.save(tmp_path / "measured")
    path = tmp_path / "measured" / "imatrix.gguf"
    export_bundle(folder, tmp_path / "a", recipe="q4_k", calibration=calibration).close()
    export_bundle(folder, tmp_path / "b", recipe="q4_k", calibration=path).close()
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_experts_permuted_by_heat_compute_the_same(tmp_path: Path) -> None:
    folder, truth = write_checkpoint(tmp_path / "source", "flash")
    calibration = measured(folder, [(1, 0)])
    heat = calibration.heat
    with export_bundle(
        folder, tmp_path / "out", recipe="f32", calibration=calibration, permute_by_heat=True
    ) as bundle:
        assert bundle.manifest is not None
        order = dict(bundle.manifest.permutation)
        for layer in (1, 2, 3):
            assert order[layer] == tuple(np.argsort(-heat.counts[layer], kind="stable"))
            assert bundle.heat is not None
            assert (np.diff(bundle.heat.counts[layer]) <= 0).all()
        same_weights(bundle.weights(), truth, order)
        ids = np.random.default_rng(0).integers(0, 97, 40)
        # The experts of a token are summed in another order: the last bits of f32, no more.
        np.testing.assert_allclose(
            full_logits(bundle.weights(), ids), full_logits(truth, ids), atol=1e-5
        )
        bundle.verify()


def test_permuting_needs_heat(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no expert heat"):
        export_bundle(source, tmp_path / "out", permute_by_heat=True)
    other = Heat(1, {1: np.ones(3, np.int64)}, {1: np.ones(3)})
    with pytest.raises(UsageError, match="another model"):
        export_bundle(source, tmp_path / "out", calibration=Calibration(Imatrix(), other, 1))


def test_progress_counts_to_the_end(source: Path, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    export_bundle(
        source, tmp_path / "out", progress=lambda s, d, t: seen.setdefault(s, []).append((d, t))
    ).close()
    assert list(seen) == ["quantise", "check"]
    for steps in seen.values():
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1] > 0


# --- What is refused ------------------------------------------------------------------------


def test_an_existing_bundle_is_kept_unless_told(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_bundle(source, out, recipe="q4_0").close()
    before = digests(out)
    with pytest.raises(ExportError, match="exists"):
        export_bundle(source, out, recipe="q8_0")
    assert digests(out) == before
    assert leftovers(out) == []
    with export_bundle(source, out, recipe="q8_0", overwrite=True) as bundle:
        assert bundle.tensors["blk.1.ffn_up_exps.weight"].type_name == "Q8_0"
    assert leftovers(out) == []


def test_other_things_in_the_way(source: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, overwrite in (("photos", True), ("photos", False), ("file", True)):
        with pytest.raises(ExportError):
            export_bundle(source, tmp_path / name, overwrite=overwrite)
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "cat"
    assert (tmp_path / "file").read_text() == "x"
    export_bundle(source, tmp_path / "empty").close()


def test_places_that_cannot_be_written_promise_nothing(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "sub", tmp_path / ("a" * 250)):
        with pytest.raises(ExportError, match="cannot write to") as caught:
            export_bundle(source, out)
        assert "finished pieces" not in str(caught.value)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(ExportError, match=f"symbolic link: export to {tmp_path / 'real'}"):
        export_bundle(source, tmp_path / "link")
    assert leftovers(tmp_path / "real") == []


def test_an_output_of_dots_is_the_folder_it_means(source: Path, tmp_path: Path) -> None:
    (tmp_path / "model" / "below").mkdir(parents=True)
    with pytest.raises(ExportError, match=f"{tmp_path / 'model'} is a folder with other content"):
        export_bundle(source, tmp_path / "model" / "below" / "..")
    assert os.listdir(tmp_path / "model") == ["below"]


def test_a_folder_name_that_is_not_utf8(source: Path, tmp_path: Path) -> None:
    odd = source.rename(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff"))
    with export_bundle(odd, tmp_path / "out") as made:
        assert made.name == made.metadata["general.name"] == "m\ufffd"
        made.verify()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", '{"chat_template": "a\\ud800"}', "not Unicode text"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": ["x"], "template": "a"}]}',
            "1 named chat templates, 0 of them 'default'",
        ),
        ("tokenizer.json", "1e999", "is no token id"),
        ("tokenizer.json", "1.5", "is no token id"),
        ("tokenizer.json", "true", "is no token id"),
        ("tokenizer.json", '"half \\udfff"', "not Unicode text"),
    ],
)
def test_hostile_tokenizers(tmp_path: Path, file: str, content: str, message: str) -> None:
    source, _ = write_checkpoint(tmp_path / "source", "flash", tokenizer=True)
    if file == "tokenizer.json":
        raw = json.loads((source / file).read_text("utf-8"))
        raw["added_tokens"][0]["content" if content[0] == '"' else "id"] = "HERE"
        content = json.dumps(raw).replace('"HERE"', content)
    (source / file).write_text(content)
    with pytest.raises(MimoEdgeError, match=message):
        export_bundle(source, tmp_path / "out")
    assert leftovers(tmp_path / "out") == []


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "chat_template.jinja", "generation_config.json"]
)
def test_a_link_to_nothing_is_no_missing_file(tmp_path: Path, name: str) -> None:
    """A Hub download cut short: going on would make a bundle without a tokenizer."""
    source, _ = write_checkpoint(tmp_path / "source", "flash", tokenizer=True)
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to("../blobs/none")
    with pytest.raises(CheckpointError, match=f"{name} is a link to nothing"):
        export_bundle(source, tmp_path / "out")
    (source / name).unlink()
    (source / name).mkdir()
    with pytest.raises(CheckpointError, match=f"{name} is not a file"):
        export_bundle(source, tmp_path / "out")


def test_wrong_calls(source: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"formats": ("gguf", "exe")}, "exe"),
        ({"recipe": "q9"}, "q9"),
        ({"profile": "toaster"}, "toaster"),
        ({"threads": 0}, "threads"),
        ({"recipe": Recipe.named("q4_0").with_overrides([("nothing*", "Q8_0")])}, "nothing"),
    ]
    for arguments, message in cases:
        with pytest.raises(UsageError, match=message):
            export_bundle(source, tmp_path / "out", **arguments)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_a_damaged_source_leaves_no_bundle(tmp_path: Path) -> None:
    folder, _ = write_checkpoint(tmp_path / "source", "flash_bf16", shards=1)
    checkpoint = Checkpoint.open(folder)
    place = checkpoint.stored("model.layers.2.mlp.experts.3.up_proj.weight")
    with (folder / place.file).open("r+b") as file:
        file.seek(place.offset)
        file.write(b"\xc0\x7f")  # bf16 NaN
    with pytest.raises((CheckpointError, QuantError), match=r"(?i)nan"):
        export_bundle(folder, tmp_path / "out", recipe="q4_0")
    assert not (tmp_path / "out").exists()
    with pytest.raises(MimoEdgeError):
        Bundle.open(tmp_path / ".out.partial" / "bundle")


# --- Interruptions --------------------------------------------------------------------------


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"child: {error!r}\n".encode())
            os._exit(7)
    return os.waitpid(pid, 0)[1]


def die_at(step: int) -> None:
    """From here on, SIGKILL this process at its step-th change to the disk, half-way through
    when that is a write."""
    left = [step]

    def wrap(owner: Any, name: str, data_at: int | None = None) -> None:
        original = getattr(owner, name)

        def counted(*arguments: Any, **keywords: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                if data_at is not None:
                    changed = list(arguments)
                    changed[data_at] = changed[data_at][: len(changed[data_at]) // 2]
                    original(*changed, **keywords)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **keywords)

        setattr(owner, name, counted)

    wrap(os, "pwrite", 1)
    wrap(os, "write", 1)
    for name in ("fsync", "ftruncate", "mkdir", "rename", "unlink", "rmdir", "open"):
        wrap(os, name)


def two_layers(folder: Path) -> Path:
    """A checkpoint as small as one with every kind of tensor can be."""
    return write_checkpoint(
        folder,
        "flash",
        tokenizer=True,
        num_hidden_layers=2,
        hybrid_layer_pattern=(0, 1),
        moe_layer_freq=(0, 1),
        n_routed_experts=4,
        num_mtp_layers=1,
    )[0]


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_every_single_change_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    folder = two_layers(tmp_path / "source")
    monkeypatch.setattr(pipeline, "_COMMIT_BYTES", 20_000)
    calibration, out = measured(folder, []), tmp_path / "out"

    def export() -> None:
        export_bundle(
            folder, out, recipe="q8_0", calibration=calibration, overwrite=overwrite, threads=1
        ).close()

    export()
    expected = digests(out)
    shutil.rmtree(out)
    for step in range(1, 1000):
        if overwrite:
            export_bundle(folder, out, recipe="f16").close()
            before = digests(out)

        def attempt(step: int = step) -> None:
            die_at(step)
            export()

        status = in_child(attempt)
        if status:
            assert os.WIFSIGNALED(status), status
            if out.exists():
                assert digests(out) in ([expected, before] if overwrite else [expected]), step
            if out.exists() and not leftovers(out) and not overwrite:
                # Nothing was left to do but to open the bundle.
                with pytest.raises(ExportError, match="exists"):
                    export()
            else:
                export()
        assert digests(out) == expected, step
        assert leftovers(out) == [], step
        shutil.rmtree(out)
        if not status:
            break
    assert 100 < step < 999


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_anywhere_it_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    folder = two_layers(tmp_path / "source")
    monkeypatch.setattr(pipeline, "_COMMIT_BYTES", 20_000)
    calibration = measured(folder, [])

    def export(name: str, overwrite: bool) -> None:
        export_bundle(
            folder,
            tmp_path / name,
            recipe="q8_0",
            calibration=calibration,
            overwrite=overwrite,
            threads=1,
        ).close()

    export("whole", False)
    expected = digests(tmp_path / "whole")
    rng = random.Random(4 + overwrite)
    for trial in range(5):
        out = tmp_path / f"out{trial}"
        if overwrite:
            export_bundle(folder, out, recipe="f16").close()
            before = digests(out)
        kills = 0
        while True:
            step = rng.choice((1, 3, 6, 12, 25, 50, 90, 140)) + rng.randrange(12)

            def attempt(step: int = step, out: Path = out) -> None:
                die_at(step)
                export(out.name, overwrite)

            status = in_child(attempt)
            if status == 0:
                break
            assert os.WIFSIGNALED(status), status
            kills += 1
            if out.exists():
                assert digests(out) in ([expected, before] if overwrite else [expected])
                Bundle.open(out).verify()
            assert kills < 400
        assert digests(out) == expected
        assert leftovers(out) == []


def test_killed_from_outside_at_random_times(tmp_path: Path) -> None:
    folder, _ = write_checkpoint(tmp_path / "source", "flash", tokenizer=True, **WIDE)
    export_bundle(folder, tmp_path / "whole", recipe="q4_k", threads=2).close()
    code = (
        "import sys; from mimo_edge.export import pipeline; pipeline._COMMIT_BYTES = 100_000\n"
        "print('go', flush=True)\n"
        f"pipeline.export_bundle({str(folder)!r}, {str(tmp_path / 'out')!r}, recipe='q4_k',"
        " threads=2)"
    )
    rng = random.Random(1)
    kills = 0
    for _ in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.uniform(0.02, 0.3) * (1 + kills))
            process.kill()
            process.wait()
        kills += process.returncode == -signal.SIGKILL
        if (tmp_path / "out").exists():
            break
    assert kills
    if not (tmp_path / "out").exists():
        export_bundle(folder, tmp_path / "out", recipe="q4_k").close()
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def stop_at(limit: int) -> Callable[[str, int, int], None]:
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "quantise" and done >= limit:
            raise KeyboardInterrupt

    return progress


def test_interrupt_keeps_finished_pieces(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_COMMIT_BYTES", 1)
    computed: list[str] = []
    original = pieces.compute

    def counting(export: job.Export, piece: job.Piece) -> Any:
        computed.append(piece.key)
        return original(export, piece)

    monkeypatch.setattr(pipeline, "compute", counting)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(source, tmp_path / "out", progress=stop_at(120_000), threads=1)
    assert not (tmp_path / "out").exists()
    first = set(computed)
    computed.clear()
    export_bundle(source, tmp_path / "out", threads=1).close()
    again = first & set(computed)
    assert len(first) > 10
    assert len(again) <= 3  # those computed but not yet written when it stopped


def test_disk_full_on_the_way(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_bundle(source, tmp_path / "whole").close()
    original, room = os.pwrite, [60_000]

    def pwrite(fd: int, data: Any, offset: int) -> int:
        if len(data) > room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= len(data)
        return original(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        patch.setattr(pipeline, "_COMMIT_BYTES", 10_000)
        with pytest.raises(ExportError, match=r"disk is full after [1-9]") as caught:
            export_bundle(source, tmp_path / "out")
        assert "run the same command again" in caught.value.hint
    assert not (tmp_path / "out").exists()
    for file in (tmp_path / ".out.partial" / "bundle").iterdir():
        assert file.suffix == ".partial"
        assert file.read_bytes()[:4] != b"GGUF"
    export_bundle(source, tmp_path / "out").close()
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


_FILL_THE_DISK = """
import hashlib, os, sys
from pathlib import Path
from mimo_edge.errors import ExportError
from mimo_edge.export import pipeline

source, disk = sys.argv[1], Path(sys.argv[2])
pipeline._COMMIT_BYTES = 10_000

def fill(stage, done, total):
    if done < total // 3 or (disk / "filler").exists():
        return
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            print(error.strerror)

try:
    pipeline.export_bundle(source, disk / "out", progress=fill, threads=1)
except ExportError as error:
    print(error)
print((disk / "out").exists(), sorted(p.name for p in disk.iterdir()))
(disk / "filler").unlink()
pipeline.export_bundle(source, disk / "out").close()
for path in sorted((disk / "out").iterdir()):
    print(path.name, hashlib.sha256(path.read_bytes()).hexdigest())
"""


def test_a_real_disk_that_fills_up(source: Path, tmp_path: Path) -> None:
    """A file system of 24 MiB in a mount namespace of its own, filled while the export runs."""
    export_bundle(source, tmp_path / "whole").close()
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=24m none {disk}"
    alone = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    try:
        if (tried := subprocess.run([*alone, "sh", "-c", mount], capture_output=True)).returncode:
            pytest.skip(f"no tmpfs can be mounted here: {tried.stderr.decode().strip()}")
    except FileNotFoundError:
        pytest.skip("there is no unshare command")
    export = [sys.executable, "-c", _FILL_THE_DISK, str(source), str(disk)]
    done = subprocess.run(
        [*alone, "sh", "-c", f'{mount} && exec "$@"', "-", *export], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    filled, refused, state, *files = done.stdout.splitlines()
    assert filled == os.strerror(errno.ENOSPC)
    assert refused.startswith("the disk is full after ")
    assert refused.endswith("run the same command again: finished pieces are kept")
    assert state == "False ['.out.partial', 'filler']"
    assert dict(line.split() for line in files) == digests(tmp_path / "whole")


@pytest.mark.parametrize("limit", [100, 5_000, 300_000])
def test_file_size_limit_of_the_system(source: Path, tmp_path: Path, limit: int) -> None:
    def attempt() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(ExportError, match="disk is full"):
            export_bundle(source, tmp_path / "out")
        os._exit(3)

    assert os.waitstatus_to_exitcode(in_child(attempt)) == 3
    assert not (tmp_path / "out").exists()
    export_bundle(source, tmp_path / "out").close()


def test_too_little_space_is_seen_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 123_456})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(pipeline, "compute", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(ExportError, match="123456 are free"):
        export_bundle(source, tmp_path / "out")


def test_a_disk_that_returns_other_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(export: job.Export) -> None:
        layout = export.layouts[1]
        os.pwrite(export.fds[1], b"\xff\xff", layout.offsets["blk.2.ffn_up_exps.weight"] + 5)

    stages = list(pipeline.STAGES)
    stages.insert(2, damage)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "STAGES", tuple(stages))
        with pytest.raises(ExportError, match=r"other bytes.*blk\.2\.expert\.0"):
            export_bundle(source, tmp_path / "out")
    with export_bundle(source, tmp_path / "out") as bundle:
        bundle.verify()


def test_an_unfinished_export_of_something_else(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_COMMIT_BYTES", 1)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(source, tmp_path / "out", recipe="q8_0", progress=stop_at(9_000))
    with pytest.raises(ExportError, match="differs in recipe"):
        export_bundle(source, tmp_path / "out", recipe="q4_0")
    changed = (source / "model-00002-of-00003.safetensors").stat()
    os.utime(source / "model-00002-of-00003.safetensors", ns=(changed.st_atime_ns, 1))
    with pytest.raises(ExportError, match="differs in source files"):
        export_bundle(source, tmp_path / "out", recipe="q8_0")
    export_bundle(source, tmp_path / "out", recipe="q4_0", overwrite=True).close()
    export_bundle(source, tmp_path / "fresh", recipe="q4_0").close()
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


def test_two_exports_at_once(source: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    other = Journal(tmp_path / ".out.partial" / JOURNAL_NAME)
    with pytest.raises(ExportError, match="another export"):
        export_bundle(source, tmp_path / "out")
    other.close()
    export_bundle(source, tmp_path / "out").close()


def test_journal_ends_at_the_first_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.begin({"journal": 1})
    journal.append([{"piece": str(i)} for i in range(5)])
    journal.close()
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        journal = Journal(path)
        complete = sum(cut >= len(b"".join(lines[: i + 1])) for i in range(6))
        assert (journal.job is not None) + len(journal.entries) == complete
        journal.close()
    path.write_bytes(whole.replace(b'"2"', b'"9"'))
    journal = Journal(path)
    assert [e["piece"] for e in journal.entries] == ["0", "1"]
    journal.append([{"piece": "x"}])
    journal.close()
    journal = Journal(path)
    assert [e["piece"] for e in journal.entries] == ["0", "1", "x"]
    journal.close()


def test_memory_stays_at_a_few_pieces(tmp_path: Path) -> None:
    """A model of 90 MB of f32 is exported within 40 MB over what the imports take."""
    big: dict[str, Any] = {"hidden_size": 512, "moe_intermediate_size": 512, "n_routed_experts": 24}
    folder, _ = write_checkpoint(tmp_path / "source", "flash", vocab_size=20_000, **big)
    code = (
        "import resource; from mimo_edge.export import job, pipeline\n"
        "from mimo_edge.quant.base import get_format; import numpy as np\n"
        "job._PIECE_BYTES = 1 << 20; pipeline._COMMIT_BYTES = 1 << 20\n"
        "get_format('Q4_K').quantize(np.ones((1, 256), np.float32))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"pipeline.export_bundle({str(folder)!r}, {str(tmp_path / 'out')!r}, threads=1)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sum(f.stat().st_size for f in folder.iterdir()) > 60e6
    assert int(done.stdout) < 40_000, f"{done.stdout} KiB"


def test_manifest_is_one_line_per_tensor(source: Path, tmp_path: Path) -> None:
    export_bundle(source, tmp_path / "out").close()
    text = (tmp_path / "out" / "mimo-edge.json").read_text()
    lines = [line for line in text.splitlines() if '"blk.1.ffn_up_exps.weight"' in line]
    assert len(lines) == 1
    assert json.loads(text)["source"]["name"] == "source"
