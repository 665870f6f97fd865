"""Stock llama.cpp on a GGUF file, in a process of its own because ggml aborts on asserts.

`run(model, ...)` returns arrays: "logits" f32 [T, V] of every position, "mtp<k>" f32 [T-1-k, V]
of MTP block k fed with the target's hidden states, "tokens<i>" ids of text i.
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


class LlamaCppError(Exception):
    """llama.cpp refused the file or crashed; the message is the end of its log."""


def run(
    model: Path,
    ids: Sequence[int] | NDArray[np.integer[Any]] = (),
    *,
    batch: int = 0,
    mtp: Sequence[int] = (),
    texts: Sequence[str] = (),
) -> dict[str, NDArray[Any]]:
    """Load `model`, tokenise `texts`, decode `ids` in batches of `batch` (0: all at once)."""
    with tempfile.TemporaryDirectory() as folder:
        request = {"model": str(model), "ids": list(map(int, ids)), "batch": batch}
        request |= {"mtp": list(mtp), "texts": list(texts), "out": folder + "/out.npz"}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "GGML_NO_BACKTRACE": "1", "OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            raise LlamaCppError(f"exit {done.returncode}: {done.stderr[-1500:]}")
        with np.load(folder + "/out.npz") as arrays:
            return dict(arrays)


def _main() -> None:
    import llama_cpp as lc
    from llama_cpp import llama_cpp_ext as ext

    request = json.loads(sys.stdin.read())
    ids: list[int] = request["ids"]
    out: dict[str, NDArray[Any]] = {}
    lc.llama_backend_init()
    params = lc.llama_model_default_params()
    params.n_gpu_layers = 0
    params.check_tensors = True
    params.load_mtp = bool(request["mtp"])
    model = lc.llama_model_load_from_file(request["model"].encode(), params)
    if not model:
        sys.exit("the model does not load")
    vocab = lc.llama_model_get_vocab(model)
    n_vocab, width = lc.llama_vocab_n_tokens(vocab), lc.llama_model_n_embd(model)
    for i, text in enumerate(request["texts"]):
        data = text.encode()
        buffer = (lc.llama_token * (len(data) + 8))()
        count = lc.llama_tokenize(vocab, data, len(data), buffer, len(buffer), False, True)
        out[f"tokens{i}"] = np.array(buffer[:count], np.int64)

    def context(kind: int) -> Any:
        settings = lc.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = max(64, len(ids) + 8)
        settings.n_threads = settings.n_threads_batch = 1
        settings.type_k = settings.type_v = 0  # F32: compare models, not cache formats
        settings.flash_attn_type = 0
        settings.ctx_type = kind
        made = lc.llama_init_from_model(model, settings)
        if not made:
            sys.exit("no context")
        return made

    def decode(ctx: Any, tokens: list[int], start: int, hidden: Any = None) -> None:
        batch = lc.llama_batch_init(len(tokens), width if hidden is not None else 0, 1)
        keep = (lc.llama_token * len(tokens))(*tokens)
        if hidden is not None:
            batch.token = keep  # allocated for embeddings only; this graph reads both
            ctypes.memmove(batch.embd, hidden.ctypes.data, hidden.nbytes)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = start + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = 1
        batch.n_tokens = len(tokens)
        if lc.llama_decode(ctx, batch):
            sys.exit("llama_decode failed")

    def logits(ctx: Any, rows: int) -> NDArray[np.float32]:
        values = lc.llama_get_logits(ctx)
        return np.ctypeslib.as_array(values, (rows, n_vocab)).copy()

    if ids:
        target = context(0)
        if request["mtp"]:
            ext.llama_set_embeddings_nextn(target, True, False)
        parts, states = [], []
        step = request["batch"] or len(ids)
        for start in range(0, len(ids), step):
            piece = ids[start : start + step]
            decode(target, piece, start)
            parts.append(logits(target, len(piece)))
            if request["mtp"]:
                values = ext.llama_get_embeddings_nextn(target)
                states.append(np.ctypeslib.as_array(values, (len(piece), width)).copy())
        out["logits"] = np.concatenate(parts)
        for k in request["mtp"]:
            drafter = context(lc.LLAMA_CONTEXT_TYPE_MTP)
            ext.llama_set_nextn_layer_offset(drafter, k)
            rows = len(ids) - 1 - k
            hidden = np.ascontiguousarray(np.concatenate(states)[:rows])
            decode(drafter, ids[1 + k :], 0, hidden)
            out[f"mtp{k}"] = logits(drafter, rows)
    np.savez(request["out"], allow_pickle=False, **out)
    sys.stdout.flush()
    os._exit(0)  # the process ends here; freeing everything first only costs time


if __name__ == "__main__":
    _main()
