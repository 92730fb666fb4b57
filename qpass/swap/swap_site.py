"""Swap: one decision in, the owner module or its parameter replaced by a packed weight, the float freed at once."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from qpass.activation_scale import ActivationScale
from qpass.errors import WeightError
from qpass.input_change import InputChange
from qpass.kernels.layout import Packed
from qpass.layers.experts_layer import QuantExperts
from qpass.layers.origin import Origin
from qpass.layers.packed_layers import PackedLayer, PackedWeight, QuantLinear
from qpass.layers.quant_weight import QuantWeight
from qpass.layers.reordered_linear import ReorderedLinear
from qpass.layers.tied_table import TiedTable
from qpass.plan_model import Decision
from qpass.site import Site
from qpass.spec import LinearSpec
from qpass.swap.module_places import holders, put_everywhere
from qpass.swap.round_weight import quantized
from qpass.swap.swap_experts import restore_experts
from qpass.weight import CanonicalWeight

TRIM_AFTER = 4 << 20  # bytes freed; for less, give_back_freed_memory is not worth the call


def swap_site(model: nn.Module, decision: Decision, device: torch.device | None = None,
              scale: ActivationScale | None = None, canonical: CanonicalWeight | None = None,
              largest: Tensor | None = None, change: InputChange | None = None) -> PackedWeight:
    """Quantize, pack and replace the parameter of one site, on `device` (by default where it is).

    `scale` is the static scale of its activation, where the decision's spec has one; `canonical` is the weight's
    integers where calibration has found them, by default it is rounded to nearest, within `largest` (as of
    quantize_weight) if that is given. `change` is what the layer does to its input from now on; only a module that is
    nothing but the product can have one.

    Until the packed layer is whole the model is untouched; then one assignment per place puts it in. Peak memory
    beyond the model is one layer of int8 codes and one packed layer.
    """
    site, spec = decision.site, decision.spec
    if spec is None:
        raise WeightError(f"{site.name} has no scheme in this plan and cannot be swapped")
    owner = model.get_submodule(site.owner)
    leaf = site.name.rpartition(".")[2]
    parameter = owner._parameters[leaf]
    if parameter is None:
        raise WeightError(f"{site.name} is gone from the model since the plan was made; plan again")
    found: CanonicalWeight | Packed
    if canonical is None:
        weight = parameter.detach() if device is None else parameter.detach().to(device)
        found = quantized(weight.t() if site.transposed else weight, spec, None, largest)
        del weight
    elif device is not None:
        found = CanonicalWeight({name: tensor.to(device) for name, tensor in canonical.tensors.items()})
    else:
        found = canonical
    return _replace(model, owner, leaf, parameter, site, spec, found, device, scale, change)


def _replace(model: nn.Module, owner: nn.Module, leaf: str, parameter: nn.Parameter, site: Site, spec: LinearSpec,
             canonical: CanonicalWeight | Packed, device: torch.device | None,
             scale: ActivationScale | None, change: InputChange | None) -> PackedWeight:
    found = holders(model, parameter)
    tables = [(holder, name) for holder, name in found if isinstance(holder, nn.Embedding)]
    layers = [held for held in found if held not in tables]
    if site.swap == "parameter" or owner is model or any(type(holder) is not type(owner) for holder, _ in layers):
        if change:
            raise WeightError(f"{site.name} stands in a bigger forward, where its input cannot be changed")
        packed: PackedWeight = QuantWeight(canonical, spec, site.dtype, scale, transposed=site.transposed)
        del canonical
        for holder, name in layers:
            # The parameter hides the module until it goes, so that the layer is whole at every moment.
            holder._modules[name] = packed
            del holder._parameters[name]
        return packed
    first: QuantLinear | None = None
    for holder, name in layers:
        bias_leaf = _bias_of(holder, site.bias)
        bias = holder._parameters[bias_leaf] if bias_leaf else None
        if bias is not None and device is not None:
            bias = nn.Parameter(bias.detach().to(device), requires_grad=bias.requires_grad)
        origin = Origin(module=holder, weight=name, bias=bias_leaf, transposed=site.transposed)
        if change:
            pre_scale = change.scale if device is None or change.scale is None else change.scale.to(device)
            linear: QuantLinear = ReorderedLinear(canonical, bias, spec, site.dtype, origin, scale,
                                                  pre_scale=pre_scale, hadamard=change.hadamard)
        else:
            linear = QuantLinear(canonical, bias, spec, site.dtype, origin, scale)
        if first is not None:  # a tied weight: the second holder reads the same packed tensors
            linear.tie(first)
        first = linear if first is None else first
        put_everywhere(model, holder, linear)
        holder._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    assert first is not None, f"{site.name} has no holder"
    for holder, name in tables:
        tie_table(holder, name, first)
    return first


def tie_table(table: nn.Module, name: str, head: PackedWeight) -> None:
    """Let the embedding `table` read the rows of a packed head in place of its parameter `name`."""
    table._modules[name] = TiedTable(head)
    del table._parameters[name]


def _bias_of(holder: nn.Module, named: str | None) -> str | None:
    """The name of the holder's bias: the site's, or (a second holder of a tied weight) what nn.Linear calls it."""
    leaf = named.rpartition(".")[2] if named else "bias" if isinstance(holder, nn.Linear) else None
    return leaf if leaf is not None and holder._parameters.get(leaf) is not None else None


def share_scales(model: nn.Module) -> int:
    """Let neighbours whose static activation scales are equal hold one tensor, so that the compiler sees one input
    rounded once. Returns how many then read another's."""
    shared = 0
    for parent in model.modules():
        packed = [child for child in parent.children() if isinstance(child, ReorderedLinear) or (
            isinstance(child, PackedWeight) and child.activation_scale)]
        for i, layer in enumerate(packed):
            shared += any(layer.share_scale(before) for before in packed[:i])
    return shared


def give_back_freed_memory() -> None:
    """Hand what was freed back to the system, where the C library can.

    glibc raises its threshold for separate mappings to the largest block freed so far, and keeps freed blocks below it
    as holes of its heap: without this, a model's memory shrinks by half of what it should.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def restore(model: nn.Module) -> int:
    """Replace every packed weight by an ordinary float parameter with the weight as quantized. Returns the number."""
    restored: dict[nn.Module, nn.Module | nn.Parameter] = {}
    weights: dict[int, nn.Parameter] = {}  # by packed tensors: what was tied is tied again
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if not isinstance(child, PackedLayer):
                continue
            back = restored.get(child)
            if back is None:
                back = restored[child] = _float_again(child, weights)
            if isinstance(back, nn.Parameter):
                del parent._modules[name]
                parent.register_parameter(name, back)
            else:
                parent._modules[name] = back
    return len(restored)


def _float_again(packed: PackedLayer, weights: dict[int, nn.Parameter]) -> nn.Module | nn.Parameter:
    if isinstance(packed, QuantExperts):
        return restore_experts(packed)
    assert isinstance(packed, PackedWeight)
    transposed = packed.transposed if isinstance(packed, QuantWeight) else (
        isinstance(packed, QuantLinear) and packed.origin.transposed)
    parameter = None if transposed else weights.get(id(packed._buffers))
    if parameter is None:
        weight = packed.dequantize()
        parameter = nn.Parameter(weight.t().contiguous() if transposed else weight, requires_grad=False)
    if not transposed:
        weights[id(packed._buffers)] = parameter
    return packed.origin.holding(parameter, packed.bias) if isinstance(packed, QuantLinear) else parameter
