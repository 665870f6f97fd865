"""What is measured: one `Case` is one line of the table, `grid` makes them from lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mimo_edge.errors import UsageError
from mimo_edge.kv_format import KV_FORMATS
from mimo_edge.speculative import MAX_DRAFT, DraftSetting

Kind = Literal["prefill", "decode"]
Tokens = Literal["auto", "greedy", "drawn"]

# More than any released model has positions; beyond it only slips of the hand.
MAX_LENGTH = 1 << 24


@dataclass(frozen=True)
class Case:
    """Prefill of `tokens` tokens, or decoding `tokens` tokens after a prompt of `depth`.

    `ram` is the cap in bytes (None: none), for the kernel as well as for our own plan.
    """

    kind: Kind
    tokens: int
    depth: int
    draft: DraftSetting
    ram: int | None
    threads: int

    @property
    def label(self) -> str:
        """Short name: pp512, tg64@128."""
        if self.kind == "prefill":
            return f"pp{self.tokens}"
        return f"tg{self.tokens}@{self.depth}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


@dataclass(frozen=True)
class Settings:
    """What all cases of a run share.

    `repetitions` are measured after `warmup` tokens of decoding (prefill: one prompt of at most
    512 tokens). `tokens` says what decoding continues with: "greedy" its own choice, "drawn" ids
    drawn with `seed` whatever the model says, "auto" greedy for models with a tokenizer. Models
    of random weights fall into a loop of few tokens, hence few experts, when left to themselves.
    `prompt` is a text to answer instead of drawn ids; its length then is the depth. `profile`,
    `backend`, `ep` and the like, `context` and `kv_type` are those of `Runtime.open`.
    """

    model: str
    profile: str | None = None
    backend: str = "auto"
    ep: str = "auto"
    ep_library: str | None = None
    ep_options: dict[str, str] = field(default_factory=dict)
    context: int | None = None
    kv_type: str | None = None
    repetitions: int = 3
    warmup: int = 16
    tokens: Tokens = "auto"
    seed: int = 0
    prompt: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.repetitions <= 1000:
            raise UsageError(f"repetitions = {self.repetitions}", "use 1 to 1000")
        if not 0 <= self.warmup <= MAX_LENGTH:
            raise UsageError(f"warmup = {self.warmup}", "use 0 or more tokens")
        if self.seed < 0:
            raise UsageError(f"seed = {self.seed}", "use 0 or more")
        if self.tokens not in ("auto", "greedy", "drawn"):
            raise UsageError(f"tokens = {self.tokens!r}", "use auto, greedy or drawn")
        if self.kv_type is not None and self.kv_type not in KV_FORMATS:
            raise UsageError(f"kv_type {self.kv_type!r}", f"use one of {', '.join(KV_FORMATS)}")
        if self.context is not None and self.context < 1:
            raise UsageError(f"context = {self.context}", "use 1 or more")


def context_for(case: Case, settings: Settings, repetitions: int) -> int | None:
    """Tokens a case needs room for; None, the default, for a prompt of yet unknown length.

    A step of decoding may gain MAX_DRAFT tokens too many.
    """
    if settings.context is not None or settings.prompt is not None:
        return settings.context
    if case.kind == "prefill":
        return case.tokens + 1
    spare = MAX_DRAFT + 1
    return case.depth + settings.warmup + spare + repetitions * (case.tokens + spare) + 1


def grid(
    *,
    prefill: Sequence[int],
    decode: Sequence[int],
    depths: Sequence[int],
    drafts: Sequence[DraftSetting],
    rams: Sequence[int | None],
    threads: Sequence[int],
) -> list[Case]:
    """Every combination, prefill first; prefill takes the first draft setting only, because
    drafting begins after it. A depth of 0 stands for the length of a given prompt.

    Raises UsageError on lengths that make no sense.
    """
    for name, values, least in (
        ("prefill", prefill, 1),
        ("decode", decode, 1),
        ("depth", depths, 0),
        ("threads", threads, 1),
    ):
        for value in values:
            if not least <= value <= MAX_LENGTH:
                raise UsageError(f"{name} {value}", f"use {least} to {MAX_LENGTH}")
    if not prefill and not decode:
        raise UsageError("there is nothing to measure", "give --prefill or --decode")
    cases: list[Case] = []
    for ram in rams:
        for count in threads:
            cases += [Case("prefill", n, 0, drafts[0], ram, count) for n in prefill]
            cases += [
                Case("decode", n, depth, draft, ram, count)
                for depth in depths
                for n in decode
                for draft in drafts
            ]
    return cases
