"""The same bundle, the same questions, on this machine and under the emulator."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from arm.checks import Check, Outcome, digest
from arm.paths import REPOSITORY, WORK, run
from mimo_edge import export_bundle

# Processors of the emulator. ARMv8.0; dotprod and fp16; i8mm and SVE2 with vectors of 128 bits, as
# phones have.
MAX = "max,sve-default-vector-length=16"
CPUS = ("cortex-a53", "cortex-a76", MAX)  # with which the whole suite runs
# ggml has kernels of their own for some lengths of vectors. The emulator computes these one element
# at a time: a command takes 40 s at int4 and 150 s at f32; with 128 bits it takes 6 s and 22 s.
WIDE = ("max,sve-default-vector-length=32", "max,sve-default-vector-length=64")
# The variant of libggml that must compute there.
VARIANTS = {
    "cortex-a53": "armv8.0_1",
    "cortex-a76": "armv8.2_2",
    **dict.fromkeys((MAX, *WIDE), "armv8.6_2"),
}
_SCRIPTS = REPOSITORY / "tools" / "arm"


@dataclass(frozen=True)
class Comparison:
    """What is asked of a bundle, and in what the answers must be equal ("tokens", "exact")."""

    recipe: str
    commands: int
    kv_type: str
    draft: int
    equal_in: str
    form: str = "gguf"  # of the bundle; the runtime answers from "onnx" by ONNX Runtime


def comparisons(at_f32: int, at_int4: int) -> tuple[Comparison, Comparison]:
    """At f32, weights and cache, token for token. At int4, whose sums are rounded in another order,
    the same commands are answered exactly right."""
    return (
        Comparison("f32", at_f32, "f32", 0, "tokens"),
        Comparison("q4_k", at_int4, "f16", 3, "exact"),
    )


def by_onnx_runtime(at_int4: int) -> Comparison:
    """The same at int4 on the other backend, whose cache is f32."""
    return Comparison("q4_k", at_int4, "f32", 3, "exact", "onnx")


def bundle(recipe: str, form: str = "gguf") -> Path:
    """mimo-nano exported on this machine with `recipe`, in one form."""
    path = WORK / (f"nano-{recipe}" if form == "gguf" else f"nano-{recipe}-{form}")
    export_bundle("mimo-nano", path, recipe=recipe, formats=(form,), overwrite=True)
    return path


def answer_check(
    python: Path,
    model: Path,
    cpu: str,
    wanted: Comparison,
    state: bytes,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> Check:
    """The answers of `model` under `cpu` against those of this machine. `settings` are more of the
    emulated Python's variables."""
    form = "" if wanted.form == "gguf" else f" as {wanted.form}"
    name = f"{wanted.commands} commands at {wanted.recipe}{form}"
    run_it = functools.partial(_compare, python, model, wanted, {"QEMU_CPU": cpu, **settings})
    return Check(cpu, name, digest(state, (_SCRIPTS / "answers.py").read_bytes()), run_it)


def _compare(python: Path, model: Path, wanted: Comparison, env: dict[str, str]) -> Outcome:
    cpu = env["QEMU_CPU"]
    want = _answers_here(model, wanted)
    about, *found = _answers(python, model, wanted, env)
    same = [a[wanted.equal_in] == b[wanted.equal_in] for a, b in zip(want, found, strict=True)]
    equal = sum(a["tokens"] == b["tokens"] for a, b in zip(want, found, strict=True))
    right = sum(bool(answer["exact"]) for answer in found)
    variant = about["variant"]
    told = (
        f"{wanted.equal_in} equal in {sum(same)}, whole answers equal in {equal}, {right} exactly "
        f"right, libggml {variant} ({', '.join(about['features'])})"
    )
    passed = all(same) and len(same) == wanted.commands
    return Outcome(passed and variant == VARIANTS.get(cpu, variant), told)


@functools.cache
def _answers_here(model: Path, wanted: Comparison) -> list[dict[str, Any]]:
    return _answers(Path(sys.executable), model, wanted, {})[1:]


def _answers(
    python: Path, model: Path, wanted: Comparison, env: dict[str, str]
) -> list[dict[str, Any]]:
    text = run(
        [python, _SCRIPTS / "answers.py", model, f"--commands={wanted.commands}",
         f"--kv-type={wanted.kv_type}", f"--draft={wanted.draft}"],
        env=env,
        capture=True,
    )  # fmt: skip
    return [json.loads(line) for line in text.splitlines()]


@dataclass(frozen=True)
class _Machine:
    python: Path
    settings: dict[str, str]

    def turn(self, what: str, model: Path, file: Path) -> Any:
        """What carry_session.py says."""
        command = [self.python, _SCRIPTS / "carry_session.py", what, model, file]
        return json.loads(run(command, env=self.settings, capture=True))


def session_checks(
    python: Path, model: Path, other: Path, cpu: str, state: bytes
) -> Iterator[Check]:
    """A session saved on either machine goes on on the other with the tokens it would have had, and
    is refused there with the bundle `other`."""
    here, there = _Machine(Path(sys.executable), {}), _Machine(python, {"QEMU_CPU": cpu})

    def carried(name: str, first: _Machine, second: _Machine) -> Outcome:
        file = WORK / f"session-{cpu}-{name}"
        file.unlink(missing_ok=True)
        first.turn("save", model, file)
        want, found = (one.turn("restore", model, file) for one in (first, second))
        refused = second.turn("refuse", other, file)
        file.unlink()
        told = f"goes on with {'the same' if want == found else 'other'} tokens"
        good = bool(want) and want == found
        return Outcome(good, f"{told}; with another bundle: {refused.splitlines()[0]}")

    state_now = digest(state, (_SCRIPTS / "carry_session.py").read_bytes())
    for name, first, second in (("from here", here, there), ("from there", there, here)):
        run_it = functools.partial(carried, name.split()[-1], first, second)
        yield Check(cpu, f"session {name}", state_now, run_it)
