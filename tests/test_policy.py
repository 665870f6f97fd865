"""Local, remote, or whichever can: what a policy chooses, and a conversation that moves."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fake_server import Visit, delta, faking
from scripted import END, runtime
from serving import Served, serving

from mimo_edge.errors import (
    ContextLengthError,
    DeviceError,
    RemoteBrokenError,
    RemoteConnectError,
    UsageError,
)
from mimo_edge.remote.address import Connection
from mimo_edge.remote.policy import Need, Policy, Speed, choose
from mimo_edge.remote.routed import RoutedRuntime
from mimo_edge.remote.runtime import RemoteRuntime

FAST = Speed(prefill_tps=100, decode_tps=10, answer_tokens=20)


@pytest.mark.parametrize(
    ("where", "context", "need", "speed", "place"),
    [
        ("local-first", 100, Need(40, 40, 50), FAST, "local"),
        ("local-first", 100, Need(40, 40, 61), FAST, "remote"),
        ("local-first", 100, Need(101, 5), FAST, "remote"),
        ("local-first", None, Need(0, 0), FAST, "remote"),
        # 40 tokens at 100 a second and 20 at 10 a second: 2.4 s
        ("local-first", 100, Need(40, 40, 50, 2.5), FAST, "local"),
        ("local-first", 100, Need(40, 40, 50, 2.3), FAST, "remote"),
        ("local-first", 100, Need(40, 0, 50, 2.1), FAST, "local"),
        ("local-first", 100, Need(40, 40, 5, 1.0), FAST, "local"),
        ("local-first", 100, Need(40, 40, 50, 0.01), Speed(), "local"),  # nothing known yet
        ("local-only", 100, Need(101, 101, 50, 0.01), FAST, "local"),
        ("remote-first", 100, Need(1, 1), FAST, "remote"),
        ("remote-only", None, Need(0, 0), FAST, "remote"),
    ],
)
def test_choices(where: Any, context: int | None, need: Need, speed: Speed, place: str) -> None:
    assert choose(where, context, need, speed).place == place


@pytest.mark.parametrize(
    "options",
    [
        {"where": "moon", "bundle": "x", "url": "http://h"},
        {"where": "local-first", "bundle": "x"},
        {"where": "local-first", "url": "http://h"},
        {"where": "local-only", "url": "http://h"},
        {"where": "remote-only", "bundle": "x"},
    ],
)
def test_no_policies(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Policy(**options)


def test_a_policy_does_not_show_its_key() -> None:
    assert "s3cret" not in repr(Policy("remote-only", url="http://h", api_key="s3cret"))


CALL = "<tool_call>\n<function=dim>\n<parameter=by>3</parameter>\n</function>\n</tool_call>"


def here(n: int) -> str:
    return f"<think></think>here {n}" + END


def there(n: int) -> str:
    return f"<think></think>there {n}" + END


@contextmanager
def both(
    where: Any,
    local: list[str] | None = None,
    remote: list[str] | None = None,
    context: int = 2000,
) -> Iterator[tuple[RoutedRuntime, Served]]:
    """A policy's runtime over two scripted models; the first answers "here N"."""
    policy = Policy(where, bundle="-", url="http://-", connection=Connection(retries=0))
    mine, _ = runtime(local or [here(n) for n in range(9)], context=context)
    theirs, _ = runtime(remote or [there(n) for n in range(9)])
    with serving(theirs) as served:
        client = RemoteRuntime(served.url, connection=policy.connection)
        with RoutedRuntime(policy, mine, client) as rt:
            yield rt, served


CONTEXT = 260


def test_a_conversation_that_outgrows_the_device() -> None:
    with both("local-first", context=CONTEXT) as (rt, _):
        session = rt.session()
        said = [session.generate("word " * 12, max_tokens=9).text for _ in range(5)]
        assert session.choice is not None
        assert str(CONTEXT) in session.choice.why
        # Both count the turns, whoever answered them: the whole conversation moved.
        assert said[:2] == ["here 0", "here 1"]
        assert said[-1] == "there 4"
        assert [t.split()[1] for t in said] == ["0", "1", "2", "3", "4"]
        stats = rt.stats()
        assert stats["answers"] == {
            "local": sum(t.startswith("here") for t in said),
            "remote": sum(t.startswith("there") for t in said),
        }


def test_a_deadline_moves_one_answer_and_the_next_comes_back() -> None:
    with both("local-first") as (rt, _):
        session = rt.session()
        assert session.generate("a").text == "here 0"
        rt.local._totals.decode_ms += 1e9  # type: ignore[union-attr]  # as if it had been slow
        moved = session.generate("b", timeout_s=30)
        assert moved.text == "there 1"
        assert session.choice is not None
        assert "deadline is 30 s" in session.choice.why
        back = session.generate("c")
        assert back.text == "here 2"
        # What the device had processed before the turn elsewhere is still of use.
        assert back.stats.reused_tokens > 0


def test_calls_move_too() -> None:
    first = "<think></think>Ok.\n" + CALL + END
    tools = [
        {
            "name": "dim",
            "parameters": {"type": "object", "properties": {"by": {"type": "integer"}}},
        }
    ]
    with both("local-first", [first, here(1), here(2)], [there(0), there(1), there(2)]) as (rt, _):
        session = rt.session(tools=tools)
        assert session.generate("dim").tool_calls[0].arguments == {"by": 3}
        session.tool_result("dimmed", "dim")
        rt.local._totals.decode_ms += 1e9  # type: ignore[union-attr]
        assert session.generate(timeout_s=30).text == "there 1"
        assert session.generate("and now").text == "here 2"
    with both("remote-first", [here(0), here(1)], [first, there(1)]) as (rt, served):
        session = rt.session(tools=tools)
        assert session.generate("dim").tool_calls[0].arguments == {"by": 3}
        session.tool_result("dimmed", "dim")
        served.server.should_exit = True
        served.runtime.close()
        assert session.generate().text == "here 1"


def test_agents_follow_the_policy() -> None:
    def dim(by: int) -> str:
        """Dim the light."""
        return f"by {by}"

    first = "<think></think>" + CALL + END
    with both("remote-first", None, [first, there(1)]) as (rt, _):
        result = rt.agent([dim]).run("dim it")
        assert (result.text, len(result.steps)) == ("there 1", 1)
        assert rt.stats()["answers"]["remote"] == 2


def test_a_server_out_of_reach(caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy(
        "remote-first", bundle="-", url="http://127.0.0.1:9", connection=Connection(retries=0)
    )
    mine, _ = runtime([here(0), here(1)])
    with RoutedRuntime(
        policy, mine, RemoteRuntime(policy.url or "", "x", connection=policy.connection)
    ) as rt:
        session = rt.session()
        with caplog.at_level(logging.WARNING):
            assert session.generate("x").text == "here 0"
        assert session.choice is not None
        assert "no connection" in session.choice.why
        assert "answered here" in caplog.text
        # What does not fit here is an error, and the conversation as it was.
        before = list(session.messages)
        with pytest.raises(RemoteConnectError):
            session.generate("word " * 3000)
        assert session.messages == before
        assert session.generate("y").text == "here 1"


def test_local_only_never_asks() -> None:
    with both("local-only", context=100) as (rt, served):
        assert rt.session().generate("x", timeout_s=60).text == "here 0"
        with pytest.raises(ContextLengthError):
            rt.session().generate("word " * 200)
        assert served.runtime.stats()["generations"] == 0


def test_what_was_said_is_not_taken_back() -> None:
    def breaks(visit: Visit) -> None:
        visit.events(delta(content="Hel"), done=False)

    with faking(breaks) as server:
        policy = Policy("remote-first", bundle="-", url=server.url)
        mine, _ = runtime([here(0)])
        with RoutedRuntime(policy, mine, RemoteRuntime(server.url, "fake")) as rt:
            session = rt.session()
            with pytest.raises(RemoteBrokenError):
                session.generate("x")
            assert session.last_reply is not None
            assert session.last_reply.text == "Hel"
            assert session.messages == []


def test_a_local_deadline_ends_the_answer() -> None:
    with both("local-only", ["<think></think>" + "word " * 280]) as (rt, _):
        reply = rt.session().generate("x", timeout_s=1e-3, max_tokens=None)
        assert reply.finish_reason == "deadline"


def test_leaving_a_stream_keeps_what_was_said() -> None:
    with both("local-first", ["<think></think>" + "word " * 100, here(1)]) as (rt, _):
        session = rt.session()
        for piece in session.stream("x"):
            if piece.text:
                break
        session.stop()
        assert [m["role"] for m in session.messages] == ["user", "assistant"]
        assert session.generate("y").text == "here 1"


def test_opening_a_model_that_does_not_fit() -> None:
    """The real door: a bound too small for mimo-nano leaves the server to answer."""
    theirs, _ = runtime([there(0)])
    with serving(theirs) as served:
        policy = Policy("local-first", bundle="mimo-nano", url=served.url, local={"ram": "20MiB"})
        with policy.open() as rt:
            assert rt.local is None
            assert rt.session().generate("x").text == "there 0"
            assert rt.name == "scripted"
    with pytest.raises(DeviceError):
        Policy("local-only", bundle="mimo-nano", local={"ram": "20MiB"}).open()


def test_opening_one_that_fits() -> None:
    with Policy("local-first", bundle="mimo-nano", url="http://127.0.0.1:9").open() as rt:
        session = rt.session(enable_thinking=False)
        assert session.generate("hello", max_tokens=4).token_ids
        assert rt.name == "mimo-nano"
