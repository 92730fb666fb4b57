"""Checkpoint layers: a model, a config and the headers of the files in; which tensor goes where, or what disagrees.

Nothing is read but headers, and nothing is allocated: what is wrong with a checkpoint is known before that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qpass.errors import CheckpointError
from qpass.formats.compressed_tensors import names_found
from qpass.formats.compressed_tensors_config import Group, LayerConfig
from qpass.formats.safetensors_file import Stored
from qpass.spec import LinearSpec

_QUANTIZED = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One quantized weight to be read: its places in the model, and its tensors' names in the checkpoint.

    `leaf` is the weight's name in each holder; `module` says that the holder is replaced, not only its parameter.
    """

    paths: tuple[str, ...]
    leaf: str
    bias: str | None
    transposed: bool
    module: bool
    spec: LinearSpec
    tensors: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Float:
    """One parameter or persistent buffer that stays as it is: where it stands, and its tensor in the checkpoint.

    `tensor` is None if the files need not have it.
    """

    places: tuple[tuple[nn.Module, str], ...]
    tensor: str | None


def find_layers(model: nn.Module, config: LayerConfig, stored: Mapping[str, Stored], folder: Path) -> list[Layer]:
    """What the config calls quantized, each checked against what the files hold.

    Raises CheckpointError, naming the layer and both sides, if a tensor is missing, if its shape cannot be that of the
    layer, or if the config names layers that the model does not have.
    """
    found: dict[int, Layer] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        storage = config.storage.get(path)
        if storage is None and not isinstance(module, nn.Linear):
            if (group := config.group_of(path, module)) is not None:
                raise CheckpointError(f"{folder}: config.json group {group.name!r} quantizes {path} "
                                      f"({type(module).__name__}), and only nn.Linear layers can be read")
            continue
        group = config.group_of(path, module)
        if group is not None:
            storage = storage or {"weight": "weight", "bias": "bias", "transposed": False}
            _add(found, path, module, storage, group, stored, folder)
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, storage in config.storage.items():
        owner, _, leaf = path.rpartition(".")
        group = config.group_of(path, None)
        if path not in modules and group is not None:
            if owner not in modules or leaf not in modules[owner]._parameters:
                raise CheckpointError(f"{folder}: config.json says that {path} is quantized, and the model has no such "
                                      "module or parameter")
            _add(found, path, modules[owner], storage, group, stored, folder)
    if not found:
        targets = [target for group in config.groups for target in group.targets]
        raise CheckpointError(f"{folder}: config.json calls layers quantized that the model does not have "
                              f"({', '.join(targets[:5])})")
    return list(found.values())


def _add(found: dict[int, Layer], path: str, holder: nn.Module, storage: Mapping[str, Any], group: Group,
         stored: Mapping[str, Stored], folder: Path) -> None:
    leaf = storage["weight"] or path.rpartition(".")[2]
    weight = holder._parameters.get(leaf)
    if weight is None or weight.dim() != 2:
        raise CheckpointError(f"{folder}: config.json says that {path} is quantized, and the model has no 2-D "
                              f"weight there")
    if (known := found.get(id(weight))) is not None:
        found[id(weight)] = replace(known, paths=(*known.paths, path))
        return
    n, k = weight.shape[::-1] if storage["transposed"] else weight.shape
    try:
        spec = group.spec(n, k)
    except ValueError as error:
        raise CheckpointError(f"{folder}: config.json group {group.name!r} on {path}: {error}") from error
    names = names_found(spec, lambda name: f"{path}.{name}" in stored)
    if missing := [name for name in names if f"{path}.{name}" not in stored]:
        there = sorted(name for name in stored if name.startswith(path + "."))
        raise CheckpointError(f"{folder}: config.json says that {path} is {group.name!r} ({spec.family}), which needs "
                              f"{path}.{missing[0]}; the files have {', '.join(there) or 'nothing of that layer'}")
    layer = Layer(paths=(path,), leaf=leaf, bias=storage["bias"], transposed=storage["transposed"],
                  module=storage["weight"] is not None, spec=spec, tensors={name: f"{path}.{name}" for name in names})
    _check_shapes(layer, stored)
    found[id(weight)] = layer


def _check_shapes(layer: Layer, stored: Mapping[str, Stored]) -> None:
    n, k, bits = layer.spec.out_features, layer.spec.in_features, layer.spec.weight.bits
    expected = {"weight_packed": (torch.int32, (n, -(-k * bits // 32))), "weight": (torch.int8, (n, k)),
                "weight_shape": (torch.int64, (2,))}
    for name, full in layer.tensors.items():
        there = stored[full]
        if name in expected and (there.dtype, there.shape) != expected[name]:
            dtype, shape = expected[name]
            raise CheckpointError(f"{full} in {there.file} is {there.dtype} {list(there.shape)}; config.json makes "
                                  f"the layer "
                                  f"{bits}-bit [{n}, {k}], which needs {dtype} {list(shape)}")


def find_floats(model: nn.Module, layers: list[Layer], stored: Mapping[str, Stored], folder: Path) -> list[Float]:
    """Every parameter and persistent buffer that is in none of `layers`; the rest of the checkpoint must be just these.

    Raises CheckpointError that lists tensors that are missing, unexpected, or of another shape or kind.
    """
    packed = {f"{path}.{layer.leaf}" if layer.module else path for layer in layers for path in layer.paths}
    places: dict[int, list[tuple[nn.Module, str, str]]] = {}
    tensors: dict[int, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        own = {**module._parameters, **{name: buffer for name, buffer in module._buffers.items()
                                        if name not in module._non_persistent_buffers_set}}
        for name, tensor in own.items():
            full = f"{path}.{name}" if path else name
            if tensor is not None and full not in packed:
                places.setdefault(id(tensor), []).append((module, name, full))
                tensors[id(tensor)] = tensor
    known = {full for held in places.values() for _, _, full in held}
    known.update(name for layer in layers for name in layer.tensors.values())
    unneeded = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    wrong = [f"{name} in {stored[name].file.name} has no place in the model" for name in stored
             if name not in known and not any(re.search(pattern, name) for pattern in unneeded)]
    floats = []
    for key, held in places.items():
        name = next((full for _, _, full in held if full in stored), None)
        if name is None and not _optional(model, held[0][2], tensors[key]):
            wrong.append(f"{held[0][2]} is missing from the files")
        elif name is not None and (said := _differs(stored[name], tensors[key])):
            wrong.append(f"{name} {said}")
        floats.append(Float(places=tuple((module, leaf) for module, leaf, _ in held), tensor=name))
    if any(name.rpartition(".")[2] in _QUANTIZED for name in stored if name not in known):
        wrong.insert(0, "the files hold quantized weights for which the model has no layer of its own (experts that "
                        "the "
                     "model keeps in one parameter, most often); this version reads quantized linear layers only")
    if wrong:
        more = [f"and {len(wrong) - 10} more"] if len(wrong) > 10 else []
        raise CheckpointError(f"{folder}: the tensors and the model of config.json disagree:\n  "
                              + "\n  ".join(wrong[:10] + more))
    return floats


def _optional(model: nn.Module, name: str, tensor: Tensor) -> bool:
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return not tensor.is_meta and any(re.search(pattern, name) for pattern in patterns)


def _differs(there: Stored, tensor: Tensor) -> str | None:
    if there.shape == tuple(tensor.shape) and there.dtype.is_floating_point == tensor.is_floating_point():
        return None
    return (f"in {there.file.name} is {there.dtype} {list(there.shape)}, the model has {tensor.dtype} "
            f"{list(tensor.shape)}")
