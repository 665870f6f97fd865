"""Held-out exact match and MTP acceptance by teacher forcing.

Greedy decoding gives exactly the wanted text if and only if the wanted token is the argmax at
every position given the wanted prefix, so one forward pass per command answers the question (a
different tokenisation of the same text counts as wrong). The same pass gives the draft acceptance
a greedy verifier would see.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from mimo_edge.nano import commands as grammar

from . import data, optim
from .model import Nano


def _batch(records: list[dict[str, Any]], tok: Any) -> tuple[Tensor, list[tuple[int, int]]]:
    rows: list[list[int]] = []
    spans = []
    for r in records:
        prompt = tok.encode(data.render_prompt(r), add_special_tokens=False).ids
        answer = tok.encode(grammar.answer(r) + data.IM_END, add_special_tokens=False).ids
        rows.append(prompt + answer)
        spans.append((len(prompt), len(prompt) + len(answer)))
    width = -(-max(map(len, rows)) // 128) * 128
    return torch.tensor([r + [0] * (width - len(r)) for r in rows]), spans


@torch.no_grad()
def evaluate(
    model: Nano,
    tok: Any,
    records: list[dict[str, Any]],
    bf16: bool = optim.has_bf16(),
    batch: int = 24,
) -> dict[str, Any]:
    """Exact match overall, by `lang/domain` and kind; accepted tokens per verify; failures as
    (record, got).
    """
    if bf16 is None:
        bf16 = optim.has_bf16()
    right: dict[str, list[int]] = defaultdict(list)
    tokens = steps = 0
    hits = [[0, 0] for _ in model.mtp]
    failures = []
    load = [torch.zeros(model.c.n_routed_experts) for _ in model.layers]
    for at in range(0, len(records), batch):
        part = records[at : at + batch]
        ids, spans = _batch(part, tok)
        tables = model.tables(ids.shape[1])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            h = model.hidden(ids, tables)
            best = model.logits(model.norm(h)).argmax(-1)
            every = torch.arange(ids.numel())
            drafts = [
                model.mtp_logits(k, h, ids, every, tables).argmax(-1).view(ids.shape)
                for k in range(len(model.mtp))
            ]
        for i, layer in enumerate(model.layers):
            if hasattr(layer.mlp, "load"):
                load[i] += layer.mlp.load
        for j, (r, (start, end)) in enumerate(zip(part, spans, strict=True)):
            want, got = ids[j, start:end], best[j, start - 1 : end - 1]
            ok = bool((want == got).all())
            kind = "refusal" if not r["calls"] else "double" if len(r["calls"]) > 1 else "single"
            for key in ("all", f"{r['lang']}/{r['domain']}", r["lang"], r["domain"], kind):
                right[key].append(ok)
            if not ok:
                failures.append((r, tok.decode(got.tolist(), skip_special_tokens=False)))
            p = start - 1  # the target has processed 0..p and chosen token p+1
            while p + 1 < end:
                taken = 1
                for k, d in enumerate(drafts):
                    if p + 2 + k >= end:
                        break
                    hit = bool(d[j, p] == ids[j, p + 2 + k])
                    hits[k][0] += hit
                    hits[k][1] += 1
                    if not hit:
                        break
                    taken += 1
                tokens, steps, p = tokens + taken, steps + 1, p + taken
    return {
        "exact": {k: (sum(v) / len(v), len(v)) for k, v in sorted(right.items())},
        "accepted": tokens / max(steps, 1),
        "acceptance": [a / max(b, 1) for a, b in hits],
        "failures": failures,
        "load": [x.tolist() for x in load],
    }
