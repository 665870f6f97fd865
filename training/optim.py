"""Muon for matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware."""
    cpu = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


_QUINTIC = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)


FAST = torch.bfloat16 if has_bf16() else torch.float32
"""What this CPU multiplies fastest: without instructions for it bf16 takes 20 times as long."""


def orthogonalise(g: Tensor) -> Tensor:
    """Four quintic steps towards the nearest orthogonal matrix, batched over leading dims.

    Source: KellerJordan/Muon for the method, NoahAmsel/PolarExpress for the coefficients."""
    shape = g.shape
    x = g.to(FAST).reshape(-1, *shape[-2:])
    tall = shape[-2] > shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in _QUINTIC:
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float().reshape(shape)


class Optimizer:
    """One step over two groups; learning rates are scaled by the caller's schedule."""

    def __init__(self, model: nn.Module, lr_matrix: float, lr_other: float, decay: float) -> None:
        self.lr_matrix, self.lr_other, self.decay = lr_matrix, lr_other, decay
        self.state: dict[str, list[Tensor]] = {}
        self.model = model

    @staticmethod
    def is_matrix(name: str, p: Tensor) -> bool:
        return p.ndim >= 2 and not name.endswith(("embed_tokens", "lm_head", "router"))

    def allocate(self) -> None:
        """Create the state of every parameter in shared memory, so that worker processes can each
        own a part.
        """
        for name, p in self.model.named_parameters():
            if name not in self.state:
                zeros = [torch.zeros_like(p)]
                self.state[name] = (
                    zeros
                    if self.is_matrix(name, p)
                    else [*zeros, torch.zeros_like(p), torch.zeros(())]
                )
            self.state[name] = [x.detach().share_memory_() for x in self.state[name]]

    @torch.no_grad()
    def step(
        self, turn: int, scale: float, names: Sequence[str], gradient: Callable[[str], Tensor]
    ) -> None:
        """Update the named parameters in place.

        Orthogonalising the experts costs a third of a training step, so half of the expert stacks
        move at each turn, and then a little further; momentum gathers every gradient.
        """
        params = dict(self.model.named_parameters())
        stacks = 0
        for name in names:
            p, g = params[name], gradient(name)
            if self.is_matrix(name, p):
                (m,) = self.state[name]
                m.lerp_(g, 0.05)
                rate = self.lr_matrix * scale
                if p.ndim == 3:
                    stacks += 1
                    if (stacks + turn) % 2:
                        continue
                    rate *= 2**0.5
                update = orthogonalise(g.lerp(m, 0.95)) * max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                p.mul_(1 - rate * self.decay)
                p.add_(update, alpha=-rate)
            else:
                m, v, count = self.state[name]
                count += 1
                n = float(count)
                m.lerp_(g, 0.1)
                v.lerp_(g * g, 0.05)
                update = (m / (1 - 0.9**n)) / ((v / (1 - 0.95**n)).sqrt() + 1e-10)
                p.add_(update, alpha=-self.lr_other * scale)
