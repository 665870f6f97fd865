"""`mimo-edge serve`: where it listens, what it refuses before a model is loaded, how it ends."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from serving import until
from typer.testing import CliRunner

from mimo_edge.cli.main import app
from mimo_edge.errors import UsageError
from mimo_edge.serve.limits import Limits
from mimo_edge.serve.server import bind, check_exposure, url_of


def failed(*arguments: str) -> str:
    found = CliRunner().invoke(app, ["serve", *arguments])
    assert found.exit_code in (1, 2), found.output
    return found.output


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.8.7", "::1"])
def test_loopback_needs_no_key(address: str) -> None:
    assert check_exposure(address, None, False)
    assert check_exposure(address, "key", False)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.1.5", "fe80::1%eth0"])
def test_other_addresses_need_a_key(address: str) -> None:
    with pytest.raises(UsageError, match="no API key is asked"):
        check_exposure(address, None, False)
    assert not check_exposure(address, "key", False)
    assert not check_exposure(address, None, True)


@pytest.mark.parametrize("key", ["", "  ", "schlüssel", "two\nlines"])
def test_keys_nobody_can_send(key: str) -> None:
    with pytest.raises(UsageError, match="API key"):
        check_exposure("127.0.0.1", key, False)


def test_binding() -> None:
    bound, local = bind("localhost", 0, None, False)
    with bound:
        assert local
        port = bound.getsockname()[1]
        assert url_of(bound).endswith(f":{port}")
        with pytest.raises(UsageError, match=f"port {port}"):
            bind(bound.getsockname()[0], port, None, False)
    for host, wrong in (("no such host", 0), ("127.0.0.1", 70000)):
        with pytest.raises(UsageError):
            bind(host, wrong, None, False)


def test_refused_before_a_model_is_opened(tmp_path: Path) -> None:
    missing = str(tmp_path / "no bundle")
    assert "--no-auth" in failed(missing, "--host", "0.0.0.0", "--port", "0")
    assert "cannot read the API key" in failed(missing, "--api-key-file", str(tmp_path / "key"))
    (tmp_path / "key").write_text("secret\n")
    both = ("--api-key-file", str(tmp_path / "key"), "--api-key", "x")
    assert "one of them" in failed(missing, *both)
    assert "one of them" in failed(missing, "--api-key", "x", "--no-auth")


def test_a_missing_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['uvicorn'] = None; sys.argv = ['mimo-edge', 'serve'];"
        "from mimo_edge.cli.main import app; app()"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 1
    assert shown.stderr == "error: the server needs uvicorn: pip install 'mimo-edge[serve]'\n"


@pytest.mark.parametrize(
    "wrong",
    [
        {"concurrent": 0},
        {"queued": -1},
        {"body_bytes": 0},
        {"prompt_tokens": 0},
        {"queue_wait_s": 0.0},
        {"keep_alive_s": float("nan")},
        {"concurrent": 9},
    ],
)
def test_limits(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        Limits(**wrong)


def test_from_start_to_end() -> None:
    command = [sys.executable, "-m", "mimo_edge", "serve", "--port", "0", "--json"]
    process = subprocess.Popen(
        [*command, "--alias", "nano"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        shown = json.loads(process.stdout.readline())
        assert shown["model"] == "mimo-nano"
        port = int(shown["url"].removesuffix("/v1").rpartition(":")[2])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/v1/models")
        names = [model["id"] for model in json.load(connection.getresponse())["data"]]
        connection.close()
        assert names == ["mimo-nano", "nano"]
        with socket.create_connection(("127.0.0.1", port)):
            process.send_signal(signal.SIGINT)
            until(lambda: process.poll() is not None)
        _, remarks = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 130
    assert "context 4096" in remarks
    assert "Traceback" not in remarks
