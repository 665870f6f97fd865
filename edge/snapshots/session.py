"""A session as a file: the conversation, its processed tokens, and an answer that is not finished.

The conversation is in the header, apart from the caches: when those belong to another backend,
cache format or build of the model, or are damaged, it can still be taken up, and its tokens are
processed again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mimo_edge.atomic_file import sweep, writing
from mimo_edge.engine import Engine
from mimo_edge.errors import ContextLengthError, SnapshotError, SnapshotMismatchError
from mimo_edge.sequence import Sequence
from mimo_edge.snapshots.file import Section, SnapshotFile, as_bytes, count, encode_header, write
from mimo_edge.snapshots.sequence import capture, place

_log = logging.getLogger(__name__)

KIND = "session"
_HISTORY, _ANSWER = "history", "answer"


@dataclass(frozen=True)
class ModelNames:
    """What names a model: its weights, and what its token ids mean."""

    weights: str
    vocabulary: str


@dataclass
class OpenAnswer:
    """An answer that is not finished: the prompt and what was said so far, as token ids, the
    options it was asked with, and the state of the sampler after that."""

    prompt: list[int]
    said: list[int]
    options: dict[str, Any]
    sampler: dict[str, Any]


@dataclass
class ChatState:
    """A conversation as the session knows it. `history` is set when it runs on token ids alone."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[Mapping[str, Any]] = field(default_factory=list)
    enable_thinking: bool | None = None
    constrain_tools: bool | None = None
    history: list[int] | None = None
    answer: OpenAnswer | None = None


def save_session(path: Path, names: ModelNames, chat: ChatState, sequence: Sequence) -> int:
    """Write a session, whole or not at all; its bytes. The caller has the turn.

    Raises SnapshotError when it cannot be written, or holds values that are no JSON."""
    captured = capture(sequence)
    sections = [*captured.sections]
    answer = None
    if chat.history is not None:
        sections.append(_ids(_HISTORY, chat.history))
    if chat.answer is not None:
        sections.append(_ids(_ANSWER, [*chat.answer.prompt, *chat.answer.said]))
        answer = {
            "said": len(chat.answer.said),
            "options": chat.answer.options,
            "sampler": chat.answer.sampler,
        }
    state = {
        "vocabulary": names.vocabulary,
        "messages": chat.messages,
        "tools": list(chat.tools),
        "enable_thinking": chat.enable_thinking,
        "constrain_tools": chat.constrain_tools,
        "on_ids": chat.history is not None,
        "answer": answer,
        "sequence": captured.state,
    }
    header = encode_header(KIND, names.weights, state, sections)
    try:
        sweep(path.parent, path.name)
        with writing(path) as file:
            write(file, header, sections)
    except OSError as error:
        raise SnapshotError(
            f"the session cannot be saved to {path}: {error.strerror or error}",
            "nothing was changed there: make room, or save elsewhere",
        ) from error
    return len(header) + sum(section.nbytes for section in sections)


def restore_session(
    path: Path, names: ModelNames, engine: Engine, recompute: bool
) -> tuple[ChatState, Sequence]:
    """What `save_session` wrote. The caller has the turn.

    With `recompute` the caches may be another model's, of another layout, or damaged: the sequence
    is then empty. Raises SnapshotError on damage, SnapshotMismatchError, ContextLengthError when
    the conversation has more tokens than the context.
    """
    sequence = engine.sequence()
    with SnapshotFile(path) as file:
        if file.kind != KIND:
            raise SnapshotMismatchError(f"{path} is no saved session, but a snapshot ({file.kind})")
        if file.state.get("vocabulary") != names.vocabulary:
            raise SnapshotMismatchError(
                f"{path} is of a model with another vocabulary: its tokens mean nothing here",
                "open the model it was saved with",
            )
        chat = _read_chat(file)
        held = file.state.get("sequence")
        if not isinstance(held, dict):
            file.fail("it holds no sequence")
        tokens = max(len(chat.history or ()), count(held.get("tokens"), file, "the tokens"))
        if tokens > engine.context:
            raise ContextLengthError(
                f"{path} holds a conversation of {tokens} tokens, the context has {engine.context}",
                "open the model with a larger context",
            )
        try:
            if file.model != names.weights:
                raise SnapshotMismatchError(
                    f"{path} was saved with other weights ({file.model[:12]}, here "
                    f"{names.weights[:12]})",
                    "open that model, or restore with recompute=True",
                )
            place(engine, sequence, held, file)
        except SnapshotError as error:
            if not recompute:
                raise
            _log.warning("%s; its tokens will be processed again", error.message)
    return chat, sequence


def _read_chat(file: SnapshotFile) -> ChatState:
    state = file.state
    wanted: dict[str, Any] = {
        "messages": list,
        "tools": list,
        "enable_thinking": (bool, type(None)),
        "constrain_tools": (bool, type(None)),
        "on_ids": bool,
        "answer": (dict, type(None)),
    }
    for key, kind in wanted.items():
        if key not in state or not isinstance(state[key], kind):
            file.fail(f"{key} of the conversation is missing or malformed")
    chat = ChatState(
        state["messages"], state["tools"], state["enable_thinking"], state["constrain_tools"]
    )
    if not all(isinstance(one, dict) for one in (*chat.messages, *chat.tools)):
        file.fail("messages or tools are no objects")
    if state["on_ids"]:
        chat.history = _read_ids(_HISTORY, file)
    answer = state["answer"]
    if answer is not None:
        if set(answer) != {"said", "options", "sampler"}:
            file.fail("its unfinished answer is described otherwise")
        if not isinstance(answer["options"], dict) or not isinstance(answer["sampler"], dict):
            file.fail("its unfinished answer is malformed")
        ids, said = _read_ids(_ANSWER, file), count(answer["said"], file, "tokens of the answer")
        if not 0 < said < len(ids):
            file.fail(f"an answer of {said} of {len(ids)} tokens")
        chat.answer = OpenAnswer(ids[:-said], ids[-said:], answer["options"], answer["sampler"])
    return chat


def _ids(name: str, ids: list[int]) -> Section:
    return Section(name, (as_bytes(np.asarray(ids, np.int64), "<i4"),))


def _read_ids(name: str, file: SnapshotFile) -> list[int]:
    data = file.read(name)
    if len(data) % 4:
        file.fail(f"section {name!r} has {len(data)} bytes")
    found: list[int] = data.view("<i4").tolist()
    return found
