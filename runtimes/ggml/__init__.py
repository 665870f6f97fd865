"""The ggml backend: ctypes over the libggml that llama-cpp-python installs.

Imports nothing here: quant/ needs `library` alone, and importing it must not load a backend.
"""
