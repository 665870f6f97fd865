"""A model behind a server answers as the model itself does: our server, the same sessions."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from scripted import END, runtime
from serving import Served, scripted, serving, until
from test_leaks import MIB, held

from mimo_edge.api import Runtime
from mimo_edge.errors import ContextLengthError, RemoteStatusError, TokenizerError, UsageError
from mimo_edge.nano.commands import DEMO_TOOLS
from mimo_edge.remote.request import to_openai
from mimo_edge.reply import Piece
from mimo_edge.serve.limits import Limits

THOUGHT = "<think>it is polite</think>Hello there."
CALL = "<tool_call>\n<function=dim>\n<parameter=by>3</parameter>\n</function>\n</tool_call>"
DIM = {
    "name": "dim",
    "parameters": {"type": "object", "properties": {"by": {"type": "integer"}}},
}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with scripted([THOUGHT + END]) as (server, _):
        yield server


def test_an_answer(served: Served) -> None:
    with Runtime.connect(served.url) as rt:
        assert (rt.name, rt.context) == ("scripted", 2000)
        session = rt.session(system="be brief")
        pieces = list(session.stream("hello"))
        assert len(pieces) > 3
        assert "".join(p.text for p in pieces) == "Hello there."
        assert "".join(p.reasoning for p in pieces) == "it is polite"
        assert [p.finish_reason for p in pieces[-2:]] == [None, "stop"]
        reply = session.last_reply
        assert reply is not None
        want = served.runtime.session(system="be brief").generate("hello")
        assert (reply.text, reply.reasoning) == (want.text, want.reasoning)
        assert (reply.stats.tokens, reply.stats.prompt_tokens) == (
            want.stats.tokens,
            want.stats.prompt_tokens,
        )
        assert [m["role"] for m in session.messages] == ["system", "user", "assistant"]
        stats = rt.stats()
        assert (stats["generations"], stats["tokens"]) == (1, want.stats.tokens)
        assert stats["backend"] == "remote"


def test_the_conversation_goes_on() -> None:
    with (
        scripted([f"<think></think>answer {n}" + END for n in range(3)]) as (served, _),
        Runtime.connect(served.url) as rt,
    ):
        session = rt.session()
        assert [session.generate(str(n)).text for n in range(3)] == [
            "answer 0",
            "answer 1",
            "answer 2",
        ]
        assert session.last_reply is not None
        assert session.last_reply.stats.reused_tokens > 10  # the server's, in `usage`


def test_options_reach_the_model(served: Served) -> None:
    with Runtime.connect(served.url) as rt:
        session = rt.session()
        assert session.generate("x", max_tokens=3).finish_reason == "length"
        assert session.generate("x", stop="there").text == "Hello "
        hot: dict[str, Any] = {"temperature": 1e4, "max_tokens": 9}
        one, same, other = (rt.session().generate("x", seed=s, **hot).text for s in (1, 1, 2))
        assert one == same != other
        for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
            narrowed = rt.session().generate("x", temperature=1e4, stop=["there"], **narrow)
            assert narrowed.text == "Hello "


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [5]}, "stop"),
        ({"timeout_s": 0}, "timeout_s"),
    ],
)
def test_wrong_options_are_found_here(served: Served, options: Any, match: str) -> None:
    with Runtime.connect(served.url) as rt, pytest.raises(UsageError, match=match):
        rt.session().stream("x", **options)


def test_wrong_prompts(served: Served) -> None:
    with Runtime.connect(served.url) as rt:
        session = rt.session()
        with pytest.raises(UsageError, match="token ids"):
            session.stream([1, 2, 3])
        with pytest.raises(UsageError, match="no message"):
            session.stream()
        with pytest.raises(TokenizerError):
            session.stream("\ud800")
        with pytest.raises(UsageError, match="no call"):
            session.tool_result("ok")
        with pytest.raises(UsageError, match="two tools"):
            rt.session(tools=[DIM, DIM])
        with pytest.raises(ContextLengthError):
            session.generate("word " * 3000)
        assert session.generate("hello").text == "Hello there."


def test_which_model(served: Served) -> None:
    rt, _ = runtime([THOUGHT + END])
    with serving(rt, aliases=("other",)) as two:
        with pytest.raises(UsageError, match="scripted, other"):
            Runtime.connect(two.url)
        with Runtime.connect(two.url, "other") as remote:
            assert remote.session().generate("x").text == "Hello there."
    with pytest.raises(UsageError, match="it has scripted"):
        Runtime.connect(served.url, "gpt-4o")


def test_keys() -> None:
    rt, _ = runtime([THOUGHT + END])
    with serving(rt, api_key="s3cret") as locked:
        with pytest.raises(RemoteStatusError, match="api_key") as caught:
            Runtime.connect(locked.url)
        assert caught.value.status == 401
        with Runtime.connect(locked.url, api_key="s3cret") as remote:
            assert remote.session().generate("x").text == "Hello there."


def test_an_agent_there_with_tools_here() -> None:
    done: list[int] = []

    def dim(by: int) -> str:
        """Dim the light."""
        done.append(by)
        if by == 3 and len(done) == 1:
            raise ValueError("too dark")
        return "dimmed"

    answers = ["<think></think>Ok. " + CALL + CALL + END, "<think></think>Done." + END]
    rt, _ = runtime(answers)
    with rt:
        want = rt.agent([dim]).run("dim it")
    done.clear()
    with scripted(answers) as (served, _), Runtime.connect(served.url) as remote:
        agent = remote.agent([dim])
        result = agent.run("dim it")
        assert done == [3, 3]
        assert (result.text, result.finish_reason) == (want.text, want.finish_reason)
        assert [(s.call, s.result, s.failed) for s in result.steps] == [
            (s.call, s.result, s.failed) for s in want.steps
        ]
        assert result.reply is not None
        assert result.reply.stats.reused_tokens > 0
        roles = [m["role"] for m in agent.session.messages]
        assert roles == ["user", "assistant", "tool", "tool", "assistant"]
        ids = [m["tool_call_id"] for m in agent.session.messages if m["role"] == "tool"]
        assert len(set(ids)) == 2


def test_astream_and_its_cancellation() -> None:
    async def main(rt: Any) -> str:
        session = rt.session()
        said = ""
        async for piece in session.astream("x"):
            said += piece.text
        begun = asyncio.Event()
        task = asyncio.create_task(drain(session, begun))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return said

    async def drain(session: Any, begun: asyncio.Event) -> None:
        async for _ in session.astream("y", max_tokens=None):
            begun.set()

    answers = ["<think></think>one" + END, "<think></think>" + "word " * 6000]
    with scripted(answers, draft=0) as (served, _), Runtime.connect(served.url) as rt:
        assert asyncio.run(main(rt)) == "one"
        served.settled()  # the server heard of it
        assert served.runtime.stats()["tokens"] < 6000


def test_sessions_side_by_side(served: Served) -> None:
    texts: list[str] = []

    def ask(rt: Any) -> None:
        session = rt.session()
        texts.extend(session.generate(str(n)).text for n in range(3))

    with Runtime.connect(served.url) as rt:
        threads = [threading.Thread(target=ask, args=(rt,)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert texts == ["Hello there."] * 18
        assert rt.stats()["generations"] == 18


def test_one_session_serves_one_answer_at_a_time() -> None:
    with scripted(["word " * 1500], draft=0) as (served, _), Runtime.connect(served.url) as rt:
        session = rt.session()
        pieces = session.stream("x", max_tokens=None)
        next(pieces)
        errors: list[BaseException] = []

        def other() -> None:
            try:
                for _ in pieces:
                    pass
            except BaseException as error:
                errors.append(error)

        def busy() -> bool:
            try:
                next(pieces)
            except ValueError:
                return True
            return False

        thread = threading.Thread(target=other)
        thread.start()
        until(busy)  # the other is inside
        with pytest.raises(UsageError, match="another thread"):
            session.stop()
        session.cancel()
        thread.join()


def test_a_full_server_is_asked_again() -> None:
    limits = Limits(concurrent=1, queued=0, conversations=1)
    with (
        scripted(["word " * 200 + END], limits=limits, draft=0) as (served, _),
        Runtime.connect(served.url) as rt,
    ):
        first = rt.session().stream("x", max_tokens=150)
        next(first)
        texts: list[str] = []
        thread = threading.Thread(
            target=lambda: texts.append(rt.session().generate("y", max_tokens=2).text)
        )
        thread.start()
        for _ in first:
            pass
        thread.join()
        assert len(texts) == 1
        assert "word".startswith(texts[0])


def test_histories_of_local_sessions() -> None:
    bad = "<tool_call>\n<function=fly>\n</function>\n</tool_call>"
    local = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "Ok.\n" + CALL + bad + CALL},
        {"role": "tool", "content": "one", "name": "dim"},
        {"role": "tool", "content": "two", "name": "dim"},
        {"role": "tool", "content": "what?"},
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": "y", "name": "me"},
    ]
    made = to_openai(local, [DIM])
    assert [m["role"] for m in made] == [m["role"] for m in local]
    assert made[1]["content"] == "Ok."
    calls = made[1]["tool_calls"]
    assert [c["function"]["name"] for c in calls] == ["dim", "unreadable", "dim"]
    assert calls[0]["function"]["arguments"] == '{"by": 3}'
    assert [m.get("tool_call_id") for m in made[2:5]] == [
        calls[0]["id"],
        calls[2]["id"],
        calls[1]["id"],
    ]
    assert made[-1] == local[-1]
    assert to_openai(made, [DIM]) == made


def test_the_built_in_model_on_another_machine() -> None:
    """The README's agent, whose model is served: the same calls as on this device."""
    done: list[tuple[Any, ...]] = []

    def set_guest_wifi(
        state: Literal["on", "off"],
        duration: int | None = None,
        unit: Literal["seconds", "minutes", "hours"] | None = None,
    ) -> None:
        """Switch guest wifi"""
        done.append((state, duration, unit))

    def reboot_router() -> None:
        """Restart the router"""

    with serving(Runtime.open("mimo-nano")) as served, Runtime.connect(served.url) as rt:
        agent = rt.agent([set_guest_wifi, reboot_router], enable_thinking=False)
        result = agent.run("turn on guest wifi for two hours", max_tokens=96)
        assert done == [("on", 2, "hours")]
        assert (result.text, result.finish_reason) == ("Done.", "stop")
        pieces: list[Piece] = list(
            rt.session(tools=DEMO_TOOLS, enable_thinking=False).stream("把客厅的灯调暗一点")
        )
        want = served.runtime.session(tools=DEMO_TOOLS, enable_thinking=False).generate(
            "把客厅的灯调暗一点"
        )
        assert tuple(c for p in pieces for c in p.tool_calls) == want.tool_calls
        assert want.tool_calls


@pytest.mark.parametrize(
    ("count", "rss"), [(60, 8 * MIB), pytest.param(4000, 12 * MIB, marks=pytest.mark.slow)]
)
def test_a_soak_of_cancellations(count: int, rss: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given up in the queue, while the prompt is read, inside the answer, by cancel and by leaving:
    neither side keeps anything."""
    # asyncio remarks on every client that left, and pytest would keep the remarks in memory.
    monkeypatch.setattr(logging.getLogger("asyncio"), "level", logging.ERROR)
    limits = Limits(concurrent=2, queued=50, conversations=4)
    with (
        scripted(["word " * 400], limits=limits, draft=0) as (served, _),
        Runtime.connect(served.url) as rt,
    ):
        began = time.perf_counter()
        for _ in rt.session().stream("question", max_tokens=1):
            pass
        # Four at a time: a slow machine has heard of none of them after 30 ms.
        longest_s = max(0.03, 4 * (time.perf_counter() - began))

        def one(number: int) -> None:
            rng = random.Random(number)
            session = rt.session()
            timer = threading.Timer(rng.random() * longest_s, session.cancel)
            timer.start()
            for n, _ in enumerate(session.stream(f"question {number % 7}", max_tokens=None)):
                if number % 3 == 0 and n > number % 50:
                    session.stop()
                    break
            timer.cancel()
            timer.join()
            reply = session.last_reply
            assert reply is None or reply.finish_reason in ("cancelled", "length")

        def batch(first: int, size: int) -> None:
            errors: list[BaseException] = []

            def some(start: int) -> None:
                try:
                    for number in range(start, first + size, 4):
                        one(number)
                except BaseException as error:
                    errors.append(error)

            threads = [threading.Thread(target=some, args=(first + n,)) for n in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not errors
            served.settled()

        batch(0, 60)
        before = held()
        batch(60, count)
        # Kept connections have two ends here, and pools of threads grow to their size.
        until(lambda: held().files <= before.files + 8 and held().threads <= before.threads + 8)
        after = held()
        assert after.rss <= before.rss + rss, (before, after)
        assert served.metric("abandoned_total") > count / 4
