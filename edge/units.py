"""Sizes in bytes as people write them: "900MiB", "2.5 GB", "4096"; amounts rounded and cut up."""

from __future__ import annotations

import re

from mimo_edge.errors import UsageError

_UNITS = {
    "": 1,
    "B": 1,
    "K": 1 << 10,
    "KIB": 1 << 10,
    "KB": 1000,
    "M": 1 << 20,
    "MIB": 1 << 20,
    "MB": 1000**2,
    "G": 1 << 30,
    "GIB": 1 << 30,
    "GB": 1000**3,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(size: int | str) -> int:
    """Bytes of a size; K, M and G are powers of 1024, KB, MB and GB of 1000.

    Raises UsageError when it is no positive size.
    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        unit = _UNITS.get(match[2].upper()) if match else None
        amount = float(match[1]) * unit if match and unit else 0.0
    else:
        amount = 0 if isinstance(size, bool) or not isinstance(size, (int, float)) else size
    # Beyond 2^63 lie only infinity and slips of the hand.
    if not 0 < amount < 1 << 63 or (value := int(amount)) < 1:
        raise UsageError(f"{size!r} is no size in bytes", 'write for instance "900MiB" or "4GiB"')
    return value


def round_up(value: int, unit: int) -> int:
    """The least multiple of `unit` that is >= value."""
    return -(-value // unit) * unit


def format_bytes(size: int) -> str:
    """A size for people, in powers of 1024."""
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def format_rate(value: float, digits: int = 3) -> str:
    """A rate for people: so many digits that say something, and no exponent."""
    return f"{float(f'{value:.{digits}g}'):.12g}"


def even_part(total: int, most: int) -> int:
    """Size of the first of as few equal parts of `total` as are possible with parts of at most
    `most`: a small rest costs a pass over streamed experts like a large part."""
    return -(-total // -(-total // most))
