"""DType: torch's name of a dtype, and what its numbers are; so that headers are understood without importing torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

DType = Literal["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu",
                "float8_e4m3fnuz", "float8_e5m2fnuz", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16",
                "uint8", "bool", "complex64"]
"""`torch.<name>` is the dtype."""

FLOATS: tuple[DType, ...] = ("float32", "float16", "bfloat16")  # in which models compute
FLOAT8: tuple[DType, ...] = ("float8_e4m3fn", "float8_e5m2")
POWERS: tuple[DType, ...] = ("uint8", "float8_e8m0fnu")  # as which powers of two, E8M0, are stored

_BYTES = {"64": 8, "32": 4, "16": 2, "8": 1}


def itemsize(dtype: DType) -> int:
    """Bytes of one number."""
    if dtype == "bool":
        return 1
    digits = dtype.partition("_")[0].lstrip("abcdefghijklmnopqrstuvwxyz")
    return _BYTES[digits]


def is_float(dtype: DType) -> bool:
    """Whether it is a floating-point dtype, of whatever width."""
    return "float" in dtype


def dtype_name(dtype: torch.dtype | DType) -> DType:
    """The name of a dtype of torch; a name stays as it is."""
    return str(dtype).removeprefix("torch.")  # type: ignore[return-value]


def torch_dtype(name: DType) -> torch.dtype:
    """The dtype of torch with this name."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype
