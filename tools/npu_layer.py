"""Compile one layer of real width for an NPU and run it on the emulator: size, times, deviations.

    python tools/npu_layer.py --model MiMo-V2-Flash --layer 1 --npu v79

Weights are random, so nothing is said about quality. The table in docs/npu.md comes from here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mimo_edge.config import MimoConfig
from mimo_edge.export.onnx.activations import Activations, Meter
from mimo_edge.export.onnx.npu_compile import Compiler, NpuPlan
from mimo_edge.export.onnx.npu_graphs import decoder_shard
from mimo_edge.gguf_meta import expected_shapes
from mimo_edge.known_models import known_model
from mimo_edge.npu_io import DECODE_TOKENS, NpuComponent, Shape
from mimo_edge.onnx_io import shards
from mimo_edge.runtimes.base import F32
from mimo_edge.runtimes.onnx.qnn_targets import target

ROWS = 1024  # cache length of a global layer


class RandomRows:
    """Random weights of a model, the same for the same name; vectors are around 1."""

    def __init__(self, config: MimoConfig) -> None:
        self._shapes = expected_shapes(config)

    def rows(self, name: str, start: int, stop: int) -> F32:
        """See export/onnx/graph.RowReader."""
        shape = self._shapes[name]
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if len(shape) == 1:
            made: F32 = (1 + 0.1 * rng.standard_normal((1, *shape))).astype(np.float32)
            return made
        scale = np.float32(shape[-1] ** -0.5)
        return (rng.standard_normal(shape, dtype=np.float32) * scale)[start:stop]


def measure(model: str, layer: int, npu: str, precision: str, folder: Path) -> dict[str, Any]:
    """Compile decoder layer `layer` for single tokens, check it, and say what that took."""
    config = known_model(model)
    chip = target(npu)
    name = next(s.name for s in shards(config, 1) if s.layers == (layer,))
    whole = decoder_shard(config, name, (layer,), (ROWS,))
    single = replace(whole, shapes=tuple(s for s in whole.shapes if s.tokens == DECODE_TOKENS))
    reader = RandomRows(config)
    meter = Meter(config, single, reader, folder / "measure")
    rows = np.random.default_rng(0).standard_normal((64, config.hidden_size), dtype=np.float32)
    meter.context({"h": rows})
    ranges, sample = meter.close()
    found = Activations({name: ranges}, {name: sample}, {})
    plan = NpuPlan(config, (chip,), precision, (ROWS,), 1)  # type: ignore[arg-type]
    compiler = Compiler(plan, chip, reader, found, folder / "made", folder / "work")
    start = time.perf_counter()
    try:
        parts: list[NpuComponent] = compiler.component(single)
    finally:
        compiler.close()
    seconds = time.perf_counter() - start
    shape = Shape(DECODE_TOKENS, ROWS if not config.layer(layer).sliding else 0)
    files = parts[0].files[shape]
    place = folder / "made" / name / chip.variant
    return {
        "model": model,
        "layer": layer,
        "npu": chip.name,
        "precision": parts[0].precision,
        "reason": parts[0].reason,
        "context_bytes": sum((place / file).stat().st_size for file in files),
        "matrix_parameters": _parameters(config, layer),
        "pack_compile_check_s": round(seconds, 1),
    }


def _parameters(config: MimoConfig, layer: int) -> int:
    """Of the layer's matrices that the NPU multiplies."""
    total = 0
    for name, shape in expected_shapes(config).items():
        mine = name.startswith(f"blk.{layer}.") and len(shape) == 2 and "_exps" not in name
        fused = "attn_qkv" in name
        total += int(np.prod(shape)) if mine and not fused else 0
    return total


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="MiMo-V2-Flash")
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--npu", default="v79")
    parser.add_argument("--precision", choices=("int4", "fp16"), default="int4")
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="npu-layer-"))
    try:
        found = measure(options.model, options.layer, options.npu, options.precision, folder)
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
