"""Native: the loaded library as Python functions; loading it is also what gives the qpass_x86 ops their CPU kernels.

It has parts (compile_library.PARTS), which are loaded, and built, when first asked for; one that came with the package
holds all of them.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from qpass import large_pages
from qpass.errors import NoKernel
from qpass.kernels.cpu import build, compile_library
from qpass.kernels.isa import machine_has
from qpass.weight import CanonicalWeight

if TYPE_CHECKING:
    from torch import Tensor

ISA_INDEX = {"x86_64": 0, "avx2": 1, "avx512_vnni": 2, "amx_int8": 3}
"""An instruction set's number in the library, by its name in the registry."""

_I32, _I64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "qp_isa_available": (_I32,),
    "qp_pack": (_POINTER, _I64, _I64, _I64, _I32, _POINTER, _I64, _I32),
    "qp_unpack": (_POINTER, _I64, _I64, _I64, _I32, _POINTER, _I64, _I32),
    "qp_quantize_weight": (_POINTER, _I32, _I64, _I64, _I64, _I64, _I32, _I32, _POINTER, _POINTER, _POINTER, _I32),
    "qp_quantize_pack": (_POINTER, _I32, _I64, _I64, _I64, _I64, _I32, _I32, _I32, _POINTER, _I64, _POINTER, _POINTER,
                         _POINTER, _POINTER, _I32),
    "qp_encode_pack": (_POINTER, _I32, _I64, _I64, _I64, _I64, _I32, _I32, _POINTER, _I64, _POINTER, _I64, _POINTER,
                       _I64, _POINTER, _I32),
    "qp_amax": (_POINTER, _I32, _I64, _I64, _I64, _I64, _POINTER, _I32),
    "qp_search_ranges": (_POINTER, _I64, _I64, _I64, _I64, _POINTER, _I64, _I32, _I32, _I32, _I32, ctypes.c_float,
                         _POINTER, _I64, _I32, _POINTER, _POINTER, _I32),
    "qp_round_columns": (_POINTER, _POINTER, _POINTER, _POINTER, _I64, _I64, ctypes.c_float, ctypes.c_float, _POINTER,
                         _POINTER, _I32),
    "qp_descend_columns": (_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _I64, _I64, ctypes.c_float, ctypes.c_float,
                           _POINTER, _POINTER, _I32),
    "qp_largest": (_POINTER, _I32, _I64, _POINTER, _I32),
    "qp_attention": (_I32, _POINTER, _I32, _POINTER, _I32, _POINTER, _POINTER, _POINTER, _I32, _POINTER, _I64, _I32,
                     ctypes.c_float, ctypes.c_float, _POINTER, _I32),
    "qp_quantize": (_I32, _POINTER, _I32, _I64, _I64, _POINTER, _POINTER, _POINTER),
}
_lock = threading.Lock()
_loaded: dict[str, ctypes.CDLL] = {}
_failure: dict[str, str] = {}


def refuses(part: str = "products") -> str | None:
    """Why the library cannot be had, or None if it is there or a compiler is; compiles and loads nothing."""
    if part in _loaded:
        return None
    if part in _failure:
        return _failure[part]
    if sys.platform != "linux" or sys.byteorder != "little":
        return f"is built for little-endian Linux, this is {sys.byteorder}-endian {sys.platform}"
    return None if compile_library.compiler() or build.find_library(part) else compile_library.missing_compiler()


def prepare(part: str = "products") -> str | None:
    """Make a part ready, building it if need be; None, or why it failed. It is tried once a process."""
    try:
        library(part)
    except NoKernel as why:
        return str(why)
    return None


@cache
def dtype_index() -> dict[torch.dtype, int]:
    """The library's numbers for dtypes of activations and scales."""
    return {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@cache
def op(name: str) -> Callable[..., Any]:
    """The op `qpass_x86::<name>`. Asking defines the ops, which asking for a kernel does not."""
    from qpass.kernels.cpu.x86_ops import OPS

    found: Callable[..., Any] = getattr(OPS, name).default
    return found


def loaded(part: str = "products") -> bool:
    """Whether this process has a part, and so its ops their CPU kernels."""
    return part in _loaded


def library(part: str = "products") -> ctypes.CDLL:
    """A part, built and loaded on the first call. Raises NoKernel with the reason, the same one every time."""
    if (found := _loaded.get(part)) is not None:
        return found
    with _lock:
        if part not in _loaded and part not in _failure:
            if (why := refuses(part)) is None:
                try:
                    _loaded[part] = _load(part)
                except (compile_library.BuildFailed, OSError) as error:
                    why = str(error)
            if why is not None:
                _failure[part] = why
        if part not in _loaded:
            raise NoKernel(_failure[part])
        return _loaded[part]


def _load(part: str) -> ctypes.CDLL:
    found = _open(part)
    for name, arguments in _SIGNATURES.items():
        if hasattr(found, name):  # each is in some parts
            getattr(found, name).argtypes = arguments
            getattr(found, name).restype = _I32
    found.qp_last_error.restype = ctypes.c_char_p
    return found


def _open(part: str) -> ctypes.CDLL:
    # torch is imported by now, so the library finds torch's OpenMP runtime loaded and shares its threads.
    if (shipped := build.shipped_library()) is not None:
        try:
            return ctypes.CDLL(str(shipped))
        except OSError:  # made for another C library, say
            if compile_library.compiler() is None:
                raise
    return ctypes.CDLL(str(build.build(part)))


def attention_isa() -> int:
    """The number of the best instruction set that attention knows and this machine has, capped by QPASS_ISA."""
    return next((ISA_INDEX[isa] for isa in ("avx512_vnni", "avx2") if isa in machine_has()), 0)


@cache
def available(isa: str) -> bool:
    """Whether the products can run on this instruction set here, by their own look at the processor."""
    return bool(library().qp_isa_available(ISA_INDEX[isa]))


def pack(weight: CanonicalWeight, bits: int, part: str = "products", into: Tensor | None = None) -> Tensor:
    """qweight int8 [N, K] -> uint8 [Np * Kp * bits / 8] in the order of csrc/product.h, written to `into` if that is
    given; `part` is one needed anyway."""
    q = weight.qweight.contiguous()
    n, k = q.shape
    packed = large_pages.empty((packed_bytes(n, k, bits),), torch.uint8) if into is None else into
    succeed(library(part).qp_pack(q.data_ptr(), q.numel(), n, k, bits, packed.data_ptr(), packed.numel(),
                                  torch.get_num_threads()), part)
    return packed


def packed_bytes(n: int, k: int, bits: int) -> int:
    """How many bytes `pack` makes of a weight [n, k]."""
    return padded(n, 32) * padded(k, 64) * bits // 8


def unpack(packed: Tensor, n: int, k: int, bits: int, part: str = "products") -> Tensor:
    """The inverse of `pack`: int8 [n, k]."""
    packed = packed.contiguous()
    q = torch.empty(n, k, dtype=torch.int8)
    succeed(library(part).qp_unpack(packed.data_ptr(), packed.numel(), n, k, bits, q.data_ptr(), q.numel(),
                                    torch.get_num_threads()), part)
    return q


def quantize(x: Tensor, isa: str, *, symmetric: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [M, K] -> codes int8 [M, K], scale and zero point float32 [M, 1] (or None), as `isa` computes them."""
    x = x.contiguous()
    m, k = x.shape
    q, scale = torch.empty(m, k, dtype=torch.int8), torch.empty(m, 1)
    zero_point = None if symmetric else torch.empty(m, 1)
    succeed(library().qp_quantize(ISA_INDEX[isa], x.data_ptr(), dtype_index()[x.dtype], m, k, q.data_ptr(),
                                   scale.data_ptr(), None if zero_point is None else zero_point.data_ptr()))
    return q, scale, zero_point


def padded(size: int, to: int) -> int:
    """The smallest multiple of `to` that is at least `size`."""
    return -(-size // to) * to


def succeed(code: int, part: str = "products") -> None:
    """Raises ValueError with the last error of the part that gave this code unless it is 0."""
    if code != 0:
        raise ValueError(library(part).qp_last_error().decode())
