"""Packages of Debian, downloaded by apt into folders of our own and unpacked by dpkg: nothing is
installed, and no privilege is needed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from arm.paths import ProgramError, fresh, run

# The system's own Debian sources, without what else was added to it.
_SOURCES = ("/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list")
_ABOUT = Path("/etc/os-release")


def sources(release: str | None = None) -> tuple[str, str]:
    """The system's sources, as (name of the file, text), or those of another `release` of Debian
    from the same servers. Raises ProgramError where the system is no release of Debian."""
    path = next((Path(name) for name in _SOURCES if Path(name).is_file()), None)
    if path is None:
        raise ProgramError(f"no sources of packages: neither {' nor '.join(_SOURCES)} is there")
    text = path.read_text("utf-8")
    if release is not None:
        text = of_release(text, _ABOUT.read_text("utf-8"), release)
    return path.name, text


def of_release(text: str, about: str, release: str) -> str:
    """The sources `text` of a system of which os-release says `about`, for another `release`."""
    found = dict(re.findall(r'^(ID|VERSION_CODENAME)="?([\w.-]+)"?$', about, re.MULTILINE))
    own = found.get("VERSION_CODENAME")
    if found.get("ID") != "debian" or own is None:
        raise ProgramError(f"packages of Debian's {release} are wanted, and this is not Debian")
    return re.sub(rf"(?<![\w./-]){re.escape(own)}(?![\w.])", release, text)


def unpacked(
    packages: Sequence[str],
    folder: Path,
    place: Path,
    architecture: str,
    release: str | None = None,
    alone: bool = False,
) -> None:
    """Unpack `packages` and, unless `alone`, what they depend on, into the empty `folder`. apt
    works in `place`."""
    for package in _downloaded(packages, place, architecture, release, alone):
        run(["dpkg", "-x", package, folder])


def _downloaded(
    packages: Sequence[str], place: Path, architecture: str, release: str | None, alone: bool
) -> list[Path]:
    (place / "state" / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    archives = fresh(place / "cache" / "archives")
    (archives / "partial").mkdir()
    (place / "state" / "status").touch()
    name, text = sources(release)
    (place / name).write_text(text, "utf-8")
    options = {
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Sandbox::User": "",
        "Acquire::Retries": "5",
        "Acquire::http::Timeout": "60",
        "Acquire::https::Timeout": "60",
        "Debug::NoLocking": "1",
        "Dir::Etc::sourcelist": str(place / name),
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State": str(place / "state"),
        "Dir::State::status": str(place / "state" / "status"),
        "Dir::Cache": str(place / "cache"),
    }
    apt = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in options.items())]
    run([*apt, "update"])
    if alone:
        run([*apt, "download", *packages], cwd=archives)
    else:
        run([*apt, "install", "-y", "--no-install-recommends", "--download-only", *packages])
    return sorted(archives.glob("*.deb"))
