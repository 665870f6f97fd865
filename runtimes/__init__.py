"""Backends that run the forward pass; each is imported only when chosen."""
