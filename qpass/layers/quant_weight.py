"""QuantWeight: a packed weight in a parameter's place inside a bigger forward, which answers as the parameter did."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qpass.activation_scale import ActivationScale
from qpass.kernels.layout import Packed
from qpass.layers.packed_layers import PackedWeight
from qpass.layers.weight_view import WeightView
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight


class QuantWeight(PackedWeight):
    """A parameter that is packed: `x @ w`, `F.linear(x, w)`, `addmm` and `einsum` with it run the kernel.

    `transposed` says that the parameter was stored [K, N]. It is a module so that `.to()` and `state_dict()` reach it.
    """

    def __init__(self, weight: CanonicalWeight | Packed, spec: LinearSpec, dtype: torch.dtype,
                 scale: ActivationScale | None = None, *, transposed: bool) -> None:
        super().__init__(weight, spec, dtype, scale)
        self.transposed = transposed

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product itself, for graphs that call it by name."""
        return self.multiply(x, bias)

    def taken_over(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self(x, bias)  # type: ignore[no-any-return]  # as a module, so that a graph knows whose product it is

    def view(self) -> WeightView:
        """The stand-in that answers as the parameter did."""
        return WeightView(self, transposed=self.transposed)

    @property
    def shape(self) -> torch.Size:
        return self.view().shape

    @property
    def ndim(self) -> int:
        return 2

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return 2

    @property
    def T(self) -> WeightView:
        return self.view().T

    @property
    def mT(self) -> WeightView:
        return self.view().T

    def t(self) -> WeightView:
        return self.view().T

    def transpose(self, dim0: int, dim1: int) -> WeightView:
        return self.view().transpose(dim0, dim1)

    def permute(self, *dims: int) -> WeightView:
        return self.view().permute(*dims)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        seen = tuple(a.view() if isinstance(a, QuantWeight) else a for a in args)
        named = {k: v.view() if isinstance(v, QuantWeight) else v for k, v in (kwargs or {}).items()}
        return WeightView.__torch_function__(func, types, seen, named)

    @property
    def data(self) -> WeightView:
        return self.view()

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def element_size(self) -> int:
        return self.dtype.itemsize

    def is_floating_point(self) -> bool:
        return True

    def numel(self) -> int:
        return self.shape.numel()

    def detach(self) -> WeightView:
        return self.view()

    # A module's casts change the module; a parameter's give another tensor, and that is what a forward means by them.
    def to(self, *args: Any, **kwargs: Any) -> Any:
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        moves = device is not None and device != self.device
        return super().to(*args, **kwargs) if moves else self.view().to(*args, **kwargs)

    def type(self, dst_type: Any = None) -> Any:
        return self.view().type(dst_type)

    def type_as(self, other: Tensor) -> WeightView:
        return self.view().to(other.dtype)

    def float(self) -> Any:
        return self.view().to(torch.float32)

    def double(self) -> Any:
        return self.view().to(torch.float64)

    def half(self) -> Any:
        return self.view().to(torch.float16)

    def bfloat16(self) -> Any:
        return self.view().to(torch.bfloat16)

    def extra_repr(self) -> str:
        return f"{self._spec_text}, transposed={self.transposed}"
