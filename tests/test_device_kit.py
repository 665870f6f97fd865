"""The device kit's wheels and its installer, with small wheels in place of the real ones."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import platform
import re
import shutil
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from arm import kit as kit_tool
from arm.wheel import read_zip, write_wheel
from arm.wheels import device_wheel

FILES = Path(kit_tool.__file__).with_name("kit_files")
METADATA = b"Metadata-Version: 2.4\nName: small\nVersion: 1.0\nLicense-Expression: MIT\n"


def installer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kit_install", FILES / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_wheel(folder: Path) -> Path:
    files = {
        "small/__init__.py": b"ANSWER = 42\n",
        "small/tests/test_it.py": b"assert False\n",
        "small-1.0.dist-info/METADATA": METADATA,
    }
    return write_wheel(folder, "py3-none-any", files)


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An installer whose kit holds one wheel and suits this machine."""
    folder = tmp_path / "kit"
    (folder / "wheels").mkdir(parents=True)
    wheel = small_wheel(folder / "wheels")
    data = wheel.read_bytes()
    manifest = {
        "version": "1.0",
        "python": "{}.{}".format(*sys.version_info),
        "machine": platform.machine(),
        "libc": {"name": "glibc", "version": "2.17"},
        "wheels": [{"file": f"wheels/{wheel.name}"}],
        "files": {
            f"wheels/{wheel.name}": {
                "size": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    made = installer()
    monkeypatch.setattr(made, "KIT", folder)
    monkeypatch.setattr(
        made, "CHECKS", (("small", "import small, sys; sys.exit(small.ANSWER != 42)"),)
    )
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(sys, "argv", ["install.py", str(tmp_path / "made")])
    return made


def change(kit: ModuleType, **values: Any) -> None:
    path = kit.KIT / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_kit_is_installed(
    kit: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kit.main() == 0
    assert "is installed in" in capsys.readouterr().out
    site = next((tmp_path / "made" / "lib").glob("python*/site-packages"))
    assert (site / "small" / "__init__.py").is_file()
    assert not (site / "small" / "tests").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"machine": "mips"}, "this kit is for mips, this machine is"),
        ({"python": "3.4"}, r"this kit is for CPython 3\.4, this is cpython"),
        ({"libc": {"name": "glibc", "version": "2.99"}}, r"needs glibc 2\.99, here is 2\.36"),
        ({"libc": {"name": "musl", "version": "1.2"}}, "needs musl, here is glibc"),
        ({"wheels": [{"file": "wheels/gone.whl"}]}, "gone.whl"),
        ({"files": {"wheels/gone.whl": {"size": 1, "sha256": ""}}}, "gone.whl"),
    ],
)
def test_what_does_not_suit_is_refused(
    kit: ModuleType,
    values: dict[str, Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(kit, **values)
    assert kit.main() == 1
    found = capsys.readouterr().err
    assert found.startswith("not installed: ")
    assert re.search(message, found)
    assert not (tmp_path / "made").exists()


def test_musl_is_told_so(
    kit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    for name in ("musl", ""):
        monkeypatch.setattr(kit, "musl", lambda folder, name=name: (name, ""))
        assert kit.main() == 1
        assert f"needs glibc, here is {name or 'another C library'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("loader", "found"),
    [
        ("#!/bin/sh\nprintf 'musl libc (aarch64)\\nVersion 1.2.3\\nDynamic' >&2; exit 1", "1.2.3"),
        ("#!/bin/sh\nexit 1", ""),
        ("\x7fELF of another processor", ""),
    ],
)
def test_musl_s_version_is_asked_of_its_loader(
    kit: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    loader: str,
    found: str,
) -> None:
    assert kit.musl(tmp_path) == ("", "")
    path = tmp_path / "ld-musl-aarch64.so.1"
    path.write_text(loader)
    path.chmod(0o755)
    assert kit.musl(tmp_path) == ("musl", found)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(kit, "musl", lambda folder: ("musl", found))
    kit.check_libc("musl", "1.2.3")
    if found:
        with pytest.raises(kit.InstallError, match=r"needs musl 1\.2\.4, here is 1\.2\.3"):
            kit.check_libc("musl", "1.2.4")
    else:  # the libraries are tried all the same
        kit.check_libc("musl", "1.2.4")


def test_a_damaged_kit(kit: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = next((kit.KIT / "wheels").iterdir())
    data = bytearray(wheel.read_bytes())
    data[len(data) // 2] ^= 1
    wheel.write_bytes(data)
    assert kit.main() == 1
    assert "is damaged: copy the kit again" in capsys.readouterr().err


def test_no_folder_is_overwritten(
    kit: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "made" / "mine"
    mine.parent.mkdir()
    mine.write_text("precious")
    assert kit.main() == 1
    assert "exists: remove it" in capsys.readouterr().err
    assert mine.read_text() == "precious"


def test_a_full_disk(
    kit: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    assert kit.main() == 1
    assert "1 MiB free" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_a_disk_that_fills_half_way(
    kit: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(wheel: Path, site: Path) -> None:
        (site / "half.py").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kit, "unpack", full)
    assert kit.main() == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os.kill(os.getpid(), 4)", "small ends by SIGILL on this processor"),
        ("raise ImportError('no libfoo')", "small does not work here: ImportError: no libfoo"),
    ],
)
def test_a_library_that_dies_undoes_the_install(
    kit: ModuleType,
    code: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(kit, "CHECKS", (("small", code),))
    assert kit.main() == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["../outside.py", "/outside.py", "small-1.0.data/scripts/run"])
def test_names_that_leave_the_folder(kit: ModuleType, tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"")
    with pytest.raises(kit.InstallError, match="which is not unpacked"):
        kit.unpack(path, tmp_path / "site")
    assert not list(tmp_path.rglob("outside.py"))


def test_wheels_are_the_same_bytes_twice(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = small_wheel(tmp_path / "a")
    second = write_wheel(
        tmp_path / "b", "py3-none-any", dict(reversed(list(read_zip(first).items())))
    )
    assert first.read_bytes() == second.read_bytes()
    files = read_zip(first)
    rows = list(csv.reader(files["small-1.0.dist-info/RECORD"].decode().splitlines()))
    assert sorted(row[0] for row in rows) == sorted(files)
    assert all(row[2] == str(len(files[row[0]])) for row in rows[:-1] if row[2])


def test_the_device_s_wheel_leaves_out_what_a_device_has_no_use_for(tmp_path: Path) -> None:
    full = tmp_path / "mimo_edge-0.1.0-py3-none-any.whl"
    info = "mimo_edge-0.1.0.dist-info"
    contents = {
        "mimo_edge/api.py": b"x = 1\n",
        "mimo_edge/nano/checkpoint/model-00001-of-00001.safetensors": bytes(1000),
        "mimo_edge/nano/checkpoint/config.json": b"{}",
        f"{info}/METADATA": (
            b"Metadata-Version: 2.4\nName: mimo-edge\nVersion: 0.1.0\n"
            b"Requires-Dist: numpy>=1.26\nRequires-Dist: jinja2>=3.1\nRequires-Dist: typer>=0.20\n"
            b'Requires-Dist: mypy; extra == "dev"\nProvides-Extra: dev\n\n# mimo-edge\n'
        ),
        f"{info}/entry_points.txt": b"[console_scripts]\nmimo-edge = mimo_edge.cli.main:app\n",
        f"{info}/licenses/LICENSE": b"Apache",
    }
    with zipfile.ZipFile(full, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    (tmp_path / "out").mkdir()
    made = device_wheel(full, tmp_path / "out")
    assert made.name == "mimo_edge-0.1.0+device-py3-none-any.whl"
    files = read_zip(made)
    new = "mimo_edge-0.1.0+device.dist-info"
    assert set(files) == {
        "mimo_edge/api.py",
        "mimo_edge/nano/checkpoint/config.json",
        *(f"{new}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")),
    }
    lines = files[f"{new}/METADATA"].decode().split("\n\n")[0].splitlines()
    assert [line for line in lines if line.startswith(("Req", "Prov", "Version"))] == [
        "Version: 0.1.0+device",
        "Requires-Dist: numpy>=1.26",
        "Requires-Dist: jinja2>=3.1",
        "Requires-Dist: mimo_edge_libggml",
    ]


def test_an_archive_has_no_times_and_no_owners() -> None:
    files = {"b": b"2", "a.sh": b"1"}
    assert kit_tool._archive("kit", files) == kit_tool._archive("kit", dict(sorted(files.items())))
