"""What runs in a process of its own (isolated.py): compiling a graph for an NPU, and trying a
compiled one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimo_edge.errors import ProviderError
from mimo_edge.runtimes.onnx.qnn import Qnn
from mimo_edge.runtimes.onnx.qnn_targets import target

Arrays = dict[str, NDArray[Any]]

BINARY_SUFFIX = "_qnn.bin"


def compile_graph(source: str, made: str, npu: str) -> list[str]:
    """Compile the graph `source` for `npu` into the EPContext model `made` and a binary beside it;
    the names of both files. Raises ProviderError when a node is refused or the compiler fails."""
    path = Path(made)
    Qnn().open_session(
        Path(source),
        target(npu),
        config={
            "ep.context_enable": "1",
            "ep.context_file_path": made,
            "ep.context_embed_mode": "0",
        },
    )
    files = [path, path.with_name(path.stem + BINARY_SUFFIX)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ProviderError(f"the compiler wrote no {missing[0]}")
    return [file.name for file in files]


def run_compiled(
    model: str, npu: str | None, feeds: list[Arrays], qnn: Qnn | None = None
) -> list[Arrays]:
    """Load a compiled graph, all of it on the NPU, and run it on each of `feeds`. Raises
    ProviderError when it does not load or run."""
    chosen, chip = qnn or Qnn(), None if npu is None else target(npu)
    session = chosen.open_session(Path(model), chip)
    names = [output.name for output in session.get_outputs()]
    wanted = {found.name for found in session.get_inputs()}
    with chosen.plugin(chip).errors("run"):
        return [
            dict(
                zip(
                    names,
                    map(np.asarray, session.run(None, {n: feed[n] for n in wanted})),
                    strict=True,
                )
            )
            for feed in feeds
        ]
