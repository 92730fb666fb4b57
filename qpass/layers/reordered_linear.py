"""Reordered linear: a QuantLinear whose input is first mixed, scaled or permuted, as algorithms and checkpoints need.

GPTQ with activation order gives each group the inputs that mattered alike, wherever they stand; AWQ and SmoothQuant
scale inputs that nothing before can scale; rotations mix them. The codes are kept with each group's columns together,
so that every kernel runs them, and the input is brought into that order. All of it stands in the graph as plain ATen.
Layers without any are plain QuantLinear and pay nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qpass.activation_scale import ActivationScale
from qpass.formats.compressed_tensors import write_weight
from qpass.formats.integer_weights import group_order
from qpass.hadamard import halves_of, multiply_blocks
from qpass.input_change import InputChange
from qpass.kernels.layout import Packed
from qpass.layers.origin import Origin
from qpass.layers.packed_layers import PackedWeight, QuantLinear
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight, dequantize_weight

_OWN = {"input_order": "weight_g_idx", "pre_scale": "pre_quant_scale"}
_HALVES = ("hadamard_left", "hadamard_right")


class ReorderedLinear(QuantLinear):
    """y = (x H * pre_scale)[..., input_order] @ w.T + bias.

    `input_order` int32 [K] or None: canonical column i multiplies input input_order[i]. `pre_scale` [K] or None.
    `hadamard`: H mixes blocks of so many inputs, by Sylvester's matrix over its norm; None mixes none.
    On disk the columns stand in the order of the inputs, and `weight_g_idx` says their groups.
    """

    input_order: Tensor | None
    pre_scale: Tensor | None
    hadamard_left: Tensor | None
    hadamard_right: Tensor | None

    def __init__(self, weight: CanonicalWeight | Packed, bias: nn.Parameter | None, spec: LinearSpec,
                 dtype: torch.dtype, origin: Origin | None = None, scale: ActivationScale | None = None, *,
                 order: Tensor | None = None, pre_scale: Tensor | None = None, hadamard: int | None = None) -> None:
        self.hadamard = hadamard
        self._given = {name: tensor for name, tensor in (("input_order", order), ("pre_scale", pre_scale))
                       if tensor is not None}
        super().__init__(weight, bias, spec, dtype, origin, scale)
        for name in _OWN:
            self.register_buffer(name, self._given.get(name), persistent=False)
        for name, half in zip(_HALVES, (None, None) if hadamard is None else halves_of(hadamard), strict=True):
            device = self.device if self.device.type != "meta" else None
            self.register_buffer(name, None if half is None else half.to(device), persistent=False)

    def _pack(self, weight: CanonicalWeight | Packed, spec: LinearSpec) -> None:
        super()._pack(weight, spec)
        own = {_OWN[name]: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self._given.items()}
        for layer in self._tied:
            layer.on_disk = {**layer.on_disk, **own}
            layer._non_persistent_buffers_set |= {*_OWN, *_HALVES}

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        if x is None or named:  # by keyword in the replaced module's own word
            (x,) = named.values() if x is None else (x, *named.values())
        return self.multiply(self._changed(x), self.bias)

    def taken_over(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.multiply(self._changed(x), bias)

    def _changed(self, x: Tensor) -> Tensor:
        if self.hadamard is not None:
            assert self.hadamard_left is not None and self.hadamard_right is not None
            x = multiply_blocks(x, self.hadamard, (self.hadamard_left, self.hadamard_right))
        if self.pre_scale is not None:
            x = x * self.pre_scale.to(x.dtype)
        return x if self.input_order is None else x.index_select(-1, self.input_order)

    @property
    def told(self) -> str:
        """What happens to the input, in words."""
        words = InputChange(hadamard=self.hadamard, scale=self.pre_scale).told
        return words if self.input_order is None else "; ".join(filter(None, (words, "its inputs are reordered")))

    def share_scale(self, other: PackedWeight) -> bool:
        """Also hold the very scale of the inputs of `other`, and its Hadamard matrices, where they are equal."""
        if isinstance(other, ReorderedLinear):
            for name in ("pre_scale", *_HALVES):
                mine, theirs = getattr(self, name), getattr(other, name)
                if mine is not None and theirs is not None and mine.dtype == theirs.dtype and torch.equal(mine, theirs):
                    self._buffers[name] = theirs
        return super().share_scale(other)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as quantized, for the input as it comes: columns in its order, its scale multiplied in."""
        full = dequantize_weight(self.canonical(), self.spec)
        if self.input_order is not None:
            full = full[:, self.input_order.long().argsort()]
        if self.pre_scale is not None:
            full = full * self.pre_scale.float()
        if self.hadamard is not None:
            full = multiply_blocks(full, self.hadamard)
        return full.to(dtype or self.dtype)

    def tensors_on_disk(self) -> dict[str, Tensor]:
        if self.device.type == "meta":
            return super().tensors_on_disk()
        weight, own = self.canonical(), {}
        if self.input_order is not None:
            back = self.input_order.long().argsort()
            weight = CanonicalWeight({**weight.tensors, "qweight": weight.qweight[:, back].contiguous()})
            own["weight_g_idx"] = (back // self.spec.group_size).to(torch.int32)
        if self.pre_scale is not None:
            own["pre_quant_scale"] = self.pre_scale
        return {**write_weight(weight, self.spec), **self._scale_tensors(), **own}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
                              missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str]) -> None:
        names = {own: prefix + disk for own, disk in _OWN.items() if getattr(self, own) is not None}
        rest = {key: value for key, value in state_dict.items() if key not in names.values()}
        before = len(missing_keys) + len(error_msgs)
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        missing_keys.extend(name for name in names.values() if name not in state_dict)
        if len(missing_keys) + len(error_msgs) > before:
            return
        if self.pre_scale is not None:
            self.pre_scale.copy_(state_dict[names["pre_scale"]])
        if self.input_order is not None:
            try:
                order = group_order(state_dict[names["input_order"]].to(self.device), self.spec)
            except ValueError as error:
                error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
                return
            if order is None:
                order = torch.arange(self.in_features, dtype=torch.int32, device=self.device)
            self.input_order.copy_(order)
            weight = self.canonical()
            self._pack(CanonicalWeight({**weight.tensors, "qweight": weight.qweight[:, order.long()].contiguous()}),
                       self.spec)
