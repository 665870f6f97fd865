"""The ONNX form of a bundle: graphs that check, exact bytes, the export's promises."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from checkpoint_factory import KINDS, Kind, write_checkpoint
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx_models import make_bundle, onnx_backend
from typer.testing import CliRunner

from mimo_edge.api import Runtime
from mimo_edge.bundle import Bundle
from mimo_edge.cli.main import app
from mimo_edge.errors import (
    BackendError,
    BundleError,
    ExportError,
    IntegrityError,
    MimoEdgeError,
    UsageError,
)
from mimo_edge.export import job, pipeline
from mimo_edge.export.onnx.graph import Graph, Matrix, Source
from mimo_edge.export.onnx.layers import GraphForm, decoder_layers, mtp_block
from mimo_edge.export.onnx.linear import BlockLinear, FloatLinear, TableFormat, quantize_blocks
from mimo_edge.export.pipeline import export_bundle
from mimo_edge.manifest import Manifest
from mimo_edge.onnx_io import FOLDER, IR_VERSION, OPSET, shards

F32 = NDArray[np.float32]


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def graphs(bundle: Path) -> list[Path]:
    return sorted((bundle / FOLDER).rglob("model.onnx"))


def initializers(path: Path) -> dict[str, NDArray[Any]]:
    """Weights of a graph, read from the file beside it."""
    model = onnx.load(str(path))
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


# --- graphs ---


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_pass_the_checker_and_shape_inference(tmp_path: Path, kind: Kind) -> None:
    path, truth = make_bundle(tmp_path, kind)
    found = graphs(path)
    names = [p.parent.parent.name for p in found]
    mtp = [f"mtp_{depth}" for depth in range(truth.config.num_mtp_layers)]
    layers = [shard.name for shard in shards(truth.config, 8)]
    assert sorted(names) == sorted(["embed", "lm_head", *layers, *mtp])
    for file in found:
        onnx.checker.check_model(str(file), full_check=True)
        model = onnx.load(str(file), load_external_data=False)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        known = {v.name for v in (*inferred.graph.value_info, *inferred.graph.output)}
        assert {name for node in model.graph.node for name in node.output} <= known
        assert model.ir_version == IR_VERSION
        assert {i.domain: i.version for i in model.opset_import} == {"": OPSET}


@pytest.mark.parametrize("recipe", ["q8_0", "q4_0"])
def test_graphs_of_block_formats_check_too(tmp_path: Path, recipe: str) -> None:
    path, _ = make_bundle(tmp_path, "mimo7b", recipe)
    bits = set()
    for file in graphs(path):
        onnx.checker.check_model(str(file), full_check=True)
        model = onnx.load(str(file), load_external_data=False)
        for node in model.graph.node:
            if node.op_type == "MatMulNBits":
                values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
                wide = values["bits"] == 8 and values["K"] % 128 == 0
                assert values["block_size"] == (128 if wide else 64)
                assert values["accuracy_level"] == 4
                bits.add(values["bits"])
    assert bits == ({8} if recipe == "q8_0" else {4, 8})  # MTP and head keep 8 bits


@pytest.mark.parametrize("tokens", [1, 4])
def test_static_graphs_of_the_append_form(tmp_path: Path, tokens: int) -> None:
    """What NPUs take: every shape a number, new rows out, no scatter."""
    _, truth = write_checkpoint(tmp_path / "source")
    form = GraphForm("append", tokens, {"full": 32, "sliding": 12}, fuse=False)
    for graph in (
        decoder_layers(truth.config, (0, 1), lambda name: FloatLinear(), form),
        mtp_block(truth.config, 0, lambda name: FloatLinear(), form),
    ):
        model = onnx.load_model_from_string(graph.to_bytes())
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        for value in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output):
            dims = value.type.tensor_type.shape.dim
            assert all(dim.HasField("dim_value") for dim in dims), value.name
        assert "TensorScatter" not in {node.op_type for node in model.graph.node}
    names = [
        v.name
        for v in decoder_layers(truth.config, (0, 1), lambda name: FloatLinear(), form)._outputs
    ]
    assert names == ["kn_0", "vn_0", "kn_1", "vn_1", "ids", "weights", "x", "h_out"]


def test_the_append_form_computes_what_the_in_place_form_does(tmp_path: Path) -> None:
    config = write_checkpoint(tmp_path / "source")[1].config
    rng = np.random.default_rng(0)
    seen, tokens, width = 9, 3, config.hidden_size
    found = {}
    weights: dict[str, NDArray[Any]] = {}
    for cache in ("append", "in_place"):
        form = GraphForm(cache, fuse=cache == "in_place")
        graph = decoder_layers(config, (0, 1), lambda name: FloatLinear(), form)
        folder = tmp_path / cache
        folder.mkdir()
        (folder / "model.onnx").write_bytes(graph.to_bytes())
        data = bytearray(graph.data.size)

        class Reader:
            def rows(self, name: str, start: int, stop: int) -> F32:
                from mimo_edge.gguf_meta import expected_shapes

                shape = expected_shapes(config)[name]
                if name not in weights:
                    weights[name] = rng.standard_normal(shape).astype(np.float32) * 0.2
                whole = weights[name].reshape(-1, shape[-1])
                return whole[start:stop]

        for stored in graph.data.stored:
            rows = stored.matrix.read(Reader(), 0, stored.matrix.rows)
            for chunk in stored.pack(rows, 0):
                at = stored.parts[chunk.part].offset + chunk.offset
                data[at : at + len(chunk.data)] = chunk.data.tobytes()
        (folder / "weights.bin").write_bytes(data)
        session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), providers=["CPUExecutionProvider"]
        )
        given = np.random.default_rng(1)
        feed: dict[str, NDArray[Any]] = {}
        feed["h"] = given.standard_normal((tokens, width)).astype(np.float32)
        for kind in ("full", "sliding"):
            shape = (1, tokens, config.rotary_dim // 2)
            feed[f"cos_{kind}"] = given.standard_normal(shape).astype(np.float32)
            feed[f"sin_{kind}"] = given.standard_normal(shape).astype(np.float32)
            columns = seen + tokens
            mask = np.where(np.arange(columns) <= seen + np.arange(tokens)[:, None], 0, -1e30)
            feed[f"mask_{kind}"] = mask.astype(np.float32)
            if cache == "in_place":
                feed[f"at_{kind}"] = np.array([seen])
        for layer in (0, 1):
            heads = config.layer(layer).num_key_value_heads
            for part, dim in (("k", config.head_dim), ("v", config.v_head_dim)):
                past = given.standard_normal((1, heads, seen, dim)).astype(np.float32)
                if cache == "in_place":
                    past = np.concatenate([past, np.zeros((1, heads, tokens, dim))], axis=2)
                feed[f"p{part}_{layer}"] = past.astype(np.float32)
        names = ["h_out", "x", "ids", "weights"]
        found[cache] = session.run(names, feed)
    for append, in_place in zip(found["append"], found["in_place"], strict=True):
        np.testing.assert_allclose(append, in_place, rtol=1e-5, atol=1e-5)


def test_onnx_runtime_opens_it_as_a_model_package(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path)
    options = onnxruntime.SessionOptions()
    package = onnxruntime.ModelPackageContext(str(path / FOLDER))
    assert "layers_01" in package.get_component_names()
    for name in package.get_component_names():
        assert package.get_variant_names(name) == ["cpu"]
        chosen = package.select_component(name, onnxruntime.ModelPackageOptions(options))
        assert chosen.create_session(options).get_outputs()


def test_a_router_ends_a_graph(tmp_path: Path) -> None:
    _, truth = write_checkpoint(tmp_path / "source")
    with pytest.raises(ExportError, match="layer 1 ends in a router"):
        decoder_layers(truth.config, (0, 1, 2), lambda name: FloatLinear(), GraphForm())


# --- weights ---


def test_f32_weights_are_the_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    path, truth = make_bundle(tmp_path)
    c, layers = truth.config, initializers(path / FOLDER / "layers_00/cpu/model.onnx")
    qkv = [truth.tensor(f"blk.1.attn_{part}.weight") for part in "qkv"]
    np.testing.assert_array_equal(layers["L1.attn.qkv.weight"], np.concatenate(qkv))
    scaled = truth.tensor("blk.1.attn_output.weight") * np.float32(c.attention_value_scale)
    np.testing.assert_array_equal(layers["L1.attn.o.weight"], scaled)
    router = truth.tensor("blk.1.ffn_gate_inp.weight")
    np.testing.assert_array_equal(layers["L1.router.logits.weight"], router)
    sinks = truth.tensor("blk.1.attn_sinks.weight")
    np.testing.assert_array_equal(layers["L1.attn.sinks.weight"], sinks)
    head = initializers(path / FOLDER / "lm_head/cpu/model.onnx")
    np.testing.assert_array_equal(head["norms"][0], truth.tensor("output_norm.weight"))
    np.testing.assert_array_equal(
        head["norms"][3], truth.tensor(f"blk.{c.num_hidden_layers + 2}.layer_output_norm.weight")
    )
    np.testing.assert_array_equal(head["head.weight"], truth.tensor("output.weight"))
    table = initializers(path / FOLDER / "embed/cpu/model.onnx")["h.table"]
    np.testing.assert_array_equal(table, truth.tensor("token_embd.weight"))


def test_routed_experts_are_written_once(tmp_path: Path) -> None:
    """Every resident parameter is in the weight files, and nothing else."""
    path, truth = make_bundle(tmp_path)
    from mimo_edge.gguf_meta import expected_shapes

    resident = sum(
        int(np.prod(shape)) for shape in expected_shapes(truth.config).values() if len(shape) < 3
    )
    stored = 0
    for file in graphs(path):
        model = onnx.load(str(file), load_external_data=False)
        stored += sum(
            int(np.prod(t.dims))
            for t in model.graph.initializer
            if t.data_location == onnx.TensorProto.EXTERNAL
        )
    assert stored == resident


@pytest.mark.parametrize("bits", [4, 8])
def test_block_codes(bits: int) -> None:
    rng = np.random.default_rng(bits)
    rows = rng.standard_normal((7, 200)).astype(np.float32)
    rows[2] = 0
    rows[3, 64:128] = 0
    codes, scales = quantize_blocks(rows, bits)
    assert codes.shape == (7, 4, 64)
    back = ((codes.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]).reshape(7, -1)
    assert not back[:, 200:].any()
    back = back[:, :200]
    assert not back[2].any()
    assert not back[3, 64:128].any()
    half = np.repeat(np.abs(scales), 64, axis=1)[:, :200] / 2
    if bits == 8:
        assert (np.abs(back - rows) <= half * 1.0001).all()
        return
    # Rounded to nearest wherever the code is not at an end of its range.
    inside = (codes > 0) & (codes < 15)
    close = np.abs(back - rows) <= half * 1.0001
    assert close[inside.reshape(7, -1)[:, :200]].all()
    # and never worse than the scale without a search
    at = np.abs(rows[:, :192]).reshape(7, 3, 64)
    largest = np.take_along_axis(rows[:, :192].reshape(7, 3, 64), at.argmax(-1)[..., None], -1)
    scale = largest / -8
    safe = np.where(scale == 0, 1, scale)
    plain = np.clip(np.rint(rows[:, :192].reshape(7, 3, 64) / safe), -8, 7) * scale
    ours = np.square(back - rows)[:, :192].reshape(7, 3, 64).sum(-1)
    assert (ours <= np.square(plain - rows[:, :192].reshape(7, 3, 64)).sum(-1) * 1.0001).all()


@pytest.mark.parametrize("linear", [BlockLinear(4), BlockLinear(8), FloatLinear()])
@pytest.mark.parametrize("width", [128, 200])
def test_products_are_those_of_the_stored_weights(tmp_path: Path, linear: Any, width: int) -> None:
    """ONNX Runtime's kernel reads the codes as they are meant."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((96, width)).astype(np.float32)
    graph = Graph("one")
    x = graph.input("x", ["T", width])
    linear.emit(graph, x, Matrix((Source("w", 96),), width), "y", "T")
    graph.output("y", ["T", 96])
    (tmp_path / "model.onnx").write_bytes(graph.to_bytes())
    data = bytearray(graph.data.size)
    [stored] = graph.data.stored
    for start in (0, 40):  # in pieces, as an export does
        stop = 40 if start == 0 else 96
        for chunk in stored.pack(weight[start:stop], start):
            at = stored.parts[chunk.part].offset + chunk.offset
            data[at : at + len(chunk.data)] = chunk.data.tobytes()
    (tmp_path / "weights.bin").write_bytes(data)
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    rows = rng.standard_normal((5, width)).astype(np.float32)
    [found] = session.run(["y"], {"x": rows})
    if isinstance(linear, BlockLinear):
        codes, scales = quantize_blocks(weight, linear.bits)
        zero = 2 ** (linear.bits - 1)
        back = (codes.astype(np.float32) - zero) * scales[..., None]
        weight = back.reshape(96, -1)[:, :width]
    want = rows @ weight.T
    # activations are rounded to 8 bits where the weights are
    bound = 0.02 if isinstance(linear, BlockLinear) else 1e-6
    assert np.abs(found - want).max() <= bound * np.abs(want).max()


@pytest.mark.parametrize(
    ("bits", "width", "size"), [(4, 256, 64), (8, 256, 128), (8, 192, 64), (8, 200, 64)]
)
def test_blocks_are_as_long_as_the_precision_allows(bits: int, width: int, size: int) -> None:
    rows = np.random.default_rng(0).standard_normal((3, width)).astype(np.float32)
    codes, scales = quantize_blocks(rows, bits)
    assert codes.shape == (3, -(-width // size), size)
    back = (codes.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]
    off = np.abs(back.reshape(3, -1)[:, :width] - rows)
    if bits == 8:  # 4 bits: see test_block_codes
        assert off.max() <= np.abs(scales).max() / 2 * 1.0001


def test_formats_without_a_form_are_refused() -> None:
    with pytest.raises(ExportError, match="MatMulNBits of 5 bits"):
        BlockLinear(5)
    matrix = Matrix((Source("t", 8),), 16)
    with pytest.raises(ExportError, match="table of 4 bits"):
        TableFormat(4).emit(Graph("g"), "tokens", matrix, "h")


# --- the export ---


def test_the_same_bytes_whatever_threads_and_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = write_checkpoint(tmp_path / "source")
    export_bundle(source, tmp_path / "a", formats=("both",), threads=1).close()
    monkeypatch.setattr(job, "_PIECE_BYTES", 3000)
    export_bundle(source, tmp_path / "b", formats=("both",), threads=3).close()
    a, b = digests(tmp_path / "a" / FOLDER), digests(tmp_path / "b" / FOLDER)
    assert a == b
    assert len(a) == 2 * 8 + 1


def test_gguf_bytes_do_not_depend_on_the_onnx_form(tmp_path: Path) -> None:
    source, _ = write_checkpoint(tmp_path / "source", tokenizer=True)
    export_bundle(source, tmp_path / "a").close()
    export_bundle(source, tmp_path / "b", formats=("gguf", "onnx")).close()
    a, b = digests(tmp_path / "a"), digests(tmp_path / "b")
    assert {n: d for n, d in b.items() if n in a and n != "mimo-edge.json"} == {
        n: d for n, d in a.items() if n != "mimo-edge.json"
    }


def test_onnx_alone_holds_experts_in_gguf_and_nothing_else_there(tmp_path: Path) -> None:
    source, _ = write_checkpoint(tmp_path / "source", tokenizer=True)
    out = tmp_path / "out"
    with export_bundle(source, out, recipe="f32", formats=("onnx",)) as bundle:
        assert all("_exps." in name for name in bundle.tensors)
        assert not bundle.resident_in_gguf
        assert bundle.manifest is not None
        assert bundle.manifest.onnx is not None
        assert Manifest.read(out) == bundle.manifest
        bundle.verify()
    for backend in ("ggml", "reference"):
        with pytest.raises(BackendError, match="ONNX form alone"):
            Runtime.open(out, backend=backend)
    ids = list(range(40))
    with Runtime.open(out, threads=1) as runtime, Runtime.open(source) as reference:
        assert runtime.stats()["backend"] == "onnx"
        found, want = runtime.logits(ids), reference.logits(ids)
        assert np.abs(found - want).max() <= 1e-4 * np.abs(want).max()
    with pytest.raises(UsageError, match="ONNX form alone"):
        export_bundle(out, tmp_path / "again", formats=("both",))


def test_a_dense_model_in_onnx_alone(tmp_path: Path) -> None:
    source, truth = write_checkpoint(tmp_path / "source", "mimo7b")
    with export_bundle(source, tmp_path / "out", recipe="f32", formats=("onnx",)) as bundle:
        assert not bundle.tensors
    with Runtime.open(tmp_path / "out", threads=1) as runtime:
        from mimo_edge.runtimes.reference import full_logits

        found, want = runtime.logits(range(30)), full_logits(truth, range(30))
        assert np.abs(found - want).max() <= 1e-4 * np.abs(want).max()


def test_a_bundle_gets_the_onnx_form(tmp_path: Path) -> None:
    source, _ = write_checkpoint(tmp_path / "source", tokenizer=True)
    given = tmp_path / "given"
    export_bundle(source, given, recipe="f32").close()
    before = digests(given)
    export_bundle(source, tmp_path / "direct", recipe="f32", formats=("both",)).close()
    with export_bundle(given, tmp_path / "out", formats=("both",)) as bundle:
        assert bundle.resident_in_gguf
        bundle.verify()
    assert digests(given) == before
    after, direct = digests(tmp_path / "out"), digests(tmp_path / "direct")
    assert after == direct  # f32 loses nothing on the way; the manifest is the same too
    name = "model-00002-of-00002.gguf"
    assert (tmp_path / "out" / name).samefile(given / name)  # not written a second time
    # and in place
    export_bundle(given, given, formats=("both",), overwrite=True).close()
    assert digests(given) == direct
    # once more, over a form that is there
    export_bundle(given, given, formats=("both",), overwrite=True).close()
    assert digests(given) == direct
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_files_of_a_bundle_on_another_disk_are_copied_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = write_checkpoint(tmp_path / "source")
    given = tmp_path / "given"
    export_bundle(source, given).close()

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with export_bundle(given, tmp_path / "out", formats=("both",)) as bundle:
        bundle.verify()
    with (given / "model-00002-of-00002.gguf").open("r+b") as file:
        file.seek(-40, os.SEEK_END)
        file.write(b"damaged!")
    with pytest.raises(ExportError, match="differs from its manifest"):
        export_bundle(given, tmp_path / "damaged", formats=("both",))
    assert not (tmp_path / "damaged").exists()


def test_what_a_bundle_cannot_change(tmp_path: Path) -> None:
    source, _ = write_checkpoint(tmp_path / "source")
    given = tmp_path / "given"
    export_bundle(source, given).close()
    for options in (
        {"recipe": "q8_0"},
        {"window": 5},
        {"overrides": [("*", "Q8_0")]},
        {"permute_by_heat": True},
    ):
        with pytest.raises(UsageError, match="is a bundle"):
            export_bundle(given, tmp_path / "out", formats=("both",), **options)
    for formats in (("gguf",), ("onnx",)):
        with pytest.raises(UsageError, match="use --format both"):
            export_bundle(given, tmp_path / "out", formats=formats)
    with pytest.raises(UsageError, match="no output format"):
        export_bundle(source, tmp_path / "out", formats=())
    assert not (tmp_path / "out").exists()


def test_permuted_experts_route_the_same(tmp_path: Path) -> None:
    from test_export_pipeline import measured

    source, truth = write_checkpoint(tmp_path / "source")
    export_bundle(
        source,
        tmp_path / "out",
        recipe="f32",
        calibration=measured(source, []),
        permute_by_heat=True,
        formats=("onnx",),
    ).close()
    from mimo_edge.runtimes.reference import full_logits

    ids = np.random.default_rng(0).integers(0, 97, 40)
    with onnx_backend(tmp_path / "out") as backend:
        cache = backend.new_cache(64)
        found = backend.forward(ids.astype(np.int32), cache, logits_rows=40).logits
    want = full_logits(truth, ids)
    assert np.abs(found - want).max() <= 1e-4 * np.abs(want).max()


def test_killed_and_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    source, _ = write_checkpoint(tmp_path / "source")
    export_bundle(source, tmp_path / "whole", formats=("both",)).close()
    # Dies at a piece in the middle of the ONNX form, then while files get their names.
    code = """
import os, signal, sys
from pathlib import Path
from mimo_edge.export import pipeline
pipeline._COMMIT_BYTES = 1
source, out, where = sys.argv[1:]
compute, rename = pipeline.compute, Path.rename
def stop(export, piece):
    if where == "piece" and piece.key.startswith("layers_01/"):
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(export, piece)
def renamed(self, target):
    if where == "rename" and self.name == "weights.bin.partial" and "mtp_0" in str(self):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
pipeline.compute, Path.rename = stop, renamed
pipeline.export_bundle(source, out, formats=("both",), threads=1)
"""
    for where in ("piece", "rename"):
        run = subprocess.run(
            [sys.executable, "-c", code, str(source), str(tmp_path / "out"), where], check=False
        )
        assert run.returncode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    export_bundle(source, tmp_path / "out", formats=("both",)).close()
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_an_unfinished_export_in_another_form_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = write_checkpoint(tmp_path / "source")

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "quantise" and done > total // 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "_COMMIT_BYTES", 1)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(source, tmp_path / "out", formats=("both",), progress=stop)
    with pytest.raises(ExportError, match="unfinished export that differs in"):
        export_bundle(source, tmp_path / "out", formats=("onnx",))


def test_nan_in_a_weight_is_refused(tmp_path: Path) -> None:
    from tiny import random_weights

    truth = random_weights(write_checkpoint(tmp_path / "config")[1].config)
    truth.tensor("blk.1.attn_sinks.weight")[2] = np.nan
    source, _ = write_checkpoint(tmp_path / "source", "flash_bf16", weights=truth)
    with pytest.raises(MimoEdgeError, match="attention_sink_bias"):
        export_bundle(source, tmp_path / "out", formats=("onnx",))
    assert not (tmp_path / "out").exists()


# --- damaged and foreign packages ---


def test_damage_is_found(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path)
    data = path / FOLDER / "layers_01" / "cpu" / "weights.bin"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(IntegrityError, match=r"weights\.bin has"):
        Bundle.open(path)
    data.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with Bundle.open(path) as bundle, pytest.raises(IntegrityError, match="layers_01"):
        bundle.verify()
    data.unlink()
    with pytest.raises(BundleError, match="lacks"):
        Bundle.open(path)


def swap(path: Path, name: str, content: bytes) -> None:
    """Replace a file of a bundle, and what its manifest says of it."""
    (path / name).write_bytes(content)
    raw = json.loads((path / "mimo-edge.json").read_text())
    digest = hashlib.sha256(content).hexdigest()
    raw["files"][name] = {"size": len(content), "sha256": digest}
    (path / "mimo-edge.json").write_text(json.dumps(raw))


def test_graphs_of_another_model_are_refused(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path / "a")
    other, _ = make_bundle(tmp_path / "b", head_dim=32)
    name = f"{FOLDER}/layers_01/cpu/model.onnx"
    mine = (path / name).read_bytes()
    data = f"{FOLDER}/layers_01/cpu/weights.bin"
    swap(path, name, (other / name).read_bytes())
    with pytest.raises(BundleError, match="layers_01"):  # its weights are not there
        Runtime.open(path, backend="onnx")
    weights = (path / data).read_bytes()
    swap(path, data, (other / data).read_bytes())
    with pytest.raises(BundleError, match=r"layers_01.*made for another model"):
        Runtime.open(path, backend="onnx")
    swap(path, data, weights)
    swap(path, name, (path / f"{FOLDER}/lm_head/cpu/model.onnx").read_bytes())
    with pytest.raises(BundleError, match="differ from the model's"):
        Runtime.open(path, backend="onnx")
    for content in (b"", b"not a graph", mine[: len(mine) // 2], bytes(1000)):
        swap(path, name, content)
        with pytest.raises(BundleError, match=r"layers_01"):
            Runtime.open(path, backend="onnx")
    swap(path, name, mine)
    Runtime.open(path, backend="onnx", threads=1).close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda onnx: onnx.update(opset=99), "opset 99"),
        (lambda onnx: onnx["components"].pop("layers_01"), "hold layers"),
        (lambda onnx: onnx["components"].pop("lm_head"), "lacks the graph lm_head"),
        (lambda onnx: onnx["components"].pop("mtp_1"), "lacks the graph mtp_1"),
        (lambda onnx: onnx["components"]["layers_00"].update(layers=[1, 0]), "hold layers"),
        (lambda onnx: onnx["components"]["layers_00"].update(layers=[0, 1, 2]), "hold layers"),
        (lambda onnx: onnx["components"].clear(), "no graphs for cpu"),
        (lambda onnx: onnx.update(more=1), "unknown fields"),
        (lambda onnx: onnx.pop("gguf"), "lacks 'gguf'"),
        (lambda onnx: onnx.update(gguf=1), "not true or false"),
        (lambda onnx: onnx["components"].update({"../x": {"layers": [], "variants": []}}), "plain"),
    ],
)
def test_manifests_that_lie(tmp_path: Path, change: Any, message: str) -> None:
    path, _ = make_bundle(tmp_path)
    raw = json.loads((path / "mimo-edge.json").read_text())
    change(raw["onnx"])
    (path / "mimo-edge.json").write_text(json.dumps(raw))
    with pytest.raises((BundleError, BackendError), match=message):
        Runtime.open(path, backend="onnx")


@pytest.mark.parametrize(
    "name", ["/x", "a/b", "../x", "onnx/../x", "onnx//b", "onnx/b/c/d/e/f", "onnx\\b", "onnx/"]
)
def test_file_names_that_leave_the_bundle(tmp_path: Path, name: str) -> None:
    path, _ = make_bundle(tmp_path)
    raw = json.loads((path / "mimo-edge.json").read_text())
    raw["files"][name] = {"size": 1, "sha256": "0" * 64}
    (path / "mimo-edge.json").write_text(json.dumps(raw))
    with pytest.raises(BundleError, match="name"):
        Bundle.open(path)


def test_backends_that_cannot(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path)
    with pytest.raises(UsageError, match="execution provider 'gpu'"):
        Runtime.open(path, backend="onnx", ep="gpu")
    with pytest.raises(UsageError, match="no execution provider cpu"):
        Runtime.open(path, backend="ggml", ep="cpu")
    with pytest.raises(UsageError, match="f32, not q8_0"):
        Runtime.open(path, backend="onnx", kv_type="q8_0")
    shutil.rmtree(path / FOLDER)
    source = tmp_path / "source"
    with pytest.raises(BackendError, match="not checkpoints"):
        Runtime.open(source, backend="onnx")
    export_bundle(source, tmp_path / "plain").close()
    with pytest.raises(BackendError, match="has no ONNX form"):
        Runtime.open(tmp_path / "plain", backend="onnx")


def test_inspect_names_the_form(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path, "flash", "q8_0")
    shown = CliRunner().invoke(app, ["inspect", str(path)])
    assert "opset 24, 8 graphs for cpu; matrices: " in shown.stdout
    told = json.loads(CliRunner().invoke(app, ["inspect", str(path), "--json"]).stdout)
    assert told["onnx"]["components"] == {"cpu": 8}
    assert set(told["onnx"]["formats"]) == {"int8"}


@pytest.mark.slow
@pytest.mark.parametrize("formats", ["both", "onnx"])
def test_memory_stays_bounded_at_real_width(tmp_path: Path, formats: str) -> None:
    """Three layers of MiMo-V2-Flash's width (2.1 GB as f32, head and table included) with few
    experts: the peak does not depend on how many layers there are, or on the largest matrix."""
    tool = Path(__file__).parents[1] / "tools" / "make_random_checkpoint.py"
    source = tmp_path / "source"
    options = ["--layers", "3", "--experts", "8", "--vocab", "32768"]
    subprocess.run([sys.executable, str(tool), str(source), *options], check=True)
    code = (
        "from mimo_edge.export.pipeline import export_bundle\n"
        "from mimo_edge.machine import peak_rss_bytes\n"
        f"export_bundle({str(source)!r}, {str(tmp_path / 'out')!r}, formats=({formats!r},),"
        " recipe='q4_0', threads=2).close()\n"
        "print(peak_rss_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 700 << 20, done.stdout
    for file in graphs(tmp_path / "out"):
        onnx.checker.check_model(str(file), full_check=True)
    with onnx_backend(tmp_path / "out", threads=2) as backend:
        cache = backend.new_cache(200)
        ids = np.random.default_rng(0).integers(0, 32768, 150).astype(np.int32)
        result = backend.forward(ids, cache, logits_rows=1, hidden_rows=1)
        assert np.isfinite(result.logits).all()
        assert cache.length == 150
