"""Which tensor gets which format: by role, by name where overridden, and by row width.

A recipe never falls back silently: `format_for` returns a `Choice` that says what was chosen
and why, and whether it is what the recipe asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from mimo_edge.config import Family
from mimo_edge.errors import ConfigError, UsageError
from mimo_edge.quant.base import FORMATS, Format, get_format
from mimo_edge.quant.roles import UNQUANTISED, Role

# What to use when rows are not whole blocks of a format: the next smaller block of similar
# quality, at last F16, which takes any row. Source: llama.cpp:src/llama-quant.cpp
# tensor_type_fallback, with IQ4_NL where that uses formats we do not write.
FALLBACKS: Mapping[str, str] = MappingProxyType(
    {
        "Q6_K": "Q8_0",
        "Q5_K": "Q8_0",
        "Q4_K": "IQ4_NL",
        "Q3_K": "IQ4_NL",
        "Q2_K": "IQ4_NL",
        "IQ4_XS": "IQ4_NL",
        "IQ3_XXS": "IQ4_NL",
        "IQ2_XXS": "IQ4_NL",
        "IQ4_NL": "F16",
        "Q4_0": "F16",
        "MXFP4": "F16",
        "Q8_0": "F16",
    }
)

# general.file_type of a GGUF, by the format of its bulk. Source: llama.h enum llama_ftype.
_FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q8_0": 7,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 14,
    "Q5_K": 16,
    "Q6_K": 18,
    "IQ2_XXS": 19,
    "IQ3_XXS": 23,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "BF16": 32,
    "MXFP4": 38,
}

_PLAIN = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Choice:
    """The format of one tensor. `fallback` is true when `wanted` does not fit the rows."""

    format: Format
    reason: str
    wanted: str
    fallback: bool = False


@dataclass(frozen=True)
class Recipe:
    """Formats by role, with overrides by glob on the tensor name (the first match wins)."""

    name: str
    bulk: str  # format of most of the bytes: the experts, or everything in a dense model
    formats: Mapping[Role, str]
    overrides: tuple[tuple[str, str], ...] = field(default=())

    def __post_init__(self) -> None:
        if missing := [role.value for role in Role if role not in self.formats]:
            raise ConfigError(f"recipe {self.name!r} has no format for {missing}")
        formats = {role: get_format(name).name for role, name in self.formats.items()}
        for role in UNQUANTISED:
            if formats[role] != "F32":
                raise ConfigError(
                    f"recipe {self.name!r} gives {role.value} {formats[role]}; it must stay F32"
                )
        object.__setattr__(self, "bulk", get_format(self.bulk).name)
        object.__setattr__(self, "formats", formats)
        object.__setattr__(
            self,
            "overrides",
            tuple((pattern, get_format(name).name) for pattern, name in self.overrides),
        )

    @classmethod
    def named(cls, name: str, *, family: Family = "mimo_v2") -> Recipe:
        """The recipe whose bulk is the format `name` ("q4_0", "q4_k", "mxfp4", "f16", ...).

        Of a MoE model the bulk is the routed experts; of the dense MiMo-7B it is attention and
        FFN. The rest keeps 8 bits: 4-bit MTP blocks are known to lose their acceptance. f32,
        f16 and bf16 apply to every matrix. Raises UsageError on an unknown name.
        """
        bulk = name.upper()
        if bulk not in FORMATS:
            raise UsageError(f"unknown recipe {name!r}", f"known: {', '.join(recipe_names())}")
        formats = dict.fromkeys(Role, "F32")
        matrices = [role for role in Role if role not in UNQUANTISED]
        if bulk in _PLAIN:
            formats |= dict.fromkeys(matrices, bulk)
        else:
            formats |= dict.fromkeys(matrices, "Q8_0")
            formats[Role.HEAD] = "Q8_0" if bulk == "Q8_0" else "Q6_K"
            formats[Role.EXPERT] = bulk
            if family == "mimo":
                formats[Role.ATTENTION] = formats[Role.DENSE_FFN] = bulk
        return cls(bulk.lower(), bulk, formats)

    def with_overrides(self, overrides: Iterable[tuple[str, str]]) -> Recipe:
        """This recipe with (glob, format) pairs that win over the ones it has.

        Raises UsageError on an unknown format."""
        added = tuple(overrides)
        for pattern, name in added:
            if name.upper() not in FORMATS:
                raise UsageError(
                    f"override of {pattern!r} to the unknown format {name!r}",
                    f"known: {', '.join(recipe_names())}",
                )
        return replace(self, overrides=(*added, *self.overrides))

    @property
    def file_type(self) -> int:
        """`general.file_type` of a GGUF made by this recipe."""
        return _FILE_TYPES[self.bulk]

    @property
    def requires_importance(self) -> bool:
        """Whether some format of this recipe cannot be made without calibration."""
        names = {*self.formats.values(), *(name for _, name in self.overrides)}
        return any(get_format(name).requires_importance for name in names)

    def format_for(self, role: Role, cols: int, name: str = "") -> Choice:
        """The format of a tensor of `role` with rows of `cols` elements.

        `name` is its GGUF name, for overrides. An override with wildcards passes over tensors
        that must stay F32; one that names such a tensor exactly is a UsageError.
        """
        wanted, reason = self.formats[role], f"{role.value} in recipe {self.name}"
        for pattern, override in self.overrides:
            if not name or not fnmatchcase(name, pattern):
                continue
            if role in UNQUANTISED and override != "F32":
                if pattern == name:
                    raise UsageError(f"{name} ({role.value}) must stay F32, cannot be {override}")
                continue
            wanted, reason = override, f"override {pattern}={override}"
            break
        chosen = wanted
        while not FORMATS[chosen].supports(cols):
            if chosen not in FALLBACKS:
                raise UsageError(f"{name or role.value} has rows of {cols} elements")
            chosen = FALLBACKS[chosen]
        if chosen != wanted:
            reason += (
                f", but {wanted} needs a multiple of {FORMATS[wanted].block_size} columns "
                f"and there are {cols}: {chosen}"
            )
        return Choice(FORMATS[chosen], reason, wanted, fallback=chosen != wanted)

    def unused_overrides(self, names: Iterable[str]) -> list[str]:
        """Patterns that match none of `names`: almost always a typing error."""
        listed = list(names)
        return [
            pattern
            for pattern, _ in self.overrides
            if not any(fnmatchcase(name, pattern) for name in listed)
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as in the bundle manifest; read back by `from_dict`."""
        return {
            "name": self.name,
            "bulk": self.bulk,
            "formats": {role.value: self.formats[role] for role in Role},
            "overrides": [list(pair) for pair in self.overrides],
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Recipe:
        """Inverse of `to_dict`. Raises ConfigError or QuantError on anything malformed."""
        try:
            if unknown := sorted(set(raw) - {"name", "bulk", "formats", "overrides"}):
                raise ConfigError(f"recipe has unknown fields {unknown}")
            formats = {Role(role): str(name) for role, name in raw["formats"].items()}
            overrides = tuple((str(p), str(n)) for p, n in raw["overrides"])
            return cls(str(raw["name"]), str(raw["bulk"]), formats, overrides)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"recipe is malformed: {error!r}") from error


def recipe_names() -> list[str]:
    """Names `Recipe.named` takes, largest format first."""
    formats = sorted(FORMATS.values(), key=lambda f: (-f.bits_per_weight, f.name))
    return [fmt.name.lower() for fmt in formats]
