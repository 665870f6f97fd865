"""Checkpoint folders: what opens, what is refused, and what reading costs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_factory import (
    KINDS,
    Kind,
    from_bf16,
    stored,
    to_bf16,
    write_checkpoint,
    write_safetensors,
)

from mimo_edge.errors import CheckpointError, ConfigError, MimoEdgeError
from mimo_edge.export.checkpoint import Checkpoint
from mimo_edge.export.safetensors_file import SafetensorsFile

INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.1.mlp.experts.0.gate_proj.weight"


@pytest.mark.parametrize("kind", KINDS)
def test_opens_every_kind(tmp_path: Path, kind: Kind) -> None:
    folder, weights = write_checkpoint(tmp_path / "Some-Model", kind, tokenizer=True)
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.config == weights.config
        assert checkpoint.name == "Some-Model"
        assert set(checkpoint.tokenizer_files) == {"tokenizer.json", "tokenizer_config.json"}
        assert checkpoint.chat_template is None
        omni = kind in ("v25", "v26")
        assert checkpoint.ignored_files == (("audio_tokenizer/",) if omni else ())
        assert len(checkpoint.files) == (1 if kind == "mimo7b" else 3)


def test_a_scale_lies_in_another_shard(tmp_path: Path) -> None:
    """What makes the other tests of scales mean something."""
    folder, weights = write_checkpoint(tmp_path, "flash")
    checkpoint = Checkpoint.open(folder)
    weight, scale = checkpoint.stored(EXPERT), checkpoint.scale_of(EXPERT)
    assert scale is not None
    assert weight.file != scale.file
    truth = weights.tensor("blk.1.ffn_gate_exps.weight")[0]
    assert np.array_equal(checkpoint.read(EXPERT), truth)
    assert np.array_equal(checkpoint.read_rows(EXPERT, 3, 9), truth[3:9])
    assert checkpoint.read_raw(EXPERT).dtype == np.uint8


def test_plain_dtypes(tmp_path: Path) -> None:
    folder, _ = write_checkpoint(tmp_path, "flash_bf16", shards=1)
    values = np.array([1.5, -0.0, 6e-8, 65504.0], dtype=np.float16)
    bits = np.array([0x3FC0, 0x8000, 0x0001, 0x7F7F], dtype=np.uint16)
    tensors = {
        "half": stored(values),
        "brain": stored(bits),
        "single": stored(values.astype(np.float32)),
        "scalar": stored(np.array(2.5, dtype=np.float32)),
        "int": ("I64", (1,), bytes(8)),
        "int_scalar": ("I64", (), bytes(8)),
    }
    write_safetensors(folder / "model.safetensors", tensors)
    checkpoint = Checkpoint.open(folder)
    assert np.array_equal(checkpoint.read("half"), values.astype(np.float32))
    assert checkpoint.read("brain").tolist() == [1.5, -0.0, 2.0**-133, 255 * 2.0**120]
    assert np.signbit(checkpoint.read("brain")[1])
    assert checkpoint.read("single").dtype == np.float32
    assert checkpoint.read("scalar") == 2.5
    assert np.array_equal(checkpoint.read_raw("brain"), bits)
    for name in ("int", "int_scalar"):
        with pytest.raises(CheckpointError, match="I64"):
            checkpoint.read(name)
    with pytest.raises(CheckpointError, match="no tensor 'other'"):
        checkpoint.read("other")
    with pytest.raises(CheckpointError, match="which has 4"):
        checkpoint.read_rows("half", 2, 5)
    with pytest.raises(CheckpointError, match="which has 0"):
        checkpoint.read_rows("scalar", 0, 1)
    with pytest.raises(CheckpointError, match="do not fit"):
        checkpoint.read_rows("half", 0, 2, np.empty(3, dtype=np.float32))


def test_name_inside_the_hub_cache(tmp_path: Path) -> None:
    """The Hub's layout: snapshots of symbolic links to ../../blobs."""
    source, weights = write_checkpoint(tmp_path / "source", "flash")
    repo = tmp_path / "models--XiaomiMiMo--MiMo-V2-Flash"
    snapshot = repo / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for file in source.iterdir():
        blob = repo / "blobs" / hashlib.sha256(file.name.encode()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    checkpoint = Checkpoint.open(snapshot)
    assert checkpoint.name == "XiaomiMiMo/MiMo-V2-Flash"
    truth = weights.tensor("token_embd.weight")
    assert np.array_equal(checkpoint.read("model.embed_tokens.weight"), truth)


def test_index_sha256_identifies_the_source(tmp_path: Path) -> None:
    folder, _ = write_checkpoint(tmp_path / "a", "flash")
    expected = hashlib.sha256((folder / INDEX).read_bytes()).hexdigest()
    assert Checkpoint.open(folder).index_sha256 == expected
    single = [write_checkpoint(tmp_path / n, "mimo7b", seed=1)[0] for n in ("b", "c")]
    digests = [Checkpoint.open(f).index_sha256 for f in single]
    assert digests[0] == digests[1] != expected
    raw = json.loads((single[1] / "config.json").read_text())
    (single[1] / "config.json").write_text(json.dumps(raw | {"rope_theta": 1e6}))
    assert Checkpoint.open(single[1]).index_sha256 != digests[0]


def test_other_weight_files_are_listed(tmp_path: Path) -> None:
    folder, _ = write_checkpoint(tmp_path, "flash")
    shutil.copy(next(folder.glob("*.safetensors")), folder / "drafter.safetensors")
    (folder / "notes").mkdir()
    assert Checkpoint.open(folder).ignored_files == ("drafter.safetensors",)


def test_window_and_ignored_keys(tmp_path: Path) -> None:
    folder, weights = write_checkpoint(tmp_path, "flash")
    assert Checkpoint.open(folder, window=8).config.sliding_window == 8
    assert weights.config.sliding_window == 9
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"new_knob": 2}))
    with pytest.raises(ConfigError, match="new_knob"):
        Checkpoint.open(folder)
    assert Checkpoint.open(folder, ignore_config_keys=["new_knob"]).config == weights.config


def test_eos_ids_are_merged(tmp_path: Path) -> None:
    folder, _ = write_checkpoint(tmp_path, "flash", eos_token_ids=(3,))
    path = folder / "generation_config.json"
    assert not path.exists()
    assert Checkpoint.open(folder).config.eos_token_ids == (3,)
    for value, expected in [(5, (3, 5)), ([5, 3, 7], (3, 5, 7)), (None, (3,)), ([], (3,))]:
        path.write_text(json.dumps({"eos_token_id": value}))
        assert Checkpoint.open(folder).config.eos_token_ids == expected
    for bad in (["x"], -1, True, 2.0, {"a": 1}):
        path.write_text(json.dumps({"eos_token_id": bad}))
        with pytest.raises(CheckpointError, match="is no token id"):
            Checkpoint.open(folder)
    path.write_text(json.dumps({"eos_token_id": 97}))
    with pytest.raises(ConfigError, match="exceed the vocabulary"):
        Checkpoint.open(folder)


def test_mtp_blocks_are_counted(tmp_path: Path) -> None:
    for kind, count in (("flash", 2), ("flash", 0), ("mimo7b", 1)):
        folder, _ = write_checkpoint(tmp_path / f"{kind}{count}", kind, num_mtp_layers=count)  # type: ignore[arg-type]
        assert Checkpoint.open(folder).config.num_mtp_layers == count
    path = folder / "model.safetensors"
    file = SafetensorsFile(path)
    tensors = {
        n.replace("mtp_layers.0", "mtp_layers.1"): (t.dtype, t.shape, file.read(n).tobytes())
        for n, t in file.tensors.items()
    }
    write_safetensors(path, tensors)
    with pytest.raises(CheckpointError, match=r"MTP blocks \[1\] are not numbered"):
        Checkpoint.open(folder)


def test_closed_is_closed(tmp_path: Path) -> None:
    folder, _ = write_checkpoint(tmp_path, "flash")
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.read("model.norm.weight")
    with pytest.raises(CheckpointError, match="is closed"):
        checkpoint.read("model.norm.weight")
    with pytest.raises(CheckpointError, match="is closed"):
        checkpoint.read_raw("model.norm.weight")


def test_holds_no_descriptors(tmp_path: Path) -> None:
    folder, _ = write_checkpoint(tmp_path, "flash", shards=40)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    checkpoint = Checkpoint.open(folder)
    for name in list(checkpoint.tensors)[:50]:
        checkpoint.read_raw(name)
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before


def test_threads_may_read_together(tmp_path: Path) -> None:
    folder, _ = write_checkpoint(tmp_path, "flash")
    checkpoint = Checkpoint.open(folder)
    names = [n for n in checkpoint.tensors if ".experts." in n and n.endswith(".weight")]
    alone = [checkpoint.read(n) for n in names]
    wrong: list[str] = []

    def work() -> None:
        wrong.extend(
            n
            for n, v in zip(names, alone, strict=True)
            if not np.array_equal(v, checkpoint.read(n))
        )

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- Damaged data -------------------------------------------------------------------------


def overwrite(folder: Path, name: str, place: int, data: bytes) -> None:
    """Change bytes of one tensor where they lie; `place` counts from the tensor's start."""
    for path in folder.glob("*.safetensors"):
        tensor = SafetensorsFile(path).tensors.get(name)
        if tensor is not None:
            with path.open("r+b") as file:
                file.seek(tensor.offset + place)
                file.write(data)
            return
    raise AssertionError(name)


SCALES = [np.nan, np.inf, -np.inf, -1.0, 0.0, 1e37]


@pytest.mark.parametrize("value", SCALES)
@pytest.mark.parametrize("kind", ["flash", "v25"])
def test_bad_scale(tmp_path: Path, kind: Kind, value: float) -> None:
    folder, _ = write_checkpoint(tmp_path, kind)
    overwrite(folder, EXPERT + "_scale_inv", 0, np.float32(value).tobytes())
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=rf"{EXPERT}: scale of block \[0, 0\]"):
        checkpoint.read(EXPERT)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_code(tmp_path: Path, code: int) -> None:
    folder, _ = write_checkpoint(tmp_path, "flash")
    overwrite(folder, EXPERT, 5 * 64 + 7, bytes([code]))
    checkpoint = Checkpoint.open(folder)
    for start in (0, 4):
        with pytest.raises(CheckpointError, match=rf"{EXPERT}: element \[5, 7\] is the NaN code"):
            checkpoint.read_rows(EXPERT, start, 6)
    checkpoint.read_rows(EXPERT, 0, 5)  # the rows before it are fine


@pytest.mark.parametrize(("code", "what"), [(255, "NaN"), (254, "beyond f32")])
def test_bad_mxfp4_scale(tmp_path: Path, code: int, what: str) -> None:
    folder, _ = write_checkpoint(tmp_path, "v26")
    overwrite(folder, EXPERT + "_scale", 3, bytes([code]))
    checkpoint = Checkpoint.open(folder)
    for read in (checkpoint.read, checkpoint.read_mxfp4):
        with pytest.raises(CheckpointError, match=rf"{EXPERT}: scale of block \[1, 1\].*{what}"):
            read(EXPERT)


@pytest.mark.parametrize(("bits", "what"), [(0x7FC0, "nan"), (0x7F80, "inf"), (0xFF80, "-inf")])
def test_bf16_that_is_not_finite(tmp_path: Path, bits: int, what: str) -> None:
    folder, _ = write_checkpoint(tmp_path, "flash_bf16")
    name = "model.embed_tokens.weight"
    overwrite(folder, name, 2 * (90 * 64 + 3), np.uint16(bits).tobytes())
    checkpoint = Checkpoint.open(folder)
    for start in (0, 89):
        with pytest.raises(CheckpointError, match=rf"{name}: element \[90, 3\] is {what}"):
            checkpoint.read_rows(name, start, 97)


# --- Folders that must be refused ---------------------------------------------------------


def set_json(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        raw = json.loads((folder / file).read_text())
        changed = change(raw)
        (folder / file).write_text(json.dumps(raw if changed is None else changed))

    return apply


def set_text(file: str, text: str | bytes) -> Callable[[Path], None]:
    data = text if isinstance(text, bytes) else text.encode()

    def apply(folder: Path) -> None:
        (folder / file).write_bytes(data)

    return apply


def shard_named(name: Any) -> Callable[[Path], None]:
    return set_json(INDEX, lambda raw: raw["weight_map"].update({"model.norm.weight": name}))


def drop_shards(folder: Path) -> None:
    for path in list(folder.glob("*-of-*.safetensors"))[:2]:
        path.unlink()


def duplicate_tensor(folder: Path) -> None:
    """The same tensor in two shards: the index can name only one of them."""
    first, second = sorted(folder.glob("*-of-*.safetensors"))[:2]
    one, two = SafetensorsFile(first), SafetensorsFile(second)
    tensors = {n: (t.dtype, t.shape, two.read(n).tobytes()) for n, t in two.tensors.items()}
    name = "model.embed_tokens.weight"
    entry = one.tensors[name]
    tensors[name] = (entry.dtype, entry.shape, one.read(name).tobytes())
    write_safetensors(second, tensors)


def truncate_shard(folder: Path) -> None:
    path = min(folder.glob("*.safetensors"))
    os.truncate(path, path.stat().st_size - 100)


def shard_as_folder(folder: Path) -> None:
    path = min(folder.glob("*.safetensors"))
    path.unlink()
    path.mkdir()


def shard_as_dangling_link(folder: Path) -> None:
    path = min(folder.glob("*.safetensors"))
    path.unlink()
    path.symlink_to("gone")


def misplace(folder: Path) -> None:
    home = json.loads((folder / INDEX).read_text())["weight_map"]["model.norm.weight"]
    other = max(p.name for p in folder.glob("*-of-*.safetensors") if p.name != home)
    shard_named(other)(folder)


def add_unlisted(folder: Path) -> None:
    set_json(INDEX, lambda raw: raw["weight_map"].pop("model.norm.weight") and None)(folder)


REFUSED: dict[str, tuple[Callable[[Path], Any], type[MimoEdgeError], str]] = {
    "no folder": (shutil.rmtree, CheckpointError, "is not a folder"),
    "no config": (lambda f: (f / "config.json").unlink(), CheckpointError, "has no config.json"),
    "no weights": (lambda f: (f / INDEX).unlink(), CheckpointError, "has neither"),
    "config not JSON": (set_text("config.json", "{"), CheckpointError, "not valid JSON"),
    "config a list": (set_text("config.json", "[]"), CheckpointError, "holds a list"),
    "config with NaN": (
        set_text("config.json", '{"rope_theta": NaN}'),
        CheckpointError,
        "NaN is not a JSON number",
    ),
    "config with a key twice": (
        set_text("config.json", '{"a": 1, "a": 2}'),
        CheckpointError,
        "'a' twice",
    ),
    "config not UTF-8": (set_text("config.json", b'{"a": "\xff"}'), CheckpointError, "UTF-8"),
    "config nested deeply": (
        set_text("config.json", '{"a":' + "[" * 100_000),
        CheckpointError,
        "nested too deeply",
    ),
    "config too large": (
        set_text("config.json", '{"a":"' + " " * (5 << 20) + '"}'),
        CheckpointError,
        "larger than",
    ),
    "huge integer": (
        set_text("config.json", '{"a": ' + "9" * 5000 + "}"),
        CheckpointError,
        "not valid JSON",
    ),
    "unknown config key": (
        set_json("config.json", lambda c: c.update(surprise=1)),
        ConfigError,
        "surprise",
    ),
    "unknown architecture": (
        set_json("config.json", lambda c: c.update(architectures=["Llama"], model_type="llama")),
        ConfigError,
        "is not a MiMo",
    ),
    "absurd layers": (
        set_json("config.json", lambda c: c.update(num_hidden_layers=10**9)),
        ConfigError,
        "num_hidden_layers",
    ),
    "index without a map": (set_text(INDEX, "{}"), CheckpointError, "no weight_map"),
    "index with an empty map": (
        set_text(INDEX, '{"weight_map": {}}'),
        CheckpointError,
        "no weight",
    ),
    "index a list": (set_text(INDEX, "[]"), CheckpointError, "holds a list"),
    "index with a key twice": (
        set_text(INDEX, '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'),
        CheckpointError,
        "'a' twice",
    ),
    "parent folder": (shard_named("../model.safetensors"), CheckpointError, "plain"),
    "absolute path": (shard_named("/etc/model.safetensors"), CheckpointError, "plain"),
    "sub-folder": (shard_named("audio_tokenizer/model.safetensors"), CheckpointError, "plain"),
    "backslash": (shard_named("..\\model.safetensors"), CheckpointError, "plain"),
    "drive": (shard_named("C:model.safetensors"), CheckpointError, "plain"),
    "hidden": (shard_named(".model.safetensors"), CheckpointError, "plain"),
    "NUL": (shard_named("a\0.safetensors"), CheckpointError, "plain"),
    "line break": (shard_named("a.safetensors\n"), CheckpointError, "plain"),
    "lone surrogate": (shard_named("\ud800.safetensors"), CheckpointError, "plain"),
    "other extension": (shard_named("pytorch_model.bin"), CheckpointError, "plain"),
    "shard a number": (shard_named(3), CheckpointError, "plain"),
    "shard a list": (shard_named(["a.safetensors"]), CheckpointError, "plain"),
    "shards missing": (drop_shards, CheckpointError, "2 of 3 shards are missing"),
    "shard never there": (
        shard_named("model-00009-of-00003.safetensors"),
        CheckpointError,
        "1 of 4 shards are missing.*model-00009",
    ),
    "shard a folder": (
        shard_as_folder,
        CheckpointError,
        "not a regular file",
    ),
    "dangling link": (
        shard_as_dangling_link,
        CheckpointError,
        "1 of 3 shards are missing",
    ),
    "shard truncated": (truncate_shard, CheckpointError, "truncated or damaged"),
    "tensor in two shards": (duplicate_tensor, CheckpointError, "is in both"),
    "tensor in another shard": (
        misplace,
        CheckpointError,
        r"says tensor 'model.norm.weight' is in model-0000[23].*but it is in model-00001",
    ),
    "tensor in no shard": (
        set_json(INDEX, lambda i: i["weight_map"].update(x="model-00001-of-00003.safetensors")),
        CheckpointError,
        "'x' is in .* no shard has it",
    ),
    "tensor not in the index": (add_unlisted, CheckpointError, "1 tensors are not in the index"),
    "bad tp_size": (
        set_json(INDEX, lambda i: i["metadata"].update(tp_size="many")),
        CheckpointError,
        "tp_size 'many'",
    ),
    "generation config damaged": (
        set_text("generation_config.json", "{"),
        CheckpointError,
        "generation_config.json is not valid JSON",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(tmp_path: Path, case: str) -> None:
    folder, _ = write_checkpoint(tmp_path / "model", "flash")
    break_it, error, message = REFUSED[case]
    break_it(folder)
    with pytest.raises(error, match=message) as caught:
        Checkpoint.open(folder)
    assert len(str(caught.value)) < 2000


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoint.open(path)


# --- Memory -------------------------------------------------------------------------------


def test_reading_costs_one_tensor(tmp_path: Path) -> None:
    """Three tensors of 64 MiB in a sparse file: reading one as f32 costs its 128 MiB and the
    working set of one row group, whatever else the file holds."""
    folder, _ = write_checkpoint(tmp_path, "flash_bf16", shards=1)
    shape = (8192, 4096)
    size = shape[0] * shape[1] * 2
    header = {
        name: {"dtype": "BF16", "shape": list(shape), "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate("abc")
    }
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + 3 * size)
    row = np.arange(4096, dtype=np.float32)
    with path.open("r+b") as file:
        file.seek(8 + len(text) + size + 8000 * 4096 * 2)
        file.write(to_bf16(row).tobytes())
    checkpoint = Checkpoint.open(folder)
    tracemalloc.start()
    try:
        values = checkpoint.read("b")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert values.nbytes == 2 * size
    assert np.array_equal(values[8000], from_bf16(to_bf16(row)))
    assert not values[7999].any()
    assert peak < values.nbytes + (40 << 20)
