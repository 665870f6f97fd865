"""A conversation begun on one machine and gone on with on the other.

    python tools/arm/carry_session.py save BUNDLE FILE       # one turn, then saved
    python tools/arm/carry_session.py restore BUNDLE FILE    # restored, and a second turn

Prints the tokens of the turn.
"""

from __future__ import annotations

import json
import sys

from mimo_edge import Runtime
from mimo_edge.nano.commands import DEMO_TEXTS, DEMO_TOOLS


def main() -> None:
    """One turn of two."""
    what, bundle, path = sys.argv[1:]
    with Runtime.open(bundle, kv_type="f32", draft=0, threads=1) as runtime:
        if what == "restore":
            session, text = runtime.restore(path), DEMO_TEXTS[1]
        else:
            session = runtime.session(tools=DEMO_TOOLS, enable_thinking=False)
            text = DEMO_TEXTS[0]
        reply = session.generate(text, max_tokens=24, temperature=0)
        print(json.dumps(list(reply.token_ids)))
        if what == "save":
            session.save(path)


if __name__ == "__main__":
    main()
