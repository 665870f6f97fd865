"""What an answer is asked with: the options of `Session.stream` that decide its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, TypedDict

from mimo_edge.errors import UsageError
from mimo_edge.logprobs import MAX_TOP
from mimo_edge.reply import DEFAULT_MAX_TOKENS
from mimo_edge.sampling import SamplingParams
from mimo_edge.tokenizer import check_unicode


@dataclass(frozen=True)
class AnswerOptions:
    """See `Session.stream`. Raises UsageError on values that mean nothing."""

    max_tokens: int | None = DEFAULT_MAX_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    stop: Sequence[str] = ()
    json_schema: Mapping[str, Any] | None = None
    regex: str | None = None
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    stop_repeats: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _checked_stops(self.stop))
        _ = self.sampling
        if self.logprobs is not None and (
            isinstance(self.logprobs, bool)
            or not isinstance(self.logprobs, int)
            or not 0 <= self.logprobs <= MAX_TOP
        ):
            raise UsageError(f"logprobs = {self.logprobs!r}", f"use 0 to {MAX_TOP}, or None")

    @cached_property
    def sampling(self) -> SamplingParams:
        """How tokens are chosen."""
        return SamplingParams(
            self.temperature,
            self.top_p,
            self.min_p,
            self.top_k,
            self.seed,
            self.repetition_penalty,
            self.presence_penalty,
            self.frequency_penalty,
        )

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self) | {"stop": list(self.stop)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> AnswerOptions:
        """The options `to_json` gave. Raises UsageError on others."""
        names = {one.name for one in fields(cls)}
        if set(raw) != names:
            raise UsageError(f"an answer with the options {sorted(raw)}")
        return cls(**raw)


class AnswerKeywords(TypedDict, total=False):
    """`AnswerOptions` as keywords of a function that hands them on."""

    max_tokens: int | None
    temperature: float
    top_p: float
    min_p: float
    top_k: int
    seed: int | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logprobs: int | None
    stop: Sequence[str]
    json_schema: Mapping[str, Any] | None
    regex: str | None
    tool_choice: str
    parallel_tool_calls: bool
    stop_repeats: int


def _checked_stops(stop: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(stop, Sequence):
        raise UsageError(f"stop = {stop!r} is not a list of texts")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise UsageError(f"stop = {text!r} is not a text")
        check_unicode(text)
    return stops
