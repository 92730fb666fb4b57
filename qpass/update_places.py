"""Update places: a quantized model in; what a state dict of its float model names, each to be filled anew, out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qpass.errors import WeightError
from qpass.find.experts_rows import packed_part
from qpass.kernels.layout import NonFinite, Packed
from qpass.kernels.registry import kernel
from qpass.layers.experts_layer import QuantExperts
from qpass.layers.packed_layers import PackedWeight, QuantLinear
from qpass.layers.quant_weight import QuantWeight
from qpass.layers.reordered_linear import ReorderedLinear
from qpass.scheme import RowCodec, codec_of
from qpass.swap.round_weight import known_finite, known_largest, quantized
from qpass.swap.swap_experts import quantized_experts
from qpass.weight import CanonicalWeight, check_weight


class Place:
    """Something in the model that is made of the tensors `names`, or is one tensor with all these names if `tied`."""

    names: tuple[str, ...]
    tied = True

    def found(self, given: Mapping[str, Tensor]) -> list[str]:
        return [name for name in self.names if name in given]

    def shape(self, name: str) -> torch.Size:
        raise NotImplementedError

    def wrong(self, given: Mapping[str, Tensor]) -> list[str]:
        """Sentences on what of `given` does not fit here."""
        said = [f"{name} is {list(given[name].shape)}, the model has {list(self.shape(name))}"
                for name in self.found(given) if given[name].shape != self.shape(name)]
        return said + [f"{name} is {given[name].dtype}, no float weight" for name in self.found(given)
                       if not given[name].is_floating_point() and self.packs] + self._unlike(given)

    def _unlike(self, given: Mapping[str, Tensor]) -> list[str]:
        first, *others = self.found(given) if self.tied and self.found(given) else ("",)
        return [f"{first} and {name} are one weight in this model, and different numbers were given for them"
                for name in others if not _same(given[name], given[first])]

    packs = True

    def check(self, name: str, tensor: Tensor) -> None:
        """Raise WeightError for NaN and Inf in a weight that is to be packed."""
        check_weight(tensor, name)

    def write(self, given: Mapping[str, Tensor], allow_nonfinite: bool) -> None:
        """Raises WeightError for NaN and Inf unless they are allowed, and if the layer cannot hold the weight."""
        raise NotImplementedError


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether both hold the same numbers, in whatever dtype and on whatever device."""
    wide = torch.promote_types(one.dtype, other.dtype)
    return one is other or torch.equal(one.to(wide), other.to(device=one.device, dtype=wide))


class Plain(Place):
    """A parameter or buffer that stayed float."""

    packs = False

    def __init__(self, names: Sequence[str], tensor: Tensor) -> None:
        self.names, self.tensor = tuple(names), tensor

    def shape(self, name: str) -> torch.Size:
        return self.tensor.shape

    def check(self, name: str, tensor: Tensor) -> None:
        return

    def write(self, given: Mapping[str, Tensor], allow_nonfinite: bool) -> None:
        self.tensor.copy_(given[self.found(given)[0]])


class Linear(Place):
    """A packed weight, under the names of all that share it; `largest` as of quantize_weight."""

    largest: Tensor | None = None

    def __init__(self, names: Sequence[str], layer: PackedWeight, transposed: bool) -> None:
        self.names, self.layer, self.transposed = tuple(names), layer, transposed

    def shape(self, name: str) -> torch.Size:
        n, k = self.layer.spec.out_features, self.layer.spec.in_features
        return torch.Size((k, n) if self.transposed else (n, k))

    def wrong(self, given: Mapping[str, Tensor]) -> list[str]:
        if isinstance(self.layer, ReorderedLinear) and self.found(given):
            return [f"{self.names[0]} permutes or scales its input, as its checkpoint's algorithm chose for the old "
                    "weights; quantize the new ones from a float model"]
        return super().wrong(given)

    def one_scale(self) -> Tensor | None:
        """The scale of the whole tensor that stands beside those of its groups, if this weight has one."""
        codec = codec_of(self.layer.spec.weight)
        if not isinstance(codec, RowCodec) or not codec.one_scale:
            return None
        return self._held()[codec.names[-1]]

    def _held(self) -> Packed:
        return dict(zip(kernel(self.layer.spec.kernel).layout.names(self.layer.spec), self.layer.packed, strict=True))

    def check(self, name: str, tensor: Tensor) -> None:
        found = known_largest(tensor, self.layer.spec)
        check_weight(tensor, name, allow_nonfinite=found is not None and bool(found.isfinite()))
        self.largest = None if found is None else self.stored(found)

    def stored(self, largest: Tensor) -> Tensor:
        """The largest magnitude of a weight, float32 [], when that has become the layer's dtype."""
        return largest.to(device=self.layer.device, dtype=self.layer.dtype).float()

    def write(self, given: Mapping[str, Tensor], allow_nonfinite: bool) -> None:
        layer, name = self.layer, self.found(given)[0]
        weight = given[name].detach().to(device=layer.device, dtype=layer.dtype)
        layout, held = kernel(layer.spec.kernel).layout, self._held()
        known = allow_nonfinite or (self.largest is not None and bool(self.largest.isfinite()))
        weight = weight.t() if self.transposed else weight
        try:
            made = quantized(weight, layer.spec, held, self.largest, finite=not known)
            known = known or not isinstance(made, CanonicalWeight)
        except NonFinite:
            made = quantized(weight, layer.spec, held, self.largest)
        packed = layout.pack(made, layer.spec) if isinstance(made, CanonicalWeight) else made
        if not _fits(packed, held) and layout.even is not None:
            packed = layout.even(packed, layer.spec)
        _copy(packed, held, name)
        try:
            check_weight(weight, name, allow_nonfinite=known)
        except WeightError as why:
            raise WeightError(f"{why}. The model holds it now, with 0 for these") from why


class Experts(Place):
    """The packed experts of one module."""

    tied = False

    def __init__(self, path: str, layer: QuantExperts) -> None:
        self.path, self.layer = path, layer
        self.names = tuple(_joined(path, leaf) for leaf in layer.site.parameters)

    def shape(self, name: str) -> torch.Size:
        return self.layer.origin[0]._parameters[name.rpartition(".")[2]].shape  # type: ignore[union-attr]

    def wrong(self, given: Mapping[str, Tensor]) -> list[str]:
        site, said = self.layer.site, super().wrong(given)
        first = [_joined(self.path, leaf) for leaf in site.first]
        there = [name for name in first if name in given]
        if there and len(there) < len(first):
            said.append(f"{there[0]} comes without {next(n for n in first if n not in given)}, and the two are packed "
                        "as one")
        return said

    def check(self, name: str, tensor: Tensor) -> None:
        part = self.layer.blocks[0].spec.parts[int(name.rpartition(".")[2] == self.layer.site.second)]
        check_weight(tensor, name, allow_nonfinite=part is not None and known_finite(tensor, part))

    def write(self, given: Mapping[str, Tensor], allow_nonfinite: bool) -> None:
        layer, site = self.layer, self.layer.site
        for name in self.found(given) if not allow_nonfinite else ():
            self.check(name, given[name])
        stored = {name.rpartition(".")[2]: given[name].detach().to(dtype=layer.dtype) for name in self.found(given)}
        for which, leaf in enumerate((site.first[0], site.second)):
            if leaf not in stored:
                continue
            for block in layer.blocks:
                part = block.spec.parts[which]
                made = packed_part(part, len(block.experts), quantized_experts(
                    site, stored, block.experts, which, part, layer.device))
                held = {name: layer.get_buffer(name) for name in block.part(which)}
                _copy(dict(zip(held, made.values(), strict=True)), held, _joined(self.path, leaf))


def places(model: nn.Module) -> Iterator[Place]:
    """Everything that a state dict of the float model would name; tied tensors once, with all their names."""
    shared: dict[int, tuple[list[str], Any]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantExperts):
            yield Experts(path, module)
        elif isinstance(module, PackedWeight):
            name = _joined(path, module.origin.weight) if isinstance(module, QuantLinear) else path
            shared.setdefault(id(module._buffers), ([], module))[0].append(name)
        for leaf, tensor in _own(module):
            name = module.origin.bias if isinstance(module, QuantLinear) and leaf == "bias" else leaf
            shared.setdefault(id(tensor), ([], tensor))[0].append(_joined(path, name or leaf))
    for names, held in shared.values():
        if isinstance(held, PackedWeight):
            transposed = held.transposed if isinstance(held, QuantWeight) else (
                isinstance(held, QuantLinear) and held.origin.transposed)
            yield Linear(names, held, transposed)
        else:
            yield Plain(names, held)


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    hidden = module._non_persistent_buffers_set
    for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and leaf not in hidden:
            yield leaf, tensor


def _joined(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf


def _fits(packed: Packed, held: Packed) -> bool:
    return packed.keys() == held.keys() and all(
        (tensor.dtype, tensor.shape) == (held[name].dtype, held[name].shape) for name, tensor in packed.items())


def _copy(packed: Packed, held: Packed, name: str) -> None:
    if not _fits(packed, held):
        raise WeightError(f"{name}: the layer holds its old weight in a form that depends on its values and cannot "
                          "hold this one; quantize the float model anew")
    for key, tensor in packed.items():
        if tensor is not held[key]:
            held[key].copy_(tensor)
