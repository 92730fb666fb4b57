"""Checkpoint experts: a model with experts in 3-D parameters and a checkpoint of layers per expert in; the experts out.

LLM Compressor and qpass write `experts.3.gate_proj.weight_packed`, whatever the model holds in memory. How its module
computes with them is found in the model's graph, as for quantize. What cannot be kept as integers is left to the
ordinary way, which decodes it to float and says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qpass.capture import capture
from qpass.checkpoint_names import find_assemblies
from qpass.decide_experts import ROUNDED, Parts, spec_of_block
from qpass.errors import CheckpointError
from qpass.experts_disk import projections
from qpass.experts_layer import QuantExperts, Weight
from qpass.experts_site import ExpertsSite
from qpass.find import find
from qpass.formats.checkpoint import Checkpoint
from qpass.formats.reader import Place, Reader, WeightRead
from qpass.kernels.experts_choice import choose_experts
from qpass.kernels.registry import ExpertsCall
from qpass.spec import LinearSpec
from qpass.swap import give_back_freed_memory
from qpass.swap_experts import put_experts
from qpass.weight import CanonicalWeight

_PERMUTES = ("g_idx", "weight_g_idx", "perm", "pre_quant_scale")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One layer of one expert in the checkpoint; `read` is None where it stands there in float."""

    path: str
    read: WeightRead | None

    @property
    def tensors(self) -> tuple[str, ...]:
        return (f"{self.path}.weight",) if self.read is None else tuple(self.read.tensors.values())


@dataclass(frozen=True, kw_only=True)
class ExpertsLayer:
    """One module of experts to be read: pieces[which][expert] are the layers of its first (0) or second (1) weight."""

    site: ExpertsSite
    pieces: tuple[tuple[tuple[Piece, ...], ...], ...]
    blocks: tuple[tuple[Parts, tuple[int, ...]], ...]

    @property
    def parameters(self) -> frozenset[str]:
        """Full names of the parameters that are replaced."""
        return frozenset(f"{self.site.owner}.{leaf}" for leaf in self.site.parameters)

    @property
    def tensors(self) -> frozenset[str]:
        """Names of all tensors that are read."""
        return frozenset(name for which in self.pieces for expert in which for piece in expert
                         for name in piece.tensors)

    @property
    def paths(self) -> frozenset[str]:
        return frozenset(piece.path for which in self.pieces for expert in which for piece in expert)


def find_experts(model: nn.Module, checkpoint: Checkpoint, reader: Reader) -> tuple[ExpertsLayer, ...]:
    """Modules of experts whose layers, one an expert and a projection, the checkpoint holds quantized."""
    owners = [path for path, module in model.named_modules()
              if any(p is not None and p.ndim == 3 for p in module._parameters.values())]
    if not owners or not any(re.search(r"\.\d+\.\w+\.(weight\w*|qweight)$", name) for name in checkpoint.tensors):
        return ()
    assemblies = find_assemblies(model, checkpoint.tensors)
    sites = {s.owner: s.experts for s in find(model, capture(model)) if s.experts is not None}
    found = []
    for owner in owners:
        site = sites.get(owner)
        if site is None or any(f"{owner}.{leaf}" in checkpoint.tensors for leaf in site.parameters):
            continue
        pieces = tuple(tuple(_pieces(site, which, expert, checkpoint, reader, assemblies)
                             for expert in range(site.experts)) for which in (0, 1))
        every = [piece for which in pieces for expert in which for piece in expert]
        if not all(expert for which in pieces for expert in which) or all(piece.read is None for piece in every):
            continue
        blocks: dict[Parts, list[int]] = {}
        try:
            for expert in range(site.experts):
                parts = (_part(pieces[0][expert]), _part(pieces[1][expert]))
                blocks.setdefault(parts, []).append(expert)
        except ValueError:
            continue
        found.append(ExpertsLayer(site=site, pieces=pieces,
                                  blocks=tuple((parts, tuple(e)) for parts, e in blocks.items())))
    return tuple(found)


def fill_experts(model: nn.Module, layers: Sequence[ExpertsLayer], checkpoint: Checkpoint, device: torch.device,
                 dtype: torch.dtype | None = None) -> None:
    """Read, pack and put in place each module of experts, one expert at a time."""
    for layer in layers:
        site = layer.site
        origin = model.get_submodule(site.owner)
        of = dtype or origin.get_parameter(site.second).dtype
        made = QuantExperts(site, origin, of)
        for parts, experts in layer.blocks:
            call = ExpertsCall(spec=spec_of_block(site, parts, len(experts)), device=device, dtype=of,
                               bias=site.first_bias is not None)
            spec, _ = choose_experts(call, where=site.owner, prepare=True)
            made.put_block(spec, experts, _read(layer, 0, experts, checkpoint, of, device),
                           _read(layer, 1, experts, checkpoint, of, device))
        for leaf in site.parameters:
            shape = origin.get_parameter(leaf).shape
            origin._parameters[leaf] = nn.Parameter(torch.empty(shape, dtype=of, device="meta"), requires_grad=False)
        put_experts(model, origin, made)
        give_back_freed_memory()


def _pieces(site: ExpertsSite, which: int, expert: int, checkpoint: Checkpoint, reader: Reader,
            assemblies: object) -> tuple[Piece, ...]:
    """The layers of one expert's weight, gate before up; () if the checkpoint has none."""
    rows, k = (site.hidden, site.intermediate) if which else (site.intermediate, site.hidden)
    leaves = (site.second,) if which else site.first
    paths: list[str] = []
    for leaf in leaves:
        assembly = assemblies.get(f"{site.owner}.{leaf}")  # type: ignore[attr-defined]
        if assembly is not None and assembly.stacked and not assembly.refusal:
            paths += [part[expert].removesuffix(".weight") for part in assembly.parts]
    paths = paths or [f"{site.owner}.{expert}.{name}" for name in projections(site, which, None)]
    found = []
    for path in paths:
        read = reader.weight(Place(path=path, name=f"{path}.weight", shape=(rows, k))) \
            if any(name.startswith(f"{path}.") for name in _siblings(checkpoint, path)) else None
        if read is not None and not isinstance(read, WeightRead):
            return ()
        if read is None and f"{path}.weight" not in checkpoint.tensors:
            return ()
        found.append(Piece(path=path, read=read))
    return tuple(found)


def _siblings(checkpoint: Checkpoint, path: str) -> list[str]:
    return [name for name in (f"{path}.{leaf}" for leaf in ("weight", "weight_packed", "weight_scale", "qweight"))
            if name in checkpoint.tensors]


def _part(pieces: Sequence[Piece]) -> LinearSpec | None:
    """The spec of one expert's weight from those of its layers, None for float. ValueError where they differ, or where
    a layer permutes or scales its input."""
    specs = {None if piece.read is None else piece.read.spec for piece in pieces}
    if len(specs) != 1 or any(name in _PERMUTES for p in pieces if p.read is not None for name in p.read.tensors):
        raise ValueError("no single weight")
    spec = specs.pop()
    if spec is None:
        return None
    if spec.weight.type != "int" and len(pieces) > 1:
        raise ValueError("a codec's weights cannot be put below each other")
    whole = replace(spec, out_features=spec.out_features * len(pieces))
    return whole if whole.activation is None or whole.activation in ROUNDED else whole.weight_only()


def _read(layer: ExpertsLayer, which: int, experts: Sequence[int], checkpoint: Checkpoint, dtype: torch.dtype,
          device: torch.device) -> Iterator[Weight]:
    for expert in experts:
        read = [_read_piece(piece, checkpoint, dtype, device) for piece in layer.pieces[which][expert]]
        if isinstance(read[0], Tensor):
            yield torch.cat([r for r in read if isinstance(r, Tensor)])
        else:
            parts = [r.tensors for r in read if isinstance(r, CanonicalWeight)]
            yield CanonicalWeight({key: torch.cat([part[key] for part in parts]) for key in parts[0]}) \
                if len(parts) > 1 else read[0]


def _read_piece(piece: Piece, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Weight:
    tensors = checkpoint.source.read(piece.tensors)
    if piece.read is None:
        return tensors[f"{piece.path}.weight"].to(device=device, dtype=dtype)
    try:
        weight = piece.read.read({short: tensors[full].to(device) for short, full in piece.read.tensors.items()},
                                 piece.read.spec)
    except ValueError as error:
        raise CheckpointError(f"{piece.path} in {checkpoint.path}: {error}") from error
    if {"input_order", "pre_scale"} & set(weight.tensors):
        raise CheckpointError(f"{piece.path} in {checkpoint.path} permutes or scales its input, which packed experts "
                              "cannot; load the float checkpoint and quantize it")
    return weight
