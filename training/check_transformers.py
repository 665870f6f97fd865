"""Compare an exported checkpoint in transformers (mimo_v2_flash, f32) with the trainer's own
model.

    python training/check_transformers.py CHECKPOINT

Dequantises the FP8 weights, loads both, and compares logits on held-out prompts; then lets
transformers generate a few answers with the checkpoint's own chat template.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import training  # noqa: F401 (finds mimo_edge in a checkout)

# isort: split

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mimo_edge.nano import commands as grammar
from training import data, load


def dequantised(folder: Path) -> dict[str, Tensor]:
    """All tensors as f32, FP8 weights multiplied by their block scales."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    raw: dict[str, Tensor] = {}
    for file in sorted(set(index.values())):
        with safe_open(folder / file, "pt") as f:
            for name in f.keys():  # noqa: SIM118 (not a mapping)
                raw[name] = f.get_tensor(name)
    out = {}
    for name, t in raw.items():
        if name.endswith("_scale_inv"):
            continue
        scale = raw.get(name + "_scale_inv")
        w = t.float()
        if scale is not None:
            full = scale.repeat_interleave(128, 0)[: w.shape[0]].repeat_interleave(128, 1)[
                :, : w.shape[1]
            ]
            w = w * full
        out[name] = w
    return out


def main() -> None:
    """Entry point; exits 1 when the logits differ."""
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("checkpoint", type=Path)
    ap.add_argument("--prompts", type=int, default=8)
    ap.add_argument("--generate", type=int, default=4)
    a = ap.parse_args()
    weights = dequantised(a.checkpoint)
    with tempfile.TemporaryDirectory() as tmp:
        plain = Path(tmp)
        config = json.loads((a.checkpoint / "config.json").read_text())
        for key in (
            "quantization_config",
            "rope_scaling",
        ):  # transformers mistakes a null rope_scaling for its own
            del config[key]
        config["torch_dtype"] = "float32"
        (plain / "config.json").write_text(json.dumps(config))
        save_file(
            {k: v for k, v in weights.items() if ".mtp." not in k},
            plain / "model.safetensors",
            {"format": "pt"},
        )
        theirs = AutoModelForCausalLM.from_pretrained(
            plain,
            config=AutoConfig.from_pretrained(plain),
            dtype=torch.float32,
            attn_implementation="eager",
        ).eval()
    ours = load.load(a.checkpoint)
    tok = AutoTokenizer.from_pretrained(a.checkpoint)
    records = grammar.build_held_out()[:: 720 // a.prompts][: a.prompts]
    worst = 0.0
    for r in records:
        prompt = tok.apply_chat_template(
            [{"role": "user", "content": r["text"]}],
            tools=[grammar.TOOLS[n] for n in r["tools"]],
            add_generation_prompt=True,
            enable_thinking=False,
            tokenize=False,
        )
        assert prompt == data.render_prompt(r), (prompt, data.render_prompt(r))
        ids = tok(
            prompt + grammar.answer(r), return_tensors="pt", add_special_tokens=False
        ).input_ids
        padded = torch.nn.functional.pad(ids, (0, -ids.shape[1] % 128))
        with torch.no_grad():
            want = theirs(ids).logits[0]
            got = ours.logits(ours.norm(ours.hidden(padded, ours.tables(padded.shape[1]))))[
                0, : ids.shape[1]
            ]
        error = float((want - got).abs().max() / want.abs().max())
        worst = max(worst, error)
        same = bool((want.argmax(-1) == got.argmax(-1)).all())
        print(f"{ids.shape[1]} tokens, relative error {error:.2e}, same argmax {same}")
    for r in records[: a.generate]:
        ids = tok(data.render_prompt(r), return_tensors="pt", add_special_tokens=False).input_ids
        out = theirs.generate(
            ids,
            max_new_tokens=80,
            do_sample=False,
            eos_token_id=[tok.convert_tokens_to_ids("<|im_end|>")],
        )
        said = tok.decode(out[0, ids.shape[1] :], skip_special_tokens=False)
        print(repr(r["text"]), "->", repr(said), said == grammar.answer(r) + data.IM_END)
    if worst > 1e-4:
        raise SystemExit(f"logits differ: {worst:.2e}")


if __name__ == "__main__":
    main()
