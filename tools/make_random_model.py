"""Write a GGUF with a real MiMo model's layer geometry and random weights, any number of layers.

    python tools/make_random_model.py OUT.gguf --layers 4 --experts 256            # 12.5 GB
    python tools/make_random_model.py OUT.gguf --layers 2 --experts 32 --vocab 4096
    python tools/make_random_model.py OUT.gguf --tiny                              # 1 MB, for tests

For speed and memory measurements: stock llama.cpp loads the file, and it works on token ids (no
tokenizer). Weights are drawn from N(0, 1/in), so they have zero mean: with a mean, activations
share a direction, all tokens route alike and every expert cache looks good. `--skew S` adds
N(0, S) to the routing biases, which makes some experts favourites of every token. `--check N`
routes N random tokens through the finished file and prints how the experts were used.

The models themselves are made by edge/bench/random_model.py.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mimo_edge.bench.random_model import RandomRows, scaled_config, tiny_config, write_model
from mimo_edge.bundle import Bundle
from mimo_edge.errors import MimoEdgeError
from mimo_edge.known_models import KNOWN_MODELS, known_model
from mimo_edge.runtimes.base import F32
from mimo_edge.runtimes.reference import ReferenceBackend

__all__ = ["RandomRows", "scaled_config", "tiny_config", "write_model"]


@dataclass(frozen=True)
class LayerRoutes:
    """How one layer used its experts: `distinct` were chosen at least once (`expected` when every
    choice is equally likely), the busiest eighth took `busiest` of all uses, and `repeated` of a
    token's experts were the token before's, too."""

    layer: int
    distinct: int
    expected: float
    busiest: float
    repeated: float


def routing(path: Path, tokens: int, seed: int = 0) -> list[LayerRoutes]:
    """Route `tokens` ids drawn at random through the model, on the reference backend.

    Raises MimoEdgeError subclasses.
    """
    with Bundle.open(path) as bundle:
        backend = ReferenceBackend(bundle.weights(), max_cached_experts=1)
        seen = backend.observer = _Routes()
        config = bundle.config
        ids = np.random.default_rng(seed).integers(0, config.vocab_size, tokens)
        backend.forward(ids.astype(np.int32), backend.new_cache(tokens))
    count, chosen = config.n_routed_experts, config.num_experts_per_tok
    found = []
    for layer, routes in sorted(seen.routes.items()):
        uses = np.sort(np.bincount(routes.ravel(), minlength=count))[::-1]
        repeats = [len(set(a) & set(b)) for a, b in pairwise(routes.tolist())]
        found.append(
            LayerRoutes(
                layer,
                int(np.count_nonzero(uses)),
                count * (1 - (1 - chosen / count) ** tokens),
                float(uses[: max(1, count // 8)].sum() / uses.sum()),
                sum(repeats) / (len(repeats) * chosen) if repeats else 0.0,
            )
        )
    return found


class _Routes:
    """An observer that keeps routes alone."""

    def __init__(self) -> None:
        self.routes: dict[int, NDArray[np.int64]] = {}

    def matmul(self, name: str, x: F32) -> None:
        return None

    def expert_matmul(self, name: str, expert: int, x: F32) -> None:
        return None

    def route(self, layer: int, ids: NDArray[np.int64], weights: F32) -> None:
        self.routes[layer] = ids.copy()


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a GGUF of random weights.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="MiMo-V2-Flash", choices=KNOWN_MODELS)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, help="routed experts per layer")
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--mtp", type=int, help="MTP blocks: 3, of a dense model 0")
    parser.add_argument("--pattern", help="of layers, as 111110: 1 slides, 0 is global; repeated")
    parser.add_argument("--tiny", action="store_true", help="small widths, 4 layers")
    parser.add_argument("--expert-format", default="Q4_0")
    parser.add_argument("--dense-format", default="Q4_0")
    parser.add_argument("--head-format", default="Q6_K")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skew", type=float, default=0.0, help="spread of the routing biases")
    parser.add_argument("--check", type=int, default=0, metavar="N", help="route N tokens")
    args = parser.parse_args()
    try:
        mtp = args.mtp
        if mtp is None:
            mtp = 3 if known_model(args.model).family == "mimo_v2" else 0
        config = (
            tiny_config(args.model, mtp)
            if args.tiny
            else scaled_config(args.model, args.layers, args.experts, args.vocab, mtp, args.pattern)
        )
        size = write_model(
            args.out,
            config,
            experts=args.expert_format,
            dense=args.dense_format,
            head=args.head_format,
            seed=args.seed,
            skew=args.skew,
        )
        print(f"{args.out}: {size} bytes, {config.num_hidden_layers} layers", flush=True)
        for use in routing(args.out, args.check, args.seed) if args.check else ():
            print(
                f"layer {use.layer}: {use.distinct} of {config.n_routed_experts} experts used by "
                f"{args.check} tokens (evenly: {use.expected:.1f}), the busiest eighth "
                f"{use.busiest:.1%} of the time, {use.repeated:.1%} as the token before "
                f"(by chance: {config.num_experts_per_tok / config.n_routed_experts:.1%})"
            )
    except MimoEdgeError as error:
        parser.exit(error.exit_code, f"error: {error}\n")


if __name__ == "__main__":
    main()
