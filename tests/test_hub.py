"""Checkpoint sources: local folders first, then the Hub, always a typed error."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

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
