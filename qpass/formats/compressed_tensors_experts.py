"""compressed-tensors experts: a module of packed experts in, the targets by which a config names its layers out.

A checkpoint has one linear layer an expert and a projection, so a target is a regex over their names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qpass.formats.compressed_tensors_floats import FLOAT_FORMATS
from qpass.layers.experts_disk import FUSED, projections
from qpass.layers.experts_layer import QuantExperts
from qpass.scheme import codec_of
from qpass.spec import LinearSpec


@dataclass(frozen=True, kw_only=True)
class Member:
    """What one config group quantizes: a layer, or a regex for layers of experts; `linear` if others see nn.Linear.

    `leaf` is the parameter that the layers of experts are in the model.
    """

    target: str
    spec: LinearSpec
    linear: bool
    leaf: str = ""


def members_of_experts(name: str, module: QuantExperts) -> Iterator[Member]:
    """What of the experts at path `name` is quantized, one Member a block and a weight."""
    for block in module.blocks:
        for which, part in enumerate(block.spec.parts):
            if part is not None:
                linear = codec_of(part.weight) is None or (
                    part.weight.type in FLOAT_FORMATS and projections(module.site, which, part) != (FUSED,))
                yield Member(target=_regex(name, module, block.experts, which, part), spec=part, linear=linear,
                             leaf=module.site.second if which else module.site.first[0])


def float_experts(name: str, module: QuantExperts) -> list[str]:
    """Targets of what stays float in a module that is quantized in part."""
    return [_regex(name, module, block.experts, which, None) for block in module.blocks
            for which, part in enumerate(block.spec.parts) if part is None]


def _regex(name: str, module: QuantExperts, experts: Sequence[int], which: int, part: LinearSpec | None) -> str:
    number = r"\d+" if len(experts) == module.site.experts else f"(?:{'|'.join(map(str, experts))})"
    return rf"re:^{re.escape(name)}\.{number}\.(?:{'|'.join(projections(module.site, which, part))})$"
