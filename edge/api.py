"""What an application embeds: a Runtime over one model, and Sessions that talk with it.

    with Runtime.open("bundle/") as runtime:
        session = runtime.session(tools=tools)
        for piece in session.stream("turn on the light"):
            print(piece.text, end="")

Sessions of one runtime may be used from several threads; they take turns token by token.
One session serves one generation at a time.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import (
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

from mimo_edge.agent import MAX_STEPS, Agent, Step, make_agent
from mimo_edge.answer_options import AnswerOptions
from mimo_edge.answer_reader import THINK_CLOSE, THINK_OPEN, AnswerReader, Fragment
from mimo_edge.cancel import Cancel
from mimo_edge.chat_template import Message, check_messages
from mimo_edge.config import MimoConfig
from mimo_edge.deadline import Deadline
from mimo_edge.engine import PREFILL_CHUNK, Engine, Generation, GenerationStats, token_list
from mimo_edge.errors import ContextLengthError, SnapshotError, TokenizerError, UsageError
from mimo_edge.governor.events import EventLog
from mimo_edge.governor.limits import Limits
from mimo_edge.governor.slots import SlotShares
from mimo_edge.identity import vocabulary_identity
from mimo_edge.idle import IdleCaches
from mimo_edge.kv_format import DEFAULT_KV_TYPE
from mimo_edge.logprobs import TokenLogprob
from mimo_edge.machine import peak_rss_bytes, usable_cores
from mimo_edge.model_source import Model, open_model
from mimo_edge.prompt_border import PromptBorders
from mimo_edge.runtimes.base import F32, IdlingBackend, ThreadedBackend
from mimo_edge.sampling import Constraint, Mask, Sampler
from mimo_edge.sequence import Sequence as TokenSequence
from mimo_edge.sequence_pool import SequencePool
from mimo_edge.snapshots.prefixes import PrefixSnapshots
from mimo_edge.snapshots.session import (
    ChatState,
    ModelNames,
    OpenAnswer,
    restore_session,
    save_session,
)
from mimo_edge.snapshots.spill import SpillToDisk
from mimo_edge.snapshots.store import DEFAULT_BYTES, SnapshotStore
from mimo_edge.speculative import DraftSetting, max_draft
from mimo_edge.structured.wanted import Wanted
from mimo_edge.tokenizer import Tokenizer
from mimo_edge.tool_calls import Malformed, ToolCall, tool_schemas
from mimo_edge.tool_functions import Tool
from mimo_edge.totals import Totals
from mimo_edge.units import parse_bytes

if TYPE_CHECKING:
    from mimo_edge.governor import Governor, Sensors
    from mimo_edge.remote.address import Connection
    from mimo_edge.remote.runtime import RemoteRuntime
    from mimo_edge.structured.answers import Thinking
    from mimo_edge.structured.grammars import Grammars

FinishReason = Literal[
    "stop", "length", "tool_calls", "repetition", "deadline", "cancelled", "broken"
]
"""Why an answer ended; "broken" where a connection broke, see `Runtime.connect`."""
DEFAULT_CONTEXT = 4096
DEFAULT_MAX_TOKENS = 256

Prompt = str | Sequence[Message] | Sequence[int] | None
"""A user's text, several messages, raw token ids, or None to answer what is there."""


@dataclass(frozen=True)
class Piece:
    """A part of an answer. `text` is what to show: reasoning and tool calls come apart.

    The last piece of an answer, and only that, has a `finish_reason`.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Reply:
    """A whole answer. `malformed` lists tool calls that could not be read; their text is in
    `text`. `token_ids` holds every generated id, the stop token included; `logprobs`, when asked
    for, has one entry for each."""

    text: str
    token_ids: tuple[int, ...]
    tool_calls: tuple[ToolCall, ...]
    finish_reason: FinishReason
    stats: GenerationStats
    reasoning: str = ""
    malformed: tuple[Malformed, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


class Runtime:
    """One loaded model. Open with `Runtime.open`; a context manager; `close` may be repeated."""

    def __init__(
        self,
        model: Model,
        context: int,
        draft: DraftSetting = "auto",
        *,
        store: SnapshotStore | None = None,
        idle_bytes: int | None = None,
        limits: Limits | None = None,
        sensors: Sensors | None = None,
    ) -> None:
        self._model = model
        chunk = PREFILL_CHUNK if model.budget is None else model.budget.chunk
        self._engine = Engine(model.backend, context, draft, prefill_chunk=chunk, trace=model.trace)
        self._totals = Totals()
        # Re-entrant: adding may let the collector close a forgotten stream, which adds as well.
        self._totals_lock = threading.RLock()
        self._grammars: Grammars | None = None
        self._banned: Mask | None = None
        self._borders: PromptBorders | None = None
        if model.tokenizer is not None:
            self._banned = model.tokenizer.padding_mask(model.backend.config.vocab_size)
            self._borders = PromptBorders(model.template, model.tokenizer)
        if idle_bytes is None and model.budget is not None:
            idle_bytes = model.budget.idle_bytes
        self._store = store
        spill = None if store is None else SpillToDisk(self._engine, store)
        self._engine.idle = IdleCaches(idle_bytes, spill)
        self._prefixes: PrefixSnapshots | None = None
        if store is not None and model.identity is not None:  # else nothing names what they are of
            self._prefixes = PrefixSnapshots(store, self._names.weights)
        self._engine.prefixes = self._prefixes
        self._pools: weakref.WeakSet[SequencePool] = weakref.WeakSet()
        self._events = EventLog()
        self._slots = None if model.experts is None else SlotShares(model.experts)
        self._governor: Governor | None = None
        if limits is not None:
            self._govern(limits, sensors)

    def _govern(self, limits: Limits, sensors: Sensors | None) -> None:
        from mimo_edge.governor import Governor, SystemSensors

        engine, backend, experts = self._engine, self._model.backend, self._model.experts

        def limit_drafts(count: int) -> None:
            engine.draft_limit = count

        drafts = max_draft(backend.config) if engine.draft == "auto" else engine.draft
        self._governor = Governor(
            limits,
            SystemSensors(limits.zones) if sensors is None else sensors,
            self._events,
            threads=backend if isinstance(backend, ThreadedBackend) else None,
            drafts=drafts,
            limit_drafts=limit_drafts,
            slots=self._slots,
            drop_idle=partial(_drop_idle, engine),
        )
        engine.between_tokens = self._governor.between_tokens
        if experts is not None:
            experts.between_layers = self._governor.between_layers

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        profile: str | None = None,
        ram: int | str | None = None,
        context: int | None = None,
        backend: str = "auto",
        threads: int | None = None,
        draft: DraftSetting = "auto",
        kv_type: str | None = None,
        pin: int = 0,
        trace: str | Path | None = None,
        governor: bool | Sensors | None = None,
        ep: str = "auto",
        snapshots: str | Path | None = None,
        snapshot_bytes: int | str | None = None,
        idle_bytes: int | str | None = None,
    ) -> Runtime:
        """Open a bundle folder, a bare GGUF file or a Hugging Face checkpoint folder.

        `profile` is the name or file of a device profile ("auto": this machine); it decides what
        is not given of `ram`, `context`, `threads` and `kv_type`, and `draft` when that is "auto".
        `backend` "auto" is "ggml" for bundles and GGUF files, "reference" for checkpoints; "onnx"
        takes the ONNX form of a bundle, on the execution provider `ep` ("cpu", "qnn", or
        "qnn:v73" when a bundle has graphs for several NPUs). `ram` is
        a bound on the process in bytes (or "900MiB"): ggml and onnx read routed experts from
        flash when they do not fit, the reference backend refuses. `context` is the most tokens of
        a conversation (default 4,096 or what the model has), `draft` 0 to 3 or "auto"; with 0 the
        ggml backend leaves MTP blocks on flash. `kv_type` is the format of the KV cache of global
        layers on the ggml backend: "f16" (default, but "f32" where that takes little), "q8_0"
        (about half of f16), "f32". `pin` hottest
        experts of every layer, by the bundle's heat, are never given up when experts come from
        flash. `trace` is a file for the experts every layer chooses for every token (`mimo-edge
        trace` reads it). `governor`: whether to use fewer threads and drafts when the device is hot
        or its battery low, and to give expert slots and idle caches back when memory is short, by
        the profile's limits; on when a profile is given, with True also without one (by those of
        "auto"), and with an object that reads sensors instead of the system's
        (`mimo_edge.Sensors`). `snapshots` is a folder for what was processed (system texts and
        tools, for all processes on this device; idle conversations), at most `snapshot_bytes` bytes
        (default 512 MiB). `idle_bytes` bounds the caches of conversations that wait: beyond it
        those used longest ago are put away, see docs/sessions.md. By default they may have what
        the plan for `ram` leaves, and without `ram` any amount. "mimo-nano" is the built-in model.
        Raises a MimoEdgeError: BundleError, CheckpointError, DeviceError when the model does not
        fit `ram`, BackendError, UsageError.
        """
        limit = None if ram is None else parse_bytes(ram)
        idle = None if idle_bytes is None else 0 if idle_bytes == 0 else parse_bytes(idle_bytes)
        store = _open_store(snapshots, snapshot_bytes)
        if context is not None and (
            isinstance(context, bool) or not isinstance(context, int) or context < 1
        ):
            raise UsageError(f"context = {context!r}", "use 1 or more")
        usual_context, prefer_kv_type = DEFAULT_CONTEXT, DEFAULT_KV_TYPE
        limits = _limits(profile, governor)
        if profile is not None:
            from mimo_edge.devices.profile import load_profile

            device = load_profile(profile)
            usual_context, prefer_kv_type = device.context, device.kv_type
            limit = device.process_bytes if limit is None else limit
            # A profile may be tried out on a machine with fewer cores.
            threads = min(device.threads, usable_cores()) if threads is None else threads
            draft = device.draft if draft == "auto" else draft
        model = open_model(
            bundle,
            backend,
            limit,
            context or usual_context,
            threads,
            kv_type=kv_type,
            prefer_kv_type=prefer_kv_type,
            pin=pin,
            trace=None if trace is None else Path(trace),
            mtp=draft != 0,
            ep=ep,
            idle_bytes=idle or 0,
        )
        positions = model.backend.config.max_position_embeddings
        try:
            context = min(usual_context, positions) if context is None else context
            # A plan says itself what it leaves for them beyond what is reserved.
            own = idle if model.budget is None or model.budget.ram is None else None
            sensors = None if governor is None or isinstance(governor, bool) else governor
            return cls(
                model,
                context,
                draft,
                store=store,
                idle_bytes=own,
                limits=limits,
                sensors=sensors,
            )
        except BaseException:
            model.backend.close()
            if model.trace is not None:
                model.trace.close()
            raise

    @staticmethod
    def connect(
        url: str,
        model: str | None = None,
        api_key: str | None = None,
        *,
        connection: Connection | None = None,
    ) -> RemoteRuntime:
        """A model behind an OpenAI-compatible server (mimo-edge, SGLang, vLLM), used like one that
        was opened: sessions, streams, agents, tools.

        `model` None takes the only one the server has. `connection` holds timeouts, retries and
        trusted certificates. Needs the extra `remote`. Raises RemoteError when the server cannot
        be reached or refuses, UsageError on a wrong address, several models, or an unknown one.
        """
        from mimo_edge.remote.address import check_extra

        check_extra()
        from mimo_edge.remote.runtime import RemoteRuntime

        return RemoteRuntime.connect(url, model, api_key, connection)

    @property
    def name(self) -> str:
        """Name of the model."""
        return self._model.name

    @property
    def chat_template(self) -> str:
        """Source of the chat template."""
        return self._model.template.source

    @property
    def config(self) -> MimoConfig:
        """The model's configuration."""
        return self._model.backend.config

    @property
    def engine(self) -> Engine:
        """The engine below: token ids in, token ids out, no end-of-text. For measuring."""
        return self._engine

    @property
    def context(self) -> int:
        """Most tokens of one session."""
        return self._engine.context

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None when it works on token ids only."""
        return self._model.tokenizer

    def session(
        self,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        pool: SequencePool | None = None,
        constrain_tools: bool | None = None,
    ) -> Session:
        """A new conversation. `enable_thinking` None leaves it to the chat template. With a `pool`
        its first prompt goes on from what an earlier session of that pool processed; `close` the
        session to give that back.

        Text is free, but a tool call, once begun, can be read, names one of the `tools`, and its
        arguments fit their schemas. `constrain_tools` False leaves it to the model; None does so,
        with a warning in the log, only where llguidance is not installed.

        Raises UsageError on malformed tools, TokenizerError when texts are given to a model
        without a tokenizer.
        """
        self._engine.check_open()
        return Session(self, system, tools or (), enable_thinking, pool, constrain_tools)

    @property
    def grammars(self) -> Grammars:
        """Compiled grammars of structured answers. Raises TokenizerError without a tokenizer."""
        if self._grammars is None:
            from mimo_edge.structured.grammars import Grammars

            if self.tokenizer is None:
                raise TokenizerError(
                    f"{self.name} has no tokenizer: its answers cannot be held to a form"
                )
            self._grammars = Grammars(self.tokenizer, self.config.vocab_size, self._model.eos_ids)
        return self._grammars

    def restore(self, path: str | Path, *, recompute: bool = False) -> Session:
        """The session that was saved to `path`: it goes on with exactly the tokens it would have
        given without the interruption. `Session.resume` finishes an answer it was saved in.

        Needed is the same model, backend rows (same `kv_type`) and a context that is large enough;
        threads, drafts, `ram` and the processor may differ. With `recompute` only the vocabulary
        must be the same: what cannot be taken over, damaged caches too, is processed again.
        Raises SnapshotError on damage, SnapshotMismatchError when it belongs elsewhere,
        ContextLengthError, UsageError.
        """
        names = self._names
        with self._engine.turn():
            chat, sequence = restore_session(Path(path), names, self._engine, recompute)
            self._engine.idle.make_room(sequence)
            self._engine.idle.settle(sequence)
        try:
            messages = check_messages(chat.messages)
            session = Session(
                self,
                None,
                chat.tools,
                chat.enable_thinking,
                constrain_tools=chat.constrain_tools,
            )
            session._take_up(messages, chat, sequence)
        except (UsageError, TokenizerError) as error:
            raise SnapshotError(f"{path} is damaged: {error.message}") from None
        return session

    @cached_property
    def _names(self) -> ModelNames:
        if self._model.identity is None:
            raise UsageError(f"{self.name} was not opened from files: nothing names its weights")
        vocabulary = vocabulary_identity(self.tokenizer, self.config.vocab_size)
        return ModelNames(self._model.identity(), vocabulary)

    def sequence_pool(self, most: int) -> SequencePool:
        """A pool for sessions that end while what they processed should stay: at most `most`
        conversations are held, in use and idle. Raises UsageError when the memory plan of a
        runtime with a `ram` bound has no room for as many.
        """
        room = self.planned_conversations
        if room is not None and isinstance(most, int) and most > room:
            raise UsageError(
                f"{most} conversations at once: the memory plan has room for {room} "
                f"of {self.context} tokens",
                "ask for fewer, use a smaller context or a larger ram",
            )
        pool = SequencePool(self._engine, most)
        self._pools.add(pool)
        return pool

    @property
    def planned_conversations(self) -> int | None:
        """How many conversations of full length the memory plan has room for; None without a bound
        on memory. Slots of streamed experts take what is left, so it is then 1."""
        budget = self._model.budget
        return None if budget is None else budget.conversations

    def agent(
        self,
        tools: Sequence[Tool | Callable[..., Any]],
        system: str | None = None,
        *,
        max_steps: int = MAX_STEPS,
        enable_thinking: bool | None = None,
        on_step: Callable[[Step], None] | None = None,
        constrain_tools: bool | None = None,
    ) -> Agent:
        """A new conversation in which the model calls `tools`, Python functions, by itself:
        `agent.run("...")`. `max_steps` bounds its answers in one run; `on_step` hears of each call;
        `constrain_tools` as in `session`.

        Raises UsageError on a function that makes no tool, and what `session` raises.
        """
        session_options = {"enable_thinking": enable_thinking, "constrain_tools": constrain_tools}
        return make_agent(self, tools, system, max_steps, on_step, **session_options)

    def logits(self, token_ids: Sequence[int]) -> F32:
        """Logits f32 [T, V] after every one of token_ids [T], for evaluation and tests."""
        return self._engine.logits(token_ids)

    def stats(self) -> dict[str, Any]:
        """JSON-ready totals of this runtime and the peak memory of the process."""
        with self._totals_lock:
            counts = asdict(self._totals)
        provider = getattr(self._model.backend, "provider_stats", None)
        totals = Totals(**counts)  # a copy: other threads go on adding
        return {
            "model": self.name,
            "backend": self._model.backend.name,
            "provider": provider() if provider is not None else None,
            "context": self.context,
            "draft": self._engine.draft,
            **counts,
            "tokens_per_verify": totals.tokens_per_verify,
            "prefill_tps": totals.prefill_tps,
            "decode_tps": totals.decode_tps,
            "peak_rss_bytes": peak_rss_bytes(),
            "budget": None if self._model.budget is None else self._model.budget.to_dict(),
            "experts": self._expert_stats(totals),
            "governor": None if self._governor is None else self._governor.to_dict(),
            "events": self._events.to_dict(),
            "queue": {"waiting": self._engine.queue.waiting},
            "idle": self._idle_stats(),
            "snapshots": self._snapshot_stats(),
        }

    def _idle_stats(self) -> dict[str, Any]:
        """Caches of conversations, and what happened to those that waited."""
        idle = self._engine.idle
        return {
            "caches": idle.count,
            "cache_bytes": idle.nbytes(),
            "limit_bytes": idle.limit_bytes,
            "away": idle.away,
            **asdict(idle.stats),
        }

    def _snapshot_stats(self) -> dict[str, Any] | None:
        """The folder of processed prompts."""
        if self._store is None or self._prefixes is None:
            return None
        return {
            **asdict(self._store.stats),
            "reused_tokens": self._prefixes.reused_tokens,
            "bytes": self._store.nbytes,
            "limit_bytes": self._store.limit_bytes,
        }

    def _expert_stats(self, totals: Totals) -> dict[str, Any] | None:
        """Use of streamed experts; tokens are those processed, of prompts and answers."""
        if self._model.experts is None:
            return None
        found = self._model.experts.stats()
        total = found.total()
        tokens = totals.prompt_tokens - totals.reused_tokens + totals.tokens
        return {
            "slots": found.slots,
            "slots_planned": self._model.experts.cache.pool.count,
            "slots_used": found.slots_used,
            "hits": total.hits,
            "misses": total.misses,
            "hit_rate": found.hit_rate,
            "evictions": total.evictions,
            "wait_ms": total.wait_s * 1e3,
            "flash_bytes": found.flash_bytes,
            "flash_bytes_per_token": found.flash_bytes / tokens if tokens else 0.0,
        }

    def trim(self, fraction: float, timeout: float = 5.0) -> int:
        """Give memory back while the system is short of it; from any thread.

        `fraction` of the expert slots that were planned, from 0 to 1, is released; what a token
        needs at least stays. The same share of idle conversations in `sequence_pool`s goes, those
        idle longest first, and what ended ones left in memory (not counted). 0 takes all slots into
        use again and reads hot experts anew in the background; until then a governor does not take
        them either. A running answer goes on with the same tokens, more slowly: slots go between
        two of its layers, `timeout` seconds is the most this waits for that. Returns the bytes
        released by this call. Weights of a resident model all stay, every token needs all of them.
        Raises UsageError for other fractions or a closed runtime.
        """
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
            raise UsageError(f"trim({fraction!r})", "give the share to release, from 0 to 1")
        if not 0 <= fraction <= 1:  # NaN too
            raise UsageError(f"trim({fraction!r})", "give the share to release, from 0 to 1")
        if not 0 <= timeout < threading.TIMEOUT_MAX:
            raise UsageError(f"timeout = {timeout!r} seconds", "use 0 or more")
        self._engine.check_open()
        freed = _release_idle(self._pools, fraction)
        if fraction and isinstance(self._model.backend, IdlingBackend):
            self._model.backend.free_idle()
        slots = before = 0
        if self._slots is not None:
            before = self._slots.count
            released = round(fraction * self._slots.planned)
            freed += self._slots.set("application", released, timeout)
            slots = self._slots.count
        if freed or slots != before:
            action = f"expert slots {before} -> {slots}, {freed} bytes given back"
            self._events.add("application", action, f"trim({fraction:g})", relief=slots > before)
        return freed

    def memory_plan(self) -> list[str]:
        """The memory budget as lines of text; empty when the backend does not plan."""
        budget = self._model.budget
        if budget is None:
            return []
        return [f"{name:<14}{size:>12}  {note}".rstrip() for name, size, note in budget.rows()]

    def close(self) -> None:
        """Release the model, after the token that is being computed."""
        self._engine.close()
        if self._store is not None:
            self._store.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _open_store(folder: str | Path | None, limit_bytes: int | str | None) -> SnapshotStore | None:
    if folder is None:
        if limit_bytes is not None:
            raise UsageError("snapshot_bytes without snapshots", "name a folder for them")
        return None
    limit = DEFAULT_BYTES if limit_bytes is None else parse_bytes(limit_bytes)
    return SnapshotStore(Path(folder), limit)


@dataclass(frozen=True)
class _Open:
    """An answer that is not finished. `said` grows, and `sampler` is behind it."""

    messages: list[dict[str, Any]] | None
    prompt: list[int]
    said: list[int]
    options: AnswerOptions
    sampler: Sampler


class Session:
    """A conversation: its messages, and the processed tokens that make the next turn cheap."""

    def __init__(
        self,
        runtime: Runtime,
        system: str | None,
        tools: Sequence[Mapping[str, Any]],
        enable_thinking: bool | None,
        pool: SequencePool | None = None,
        constrain_tools: bool | None = None,
    ) -> None:
        if runtime.tokenizer is None and (system is not None or tools):
            raise TokenizerError(
                f"{runtime.name} has no tokenizer: it takes no system text and no tools",
                "give token ids, or put the model's tokenizer.json beside it",
            )
        tool_schemas(tools)
        self._runtime = runtime
        self._tools = tuple(tools)
        self._enable_thinking = enable_thinking
        self._constrain_tools = constrain_tools
        self._sequence = runtime._engine.sequence()
        self._pool = pool
        self._pooled = False  # whether the sequence is one the pool counts
        self._cancel = Cancel()
        self._active: Generator[Piece, None, None] | None = None
        self._open: _Open | None = None  # what is being said, or was when the session was saved
        self._token_ids: list[int] | None = None  # set once a session runs on raw ids
        self._last: Reply | None = None
        self._progress: GenerationStats | None = None
        self.messages: list[dict[str, Any]] = []
        """The conversation so far, as the chat template sees it."""
        if system is not None:
            self.messages = check_messages([{"role": "system", "content": system}])

    @property
    def last_reply(self) -> Reply | None:
        """The newest answer, complete or as far as it got."""
        return self._last

    @property
    def progress(self) -> GenerationStats | None:
        """What the newest generation has done up to now; counts on while it runs."""
        return self._progress

    def tool_result(self, text: str, name: str | None = None) -> None:
        """Add what a tool returned; `stream()` without a prompt goes on from there."""
        message: dict[str, Any] = {"role": "tool", "content": text}
        if name is not None:
            message["name"] = name
        self._check_texts()
        self.messages.extend(check_messages([message]))

    def prompt_tokens(self, prompt: Prompt = None) -> tuple[int, int]:
        """Tokens of the whole prompt when `prompt` is answered next, and how many of them are
        processed already. Raises as `stream`."""
        _, ids = self._prepare(prompt)
        return len(ids), self._sequence.shared(ids)

    def stream(
        self,
        prompt: Prompt = None,
        *,
        max_tokens: int | None = DEFAULT_MAX_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        top_k: int = 0,
        seed: int | None = None,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logprobs: int | None = None,
        stop: Sequence[str] = (),
        json_schema: Mapping[str, Any] | None = None,
        regex: str | None = None,
        tool_choice: str = "auto",
        parallel_tool_calls: bool = True,
        stop_repeats: int = 0,
        max_prompt_tokens: int | None = None,
        timeout_s: float | None = None,
        prefix_tokens: int = 0,
    ) -> Iterator[Piece]:
        """Answer `prompt`, piece by piece; `max_tokens` None goes on to the context's end.
        `max_prompt_tokens` is a bound on the whole prompt below the context. `prefix_tokens` says
        of a prompt of token ids how many at its start other prompts share: they are kept as a
        snapshot, as system text and tools of messages are.

        Tokens are chosen as `SamplingParams` says; `logprobs` N reports each token's
        log-probability and the N likeliest ones of its place. `json_schema` or `regex` (Rust's
        syntax, matching the whole answer) is what the text after any reasoning must be.
        `tool_choice` is "auto", "none", "required" or the name of the tool to call,
        `parallel_tool_calls` whether there may be several calls.

        `stop_repeats` N ends an answer that says the same N times in a row (1 to 256 tokens, again
        and again) with the finish reason "repetition"; 0 lets it go on. `timeout_s` seconds from
        now the answer ends within a layer, with the finish reason "deadline".
        Everything is checked before this returns: UsageError (its ConstraintError for forms that
        cannot be enforced), TokenizerError, ContextLengthError when the prompt does not fit.
        Leaving the iterator early keeps what was generated. A stream left unfinished is closed by
        the next one.
        """
        deadline = Deadline(self._cancel, timeout_s)
        options = AnswerOptions(
            max_tokens,
            temperature,
            top_p,
            min_p,
            top_k,
            seed,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            logprobs,
            stop,
            json_schema,
            regex,
            tool_choice,
            parallel_tool_calls,
            stop_repeats,
        )
        self._close_active()
        messages, ids = self._prepare(prompt)
        if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens, at most {max_prompt_tokens} are taken",
                "use a shorter prompt",
            )
        border = prefix_tokens if messages is None else self._border(messages, ids)
        return self._begin(messages, ids, options, deadline, border=border)

    def resume(self, timeout_s: float | None = None) -> Iterator[Piece]:
        """Go on with the answer that was not finished when the session was saved, with the options
        it was asked with: its further pieces. `last_reply` then holds the whole of it, its `stats`
        and log-probabilities what was done since. A new prompt leaves it as it is. Raises
        UsageError when there is none.
        """
        if self._open is None or self._active is not None:
            raise UsageError("there is no answer to go on with", "give a prompt")
        begun = self._open
        deadline = Deadline(self._cancel, timeout_s)
        return self._begin(begun.messages, begun.prompt, begun.options, deadline, begun)

    def _begin(
        self,
        messages: list[dict[str, Any]] | None,
        ids: list[int],
        options: AnswerOptions,
        deadline: Deadline,
        begun: _Open | None = None,
        border: int = 0,
    ) -> Iterator[Piece]:
        """The answer to the prompt `ids`, or what is missing of one that was begun."""
        said = [] if begun is None else begun.said
        runtime = self._runtime
        reader, constraint = self._reader(messages, ids, options)
        sampler = Sampler(
            options.sampling,
            runtime._banned,
            prompt=ids,
            constraint=constraint,
            top_logprobs=options.logprobs,
        )
        if begun is not None:
            sampler.resume(begun.sampler.state(), said)
        self._cancel.clear()
        if self._pool is not None and not self._pooled:
            self._sequence = self._pool.take(ids)
            self._pooled = True
        generation = runtime._engine.generate(
            self._sequence,
            [*ids, *said],
            sampler,
            max_tokens=options.max_tokens,
            is_last=reader.add,
            cancel=self._cancel,
            stop_repeats=options.stop_repeats,
            border=border,
            answered=len(said),
        )
        opened = _Open(messages, ids, list(said), options, sampler)
        self._progress = generation.stats
        pieces = self._run(generation, reader, opened, deadline)
        self._active = pieces
        return pieces

    def _reader(
        self, messages: list[dict[str, Any]] | None, ids: list[int], options: AnswerOptions
    ) -> tuple[AnswerReader, Constraint | None]:
        """What reads the answer to a prompt, and what it must keep to. Raises UsageError."""
        model, tools = self._runtime._model, self._tools
        thinking = self._thinking(messages, ids)
        wanted = Wanted.of(
            options.json_schema,
            options.regex,
            options.tool_choice,
            options.parallel_tool_calls,
            self._constrain_tools,
        )
        constraint = None
        if wanted.needs_grammars(tools):
            constraint = wanted.constraint(self._runtime.grammars, tools, thinking)
        reader = AnswerReader(
            model.tokenizer,
            model.eos_ids,
            options.stop,
            () if options.tool_choice == "none" else tools,
            thinking == "open",
            calls_first=wanted.value is not None,
        )
        return reader, constraint

    def save(self, path: str | Path) -> None:
        """Write the conversation and everything that was processed to a file, whole or not at all.

        An answer that is suspended between two pieces is saved as far as it got; this session goes
        on with it undisturbed. Raises UsageError while it generates in another thread or when
        messages or tools hold what is no JSON, SnapshotError when it cannot be written.
        """
        if getattr(self._active, "gi_running", False):
            raise UsageError("this session is generating in another thread", "cancel it first")
        runtime, answer = self._runtime, self._open
        on_ids = self._token_ids is not None or (answer is not None and answer.messages is None)
        chat = ChatState(
            self.messages,
            list(self._tools),
            self._enable_thinking,
            self._constrain_tools,
            [*(self._token_ids or ())] if on_ids else None,
        )
        if answer is not None and answer.said:
            chat.answer = OpenAnswer(
                answer.prompt, answer.said, answer.options.to_json(), answer.sampler.state()
            )
        names = runtime._names
        with runtime._engine.turn():
            idle = runtime._engine.idle
            idle.make_room(self._sequence)
            idle.bring_back(self._sequence)  # if that fails, tokens alone are saved
            save_session(Path(path), names, chat, self._sequence)
            idle.settle(self._sequence)

    def generate(self, prompt: Prompt = None, **options: Any) -> Reply:
        """Answer `prompt` at once. Options and errors as in `stream`."""
        for _ in self.stream(prompt, **options):
            pass
        assert self._last is not None
        return self._last

    def astream(self, prompt: Prompt = None, **options: Any) -> AsyncIterator[Piece]:
        """`stream` for asyncio: the model runs in a thread, the event loop stays free.

        Cancelling the task cancels the generation and waits until it has stopped.
        """
        from mimo_edge.async_stream import in_threads

        return in_threads(self.stream(prompt, **options), self.cancel)

    def cancel(self) -> None:
        """End the running generation within a layer; from any thread or signal handler."""
        self._cancel.set()

    def stop(self) -> None:
        """Close the running stream, if any: what was generated stays, in `last_reply` too."""
        self._close_active()

    def close(self) -> None:
        """End the conversation: `stop`, and what was processed goes back to the pool it came from.
        Raises UsageError while it generates in another thread; may be repeated."""
        self._close_active()
        if self._pool is not None and self._pooled:
            self._pooled = False
            sequence, self._sequence = self._sequence, self._runtime._engine.sequence()
            self._pool.give(sequence)

    # --- inside -------------------------------------------------------------------------

    def _run(
        self, generation: Generation, reader: AnswerReader, opened: _Open, deadline: Deadline
    ) -> Generator[Piece, None, None]:
        before = (self.messages, self._token_ids)
        messages, token_ids = opened.messages, opened.said
        if messages is not None:
            self.messages = messages
        self._open, sampler = opened, opened.sampler
        logprobs: list[TokenLogprob] = []
        whole = Fragment()
        whole.add(reader.take())  # what was said before the session was saved
        failed = True
        try:
            with deadline:
                for gained in generation:
                    token_ids += gained
                    part = reader.take()
                    whole.add(part)
                    said = sampler.take_logprobs()
                    logprobs += said
                    yield _piece(part, gained, None, said)
            failed = False
        except (GeneratorExit, KeyboardInterrupt):
            failed = False  # the user has had enough: what was said stays
            raise
        finally:
            self._open = None
            if failed:
                self.messages, self._token_ids = before
            else:
                rest = reader.finish()
                whole.add(rest)
                reason = _finish_reason(generation, reader, whole, deadline)
                self._keep(reader, whole, messages, opened.prompt, token_ids)
                self._last = Reply(
                    whole.text,
                    tuple(token_ids),
                    tuple(whole.tool_calls),
                    reason,
                    generation.stats,
                    whole.reasoning,
                    tuple(whole.malformed),
                    tuple(logprobs),
                )
                with self._runtime._totals_lock:
                    self._runtime._totals.add(generation.stats)
        yield _piece(rest, [], reason, ())

    def _take_up(
        self, messages: list[dict[str, Any]], chat: ChatState, sequence: TokenSequence
    ) -> None:
        """Become the session that was saved. Raises UsageError when its answer is malformed."""
        self.messages, self._token_ids, self._sequence = messages, chat.history, sequence
        answer = chat.answer
        if answer is not None:
            options = AnswerOptions.from_json(answer.options)
            sampler = Sampler(options.sampling)
            try:
                sampler.resume(answer.sampler, ())
            except ValueError as error:
                raise UsageError(str(error)) from None
            told = None if chat.history is not None else messages
            self._open = _Open(told, answer.prompt, answer.said, options, sampler)

    def _leave_open(self, begun: _Open) -> None:
        """An answer that was not finished when the session was saved, and is not gone on with,
        stays in the history as far as it got."""
        reader, _ = self._reader(begun.messages, begun.prompt, begun.options)
        whole = Fragment()
        for token in begun.said:
            reader.add(token)
        whole.add(reader.take())
        whole.add(reader.finish())
        self._keep(reader, whole, begun.messages, begun.prompt, begun.said)

    def _keep(
        self,
        reader: AnswerReader,
        whole: Fragment,
        messages: list[dict[str, Any]] | None,
        prompt: list[int],
        token_ids: list[int],
    ) -> None:
        """Add the answer to the history, as it was written: its tokens are in the cache."""
        if messages is None:
            self._token_ids = prompt + token_ids
        elif token_ids:
            message = {"role": "assistant", "content": reader.content}
            if whole.reasoning:
                message["reasoning_content"] = whole.reasoning
            self.messages = [*messages, message]

    def _border(self, messages: list[dict[str, Any]], ids: list[int]) -> int:
        """Tokens at the start of a prompt that come from system text and tools alone."""
        borders = self._runtime._borders
        if borders is None or self._runtime._prefixes is None:
            return 0
        return borders.of(ids, messages, self._tools, self._enable_thinking)

    def _prepare(self, prompt: Prompt) -> tuple[list[dict[str, Any]] | None, list[int]]:
        """The messages with this turn added (None for raw ids) and the whole prompt's ids."""
        if _are_ids(prompt):
            if self.messages:
                raise UsageError("token ids cannot follow messages", "use a new session for ids")
            return None, [*(self._token_ids or []), *token_list(prompt)]
        self._check_texts()
        messages = messages_of(self.messages, prompt)
        model = self._runtime._model
        assert model.tokenizer is not None
        return messages, model.template.encode(
            model.tokenizer, messages, self._tools, enable_thinking=self._enable_thinking
        )

    def _thinking(self, messages: list[dict[str, Any]] | None, prompt: list[int]) -> Thinking:
        """Where the answer to a prompt begins; one to raw ids brings no reasoning of its own."""
        tokenizer = self._runtime.tokenizer
        if (
            tokenizer is None
            or messages is None
            or prompt[-1] == tokenizer.special.get(THINK_CLOSE)
        ):
            return "over"
        return "open" if prompt[-1] == tokenizer.special.get(THINK_OPEN) else "possible"

    def _check_texts(self) -> None:
        if self._runtime.tokenizer is None:
            raise TokenizerError(
                f"{self._runtime.name} has no tokenizer", "give a list of token ids"
            )
        if self._token_ids is not None:
            raise UsageError("messages cannot follow token ids", "use a new session for messages")

    def _close_active(self) -> None:
        active, self._active = self._active, None
        try:
            if active is not None:
                active.close()
        except ValueError:  # "generator already executing"
            self._active = active
            raise UsageError(
                "this session is generating in another thread", "cancel it or use another session"
            ) from None
        begun, self._open = self._open, None
        if begun is not None:
            self._leave_open(begun)


def _limits(profile: str | None, governor: bool | Sensors | None) -> Limits | None:
    """From which readings on a governor acts; None without one."""
    if governor is False or (governor is None and profile is None):
        return None
    from mimo_edge.devices.profile import AUTO, load_profile

    return Limits.of(load_profile(AUTO if profile is None else profile))


def _release_idle(pools: Iterable[SequencePool], share: float) -> int:
    """Forget that share of idle conversations; bytes of their caches."""
    return sum(pool.release(share) for pool in list(pools))


def _drop_idle(engine: Engine) -> int:
    """Put all idle conversations away, and free what ended ones left in memory; bytes. For whoever
    has the turn."""
    put = engine.idle.put_all_away()
    backend = engine.backend
    freed = backend.free_idle() if isinstance(backend, IdlingBackend) else 0
    return max(put, freed)  # what is put away is left in memory first


def _piece(
    part: Fragment,
    token_ids: Sequence[int],
    reason: FinishReason | None,
    logprobs: tuple[TokenLogprob, ...],
) -> Piece:
    calls = tuple(part.tool_calls)
    return Piece(part.text, tuple(token_ids), reason, part.reasoning, calls, logprobs)


def _finish_reason(
    generation: Generation, reader: AnswerReader, whole: Fragment, deadline: Deadline
) -> FinishReason:
    reason = generation.finish_reason or "cancelled"
    if reason == "cancelled" and deadline.passed:
        return "deadline"
    if reason == "stop" and whole.tool_calls and not reader.hit_stop:
        return "tool_calls"
    return reason


def messages_of(history: Sequence[dict[str, Any]], prompt: Prompt) -> list[dict[str, Any]]:
    """A conversation with this turn added. Raises UsageError, TokenizerError."""
    if _are_ids(prompt):
        raise UsageError("token ids are for local models", "give a text or messages")
    if prompt is None:
        turn: Sequence[Message] = ()
    elif isinstance(prompt, str):
        turn = [{"role": "user", "content": prompt}]
    else:
        turn = prompt  # type: ignore[assignment]
    messages = [*history, *check_messages(turn)]
    if not any(message["role"] != "system" for message in messages):
        raise UsageError("there is no message to answer", "give a prompt")
    return messages


def _are_ids(prompt: Prompt) -> TypeGuard[Sequence[int]]:
    """Whether a prompt is raw token ids. An empty list is neither and counts as messages."""
    if prompt is None or isinstance(prompt, (str, bytes, Mapping)):
        return False
    try:
        first = prompt[0]
    except (IndexError, TypeError, KeyError):
        return False
    return not isinstance(first, (str, Mapping)) and hasattr(first, "__index__")
