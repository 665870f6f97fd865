"""The importance matrix stock llama.cpp measures, collected as tools/imatrix/imatrix.cpp does.

A callback sees every operation of the graph; the inputs of matrix products are squared and
summed by weight (and by expert). In a process of its own because ggml aborts on asserts.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Tensor(ctypes.Structure):
    """struct ggml_tensor of llama.cpp:ggml/include/ggml.h, as far as it is read here."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


def measure(model: Path, chunks: Sequence[Sequence[int]]) -> dict[str, NDArray[Any]]:
    """`NAME.sums` f64 [matrices, cols] and `NAME.counts` i64 [matrices] over all chunks."""
    with tempfile.TemporaryDirectory() as folder:
        request: dict[str, Any] = {"model": str(model), "out": folder + "/out.npz"}
        request |= {"chunks": [list(map(int, ids)) for ids in chunks]}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "GGML_NO_BACKTRACE": "1", "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-1500:]
        with np.load(folder + "/out.npz") as arrays:
            return dict(arrays)


def _values(tensor: Any, dtype: Any) -> NDArray[Any]:
    """The elements, slowest dimension first, through the tensor's own strides."""
    size = sum(n * b for n, b in zip(list(tensor.ne), list(tensor.nb), strict=True))
    raw = np.frombuffer((ctypes.c_uint8 * size).from_address(tensor.data), np.uint8)
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    return np.lib.stride_tricks.as_strided(raw[: raw.size // 4 * 4].view(dtype), shape, strides)


def _main() -> None:
    import llama_cpp as lc
    from llama_cpp import _ggml

    op_name = _ggml.libggml.ggml_op_name
    op_name.restype, op_name.argtypes = ctypes.c_char_p, [ctypes.c_int]
    request = json.loads(sys.stdin.read())
    sums: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, NDArray[np.int64]] = {}

    def add(name: str, matrix: int, matrices: int, rows: NDArray[Any]) -> None:
        sums.setdefault(name, np.zeros((matrices, rows.shape[-1])))
        counts.setdefault(name, np.zeros(matrices, np.int64))
        sums[name][matrix] += (rows.astype(np.float64) ** 2).sum(axis=0)
        counts[name][matrix] += len(rows)

    def collect(pointer: int, ask: bool, _: Any) -> bool:
        tensor = ctypes.cast(pointer, ctypes.POINTER(Tensor))[0]
        op = op_name(tensor.op)
        if op not in (b"MUL_MAT", b"MUL_MAT_ID"):
            return not ask
        weight, x = tensor.src[0][0], tensor.src[1][0]
        name = weight.name.decode()
        if not name.endswith(".weight") or x.type != 0:
            return not ask
        if ask:
            return True
        inputs = _values(x, np.float32)  # [1, T, experts used or 1, cols]
        if op == b"MUL_MAT":
            add(name, 0, 1, inputs.reshape(-1, inputs.shape[-1]))
            return True
        ids = _values(tensor.src[2][0], np.int32)[0, 0]  # [T, K]
        for token, chosen in enumerate(ids):
            for slot, expert in enumerate(chosen):
                row = inputs[0, token, slot % inputs.shape[2]]
                add(name, int(expert), weight.ne[2], row[None])
        return True

    callback = lc.ggml_backend_sched_eval_callback(collect)
    lc.llama_backend_init()
    params = lc.llama_model_default_params()
    params.n_gpu_layers = 0
    model = lc.llama_model_load_from_file(request["model"].encode(), params)
    if not model:
        sys.exit("the model does not load")
    for ids in request["chunks"]:
        settings = lc.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = max(64, len(ids) + 8)
        settings.n_threads = settings.n_threads_batch = 1
        settings.type_k = settings.type_v = 0
        settings.flash_attn_type = 0
        settings.cb_eval = callback
        context = lc.llama_init_from_model(model, settings)
        batch = lc.llama_batch_init(len(ids), 0, 1)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        batch.n_tokens = len(ids)
        if lc.llama_decode(context, batch):
            sys.exit("llama_decode failed")
        lc.llama_free(context)
    out: dict[str, Any] = {name + ".sums": values for name, values in sums.items()}
    out |= {name + ".counts": values for name, values in counts.items()}
    np.savez(request["out"], **out)
    os._exit(0)  # the process ends here; freeing everything first only costs time


if __name__ == "__main__":
    _main()
