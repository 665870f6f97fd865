"""The aarch64 side of the project on an x86-64 machine: an emulated root, libggml, device kit."""
