"""The device kit in the emulated root: made twice, installed offline, asked."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from arm.checks import Outcome
from arm.kit import make_kit
from arm.paths import QEMU, WORK, fresh, run
from arm.root import ROOT, interpreter
from arm.wheels import full_wheel

_QUESTION = "turn on guest wifi for two hours"


def try_kit(full: Path, model: Path, cpu: str) -> Outcome:
    """Whether the kit made of the wheel `full` is that of another build, installs without compiler
    and network, and answers as this machine does."""
    python = interpreter().name.removeprefix("python")
    first = make_kit(python, fresh(WORK / "kit" / "out"), full)
    digest = _sha256(first)
    again = full_wheel(WORK / "kit" / "again")
    same = _sha256(make_kit(python, WORK / "kit" / "out", again)) == digest
    about = f"{first.name}: {first.stat().st_size / 1e6:.1f} MB, {digest[:16]}"
    place = fresh(WORK / "kit" / "device")
    with tarfile.open(first) as archive:
        archive.extractall(place, filter="data")
    kit = next(place.iterdir())
    # Nothing else of this machine is to be found, and with it no compiler.
    tools = fresh(WORK / "kit" / "tools")
    for name in ("sh", "dirname", QEMU):
        (tools / name).symlink_to(shutil.which(name) or name)
    env = {"PATH": f"{tools}:{ROOT / 'usr' / 'bin'}", "HOME": str(place), "QEMU_CPU": cpu}
    run_there = [*_without_network(), "env", "-i", *(f"{k}={v}" for k, v in env.items())]
    run([*run_there, "/bin/sh", kit / "install.sh", place / "installed"])
    told = run(
        [*run_there, place / "installed" / "bin" / "python", kit / "ask.py", model, _QUESTION],
        capture=True,
    )
    want = run([sys.executable, kit / "ask.py", model, _QUESTION], capture=True)
    if not same:
        return Outcome(False, f"{about}, another build gives other bytes")
    good = bool(want.strip()) and told == want
    return Outcome(good, f"{about}; answered {told.strip()!r}, wanted {want.strip()!r}")


def _without_network() -> list[str]:
    """A prefix that takes the network away, where the system lets us; pip is not used anyway."""
    probe = ["unshare", "--net", "true"]
    able = (
        shutil.which("unshare")
        and not subprocess.run(probe, check=False, stderr=subprocess.DEVNULL).returncode
    )
    if not able:
        print("the network cannot be taken away here (unshare --net)", flush=True)
    return ["unshare", "--net"] if able else []


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
