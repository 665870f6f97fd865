"""Evaluate a model on a suite: the built-in commands, or any text, against its source."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mimo_edge.api import Runtime
from mimo_edge.errors import TokenizerError, UsageError
from mimo_edge.evaluate import (
    MAX_ANSWER_TOKENS,
    CommandQuality,
    TextChunk,
    TextQuality,
    answer_chunks,
    evaluate_commands,
    evaluate_text,
    split_chunks,
)
from mimo_edge.manifest import MANIFEST_NAME, Manifest
from mimo_edge.model_source import BUILT_IN, Model, open_model
from mimo_edge.nano import commands as nano
from mimo_edge.provider_request import ProviderRequest
from mimo_edge.speculative import DraftSetting, check_draft, max_draft
from mimo_edge.text_file import path_exists, read_text
from mimo_edge.tokenizer import Tokenizer

NANO_COMMANDS = "nano-commands"
CHUNK_TOKENS = 512
# What backends may plan their memory for.
CONTEXT = 4096
# Text beyond this is not read; a million tokens say no more than the first hundred thousand.
_MAX_TEXT_BYTES = 32 << 20

_T = TypeVar("_T")

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, in all)."""


@dataclass(frozen=True)
class Report:
    """What was measured. `against` names the source, None when there was none to compare with;
    `commands` is there for suites of commands."""

    model: str
    suite: str
    against: str | None
    text: TextQuality
    commands: CommandQuality | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "model": self.model,
            "suite": self.suite,
            "against": self.against,
            "text": self.text.to_dict(),
            "commands": None if self.commands is None else self.commands.to_dict(),
        }


def evaluate_model(
    model: str | Path,
    suite: str | Path = NANO_COMMANDS,
    *,
    against: str | Path | None = None,
    limit: int | None = None,
    draft: DraftSetting | None = None,
    backend: str = "auto",
    ep: str = "auto",
    ep_library: str | Path | None = None,
    ep_options: Mapping[str, str] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Evaluate a bundle, GGUF file or checkpoint on "nano-commands" or the text file `suite`.

    `against` is the checkpoint it came from, always run by the reference backend; a bundle of
    the built-in model finds it by itself. `limit`: only so many commands, spread over the set, or
    so many chunks of 512 tokens. `draft` as in Runtime.open, None: as many as the model has.

    Raises UsageError for a suite that cannot be used with this model, TokenizerError without a
    tokenizer, and what opening a model raises.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit = {limit}", "use 1 or more")
    library = None if ep_library is None else Path(ep_library)
    provider = ProviderRequest(ep, library, ep_options or {})
    if against is None:
        against = _built_in_source(model)
    # Text is read before any model is opened: a wrong path should not take minutes to say so.
    content = None
    if str(suite) != NANO_COMMANDS:
        if not path_exists(suite):
            raise UsageError(f"there is no suite or text file {suite}", f"try {NANO_COMMANDS}")
        content = read_text(suite, _MAX_TEXT_BYTES, "text")

    def stage(name: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(name, done, total)

    opened: list[Model] = []
    try:
        opened.append(candidate := open_model(model, backend, None, CONTEXT, threads, ep=provider))
        if draft is not None:
            check_draft(draft, candidate.backend.config)
        source = None
        if against is not None:
            opened.append(source := open_model(against, "reference", None, CONTEXT, threads))
        tokenizer = candidate.tokenizer
        if tokenizer is None:
            raise TokenizerError(
                f"{candidate.name} has no tokenizer, so no text can be evaluated",
                "put the model's tokenizer.json beside it",
            )
        asked: list[dict[str, Any]] = []
        if content is None:
            asked = spread(nano.held_out(), limit)
            chunks = answer_chunks(tokenizer, candidate.template, asked, nano.TOOLS)
        else:
            length = min(CHUNK_TOKENS, candidate.backend.config.max_position_embeddings)
            chunks = split_chunks(tokenizer.encode(content, allow_special=True), length)[:limit]
        if source is not None and source.tokenizer is not None:
            _check_same_tokenizer(tokenizer, source.tokenizer, chunks, source.name)
        text = evaluate_text(
            None if source is None else source.backend,
            candidate.backend,
            chunks,
            progress=stage("text"),
        )
        commands = None
        if asked:
            config = candidate.backend.config
            most = max(len(chunk.token_ids) for chunk in chunks) + MAX_ANSWER_TOKENS
            runtime = Runtime(
                candidate,
                min(most, config.max_position_embeddings),
                max_draft(config) if draft is None else draft,
            )
            commands = evaluate_commands(runtime, asked, nano.TOOLS, progress=stage("commands"))
    finally:
        for each in opened:
            each.backend.close()
    return Report(
        candidate.name, Path(suite).name, None if source is None else source.name, text, commands
    )


def spread(commands: Sequence[_T], limit: int | None) -> list[_T]:
    """`limit` of the commands in their order, always the same ones. The set is sorted by language,
    domain and kind in a fixed rhythm, so they are picked by a seeded draw, not at intervals."""
    if limit is None or limit >= len(commands):
        return list(commands)
    return [commands[i] for i in sorted(random.Random(0).sample(range(len(commands)), limit))]


def _built_in_source(model: str | Path) -> str | None:
    """The built-in checkpoint, when `model` is a bundle that was made from it."""
    folder = Path(model)
    if not path_exists(folder / MANIFEST_NAME):
        return None
    # Only this comparison needs the exporter's reader.
    from mimo_edge.export.checkpoint import Checkpoint

    with Checkpoint.open(nano.checkpoint_dir()) as checkpoint:
        same = Manifest.read(folder).source_index_sha256 == checkpoint.index_sha256
    return BUILT_IN if same else None


def _check_same_tokenizer(
    ours: Tokenizer, theirs: Tokenizer, chunks: Sequence[TextChunk], name: str
) -> None:
    """The source must read the same ids as the same text, or the comparison means nothing."""
    ids = chunks[0].token_ids.tolist()
    if ours.decode(ids) != theirs.decode(ids):
        raise UsageError(
            f"{name} has another tokenizer than the model that is evaluated",
            "compare with the checkpoint it was made from",
        )
