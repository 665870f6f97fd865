"""Runtimes over a bundle with a chosen number of expert slots."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mimo_edge.api import Runtime
from mimo_edge.bundle import Bundle
from mimo_edge.chat_template import ChatTemplate
from mimo_edge.experts.table import ExpertTable
from mimo_edge.model_source import Model
from mimo_edge.runtimes.ggml.backend import GgmlBackend
from mimo_edge.runtimes.ggml.device import Device
from mimo_edge.runtimes.ggml.expert_source import CachedExperts
from mimo_edge.runtimes.ggml.raw import GgufTensors


@contextmanager
def folder_in_memory() -> Iterator[Path]:
    """A folder on tmpfs where there is one: for tests that read the same files very often."""
    shm = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shm if os.access(shm, os.W_OK) else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def open_streamed(
    path: Path,
    slots: int | None,
    draft: Any = 0,
    *,
    bounded: bool = True,
    context: int = 256,
    **options: Any,
) -> tuple[Runtime, CachedExperts | None]:
    """A runtime over `path`, resident when `slots` is None. `bounded`: the page cache counts."""
    bundle = Bundle.open(path)
    found: list[CachedExperts] = []

    def experts(device: Device) -> CachedExperts:
        assert slots is not None
        found.append(CachedExperts(device, ExpertTable.from_bundle(bundle), slots))
        return found[0]

    backend = GgmlBackend(
        GgufTensors(
            bundle.config,
            [bundle.gguf],
            bounded=bounded,
            table_crc32=bundle.tensor_crc32("token_embd.weight"),
        ),
        threads=1,
        repack=False,
        experts=None if slots is None else experts,
        **options,
    )
    model = Model("m", backend, None, ChatTemplate(), frozenset(), found[0] if found else None)
    return Runtime(model, context, draft), (found[0] if found else None)
