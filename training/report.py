"""Evaluate an exported checkpoint: exact match by language and domain, acceptance, expert use.

    python training/report.py CHECKPOINT [--float RUN/latest.pt] [--json OUT] [--seed N]

Reads the FP8 checkpoint as stored. With --float it also evaluates the unquantised weights of a run,
and 4-bit experts (Q4_0 round trip of the stored weights) in every case. With --seed the commands
are another draw of the held-out phrasings and values, without those of the committed set.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import training  # noqa: F401 (finds mimo_edge in a checkout)

# isort: split

import torch
from tokenizers import Tokenizer

from mimo_edge.nano import commands as grammar
from training import evaluate, load, quantise
from training.model import Nano, NanoConfig


def show(name: str, result: dict[str, Any]) -> None:
    """Print one line of shares, one of acceptance, and expert use per layer."""
    shares = ", ".join(f"{k} {v[0]:.1%} of {v[1]}" for k, v in result["exact"].items())
    print(f"{name}: {shares}")
    depth = ", ".join(f"{x:.1%}" for x in result["acceptance"])
    print(f"  accepted tokens per verify {result['accepted']:.2f}, by depth {depth}")
    for i, load_ in enumerate(result["load"]):
        if sum(load_):
            total = sum(load_)
            used = " ".join(f"{100 * x / total:.0f}" for x in sorted(load_, reverse=True))
            print(f"  layer {i} expert shares in % {used}")


def main() -> None:
    """Entry point."""
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("checkpoint", type=Path)
    ap.add_argument("--float", type=Path, dest="floating")
    ap.add_argument("--json", type=Path)
    ap.add_argument("--seed", type=int)
    ap.add_argument("--threads", type=int, default=2)
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    tok = Tokenizer.from_file(str(a.checkpoint / "tokenizer.json"))
    records = grammar.held_out()
    if a.seed is not None:
        known = {r["text"].lower() for r in records}
        records = [r for r in grammar.build_held_out(a.seed) if r["text"].lower() not in known]
    results: dict[str, dict[str, Any]] = {}
    model = load.load(a.checkpoint)
    results["fp8"] = evaluate.evaluate(model, tok, records, bf16=False)
    with quantise.Stored(model, int4_experts=True):
        results["int4 experts"] = evaluate.evaluate(model, tok, records, bf16=False)
    if a.floating:
        floating = Nano(NanoConfig(), 3)
        floating.load_state_dict(torch.load(a.floating)["model"])
        results["unquantised"] = evaluate.evaluate(floating, tok, records, bf16=False)
    for name, result in results.items():
        show(name, result)
    for record, got in results["fp8"]["failures"]:
        print("wrong:", record["id"], "|", record["text"], "|", grammar.answer(record), "|", got)
    if a.json:
        a.json.write_text(json.dumps(results, ensure_ascii=False, indent=1), "utf-8")


if __name__ == "__main__":
    main()
