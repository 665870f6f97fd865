"""Train mimo-nano on generated commands within a budget of computing time.

    python training/train_nano.py --minutes 90 --out training/runs/nano

Progress is a worker's processor time over the budget, so a shared machine ends its schedule too,
however often others stop it. Phases: trunk and one MTP block; from `MTP_AT` three MTP blocks copied
from the first; from `QUANT_AT` the forward pass uses the values the checkpoint stores (FP8, and
every other step 4-bit experts). Stop it at any time and start it again with the same --out to
resume.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import training  # noqa: F401 (finds mimo_edge in a checkout)

# isort: split

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from mimo_edge.nano import commands as grammar
from training import data, evaluate, export, load, make_tokenizer, optim, quantise
from training.model import MoE, Nano, NanoConfig

DRILLS_TO, MTP_AT, MTP_ALL, QUANT_AT = 0.6, 0.75, 0.78, 0.87
"""Shares of a schedule: copying drills end (first schedule only), MTP starts, MTP at every step,
quantisation starts."""
SHAPES = ((6, 1024), (14, 384), (6, 1024), (6, 1024))
"""Batch shapes in turn: long conversations, and short ones where the first answers weigh more."""


def place(minutes: list[float], spent: float) -> tuple[int, float]:
    """Which schedule we are in after `spent` seconds, and how far: progress 1 after the last."""
    for i, length in enumerate(minutes):
        if spent < 60 * length:
            return i, spent / (60 * length)
        spent -= 60 * length
    return len(minutes), 1.0


def schedule(progress: float, step: int) -> float:
    """Learning rate factor: short warm-up, flat to 30 %, cosine to 3 %."""
    warm = min(1.0, (step + 1) / 30)
    if progress < 0.3:
        return warm
    return warm * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.3) / 0.7))))


def draw(rng: random.Random, tok: Tokenizer, b: int, t: int, drills: int) -> tuple[Tensor, Tensor]:
    """ids [B, T] and loss weight of each token [B, T]; the first `drills` rows are copying
    drills.
    """
    ids = torch.zeros(b, t, dtype=torch.long)
    weight = torch.zeros(b, t)
    for i in range(b):
        e = data.drill(rng, tok.get_vocab_size(), t) if i < drills else data.example(rng, tok, t)
        n = len(e.ids)
        ids[i, :n] = torch.tensor(e.ids)
        weight[i, :n] = torch.tensor(e.loss, dtype=torch.float32)
        weight[i, : e.first_end] *= 2
    return ids, weight


def losses(model: Nano, ids: Tensor, weight: Tensor, mtp: bool) -> list[Tensor]:
    """Weighted cross-entropy of the trunk, then of each MTP block, on assistant tokens.

    The MTP blocks learn from the trunk's states without pulling on the trunk.
    """
    t = ids.shape[1]
    tables = model.tables(t)
    h = model.hidden(ids, tables)
    out = []
    for k in range(-1, len(model.mtp) if mtp else 0):
        ahead = 2 + k
        w = weight[:, ahead:]
        if (
            k >= 0
        ):  # a draft starts at a row the target has chosen a token from: i + 1 is the assistant's
            w = w * (weight[:, 1 : t - ahead + 1] > 0)
        at = w.nonzero()
        rows = at[:, 0] * t + at[:, 1]
        target = ids[at[:, 0], at[:, 1] + ahead]
        if k < 0:
            logits = model.logits(model.norm(h.flatten(0, 1).index_select(0, rows)))
        else:
            logits = model.mtp_logits(k, h.detach(), ids, rows, tables)
        each = F.cross_entropy(logits.float(), target, reduction="none")
        w = w[at[:, 0], at[:, 1]]
        out.append((each * w).sum() / w.sum())
    return out


def backward(
    model: Nano,
    rng: random.Random,
    tok: Tokenizer,
    b: int,
    t: int,
    quant: int,
    drills: int,
    mtp: bool,
) -> list[float]:
    """Draw a batch, run it with the values of the given storage, leave gradients; returns the
    losses.
    """
    ids, weight = draw(rng, tok, b, t, drills)

    def run() -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=torch.bfloat16 == optim.FAST):
            parts = losses(model, ids, weight, mtp)
        torch.stack(parts).sum().backward()
        return parts

    if quant:
        with quantise.Stored(model, int4_experts=quant == 2):
            parts = run()
    else:
        parts = run()
    return [x.item() for x in parts]


class Workers:
    """One process per thread over shared parameters: they meet twice a step, not twice an
    operation.

    On a machine shared with other work this is far faster than threads inside each operation,
    which wait for the slowest one hundreds of times a step. Worker 0 is the caller; gradients and
    expert loads are summed in shared memory, and each worker then updates its own part of the
    parameters.
    """

    def __init__(self, model: Nano, opt: optim.Optimizer, count: int, seed: int, tok: Path) -> None:
        self.model, self.opt, self.count = model, opt, count
        model.share_memory()
        self.moe = [m for m in model.modules() if isinstance(m, MoE)]
        opt.allocate()
        self.grads = [
            {n: torch.zeros_like(p).share_memory_() for n, p in model.named_parameters()}
            for _ in range(count)
        ]
        self.loads = torch.zeros(count, len(self.moe), model.c.n_routed_experts).share_memory_()
        self.order = torch.zeros(
            8, dtype=torch.float64
        ).share_memory_()  # go on, b, t, quant, drills, mtp, lr, turn
        self.barrier = mp.get_context("fork").Barrier(count)
        self.names = self._parts()
        self.seed, self.tok = seed, tok
        self.processes = [
            mp.get_context("fork").Process(target=self._serve, args=(rank,), daemon=True)
            for rank in range(1, count)
        ]
        for p in self.processes:
            p.start()
        self.rng = random.Random(seed * 1_000_003)
        self.encoder = Tokenizer.from_file(str(tok))

    def _parts(self) -> list[list[str]]:
        cost = {
            n: p.numel() * min(p.shape[-2:]) if self.opt.is_matrix(n, p) else p.numel()
            for n, p in self.model.named_parameters()
        }
        parts: list[list[str]] = [[] for _ in range(self.count)]
        sums = [0] * self.count
        for n in sorted(cost, key=lambda n: -cost[n]):
            least = sums.index(min(sums))
            parts[least].append(n)
            sums[least] += cost[n]
        return parts

    def _half(self, rank: int, rng: random.Random, tok: Tokenizer) -> list[float]:
        _, b, t, quant, drills, mtp, lr, turn = self.order.tolist()
        parts = backward(
            self.model, rng, tok, int(b) // self.count, int(t), int(quant), int(drills), bool(mtp)
        )
        for n, p in self.model.named_parameters():
            if p.grad is not None:
                self.grads[rank][n].copy_(p.grad)
                p.grad = None
        for i, m in enumerate(self.moe):
            self.loads[rank, i] = m.load
        self.barrier.wait()
        self.opt.step(
            int(turn),
            lr,
            [n for n in self.names[rank] if mtp or not n.startswith("mtp.")],
            lambda n: sum(g[n] for g in self.grads) / self.count,
        )
        self.barrier.wait()
        return parts

    def _serve(self, rank: int) -> None:
        torch.set_num_threads(1)
        rng = random.Random(self.seed * 1_000_003 + rank)
        tok = Tokenizer.from_file(str(self.tok))
        while True:
            self.barrier.wait(timeout=900)  # the caller is gone: leave
            if not self.order[0]:
                return
            self._half(rank, rng, tok)

    def step(
        self, b: int, t: int, quant: int, drills: int, mtp: bool, lr: float, turn: int
    ) -> tuple[list[float], float]:
        """One optimiser step on b sequences of t tokens: losses of this worker's share, worst
        expert load.
        """
        self.order.copy_(torch.tensor([1, b, t, quant, drills, mtp, lr, turn], dtype=torch.float64))
        self.barrier.wait()
        parts = self._half(0, self.rng, self.encoder)
        worst = 0.0
        for m, counts in zip(self.moe, self.loads.sum(0), strict=True):
            m.bias += 0.02 * lr * torch.sign(counts.mean() - counts)
            worst = max(worst, float(counts.max() / counts.mean()))
        return parts, worst

    def close(self) -> None:
        """Stop the other workers (their number may then change, or the model's parameters)."""
        self.order[0] = 0
        self.barrier.wait()
        for p in self.processes:
            p.join()


def main() -> None:
    """Entry point."""
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument(
        "--minutes",
        type=float,
        nargs="+",
        default=[90],
        help="length of the schedule; several numbers run several schedules one after the other",
    )
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument(
        "--checkpoint", type=Path, help="also export a checkpoint here at every evaluation"
    )
    ap.add_argument(
        "--start",
        type=Path,
        help="go on from this exported checkpoint: no copying drills, MTP from the start",
    )
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--lr-matrix", type=float, default=0.02)
    ap.add_argument("--lr-other", type=float, default=3e-3)
    ap.add_argument("--eval-minutes", type=float, default=7)
    ap.add_argument("--eval-size", type=int, default=180)
    a = ap.parse_args()
    torch.manual_seed(a.seed)
    a.out.mkdir(parents=True, exist_ok=True)
    if not (a.out / "tokenizer.json").exists():
        if a.start:
            shutil.copy(a.start / "tokenizer.json", a.out)
        else:
            make_tokenizer.main(a.out)
    tok = Tokenizer.from_file(str(a.out / "tokenizer.json"))
    records = grammar.build_held_out()
    picked = random.Random(0).sample(records, min(a.eval_size, len(records)))

    if a.start:
        model = load.load(a.start).train()
    else:
        model = Nano(NanoConfig(), 1)
        model.plant_copying()
    opt = optim.Optimizer(model, a.lr_matrix, a.lr_other, 0.02)
    step, spent, tokens = 0, 0.0, 0
    latest = a.out / "latest.pt"
    if latest.exists():
        saved = torch.load(latest)
        if any(k.startswith("mtp.1.") for k in saved["model"]) and len(model.mtp) == 1:
            model.copy_mtp()
        model.load_state_dict(saved["model"])
        opt.state = saved["opt"]
        step, spent, tokens = saved["step"], saved["spent"], saved["tokens"]
        print(f"resumed at step {step}, {spent / 60:.1f} min", flush=True)
    cycle, progress = place(a.minutes, spent)
    if (cycle or progress >= MTP_AT) and len(model.mtp) == 1:
        model.copy_mtp()
        for key in [k for k in opt.state if k.startswith("mtp.0.")]:
            for k in (1, 2):
                opt.state[key.replace("mtp.0.", f"mtp.{k}.")] = [x.clone() for x in opt.state[key]]
    torch.set_num_threads(1)
    team = Workers(model, opt, a.threads, a.seed + step, a.out / "tokenizer.json")
    log = csv.writer((a.out / "log.csv").open("a", newline="", buffering=1))
    evals = csv.writer((a.out / "eval.csv").open("a", newline="", buffering=1))
    if step == 0:
        log.writerow(
            [
                "step",
                "minutes",
                "tokens",
                "lr",
                "quant",
                "loss",
                "mtp0",
                "mtp1",
                "mtp2",
                "worst_load",
            ]
        )
        evals.writerow(
            [
                "step",
                "minutes",
                "tokens",
                "stored",
                "exact",
                "en",
                "zh",
                "accepted",
                "a1",
                "a2",
                "a3",
            ]
        )
    start = time.process_time() - spent
    last_eval = spent

    def check(final: bool) -> None:
        """Evaluate (as stored, too, once quantisation matters), save, export."""
        modes = (False, True) if final or place(a.minutes, spent)[1] >= QUANT_AT else (False,)
        for stored in modes:
            if stored:
                with quantise.Stored(model):
                    r = evaluate.evaluate(model, tok, records if final else picked)
            else:
                r = evaluate.evaluate(model, tok, records if final else picked)
            e = r["exact"]
            acc = [f"{x:.3f}" for x in r["acceptance"]] + [""] * (3 - len(r["acceptance"]))
            evals.writerow(
                [step, f"{spent / 60:.2f}", tokens, int(stored)]
                + [f"{e[k][0]:.4f}" for k in ("all", "en", "zh")]
                + [f"{r['accepted']:.3f}", *acc]
            )
            print(
                f"== {spent / 60:.1f} min stored={stored} {e} accepted {r['accepted']:.2f} {acc}",
                flush=True,
            )
            for rec, got in r["failures"][:6]:
                print(
                    "   ",
                    rec["tools"],
                    rec["text"],
                    "|",
                    [c["arguments"] for c in rec["calls"]],
                    "|",
                    got.replace("\n", " "),
                )
        torch.save(
            {
                "model": model.state_dict(),
                "opt": opt.state,
                "step": step,
                "spent": spent,
                "tokens": tokens,
            },
            a.out / "latest.tmp",
        )
        (a.out / "latest.tmp").replace(latest)
        if a.checkpoint:
            export.export(model, a.out / "tokenizer.json", a.checkpoint)

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    while True:
        spent = time.process_time() - start
        cycle, progress = place(a.minutes, spent)
        if cycle == len(a.minutes):
            break
        if (cycle or progress >= MTP_AT) and len(model.mtp) == 1:
            check(final=False)
            team.close()
            os.execv(
                sys.executable, [sys.executable, *sys.argv]
            )  # new parameters: resume in new processes
        lr = schedule(progress, step)
        b, t = SHAPES[step % len(SHAPES)]
        quant = 0 if progress < QUANT_AT else 1 + step % 2
        first = not cycle and not a.start
        drills = 1 if t == 1024 and first and progress < DRILLS_TO else 0  # for each worker
        # Blocks that follow a moving trunk learn enough from a few steps; the end is theirs.
        mtp = len(model.mtp) > 1 and (step // len(SHAPES) % 4 == 0 or progress > MTP_ALL)
        parts, worst = team.step(b, t, quant, drills, mtp, lr, step)
        tokens += b * t
        row = [f"{x:.4f}" for x in parts] + [""] * (4 - len(parts))
        log.writerow([step, f"{spent / 60:.3f}", tokens, f"{lr:.4f}", quant, *row, f"{worst:.2f}"])
        if step % 10 == 0:
            print(
                step,
                f"{spent / 60:.1f} min",
                tokens,
                row,
                f"lr {lr:.3f} load {worst:.1f}",
                flush=True,
            )
        step += 1
        if spent - last_eval > 60 * a.eval_minutes:
            last_eval = spent
            check(final=False)
        if stop.is_set():  # save and leave; the same command resumes
            check(final=False)
            team.close()
            return
    team.close()
    torch.set_num_threads(a.threads)
    check(final=True)


if __name__ == "__main__":
    main()
