"""A conversation begun on one machine and gone on with on the other.

    python tools/arm/carry_session.py save BUNDLE FILE       # one turn, then saved
    python tools/arm/carry_session.py restore BUNDLE FILE    # restored, and a second turn
    python tools/arm/carry_session.py refuse OTHER FILE      # of another bundle: not restored

Prints the tokens of the turn, or why the session is refused.
"""

from __future__ import annotations

import json
import sys

from mimo_edge import Runtime
from mimo_edge.errors import SnapshotError
from mimo_edge.nano.commands import DEMO_TEXTS, DEMO_TOOLS


def main() -> None:
    """One turn of two, or none."""
    what, bundle, path = sys.argv[1:]
    with Runtime.open(bundle, kv_type="f32", draft=0, threads=1) as runtime:
        if what == "refuse":
            try:
                runtime.restore(path)
            except SnapshotError as error:
                print(json.dumps(str(error)))
                return
            sys.exit(f"{path} was restored with {bundle}")
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
