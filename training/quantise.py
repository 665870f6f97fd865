"""Weight quantisation of the checkpoint (FP8 e4m3, 128x128 blocks) and a 4-bit stand-in for
training.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 128
FP8_MAX = 448.0


def fp8_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """w f32 [out, in] -> e4m3fn [out, in], scale_inv f32 [ceil(out/128), ceil(in/128)]; w ~ fp8 *
    scale_inv.
    """
    out, width = w.shape
    pad = F.pad(w, (0, -width % BLOCK, 0, -out % BLOCK))
    tiles = pad.view(pad.shape[0] // BLOCK, BLOCK, pad.shape[1] // BLOCK, BLOCK)
    scale = tiles.abs().amax((1, 3)).clamp(min=1e-12) / FP8_MAX
    q = (tiles / scale[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return q.view(pad.shape)[:out, :width].contiguous(), scale


def fp8_round(w: Tensor) -> Tensor:
    """Round trip of `fp8_blocks`, batched over leading dims."""
    if w.ndim == 3:
        e, out, width = w.shape
        if out % BLOCK == 0:
            return fp8_round(w.reshape(e * out, width)).view(w.shape)
        return torch.stack([fp8_round(x) for x in w])
    q, scale = fp8_blocks(w)
    full = scale.repeat_interleave(BLOCK, 0)[: w.shape[0]].repeat_interleave(BLOCK, 1)[
        :, : w.shape[1]
    ]
    return q.float() * full


def q4_round(w: Tensor) -> Tensor:
    """Round trip of ggml's Q4_0 (32 weights share a scale: the largest magnitude becomes -8)."""
    x = w.reshape(-1, 32)
    peak = x.gather(1, x.abs().argmax(1, keepdim=True))
    d = (peak / -8).half().float()
    inv = torch.where(d == 0, torch.zeros_like(d), 1 / d)
    return (((x * inv + 8.5).floor().clamp(0, 15) - 8) * d).view(w.shape)


FP8_NAMES = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")


@torch.no_grad()
def stored_values(model: nn.Module, int4_experts: bool = False) -> dict[str, Tensor]:
    """Every parameter as a reader of the checkpoint will see it (router stays f32)."""
    out = {}
    for name, p in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in FP8_NAMES:
            w = fp8_round(p)
            out[name] = q4_round(w) if int4_experts and p.ndim == 3 else w
        elif leaf != "router":
            out[name] = p.bfloat16().float()
    return out


class Stored:
    """Context: run with stored values in place of the trained ones, gradients go straight
    through.
    """

    def __init__(self, model: nn.Module, int4_experts: bool = False) -> None:
        self.model, self.int4 = model, int4_experts
        self.kept: dict[str, Tensor] = {}

    def __enter__(self) -> None:
        params = dict(self.model.named_parameters())
        for name, value in stored_values(self.model, self.int4).items():
            self.kept[name] = params[name].data
            params[name].data = value

    def __exit__(self, *_: object) -> None:
        params = dict(self.model.named_parameters())
        for name, value in self.kept.items():
            params[name].data = value
        self.kept = {}
