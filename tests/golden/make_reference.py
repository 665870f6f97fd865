"""Make reference_*.npz with transformers (see README.md):

    python tests/golden/make_reference.py

Each file is self-contained: model config, weights (rounded to f16, so exact in f32), token ids,
and what transformers computes from them in f32: logits of every row, last residual row.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import transformers  # noqa: E402
from hf_model import hf_logits, hf_model  # noqa: E402
from tiny import random_weights, tiny_config, tiny_mimo7b_config  # noqa: E402

from mimo_edge.config import MimoConfig  # noqa: E402
from mimo_edge.runtimes.weights import DictWeights  # noqa: E402

SMALL = {"vocab_size": 61, "hidden_size": 20, "intermediate_size": 28, "num_mtp_layers": 0}


def configs() -> dict[str, tuple[MimoConfig, int]]:
    """Name -> (config, tokens): several windows long, odd sizes, different grouping and K."""
    moe = {"moe_intermediate_size": 12}
    return {
        "hybrid": (tiny_config(**SMALL, **moe, head_dim=12, v_head_dim=8), 50),
        "narrow": (
            tiny_config(
                **SMALL,
                **moe,
                num_attention_heads=6,
                num_key_value_heads=3,
                swa_num_key_value_heads=6,
                head_dim=18,
                v_head_dim=5,
                sliding_window=3,
                n_routed_experts=5,
                num_experts_per_tok=1,
                attention_value_scale=0.612,
                routed_scaling_factor=1.5,
            ),
            23,
        ),
        "wide": (
            tiny_config(
                **SMALL,
                **moe,
                num_hidden_layers=3,
                hybrid_layer_pattern=(1, 0, 1),
                moe_layer_freq=(1, 0, 1),
                head_dim=8,
                v_head_dim=12,
                partial_rotary_factor=1.0,
                sliding_window=17,
                n_routed_experts=6,
                num_experts_per_tok=6,
                layernorm_epsilon=1e-6,
            ),
            71,
        ),
        "mimo7b": (
            tiny_mimo7b_config(**SMALL | {"num_mtp_layers": 0}, head_dim=10, v_head_dim=10),
            40,
        ),
    }


def main() -> None:
    torch.set_num_threads(1)
    for seed, (name, (config, length)) in enumerate(configs().items()):
        tensors = random_weights(config, seed=seed)._tensors
        halves = {key: value.astype(np.float16) for key, value in tensors.items()}
        weights = DictWeights(config, {k: v.astype(np.float32) for k, v in halves.items()})
        ids = np.random.default_rng(seed).integers(0, config.vocab_size, length)
        logits, hidden = hf_logits(hf_model(weights), ids)
        made_with = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        }
        np.savez_compressed(
            HERE / f"reference_{name}.npz",
            allow_pickle=False,
            config=np.array(json.dumps(config.to_dict())),
            made_with=np.array(json.dumps(made_with)),
            token_ids=ids.astype(np.int32),
            logits=logits,
            hidden=hidden[-1],
            **{f"weights/{key}": value for key, value in halves.items()},
        )


if __name__ == "__main__":
    main()
