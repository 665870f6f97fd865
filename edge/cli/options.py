"""Options of the commands that open a model: one wording for each."""

from __future__ import annotations

from typing import Annotated

import typer

Draft = Annotated[str, typer.Option(help="Tokens drafted per step: 0, 1, 2, 3 or auto.")]
Ram = Annotated[str | None, typer.Option(help='Bound on memory, as "900MiB".')]
Profile = Annotated[str | None, typer.Option(help="Device profile.")]
BackendName = Annotated[
    str, typer.Option(help="ggml, onnx, reference, or auto: ggml for bundles and GGUF files.")
]
Ep = Annotated[
    str, typer.Option(help="Execution provider of the onnx backend: cpu, auto, qnn or qnn:NPU.")
]
Threads = Annotated[int | None, typer.Option(help="Threads of the computation.")]
KvType = Annotated[
    str | None,
    typer.Option(
        help="KV cache of the ggml backend: f16 (default; f32 where that is small), q8_0 or f32."
    ),
]
Pin = Annotated[
    int, typer.Option(help="Hottest experts of every layer that always stay in memory.")
]
