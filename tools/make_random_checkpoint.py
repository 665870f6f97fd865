"""Write a Hugging Face checkpoint with MiMo-V2-Flash's real geometry and random weights.

    python tools/make_random_checkpoint.py OUT --layers 3 --experts 256     # 13 GB: export at size
    python tools/make_random_checkpoint.py OUT --layers 2 --experts 8 --vocab 4096

For measuring the exporter: FP8 blocks with scales, one shard per layer, embedding and head in
shards of their own, no tokenizer. Bytes are cut from one pool of FP8 codes of a normal
distribution, so gigabytes are written at disk speed in constant memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mimo_edge.export.fp8 import encode

U8 = NDArray[np.uint8]
Entry = tuple[str, str, tuple[int, ...]]  # name, dtype, shape

ITEM_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
POOL_CODES = (64 << 20) + 12_289  # a length without small factors: repeats never align


def linear(name: str, rows: int, cols: int) -> list[Entry]:
    """An FP8 matrix and its block scales."""
    scales = (-(-rows // 128), -(-cols // 128))
    return [
        (f"{name}.weight", "F8_E4M3", (rows, cols)),
        (f"{name}.weight_scale_inv", "F32", scales),
    ]


def layer_entries(config: dict[str, object], index: int, experts: int) -> list[Entry]:
    """Tensors of decoder layer `index`."""
    c: dict[str, int] = config  # type: ignore[assignment]
    p, hidden = f"model.layers.{index}.", c["hidden_size"]
    pattern: list[int] = config["hybrid_layer_pattern"]  # type: ignore[assignment]
    sliding = pattern[index] == 1
    heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
    kv = c["swa_num_key_value_heads"] if sliding else kv
    entries: list[Entry] = [
        (p + "input_layernorm.weight", "BF16", (hidden,)),
        (p + "post_attention_layernorm.weight", "BF16", (hidden,)),
        (p + "self_attn.o_proj.weight", "BF16", (hidden, heads * c["v_head_dim"])),
        *linear(p + "self_attn.q_proj", heads * c["head_dim"], hidden),
        *linear(p + "self_attn.k_proj", kv * c["head_dim"], hidden),
        *linear(p + "self_attn.v_proj", kv * c["v_head_dim"], hidden),
    ]
    if sliding:
        entries.append((p + "self_attn.attention_sink_bias", "BF16", (heads,)))
    if index == 0:
        widths = [("", c["intermediate_size"])]
    else:
        entries.append((p + "mlp.gate.weight", "F32", (experts, hidden)))
        entries.append((p + "mlp.gate.e_score_correction_bias", "F32", (experts,)))
        widths = [(f"experts.{e}.", c["moe_intermediate_size"]) for e in range(experts)]
    for prefix, width in widths:
        entries += linear(f"{p}mlp.{prefix}gate_proj", width, hidden)
        entries += linear(f"{p}mlp.{prefix}up_proj", width, hidden)
        entries += linear(f"{p}mlp.{prefix}down_proj", hidden, width)
    return entries


class Source:
    """Random bytes of each dtype, a different stretch of the pool for every tensor."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        draws = rng.standard_normal(1 << 20, dtype=np.float32) * 64
        self._codes: U8 = np.resize(rng.permutation(encode(draws)), POOL_CODES)
        self._rng = rng

    def pieces(self, entry: Entry) -> Iterator[bytes]:
        name, dtype, shape = entry
        count = int(np.prod(shape))
        if dtype == "F8_E4M3":
            start = int(self._rng.integers(POOL_CODES))
            while count:
                piece = self._codes[start : start + count]
                yield piece.tobytes()
                count, start = count - piece.size, 0
            return
        scale = 1 / 64 / np.sqrt(4096) if name.endswith("scale_inv") else 1 / 64
        while count:
            size = min(count, 1 << 22)
            values = self._rng.standard_normal(size, dtype=np.float32) * np.float32(scale)
            if name.endswith("scale_inv"):
                values = np.full(size, scale, np.float32)
            elif "norm" in name:
                values += 1
            if dtype == "BF16":
                yield (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
            else:
                yield values.tobytes()
            count -= size


def write_shard(path: Path, entries: list[Entry], source: Source) -> int:
    """One safetensors file; its data bytes."""
    header: dict[str, object] = {}
    offset = 0
    for name, dtype, shape in entries:
        end = offset + int(np.prod(shape)) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for entry in entries:
            for piece in source.pieces(entry):
                file.write(piece)
    return offset


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=152_576)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    file = resources.files("mimo_edge") / "configs" / "MiMo-V2-Flash.json"
    config = json.loads(file.read_text("utf-8"))
    for key in ("hybrid_layer_pattern", "moe_layer_freq"):
        config[key] = config[key][: a.layers]
    config.update(num_hidden_layers=a.layers, n_routed_experts=a.experts, vocab_size=a.vocab)
    config["eos_token_id"] = [0]
    del config["num_nextn_predict_layers"]
    a.out.mkdir(parents=True)
    (a.out / "config.json").write_text(json.dumps(config, indent=2))
    hidden = config["hidden_size"]
    shards: dict[str, list[Entry]] = {
        "model_embedding": [("model.embed_tokens.weight", "BF16", (a.vocab, hidden))],
        "model_final": [
            ("lm_head.weight", "BF16", (a.vocab, hidden)),
            ("model.norm.weight", "BF16", (hidden,)),
        ],
    }
    for index in range(a.layers):
        shards[f"model_{index}"] = layer_entries(config, index, a.experts)
    source, total, names = Source(a.seed), 0, {}
    for stem, entries in shards.items():
        total += write_shard(a.out / f"{stem}.safetensors", entries, source)
        names.update({name: f"{stem}.safetensors" for name, _, _ in entries})
    index_json = {"metadata": {"total_size": total}, "weight_map": names}
    (a.out / "model.safetensors.index.json").write_text(json.dumps(index_json))
    print(f"{a.out}: {len(names)} tensors, {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
