"""Site: one place in the graph where a parameter meets an activation, and what the graph says about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from qpass.experts_site import ExpertsSite

Kind = Literal["linear", "experts", "embedding"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """Facts of one parameter, found once, used by the planner, the swap, smoothing, merging and calibration.

    name           qualified name of the parameter, `model.layers.0.mlp.down_proj.weight`
    shape, dtype   of the parameter as the model stores it
    transposed     True if stored [K, N] (GPT-2's Conv1D, `x @ w`), False if stored [N, K]
    owner          path of the module that holds the parameter ("" is the model itself)
    owner_class    that module's class name
    owner_bases    names of the module classes that it derives from, nearest first
    bias           qualified name of the bias parameter that the product adds, if one does
    swap           "module": the owner's forward is the product and nothing else, replace the owner;
                   "parameter": the product stands in a bigger forward, replace the parameter by one that intercepts it;
                   None: it cannot be swapped, and `refusal` is the sentence that says why and what to do
    uses           how many products in the graph read the parameter; 0 if the example inputs never reached it;
                   1 where no graph could be had
    aliases        other names of the same parameter (tied weights)
    shared_input   sites with the same number read one and the same tensor; None if the site has its input alone
    produced_by    what computes the input: `model.layers.0.input_layernorm (LlamaRMSNorm)`, or the op if no module
    consumers      what reads the output, nearest first
    experts        how the owner computes its experts, if this is a weight of experts that was understood
    role           "router" if the largest entries of the result pick what is computed next, as experts are picked
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False
    owner: str
    owner_class: str
    bias: str | None = None
    swap: Literal["module", "parameter"] | None = "module"
    refusal: str | None = None
    uses: int = 1
    aliases: tuple[str, ...] = ()
    shared_input: int | None = None
    produced_by: str | None = None
    consumers: tuple[str, ...] = ()
    role: Literal["router"] | None = None
    owner_bases: tuple[str, ...] = ()
    experts: ExpertsSite | None = None

    @property
    def out_features(self) -> int:
        """N of the product, per expert if there are several."""
        return self.shape[-1] if self.transposed else self.shape[-2]

    @property
    def in_features(self) -> int:
        """K of the product."""
        return self.shape[-2] if self.transposed else self.shape[-1]

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


def base_names(owner: nn.Module | None) -> tuple[str, ...]:
    """Names of the module classes that `owner`'s class derives from, nearest first; nn.Module itself says nothing."""
    return tuple(base.__name__ for base in type(owner).__mro__[1:]
                 if issubclass(base, nn.Module) and base is not nn.Module)
