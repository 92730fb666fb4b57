"""Expert matrices: a module of packed experts in; each expert's projections, as writers of linear layers want them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qpass.formats.compressed_tensors import describe_weight
from qpass.layers.experts_disk import projections
from qpass.layers.experts_layer import QuantExperts
from qpass.layers.weight_rows import cut_rows, cut_spec
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight


@dataclass(frozen=True, kw_only=True)
class ExpertMatrix:
    """One projection of one expert. It has what a writer asks of a QuantLinear: its spec, its numbers, their dtypes."""

    module: QuantExperts
    which: int
    expert: int
    at: int
    parts: int
    spec: LinearSpec

    def canonical(self) -> CanonicalWeight:
        """Its numbers, [N, K] of one projection."""
        block = next(b for b in self.module.blocks if self.expert in b.experts)
        weight = self.module._weight(block, block.experts.index(self.expert), self.which)
        assert isinstance(weight, CanonicalWeight)
        return weight if self.parts == 1 else cut_rows(weight, self.spec, self.parts)[self.at]

    @property
    def on_disk(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """As QuantLinear's: what compressed-tensors would have of it."""
        return describe_weight(self.canonical(), self.spec)


def expert_matrices(path: str, module: QuantExperts) -> Iterator[tuple[str, ExpertMatrix | None]]:
    """`<path>.3.up_proj` and what it is, for each projection of each expert; None where it is not integers of its own:
    in float, or gate and up in blocks that lie in both."""
    for which in (0, 1):
        for block in module.blocks:
            part = block.spec.parts[which]
            names = projections(module.site, which, part)
            spec = None if part is None else cut_spec(part, len(names)) if len(names) > 1 else part
            for expert in block.experts:
                for at, name in enumerate(names):
                    matrix = None if spec is None else ExpertMatrix(
                        module=module, which=which, expert=expert, at=at, parts=len(names), spec=spec)
                    yield f"{path}.{expert}.{name}", matrix
