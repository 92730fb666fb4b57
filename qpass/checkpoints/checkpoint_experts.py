"""Checkpoint experts: a model with experts in 3-D parameters and a checkpoint that has them quantized in; packed out.

A checkpoint has a layer per expert and projection (`experts.3.gate_proj.weight_packed`), or stacks of matrices,
whatever the model holds in memory. How its module computes with them is found in the model's graph, as for quantize.
What cannot stay packed is left to the ordinary way, which decodes it to float and says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qpass.capture.capture_model import capture
from qpass.checkpoints.checkpoint_names import Assembly, find_assemblies
from qpass.checkpoints.float_experts import bias_parts, fill_biases, fill_float_weights, float_parts
from qpass.decide.decide_experts import ROUNDED, Parts, spec_of_block
from qpass.dtype import is_float, itemsize
from qpass.errors import CheckpointError, WeightError
from qpass.experts_site import ExpertsSite
from qpass.find.experts_rows import gate_first
from qpass.find.find_sites import find
from qpass.formats.checkpoint import Checkpoint
from qpass.formats.reader import Place, Reader, WeightRead
from qpass.kernels.experts_choice import choose_experts
from qpass.kernels.registry import ExpertsCall
from qpass.layers.experts_disk import projections
from qpass.layers.experts_layer import QuantExperts, Weight
from qpass.layers.weight_rows import NotShared, put_rows, rows_spec
from qpass.scheme import family_of
from qpass.spec import LinearSpec
from qpass.swap.module_places import put_everywhere
from qpass.swap.swap_site import give_back_freed_memory
from qpass.weight import CanonicalWeight

_LEAVES = ("weight", "weight_packed", "weight_scale", "qweight", "weight._data", "W_q")
_PERMUTES = ("g_idx", "weight_g_idx", "perm", "pre_quant_scale")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One matrix of one expert in the checkpoint; `read` is None where it stands there in float, `at` is where it is in
    a stack, and None where it is a layer of its own."""

    path: str
    read: WeightRead | None
    at: int | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        return (f"{self.path}.weight",) if self.read is None else tuple(self.read.tensors.values())


@dataclass(frozen=True, kw_only=True)
class ExpertsLayer:
    """One module of experts to be read: pieces[which][expert] are the layers of its first (0) or second (1) weight.

    Without blocks nothing of it is quantized, but the files have it in another arrangement. `biases` are those of which
    the files have parts, by leaf.
    """

    site: ExpertsSite
    pieces: tuple[tuple[tuple[Piece, ...], ...], ...]
    blocks: tuple[tuple[Parts, tuple[int, ...]], ...]
    biases: Mapping[str, tuple[str, ...]]

    @property
    def parameters(self) -> frozenset[str]:
        """Full names of the parameters that are replaced or filled."""
        return frozenset(f"{self.site.owner}.{leaf}" for leaf in (*self.site.parameters, *self.biases))

    @property
    def tensors(self) -> frozenset[str]:
        """Names of all tensors that are read."""
        read = {name for which in self.pieces for expert in which for piece in expert for name in piece.tensors}
        return frozenset(read).union(*self.biases.values())

    @property
    def paths(self) -> frozenset[str]:
        return frozenset(piece.path for which in self.pieces for expert in which for piece in expert)


def find_experts(model: nn.Module, checkpoint: Checkpoint, reader: Reader) -> tuple[ExpertsLayer, ...]:
    """Modules of experts whose matrices, in layers or in stacks, the checkpoint holds quantized."""
    assemblies = find_assemblies(model, checkpoint.tensors)
    owners = [path for path, module in model.named_modules()
              if any(p is not None and p.ndim == 3 and not _is_float(checkpoint, f"{path}.{leaf}", assemblies)
                     for leaf, p in module._parameters.items())]
    if not owners:
        return ()
    sites = {s.owner: s.experts for s in find(model, capture(model)) if s.experts is not None}
    found = []
    for owner in owners:
        site = sites.get(owner)
        if site is None or any(_is_float(checkpoint, f"{owner}.{leaf}", {}) for leaf in site.parameters):
            continue
        pieces = tuple(_stacked(site, which, reader) or
                       tuple(_pieces(site, which, expert, checkpoint, reader, assemblies)
                             for expert in range(site.experts)) for which in (0, 1))
        every = [piece for which in pieces for expert in which for piece in expert]
        if not all(expert for which in pieces for expert in which):
            continue
        biases = bias_parts(site, reader)
        if all(piece.read is None for piece in every):
            if all(piece.at is not None for piece in every):
                found.append(ExpertsLayer(site=site, pieces=pieces, blocks=(), biases=biases))
            continue
        blocks: dict[Parts, list[int]] = {}
        try:
            for expert in range(site.experts):
                parts = (_part(site, 0, pieces[0][expert]), _part(site, 1, pieces[1][expert]))
                blocks.setdefault(parts, []).append(expert)
        except ValueError:
            continue
        found.append(ExpertsLayer(site=site, pieces=pieces, biases=biases,
                                  blocks=tuple((parts, tuple(e)) for parts, e in blocks.items())))
    return tuple(found)


def fill_experts(model: nn.Module, layers: Sequence[ExpertsLayer], checkpoint: Checkpoint, device: torch.device,
                 dtype: torch.dtype | None = None) -> None:
    """Read, pack and put in place each module of experts, one expert at a time."""
    for layer in layers:
        site = layer.site
        origin = model.get_submodule(site.owner)
        of = dtype or origin.get_parameter(site.second).dtype
        fill_biases(origin, site, layer.biases, checkpoint, device, of)
        if not layer.blocks:
            names = tuple(tuple(name for piece in which[0] for name in piece.tensors) for which in layer.pieces)
            fill_float_weights(origin, site, names, checkpoint, device, of)
            continue
        made = QuantExperts(site, origin, of)
        for parts, experts in layer.blocks:
            try:
                _put(made, layer, parts, experts, checkpoint, device)
            except NotShared:  # seen in the numbers alone; the same again with a place for each part's own
                try:
                    loose = [_part(site, which, layer.pieces[which][experts[0]], shared=False) for which in (0, 1)]
                except ValueError as error:
                    raise CheckpointError(f"{site.owner} in {checkpoint.path}: {error}") from error
                loose = [part if part is None or tight is None else replace(
                    part, activation=tight.activation, family=family_of(part.weight, tight.activation))
                    for part, tight in zip(loose, parts, strict=True)]
                _put(made, layer, (loose[0], loose[1]), experts, checkpoint, device)
        for leaf in site.parameters:
            shape = origin.get_parameter(leaf).shape
            origin._parameters[leaf] = nn.Parameter(torch.empty(shape, dtype=of, device="meta"), requires_grad=False)
        put_everywhere(model, origin, made)
        give_back_freed_memory()


def _put(made: QuantExperts, layer: ExpertsLayer, parts: Parts, experts: Sequence[int], checkpoint: Checkpoint,
         device: torch.device) -> None:
    call = ExpertsCall(spec=spec_of_block(layer.site, parts, len(experts)), device=device, dtype=made.dtype,
                       bias=layer.site.first_bias is not None)
    spec, _ = choose_experts(call, where=layer.site.owner, prepare=True)
    first, second = (_read(layer, which, experts, parts[which], checkpoint, made.dtype, device) for which in (0, 1))
    made.put_block(spec, experts, first, second)


def _is_float(checkpoint: Checkpoint, name: str, assemblies: Mapping[str, Assembly]) -> bool:
    """Whether all that makes up this parameter stands in the files as floats of 16 bits or more."""
    assembly = assemblies.get(name)
    stored = [checkpoint.tensors.get(part) for part in (assembly.names if assembly is not None else (name,))]
    return all(one is not None and is_float(one.dtype) and itemsize(one.dtype) > 1 for one in stored)


def _stacked(site: ExpertsSite, which: int, reader: Reader) -> tuple[tuple[Piece, ...], ...]:
    """The matrices of each expert's weight where the checkpoint has stacks of them; () if it has none."""
    leaves, k = ((site.second,), site.intermediate) if which else (site.first, site.hidden)
    rows = site.hidden if which else site.intermediate * (2 if site.rows not in ("apart", "single") else 1)
    reads: list[tuple[str, WeightRead]] = []
    for leaf in leaves:
        name = f"{site.owner}.{leaf}"
        reads += [(name, read) for read in reader.stack(Place(
            path=name, name=name, shape=(site.experts, rows, k), transposed=site.transposed[which]))]
    if not reads:
        return tuple(tuple(Piece(path=name.removesuffix(".weight"), read=None, at=expert) for name in names)
                     for expert in range(site.experts)) if (names := float_parts(site, which, reader)) else ()
    if not which and len(reads) not in (1, 2):
        return ()
    return tuple(tuple(Piece(path=name, read=read, at=expert) for name, read in reads)
                 for expert in range(site.experts))


def _pieces(site: ExpertsSite, which: int, expert: int, checkpoint: Checkpoint, reader: Reader,
            assemblies: Mapping[str, Assembly]) -> tuple[Piece, ...]:
    """The layers of one expert's weight, gate before up; () if the checkpoint has none."""
    rows, k = (site.hidden, site.intermediate) if which else (site.intermediate, site.hidden)
    leaves = (site.second,) if which else site.first
    paths: list[str] = []
    for leaf in leaves:
        assembly = assemblies.get(f"{site.owner}.{leaf}")
        if assembly is not None and assembly.stacked and not assembly.refusal:
            paths += [part[expert].removesuffix(".weight") for part in assembly.parts]
    if not paths:
        paths = [f"{site.owner}.{expert}.{name}" for name in projections(site, which, None)]
        whole = f"{site.owner}.{expert}.gate_up_proj"  # as qpass itself writes a codec's, whose rows it does not cut
        if not which and len(paths) == 2 and _siblings(checkpoint, whole):
            paths, rows = [whole], 2 * rows
    found = []
    for path in paths:
        read = reader.weight(Place(path=path, name=f"{path}.weight", shape=(rows, k))) \
            if _siblings(checkpoint, path) else None
        if read is not None and not isinstance(read, WeightRead):
            return ()
        if read is None and f"{path}.weight" not in checkpoint.tensors:
            return ()
        found.append(Piece(path=path, read=read))
    return tuple(found)


def _siblings(checkpoint: Checkpoint, path: str) -> list[str]:
    return [name for name in (f"{path}.{leaf}" for leaf in _LEAVES) if name in checkpoint.tensors]


def _part(site: ExpertsSite, which: int, pieces: Sequence[Piece], *, shared: bool = True) -> LinearSpec | None:
    """The spec of one expert's weight from those of its matrices, None for float. ValueError where they differ, or
    where one permutes or scales its input."""
    if any(name in _PERMUTES for p in pieces if p.read is not None for name in p.read.tensors):
        raise ValueError("packed experts take their input as it is")
    specs = [piece.read.spec for piece in pieces if piece.read is not None]
    if len(specs) != len(pieces):
        if specs:
            raise ValueError("one in float, another quantized")
        return None
    whole = rows_spec(specs, shared=shared, taken=_order(site, which, pieces) is not None)
    return whole if whole.activation is None or whole.activation in ROUNDED else whole.weight_only()


def _order(site: ExpertsSite, which: int, pieces: Sequence[Piece]) -> Tensor | None:
    """Where gate rows and then up rows stand in a stack that has both as the model stores them; None if so already."""
    if which or len(pieces) != 1 or pieces[0].at is None or site.rows not in ("alternating", "one after the other"):
        return None
    stored = torch.arange(2 * site.intermediate)
    order = gate_first(site, [stored])
    return None if torch.equal(order, stored) else order


def _read(layer: ExpertsLayer, which: int, experts: Sequence[int], part: LinearSpec | None, checkpoint: Checkpoint,
          dtype: torch.dtype, device: torch.device) -> Iterator[Weight]:
    for expert in experts:
        pieces = layer.pieces[which][expert]
        read = [_read_piece(piece, checkpoint, dtype, device) for piece in pieces]
        if part is None:
            yield torch.cat([r for r in read if isinstance(r, Tensor)])
        else:
            specs = [piece.read.spec for piece in pieces if piece.read is not None]
            order = _order(layer.site, which, pieces)
            yield put_rows([r for r in read if isinstance(r, CanonicalWeight)], specs, part,
                           None if order is None else order.to(device))


def _read_piece(piece: Piece, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Weight:
    tensors = checkpoint.source.read(piece.tensors, piece.at)
    if piece.read is None:
        return tensors[f"{piece.path}.weight"].to(device=device, dtype=dtype)
    where = piece.path if piece.at is None else f"{piece.path}[{piece.at}]"
    try:
        weight = piece.read.read({short: tensors[full].to(device) for short, full in piece.read.tensors.items()},
                                 piece.read.spec)
    except (ValueError, WeightError) as error:
        raise CheckpointError(f"{where} in {checkpoint.path}: {error}") from error
    if {"input_order", "pre_scale", "hadamard"} & set(weight.tensors):
        raise CheckpointError(f"{where} in {checkpoint.path} permutes, scales or mixes its input, which packed experts "
                              "cannot; load the float checkpoint and quantize it")
    return weight
