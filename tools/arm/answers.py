"""Answers of a bundle to held-out commands, as JSON: run on both machines and compared.

    python tools/arm/answers.py BUNDLE --commands 4 [--kv-type f32] [--draft 0]

First a line that says which libggml computes, then one per command: its id, the tokens of the
greedy answer, and whether it calls exactly the right tools.
"""

from __future__ import annotations

import argparse
import json

from mimo_edge import Runtime
from mimo_edge.evaluate import ENDED, same_calls
from mimo_edge.nano.commands import TOOLS, held_out
from mimo_edge.runtimes.ggml.bindings import bindings
from mimo_edge.runtimes.ggml.cpu_library import variant_name
from mimo_edge.suites import spread


def main() -> None:
    """Print the answers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--commands", type=int, default=4)
    parser.add_argument("--kv-type", default="f16")
    parser.add_argument("--draft", type=int, default=3)
    wanted = parser.parse_args()
    with Runtime.open(
        wanted.bundle, kv_type=wanted.kv_type, draft=wanted.draft, threads=1
    ) as runtime:
        library = bindings()
        about = {"variant": variant_name(library.cpu_path), "features": list(library.features)}
        print(json.dumps(about), flush=True)
        for command in spread(held_out(), wanted.commands):
            tools = [TOOLS[name] for name in command["tools"]]
            session = runtime.session(tools=tools, enable_thinking=False)
            reply = session.generate(command["text"], max_tokens=128, temperature=0)
            exact = same_calls(reply.tool_calls, command["calls"])
            exact = exact and not reply.malformed and reply.finish_reason in ENDED
            found = {"id": command["id"], "tokens": list(reply.token_ids), "exact": exact}
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
