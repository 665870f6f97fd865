"""A conversation with a model on this machine: its messages and options, streamed answers, cancel,
and what is saved of it."""

from __future__ import annotations

from collections.abc import (
    Generator,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_edge.answer_options import AnswerOptions
from mimo_edge.answer_reader import THINK_CLOSE, THINK_OPEN, AnswerReader, Fragment
from mimo_edge.cancel import Cancel
from mimo_edge.chat_template import check_messages
from mimo_edge.conversation import Conversation
from mimo_edge.deadline import Deadline
from mimo_edge.engine import Generation, GenerationStats, token_list
from mimo_edge.errors import ContextLengthError, TokenizerError, UsageError
from mimo_edge.logprobs import TokenLogprob
from mimo_edge.reply import (
    DEFAULT_MAX_TOKENS,
    FinishReason,
    Piece,
    Prompt,
    Reply,
    are_ids,
    messages_of,
)
from mimo_edge.sampling import Constraint, Sampler
from mimo_edge.sequence import Sequence as TokenSequence
from mimo_edge.sequence_pool import SequencePool
from mimo_edge.snapshots.session import (
    ChatState,
    OpenAnswer,
    save_session,
)
from mimo_edge.structured.wanted import Wanted
from mimo_edge.tool_calls import tool_schemas

if TYPE_CHECKING:
    from mimo_edge.api import Runtime
    from mimo_edge.structured.answers import Thinking


@dataclass(frozen=True)
class _Open:
    """An answer that is not finished. `said` grows, and `sampler` is behind it."""

    messages: list[dict[str, Any]] | None
    prompt: list[int]
    said: list[int]
    options: AnswerOptions
    sampler: Sampler


class Session(Conversation):
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
        super().__init__(system)
        self._runtime = runtime
        self._tools = tuple(tools)
        self._enable_thinking = enable_thinking
        self._constrain_tools = constrain_tools
        self._sequence = runtime._engine.sequence()
        self._pool = pool
        self._pooled = False  # whether the sequence is one the pool counts
        self._cancel = Cancel()
        self._open: _Open | None = None  # what is being said, or was when the session was saved
        self._token_ids: list[int] | None = None  # set once a session runs on raw ids
        self._progress: GenerationStats | None = None

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
        self.stop()
        messages, ids = self._prepare(prompt)
        if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens, at most {max_prompt_tokens} are taken",
                "use a shorter prompt",
            )
        ids = self._runtime._engine.checked(ids)
        border = self._border(messages, ids, prefix_tokens)
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

    def cancel(self) -> None:
        """End the running generation within a layer; from any thread or signal handler."""
        self._cancel.set()

    def stop(self) -> None:
        """Close the running stream, if any: what was generated stays, in `last_reply` too."""
        super().stop()
        begun, self._open = self._open, None
        if begun is not None:
            self._leave_open(begun)

    def close(self) -> None:
        """End the conversation: `stop`, and what was processed goes back to the pool it came from.
        Raises UsageError while it generates in another thread; may be repeated."""
        self.stop()
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

    def _border(
        self, messages: list[dict[str, Any]] | None, ids: list[int], prefix_tokens: int
    ) -> int:
        """Tokens at the start of a prompt that come from system text and tools alone, or are said
        to be shared. Raises UsageError."""
        if isinstance(prefix_tokens, bool) or not isinstance(prefix_tokens, int):
            raise UsageError(f"prefix_tokens = {prefix_tokens!r} is not a count")
        if prefix_tokens < 0 or (prefix_tokens and messages is not None):
            raise UsageError(
                f"prefix_tokens = {prefix_tokens}",
                "give a count, and only with token ids: messages show their border themselves",
            )
        if messages is None:
            return prefix_tokens
        borders = self._runtime._borders
        if borders is None or self._runtime._prefixes is None:
            return 0
        return borders.of(ids, messages, self._tools, self._enable_thinking)

    def _prepare(self, prompt: Prompt) -> tuple[list[dict[str, Any]] | None, list[int]]:
        """The messages with this turn added (None for raw ids) and the whole prompt's ids."""
        if are_ids(prompt):
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
