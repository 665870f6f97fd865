"""Turns a Hugging Face checkpoint into a bundle for a device."""
