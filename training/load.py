"""Load an exported checkpoint back into the trainer's model (dequantised, f32)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .model import MoE, Nano, NanoConfig


def load(folder: Path) -> Nano:
    """Read every tensor of a mimo-nano checkpoint; raises KeyError when one is missing."""
    index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))["weight_map"]
    raw: dict[str, Tensor] = {}
    for file in sorted(set(index.values())):
        with safe_open(folder / file, "pt") as f:
            for name in f.keys():  # noqa: SIM118 (not a mapping)
                raw[name] = f.get_tensor(name)

    def read(name: str) -> Tensor:
        w = raw[name].float()
        scale = raw.get(name + "_scale_inv")
        if scale is not None:
            w = (
                w
                * scale.repeat_interleave(128, 0)[: w.shape[0]].repeat_interleave(128, 1)[
                    :, : w.shape[1]
                ]
            )
        return w

    model = Nano(NanoConfig.load(folder / "config.json"), 3)
    moe = {f"layers.{i}.mlp" for i, layer in enumerate(model.layers) if isinstance(layer.mlp, MoE)}
    with torch.no_grad():
        for name, p in model.named_parameters():
            path, _, leaf = name.rpartition(".")
            if name in ("embed_tokens",):
                p.copy_(read("model.embed_tokens.weight"))
            elif name == "lm_head":
                p.copy_(read("lm_head.weight"))
            else:
                hf = "model." + path.replace("mtp.", "mtp.layers.")
                if path in moe and leaf == "router":
                    p.copy_(read(f"{hf}.gate.weight"))
                elif path in moe:
                    p.copy_(
                        torch.stack(
                            [
                                read(f"{hf}.experts.{e}.{leaf}.weight")
                                for e in range(model.c.n_routed_experts)
                            ]
                        )
                    )
                elif leaf == "weight":
                    p.copy_(read(f"{hf}.weight"))
                elif leaf == "attention_sink_bias":
                    p.copy_(read(f"{hf}.{leaf}"))
                else:
                    p.copy_(read(f"{hf}.{leaf}.weight"))
        for name in moe:
            module: nn.Module = model.get_submodule(name)
            assert isinstance(module, MoE)
            module.bias.copy_(raw[f"model.{name}.gate.e_score_correction_bias"])
    return model.eval()
