"""Checkpoint sources: local folders first, then the Hub, always a typed error."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from checkpoint_factory import write_checkpoint

from mimo_edge.errors import BackendError, CheckpointError
from mimo_edge.export.hub import resolve


class FakeHub(ModuleType):
    """huggingface_hub with a recording snapshot_download."""

    def __init__(self, result: Path | Exception) -> None:
        super().__init__("huggingface_hub")
        self.result = result
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.calls.append((repo_id, options))
        if isinstance(self.result, Exception):
            raise self.result
        return str(self.result)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # makes the import fail
    monkeypatch.chdir(tmp_path)


def use(monkeypatch: pytest.MonkeyPatch, result: Path | Exception) -> FakeHub:
    hub = FakeHub(result)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return hub


@pytest.mark.usefixtures("no_hub")
def test_a_folder_needs_no_hub(tmp_path: Path) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve(tmp_path / "owner") == tmp_path / "owner"
    assert resolve("owner/name") == Path("owner/name")  # looks like a Hub id, is a folder


@pytest.mark.usefixtures("no_hub")
def test_missing_extra_says_what_to_install() -> None:
    with pytest.raises(BackendError, match=r"pip install 'mimo-edge\[hub\]'"):
        resolve("XiaomiMiMo/MiMo-V2-Flash")


@pytest.mark.parametrize(
    "source", ["nowhere", "/no/such/folder", "a/b/c", "../x", "./x/y", "", "o/n@", "-o/n", "o/../n"]
)
def test_what_is_neither(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = use(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    if source == "":  # Path("") is the current folder
        assert resolve(source) == Path(".")
    else:
        with pytest.raises(CheckpointError, match="no folder"):
            resolve(source)
    assert not hub.calls


def test_a_path_is_never_a_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = use(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no folder"):
        resolve(Path("owner/name"))
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(tmp_path / "model.gguf")
    assert not hub.calls


def test_downloads_a_snapshot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = use(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert resolve("XiaomiMiMo/MiMo-V2-Flash") == tmp_path
    assert resolve("XiaomiMiMo/MiMo-V2.5@refs/pr/3") == tmp_path
    assert [call[0] for call in hub.calls] == ["XiaomiMiMo/MiMo-V2-Flash", "XiaomiMiMo/MiMo-V2.5"]
    assert [call[1]["revision"] for call in hub.calls] == [None, "refs/pr/3"]
    allowed = hub.calls[0][1]["allow_patterns"]
    assert "*.safetensors" in allowed
    assert not any(pattern.endswith(".py") for pattern in allowed)
    assert hub.calls[0][1]["ignore_patterns"] == ["*/*"]


@pytest.mark.parametrize("error", [OSError("no network\nat all"), ValueError("bad id"), KeyError()])
def test_failed_download_is_typed(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, error)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"downloading it from the Hub failed: \w"):
        resolve("owner/name")


def test_the_real_client_takes_our_arguments(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Offline, against the installed huggingface_hub: a snapshot that is in its cache."""
    hub = pytest.importorskip("huggingface_hub")
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    refs = tmp_path / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    real = hub.snapshot_download

    def offline(repo_id: str, **options: Any) -> str:
        return str(real(repo_id, cache_dir=tmp_path, local_files_only=True, **options))

    monkeypatch.setattr(hub, "snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name").samefile(snapshot)
    with pytest.raises(
        CheckpointError, match="no folder owner/other, and downloading it from the Hub failed"
    ):
        resolve("owner/other")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubHandler(BaseHTTPRequestHandler):
    """As much of the Hub as a snapshot takes: what is in a repository, and its files."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/owner/name"):
            files = sorted(p for p in self.folder.rglob("*") if p.is_file())
            names = [p.relative_to(self.folder).as_posix() for p in files]
            answer: Any = [
                {"type": "file", "path": n, "size": f.stat().st_size, "oid": "0" * 40}
                for n, f in zip(names, files, strict=True)
            ]
            if "/tree/" not in path:
                listed = [{"rfilename": n} for n in names]
                answer = {"id": "owner/name", "sha": COMMIT, "siblings": listed}
            self.reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
            return
        name = path.removeprefix(f"/owner/name/resolve/{COMMIT}/")
        if name == path or not (self.folder / name).is_file():
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        self.asked.append(name)
        body = (self.folder / name).read_bytes()
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        self.reply(200, body, {"ETag": etag, "X-Repo-Commit": COMMIT})

    def reply(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """No log."""


def test_exports_from_a_hub(tmp_path: Path) -> None:
    """The whole way with the real client, from a server of our own."""
    pytest.importorskip("huggingface_hub")
    folder, _ = write_checkpoint(tmp_path / "repository", "flash", tokenizer=True)
    (folder / "modeling_mimo.py").write_text("raise SystemExit('remote code ran')")
    (folder / "audio_tokenizer").mkdir()
    (folder / "audio_tokenizer" / "model.safetensors").write_bytes(b"not for a text model")
    asked: list[str] = []
    handler = type("Handler", (HubHandler,), {"folder": folder, "asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            **{k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")},
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [sys.executable, "-m", "mimo_edge", "export", "owner/name", "out"]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("owner/name -> out: ")
        assert {n for n in asked if n.endswith(".safetensors")} == {
            p.name for p in folder.glob("*.safetensors")
        }
        assert not [n for n in asked if n.endswith(".py") or "/" in n]
        missing = [*command[:-2], "owner/other", "other"]
        done = subprocess.run(
            missing, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        server.shutdown()
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "no folder owner/other, and downloading it from the Hub failed" in done.stderr
