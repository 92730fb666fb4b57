"""Shared scales: the decisions of a plan in; how large the weights are that take one scale together, out.

Weights with one input (q, k and v; gate and up) are put below each other by runtimes that then have one such scale for
all of them: vLLM takes one of several and says that accuracy may suffer, LLM Compressor gives them the same.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qpass.plan_model import Decision
from qpass.scheme import RowCodec, codec_of


def together(decisions: Iterable[Decision]) -> dict[str, tuple[Decision, ...]]:
    """Parameter -> all decisions whose weights share a scale with it; none for a weight that has its scale alone."""
    groups: dict[object, list[Decision]] = {}
    for decision in decisions:
        site, spec = decision.site, decision.spec
        if decision.status != "quantize" or spec is None or site.experts or site.aliases or site.shared_input is None:
            continue
        codec = codec_of(spec.weight)
        if isinstance(codec, RowCodec) and codec.one_scale:
            groups.setdefault((site.shared_input, spec.weight), []).append(decision)
    return {decision.site.name: tuple(group) for group in groups.values() if len(group) > 1 for decision in group}


def magnitude(weight: Tensor) -> Tensor:
    """The largest magnitude in a weight, float32 [], in which NaN and Inf count as 0."""
    found = torch.stack(weight.aminmax()).abs().amax().float()
    return found if found.isfinite() else weight.nan_to_num(0.0, 0.0, 0.0).abs().amax().float()


class SharedScales:
    """Asked for each weight before it is swapped: the first of a group is asked while all are float."""

    def __init__(self, model: nn.Module, decisions: Iterable[Decision]) -> None:
        self._model = model
        self.groups = together(decisions)
        self._known: dict[str, Tensor] = {}

    def largest(self, decision: Decision) -> Tensor | None:
        """The largest magnitude, float32 [], in the weights that share with this one; None if it shares with none."""
        group = self.groups.get(decision.site.name)
        if group is None:
            return None
        name = group[0].site.name
        if name not in self._known:
            weights = [self._model.get_submodule(d.site.owner)._parameters.get(d.site.name.rpartition(".")[2])
                       for d in group]
            there = [magnitude(w.detach()) for w in weights if w is not None and not w.is_meta]
            self._known[name] = torch.stack([value.to(there[0].device) for value in there]).amax()
        return self._known[name]
