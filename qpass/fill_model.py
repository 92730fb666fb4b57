"""Fill: an empty model and what goes where in it; the same model with its numbers in place, one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qpass.activation_scale import ActivationScale, scale_of_tensors
from qpass.checkpoint_layers import Float, Layer
from qpass.errors import CheckpointError, WeightError
from qpass.formats.compressed_tensors import read_weight
from qpass.formats.safetensors_file import Stored, read_tensors
from qpass.kernels.keep_activation import computable
from qpass.kernels.registry import LinearCall, choose
from qpass.layers import Origin, PackedWeight, QuantLinear
from qpass.quant_weight import QuantWeight
from qpass.spec import LinearSpec
from qpass.swap import TRIM_AFTER, give_back_freed_memory, tie_table


def fill_floats(floats: list[Float], stored: Mapping[str, Stored], device: torch.device) -> None:
    """Read every tensor that stays as it is to `device`, in the dtype that the model has for it."""
    for item in floats:
        if item.tensor is None:
            continue
        module, leaf = item.places[0]
        before = module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]
        assert before is not None
        value = read_tensors({item.tensor: stored[item.tensor]})[item.tensor].to(device=device, dtype=before.dtype)
        if isinstance(before, nn.Parameter):
            value = nn.Parameter(value, requires_grad=before.requires_grad)
        for module, leaf in item.places:
            (module._parameters if leaf in module._parameters else module._buffers)[leaf] = value  # type: ignore[assignment]


def fill_layers(model: nn.Module, layers: list[Layer], stored: Mapping[str, Stored], device: torch.device) -> None:
    """Read, pack and put in place each layer on `device`. Raises CheckpointError that names a damaged layer."""
    freed = 0
    for layer in layers:
        tensors = read_tensors({full: stored[full] for full in layer.tensors.values()})
        try:
            named = {name: tensors[full].to(device) for name, full in layer.tensors.items()}
            canonical = read_weight(named, layer.spec)
            scale = scale_of_tensors(named, layer.spec.activation)
        except (ValueError, WeightError) as error:
            raise CheckpointError(f"{layer.paths[0]} in {stored[next(iter(tensors))].file.parent}: {error}") from error
        freed += sum(tensor.nbytes for tensor in tensors.values())
        del tensors, named
        dtype = _weight_of(model, layer, layer.paths[0]).dtype
        call = LinearCall(spec=layer.spec, device=device, dtype=dtype)
        call = replace(call, spec=computable(call)[0])
        spec = call.spec.on(choose(call, where=layer.paths[0], prepare=True).kernel.name)
        first: PackedWeight | None = None
        for path in layer.paths:
            owner = model.get_submodule(path if layer.module else path.rpartition(".")[0])
            if not layer.module or owner is model:
                first = first or QuantWeight(canonical, spec, dtype, scale, transposed=layer.transposed)
                owner._parameters.pop(layer.leaf)
                owner._modules[layer.leaf] = first
                continue
            first = _put_linear(model, path, owner, layer, first, (canonical, spec, dtype, scale))
        del canonical
        if freed >= TRIM_AFTER:
            give_back_freed_memory()
            freed = 0


def _put_linear(model: nn.Module, path: str, owner: nn.Module, layer: Layer, first: PackedWeight | None,
                parts: tuple[Any, LinearSpec, torch.dtype, ActivationScale | None]) -> PackedWeight:
    if isinstance(owner, PackedWeight):  # one module under two names
        return owner
    canonical, spec, dtype, scale = parts
    bias_leaf = layer.bias if layer.bias and owner._parameters.get(layer.bias) is not None else None
    origin = Origin(module=owner, weight=layer.leaf, bias=bias_leaf, transposed=layer.transposed)
    bias = owner._parameters[bias_leaf] if bias_leaf else None
    linear = QuantLinear(canonical, bias, spec, dtype, origin, scale)
    if first is not None:
        linear.tie(first)
    shape = (spec.in_features, spec.out_features) if layer.transposed else (spec.out_features, spec.in_features)
    owner._parameters[layer.leaf] = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is owner:
                parent._modules[name] = linear
    return first or linear


def _weight_of(model: nn.Module, layer: Layer, path: str) -> torch.Tensor:
    owner = model.get_submodule(path if layer.module else path.rpartition(".")[0])
    weight = owner._parameters[layer.leaf]
    assert weight is not None
    return weight


def tie_tables(model: nn.Module, tied: Mapping[str, str], folder: Path) -> None:
    """Let each table of embeddings read the rows of its packed head, by name. CheckpointError if one is not there."""
    for table, head in tied.items():
        path, _, leaf = table.rpartition(".")
        modules = dict(model.named_modules())
        holder, packed = modules.get(path), modules.get(head)
        if not isinstance(holder, nn.Embedding) or not isinstance(packed, PackedWeight):
            raise CheckpointError(f"{folder}: config.json ties {table} to {head}, and the model has no such embedding "
                                  "or no such packed layer")
        shape, there = (packed.spec.out_features, packed.spec.in_features), tuple(holder._parameters[leaf].shape)  # type: ignore[union-attr]
        if shape != there:
            raise CheckpointError(f"{folder}: config.json ties {table} {list(there)} to {head} {list(shape)}")
        tie_table(holder, leaf, packed)
