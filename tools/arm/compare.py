"""The same bundle, the same questions, on this machine and under the emulator."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from arm.paths import REPOSITORY, WORK, run
from mimo_edge import export_bundle

_SCRIPT = REPOSITORY / "tools" / "arm" / "answers.py"


def bundle(recipe: str) -> Path:
    """mimo-nano exported on this machine with `recipe`."""
    path = WORK / f"nano-{recipe}"
    export_bundle("mimo-nano", path, recipe=recipe, overwrite=True)
    return path


def answers(
    python: Path | str, model: Path, commands: int, kv_type: str, draft: int, cpu: str = ""
) -> list[dict[str, Any]]:
    """What a bundle answers to held-out commands."""
    env: Mapping[str, str] = {"QEMU_CPU": cpu} if cpu else {}
    text = run(
        [python, _SCRIPT, model, f"--commands={commands}", f"--kv-type={kv_type}",
         f"--draft={draft}"],
        env=env,
        capture=True,
    )  # fmt: skip
    return [json.loads(line) for line in text.splitlines()]


def same_tokens(python: Path, model: Path, cpus: tuple[str, ...], commands: int, jobs: int) -> bool:
    """Greedy answers at f32, weights and cache: token for token those of this machine."""
    return _compare(python, model, cpus, commands, jobs, "f32", 0, "tokens")


def same_matches(
    python: Path, model: Path, cpus: tuple[str, ...], commands: int, jobs: int
) -> bool:
    """At int4, whose sums are rounded in another order: the same commands are answered right."""
    return _compare(python, model, cpus, commands, jobs, "f16", 3, "exact")


def _compare(
    python: Path,
    model: Path,
    cpus: tuple[str, ...],
    commands: int,
    jobs: int,
    kv_type: str,
    draft: int,
    what: str,
) -> bool:
    want = answers(sys.executable, model, commands, kv_type, draft)
    passed = len(want) == commands
    with ThreadPoolExecutor(jobs) as pool:  # of processes: each is one thread wide
        told = list(
            pool.map(lambda cpu: answers(python, model, commands, kv_type, draft, cpu), cpus)
        )
    for cpu, found in zip(cpus, told, strict=True):
        same = [a[what] == b[what] for a, b in zip(want, found, strict=True)]
        equal = sum(a["tokens"] == b["tokens"] for a, b in zip(want, found, strict=True))
        right = sum(bool(answer["exact"]) for answer in found)
        print(f"{cpu}: {model.name}, {commands} commands: {what} equal in {sum(same)}, "
              f"whole answers equal in {equal}, {right} exactly right", flush=True)  # fmt: skip
        passed = passed and all(same)
    return passed


def same_sessions(python: Path, model: Path, cpu: str) -> bool:
    """A session saved on either machine goes on on either with the tokens it would have had."""
    script = REPOSITORY / "tools" / "arm" / "carry_session.py"
    machines: dict[str, tuple[object, dict[str, str]]] = {
        "x86-64": (sys.executable, {}),
        cpu: (python, {"QEMU_CPU": cpu}),
    }
    second: dict[str, str] = {}
    for saver, (program, env) in machines.items():
        path = WORK / f"session-{saver}"
        path.unlink(missing_ok=True)
        run([program, script, "save", model, path], env=env, capture=True)
        for reader, (other, settings) in machines.items():
            second[f"{saver} -> {reader}"] = run(
                [other, script, "restore", model, path], env=settings, capture=True
            )
    same = len(set(second.values())) == 1
    print(f"sessions {', '.join(second)}: {'the same tokens' if same else second}", flush=True)
    return same
