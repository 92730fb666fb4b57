"""Experts on disk: one expert's weight in, the tensors that a checkpoint has of it out, and back.

Names are those of one linear layer an expert and a projection, `3.gate_proj.weight_packed`, as LLM Compressor and vLLM
have them, whatever the model holds in memory; `w1`, `w3` and `w2` are read as gate, up and down. Where the rows of gate
and up share what cannot be cut (blocks that lie in both), they stay together: `3.gate_up_proj.weight_<name>`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qpass.experts_site import ExpertsSite
from qpass.formats.compressed_tensors import describe_weight, names_found, read_weight, write_weight
from qpass.layers.weight_rows import cut_rows, cut_spec, put_rows
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight

Disk = dict[str, tuple[torch.dtype, tuple[int, ...]]]
FUSED = "gate_up_proj"
OTHER_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def projections(site: ExpertsSite, which: int, part: LinearSpec | None) -> tuple[str, ...]:
    """The layers that a checkpoint has of one expert's first (0) or second (1) weight, top rows first."""
    if which:
        return ("down_proj",)
    if not site.gate.gated:
        return ("up_proj",)
    return (FUSED,) if part is not None and cut_spec(part, 2) is None else ("gate_proj", "up_proj")


def describe(site: ExpertsSite, which: int, expert: int, part: LinearSpec | None,
             weight: CanonicalWeight | Tensor) -> Disk:
    """Dtype and shape of what write_expert gives; `weight` may be another expert's."""
    found: Disk = {}
    for name, spec, rows in _cut(site, which, part, weight):
        if isinstance(rows, Tensor):
            found[f"{expert}.{name}.weight"] = (rows.dtype, tuple(rows.shape))
        else:
            assert spec is not None
            found |= {f"{expert}.{name}.{key}": told for key, told in describe_weight(rows, spec).items()}
    return found


def write_expert(site: ExpertsSite, which: int, expert: int, part: LinearSpec | None,
                 weight: CanonicalWeight | Tensor) -> dict[str, Tensor]:
    """One expert's first weight (gate rows before up rows) or second as named tensors."""
    found: dict[str, Tensor] = {}
    for name, spec, rows in _cut(site, which, part, weight):
        if isinstance(rows, Tensor):
            found[f"{expert}.{name}.weight"] = rows.contiguous()
        else:
            assert spec is not None
            held = {tensor.data_ptr() for tensor in found.values()}
            # One scale of the whole weight is gate's and up's: two tensors, for safetensors takes none twice.
            found |= {f"{expert}.{name}.{key}": tensor.clone() if tensor.data_ptr() in held else tensor
                      for key, tensor in write_weight(rows, spec).items()}
    return found


def read_expert(site: ExpertsSite, which: int, expert: int, part: LinearSpec | None, tensors: Mapping[str, Tensor],
                dtype: torch.dtype) -> CanonicalWeight | Tensor:
    """The inverse of write_expert. Raises KeyError with the name of a tensor that is missing, ValueError for one that
    disagrees with `part`."""
    names = names_of_expert(site, which, expert, part, tensors)
    if part is None:
        return torch.cat([tensors[full].to(dtype) for layer in names.values() for full in layer.values()])
    spec = _row_spec(part, len(names))
    read = []
    for layer in names.values():
        try:
            read.append(read_weight({key: tensors[full] for key, full in layer.items()}, spec))
        except ValueError as error:
            raise ValueError(f"expert {expert}: {error}") from error
    return put_rows(read, [spec] * len(read), part) if len(read) > 1 else read[0]


def names_of_expert(site: ExpertsSite, which: int, expert: int, part: LinearSpec | None,
                    present: Mapping[str, object]) -> dict[str, dict[str, str]]:
    """Projection -> tensor of a weight -> its full name below the experts. KeyError names the first that is missing."""
    found: dict[str, dict[str, str]] = {}
    for name in projections(site, which, part):
        stem = f"{expert}.{name}"
        other = f"{expert}.{OTHER_NAMES.get(name, name)}"
        if any(key.startswith(f"{other}.") for key in (f"{other}.weight", f"{other}.weight_packed") if key in present):
            stem = other
        keys = ("weight",) if part is None else names_found(part, lambda key, stem=stem: f"{stem}.{key}" in present)  # type: ignore[misc]
        found[name] = {key: f"{stem}.{key}" for key in keys}
        for full in found[name].values():
            if full not in present:
                raise KeyError(full)
    return found


def _cut(site: ExpertsSite, which: int, part: LinearSpec | None, weight: CanonicalWeight | Tensor
         ) -> list[tuple[str, LinearSpec | None, CanonicalWeight | Tensor]]:
    """(projection, spec, weight) of each layer that the weight becomes."""
    names = projections(site, which, part)
    spec = None if part is None else _row_spec(part, len(names))
    if spec is None:
        assert isinstance(weight, Tensor)
        return [(name, None, rows) for name, rows in zip(names, weight.chunk(len(names)), strict=True)]
    assert isinstance(weight, CanonicalWeight)
    return [(name, spec, rows) for name, rows in zip(names, cut_rows(weight, spec, len(names)), strict=True)]


def _row_spec(part: LinearSpec, layers: int) -> LinearSpec:
    spec = cut_spec(part, layers)
    assert spec is not None  # else `projections` would have named one layer
    return spec
