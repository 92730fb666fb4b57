"""Checkpoint layers: a model and a checkpoint's reader in; what each parameter is read from, or what disagrees, out.

Nothing is read but headers, and nothing is allocated: what is wrong with a checkpoint is known before that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from qpass.checkpoints.assemble_reads import Found, assemble
from qpass.checkpoints.checkpoint_names import Assembly, find_assemblies
from qpass.dtype import dtype_name, is_float
from qpass.errors import CheckpointError
from qpass.formats.checkpoint import Checkpoint, Stored
from qpass.formats.reader import FloatRead, Place, Reader, WeightRead

_SHOWN = 10
Storage = Mapping[str, Mapping[str, object]]  # as Reader.storage


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One quantized weight to be read, and its places in the model.

    `leaf` is the weight's name in each holder; `module` says that the holder is replaced, not only its parameter.
    """

    paths: tuple[str, ...]
    leaf: str
    bias: str | None
    transposed: bool
    module: bool
    read: WeightRead


@dataclass(frozen=True, kw_only=True)
class Float:
    """One parameter or persistent buffer that becomes a float tensor; `read` is None if the files need not have it."""

    places: tuple[tuple[nn.Module, str], ...]
    name: str
    read: FloatRead | None


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Everything that a model gets from a checkpoint; `notes` are lines for the report."""

    layers: tuple[Layer, ...]
    floats: tuple[Float, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Held:
    """One place of a tensor in the model."""

    module: nn.Module
    leaf: str
    path: str

    @property
    def full(self) -> str:
        return f"{self.path}.{self.leaf}" if self.path else self.leaf


class Elsewhere(Protocol):
    """Parameters that are read in another way, by full name, and the tensors and layers that this takes."""

    @property
    def parameters(self) -> frozenset[str]: ...

    @property
    def tensors(self) -> frozenset[str]: ...

    @property
    def paths(self) -> frozenset[str]: ...


def match_contents(model: nn.Module, checkpoint: Checkpoint, reader: Reader | None,
                   elsewhere: Sequence[Elsewhere] = ()) -> Contents:
    """What each parameter and persistent buffer is read from; `reader` is None for a checkpoint of floats.

    `elsewhere` are those that are read in another way.

    Raises CheckpointError, naming tensors, layers and both sides: a tensor that is missing, that nothing reads, or
    that cannot be what the config says; a layer that the config quantizes and the model does not have.
    """
    assemblies = find_assemblies(model, checkpoint.tensors)
    layers: list[Layer] = []
    floats: list[Float] = []
    wrong: list[str] = []
    taken = {name for other in elsewhere for name in other.parameters}
    storage = {} if reader is None else {**_transposed(model, reader, assemblies), **reader.storage}
    for tensor, held in _tensors(model, reader.tied if reader is not None else {}):
        if held[0].full in taken:
            continue
        found: Found = None
        if reader is not None and isinstance(tensor, nn.Parameter):
            found = _ask(tensor, held, checkpoint, reader, assemblies, storage)
        elif held[0].full in assemblies:
            found = assemble(assemblies[held[0].full], tuple(tensor.shape), checkpoint, None, str(checkpoint.path))
        if isinstance(found, WeightRead):
            layers.append(_layer(held, found, storage))
            continue
        if found is None:
            found, disagreements = _plain(model, tensor, held, checkpoint.tensors)
            wrong += disagreements
        floats.append(Float(places=tuple((h.module, h.leaf) for h in held), name=held[0].full, read=found))
    others = {name for other in elsewhere for name in other.tensors}
    notes = _unread(model, checkpoint, reader, layers, floats, wrong, others)
    if reader is not None:
        paths = [path for layer in layers for path in layer.paths]
        decoded = [f.name.removesuffix(".weight") for f in floats if f.read is not None and f.read.note]
        if (said := reader.unmatched([*paths, *decoded, *taken])) is not None:
            raise CheckpointError(f"{checkpoint.path}: {said}")
    if wrong:
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        raise CheckpointError(f"{checkpoint.path}: the tensors and the model of config.json disagree:\n  "
                              + "\n  ".join(wrong[:_SHOWN] + more))
    return Contents(layers=tuple(layers), floats=tuple(floats), notes=tuple(notes))


def _tensors(model: nn.Module, tied: Mapping[str, str]) -> list[tuple[Tensor, list[_Held]]]:
    """Each parameter and persistent buffer once, with all its places; tables in `tied` apart from their heads."""
    places: dict[tuple[int, bool], tuple[Tensor, list[_Held]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        own = {**module._parameters, **{name: buffer for name, buffer in module._buffers.items()
                                        if name not in module._non_persistent_buffers_set}}
        for leaf, tensor in own.items():
            if tensor is not None:
                held = _Held(module, leaf, path)
                places.setdefault((id(tensor), held.full in tied), (tensor, []))[1].append(held)
    return list(places.values())


def _ask(tensor: Tensor, held: Sequence[_Held], checkpoint: Checkpoint, reader: Reader,
         assemblies: Mapping[str, Assembly], storage: Storage) -> Found:
    """The first of the tensor's places under which the checkpoint has numbers that are not plain."""
    linear = all(_is_linear(h, storage) for h in held)
    for h in held:
        path, said = _path_of(h, storage)
        shape = tuple(tensor.shape[::-1]) if said.get("transposed") else tuple(tensor.shape)
        if (assembly := assemblies.get(h.full)) is not None and h.full not in checkpoint.tensors:
            found = assemble(assembly, shape, checkpoint, reader, h.full, linear=linear)
        else:
            classes = tuple(cls.__name__ for cls in type(h.module).__mro__)
            found = reader.weight(Place(path=path, name=h.full, shape=shape, classes=classes, linear=linear))
        if isinstance(found, WeightRead) and not linear:
            from qpass.checkpoints.assemble_reads import decoded

            found = decoded(found, shape, "its module is no linear layer", transposed=False)
        if found is not None:
            return found
    return None


def _transposed(model: nn.Module, reader: Reader, assemblies: Mapping[str, Assembly]) -> Storage:
    """Quantized layers whose module stores [K, N], as the model's graph tells; files have [N, K] of every layer."""
    odd = []
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim != 2 or isinstance(module, nn.Linear | nn.Embedding) or path in reader.storage:
            continue
        found = assemblies.get(f"{path}.weight")
        names = [path] if found is None else [name.removesuffix(".weight") for name in found.names]
        odd += [path] if any(reader.shape_of(name) is not None for name in names) else []
    if not odd:
        return {}
    from qpass.capture.capture_model import capture
    from qpass.find.find_sites import find

    sites = {site.name: site for site in find(model, capture(model)) if site.experts is None}
    return {path: {"weight": "weight", "bias": "bias", "transposed": True} for path in odd
            if (site := sites.get(f"{path}.weight")) is not None and site.transposed and site.swap == "module"}


def _path_of(held: _Held, storage: Storage) -> tuple[str, Mapping[str, object]]:
    """Under which path the checkpoint knows the weight, and how it is stored if that is said."""
    if (said := storage.get(held.full)) is not None and said["weight"] is None:
        return held.full, said
    said = storage.get(held.path, {})
    return (held.path, said) if held.leaf in ("weight", said.get("weight")) else (held.full, {})


def _is_linear(held: _Held, storage: Storage) -> bool:
    _, said = _path_of(held, storage)
    return bool(said) or (isinstance(held.module, nn.Linear) and held.leaf == "weight")


def _layer(held: Sequence[_Held], read: WeightRead, storage: Storage) -> Layer:
    path, said = _path_of(held[0], storage)
    bias = said.get("bias") if said else "bias"
    return Layer(paths=tuple(_path_of(h, storage)[0] for h in held), leaf=held[0].leaf, read=read,
                 bias=bias if isinstance(bias, str) else None, transposed=bool(said.get("transposed")),
                 module=path != held[0].full)


def _plain(model: nn.Module, tensor: Tensor, held: Sequence[_Held], stored: Mapping[str, Stored]
           ) -> tuple[FloatRead | None, list[str]]:
    name = next((h.full for h in held if h.full in stored), None)
    if name is None:
        missing = [] if _optional(model, held[0].full, tensor) else [f"{held[0].full} is missing from the files"]
        return None, missing
    said = _differs(stored[name], tensor)
    return FloatRead(tensors={name: name}, read=lambda tensors: tensors[name]), [f"{name} {said}"] if said else []


def _optional(model: nn.Module, name: str, tensor: Tensor) -> bool:
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return not tensor.is_meta and any(re.search(pattern, name) for pattern in patterns)


def _differs(there: Stored, tensor: Tensor) -> str | None:
    if there.shape == tuple(tensor.shape) and is_float(there.dtype) == tensor.is_floating_point():
        return None
    return (f"in {there.file.name} is {there}, the model has {dtype_name(tensor.dtype)} "
            f"{list(tensor.shape)}")


def _no_bias(name: str, owners: set[str], checkpoint: Checkpoint) -> bool:
    """Whether this is a bias of zeros: older tools gave every layer that they quantized one."""
    path, _, leaf = name.rpartition(".")
    stored = checkpoint.tensors[name]
    return (leaf == "bias" and path in owners and len(stored.shape) == 1 and is_float(stored.dtype)
            and not bool(checkpoint.source.read([name])[name].any()))


def _unread(model: nn.Module, checkpoint: Checkpoint, reader: Reader | None, layers: Sequence[Layer],
            floats: Sequence[Float], wrong: list[str], others: set[str]) -> list[str]:
    """Lines on tensors that are left, and on layers about which there is something to say; errors go into `wrong`."""
    reads: list[tuple[str, WeightRead | FloatRead]] = [(layer.paths[0], layer.read) for layer in layers]
    reads += [(item.name, item.read) for item in floats if item.read is not None]
    used = others | {name for _, read in reads for name in read.tensors.values()}
    owners = {name.rpartition(".")[0] for name in used}
    unneeded = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    said: dict[str, list[str]] = {}
    for name, stored in checkpoint.tensors.items():
        if name in used or any(re.search(pattern, name) for pattern in unneeded):
            continue
        why = reader.spare(name) if reader is not None else None
        if why is None and reader is not None and _no_bias(name, owners, checkpoint):
            why = "zeros, a bias that the model does not have"
        if why is None:
            wrong.append(f"{name} in {stored.file.name} has no place in the model")
        else:
            said.setdefault(f"not used: {why}", []).append(name)
    for path, read in reads:
        if read.note:
            said.setdefault(read.note, []).append(path)
    return [f"{note} ({names[0]}" + (f" and {len(names) - 1} more)" if len(names) > 1 else ")")
            for note, names in said.items()]
