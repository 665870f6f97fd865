"""Ask a bundle: FOLDER/bin/python ask.py BUNDLE TEXT. An example of embedding the runtime."""

import sys

import mimo_edge as me
from mimo_edge.nano.commands import DEMO_TOOLS  # put the tools of your device here

if len(sys.argv) != 3:
    sys.exit(__doc__)
try:
    with me.Runtime.open(sys.argv[1]) as runtime:
        session = runtime.session(tools=DEMO_TOOLS, enable_thinking=False)
        reply = session.generate(sys.argv[2], max_tokens=128)
except me.MimoEdgeError as error:
    sys.exit(str(error))
print(reply.text, end="")
for call in reply.tool_calls:
    print(call.name, dict(call.arguments))
