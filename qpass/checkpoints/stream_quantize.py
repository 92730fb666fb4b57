"""Stream quantize: a model on the meta device and a plan in; weights handed over one at a time become packed layers.

For loaders that read a float checkpoint tensor by tensor: each weight is rounded and packed as soon as it is whole, and
the float is let go. Until `finish` the model holds the modules that it was built with, so that what a loader does to
parameters and buffers meanwhile (ties, biases that come later, buffers made anew) happens to float modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from qpass.errors import CheckpointError
from qpass.kernels.registry import LinearCall, choose, kernel
from qpass.layers.experts_layer import QuantExperts
from qpass.layers.packed_layers import PackedLayer, QuantLinear
from qpass.layers.quant_weight import QuantWeight
from qpass.plan_model import Decision, Plan
from qpass.swap.module_places import put_everywhere
from qpass.swap.round_weight import known_finite
from qpass.swap.shared_scales import SharedScales
from qpass.swap.swap_experts import swap_experts
from qpass.swap.swap_site import TRIM_AFTER, give_back_freed_memory, swap_site
from qpass.weight import check_weight


class StreamQuantizer:
    """Takes the weights that `plan` quantizes, in any order; the others are the loader's to set.

    Tied weights wait for `finish`, when the loader has tied them. Peak memory beyond the packed model is the largest
    weight; of experts, the weights of one module; of layers that share a scale for the tensor, their weights.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self._targets = [d for d in plan.decisions if d.status == "quantize" and d.site.kind != "embedding"]
        self._waiting = {d.site.name: d for d in self._targets if not d.site.aliases}
        self._hidden: list[tuple[Decision, nn.Module, PackedLayer]] = []
        self._shared = SharedScales(model, plan.decisions)
        self._freed = 0
        self._ready = False

    def wants(self, name: str) -> bool:
        """Whether the parameter of this name is to be handed over to `take`."""
        return name in self._waiting

    def take(self, name: str, weight: Tensor) -> None:
        """Quantize the parameter `name`, which is `weight`, on the device where that is. Raises WeightError."""
        decision = self._waiting.pop(name)
        owner, leaf = self.model.get_submodule(decision.site.owner), name.rpartition(".")[2]
        owner._parameters[leaf] = nn.Parameter(weight.detach(), requires_grad=False)
        if decision.site.experts is None:
            group = self._shared.groups.get(name, (decision,))
            if not any(other.site.name in self._waiting for other in group):
                for other in group:
                    self._hide(other, self.model.get_submodule(other.site.owner), self._swap(other))
        elif not any(leaf.is_meta for leaf in self._parameters_of(decision)):
            self._hide(decision, owner, self._swap(decision))
        self._freed += weight.nbytes
        if self._freed >= TRIM_AFTER:
            give_back_freed_memory()
            self._freed = 0

    def finish(self) -> None:
        """Put every packed layer in its place, and quantize what was not handed over but is there now."""
        for decision, owner, packed in self._hidden:
            _put(self.model, decision, owner, packed)
        self._hidden = []
        for decision in self._targets:
            _check_tied(self.model, decision)
            if not isinstance(self.model.get_submodule(decision.site.owner), PackedLayer) and not self._is_packed(
                    decision):
                self._swap(decision)
        give_back_freed_memory()

    def _is_packed(self, decision: Decision) -> bool:
        owner = self.model.get_submodule(decision.site.owner)
        return isinstance(owner._modules.get(decision.site.name.rpartition(".")[2]), PackedLayer)

    def _parameters_of(self, decision: Decision) -> Sequence[Tensor]:
        assert decision.site.experts is not None
        found = self.model.get_submodule(decision.site.owner)._parameters
        return [parameter for leaf in decision.site.experts.parameters if (parameter := found[leaf]) is not None]

    def _swap(self, decision: Decision) -> PackedLayer:
        self._prepare()
        site = decision.site
        if site.experts is not None:
            together = [d for d in self.plan.decisions if d.site.experts == site.experts]
            for other in together:
                check_weight(self.model.get_parameter(other.site.name), other.site.name)
            return swap_experts(self.model, together)
        weight = self.model.get_parameter(site.name)
        decision = _here(decision, weight)
        assert decision.spec is not None
        check_weight(weight, site.name, allow_nonfinite=known_finite(weight, decision.spec))
        return swap_site(self.model, decision, largest=self._shared.largest(decision))

    def _prepare(self) -> None:
        """Build what the kernels need once on this machine, before the first weight is read."""
        names = {d.spec.kernel for d in self._targets if d.spec is not None} if not self._ready else set()
        for prepare in {made.prepare for made in map(kernel, names) if made.prepare is not None}:
            prepare()
        self._ready = True

    def _hide(self, decision: Decision, owner: nn.Module, packed: PackedLayer) -> None:
        """Put the module back that stood there, its weight on the meta device."""
        if isinstance(packed, QuantWeight):
            leaf = decision.site.name.rpartition(".")[2]
            del owner._modules[leaf]
            owner._parameters[leaf] = _emptied(decision)
        else:
            put_everywhere(self.model, packed, owner)
            for leaf, parameter in owner._parameters.items():
                if parameter is not None and parameter.is_meta:
                    owner._parameters[leaf] = _marked(parameter)
        self._hidden.append((decision, owner, packed))


def _check_tied(model: nn.Module, decision: Decision) -> None:
    """Raise CheckpointError if the plan took two parameters for one, and what was loaded holds them apart."""
    names = (decision.site.name, *decision.site.aliases)
    found = [model.get_submodule(path)._parameters.get(leaf) for path, _, leaf in (n.rpartition(".") for n in names)]
    if len(found) > 1 and any(parameter is not found[0] for parameter in found):
        raise CheckpointError(f"the model ties {' and '.join(names)}, and the checkpoint holds different numbers for "
                              "them; load the float model and call qpass.quantize, which plans for two weights")


def _here(decision: Decision, weight: Tensor) -> Decision:
    """The decision with a kernel of the device on which the weight came to lie."""
    assert decision.spec is not None
    call = LinearCall(spec=decision.spec, device=weight.device, dtype=weight.dtype)
    if kernel(decision.spec.kernel).why_not(call) is None:
        return decision
    return replace(decision, spec=decision.spec.on(choose(call, where=decision.site.name, prepare=True).kernel.name))


def _put(model: nn.Module, decision: Decision, owner: nn.Module, packed: PackedLayer) -> None:
    if isinstance(packed, QuantWeight):
        leaf = decision.site.name.rpartition(".")[2]
        owner._modules[leaf] = packed
        del owner._parameters[leaf]
        return
    put_everywhere(model, owner, packed)
    if isinstance(packed, QuantLinear) and packed.origin.bias is not None:
        packed._parameters["bias"] = owner._parameters[packed.origin.bias]
    elif isinstance(packed, QuantExperts):
        packed.renew()


def _emptied(decision: Decision) -> nn.Parameter:
    site = decision.site
    return _marked(nn.Parameter(torch.empty(site.shape, dtype=site.dtype, device="meta"), requires_grad=False))


def _marked(parameter: nn.Parameter) -> nn.Parameter:
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # Transformers draws no numbers for it then
    return parameter
