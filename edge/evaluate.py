"""How good a model is, and how much of its source is left after quantisation.

Two measures. `evaluate_text` feeds the same tokens to the source and to the candidate (teacher
forcing) and compares the distributions they predict. `evaluate_commands` asks the candidate what a
user would ask and counts the answers whose tool calls are exactly right, through the same session
a user has. Nothing here draws random numbers: the same model gives the same report.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mimo_edge.chat_template import ChatTemplate
from mimo_edge.errors import GenerationError, TokenizerError, UsageError
from mimo_edge.runtimes.base import F32, Backend, TokenIds
from mimo_edge.tokenizer import Tokenizer

F64 = NDArray[np.float64]

# Logits of one segment, source and candidate each, stay within this many bytes.
_SEGMENT_LOGITS_BYTES = 64 << 20
_MAX_SEGMENT_ROWS = 512
MAX_ANSWER_TOKENS = 256
# Finish reasons of an answer that ended by itself.
ENDED = ("stop", "tool_calls")


# --- teacher-forced text ---------------------------------------------------------------------


@dataclass(frozen=True)
class TextChunk:
    """Tokens evaluated in one context. `token_ids` i32 [T]; the tokens at index
    `scored_from`..T-1 are the ones whose prediction is scored (0 and 1 mean the same: nothing
    predicts the first token)."""

    token_ids: TokenIds
    scored_from: int = 1

    @property
    def rows(self) -> int:
        """How many predictions this chunk scores."""
        return max(0, len(self.token_ids) - max(1, self.scored_from))


@dataclass(frozen=True)
class TextQuality:
    """Result of `evaluate_text`. KL is in nats per token; fields that need a source are None
    when there was none."""

    tokens: int  # predictions scored
    chunks: int
    perplexity: float
    source_perplexity: float | None
    mean_kl: float | None  # KL(source || candidate)
    kl_p99: float | None
    top1_agreement: float | None  # share of rows with the same most likely token
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def split_chunks(
    token_ids: Sequence[int] | TokenIds, chunk_tokens: int = 512, max_tokens: int | None = None
) -> list[TextChunk]:
    """Cut one long text [N] into chunks of `chunk_tokens`, each scored from its second token.

    A tail too short to score (one token) is dropped. Raises UsageError when nothing is left.
    """
    if chunk_tokens < 2:
        raise UsageError(
            f"chunks of {chunk_tokens} tokens hold nothing to predict", "use 2 or more"
        )
    ids = np.asarray(token_ids, dtype=np.int32)
    if max_tokens is not None:
        ids = ids[:max_tokens]
    chunks = [
        TextChunk(ids[start : start + chunk_tokens])
        for start in range(0, len(ids), chunk_tokens)
        if len(ids) - start >= 2
    ]
    if not chunks:
        raise UsageError(f"a text of {len(ids)} tokens is too short to evaluate", "give at least 2")
    return chunks


def evaluate_text(
    source: Backend | None,
    candidate: Backend,
    chunks: Iterable[TextChunk],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> TextQuality:
    """Compare what two backends predict for the same tokens.

    Perplexity = exp(mean -log p(x_i | x_<i)) in f64; KL(source || candidate) over the whole
    vocabulary. Memory is bounded by one segment of logits, whatever the length of a chunk.
    `progress(done rows, all rows)`. Raises UsageError when the models do not share a vocabulary
    or nothing is scored, GenerationError on logits that are not finite.
    """
    work = list(chunks)
    total = sum(chunk.rows for chunk in work)
    if total == 0:
        raise UsageError("nothing to evaluate: no chunk has a token to predict")
    vocab = candidate.config.vocab_size
    if source is not None and source.config.vocab_size != vocab:
        raise UsageError(
            f"source has {source.config.vocab_size} tokens, the candidate {vocab}",
            "compare a bundle with the checkpoint it was made from",
        )
    began = time.perf_counter()
    nll, source_nll, same, done = 0.0, 0.0, 0, 0
    divergences: list[F64] = []
    for chunk in work:
        _check_ids(chunk.token_ids, vocab)
        walks = [_rows(candidate, chunk)]
        if source is not None:
            walks.append(_rows(source, chunk))
        for parts in zip(*walks, strict=True):
            first, logits = parts[0]
            targets = chunk.token_ids[first + 1 : first + 1 + len(logits)]
            log_q = _log_softmax(logits, "candidate")
            nll -= float(log_q[np.arange(len(targets)), targets].sum())
            if source is not None:
                log_p = _log_softmax(parts[1][1], "source")
                source_nll -= float(log_p[np.arange(len(targets)), targets].sum())
                divergences.append(kl_divergence(log_p, log_q))
                same += int((log_p.argmax(axis=1) == log_q.argmax(axis=1)).sum())
            done += len(targets)
            if progress is not None:
                progress(done, total)
    kl = np.concatenate(divergences) if divergences else None
    return TextQuality(
        tokens=total,
        chunks=sum(chunk.rows > 0 for chunk in work),
        perplexity=_perplexity(nll / total, "candidate"),
        source_perplexity=None if source is None else _perplexity(source_nll / total, "source"),
        mean_kl=None if kl is None else float(kl.mean()),
        kl_p99=None if kl is None else float(np.percentile(kl, 99)),
        top1_agreement=None if source is None else same / total,
        seconds=time.perf_counter() - began,
    )


def _perplexity(mean_nll: float, who: str) -> float:
    try:
        return math.exp(mean_nll)
    except OverflowError:
        raise GenerationError(
            f"the {who} is off by {mean_nll:.0f} nats per token, beyond any perplexity",
            "its weights are damaged, or the text is no text of this model",
        ) from None


def kl_divergence(log_p: F64, log_q: F64) -> F64:
    """KL(p || q) in nats of log-probabilities f64 [T, V] -> f64 [T].

    Rounding can leave a tiny negative sum for equal rows; it is cut at 0."""
    result: F64 = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=1), 0.0)
    return result


def _rows(backend: Backend, chunk: TextChunk) -> Iterator[tuple[int, F32]]:
    """Yield (index of the first row, logits f32 [n, V]) of the rows that predict scored tokens."""
    ids = chunk.token_ids[:-1]  # the last token is predicted, never fed
    wanted = max(1, chunk.scored_from) - 1
    if wanted >= len(ids):
        return
    row_bytes = 4 * backend.config.vocab_size
    step = max(1, min(_MAX_SEGMENT_ROWS, _SEGMENT_LOGITS_BYTES // row_bytes))
    cache = backend.new_cache(len(ids))
    for start in range(0, len(ids), step):
        part = ids[start : start + step]
        rows = min(len(part), start + len(part) - wanted)
        # A prefill call must ask for one row at least; rows before `wanted` are not scored.
        logits = backend.forward(part, cache, logits_rows=max(1, rows)).logits
        if rows > 0:
            yield start + len(part) - rows, logits[-rows:]


def _log_softmax(logits: F32, who: str) -> F64:
    values = logits.astype(np.float64)
    if not np.isfinite(values).all():
        raise GenerationError(f"the {who} produced logits that are not finite")
    values -= values.max(axis=1, keepdims=True)
    values -= np.log(np.exp(values).sum(axis=1, keepdims=True))
    return values


def _check_ids(ids: TokenIds, vocab: int) -> None:
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise UsageError(
            f"token ids {int(ids.min())}..{int(ids.max())} do not fit a vocabulary of {vocab}",
            "use the tokenizer of this model",
        )


# --- commands --------------------------------------------------------------------------------


class CallLike(Protocol):
    """What a session reports for one tool call."""

    @property
    def name(self) -> str: ...

    @property
    def arguments(self) -> Mapping[str, Any]: ...


class StatsLike(Protocol):
    """Counters of one generation, as edge/engine.GenerationStats."""

    tokens: int
    verifies: int
    drafted_by_depth: list[int]
    accepted_by_depth: list[int]


class ReplyLike(Protocol):
    """What a session answers."""

    @property
    def text(self) -> str: ...

    @property
    def tool_calls(self) -> Sequence[CallLike]: ...

    @property
    def malformed(self) -> Sequence[object]: ...

    @property
    def finish_reason(self) -> str: ...

    @property
    def stats(self) -> StatsLike: ...


class SessionLike(Protocol):
    """A conversation."""

    def generate(self, prompt: str, *, max_tokens: int, temperature: float) -> ReplyLike: ...


class RuntimeLike(Protocol):
    """What `evaluate_commands` needs of a Runtime."""

    def session(
        self, *, tools: Sequence[Mapping[str, Any]], enable_thinking: bool
    ) -> SessionLike: ...


@dataclass
class Tally:
    """Right answers out of all of one group."""

    commands: int = 0
    exact: int = 0

    @property
    def rate(self) -> float:
        """Share that is right, 0 when there are none."""
        return self.exact / self.commands if self.commands else 0.0


@dataclass(frozen=True)
class CommandFailure:
    """One wrong answer: the calls wanted and made, and the text of the answer."""

    id: str
    text: str
    want: list[dict[str, Any]]
    got: list[dict[str, Any]]
    answer: str
    finish_reason: str


@dataclass(frozen=True)
class CommandQuality:
    """Result of `evaluate_commands`. `verifies` are target passes after prefill; drafting by
    depth counts the drafts proposed and those kept (a draft behind a wrong one is not kept, nor
    is one past the end of the answer)."""

    total: Tally
    by_language: dict[str, Tally]
    by_domain: dict[str, Tally]
    by_kind: dict[str, Tally]  # single, double (or more) calls, refusal
    failures: list[CommandFailure]
    tokens: int
    verifies: int
    drafted_by_depth: list[int]
    accepted_by_depth: list[int]
    seconds: float

    @property
    def tokens_per_verify(self) -> float:
        """Tokens gained per target pass: the first token of each answer is prefill's."""
        return (self.tokens - self.total.commands) / self.verifies if self.verifies else 0.0

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Share of the drafts at each depth that were kept."""
        pairs = zip(self.accepted_by_depth, self.drafted_by_depth, strict=True)
        return [kept / drafted if drafted else 0.0 for kept, drafted in pairs]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        groups = {
            name: {key: asdict(tally) | {"rate": tally.rate} for key, tally in table.items()}
            for name, table in (
                ("by_language", self.by_language),
                ("by_domain", self.by_domain),
                ("by_kind", self.by_kind),
            )
        }
        return {
            "commands": self.total.commands,
            "exact": self.total.exact,
            "exact_rate": self.total.rate,
            **groups,
            "tokens": self.tokens,
            "verifies": self.verifies,
            "tokens_per_verify": self.tokens_per_verify,
            "drafted_by_depth": self.drafted_by_depth,
            "accepted_by_depth": self.accepted_by_depth,
            "acceptance_by_depth": self.acceptance_by_depth,
            "seconds": self.seconds,
            "failures": [asdict(failure) for failure in self.failures],
        }


def evaluate_commands(
    runtime: RuntimeLike,
    commands: Sequence[Mapping[str, Any]],
    tools: Mapping[str, Mapping[str, Any]],
    *,
    max_tokens: int = MAX_ANSWER_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> CommandQuality:
    """Ask every command as a user would and compare the tool calls with the right ones.

    A command is {"text", "tools" (names in `tools`), "calls" (name and arguments, in order),
    "lang", "domain", "id"}; no calls means that the right answer is to call nothing. Each gets a
    new session with its own tools in the system turn, thinking off, greedy; drafting is as the
    runtime was opened. Right is what `same_calls` says of an answer that ended by itself.

    Raises UsageError on a malformed command.
    """
    for index, command in enumerate(commands):
        _check_command(index, command, tools)
    if not commands:
        raise UsageError("no commands to evaluate")
    began = time.perf_counter()
    total = Tally()
    by_language: dict[str, Tally] = {}
    by_domain: dict[str, Tally] = {}
    by_kind: dict[str, Tally] = {}
    failures: list[CommandFailure] = []
    tokens = verifies = 0
    drafted: list[int] = []
    accepted: list[int] = []
    for index, command in enumerate(commands):
        listed = [tools[name] for name in command["tools"]]
        session = runtime.session(tools=listed, enable_thinking=False)
        reply = session.generate(command["text"], max_tokens=max_tokens, temperature=0)
        want = command["calls"]
        # A malformed call is a call the user would see fail, also where none was wanted.
        right = (
            same_calls(reply.tool_calls, want)
            and not reply.malformed
            and reply.finish_reason in ENDED
        )
        kind = ("refusal", "single")[len(want)] if len(want) < 2 else "double"
        for tally in (
            total,
            by_language.setdefault(command["lang"], Tally()),
            by_domain.setdefault(command["domain"], Tally()),
            by_kind.setdefault(kind, Tally()),
        ):
            tally.commands += 1
            tally.exact += right
        if not right:
            got = [{"name": c.name, "arguments": dict(c.arguments)} for c in reply.tool_calls]
            failures.append(
                CommandFailure(
                    command["id"], command["text"], list(want), got, reply.text, reply.finish_reason
                )
            )
        stats = reply.stats
        tokens += stats.tokens
        verifies += stats.verifies
        _add(drafted, stats.drafted_by_depth)
        _add(accepted, stats.accepted_by_depth)
        if progress is not None:
            progress(index + 1, len(commands))
    return CommandQuality(
        total=total,
        by_language=by_language,
        by_domain=by_domain,
        by_kind=by_kind,
        failures=failures,
        tokens=tokens,
        verifies=verifies,
        drafted_by_depth=drafted,
        accepted_by_depth=accepted,
        seconds=time.perf_counter() - began,
    )


def answer_chunks(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    commands: Sequence[Mapping[str, Any]],
    tools: Mapping[str, Mapping[str, Any]],
) -> list[TextChunk]:
    """Each command with its right answer as one text, of which only the answer is scored.

    The prompt is a session's; the answer is the right calls as the template writes them, or the
    command's "reply". Raises UsageError on a malformed command, TokenizerError when the template
    does not continue its own prompt.
    """
    chunks = []
    for index, command in enumerate(commands):
        _check_command(index, command, tools)
        listed = [tools[name] for name in command["tools"]]
        messages: list[dict[str, Any]] = [{"role": "user", "content": command["text"]}]
        prompt = template.encode(tokenizer, messages, listed, enable_thinking=False)
        answer: dict[str, Any] = {"role": "assistant", "content": command.get("reply") or ""}
        if command["calls"]:
            answer["tool_calls"] = [{"function": call} for call in command["calls"]]
        ids = template.encode(
            tokenizer,
            [*messages, answer],
            listed,
            enable_thinking=False,
            add_generation_prompt=False,
        )
        if ids[: len(prompt)] != prompt or len(ids) == len(prompt):
            raise TokenizerError(
                f"the chat template writes the answer of command {command['id']} other than its "
                "prompt begins",
                "this model cannot be scored on right answers; use a text file",
            )
        chunks.append(TextChunk(np.asarray(ids, dtype=np.int32), len(prompt)))
    return chunks


def _add(total: list[int], more: Sequence[int]) -> None:
    total.extend([0] * (len(more) - len(total)))
    for depth, count in enumerate(more):
        total[depth] += count


def _check_command(
    index: int, command: Mapping[str, Any], tools: Mapping[str, Mapping[str, Any]]
) -> None:
    shapes = {"id": str, "text": str, "lang": str, "domain": str, "tools": list, "calls": list}
    for key, kind in shapes.items():
        if not isinstance(command.get(key), kind):
            raise UsageError(f"command {index}: {key!r} is missing or no {kind.__name__}")
    if unknown := [name for name in command["tools"] if name not in tools]:
        raise UsageError(f"command {index} ({command['id']}): unknown tools {unknown}")
    for call in command["calls"]:
        if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
            raise UsageError(f"command {index} ({command['id']}): malformed call {call!r}")


def same_call(got: CallLike, want: Mapping[str, Any]) -> bool:
    """Whether a call is exactly the wanted {"name", "arguments"}: same name, same set of
    arguments, every value equal and of the same JSON type (5 is not "5", 1 is not true).
    The order of the arguments does not matter."""
    if got.name != want["name"] or set(got.arguments) != set(want["arguments"]):
        return False
    return all(_same_value(got.arguments[key], value) for key, value in want["arguments"].items())


def same_calls(got: Sequence[CallLike], want: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an answer makes exactly the wanted calls, in order. Nothing wanted is a refusal:
    right when no call was made."""
    return len(got) == len(want) and all(same_call(a, b) for a, b in zip(got, want, strict=True))


def _same_value(a: Any, b: Any) -> bool:
    # bool is an int in Python but not in JSON; 1 and 1.0 are the same JSON number.
    number = (int, float)
    if isinstance(a, bool) or isinstance(b, bool):
        return isinstance(a, bool) and isinstance(b, bool) and a == b
    if isinstance(a, number) and isinstance(b, number):
        return a == b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same_value, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same_value(a[k], b[k]) for k in a)
    return type(a) is type(b) and bool(a == b)
