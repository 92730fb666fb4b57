"""Layers: what swap puts into a model, a packed weight that multiplies, instead of a float parameter.

`QuantLinear` replaces a module that was nothing but the product; `QuantWeight` (quant_weight.py) replaces a parameter
inside a bigger forward and intercepts the product. Both hold one copy of the weight, in the layout of the kernel that
runs it; `state_dict()` gives the canonical form, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import qpass.kernels.dispatch
import qpass.kernels.gradient  # noqa: F401  (both give the ops below what they do)
from qpass.activation_scale import ActivationScale, scale_of_tensors
from qpass.errors import PackedForInference, WeightError
from qpass.formats.compressed_tensors import describe_weight, names_found, read_weight, write_weight
from qpass.kernels.layout import Packed
from qpass.kernels.registry import Kernel, LinearCall, choose, kernel
from qpass.layers.origin import Origin
from qpass.layers.weight_view import WeightView
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight, dequantize_weight


class PackedLayer(nn.Module):
    """What is packed for inference, and does not learn. `on_disk`: dtype and shape of what `tensor_on_disk` makes."""

    on_disk: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    _spec_text: str

    @property
    def packed(self) -> list[Tensor]:
        """The packed tensors."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes that the packed tensors take in memory."""
        return sum(t.numel() * t.element_size() for t in self.packed)

    def tensor_on_disk(self, name: str) -> Tensor:
        """One tensor as a checkpoint holds it."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> PackedLayer:
        """Nothing: what is packed is the same in both modes. The model that it is in refuses (refuse_training.py)."""
        return self

    def __prepare_scriptable__(self) -> PackedLayer:
        """What torch.jit.script asks for in the layer's place."""
        raise PackedForInference("torch.jit.script cannot read packed layers; torch.export and torch.jit.trace do")


class PackedWeight(PackedLayer):
    """One weight [N, K] packed for one kernel, as non-persistent buffers.

    Invariant: the buffers are `kernel.layout.pack(canonical, spec)`, and `spec.kernel == kernel.name`; beside them, if
    the activation is static, `input_scale` and `input_zero_point` as a checkpoint holds them.
    """

    spec: LinearSpec
    dtype: torch.dtype
    _spec_text: str
    _kernel: Kernel

    def __init__(self, weight: CanonicalWeight | Packed, spec: LinearSpec, dtype: torch.dtype,
                 scale: ActivationScale | None = None) -> None:
        """`weight` is packed for `spec.kernel`, or is already; `dtype` is that of the float weight it came from.

        `scale` must be there exactly if the spec's activation is static; WeightError otherwise.
        """
        if (scale is not None) != (spec.activation is not None and spec.activation.static):
            raise WeightError(f"{spec}: a static activation needs a scale, and only it has one; static scales come "
                              "with a checkpoint or from qpass.quantize(model, recipe, calibration=...)")
        super().__init__()
        self.dtype = dtype
        self.training = False
        self._names: tuple[str, ...] = ()
        self._tied: list[PackedWeight] = [self]
        self._scale_names = () if scale is None else tuple(scale.tensors())
        for name, tensor in ({} if scale is None else scale.tensors()).items():
            self.register_buffer(name, tensor, persistent=False)
        self._pack(weight, spec)

    def _pack(self, weight: CanonicalWeight | Packed, spec: LinearSpec) -> None:
        chosen = kernel(spec.kernel)
        packed = weight if isinstance(weight, dict) else chosen.layout.pack(weight, spec)
        for name in self._names:
            del self._buffers[name]
        names, even = tuple("packed_" + name for name in chosen.layout.names(spec)), chosen.layout.even
        seen = CanonicalWeight(even(weight, spec) if even else weight) if isinstance(weight, dict) else weight
        scales = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self._scale_tensors().items()}
        self.on_disk = describe_weight(seen, spec) | scales
        for name in names:
            self.register_buffer(name, packed[name.removeprefix("packed_")], persistent=False)
        for layer in self._tied:  # they read the very same buffers
            layer._names, layer.on_disk = names, self.on_disk
            layer._non_persistent_buffers_set = {*names, *self._scale_names}
            layer.spec, layer._spec_text, layer._kernel = spec, str(spec), chosen

    def tie(self, other: PackedWeight) -> None:
        """Read the packed tensors of `other`, whose weight is this one's, from now on."""
        self._buffers, self._tied = other._buffers, other._tied
        self._tied.append(self)
        for name in ("_names", "_scale_names", "on_disk", "_non_persistent_buffers_set", "spec", "_spec_text",
                     "_kernel"):
            setattr(self, name, getattr(other, name))

    @property
    def kernel(self) -> Kernel:
        """The kernel that runs this layer."""
        return self._kernel

    @property
    def packed(self) -> list[Tensor]:
        """The packed tensors in the layout's order."""
        if tuple(self._buffers) == self._names:  # nearly always, and Dynamo follows it in half the time
            return list(self._buffers.values())  # type: ignore[arg-type]
        return [getattr(self, name) for name in self._names]

    @property
    def device(self) -> torch.device:
        return self.packed[0].device

    @property
    def activation_scale(self) -> ActivationScale | None:
        """The static scale of the activation, if it has one."""
        return scale_of_tensors(self._scale_tensors(), self.spec.activation)

    def share_scale(self, other: PackedWeight) -> bool:
        """Hold the very scale tensors of `other`, if they are equal: then products of one input round it once."""
        mine, theirs = self._scale_tensors(), other._scale_tensors()
        equal = mine.keys() == theirs.keys() and all(
            torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)
        if equal:
            self._buffers.update(theirs)
        return equal

    def _scale_tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self._scale_names}

    def canonical(self) -> CanonicalWeight:
        """The weight in canonical form: a copy, or the very tensors if the layout is the canonical one."""
        names = (name.removeprefix("packed_") for name in self._names)
        return self._kernel.layout.unpack(dict(zip(names, self.packed, strict=True)), self.spec)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as quantized, float [N, K], by default in the dtype it had before."""
        return dequantize_weight(self.canonical(), self.spec, dtype or self.dtype)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N]; an op of the graph when traced, the kernel itself when not."""
        names = self._scale_names
        if names or torch.compiler.is_compiling() or torch._C._is_tracing() or (torch.is_grad_enabled() and (
                x.requires_grad or (bias is not None and bias.requires_grad))):
            return torch.ops.qpass.linear(x, self.packed, bias, self._spec_text,  # type: ignore[no-any-return]
                                          *([getattr(self, name) for name in names] if names else ()))
        return self._kernel.forms["linear"](x, self.packed, bias, self.spec)  # type: ignore[no-any-return]

    def taken_over(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What a product with this weight's stand-in runs."""
        return self.multiply(x, bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        names = (*self._names, *self._scale_names)
        before = [getattr(self, name) for name in names]
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        dtype = probe.dtype if probe.dtype.is_floating_point else self.dtype
        spec = self._spec_on(probe.device, dtype)
        canonical = self.canonical() if spec.kernel != self.spec.kernel else None
        again = self._names if canonical is None else ()
        moved_on = {name: moved(fn, tensor) for name, tensor in zip(names, before, strict=True)
                 if name in again or name in self._scale_names}
        held = {name: self._buffers.pop(name) for name in names}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(held)
        self._buffers.update(moved_on)
        if canonical is not None:
            self._pack(CanonicalWeight({name: moved(fn, t) for name, t in canonical.tensors.items()}), spec)
        self.dtype = dtype
        return self

    def _spec_on(self, device: torch.device, dtype: torch.dtype) -> LinearSpec:
        """The spec for another device or dtype: the kernel stays where it runs, another kind of device chooses anew."""
        call = LinearCall(spec=self.spec, device=device, dtype=dtype)
        if "meta" in (device.type, self.device.type) or (
                device.type == self.device.type and self._kernel.why_not(call) is None):
            return self.spec
        return self.spec.on(choose(call, where=self._spec_text, prepare=True).kernel.name)

    def tensors_on_disk(self) -> dict[str, Tensor]:
        """The weight as a checkpoint holds it, by name; made anew, shared scales too: safetensors takes none twice."""
        if self.device.type == "meta":
            return {name: torch.empty(shape, dtype=dtype, device="meta")
                    for name, (dtype, shape) in self.on_disk.items()}
        return write_weight(self.canonical(), self.spec) | {key: t.clone() for key, t in self._scale_tensors().items()}

    def tensor_on_disk(self, name: str) -> Tensor:
        """One of them."""
        if name == "weight_shape":
            return torch.tensor([self.spec.out_features, self.spec.in_features], dtype=torch.int64)
        if name in self._scale_names:
            return self._scale_tensors()[name]
        return self.tensors_on_disk()[name]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.tensors_on_disk().items():
            destination[f"{prefix}{name}"] = tensor

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
                              missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str]) -> None:
        wanted = names_found(self.spec, lambda name: prefix + name in state_dict)
        found = {name: state_dict[prefix + name] for name in wanted if prefix + name in state_dict}
        missing = [prefix + name for name in wanted if name not in found]
        rest = {key: value for key, value in state_dict.items()
                if not (key.startswith(prefix) and key.removeprefix(prefix) in found)}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if missing:
            missing_keys.extend(missing)
            return
        try:
            weight = read_weight(found, self.spec)
            scale = scale_of_tensors(found, self.spec.activation)
        except (ValueError, WeightError) as error:
            error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
            return
        moved = CanonicalWeight({name: tensor.to(self.device) for name, tensor in weight.tensors.items()})
        for name, tensor in ({} if scale is None else scale.tensors()).items():
            self._buffers[name] = tensor.to(self.device)
        self._pack(moved, self.spec)


def moved(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """`fn` of a packed tensor, whose floats are seen as integers: model.half() leaves scales as they are."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    seen = tensor.view(bits) if tensor.is_floating_point() else tensor
    moved = fn(seen)
    if moved.dtype != seen.dtype:
        raise PackedForInference(f"packed weights cannot be cast to {moved.dtype}: they are codes and scales; "
                                 "qpass.dequantize(model) gives float weights back")
    return moved.view(tensor.dtype)


class QuantLinear(PackedWeight):
    """y = x @ w.T + bias with a packed weight; takes the place of nn.Linear, Conv1D, or any module that is a product.

    `origin` is what it replaced, for `qpass.dequantize`; None gives an nn.Linear back.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: CanonicalWeight | Packed, bias: nn.Parameter | None, spec: LinearSpec,
                 dtype: torch.dtype, origin: Origin | None = None, scale: ActivationScale | None = None) -> None:
        super().__init__(weight, spec, dtype, scale)
        self.in_features, self.out_features = spec.in_features, spec.out_features
        self.register_parameter("bias", bias)
        if origin is None:
            linear = nn.Linear(spec.in_features, spec.out_features, bias=bias is not None, device="meta", dtype=dtype)
            origin = Origin(module=linear, weight="weight", bias=None if bias is None else "bias", transposed=False)
        self.origin = origin
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs",
                      "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"):
            setattr(self, hooks, getattr(origin.module, hooks))
        # What else a module of somebody's own says of itself, for code that asks it (`layer.scaling`).
        self.__dict__.update({name: value for name, value in vars(origin.module).items()
                              if not name.startswith("_") and not hasattr(self, name)})

    @property
    def weight(self) -> WeightView:
        """A stand-in for the float weight: has its dtype, shape as the module stored it, and device, and multiplies."""
        return WeightView(self, transposed=self.origin.transposed)

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        if x is None or named:  # by keyword in the replaced module's own word
            (x,) = named.values() if x is None else (x, *named.values())
        return self.multiply(x, self.bias)

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
                f"{self._spec_text}")
