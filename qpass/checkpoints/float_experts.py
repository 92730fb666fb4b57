"""Float experts: tensors of a checkpoint that hold a module's experts in float, in an order of their own, in; the
module's parameters, arranged as it stores them, out.

llama.cpp keeps gate and up apart and every matrix [N, K], whatever the model does; which rows are whose, and whether
the model stores them transposed, is what its graph was found to compute.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qpass.experts_site import ExpertsSite
from qpass.find.experts_rows import as_stored
from qpass.formats.checkpoint import Checkpoint
from qpass.formats.reader import Place, Reader


def float_parts(site: ExpertsSite, which: int, reader: Reader) -> tuple[str, ...]:
    """The stacks of an expert's first (0) or second (1) weight, gate before up; () if the files have none in float."""
    leaves, k = ((site.second,), site.intermediate) if which else (site.first, site.hidden)
    rows = site.hidden if which else site.intermediate * (2 if site.rows not in ("apart", "single") else 1)
    return tuple(name for leaf in leaves for name in reader.float_parts(_place(site, leaf, (rows, k))))


def bias_parts(site: ExpertsSite, reader: Reader) -> dict[str, tuple[str, ...]]:
    """Bias of the module -> the tensors that it is made of, where the files have it in parts."""
    rows = site.intermediate * (2 if site.rows not in ("apart", "single") else 1)
    named = {leaf: reader.float_parts(_place(site, leaf, (rows,))) for leaf in site.first_bias or ()}
    return {leaf: names for leaf, names in named.items() if len(names) == 2}


def fill_float_weights(origin: nn.Module, site: ExpertsSite, names: tuple[tuple[str, ...], ...],
                       checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Put both weights of every expert in place; `names` are the stacks of the first, then of the second."""
    stored: dict[str, list[Tensor]] = {leaf: [] for leaf in site.parameters}
    for expert in range(site.experts):
        first, second = (torch.cat([tensor.to(device=device, dtype=dtype)
                                    for tensor in checkpoint.source.read(stacks, expert).values()]) for stacks in names)
        for leaf, rows in zip(site.first, as_stored(site, first), strict=True):
            stored[leaf].append(rows.t() if site.transposed[0] else rows)
        stored[site.second].append(second.t() if site.transposed[1] else second)
    for leaf, parts in stored.items():
        origin._parameters[leaf] = nn.Parameter(torch.stack(parts), requires_grad=False)


def fill_biases(origin: nn.Module, site: ExpertsSite, names: Mapping[str, tuple[str, ...]], checkpoint: Checkpoint,
                device: torch.device, dtype: torch.dtype) -> None:
    """Put in place the biases [E, N] that the files have in parts."""
    for leaf, parts in names.items():
        rows = torch.cat([tensor.t() for tensor in checkpoint.source.read(parts).values()])
        whole, = as_stored(site, rows)
        origin._parameters[leaf] = nn.Parameter(whole.t().contiguous().to(device=device, dtype=dtype),
                                                requires_grad=False)


def _place(site: ExpertsSite, leaf: str, shape: tuple[int, ...]) -> Place:
    name = f"{site.owner}.{leaf}"
    return Place(path=name, name=name, shape=(site.experts, *shape))
