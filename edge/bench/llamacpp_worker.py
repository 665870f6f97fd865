"""One case on stock llama.cpp, through the C interface of the installed llama-cpp-python.

What llama-bench would do: file mapped into memory, batches of 2,048 in micro-batches of 512,
flash attention as it decides, f16 cache, sliding caches of the window's size. `repack` is its
reordering of weights at load: its default, but it needs the weights in memory a second time.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from mimo_edge.errors import BackendError
from mimo_edge.machine import peak_rss_bytes, storage_read_bytes

BATCH = 2048
MICRO_BATCH = 512
_CACHE_TYPES = {"f32": 0, "f16": 1, "q8_0": 8}  # enum ggml_type


class LlamaCpp:
    """A model and one context of it."""

    def __init__(
        self, path: str, *, context: int, threads: int, repack: bool, kv_type: str
    ) -> None:
        """Raises BackendError when llama.cpp is missing or does not take the file."""
        try:
            import llama_cpp
            from llama_cpp import llama_cpp as lc
        except ImportError as error:
            raise BackendError(
                f"llama.cpp cannot be loaded: {error}", "pip install llama-cpp-python==0.3.36"
            ) from error
        self._lc: Any = lc
        # Its log would drown ours; what it says on a refusal is worth keeping.
        self._said: list[str] = []
        self._callback = lc.llama_log_callback(self._log)
        lc.llama_log_set(self._callback, None)
        lc.llama_backend_init()
        params = lc.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = lc.LLAMA_LOAD_MODE_MMAP
        params.use_extra_bufts = repack
        began = time.perf_counter()
        self._model = lc.llama_model_load_from_file(path.encode(), params)
        if not self._model:
            raise BackendError(f"llama.cpp does not load {path}: {self._last_words()}")
        made = lc.llama_context_default_params()
        made.n_ctx = context
        made.n_batch = min(context, BATCH)
        made.n_ubatch = min(context, MICRO_BATCH)
        made.n_threads = made.n_threads_batch = threads
        made.type_k = made.type_v = _CACHE_TYPES[kv_type]
        made.swa_full = False
        self._context = lc.llama_init_from_model(self._model, made)
        if not self._context:
            raise BackendError(f"llama.cpp makes no context: {self._last_words()}")
        self.load_s = time.perf_counter() - began
        self._batch_size = int(made.n_batch)
        self._batch = lc.llama_batch_init(self._batch_size, 0, 1)
        self._vocab = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(self._model))
        self.settings = {
            "version": llama_cpp.__version__,
            "system": lc.llama_print_system_info().decode().strip(),
            "mmap": True,
            "repack": repack,
            "threads": threads,
            "n_ctx": int(lc.llama_n_ctx(self._context)),
            "n_batch": int(lc.llama_n_batch(self._context)),
            "n_ubatch": int(lc.llama_n_ubatch(self._context)),
            "flash_attention": "auto",
            "cache": kv_type,
            "swa_full": False,
        }

    def _log(self, level: int, text: bytes, _: object) -> None:
        self._said = [*self._said[-9:], text.decode("utf-8", "replace").strip()]

    def _last_words(self) -> str:
        return "; ".join(line for line in self._said if line)[-400:] or "it does not say why"

    def process(self, ids: list[int], position: int) -> int:
        """Append ids at `position`; the likeliest next token."""
        lc, batch = self._lc, self._batch
        for start in range(0, len(ids), self._batch_size):
            piece = ids[start : start + self._batch_size]
            for i, token in enumerate(piece):
                batch.token[i] = token
                batch.pos[i] = position + start + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = start + i == len(ids) - 1
            batch.n_tokens = len(piece)
            status = lc.llama_decode(self._context, batch)
            if status:
                raise BackendError(f"llama_decode returned {status}: {self._last_words()}")
        logits = lc.llama_get_logits_ith(self._context, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, (self._vocab,))))

    def clear(self) -> None:
        """Forget everything processed."""
        self._lc.llama_memory_clear(self._lc.llama_get_memory(self._context), True)

    def close(self) -> None:
        """Free everything."""
        lc = self._lc
        lc.llama_batch_free(self._batch)
        lc.llama_free(self._context)
        lc.llama_model_free(self._model)
        lc.llama_log_set(type(self._callback)(), None)


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Warm up and measure what the engine measured, on the same ids.

    `request`: model, kind, tokens, warmup, repetitions, context, threads, repack, kv_type, prompts,
    forced (ids to continue with; None: its own greedy choice), warmup_prompt, restart (decode
    from the prompt anew each time).
    """
    model = LlamaCpp(
        request["model"],
        context=request["context"],
        threads=request["threads"],
        repack=request["repack"],
        kv_type=request["kv_type"],
    )
    run = _prefill if request["kind"] == "prefill" else _decode
    found = run(model, request)
    found |= {
        "backend": "llama.cpp",
        "load_s": model.load_s,
        "context": model.settings["n_ctx"],
        "settings": model.settings,
        "peak_rss_bytes": peak_rss_bytes(),
    }
    model.close()
    return found


def _prefill(model: LlamaCpp, request: dict[str, Any]) -> dict[str, Any]:
    model.process(request["warmup_prompt"], 0)
    samples, choices = [], []
    for ids in request["prompts"]:
        model.clear()
        before = storage_read_bytes()
        began = time.perf_counter()
        choices.append(model.process(ids, 0))
        seconds = time.perf_counter() - began
        samples.append(
            {
                "seconds": seconds,
                "tokens": len(ids),
                "first_token_s": seconds,
                "read_bytes": _since(before),
            }
        )
    return {"samples": samples, "choices": choices}


def _decode(model: LlamaCpp, request: dict[str, Any]) -> dict[str, Any]:
    forced: list[int] | None = request["forced"]
    (prompt,) = request["prompts"]
    choices: list[int] = []

    def begin() -> float:
        model.clear()
        began = time.perf_counter()
        choices[:] = [model.process(prompt, 0)]
        return time.perf_counter() - began

    def advance(count: int) -> None:
        for _ in range(count):
            position = len(prompt) + len(choices) - 1
            token = choices[-1] if forced is None else forced[len(choices) - 1]
            choices.append(model.process([token], position))

    first_token_s = begin()
    advance(request["warmup"])
    samples = []
    for _ in range(request["repetitions"]):
        if request["restart"]:
            first_token_s = begin()
        before = storage_read_bytes()
        start = time.perf_counter()
        advance(request["tokens"])
        seconds = time.perf_counter() - start
        samples.append(
            {
                "seconds": seconds,
                "tokens": request["tokens"],
                "first_token_s": first_token_s,
                "verifies": request["tokens"],
                "read_bytes": _since(before),
            }
        )
    return {"samples": samples, "choices": choices}


def _since(before: int | None) -> int | None:
    now = storage_read_bytes()
    return None if now is None or before is None else now - before
