"""WeightView: stands where a float weight stood, and turns each product with it into a call of its kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qpass.errors import PackedForInference

if TYPE_CHECKING:
    from qpass.layers.packed_layers import PackedWeight

_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)
_TRANSPOSES = (torch.t, torch.transpose, torch.swapaxes, torch.swapdims, torch.permute, torch.adjoint)


class WeightView:
    """`owner`'s weight as [N, K], or as [K, N] if transposed; no copy is made."""

    def __init__(self, owner: PackedWeight, *, transposed: bool = False, dtype: torch.dtype | None = None) -> None:
        self.owner = owner
        self.transposed = transposed
        self.dtype = dtype or owner.dtype

    def __repr__(self) -> str:
        return f"WeightView({self.owner._spec_text}, shape={list(self.shape)}, dtype={self.dtype})"

    def __getattr__(self, name: str) -> Any:  # of what is not found elsewhere
        raise AttributeError(f"a weight packed by qpass has no {name!r}, for it holds no float numbers; .dequantize() "
                             "gives it as an ordinary float tensor", name=name, obj=self)

    @property
    def device(self) -> torch.device:
        return self.owner.device

    @property
    def shape(self) -> torch.Size:
        n, k = self.owner.spec.out_features, self.owner.spec.in_features
        return torch.Size((k, n) if self.transposed else (n, k))

    @property
    def ndim(self) -> int:
        return 2

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return 2

    def numel(self) -> int:
        return self.shape.numel()

    @property
    def requires_grad(self) -> bool:
        return False

    @property
    def grad(self) -> None:
        return None

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def is_meta(self) -> bool:
        return self.device.type == "meta"

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def element_size(self) -> int:
        return self.dtype.itemsize

    def is_floating_point(self) -> bool:
        return True

    @property
    def data(self) -> WeightView:
        return self

    def detach(self) -> WeightView:
        return self

    def contiguous(self) -> WeightView:
        return self

    def to(self, *args: Any, **kwargs: Any) -> WeightView:
        """As Tensor.to: another dtype is what is answered from then on, while a product has its activation's anyway.

        Raises PackedForInference for another device, to which only the whole layer can go.
        """
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype)
        device, dtype = torch._C._nn._parse_to(*args, **kwargs)[:2]
        if device is not None and device.type != self.device.type:
            raise PackedForInference(f"a packed weight on {self.device} was asked for on {device}; move the model, "
                                     "model.to(device), and its weights come along")
        return WeightView(self.owner, transposed=self.transposed, dtype=dtype or self.dtype)

    def type(self, dtype: Any = None) -> Any:
        if dtype is None:
            return torch.empty(0, dtype=self.dtype, device=self.device).type()
        return self.to(torch.empty(0).type(dtype).dtype)

    def type_as(self, other: Tensor) -> WeightView:
        return self.to(other.dtype)

    def float(self) -> WeightView:
        return self.to(torch.float32)

    def half(self) -> WeightView:
        return self.to(torch.float16)

    def bfloat16(self) -> WeightView:
        return self.to(torch.bfloat16)

    @property
    def T(self) -> WeightView:
        return WeightView(self.owner, transposed=not self.transposed, dtype=self.dtype)

    @property
    def mT(self) -> WeightView:
        return self.T

    def t(self) -> WeightView:
        return self.T

    def transpose(self, dim0: int, dim1: int) -> WeightView:
        return self if dim0 % 2 == dim1 % 2 else self.T

    def permute(self, *dims: Any) -> WeightView:
        order = dims[0] if len(dims) == 1 else dims
        return self if tuple(d % 2 for d in order) == (0, 1) else self.T

    def dequantize(self) -> Tensor:
        """The weight as quantized, as an ordinary float tensor of this shape."""
        weight = self.owner.dequantize(self.dtype)
        return weight.t() if self.transposed else weight

    def _as_out_in(self, x: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """x @ self + bias, or None if the kernel cannot, because the weight stands the other way round."""
        return self.owner.taken_over(x, bias) if self.transposed else None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        y: Any = None
        if func is F.linear:
            y = _linear(*args, **kwargs)
        elif func in _PRODUCTS:
            y = _product(*args, **kwargs)
        elif func in (torch.addmm, torch.Tensor.addmm):
            y = _addmm(*args, **kwargs)
        elif func is F.embedding:
            y = _rows(*args, **kwargs)
        elif func is torch.einsum:
            y = _einsum(args)
        elif func in _TRANSPOSES:
            y = _transposed(func, *args, **kwargs)
        if y is None:
            name = getattr(func, "__name__", str(func))
            raise PackedForInference(f"a weight packed by qpass was given to {name}, which is no product it can "
                                     f"take over; "
                                     "add the layer to ignore, or call .dequantize() on the weight")
        return y


def _linear(input: Any, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    return weight.T._as_out_in(input, bias) if isinstance(weight, WeightView) else None


def _rows(input: Tensor, weight: Any, padding_idx: int | None = None, max_norm: float | None = None,
          *unused: Any, **named: Any) -> Tensor | None:
    """The look-up of an embedding; padding and scaled gradients change nothing of what it gives, max_norm would."""
    rows = getattr(weight.owner, "rows", None) if isinstance(weight, WeightView) and not weight.transposed else None
    return None if rows is None or max_norm is not None else rows(input)


def _product(input: Any, other: Any = None, *, mat2: Any = None) -> Tensor | None:
    weight = mat2 if other is None else other
    return weight._as_out_in(input) if isinstance(weight, WeightView) and not isinstance(input, WeightView) else None


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Tensor | None:
    """input + mat1 @ mat2, where the input is a bias [N] or anything that broadcasts."""
    if not isinstance(mat2, WeightView) or not isinstance(mat1, Tensor) or (beta, alpha) != (1, 1):
        return None
    if input.dim() == 1 and input.shape[0] == mat2.shape[1]:
        return mat2._as_out_in(mat1, input)
    y = mat2._as_out_in(mat1)
    return None if y is None else y + input


def _transposed(func: Any, weight: Any, *dims: Any, **named: Any) -> WeightView | None:
    order = (*dims, *named.values())
    if not isinstance(weight, WeightView):
        return None
    if func is torch.permute:
        return weight.permute(*order)
    return weight.transpose(*order) if order else weight.T


def _einsum(args: tuple[Any, ...]) -> Tensor | None:
    """einsum("...k,kn->...n", x, w) and its spellings: one contracted index, which is the last of x."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:  # without one: what stands once, in alphabetical order, after the ellipsis
        letters = left.replace(",", "").replace(".", "")
        out = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    if len(terms) != 2 or len(operands) != 2:
        return None
    where = 1 if isinstance(operands[1], WeightView) else 0
    weight, x = operands[where], operands[1 - where]
    w_term, x_term = terms[where], terms[1 - where]
    if isinstance(x, WeightView) or len(w_term) != 2 or x_term[-1] not in w_term:
        return None
    k = x_term[-1]
    n = w_term.replace(k, "", 1)
    if out != x_term[:-1] + n or n in x_term:
        return None
    facing = weight if w_term == k + n else weight.T
    return facing._as_out_in(x)  # type: ignore[no-any-return]
