"""A local server that speaks OpenAI's API: `mimo-edge serve`.

request bytes -> body (JSON, fields) -> calls (what is asked) -> work (gate, a thread per running
generation) -> answers (OpenAI's shapes). `app` puts them behind HTTP, `server` binds the socket.
Only `app` and `server` need the extra `serve`.
"""
