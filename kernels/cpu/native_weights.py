"""Native weights: a float weight in; integers, or codes and scales as kernels want them packed, out of native code.

All take weights [N, K] on the CPU, contiguous, in float32, bfloat16 or float16, and, but for `largest`, count NaN and
Inf as 0.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, get_args

import torch

from qpass import large_pages
from qpass.dtype import DType, torch_dtype
from qpass.kernels.cpu.native import dtype_index, library, padded, succeed
from qpass.kernels.layout import NonFinite
from qpass.weight import CanonicalWeight

if TYPE_CHECKING:
    from torch import Tensor

Element = Literal["e2m1", "e4m3", "e2m3", "codebook"]
"""What a code stands for; e2m3 as the byte of e4m3 that has its value."""

Rule = Literal["exponent", "nested", "amax", "given", "absmax", "block"]
"""How scales are made and what they are given, as qp_encode_pack of csrc/abi.h says."""

_SCALES: dict[str, DType] = {"exponent": "uint8", "nested": "float8_e4m3fn", "absmax": "float32"}


def takes(weight: Tensor) -> bool:
    """Whether the functions here take this weight."""
    # A transposed weight would be copied whole first; plain torch reads it some rows at a time.
    return (weight.device.type == "cpu" and weight.dtype in dtype_index() and weight.is_contiguous()
            and weight.numel() > 0)


def quantize_weight(weight: Tensor, group_size: int, bits: int, *, symmetric: bool) -> CanonicalWeight:
    """weight [N, K] -> what qpass.weight.quantize_weight gives for it, bit for bit; groups of `group_size` along K."""
    weight = weight.detach().contiguous()
    n, k = weight.shape
    tensors = {"qweight": torch.empty(n, k, dtype=torch.int8),
               "scale": torch.empty(n, k // group_size, dtype=weight.dtype)}
    if not symmetric:
        tensors["zero_point"] = torch.empty(n, k // group_size, dtype=torch.int8)
    succeed(library().qp_quantize_weight(
        *_floats(weight), group_size, bits, int(symmetric), tensors["qweight"].data_ptr(), tensors["scale"].data_ptr(),
        None if symmetric else tensors["zero_point"].data_ptr(), torch.get_num_threads()))
    return CanonicalWeight(tensors)


def quantize_pack(weight: Tensor, group_size: int, bits: int, *, symmetric: bool, decoded: bool = False,
                  colsum: bool = False, into: Mapping[str, Tensor] | None = None, finite: bool = False
                  ) -> dict[str, Tensor]:
    """weight [N, K] -> quantize_weight of it packed, as csrc/product.h wants it or, if `decoded`, csrc/decoded.h, with
    scale and zero_point [Np / 16, G, 16] and, of rows of one group, colsum [Np]; in one go, and in the tensors of
    `into` if they have the shapes and dtypes for it. If `finite`, raises NonFinite for NaN and Inf, at the end."""
    n, k = weight.shape
    blocks, groups, width = padded(n, 32) // 16, k // group_size, 4 if bits <= 4 else 8
    wanted = {"qweight": ((blocks * 2 * padded(k, 64) * width,), torch.int8 if decoded and width == 8 else torch.uint8),
              "scale": ((blocks, groups, 16), weight.dtype)}
    wanted |= {} if symmetric else {"zero_point": ((blocks, groups, 16), torch.int8)}
    wanted |= {"colsum": ((blocks * 16,), torch.float32)} if colsum else {}
    packed, found = _room(wanted, into), ctypes.c_int32(1)
    succeed(library().qp_quantize_pack(
        *_floats(weight), group_size, bits, int(symmetric), int(decoded), packed["qweight"].data_ptr(),
        packed["qweight"].numel(), packed["scale"].data_ptr(),
        None if symmetric else packed["zero_point"].data_ptr(), packed["colsum"].data_ptr() if colsum else None,
        ctypes.byref(found) if finite else None, torch.get_num_threads()))
    _refuse(found)
    return packed


def encode_pack(weight: Tensor, group_size: int, element: Element, rule: Rule, given: Tensor | None = None, *,
                into: Mapping[str, Tensor] | None = None, finite: bool = False) -> dict[str, Tensor]:
    """weight [N, K] -> qweight and scale as x86_decoded packs what the codec of these numbers gives, bit for bit; the
    last group of a row may be smaller. `into` and `finite` as of quantize_pack."""
    n, k = weight.shape
    blocks, groups = padded(n, 32) // 16, -(-k // group_size)
    width, dtype = (4, torch.uint8) if element in ("e2m1", "codebook") else (8, torch.float8_e4m3fn)
    scales = torch_dtype(_SCALES[rule]) if rule in _SCALES else weight.dtype
    packed = _room({"qweight": ((blocks * 2 * padded(k, 64) * width,), dtype),
                    "scale": ((blocks, groups, 16), scales)}, into)
    given = torch.empty(0) if given is None else given.contiguous()
    assert given.dtype == torch.float32
    found = ctypes.c_int32(1)
    succeed(library("decoded").qp_encode_pack(
        *_floats(weight), min(group_size, k), get_args(Element).index(element), get_args(Rule).index(rule),
        given.data_ptr(), given.numel(), packed["qweight"].data_ptr(), packed["qweight"].nbytes,
        packed["scale"].data_ptr(), packed["scale"].nbytes, ctypes.byref(found) if finite else None,
        torch.get_num_threads()), "decoded")
    _refuse(found)
    return packed


def amax(weight: Tensor, group_size: int) -> Tensor:
    """weight [N, K] -> the largest magnitude of each group of each row, float32 [N, G]."""
    n, k = weight.shape
    found = torch.empty(n, -(-k // group_size))
    succeed(library("decoded").qp_amax(*_floats(weight), min(group_size, k), found.data_ptr(),
                                      torch.get_num_threads()), "decoded")
    return found


def largest(weight: Tensor, part: str = "products") -> Tensor:
    """The largest magnitude, float32 [], of a contiguous weight of float32, bfloat16 or float16 with any number of
    dimensions, 0 of an empty one; Inf or NaN if it holds one, and so what says whether all of it is finite. `part` is
    one of the library's that is needed anyway."""
    found = torch.empty(())
    succeed(library(part).qp_largest(weight.data_ptr(), dtype_index()[weight.dtype], weight.numel(), found.data_ptr(),
                                     torch.get_num_threads()), part)
    return found


def _refuse(found: ctypes.c_int32) -> None:
    if not found.value:
        raise NonFinite("the weight holds NaN or Inf")


def _floats(weight: Tensor) -> tuple[int, int, int, int, int]:
    n, k = weight.shape
    return weight.data_ptr(), dtype_index()[weight.dtype], weight.nbytes, n, k


def _room(wanted: Mapping[str, tuple[tuple[int, ...], torch.dtype]], into: Mapping[str, Tensor] | None
          ) -> dict[str, Tensor]:
    """Tensors of these shapes and dtypes: those of `into`, or new ones."""
    if into is not None and all(
            name in into and (tuple(into[name].shape), into[name].dtype) == (size, dtype)
            and into[name].is_contiguous() and into[name].device.type == "cpu"
            for name, (size, dtype) in wanted.items()):
        return {name: into[name] for name in wanted}
    return {name: large_pages.empty(size, dtype) for name, (size, dtype) in wanted.items()}
