"""x86 ops: the schemas of namespace qpass_x86 and their shapes; csrc/shim*.cpp give them CPU kernels when loaded.

`n`, `k` are the weight's sizes; `activation` is 0 for float, 1 for int8 symmetric, 2 for int8 asymmetric; `isa` is the
number of an instruction set. The list forms take all weights' tensors in one list: qweight and scale of each, then what
`has` says (1 zero_point, 2 colsum, 4 bias, added up). They give one tensor [..., sum of n], outputs side by side: an op
that gives a list is called through Python, even where Inductor writes its calls in C++.

The experts' ops take the two weights of all experts in such a list, each tensor with a leading dimension of experts.
`sizes` are experts, hidden, intermediate, the two weights' bits, the gate's function (its place in GATE_FUNCTIONS) and
what the gate has (1 an up part, 2 a limit, 4 an up limit, added up); alpha to shift are the gate's numbers.

The decoded forms take weights of csrc/decoded.h: their tensors are codes and scale, then what `has` says (1 offset, 2
zero, then 4 table, 8 gain, 16 bias, added up); `count` is how many tensors each weight has.

`attention` is that of kernels/reference/attention.py, over keys and values in float, and native only: [B, M, Hq, Dv].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qpass.errors import NoKernel
from qpass.kernels.cpu import native

LIBRARY = torch.library.Library("qpass_x86", "DEF")
OPS = torch.ops.qpass_x86
MASKS = (torch.bool, torch.float32, torch.bfloat16, torch.float16)  # of `attention`
_WEIGHT = "Tensor qweight, Tensor scale, Tensor? zero_point, Tensor? colsum, Tensor? bias, int n, int k, int bits"
_WEIGHTS = "Tensor[] tensors, int[] n, int[] has, int k, int bits"
_CODES = "Tensor xq, Tensor x_scale, Tensor? x_zero_point"
LIBRARY.define(f"linear(Tensor x, {_WEIGHT}, int activation, int isa) -> Tensor")
LIBRARY.define(f"linear_q({_CODES}, {_WEIGHT}, ScalarType dtype, int isa) -> Tensor")
LIBRARY.define(f"linear_list(Tensor x, {_WEIGHTS}, int activation, int isa) -> Tensor")
LIBRARY.define("decoded(Tensor x, Tensor[] tensors, int n, int has, int k, int group_size, int isa) "
               "-> Tensor")
LIBRARY.define("decoded_list(Tensor x, Tensor[] tensors, int[] count, int[] n, int[] has, int k, int[] group_size, "
               "int isa) -> Tensor")
LIBRARY.define(f"linear_q_list({_CODES}, {_WEIGHTS}, ScalarType dtype, int isa) -> Tensor")
_EXPERTS = ("Tensor index, Tensor weight, Tensor[] tensors, int[] has, int[] sizes, float alpha, float limit, "
            "float up_limit, float shift, int down_activation")
LIBRARY.define(f"experts(Tensor x, {_EXPERTS}, int activation, int isa) -> Tensor")
LIBRARY.define(f"experts_q({_CODES}, {_EXPERTS}, ScalarType dtype, int isa) -> Tensor")


LIBRARY.define("attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float scale, int isa) "
               "-> Tensor")


def _product(x: Tensor, n: int, k: int, dtype: torch.dtype) -> Tensor:
    torch._check(x.shape[-1] == k, lambda: f"qpass_x86: x has {x.shape[-1]} features, the weight takes {k}")
    return x.new_empty((*x.shape[:-1], n), dtype=dtype)


@torch.library.register_fake("qpass_x86::linear", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _linear(x: Tensor, qweight: Tensor, scale: Tensor, zero_point: Tensor | None, colsum: Tensor | None,
            bias: Tensor | None, n: int, k: int, bits: int, activation: int, isa: int) -> Tensor:
    return _product(x, n, k, x.dtype)


@torch.library.register_fake("qpass_x86::linear_q", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _linear_q(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, qweight: Tensor, scale: Tensor,
              zero_point: Tensor | None, colsum: Tensor | None, bias: Tensor | None, n: int, k: int, bits: int,
              dtype: torch.dtype, isa: int) -> Tensor:
    return _product(xq, n, k, dtype)


@torch.library.register_fake("qpass_x86::linear_list", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _linear_list(x: Tensor, tensors: list[Tensor], n: list[int], has: list[int], k: int, bits: int, activation: int,
                 isa: int) -> Tensor:
    return _product(x, sum(n), k, x.dtype)


@torch.library.register_fake("qpass_x86::linear_q_list", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _linear_q_list(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, tensors: list[Tensor], n: list[int],
                   has: list[int], k: int, bits: int, dtype: torch.dtype, isa: int) -> Tensor:
    return _product(xq, sum(n), k, dtype)


def _mixed(x: Tensor, index: Tensor, sizes: list[int], dtype: torch.dtype) -> Tensor:
    torch._check(x.dim() == 2 and x.shape[1] == sizes[1] and index.shape[0] == x.shape[0],
                 lambda: f"qpass_x86: x is {tuple(x.shape)}, experts take [T, {sizes[1]}]")
    return x.new_empty((x.shape[0], sizes[1]), dtype=dtype)


@torch.library.register_fake("qpass_x86::experts", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _experts(x: Tensor, index: Tensor, weight: Tensor, tensors: list[Tensor], has: list[int], sizes: list[int],
             alpha: float, limit: float, up_limit: float, shift: float, down_activation: int, activation: int,
             isa: int) -> Tensor:
    return _mixed(x, index, sizes, x.dtype)


@torch.library.register_fake("qpass_x86::experts_q", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _experts_q(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, index: Tensor, weight: Tensor,
               tensors: list[Tensor], has: list[int], sizes: list[int], alpha: float, limit: float, up_limit: float,
               shift: float, down_activation: int, dtype: torch.dtype, isa: int) -> Tensor:
    return _mixed(xq, index, sizes, dtype)


@torch.library.register_fake("qpass_x86::decoded", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _decoded(x: Tensor, tensors: list[Tensor], n: int, has: int, k: int, group_size: int, isa: int) -> Tensor:
    return _product(x, n, k, x.dtype)


@torch.library.register_fake("qpass_x86::decoded_list", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _decoded_list(x: Tensor, tensors: list[Tensor], count: list[int], n: list[int], has: list[int], k: int,
                  group_size: list[int], isa: int) -> Tensor:
    return _product(x, sum(n), k, x.dtype)


@torch.library.register_fake("qpass_x86::attention", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float,
               isa: int) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))


def _load_then_call(name: str) -> Callable[..., Any]:
    """What the op does while the library is not loaded: a graph compiled earlier may be the first to need it."""

    part = {"decoded": "decoded", "decoded_list": "decoded", "attention": "attention"}.get(name, "products")

    def call(*args: Any) -> Any:
        if native.loaded(part):  # then dense CPU tensors have a kernel, and these are not
            if args[0].device.type == "cpu":
                raise NoKernel(f"qpass_x86::{name} takes dense tensors, got {args[0].layout}; call .to_dense() first")
            raise NoKernel(f"qpass_x86::{name} runs on the CPU, and its tensors are on {args[0].device}; "
                           "move the whole model with .to(device), which packs its weights anew")
        native.library(part)
        return getattr(OPS, name).default(*args)

    return call


for _name in ("linear", "linear_q", "linear_list", "linear_q_list", "decoded", "decoded_list", "experts", "experts_q",
              "attention"):
    LIBRARY.impl(_name, _load_then_call(_name), "CompositeExplicitAutograd")
