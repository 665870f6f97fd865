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
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_edge.agent import MAX_STEPS, Agent, Step, make_agent
from mimo_edge.chat_template import check_messages
from mimo_edge.config import MimoConfig
from mimo_edge.engine import PREFILL_CHUNK, Engine
from mimo_edge.errors import SnapshotError, TokenizerError, UsageError
from mimo_edge.governor.events import EventLog
from mimo_edge.governor.limits import Limits
from mimo_edge.governor.slots import SlotShares
from mimo_edge.identity import vocabulary_identity
from mimo_edge.idle import IdleCaches
from mimo_edge.kv_format import DEFAULT_KV_TYPE
from mimo_edge.machine import peak_rss_bytes, usable_cores
from mimo_edge.model_source import Model, open_model
from mimo_edge.prompt_border import PromptBorders
from mimo_edge.provider_request import ProviderRequest
from mimo_edge.runtimes.base import F32, IdlingBackend, ThreadedBackend
from mimo_edge.sampling import Mask
from mimo_edge.sequence_pool import SequencePool
from mimo_edge.session import Session
from mimo_edge.snapshots.prefixes import PrefixSnapshots
from mimo_edge.snapshots.session import (
    ModelNames,
    restore_session,
)
from mimo_edge.snapshots.spill import SpillToDisk
from mimo_edge.snapshots.store import DEFAULT_BYTES, SnapshotStore
from mimo_edge.speculative import DraftSetting, max_draft
from mimo_edge.tokenizer import Tokenizer
from mimo_edge.tool_functions import Tool
from mimo_edge.totals import Totals
from mimo_edge.units import parse_bytes

if TYPE_CHECKING:
    from mimo_edge.governor import Governor, Sensors
    from mimo_edge.remote.address import Connection
    from mimo_edge.remote.runtime import RemoteRuntime
    from mimo_edge.structured.grammars import Grammars

DEFAULT_CONTEXT = 4096


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
        ep_library: str | Path | None = None,
        ep_options: Mapping[str, str] | None = None,
    ) -> Runtime:
        """Open a bundle folder, a bare GGUF file or a Hugging Face checkpoint folder.

        `profile` is the name or file of a device profile ("auto": this machine); it decides what
        is not given of `ram`, `context`, `threads` and `kv_type`, and `draft` when that is "auto".
        `backend` "auto" is "ggml" for bundles and GGUF files, "reference" for checkpoints; "onnx"
        takes the ONNX form of a bundle, on the execution provider `ep`: "cpu", "qnn", or
        "qnn:v73" when a bundle has graphs for several NPUs and the profile names none of them;
        "auto" takes the device's own NPU where the bundle has graphs for it, else the CPU, and
        `stats` says why. `ep_library` is the file of a plug-in, whose provider `ep` then names, and
        `ep_options` are options of a provider, over those of the profile. `ram` is
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
        library = None if ep_library is None else Path(ep_library)
        provider = ProviderRequest(ep, library, ep_options or {})
        limits = _limits(profile, governor)
        if profile is not None:
            from mimo_edge.devices.profile import load_profile

            device = load_profile(profile)
            usual_context, prefer_kv_type = device.context, device.kv_type
            limit = device.process_bytes if limit is None else limit
            # A profile may be tried out on a machine with fewer cores.
            threads = min(device.threads, usable_cores()) if threads is None else threads
            draft = device.draft if draft == "auto" else draft
            provider = replace(
                provider, profile_options=device.npu_options, targets=device.npu_targets
            )
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
            ep=provider,
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

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_store(folder: str | Path | None, limit_bytes: int | str | None) -> SnapshotStore | None:
    if folder is None:
        if limit_bytes is not None:
            raise UsageError("snapshot_bytes without snapshots", "name a folder for them")
        return None
    limit = DEFAULT_BYTES if limit_bytes is None else parse_bytes(limit_bytes)
    return SnapshotStore(Path(folder), limit)


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
