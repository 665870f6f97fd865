"""mimo-nano: the built-in trained model, its tools and its held-out commands.

Light on purpose: importing this package reads no file and loads no dependency.
"""
