"""Command line of mimo-edge: parses, calls the API, prints."""
