"""Processed tokens on disk: saved sessions, prompts that are processed once, idle caches."""
