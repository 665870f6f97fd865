"""Streams for asyncio: each step runs in a thread, the event loop stays free."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


async def in_threads(pieces: Iterator[T], cancel: Callable[[], None]) -> AsyncIterator[T]:
    """The pieces of a generator. Cancelling the task calls `cancel` and waits until the step that
    runs has ended."""
    try:
        while True:
            step = asyncio.ensure_future(asyncio.to_thread(next, pieces, None))
            try:
                piece = await asyncio.shield(step)
            except asyncio.CancelledError:
                cancel()
                await _settled(step)
                raise
            if piece is None:
                return
            yield piece
    finally:
        pieces.close()  # type: ignore[attr-defined]


async def _settled(step: asyncio.Future[T | None]) -> None:
    """Wait for a step that runs in a thread, however often this task is cancelled meanwhile:
    its generator cannot be closed before. An error of a step nobody waits for is dropped."""
    while not step.done():
        try:
            await asyncio.wait([step])
        except asyncio.CancelledError:
            continue
    step.exception()
