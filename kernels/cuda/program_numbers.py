"""Program numbers: a spec in, the constants by which the Triton program `product` is specialized out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from qpass.kernels.cuda.layouts import halved
from qpass.spec import LinearSpec

_FORMATS = {"fp8": "e4m3", "mxfp8": "e4m3", "mxfp4": "e2m1", "nvfp4": "e2m1", "nvfp4_mul": "e2m1",
            "nvfp4_reciprocal": "e2m1", "nf4": "book", "fp4": "book"}
_FACTORS = {"nvfp4": "over", "nvfp4_mul": "times", "nvfp4_reciprocal": "over"}
WHOLE_TENSOR = 1 << 30


@dataclass(frozen=True, kw_only=True)
class ProgramNumbers:
    """What a program must know of the weight's format.

    format      how bytes become numbers (programs/decode.py); of fp8, `e5m2` is seen on the tensor itself
    group       inputs that share a scale, 0 for a whole row
    scales      `float`, `e8m0` or `e4m3`; `integer` is seen on the tensor itself
    scale_rows  rows that share a scale
    factor      `times` or `over` for a float of the whole tensor, or nothing
    x_group     inputs of the activation that share a scale, 0 for a token
    """

    format: str
    halves: bool
    group: int
    scales: str
    scale_rows: int
    factor: str
    x_group: int

    @property
    def step(self) -> int:
        """The largest number of inputs, a power of two, that one step of a program may take; 0 for any."""
        if self.group == 0:
            return 0
        least = 64 if self.halves else 16
        return max(least, self.group & -self.group) if self.group != 16 else least


@lru_cache(maxsize=1024)
def numbers_of(spec: LinearSpec) -> ProgramNumbers:
    """The constants for a spec that no kernel refuses."""
    weight = spec.weight
    kind = ("int4" if halved(spec) else "int8") if weight.type == "int" else _FORMATS[weight.type]
    scales = {"mxfp4": "e8m0", "mxfp8": "e8m0"}.get(weight.type, "e4m3" if weight.type.startswith("nvfp4") else "float")
    rows = {"per_block": weight.group_size or 1, "per_tensor": WHOLE_TENSOR if weight.type != "int" else 1}
    activation = spec.activation
    return ProgramNumbers(
        format=kind, halves=halved(spec), group=weight.group_size or 0, scales=scales,
        scale_rows=rows.get(weight.granularity, 1), factor=_FACTORS.get(weight.type, ""),
        x_group=(activation.group_size or 0) if activation is not None else 0)
