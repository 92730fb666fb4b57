"""GGUF saving of experts: a module of packed experts in; for each projection one stack of all its matrices out."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from qpass.errors import CheckpointError
from qpass.formats.gguf_names import GgufNames
from qpass.formats.gguf_write import GgufEntry, plain_bytes, weight_bytes, weight_kind
from qpass.layers.experts_disk import FUSED
from qpass.layers.experts_layer import QuantExperts
from qpass.layers.weight_rows import cut_rows, cut_spec
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight


def expert_entries(path: str, module: QuantExperts, names: GgufNames) -> Iterator[GgufEntry]:
    """The tensors of the experts at `path`: gate, up and down, each [E, N, K].

    Integers stay integers where every expert has the same; else all of a projection are floats. Raises CheckpointError
    for experts that llama.cpp's architectures do not have.
    """
    site = module.site
    first, second = names.tensors_of(f"{path}.{FUSED}"), names.tensors_of(f"{path}.down_proj")
    if not site.gate.gated or len(first) != 2 or len(second) != 1:
        raise CheckpointError(f"{path} holds experts without a gate, or in no numbered block; GGUF has no tensors for "
                              "them, save the model as compressed-tensors")
    for which, (found, rows, columns) in enumerate(((first, site.intermediate, site.hidden),
                                                    (second, site.hidden, site.intermediate))):
        kind = _kind(module, which, len(found))
        float_kind = plain_bytes(torch.empty(1, 1, dtype=module.dtype))[0]
        for at, name in enumerate(found):
            yield GgufEntry(name=name, kind=kind or float_kind, shape=(site.experts, rows, columns),
                            make=partial(_stacked, module, which, at, len(found), kind))


def _kind(module: QuantExperts, which: int, projections: int) -> str | None:
    """The type of the blocks that all experts' integers fit into; None if they fit into none."""
    parts = [_matrix_spec(block.spec.parts[which], projections) for block in module.blocks]
    kinds = {None if part is None else weight_kind(part) for part in parts}
    return kinds.pop() if len(kinds) == 1 else None


def _matrix_spec(part: LinearSpec | None, projections: int) -> LinearSpec | None:
    return part if part is None or projections == 1 else cut_spec(part, projections)


def _stacked(module: QuantExperts, which: int, at: int, projections: int, kind: str | None) -> Tensor:
    """The bytes of one projection, expert after expert."""
    found = []
    for expert, block, weight in module.weights(which):
        part = _matrix_spec(block.spec.parts[which], projections)
        if kind is None or part is None or not isinstance(weight, CanonicalWeight):
            rows = module.dequantize(which, expert).chunk(projections)[at]
            found.append(plain_bytes(rows)[1])
        else:
            one = weight if projections == 1 else cut_rows(weight, part, projections)[at]
            found.append(weight_bytes(one, part, kind))
    return torch.cat(found)
