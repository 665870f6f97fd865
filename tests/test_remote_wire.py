"""Everything a network does wrong ends in a typed error, and what arrived is kept."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx", reason="needs the extra remote")

from fake_server import Visit, delta, faking, hello
from hypothesis import given
from hypothesis import strategies as st

from mimo_edge.errors import (
    ContextLengthError,
    MimoEdgeError,
    RemoteBrokenError,
    RemoteConnectError,
    RemoteError,
    RemoteProtocolError,
    RemoteStatusError,
    RemoteTimeoutError,
    UsageError,
)
from mimo_edge.remote.address import Connection, base_url
from mimo_edge.remote.chunks import ChunkReader
from mimo_edge.remote.events import EventReader
from mimo_edge.remote.runtime import RemoteRuntime

CERTIFICATE = Path(__file__).parent / "golden" / "localhost.pem"
QUICK = Connection(connect_s=5, silence_s=0.4, retries=0, retry_wait_s=1)


def opened(url: str, connection: Connection = QUICK, **options: Any) -> RemoteRuntime:
    return RemoteRuntime(url, "fake", connection=connection, **options)


# --- what fails before anything of the answer came --------------------------------------------


def error(status: str, message: str, **extra: Any) -> Callable[[Visit], None]:
    body = json.dumps({"error": {"message": message, **extra}}).encode()
    return lambda visit: visit.whole(status, body)


def page(visit: Visit) -> None:
    visit.whole("200 OK", b"<html>welcome to the hotel</html>", content_type="text/html")


def garbage(visit: Visit) -> None:
    visit.send(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")


def cut_headers(visit: Visit) -> None:
    visit.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/ev")


def redirect(visit: Visit) -> None:
    visit.head("307 Temporary Redirect", location="http://elsewhere/v1", content_length="0")


def no_json(visit: Visit) -> None:
    visit.events("<think>", done=False)


def long_event(visit: Visit) -> None:
    visit.head(content_type="text/event-stream", connection="close")
    visit.send(b"data: " + b"x" * (2 << 20))


def no_utf8(visit: Visit) -> None:
    visit.head(content_type="text/event-stream", connection="close")
    visit.send(b"data: \xff\xfe\n\n")


def no_gzip(visit: Visit) -> None:
    visit.head(content_type="text/event-stream", content_encoding="gzip", connection="close")
    visit.send(b"data: {}\n\n")


def many_errors(visit: Visit) -> None:
    visit.head("500 Internal Server Error", content_type="text/plain", connection="close")
    for _ in range(40):
        visit.send(b"no " * 5000)


FAULTS: list[tuple[str, Callable[[Visit], None], type[MimoEdgeError], str]] = [
    ("reset", Visit.reset, RemoteBrokenError, "broke|closed"),
    ("hangs up", lambda visit: None, RemoteBrokenError, "closed the connection"),
    ("cut headers", cut_headers, RemoteBrokenError, "closed the connection"),
    ("silent", Visit.wait, RemoteTimeoutError, "silent for 0.4 seconds"),
    ("no http", garbage, RemoteProtocolError, "does not speak HTTP"),
    ("web page", page, RemoteProtocolError, "text/html"),
    ("redirect", redirect, RemoteStatusError, "elsewhere"),
    ("no json", no_json, RemoteProtocolError, "no part of an answer"),
    ("long event", long_event, RemoteProtocolError, "more than 1048576 bytes"),
    ("no utf-8", no_utf8, RemoteProtocolError, "not UTF-8"),
    ("no gzip", no_gzip, RemoteProtocolError, "decompress"),
    ("400", error("400 Bad Request", "no such field"), RemoteStatusError, "400: no such field"),
    ("401", error("401 Unauthorized", "who?"), RemoteStatusError, "api_key"),
    ("404", lambda v: v.whole("404 Not Found", b""), RemoteStatusError, "/v1"),
    ("500", many_errors, RemoteStatusError, "500: no no"),
    (
        "too long",
        error("400 Bad Request", "too long", code="context_length_exceeded"),
        ContextLengthError,
        "too long",
    ),
    ("empty stream", lambda v: v.events(done=False), RemoteBrokenError, "ended before"),
    ("only done", lambda v: v.events(), RemoteBrokenError, "ended before"),
    ("error event", lambda v: v.events({"error": {"message": "oom"}}), RemoteStatusError, "oom"),
    ("a list", lambda v: v.events([1]), RemoteProtocolError, "no part"),
    ("no choices", lambda v: v.events({"choices": 5}), RemoteProtocolError, "no part"),
    ("bad delta", lambda v: v.events(delta(content=5)), RemoteProtocolError, "no part"),
    ("bad call", lambda v: v.events(delta(tool_calls=[7])), RemoteProtocolError, "no part"),
]


@pytest.mark.parametrize(
    ("deed", "kind", "text"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS]
)
def test_faults_are_typed_and_change_nothing(
    deed: Callable[[Visit], None], kind: type[MimoEdgeError], text: str
) -> None:
    with faking(deed, hello) as server, opened(server.url) as rt:
        session = rt.session(system="be brief")
        before = list(session.messages)
        with pytest.raises(kind, match=text) as caught:
            session.generate("hi")
        assert isinstance(caught.value, (RemoteError, ContextLengthError))
        assert session.messages == before
        assert session.last_reply is None
        # and the same prompt can be given again
        assert session.generate("hi").text == "Hello there."


def test_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with (
        opened(f"http://127.0.0.1:{port}") as rt,
        pytest.raises(RemoteConnectError, match="no connection"),
    ):
        rt.session().generate("hi")


def test_an_unknown_name() -> None:
    with (
        opened("http://no-such-host.invalid") as rt,
        pytest.raises(RemoteConnectError, match="no-such-host"),
    ):
        rt.session().generate("hi")


def test_tls_where_there_is_none() -> None:
    with faking(garbage, first=b"220 mail ready\r\n") as server:
        url = server.url.replace("http:", "https:")
        with opened(url) as rt, pytest.raises(RemoteConnectError, match="TLS"):
            rt.session().generate("hi")


def test_certificates() -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(CERTIFICATE)
    with faking(hello, tls=tls) as server:
        again = Connection(retries=3)
        with opened(server.url, again) as rt, pytest.raises(RemoteConnectError, match="ca_file"):
            rt.session().generate("hi")
        assert server.seen == []  # nothing was said to a server that is not trusted
        trusting = Connection(ca_file=CERTIFICATE)
        with opened(server.url, trusting) as rt:
            assert rt.session().generate("hi").text == "Hello there."


# --- other attempts ---------------------------------------------------------------------------


def busy(status: str, **headers: str) -> Callable[[Visit], None]:
    return lambda visit: visit.whole(status, b"{}", **headers)


@pytest.mark.parametrize(
    "deed",
    [
        Visit.reset,
        cut_headers,
        busy("503 Busy"),
        busy("502 Bad Gateway"),
        busy("429 Slow Down", retry_after="0"),
        busy("429 Slow Down", retry_after=formatdate(time.time() - 9, usegmt=True)),
    ],
    ids=range(6),
)
def test_another_attempt(deed: Callable[[Visit], None]) -> None:
    with faking(deed, deed, hello) as server, opened(server.url, Connection()) as rt:
        assert rt.session().generate("hi").text == "Hello there."
        first, *others = server.bodies()
        assert len(others) == 2
        assert others == [first, first]


def test_attempts_end() -> None:
    with faking(busy("503 Busy")) as server, opened(server.url, Connection(retries=1)) as rt:
        with pytest.raises(RemoteStatusError) as caught:
            rt.session().generate("hi")
        assert caught.value.status == 503
        assert server.visits == 2


@pytest.mark.parametrize(
    "deed",
    [
        error("400 Bad Request", "no"),
        error("500 Internal Server Error", "no"),
        Visit.wait,
        garbage,
        busy("429 Slow Down", retry_after="3600"),
    ],
    ids=range(5),
)
def test_no_other_attempt(deed: Callable[[Visit], None]) -> None:
    connection = Connection(silence_s=0.3, retries=3)
    with faking(deed) as server, opened(server.url, connection) as rt:
        with pytest.raises(RemoteError) as caught:
            rt.session().generate("hi")
        assert server.visits == 1
        if isinstance(caught.value, RemoteStatusError) and caught.value.status == 429:
            assert caught.value.retry_after_s == 3600


# --- what breaks inside an answer -------------------------------------------------------------


def broken(end: Callable[[Visit], None]) -> Callable[[Visit], None]:
    def deed(visit: Visit) -> None:
        visit.events(delta(content="Hello "), delta(content="th"), done=False)
        end(visit)

    return deed


def late_reset(visit: Visit) -> None:
    time.sleep(0.1)  # a reset throws away what the other side has not read
    visit.reset()


def chunk_cut(visit: Visit) -> None:
    visit.head(content_type="text/event-stream", transfer_encoding="chunked")
    for text in (delta(content="Hello "), delta(content="th")):
        data = f"data: {json.dumps(text)}\n\n".encode()
        visit.send(b"%x\r\n%s\r\n" % (len(data), data))
    visit.send(b"40\r\ndata: {")


@pytest.mark.parametrize(
    ("deed", "kind"),
    [
        (broken(lambda v: None), RemoteBrokenError),
        (broken(late_reset), RemoteBrokenError),
        (broken(lambda v: v.send(b'data: {"choi')), RemoteBrokenError),
        (broken(lambda v: v.event("[DONE]")), RemoteBrokenError),
        (broken(lambda v: v.event(delta("content_filter"))), RemoteBrokenError),
        (broken(lambda v: v.send(b"data: \xff\n\n")), RemoteProtocolError),
        (broken(lambda v: v.event({"error": {"message": "oom", "code": 500}})), RemoteStatusError),
        (broken(Visit.wait), RemoteTimeoutError),
        (chunk_cut, RemoteBrokenError),
    ],
    ids=range(9),
)
def test_what_arrived_is_kept(deed: Callable[[Visit], None], kind: type[MimoEdgeError]) -> None:
    connection = Connection(silence_s=0.4, retries=3)
    with faking(deed, hello) as server, opened(server.url, connection) as rt:
        session = rt.session()
        said: list[str] = []
        with pytest.raises(kind):
            said.extend(piece.text for piece in session.stream("hi"))
        assert "".join(said) == "Hello th"
        assert server.visits == 1  # an answer that was begun is not asked for again
        reply = session.last_reply
        assert reply is not None
        assert (reply.text, reply.finish_reason) == ("Hello th", "broken")
        assert session.messages == []
        assert session.generate("hi").text == "Hello there."


# --- giving up --------------------------------------------------------------------------------


@pytest.mark.parametrize("deed", [Visit.wait, broken(Visit.wait)], ids=["before", "inside"])
def test_cancel_from_another_thread(deed: Callable[[Visit], None]) -> None:
    with faking(deed) as server, opened(server.url, Connection()) as rt:
        session = rt.session()
        timer = threading.Timer(0.2, session.cancel)
        timer.start()
        reply = session.generate("hi")
        timer.join()
        assert reply.finish_reason == "cancelled"
        assert reply.text in ("", "Hello th")
        roles = [m["role"] for m in session.messages]
        assert roles == (["user", "assistant"] if reply.text else ["user"])


def test_cancel_while_waiting_for_another_attempt() -> None:
    with (
        faking(busy("503 Busy", retry_after="20")) as server,
        opened(server.url, Connection()) as rt,
    ):
        session = rt.session()
        timer = threading.Timer(0.2, session.cancel)
        timer.start()
        assert session.generate("hi").finish_reason == "cancelled"
        timer.join()


def test_the_deadline() -> None:
    with faking(broken(Visit.wait)) as server, opened(server.url, Connection()) as rt:
        reply = rt.session().generate("hi", timeout_s=0.3)
        assert (reply.text, reply.finish_reason) == ("Hello th", "deadline")


def test_leaving_a_stream_ends_the_request() -> None:
    def endless(visit: Visit) -> None:
        visit.events(*[delta(content="word ")] * 3, done=False)
        try:
            while not visit.over.wait(0.01):
                visit.event(delta(content="word "))
        except OSError:
            gone.set()

    gone = threading.Event()
    with faking(endless) as server, opened(server.url) as rt:
        session = rt.session()
        for _ in session.stream("hi"):
            break
        session.stop()
        assert gone.wait(20)
        assert session.last_reply is not None
        assert session.last_reply.finish_reason == "cancelled"


def test_closing_ends_what_runs() -> None:
    with faking(Visit.wait) as server:
        rt = opened(server.url, Connection())
        session = rt.session()
        timer = threading.Timer(0.2, rt.close)
        timer.start()
        with pytest.raises(UsageError, match="closed"):
            session.generate("hi")
        timer.join()
        rt.close()
        with pytest.raises(UsageError, match="closed"):
            session.stream("hi")


def test_a_slow_reader_holds_the_sender_back() -> None:
    """What is not taken stays in the network, not in our memory."""
    sent = 0

    def endless(visit: Visit) -> None:
        nonlocal sent
        visit.events(done=False)
        while not visit.over.is_set():
            visit.event(delta(content="x" * 10_000))
            sent += 10_000

    with faking(endless) as server, opened(server.url, Connection()) as rt:
        pieces = rt.session().stream("hi")
        next(pieces)
        before = -1
        while sent != before:  # it fills what the network holds, then it waits
            before = sent
            time.sleep(0.3)
        assert sent < 32 << 20
        pieces.close()  # type: ignore[attr-defined]


# --- addresses --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h/", "http://h/v1"),
        ("https://h/v1/", "https://h/v1"),
        ("http://[::1]:8080", "http://[::1]:8080/v1"),
        ("https://h/llm/api", "https://h/llm/api"),
    ],
)
def test_addresses(given: str, made: str) -> None:
    assert base_url(given) == made


@pytest.mark.parametrize(
    "url",
    ["h:80", "ftp://h", "http://", "http://u:p@h", "http://h:99999", "http://h?x=1", "http://[", 5],
)
def test_no_addresses(url: Any) -> None:
    with pytest.raises(UsageError):
        base_url(url)


@pytest.mark.parametrize(
    "options",
    [{"connect_s": 0}, {"silence_s": float("nan")}, {"retries": -1}, {"retries": True}],
)
def test_no_connections(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Connection(**options)


def test_bad_keys_and_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="API key"):
        RemoteRuntime("http://h", api_key="a\nb")
    with pytest.raises(UsageError, match="no certificates"):
        RemoteRuntime("http://h", connection=Connection(ca_file=tmp_path / "none.pem"))


# --- events and chunks ------------------------------------------------------------------------


ENDS = [b"\n", b"\r\n", b"\r"]
# A CR and an LF that come next to each other are one line end, not two.
PAIRS = [a + b for a in ENDS for b in ENDS if (a, b) != (b"\r", b"\n")]
lines = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=8)


@given(st.lists(st.tuples(lines, st.sampled_from(PAIRS)), max_size=5), st.data())
def test_events_cut_anywhere(sent: list[tuple[str, bytes]], data: st.DataObject) -> None:
    raw = b": hello\n\nevent: x\n\n"
    raw += b"".join(b"data: " + text.encode() + ends for text, ends in sent)
    reader = EventReader()
    found: list[str] = []
    while raw:
        size = data.draw(st.integers(1, len(raw)))
        found += reader.feed(raw[:size])
        raw = raw[size:]
    assert found == [text for text, _ in sent]


def test_event_lines_are_joined() -> None:
    assert list(EventReader().feed(b"data:a\ndata: b\nid: 5\n\ndata\n\n")) == ["a\nb", ""]


def call(index: int, name: str = "", arguments: str = "", **more: Any) -> dict[str, Any]:
    return {"index": index, "function": {"name": name, "arguments": arguments}, **more}


def test_calls_in_parts() -> None:
    tools = [{"name": "dim", "parameters": {}}]
    reader = ChunkReader(tools)
    parts = [
        reader.feed(json.dumps(delta(tool_calls=[one])))
        for one in (
            call(0, "dim", id="a"),
            call(0, arguments='{"by"'),
            call(0, arguments=": 3}"),
            call(1, "dim", '{"by": 9', id="b"),
            call(2, "fly"),
        )
    ]
    parts.append(reader.finish())
    found = [c.arguments for part in parts for c in part.tool_calls]
    assert found == [{"by": 3}]
    assert [m.why for part in parts for m in part.malformed] == [
        "its arguments are no JSON",
        "unknown function 'fly'",
    ]
    assert [m["id"] for m in reader.call_messages] == ["a", "b", "call_2"]
    for message in reader.call_messages:
        json.loads(message["function"]["arguments"])


KEYS = ["choices", "delta", "content", "tool_calls", "function", "name", "arguments", "index"]
KEYS += ["usage", "error", "finish_reason", "prompt_tokens", "completion_tokens"]
values = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(values)
def test_any_json_is_read_or_refused(value: Any) -> None:
    reader = ChunkReader([])
    try:
        reader.feed(json.dumps(value))
        reader.feed(json.dumps({"choices": [{"delta": value}]}))
        reader.finish()
    except RemoteError:
        pass
