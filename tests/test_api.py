from __future__ import annotations

import asyncio
import itertools
import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tokenizers_made as made
from checkpoint_factory import write_checkpoint
from scripted import END, runtime

from mimo_edge.answer_reader import AnswerReader
from mimo_edge.api import Runtime
from mimo_edge.chat_template import ChatTemplate
from mimo_edge.errors import (
    BackendError,
    BundleError,
    ContextLengthError,
    DeviceError,
    GenerationError,
    TokenizerError,
    UsageError,
)
from mimo_edge.export.pipeline import export_bundle
from mimo_edge.model_source import Model, kv_bytes, parameter_count
from mimo_edge.reply import Reply
from mimo_edge.runtimes.reference import ReferenceBackend, full_logits
from mimo_edge.session import Session
from mimo_edge.tokenizer import Tokenizer
from mimo_edge.tool_calls import ToolCall
from mimo_edge.units import format_bytes, parse_bytes

TOOLS = [{"name": "dim", "parameters": {"properties": {"by": {"type": "integer"}}}}]


CALL = "<tool_call>\n<function=dim>\n<parameter=by>3</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize("draft", [0, 3, "auto"])
def test_a_conversation_reuses_what_was_processed(draft: Any) -> None:
    rt, _backend = runtime(["Hello there, 灯!" + END, "Second" + END], draft)
    with rt:
        session = rt.session()
        pieces = list(session.stream("hi"))
        assert "".join(p.text for p in pieces) == "Hello there, 灯!"
        assert [p.finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].finish_reason == "stop"
        first = session.last_reply
        assert first is not None
        assert first.token_ids == tuple(t for p in pieces for t in p.token_ids)
        assert first.token_ids[-1] == rt.tokenizer.special[END]  # type: ignore[union-attr]
        second = session.generate("more")
        assert second.text == "Second"
        assert [m["role"] for m in session.messages] == ["user", "assistant"] * 2
    totals = rt.stats()
    assert totals["generations"] == 2
    assert totals["tokens"] == len(first.token_ids) + len(second.token_ids)
    assert totals["peak_rss_bytes"] > 1 << 20
    json.dumps(totals)


def test_without_thinking_the_next_turn_costs_only_its_own_tokens() -> None:
    rt, backend = runtime(["<think></think>One" + END, "<think></think>Two" + END], 3)
    backend.script = [ids[2:] for ids in backend.script]  # the prompt already has the pair
    backend.start = backend.start + [backend.tokenizer.special[t] for t in ("<think>", "</think>")]
    session = rt.session(enable_thinking=False)
    first = session.generate("a")
    second = session.generate("b")
    assert (first.text, second.text) == ("One", "Two")
    assert second.stats.reused_tokens == first.stats.prompt_tokens + len(first.token_ids) - 1


def test_tool_calls_and_results() -> None:
    rt, _ = runtime(["Ok. " + CALL + END, "Done." + END])
    session = rt.session(tools=TOOLS)
    pieces = list(session.stream("dim it"))
    assert [c for p in pieces for c in p.tool_calls] == [ToolCall("dim", {"by": 3})]
    reply = session.last_reply
    assert reply is not None
    assert (reply.text, reply.finish_reason) == ("Ok. ", "tool_calls")
    session.tool_result("dimmed", name="dim")
    assert session.generate().text == "Done."
    assert [m["role"] for m in session.messages] == ["user", "assistant", "tool", "assistant"]
    assert session.messages[1]["content"] == "Ok. " + CALL


def test_malformed_calls_are_flagged_and_shown() -> None:
    bad = CALL.replace("dim", "explode")
    rt, _ = runtime([bad + END])
    reply = rt.session(tools=TOOLS, constrain_tools=False).generate("x")
    assert (reply.text, reply.tool_calls, reply.finish_reason) == (bad, (), "stop")
    assert "unknown function" in reply.malformed[0].why


def test_without_tools_calls_are_text() -> None:
    rt, _ = runtime([CALL + END])
    assert rt.session().generate("x").text == CALL


def test_reasoning_comes_apart() -> None:
    rt, _ = runtime(["<think>let me see</think>Yes" + END, "again" + END])
    session = rt.session()
    reply = session.generate("x")
    assert (reply.text, reply.reasoning) == ("Yes", "let me see")
    assert session.messages[-1]["reasoning_content"] == "let me see"
    assert session.messages[-1]["content"] == "Yes"


@pytest.mark.parametrize("draft", [0, 1, 2, 3])
@pytest.mark.parametrize("stop", ["light", "ght i", " the l", "turn on the light"])
def test_stop_strings_across_token_borders(draft: int, stop: str) -> None:
    rt, _ = runtime(["turn on the light in the room" + END], draft, skill=(1.0, 1.0, 1.0))
    session = rt.session()
    pieces = list(session.stream("x", stop=[stop, "never"]))
    text = "".join(p.text for p in pieces)
    assert text == "turn on the light in the room".split(stop)[0]
    assert pieces[-1].finish_reason == "stop"
    plain, _ = runtime(["turn on the light in the room" + END], 0)
    assert session.last_reply is not None
    assert session.last_reply.token_ids == plain.session().generate("x", stop=stop).token_ids


def test_the_end_of_a_possible_stop_string_is_not_lost() -> None:
    rt, _ = runtime(["ends in ligh" + END])
    assert rt.session().generate("x", stop=["light"]).text == "ends in ligh"


def test_length_and_context_limits() -> None:
    rt, _ = runtime(["turn on the light in the room" + END])
    reply = rt.session().generate("x", max_tokens=3)
    assert (reply.finish_reason, len(reply.token_ids)) == ("length", 3)
    small, backend = runtime(["x" + END], context=60)
    session = small.session()
    with pytest.raises(ContextLengthError, match="context holds 60"):
        session.stream("w " * 100)
    assert session.messages == []
    assert backend.forwards == []


def test_cancel_from_another_thread_keeps_what_was_said() -> None:
    rt, backend = runtime(["a b c d e f g h i j k l m n o p" + END], 0)
    session = rt.session()
    backend.on_call = lambda kind, rows: (
        threading.Thread(target=session.cancel).run() if len(backend.forwards) == 5 else None
    )
    reply = session.generate("x")
    assert reply.finish_reason == "cancelled"
    assert 0 < len(reply.token_ids) < 8
    assert session.messages[-1]["content"] == reply.text
    backend.on_call = lambda kind, rows: None
    assert session.generate("y").finish_reason in ("stop", "length")


def test_leaving_a_stream_early_and_starting_another() -> None:
    rt, _ = runtime(["one two three four" + END, "five" + END], 0)
    session = rt.session()
    stream = session.stream("x")
    next(stream)
    reply = session.generate("y")  # closes the first
    assert reply.text == "five"
    assert list(stream) == []
    assert [m["role"] for m in session.messages] == ["user", "assistant"] * 2


def test_a_failure_leaves_the_history_as_it_was() -> None:
    rt, backend = runtime(["one" + END], 0)
    session = rt.session()
    backend.fail_after = 2
    with pytest.raises(RuntimeError, match="went away"):
        session.generate("x")
    assert session.messages == []
    backend.fail_after = None
    assert session.generate("x").text == "one"


def test_nan_logits_are_a_typed_error() -> None:
    rt, backend = runtime(["x" + END], 0)
    backend.next_logits = lambda tokens: np.full(backend.config.vocab_size, np.nan, np.float32)  # type: ignore[method-assign]
    with pytest.raises(GenerationError):
        rt.session().generate("x")


def test_async_streaming_and_cancellation() -> None:
    rt, backend = runtime(["a b c d e f" + END])

    async def whole() -> str:
        return "".join([piece.text async for piece in rt.session().astream("x")])

    assert asyncio.run(whole()) == "a b c d e f"

    async def stopped() -> Session:
        session = rt.session()
        slow = threading.Event()
        backend.on_call = lambda kind, rows: (slow.wait(0.02), None)[1]

        async def consume() -> None:
            async for _ in session.astream("x", max_tokens=None):
                pass

        task = asyncio.create_task(consume())
        await asyncio.sleep(0.06)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return session

    session = asyncio.run(stopped())
    backend.on_call = lambda kind, rows: None
    assert session.generate("again").finish_reason is not None


def test_a_task_cancelled_twice_still_waits_for_its_thread() -> None:
    rt, backend = runtime(["a b c d e f" + END])
    running, go_on = threading.Event(), threading.Event()

    def block(kind: str, rows: int) -> None:
        running.set()
        assert go_on.wait(10)

    backend.on_call = block

    async def twice() -> Session:
        session = rt.session()

        async def consume() -> None:
            async for _ in session.astream("x"):
                pass

        task = asyncio.create_task(consume())
        await asyncio.to_thread(running.wait, 10)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0.01)
        assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        return session

    assert asyncio.run(twice()).generate("again").text


def test_a_generation_cancelled_in_prefill_counts_no_token() -> None:
    rt, backend = runtime(["a b" + END], draft=0)
    session = rt.session()
    backend.on_call = lambda kind, rows: session.cancel()
    assert session.generate("x" * 1000).finish_reason == "cancelled"
    assert session.last_reply is not None
    assert session.last_reply.token_ids == ()
    backend.on_call = lambda kind, rows: None
    rt.session().generate("x")
    stats = rt.stats()
    assert (stats["generations"], stats["first_tokens"]) == (2, 1)
    assert stats["tokens_per_verify"] == 1.0
    stats["accepted_by_depth"].append(7)  # a copy: the runtime's own counts stay
    assert 7 not in rt.stats()["accepted_by_depth"]


def test_threads_take_turns_on_one_runtime() -> None:
    rt, backend = runtime(["turn on the light" + END])
    inside = threading.Lock()

    def exclusive(kind: str, rows: int) -> None:
        assert inside.acquire(blocking=False), "two calls at once"
        threading.Event().wait(0.0005)
        inside.release()

    backend.on_call = exclusive
    replies: list[Reply] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            replies.append(rt.session().generate("x"))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert {reply.text for reply in replies} == {"turn on the light"}


def test_one_session_serves_one_thread_at_a_time() -> None:
    rt, backend = runtime(["turn on the light" + END])
    session = rt.session()
    started, go_on = threading.Event(), threading.Event()

    def hold(kind: str, rows: int) -> None:
        started.set()
        go_on.wait(5)

    backend.on_call = hold
    thread = threading.Thread(target=lambda: session.generate("x"))
    thread.start()
    started.wait(5)
    with pytest.raises(UsageError, match="another thread"):
        session.generate("y")
    go_on.set()
    thread.join()


def test_wrong_calls() -> None:
    rt, _ = runtime(["x" + END])
    session = rt.session()
    wrong: list[dict[str, Any]] = [
        {"json_schema": []},
        {"max_tokens": 0},
        {"temperature": -1},
        {"stop": [""]},
        {"stop": [3]},
        {"stop": 3},
        {"max_tokens": 2.5},
        {"max_tokens": "5"},
    ]
    for options in wrong:
        with pytest.raises(UsageError):
            session.stream("x", **options)
    with pytest.raises(UsageError, match="no message"):
        session.stream()
    with pytest.raises(TokenizerError, match="surrogate"):
        session.stream("bad \udcff")
    with pytest.raises(UsageError):
        rt.session(tools=[{}])
    session.generate("x")
    with pytest.raises(UsageError, match="cannot follow"):
        session.stream([1, 2, 3])
    rt.close()
    rt.close()
    with pytest.raises(UsageError, match="closed"):
        rt.session()
    with pytest.raises(UsageError, match="closed"):
        session.generate("y")


def test_a_model_without_tokenizer_works_on_ids() -> None:
    weights = tiny.random_weights(tiny.tiny_config(eos_token_ids=()), seed=1)
    model = Model("ids", ReferenceBackend(weights), None, ChatTemplate(), frozenset())
    rt = Runtime(model, 200)
    session = rt.session()
    pieces = list(session.stream([5, 6, 7], max_tokens=6))
    ids = [t for p in pieces for t in p.token_ids]
    assert len(ids) == 6
    assert not any(p.text for p in pieces)
    more = session.generate([8], max_tokens=2)
    logits = full_logits(weights, [5, 6, 7, *ids, 8])
    assert more.token_ids[0] == logits[-1].argmax()
    np.testing.assert_array_equal(rt.logits([5, 6, 7]), full_logits(weights, [5, 6, 7]))
    with pytest.raises(TokenizerError, match="no tokenizer"):
        session.generate("text")
    with pytest.raises(TokenizerError, match="no tokenizer"):
        rt.session(system="x")


def test_stop_ids_and_special_text_in_the_reader() -> None:
    tokenizer = Tokenizer.from_gguf(made.gguf_metadata())
    reader = AnswerReader(tokenizer, tokenizer.eos_ids, thinking=True)
    for token in tokenizer.encode("hm</think>a<|im_start|>b", allow_special=True):
        assert not reader.add(token)
    assert reader.add(tokenizer.special["<|endoftext|>"])
    part = reader.finish()
    assert (part.reasoning, part.text) == ("hm", "ab")


# --- opening ----------------------------------------------------------------------------


def test_opening_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no model"):
        Runtime.open(tmp_path / "absent")
    with pytest.raises(UsageError, match="neither"):
        Runtime.open(tmp_path)
    with pytest.raises(BackendError, match="'tpu'"):
        Runtime.open(tmp_path, backend="tpu")
    with pytest.raises(UsageError, match=r"no profile 'toaster'.*phone"):
        Runtime.open(tmp_path, profile="toaster")
    with pytest.raises(UsageError, match="no size"):
        Runtime.open(tmp_path, ram="lots")
    with pytest.raises(UsageError, match="threads"):
        Runtime.open(tmp_path, threads=0)


def test_the_built_in_model_opens_and_respects_ram() -> None:
    with pytest.raises(DeviceError, match=r"needs .* --ram allows 50\.0 MiB"):
        Runtime.open("mimo-nano", ram="50MiB")
    with pytest.raises(UsageError, match="draft = 4"):
        Runtime.open("mimo-nano", draft=4)
    with pytest.raises(ContextLengthError):
        Runtime.open("mimo-nano", context=1 << 20)
    with Runtime.open("mimo-nano", ram="1GiB", threads=1) as rt:
        assert rt.context == 4096
        reply = rt.session(enable_thinking=False).generate("hello", max_tokens=4)
        assert 1 <= len(reply.token_ids) <= 4


def test_ggml_and_reference_agree_on_a_bundle(tmp_path: Path) -> None:
    folder, _ = write_checkpoint(tmp_path / "source", "flash", tokenizer=True)
    export_bundle(folder, tmp_path / "bundle", recipe="f32").close()
    prompt = [5, 17, 3, 40, 2, 9] * 6
    answers = set()
    for backend, draft in itertools.product(("reference", "ggml"), (0, 3)):
        with Runtime.open(tmp_path / "bundle", backend=backend, threads=1, draft=draft) as rt:
            assert rt.stats()["backend"] == backend
            answers.add(rt.session().generate(prompt, max_tokens=24).token_ids)
    assert len(answers) == 1
    with pytest.raises(DeviceError, match="ggml backend needs"):
        Runtime.open(tmp_path / "bundle", backend="ggml", ram="50MiB")
    with pytest.raises(BackendError, match="not checkpoints"):
        Runtime.open(folder, backend="ggml")


def test_needs_are_counted_from_the_tensors_and_caches_themselves() -> None:
    for config in (tiny.tiny_config(), tiny.tiny_mimo7b_config()):
        weights = tiny.random_weights(config)
        real = sum(tensor.size for tensor in weights._tensors.values())
        assert parameter_count(config) == real
        backend = ReferenceBackend(weights)
        cache = backend.new_cache(256, 4)
        ids = np.zeros(256, np.int32)
        hidden = backend.forward(ids, cache, hidden_rows=256).hidden
        for depth in range(config.num_mtp_layers):
            backend.mtp_forward(depth, ids, hidden, 0, cache)
        assert kv_bytes(config, 256) == cache.nbytes()


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("1K", 1024), ("1.5 GiB", 3 << 29), ("2GB", 2 * 10**9), (77, 77)],
)
def test_sizes(text: Any, size: int) -> None:
    assert parse_bytes(text) == size
    bad: Any
    for bad in ("", "x", "1Q", "-1", 0, True, "1e9", "9" * 400, math.nan, math.inf, []):
        with pytest.raises(UsageError):
            parse_bytes(bad)
    assert format_bytes(512) == "512 B"
    assert format_bytes(3 << 29) == "1.50 GiB"


def test_a_profile_decides_what_is_not_given(tmp_path: Path) -> None:
    """Memory, context, cache and threads of the profile, each giving way to an argument."""
    from make_random_model import write_model

    from mimo_edge.devices.profile import load_profile
    from mimo_edge.machine import usable_cores

    config = tiny.tiny_config(
        head_dim=96, v_head_dim=64, max_position_embeddings=1 << 16, num_mtp_layers=0
    )
    path = tmp_path / "m.gguf"
    write_model(path, config, experts="Q8_0", dense="Q8_0", head="Q8_0")
    router = load_profile("router")
    with Runtime.open(path, profile="router") as runtime:
        budget = runtime.stats()["budget"]
        assert runtime.context == router.context == 2048
        assert budget["ram"] == router.process_bytes
        assert budget["kv_type"] == router.kv_type == "q8_0"
        backend: Any = runtime.engine.backend
        assert backend.device.threads == min(router.threads, usable_cores())
    with Runtime.open(
        path, profile="router", ram="700MiB", context=512, kv_type="f16", threads=1
    ) as runtime:
        budget = runtime.stats()["budget"]
        assert (budget["ram"], budget["kv_type"], runtime.context) == (700 << 20, "f16", 512)
        backend = runtime.engine.backend
        assert backend.device.threads == 1
    # a model with a shorter context, and heads that are no whole blocks of the profile's cache
    short = tiny.tiny_config(max_position_embeddings=256, num_mtp_layers=0)
    write_model(path, short, experts="Q8_0", dense="Q8_0", head="Q8_0")
    with Runtime.open(path, profile="router") as runtime:
        assert runtime.context == 256
        assert runtime.stats()["budget"]["kv_type"] == "f32"  # it is small
