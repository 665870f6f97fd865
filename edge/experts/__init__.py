"""Routed experts in a bounded number of slots in RAM, read from flash as routes ask for them."""
