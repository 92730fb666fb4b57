"""Search roundings: a model's decisions, the recipe's algorithms and samples in; each weight's rounding error out.

The error is that of the rounding which the recipe will do: on the scales that its algorithm finds and, for GPTQ, as
much smaller in the output as spreading the errors makes it. GPTQ's whole error is a sum over columns of
(w - q)^2 / U_jj^2, where rounding to nearest has (w - q)^2 H_jj; both are known once H = X^T X is, before anything is
rounded (`gptq_math`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qpass.calibrate.block_work import counted_rows
from qpass.calibrate.gptq_math import energy_order, inverse_factor
from qpass.calibrate.hessian import Hessian
from qpass.calibrate.samples import Sample
from qpass.calibrate.scale_search import find_grid, round_to_grid
from qpass.calibrate.watch_inputs import watch_inputs
from qpass.errors import CalibrationError
from qpass.recipes.algorithm import Gptq, Scales
from qpass.recipes.algorithm_table import Algorithm
from qpass.site import Site
from qpass.spec import LinearSpec
from qpass.weight import dequantize_weight, quantize_weight

_ROWS_A_COLUMN = 2  # with fewer tokens an inverse Hessian promises more than GPTQ keeps


@dataclass(frozen=True, eq=False)
class _Columns:
    """What an error of each input channel costs [K] when rounded to nearest, and when GPTQ makes up for it."""

    alone: Tensor
    compensated: Tensor

    @property
    def factor(self) -> float:
        """Of errors as large in every column."""
        return min(1.0, float(self.compensated.sum()) / max(float(self.alone.sum()), 1e-30))


@dataclass(frozen=True, kw_only=True, eq=False)
class Roundings:
    """How the recipe's algorithms will round. `note`: what of it could not be foreseen, or "". Where an input was not
    seen, as in experts, GPTQ is taken to gain what it gains elsewhere."""

    algorithm: Gptq | Scales | None
    note: str = ""
    columns: dict[str, _Columns] = field(default_factory=dict)

    def of(self, weight: Tensor, site: Site, spec: LinearSpec) -> tuple[Tensor, float]:
        """`weight` (float32, as stored) as it will be multiplied with, rounded for itself, each expert on its own; and
        by how much what that costs will be smaller."""
        known = self.columns.get(site.name)
        if weight.ndim == 3:
            parts = [self._one(one, site, spec, known) for one in weight]
            return torch.stack([part for part, _ in parts]), sum(factor for _, factor in parts) / len(parts)
        return self._one(weight, site, spec, known)

    def _one(self, weight: Tensor, site: Site, spec: LinearSpec, known: _Columns | None) -> tuple[Tensor, float]:
        plain = (weight.t() if site.transposed else weight).contiguous()
        dtype = site.dtype if site.dtype.itemsize <= 4 else torch.float32
        if self.algorithm is None or spec.weight.type != "int" or (
                spec.weight.granularity not in ("per_tensor", "per_channel", "per_group")):
            found = quantize_weight(plain, spec, dtype)
        else:
            method = self.algorithm.scales if isinstance(self.algorithm, Gptq) else self.algorithm.method
            importance = None if known is None else known.compensated / known.compensated.mean()
            grid = find_grid(plain, spec, method, dtype, importance, compensated=known is not None)
            found = round_to_grid(plain, grid, spec, dtype)
        rounded = dequantize_weight(found, spec)
        factor = sum(one.factor for one in self.columns.values()) / len(self.columns) if self.columns else 1.0
        if known is not None:
            square = (rounded - plain).square_().sum(0)
            factor = min(1.0, float(square @ known.compensated) / max(float(square @ known.alone), 1e-30))
        return rounded.t() if site.transposed else rounded, factor


def roundings_of(model: nn.Module, sites: Sequence[Site], algorithms: Sequence[Algorithm], samples: Sequence[Sample],
                 tell: Callable[[str], None]) -> Roundings:
    """What the last of `algorithms` that rounds will do to `sites` of `model`, which is float32 and stays as it is.

    For GPTQ one run over the samples; memory: X^T X of every input.
    """
    last = next((a for a in reversed(algorithms) if isinstance(a, (Gptq, Scales))), None)
    if not isinstance(last, Gptq):
        return Roundings(algorithm=last)
    first: dict[object, Site] = {}
    for site in sites:
        first.setdefault(_input(site), site)
    hessians = {site.name: Hessian(site.in_features) for site in first.values()}
    _observe(model, list(first.values()), hessians, samples, tell)
    few = [s.name for s in first.values() if 0 < hessians[s.name].rows < _ROWS_A_COLUMN * s.in_features]
    if few:
        return Roundings(algorithm=last, note=f"{few[0]} saw {hessians[few[0]].rows} tokens, too few to tell by how "
                                              "much gptq lowers its error; costs are those of rounding to nearest")
    found: dict[object, _Columns] = {}
    for key, site in first.items():
        seen = hessians.pop(site.name)
        if not seen.rows:
            continue
        hessian = seen.value
        order = energy_order(hessian, last.actorder)
        try:
            factor = inverse_factor(hessian, order, last.dampening_frac)
        except ValueError as error:
            raise CalibrationError(f"{site.name}: {error}; leave out the samples with extreme values") from error
        compensated = torch.empty(len(hessian), device=hessian.device)
        compensated[order] = factor.upper.diagonal().pow(-2)
        found[key] = _Columns(hessian.diagonal().clone(), compensated)
    columns = {site.name: found[_input(site)] for site in sites if _input(site) in found}
    return Roundings(algorithm=last, columns=columns)


def _input(site: Site) -> object:
    """What sites have in common that read one tensor."""
    return site.name if site.shared_input is None or len(site.shape) != 2 else site.shared_input


def _observe(model: nn.Module, sites: Sequence[Site], hessians: dict[str, Hessian], samples: Sequence[Sample],
             tell: Callable[[str], None]) -> None:
    mask: list[Tensor | None] = [None]

    def add(name: str, x: Tensor) -> None:
        hessians[name].add(counted_rows(x, mask[0]))

    flat = [site for site in sites if len(site.shape) == 2]
    modules = {site.name: model.get_submodule(site.owner) for site in flat if site.swap == "module"}
    parameters = {site.name: model.get_parameter(site.name) for site in flat if site.swap != "module"}
    with torch.no_grad(), watch_inputs(modules, parameters, add):
        for number, sample in enumerate(samples):
            tell(f"inputs, sample {number + 1} of {len(samples)}")
            mask[0] = sample.mask
            model(*sample.args, **sample.kwargs)
