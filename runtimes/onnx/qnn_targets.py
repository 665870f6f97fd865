"""Qualcomm chips whose HTP (Hexagon tensor processor) we compile for.

A target is an architecture and a chip: the compiler sizes its tiles by the chip's on-die memory
(VTCM), and with the architecture alone it assumes so little that a layer may not fit.

Source of chip numbers and VTCM: pytorch/executorch:backends/qualcomm/serialization/qc_schema.py.
Which marketing name a number stands for was not checked on hardware.
"""

from __future__ import annotations

from typing import NamedTuple

from mimo_edge.errors import UsageError


class Target(NamedTuple):
    """`name` as in a variant's name ("v73", "sa8255"); `arch` and `soc_model` go to the compiler
    together, always; `vtcm_mib` is what the chip has on its die."""

    name: str
    arch: int
    soc_model: int
    vtcm_mib: int

    @property
    def int16_products(self) -> bool:
        """Whether it multiplies int16 activations by int16 ones; others take u16 as the second
        factor and use its upper 8 bits."""
        return self.arch >= 73

    @property
    def variant(self) -> str:
        """Name of the package variant for this target."""
        return f"qnn-{self.name}"


CHIPS = {
    target.name: target
    for target in (
        Target("sm8350", 68, 30, 4),
        Target("sa8295", 68, 39, 8),
        Target("sm8450", 69, 36, 8),
        Target("sm8475", 69, 42, 8),
        Target("sm8550", 73, 43, 8),
        Target("sa8255", 73, 52, 8),
        Target("qcs9100", 73, 77, 8),
        Target("sm8650", 75, 57, 8),
        Target("sm8750", 79, 69, 8),
        Target("sm8850", 81, 87, 8),
    )
}

# The chip an architecture's name stands for.
_USUAL = {
    "v68": "sa8295",
    "v69": "sm8450",
    "v73": "sm8550",
    "v75": "sm8650",
    "v79": "sm8750",
    "v81": "sm8850",
}

TARGETS = {name: CHIPS[chip]._replace(name=name) for name, chip in _USUAL.items()} | CHIPS


def target(name: str) -> Target:
    """The target called "v73" (an architecture, with its usual chip) or "sa8255" (a chip).

    Raises UsageError when there is none."""
    try:
        return TARGETS[name.strip().lower()]
    except KeyError:
        raise UsageError(
            f"unknown NPU {name!r}",
            f"architectures: {', '.join(_USUAL)}; chips: {', '.join(CHIPS)}",
        ) from None


def targets(names: str) -> tuple[Target, ...]:
    """The targets of a list like "v73,sa8255", each once. Raises UsageError."""
    found = dict.fromkeys(target(name) for name in names.split(",") if name.strip())
    if not found:
        raise UsageError("no NPU was named", f"architectures: {', '.join(_USUAL)}")
    return tuple(found)
