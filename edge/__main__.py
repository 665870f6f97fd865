"""`python -m mimo_edge` is the `mimo-edge` command."""

from mimo_edge.cli.main import app

app()
