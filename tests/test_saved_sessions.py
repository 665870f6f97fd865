"""Saved and restored: an interrupted session says what one says that was not interrupted."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import scripted
import tiny
from fake_backend import FakeBackend
from test_ggml_backend import packed

from mimo_edge.api import Runtime
from mimo_edge.chat_template import ChatTemplate
from mimo_edge.errors import (
    ContextLengthError,
    MimoEdgeError,
    SnapshotError,
    SnapshotMismatchError,
    UsageError,
)
from mimo_edge.model_source import Model
from mimo_edge.reply import Piece
from mimo_edge.runtimes.base import Backend
from mimo_edge.runtimes.ggml.backend import GgmlBackend
from mimo_edge.runtimes.reference import ReferenceBackend
from mimo_edge.session import Session

# Heads are whole blocks of q8_0; the window of 9 is passed many times.
V2 = tiny.tiny_config(head_dim=32, v_head_dim=32, eos_token_ids=())
DENSE = tiny.tiny_mimo7b_config(head_dim=32, v_head_dim=32, eos_token_ids=())
MODELS: dict[str, Callable[[], Backend]] = {
    "reference": lambda: ReferenceBackend(tiny.random_weights(V2)),
    "ggml f16": lambda: GgmlBackend(packed(V2, "F16"), threads=1, kv_type="f16"),
    "ggml q8_0": lambda: GgmlBackend(packed(V2, "Q8_0"), threads=1, kv_type="q8_0"),
    "ggml f32": lambda: GgmlBackend(packed(V2, "F32"), threads=1, kv_type="f32"),
    "reference 7b": lambda: ReferenceBackend(tiny.random_weights(DENSE)),
    "ggml f16 7b": lambda: GgmlBackend(packed(DENSE, "F16"), threads=1),
}
PROMPT = [5, 17, 3, 40, 2, 9, 33, 8, 60, 61] * 4
TURN = [7, 8, 9]
SAMPLED = {"temperature": 1.2, "top_k": 40, "seed": 11}
TOKENS = 44


@pytest.fixture(scope="module")
def backends() -> Iterator[Callable[[str], Backend]]:
    made: dict[str, Backend] = {}

    def get(name: str) -> Backend:
        if name not in made:
            made[name] = MODELS[name]()
        return made[name]

    yield get
    for backend in made.values():
        backend.close()


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
    from onnx_models import make_bundle, onnx_backend

    path, _ = make_bundle(tmp_path_factory.mktemp("onnx"), tokenizer=False)
    with onnx_backend(path) as backend:
        yield backend


def opened(backend: Backend, draft: Any = 0, context: int = 300, weights: str = "w") -> Runtime:
    model = Model("m", backend, None, ChatTemplate(), frozenset(), identity=lambda: weights)
    return Runtime(model, context, draft)


def ids(pieces: Iterator[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.token_ids]


def interrupted(
    session: Session, path: Path, after: int, **options: Any
) -> tuple[list[int], Iterator[Piece]]:
    """What was said before the session was saved, and the stream that goes on."""
    stream = session.stream(PROMPT, max_tokens=TOKENS, **options)
    said = ids(islice(stream, after))
    session.save(path)
    return said, stream


CASES = [
    (name, draft, sampled)
    for name in MODELS
    for draft in range(4 if "7b" not in name else 2)
    for sampled in (False, True)
]


@pytest.mark.parametrize(("name", "draft", "sampled"), CASES)
def test_it_goes_on_as_if_nothing_had_been(
    backends: Callable[[str], Backend], tmp_path: Path, name: str, draft: int, sampled: bool
) -> None:
    """In the middle of an answer, several windows behind its start, and in the next turn."""
    options = SAMPLED if sampled else {}
    backend, path = backends(name), tmp_path / "s"
    whole = opened(backend, draft).session()
    first = whole.generate(PROMPT, max_tokens=TOKENS, **options)
    second = whole.generate(TURN, max_tokens=TOKENS, **options)

    saved = opened(backend, draft).session()
    said, stream = interrupted(saved, path, 3 + draft, **options)
    restored = opened(backend, draft).restore(path)
    rest = ids(restored.resume())
    assert rest
    assert (*said, *rest) == first.token_ids
    assert restored.last_reply is not None
    assert restored.last_reply.token_ids == first.token_ids
    reply = restored.generate(TURN, max_tokens=TOKENS, **options)
    assert reply.token_ids == second.token_ids
    assert reply.stats.reused_tokens == len(PROMPT) + TOKENS - 1
    if draft:
        assert sum(reply.stats.drafted_by_depth) > 0
    # the session that was saved is undisturbed
    assert (*said, *ids(stream)) == first.token_ids
    saved.save(path)  # between two turns now
    again = opened(backend, draft).restore(path)
    assert again.generate(TURN, max_tokens=TOKENS, **options).token_ids == second.token_ids


@pytest.mark.parametrize("draft", [0, 3])
@pytest.mark.parametrize("sampled", [False, True])
def test_onnx_goes_on_as_well(onnx: Backend, tmp_path: Path, draft: int, sampled: bool) -> None:
    test_it_goes_on_as_if_nothing_had_been(lambda _: onnx, tmp_path, "onnx", draft, sampled)


def test_onnx_and_ggml_know_each_others_rows_but_not_weights(onnx: Backend, tmp_path: Path) -> None:
    """Both scale values in the output projection; the names of the weights keep them apart."""
    other = GgmlBackend(packed(onnx.config, "F32"), threads=1, kv_type="f32")
    assert onnx.new_cache(9).layout == other.new_cache(9).layout
    interrupted(opened(onnx, weights="onnx:w").session(), tmp_path / "s", 3)
    with pytest.raises(SnapshotMismatchError, match="other weights"):
        opened(other).restore(tmp_path / "s")
    other.close()


@pytest.mark.parametrize("name", ["reference", "ggml q8_0", "ggml f16 7b"])
def test_nothing_is_processed_again(
    backends: Callable[[str], Backend], tmp_path: Path, name: str
) -> None:
    """The caches are the same to the byte, and drafts go on at once."""
    from mimo_edge.snapshots.sequence import capture

    draft = 3 if "7b" not in name else 1
    session = opened(backends(name), draft).session()
    interrupted(session, tmp_path / "s", 9)
    restored = opened(backends(name), draft).restore(tmp_path / "s")
    before, after = capture(session._sequence), capture(restored._sequence)
    assert before.state == after.state
    for one, other in zip(before.sections, after.sections, strict=True):
        assert one.name == other.name
        assert b"".join(p.tobytes() for p in one.parts) == b"".join(
            p.tobytes() for p in other.parts
        )


@pytest.mark.parametrize("name", ["reference", "ggml f16"])
@pytest.mark.parametrize(("saved", "restored"), [(3, 0), (0, 3), (3, 1), (1, 2)])
def test_other_drafts_and_another_context(
    backends: Callable[[str], Backend], tmp_path: Path, name: str, saved: int, restored: int
) -> None:
    want = opened(backends(name)).session().generate(PROMPT, max_tokens=TOKENS).token_ids
    said, _ = interrupted(opened(backends(name), saved).session(), tmp_path / "s", 6)
    for context in (120, 1000):
        runtime = opened(backends(name), restored, context)
        assert (*said, *ids(runtime.restore(tmp_path / "s").resume())) == want


def test_mtp_blocks_that_are_not_loaded(tmp_path: Path) -> None:
    """A model opened without drafts leaves its MTP blocks out, in both directions."""
    from dataclasses import replace

    bare = replace(V2, num_mtp_layers=0)
    full = GgmlBackend(packed(V2, "F16"), threads=1)
    trunk = GgmlBackend(packed(bare, "F16"), threads=1)
    want = opened(full).session().generate(PROMPT, max_tokens=TOKENS).token_ids
    assert opened(trunk).session().generate(PROMPT, max_tokens=TOKENS).token_ids == want
    for saved, restored, drafts in ((full, trunk, 0), (trunk, full, 3), (full, full, 3)):
        one = opened(saved, 0 if restored is full else 3)
        said, _ = interrupted(one.session(), tmp_path / "s", 4)
        session = opened(restored, drafts).restore(tmp_path / "s")
        assert (*said, *ids(session.resume())) == want
        reply = session.last_reply
        assert reply is not None
        assert reply.stats.reused_tokens == len(PROMPT) + len(said) - 1
        assert (sum(reply.stats.drafted_by_depth) > 0) == (drafts > 0)
    full.close()
    trunk.close()


# --- what it belongs to ---------------------------------------------------------------------


def test_other_weights_are_refused_or_computed_again(
    backends: Callable[[str], Backend], tmp_path: Path
) -> None:
    backend, path = backends("reference"), tmp_path / "s"
    want = opened(backend).session().generate(PROMPT, max_tokens=TOKENS).token_ids
    said, _ = interrupted(opened(backend).session(), path, 5)
    other = opened(backend, weights="others")
    with pytest.raises(SnapshotMismatchError, match="other weights"):
        other.restore(path)
    session = other.restore(path, recompute=True)
    assert (*said, *ids(session.resume())) == want
    assert session.last_reply is not None
    assert session.last_reply.stats.reused_tokens == 0


@pytest.mark.parametrize(
    ("saved", "restored", "what"),
    [
        ("ggml f16", "ggml q8_0", "layers"),
        ("ggml f32", "reference", "values"),  # scaled before, or after they are cached
        ("reference", "ggml f16", "values"),
        ("reference 7b", "ggml f16 7b", "layers"),
    ],
)
def test_another_cache_is_refused_or_computed_again(
    backends: Callable[[str], Backend], tmp_path: Path, saved: str, restored: str, what: str
) -> None:
    path = tmp_path / "s"
    said, _ = interrupted(opened(backends(saved)).session(), path, 5)
    runtime = opened(backends(restored))
    with pytest.raises(SnapshotMismatchError, match=f"{what} are of another kind"):
        runtime.restore(path)
    assert len(said) + len(ids(runtime.restore(path, recompute=True).resume())) == TOKENS


def test_backends_with_the_same_rows_take_each_others(tmp_path: Path) -> None:
    """A dense model scales no values: f32 rows of ggml and of the reference mean the same."""
    reference = ReferenceBackend(tiny.random_weights(DENSE))
    ggml = GgmlBackend(packed(DENSE, "F32"), threads=1, kv_type="f32")
    want = opened(reference).session().generate(PROMPT, max_tokens=TOKENS).token_ids
    for one, other in ((reference, ggml), (ggml, reference)):
        said, _ = interrupted(opened(one).session(), tmp_path / "s", 20)
        session = opened(other).restore(tmp_path / "s")
        assert (*said, *ids(session.resume())) == want
        assert session.last_reply is not None
        assert session.last_reply.stats.reused_tokens == len(PROMPT) + 19
    ggml.close()


def test_another_vocabulary_is_always_refused(tmp_path: Path) -> None:
    one, _ = scripted.runtime(["hello<|im_end|>"])
    session = one.session()
    with pytest.raises(UsageError, match="nothing names its weights"):
        session.save(tmp_path / "s")
    interrupted(opened(FakeBackend(V2)).session(), tmp_path / "s", 2)
    bigger = opened(FakeBackend(tiny.tiny_config(vocab_size=98)))
    for recompute in (False, True):
        with pytest.raises(SnapshotMismatchError, match="another vocabulary"):
            bigger.restore(tmp_path / "s", recompute=recompute)


def test_a_context_that_is_too_small(tmp_path: Path) -> None:
    interrupted(opened(FakeBackend(V2)).session(), tmp_path / "s", 9)
    with pytest.raises(ContextLengthError, match="tokens, the context has 40"):
        opened(FakeBackend(V2), context=40).restore(tmp_path / "s", recompute=True)


# --- files that are not what they were ------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    interrupted(opened(FakeBackend(V2), 2).session(), tmp_path / "s", 5, **SAMPLED)
    return tmp_path / "s"


def test_every_damaged_byte_is_found(file: Path) -> None:
    whole = file.read_bytes()
    rng = random.Random(0)
    places = {*range(64), *rng.sample(range(len(whole)), 300), len(whole) - 1}
    runtime = opened(FakeBackend(V2), 2)
    for place in places:
        bad = bytearray(whole)
        bad[place] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        with pytest.raises(SnapshotError):
            runtime.restore(file)
    file.write_bytes(whole)
    assert ids(runtime.restore(file).resume())


def test_every_cut_is_found(file: Path) -> None:
    whole = file.read_bytes()
    runtime = opened(FakeBackend(V2), 2)
    for end in [*range(0, len(whole), 97), len(whole) - 1]:
        file.write_bytes(whole[:end])
        with pytest.raises(SnapshotError):
            runtime.restore(file)
    file.write_bytes(whole + b"x")
    with pytest.raises(SnapshotError, match="should have"):
        runtime.restore(file)


def test_what_is_no_snapshot(tmp_path: Path) -> None:
    runtime = opened(FakeBackend(V2))
    for content in (b"", b"MIMOSNAP", b"x" * 1000, b"GGUF" + bytes(100)):
        (tmp_path / "f").write_bytes(content)
        with pytest.raises(SnapshotError, match="no snapshot of mimo-edge"):
            runtime.restore(tmp_path / "f")
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SnapshotError, match="cannot read"):
            runtime.restore(path)


def test_another_version_is_named(file: Path) -> None:
    whole = bytearray(file.read_bytes())
    whole[8] = 9
    file.write_bytes(whole)
    with pytest.raises(SnapshotMismatchError, match="version 9"):
        opened(FakeBackend(V2)).restore(file)


def test_damaged_rows_are_computed_again_when_allowed(file: Path) -> None:
    whole = bytearray(file.read_bytes())
    at = _header(bytes(whole))[1]
    whole[at + 400] ^= 1
    runtime = opened(FakeBackend(V2), 2)
    good = ids(runtime.restore(file).resume())
    file.write_bytes(whole)
    with pytest.raises(SnapshotError, match="checksum of section"):
        runtime.restore(file)
    assert ids(runtime.restore(file, recompute=True).resume()) == good


def _header(data: bytes) -> tuple[dict[str, Any], int]:
    length = struct.unpack_from("<I", data, 12)[0]
    return json.loads(data[24 : 24 + length]), 24 + length


def _with_header(data: bytes, header: Any) -> bytes:
    text = json.dumps(header).encode()
    rest = data[_header(data)[1] :]
    return data[:12] + struct.pack("<III", len(text), zlib.crc32(text), 0) + text + rest


def test_a_hostile_header_is_a_typed_error(file: Path) -> None:
    """Every value of the header replaced by every strange one, under a checksum that is right."""
    whole = file.read_bytes()
    header, _ = _header(whole)
    strange: list[Any] = [
        None,
        True,
        -1,
        1 << 62,
        1.5,
        "",
        "x" * 99,
        [],
        [[]],
        {},
        {"a": [1]},
        [1, 2, 3],
    ]
    runtime = opened(FakeBackend(V2), 2)

    def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        yield path
        if isinstance(value, dict):
            for key in value:
                yield from places(value[key], (*path, key))
        elif isinstance(value, list):
            for index in range(min(len(value), 3)):
                yield from places(value[index], (*path, index))

    refused = 0
    for path in places(header):
        for bad in strange:
            changed = json.loads(json.dumps(header))
            if path:
                inner = changed
                for key in path[:-1]:
                    inner = inner[key]
                inner[path[-1]] = bad
            else:
                changed = bad
            file.write_bytes(_with_header(whole, changed))
            try:
                session = runtime.restore(file)
                for _ in session.resume():
                    pass
            except MimoEdgeError:
                refused += 1
    assert refused > 400


def test_a_deep_header(file: Path) -> None:
    text = b'{"kind":' + b"[" * 100_000
    data = b"MIMOSNAP" + struct.pack("<IIII", 1, len(text), zlib.crc32(text), 0) + text
    file.write_bytes(data)
    with pytest.raises(SnapshotError, match="no JSON"):
        opened(FakeBackend(V2)).restore(file)


# --- writing --------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_file(file: Path) -> None:
    before = file.read_bytes()
    session = opened(FakeBackend(V2)).session()
    session.generate(PROMPT, max_tokens=TOKENS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        with pytest.raises(SnapshotError, match="cannot be saved"):
            session.save(file)
        with pytest.raises(SnapshotError, match="cannot be saved"):
            session.save(file.with_name("new"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    session.save(file)  # nothing was lost
    assert ids(session.stream(TURN, max_tokens=4))


def test_an_interrupt_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()
    session = opened(FakeBackend(V2)).session()
    stream = session.stream(PROMPT, max_tokens=TOKENS)
    said = ids(islice(stream, 3))

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.save(file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    want = opened(FakeBackend(V2)).session().generate(PROMPT, max_tokens=TOKENS).token_ids
    assert (*said, *ids(stream)) == want


def test_kills_leave_a_whole_file(tmp_path: Path) -> None:
    """A process that saves all the time, killed again and again."""
    path = tmp_path / "s"
    script = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\n"
        "from test_saved_sessions import *\n"
        "session = opened(FakeBackend(V2)).session()\n"
        "session.generate(PROMPT, max_tokens=100)\n"
        "session.save(Path(sys.argv[1])); print('ready', flush=True)\n"
        "while True: session.save(Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", script, str(path), str(Path(__file__).parent)]
    rng = random.Random(1)
    for _ in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            signal.sigtimedwait([], rng.random() * 0.05)
            process.kill()
        session = opened(FakeBackend(V2)).restore(path)
        assert session.generate(TURN, max_tokens=2).stats.reused_tokens == len(PROMPT) + 99
    for left in tmp_path.glob(".s.*"):  # an hour later
        os.utime(left, (0, 0))
    session.save(path)
    assert [one.name for one in tmp_path.iterdir()] == ["s"]


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    runtime = opened(FakeBackend(V2))
    session = runtime.session()
    with pytest.raises(SnapshotError, match="cannot be saved"):
        session.save(tmp_path / "missing" / "s")
    with pytest.raises(SnapshotError, match="cannot be saved"):
        session.save(tmp_path)
    with pytest.raises(UsageError, match="no answer to go on with"):
        session.resume()
    session.save(tmp_path / "empty")
    restored = runtime.restore(tmp_path / "empty")
    want = runtime.session().generate(PROMPT, max_tokens=9).token_ids
    assert restored.generate(PROMPT, max_tokens=9).token_ids == want


# --- the conversation -----------------------------------------------------------------------

THOUGHT = "<think>why not</think>Hello there, Ünïcode 客厅 everybody, STOP and more<|im_end|>"
SECOND = "And again.<|im_end|>"


def chat(answers: list[str] | None = None, draft: Any = 0) -> Runtime:
    from dataclasses import replace

    runtime, _ = scripted.runtime(answers or [THOUGHT, SECOND], draft=draft)
    return Runtime(replace(runtime._model, identity=lambda: "w"), 2000, draft)


DIM = {"type": "function", "function": {"name": "dim", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("draft", "after"), [(0, n) for n in (1, 3, 8, 14, 20, 30)] + [(3, n) for n in (1, 2, 4, 7)]
)
def test_messages_and_an_answer_cut_anywhere(tmp_path: Path, after: int, draft: int) -> None:
    """Also inside a think block, a character, and a stop text."""
    options: dict[str, Any] = {"stop": ["STOP"], "stop_repeats": 40}
    one = chat(draft=draft).session("Be kind.", [DIM], enable_thinking=True)
    whole = one.generate("hello", **options)
    assert whole.finish_reason == "stop"
    session = chat(draft=draft).session("Be kind.", [DIM], enable_thinking=True)
    stream = session.stream("hello", **options)
    pieces = list(islice(stream, after))
    session.save(tmp_path / "s")
    restored = chat(draft=draft).restore(tmp_path / "s")
    assert restored.messages == session.messages
    pieces += restored.resume()
    assert "".join(p.text for p in pieces) == whole.text
    assert "".join(p.reasoning for p in pieces) == whole.reasoning
    assert pieces[-1].finish_reason == whole.finish_reason
    found = restored.last_reply
    assert found is not None
    assert (found.text, found.reasoning, found.token_ids) == (
        whole.text,
        whole.reasoning,
        whole.token_ids,
    )
    assert restored.messages == one.messages
    assert restored.generate("more").text == one.generate("more").text
    assert restored.messages == one.messages


def test_a_new_prompt_leaves_an_unfinished_answer_as_it_is(tmp_path: Path) -> None:
    session = chat().session("Be kind.")
    stream = session.stream("hello")
    list(islice(stream, 12))
    session.save(tmp_path / "s")
    restored = chat().restore(tmp_path / "s")
    restored.save(tmp_path / "t")  # as it was
    stream.close()  # type: ignore[attr-defined]
    for path in ("s", "t"):
        restored = chat().restore(tmp_path / path)
        text = restored.generate("more").text
        assert text == "And again."
        assert restored.messages[:-2] == session.messages


def test_an_answer_saved_behind_its_last_token(tmp_path: Path) -> None:
    for limit, reason in ((4, "length"), (None, "stop")):
        whole = chat().session().generate("hello", max_tokens=limit)
        session = chat().session()
        stream = session.stream("hello", max_tokens=limit)
        list(islice(stream, len(whole.token_ids)))
        session.save(tmp_path / "s")
        restored = chat().restore(tmp_path / "s")
        (last,) = restored.resume()
        assert last.finish_reason == reason
        assert restored.last_reply is not None
        assert restored.last_reply.text == whole.text


def test_an_answer_at_the_end_of_the_context(tmp_path: Path) -> None:
    backend = FakeBackend(V2)
    whole = opened(backend, context=50).session().generate(PROMPT, max_tokens=None)
    for after in (len(whole.token_ids) - 1, len(whole.token_ids)):
        session = opened(backend, context=50).session()
        stream = session.stream(PROMPT, max_tokens=None)
        said = ids(islice(stream, after))
        session.save(tmp_path / "s")
        restored = opened(backend, context=50).restore(tmp_path / "s")
        assert (*said, *ids(restored.resume())) == whole.token_ids


def test_a_repetition_is_noticed_over_the_gap(tmp_path: Path) -> None:
    runtime = chat(["a b" * 200 + "<|im_end|>"])
    whole = runtime.session().generate("hello", stop_repeats=6, max_tokens=None)
    assert whole.finish_reason == "repetition"
    session = runtime.session()
    stream = session.stream("hello", stop_repeats=6, max_tokens=None)
    said = ids(islice(stream, len(whole.token_ids) - 2))
    session.save(tmp_path / "s")
    restored = runtime.restore(tmp_path / "s")
    assert (*said, *ids(restored.resume())) == whole.token_ids


@pytest.mark.parametrize("draft", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.6},
        {"presence_penalty": 1.5, "frequency_penalty": 0.7, "temperature": 1.1, "seed": 3},
    ],
)
def test_penalties_count_over_the_gap(tmp_path: Path, options: dict[str, Any], draft: int) -> None:
    backend = FakeBackend(V2)
    want = opened(backend).session().generate(PROMPT, max_tokens=TOKENS, **options).token_ids
    plain = {**options, "repetition_penalty": 1.0, "presence_penalty": 0, "frequency_penalty": 0}
    assert opened(backend).session().generate(PROMPT, max_tokens=TOKENS, **plain).token_ids != want
    said, _ = interrupted(opened(backend, draft).session(), tmp_path / "s", 15, **options)
    assert (*said, *ids(opened(backend, draft).restore(tmp_path / "s").resume())) == want


def test_a_form_is_kept_to_over_the_gap(tmp_path: Path) -> None:
    options: dict[str, Any] = {"regex": "[a-z]{3} [a-z]{4} [0-9]{12}", "max_tokens": 60}
    runtime = chat()
    whole = runtime.session().generate("hello", **options)
    assert whole.finish_reason == "stop"
    for after in (1, 4, 9):
        session = runtime.session()
        stream = session.stream("hello", **options)
        said = ids(islice(stream, after))
        session.save(tmp_path / "s")
        restored = runtime.restore(tmp_path / "s")
        assert (*said, *ids(restored.resume())) == whole.token_ids
        assert restored.last_reply is not None
        assert restored.last_reply.text == whole.text


def test_not_while_it_generates_elsewhere(tmp_path: Path) -> None:
    failures: list[BaseException] = []
    session: Session

    def on_call(kind: str, rows: int) -> None:
        try:
            session.save(tmp_path / "s")
        except UsageError as error:
            failures.append(error)

    session = opened(FakeBackend(V2, on_call=on_call)).session()
    session.generate(PROMPT, max_tokens=2)
    assert "generating" in str(failures[0])


def test_messages_that_are_no_json(tmp_path: Path) -> None:
    session = chat().session(tools=[DIM | {"x": object()}])
    with pytest.raises(SnapshotError, match="no JSON"):
        session.save(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []
