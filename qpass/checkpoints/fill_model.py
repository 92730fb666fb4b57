"""Fill: an empty model and what goes where in it; the same model with its numbers in place, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qpass.activation_scale import ActivationScale, scale_of_tensors
from qpass.checkpoints.checkpoint_layers import Float, Layer
from qpass.errors import CheckpointError, WeightError
from qpass.formats.checkpoint import Checkpoint
from qpass.formats.lent_memory import LentMemory
from qpass.formats.safetensors_folder import SafetensorsFolder
from qpass.kernels.keep_activation import computable
from qpass.kernels.registry import LinearCall, choose, kernel
from qpass.layers.origin import Origin
from qpass.layers.packed_layers import PackedWeight, QuantLinear
from qpass.layers.quant_weight import QuantWeight
from qpass.layers.reordered_linear import ReorderedLinear
from qpass.spec import LinearSpec
from qpass.swap.module_places import put_everywhere
from qpass.swap.swap_site import TRIM_AFTER, give_back_freed_memory, tie_table
from qpass.weight import CanonicalWeight

_Parts = tuple[Any, LinearSpec, torch.dtype, ActivationScale | None]
_NO_CHANGE: Mapping[str, Any] = {"hadamard": None, "order": None, "pre_scale": None}
_HOLES = 8
"""Reading by rows uses its memory again; of what it packs, one part in so many stays behind as holes of the heap."""
_AT_ONCE = 1 << 21
"""Weights that are read, unpacked and packed at a time: what is between two steps stays in the cache."""


def fill_floats(floats: Sequence[Float], checkpoint: Checkpoint, device: torch.device,
                dtype: torch.dtype | None = None) -> None:
    """Read every tensor that stays float to `device`, in the dtype that the model has for it, or in `dtype`."""
    for item in floats:
        value = read_float(item, checkpoint, device, dtype)
        if value is None:
            continue
        before = _there(item)
        if isinstance(before, nn.Parameter):
            value = nn.Parameter(value, requires_grad=before.requires_grad)
        for module, leaf in item.places:
            (module._parameters if leaf in module._parameters else module._buffers)[leaf] = value  # type: ignore[assignment]


def read_float(item: Float, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None = None,
               lent: LentMemory | None = None) -> torch.Tensor | None:
    """One tensor that is float in the files, as `fill_floats` puts it; None if the files need not have it. One that is
    only looked at for a while may be read into memory that is `lent`."""
    if item.read is None:
        return None
    before = _there(item)
    source, names = checkpoint.source, item.read.tensors.values()
    tensors = (source.read(names, lent=lent) if isinstance(source, SafetensorsFolder) and len(names) == 1 else
               source.read(names))
    try:
        value = item.read.read({short: tensors[full] for short, full in item.read.tensors.items()})
    except ValueError as error:
        raise CheckpointError(f"{item.name} in {checkpoint.path}: {error}") from error
    if value.shape != before.shape:
        raise CheckpointError(f"{item.name} in {checkpoint.path} was read as {list(value.shape)}, the model has "
                              f"{list(before.shape)}")
    wanted = dtype if dtype is not None and isinstance(before, nn.Parameter) else before.dtype
    return value.to(device=device, dtype=wanted)


def _there(item: Float) -> torch.Tensor:
    module, leaf = item.places[0]
    tensor = module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]
    assert tensor is not None
    return tensor


def fill_layers(model: nn.Module, layers: Sequence[Layer], checkpoint: Checkpoint, device: torch.device,
                dtype: torch.dtype | None = None, *, exact: bool = False) -> None:
    """Read, pack and put in place each layer on `device`. Raises CheckpointError that names a damaged layer."""
    freed, lent = 0, LentMemory()
    for layer in layers:
        of = dtype or _weight_of(model, layer, layer.paths[0]).dtype
        if (rows := _RowReader.of(layer, checkpoint, device, of, exact=exact)) is not None:
            parts = rows.pack(lent)
            _put(model, layer, parts, _NO_CHANGE, checkpoint)
            freed += sum(tensor.nbytes for tensor in parts[0].values()) // _HOLES
            del parts
        else:
            freed += _put_whole(model, layer, checkpoint, device, of, exact=exact)
        if freed >= TRIM_AFTER:
            give_back_freed_memory()
            freed = 0


def _put_whole(model: nn.Module, layer: Layer, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, *,
               exact: bool) -> int:
    """Read, pack and put a layer at once. Returns how many bytes were read."""
    tensors = checkpoint.source.read(layer.read.tensors.values())
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    try:
        named = {short: tensors[full].to(device) for short, full in layer.read.tensors.items()}
        del tensors
        canonical = layer.read.read(named, layer.read.spec)
        scale = scale_of_tensors(named, layer.read.spec.activation)
    except (ValueError, WeightError) as error:
        raise CheckpointError(f"{layer.paths[0]} in {checkpoint.path}: {error}") from error
    del named
    mixed = canonical.tensors.pop("hadamard", None)
    inputs: dict[str, Any] = {"hadamard": None if mixed is None else int(mixed),
                              "order": canonical.tensors.pop("input_order", None),
                              "pre_scale": canonical.tensors.pop("pre_scale", None)}
    spec = _with_kernel(_as_read(layer.read.spec, canonical), layer, device, dtype, exact=exact)
    if spec.activation is None or not spec.activation.static:
        scale = None
    _put(model, layer, (canonical, spec, dtype, scale), inputs, checkpoint)
    return nbytes


def _with_kernel(spec: LinearSpec, layer: Layer, device: torch.device, dtype: torch.dtype, *, exact: bool
                 ) -> LinearSpec:
    call = LinearCall(spec=spec, device=device, dtype=dtype)
    call = replace(call, spec=computable(call, exact=exact)[0])
    return call.spec.on(choose(call, where=layer.paths[0], prepare=True).kernel.name)


@dataclass(frozen=True, kw_only=True)
class _RowReader:
    """A layer whose rows can be read and packed some at a time, so that neither its file's form nor its codes are whole
    in memory."""

    layer: Layer
    source: SafetensorsFolder
    spec: LinearSpec
    dtype: torch.dtype
    where: Path

    @classmethod
    def of(cls, layer: Layer, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, *, exact: bool
           ) -> _RowReader | None:
        source, spec = checkpoint.source, layer.read.spec
        if layer.read.by_rows is None or device.type != "cpu" or not isinstance(source, SafetensorsFolder):
            return None
        spec = _with_kernel(spec, layer, device, dtype, exact=exact)
        if kernel(spec.kernel).layout.pack_parts is None:
            return None
        return cls(layer=layer, source=source, spec=spec, dtype=dtype, where=checkpoint.path)

    def pack(self, lent: LentMemory) -> _Parts:
        read = self.layer.read
        shapes = {full: self.source.tensors[full].shape for full in read.tensors.values()}
        apart = {short for short, full in read.tensors.items() if len(shapes[full]) == 2
                 and shapes[full][0] == self.spec.out_features}
        try:
            whole = {short: tensor for short, full in read.tensors.items() if short not in apart
                     for tensor in self.source.read([full]).values()}
            scale = scale_of_tensors(whole, read.spec.activation)
            pack_parts = kernel(self.spec.kernel).layout.pack_parts
            assert pack_parts is not None
            packed = pack_parts(self._parts(whole, apart, lent), self.spec)
        except (ValueError, WeightError) as error:
            raise CheckpointError(f"{self.layer.paths[0]} in {self.where}: {error}") from error
        static = self.spec.activation is not None and self.spec.activation.static
        return packed, self.spec, self.dtype, scale if static else None

    def _parts(self, whole: Mapping[str, torch.Tensor], apart: Iterable[str], lent: LentMemory
               ) -> Iterator[CanonicalWeight]:
        read, (n, k) = self.layer.read, self.spec.shape
        assert read.by_rows is not None
        largest = max(apart, key=lambda short: self.source.tensors[read.tensors[short]].nbytes)
        step = max(32, _AT_ONCE // k // 32 * 32)
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            named = {short: self.source.read([full], rows=rows, lent=lent if short == largest else None)[full]
                     for short, full in read.tensors.items() if short in apart}
            yield read.by_rows({**whole, **named}, replace(read.spec, out_features=rows.stop - start), read.spec)
            named.clear()  # what is lent goes back before the next is read


def _as_read(spec: LinearSpec, canonical: CanonicalWeight) -> LinearSpec:
    """The spec with the symmetry that the zero points say: a config may call symmetric what is not."""
    if spec.weight.type != "int":
        return spec
    if canonical.zero_point is not None and spec.weight.symmetric:
        return replace(spec, weight=replace(spec.weight, symmetric=False))
    if canonical.zero_point is None and not spec.weight.symmetric:
        canonical.tensors["zero_point"] = torch.zeros_like(canonical.scale, dtype=torch.int8)
    return spec


def _put(model: nn.Module, layer: Layer, parts: _Parts, inputs: Mapping[str, Any],
         checkpoint: Checkpoint) -> None:
    canonical, spec, dtype, scale = parts
    first: PackedWeight | None = None
    for path in layer.paths:
        owner = model.get_submodule(path if layer.module else path.rpartition(".")[0])
        if layer.module and owner is not model:
            first = _put_linear(model, owner, layer, first, parts, inputs)
            continue
        if any(value is not None for value in inputs.values()):
            raise CheckpointError(f"{path} in {checkpoint.path} permutes, scales or mixes its input, read for linear "
                                  "layers only")
        first = first or QuantWeight(canonical, spec, dtype, scale, transposed=layer.transposed)
        owner._parameters.pop(layer.leaf)
        owner._modules[layer.leaf] = first


def _put_linear(model: nn.Module, owner: nn.Module, layer: Layer, first: PackedWeight | None, parts: _Parts,
                inputs: Mapping[str, Any]) -> PackedWeight:
    if isinstance(owner, PackedWeight):  # one module under two names
        return owner
    canonical, spec, dtype, scale = parts
    bias_leaf = layer.bias if layer.bias and owner._parameters.get(layer.bias) is not None else None
    origin = Origin(module=owner, weight=layer.leaf, bias=bias_leaf, transposed=layer.transposed)
    bias = owner._parameters[bias_leaf] if bias_leaf else None
    linear: QuantLinear
    if any(value is not None for value in inputs.values()):
        linear = ReorderedLinear(canonical, bias, spec, dtype, origin, scale, **inputs)
    else:
        linear = QuantLinear(canonical, bias, spec, dtype, origin, scale)
    if first is not None:
        linear.tie(first)
    shape = (spec.in_features, spec.out_features) if layer.transposed else (spec.out_features, spec.in_features)
    owner._parameters[layer.leaf] = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
    put_everywhere(model, owner, linear)
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
