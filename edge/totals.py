"""Sums over the generations of a runtime."""

from __future__ import annotations

from dataclasses import dataclass, field

from mimo_edge.engine import GenerationStats


@dataclass
class Totals:
    """What the generations of a runtime did, added up. Times in milliseconds."""

    generations: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    tokens: int = 0
    verifies: int = 0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    drafted_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    draft_why: str = ""
    first_tokens: int = 0  # generations that were not cancelled before: prefill makes the first

    @property
    def decoded(self) -> int:
        """Tokens that decoding made; the first of an answer comes from its prefill."""
        return self.tokens - self.first_tokens

    @property
    def prefill_tps(self) -> float:
        """Newly processed prompt tokens per second; 0 before any."""
        new = self.prompt_tokens - self.reused_tokens
        return new / self.prefill_ms * 1e3 if self.prefill_ms else 0.0

    @property
    def decode_tps(self) -> float:
        """Generated tokens per second of decoding; 0 before any."""
        return self.decoded / self.decode_ms * 1e3 if self.decode_ms else 0.0

    @property
    def tokens_per_verify(self) -> float:
        """Tokens gained per pass after prefill; 0 before any."""
        return self.decoded / self.verifies if self.verifies else 0.0

    def add(self, stats: GenerationStats) -> None:
        """Count one generation that ended."""
        self.generations += 1
        self.first_tokens += stats.tokens > 0
        for name in ("prompt_tokens", "reused_tokens", "tokens", "verifies"):
            setattr(self, name, getattr(self, name) + getattr(stats, name))
        self.prefill_ms += stats.prefill_ms
        self.decode_ms += stats.decode_ms
        for sums, counts in (
            (self.drafted_by_depth, stats.drafted_by_depth),
            (self.accepted_by_depth, stats.accepted_by_depth),
        ):
            sums.extend([0] * (len(counts) - len(sums)))
            for depth, count in enumerate(counts):
                sums[depth] += count
        self.draft_why = stats.draft_why or self.draft_why
