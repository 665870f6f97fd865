"""Answers from another machine: an OpenAI-compatible server behind the API of a local runtime, and
the choice between the two."""
