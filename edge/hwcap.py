"""What the kernel tells a process of its ARM processor: the words HWCAP and HWCAP2.

They are asked of the C library, not of /proc/cpuinfo: some Android apps may not read that file,
and under emulation it is the host's.
Source: linux:arch/arm64/include/uapi/asm/hwcap.h.
"""

from __future__ import annotations

import ctypes
import platform
import sys

_AT_HWCAP, _AT_HWCAP2 = 16, 26
# Extensions our kernels use, as device profiles name them: (word, bit).
_BITS = {
    "neon": (0, 1),
    "fp16": (0, 10),
    "dotprod": (0, 20),
    "i8mm": (1, 13),
    "sve": (0, 22),
    "sve2": (1, 1),
    "sme": (1, 23),
}


def hwcap_words() -> tuple[int, int] | None:
    """(HWCAP, HWCAP2) of this processor; None where it is no 64-bit ARM, or no Linux kernel."""
    if platform.machine() not in ("aarch64", "arm64") or sys.platform not in ("linux", "android"):
        return None
    function = getattr(ctypes.CDLL(None), "getauxval", None)
    if function is None:
        return None
    function.restype, function.argtypes = ctypes.c_ulong, (ctypes.c_ulong,)
    return int(function(_AT_HWCAP)), int(function(_AT_HWCAP2))


def arm_extensions(words: tuple[int, int]) -> tuple[str, ...]:
    """Names of the extensions whose bits are set in (HWCAP, HWCAP2)."""
    return tuple(name for name, (word, bit) in _BITS.items() if words[word] >> bit & 1)
