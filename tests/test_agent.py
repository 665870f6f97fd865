"""The agent loop: tools are called, what goes wrong is told to the model, limits hold."""

from __future__ import annotations

import json
import threading
import time
from typing import Any, Literal

import pytest
from scripted import END, runtime

from mimo_edge.agent import Step
from mimo_edge.api import Runtime
from mimo_edge.errors import UsageError
from mimo_edge.tool_calls import Malformed, ToolCall


def call(name: str = "dim", **arguments: Any) -> str:
    lines = "".join(f"<parameter={k}>{v}</parameter>\n" for k, v in arguments.items())
    return f"<tool_call>\n<function={name}>\n{lines}</function>\n</tool_call>"


class Lamp:
    def __init__(self) -> None:
        self.calls: list[int] = []

    def dim(self, by: int) -> str:
        """Dim the lamp."""
        self.calls.append(by)
        if by > 100:
            raise ValueError("too dark")
        return f"dimmed by {by}"

    def state(self) -> dict[str, int]:
        """Read the lamp."""
        return {"calls": len(self.calls)}

    def forget(self) -> None:
        self.calls.clear()


def contents(agent: Any) -> list[str]:
    return [m["content"] for m in agent.session.messages if m["role"] == "tool"]


def test_calls_are_made_and_their_results_read() -> None:
    lamp = Lamp()
    two = "Ok. " + call(by=3) + "\n" + call("state")
    rt, _ = runtime([two + END, call("forget") + END, "All done." + END])
    heard: list[Step] = []
    with rt:
        agent = rt.agent([lamp.dim, lamp.state, lamp.forget], on_step=heard.append)
        result = agent.run("dim it")
    assert (result.text, result.finish_reason) == ("All done.", "stop")
    assert [s.failed for s in result.steps] == [False] * 3
    assert contents(agent) == ["dimmed by 3", '{"calls": 1}', '{"status": "ok"}']
    assert lamp.calls == []
    assert tuple(heard) == result.steps
    roles = [m["role"] for m in agent.session.messages]
    assert roles == ["user", "assistant", "tool", "tool", "assistant", "tool", "assistant"]


def test_what_goes_wrong_is_told_to_the_model(caplog: pytest.LogCaptureFixture) -> None:
    lamp = Lamp()
    rt, _ = runtime(
        [call(by=200) + END, call(by="much") + END, call("fly") + END, call(by=5) + END, "Ok" + END]
    )
    with rt:
        agent = rt.agent([lamp.dim], constrain_tools=False)
        result = agent.run("dim it")
    assert result.text == "Ok"
    assert lamp.calls == [200, 5]
    assert [s.failed for s in result.steps] == [True, True, True, False]
    reasons = [json.loads(text)["reason"] for text in contents(agent)[:3]]
    assert reasons[0] == "ValueError: too dark"
    assert reasons[1] == "by = 'much' is not of type integer"
    assert "fly" in reasons[2]
    assert "tool dim failed" in caplog.text


def test_results_without_a_json_form_are_failures_too() -> None:
    def odd() -> Any:
        return {1, 2}

    rt, _ = runtime([call("odd") + END, "Ok" + END])
    with rt:
        (step,) = rt.agent([odd]).run("x").steps
    assert step.failed
    assert "TypeError" in step.result


def test_calls_a_model_cannot_get_wrong() -> None:
    """With its calls held to their grammar, it names what there is, with values of their type."""
    lamp = Lamp()
    rt, _ = runtime([call("fly", by="much") + END, "Ok" + END])
    with rt:
        result = rt.agent([lamp.dim]).run("dim it", max_tokens=60)
    assert all(step.call.name == "dim" for step in result.steps if isinstance(step.call, ToolCall))
    assert not any(isinstance(step.call, Malformed) for step in result.steps) or (
        result.finish_reason == "length"
    )


def test_a_forced_first_call() -> None:
    lamp = Lamp()
    rt, _ = runtime([call("state") + END, "Ok" + END])
    with rt:
        agent = rt.agent([lamp.dim, lamp.state])
        result = agent.run("how is it?", tool_choice="state")
        assert (result.text, result.finish_reason) == ("Ok", "stop")
        assert [step.result for step in result.steps] == ['{"calls": 0}']


def test_the_limit_on_steps() -> None:
    lamp = Lamp()
    rt, _ = runtime([call(by=1) + END])
    with rt:
        result = rt.agent([lamp.dim], max_steps=3).run("dim it")
    assert (result.finish_reason, len(result.steps), lamp.calls) == ("steps", 3, [1, 1, 1])


def test_the_limit_on_time_while_tools_run() -> None:
    def wait() -> None:
        time.sleep(0.05)

    rt, _ = runtime([call("wait") + END])
    with rt:
        result = rt.agent([wait], max_steps=10_000).run("x", timeout_s=0.3)
    assert result.finish_reason == "time"
    assert 1 <= len(result.steps) <= 6


def test_the_limit_on_time_while_the_model_talks() -> None:
    rt, backend = runtime(["a long story " * 200 + END])
    whole = backend.next_logits

    def slow(tokens: list[int]) -> Any:
        time.sleep(0.002)
        return whole(tokens)

    backend.next_logits = slow  # type: ignore[method-assign]
    with rt:
        agent = rt.agent([])
        result = agent.run("x", timeout_s=0.3, max_tokens=None)
        assert result.finish_reason == "time"
        assert result.reply is not None
        assert 0 < len(result.reply.token_ids) < 500
        # and the session is usable
        assert agent.run("y", max_tokens=2).finish_reason == "length"


def test_cancel_from_another_thread() -> None:
    started = threading.Event()

    def wait() -> None:
        started.set()

    rt, _ = runtime([call("wait") + END, "a long story " * 400 + END])
    with rt:
        agent = rt.agent([wait])

        def stop() -> None:
            started.wait()
            while agent.session.last_reply is None or not agent.session.messages:
                time.sleep(0.001)
            time.sleep(0.02)
            agent.cancel()

        thread = threading.Thread(target=stop)
        thread.start()
        result = agent.run("x", max_tokens=None)
        thread.join()
    assert result.finish_reason in ("cancelled", "stop")
    assert len(result.steps) == 1


def test_options_reach_the_model_and_errors_the_caller() -> None:
    rt, _ = runtime(["a long story" + END])
    with rt:
        assert rt.agent([]).run("x", max_tokens=2).finish_reason == "length"
        with pytest.raises(UsageError, match="timeout_s"):
            rt.agent([]).run("x", timeout_s=0)
        with pytest.raises(UsageError, match="max_steps"):
            rt.agent([], max_steps=0)
        with pytest.raises(UsageError, match="two tools"):
            rt.agent([Lamp().dim, Lamp().dim])
        with pytest.raises(UsageError, match="temperature"):
            rt.agent([]).run("x", temperature=-1)


def test_mimo_nano_as_an_agent() -> None:
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

    with Runtime.open("mimo-nano") as rt:
        agent = rt.agent([set_guest_wifi, reboot_router], enable_thinking=False)
        result = agent.run("turn on guest wifi for two hours", max_tokens=96)
    assert done == [("on", 2, "hours")]
    assert (result.text, result.finish_reason) == ("Done.", "stop")
