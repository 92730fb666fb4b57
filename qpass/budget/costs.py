"""Search costs: a float model, samples and ways to round its weights in, what each costs in nats a token out.

Second order, around the float model: a change d of one site's output costs E[(g . d)^2] / 2, where g is the gradient of
the log-likelihood of tokens drawn from the model's own distribution (the Fisher information is the covariance of that
gradient, and the Hessian of the KL divergence). One backward pass a sample serves every site and every scheme: what is
needed is the product of the weight's gradient and each scheme's rounding error, summed over each row. Rows are taken
as independent, for their rounding errors are, and so are the roundings of tokens: the square of one sum over all of
them has the same mean and far more noise, which a search would fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qpass.budget.roundings import roundings_of
from qpass.calibrate.block_work import first_tensor
from qpass.calibrate.change_inputs import rounded
from qpass.calibrate.run import own_tensors
from qpass.calibrate.samples import Sample
from qpass.calibrate.watch_inputs import input_of
from qpass.capture.as_found import in_eval_mode
from qpass.decide.decision import Decision
from qpass.errors import CalibrationError
from qpass.recipes.algorithm_table import Algorithm
from qpass.site import Site
from qpass.spec import LinearSpec

Option = tuple[str, str]  # site name, scheme name


@dataclass(frozen=True)
class Costs:
    """(number of the group, scheme name) -> nats a token; and what could not be foreseen, or ""."""

    nats: Mapping[tuple[int, str], float]
    note: str


def costs(model: nn.Module, decisions: Mapping[str, Sequence[Decision]], groups: Sequence[Sequence[str]],
          samples: Sequence[Sample], seed: int, tell: Callable[[str], None],
          algorithms: Sequence[Algorithm] = ()) -> Costs:
    """What each scheme of `decisions` costs each of `groups`, rounded by the last of `algorithms` that rounds.

    Memory: the model in float32 and its gradients, and the rounding errors of every scheme in bfloat16.
    """
    with in_eval_mode(model), own_tensors(model), ExitStack() as undo:
        for parameter in model.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        sites = {d.site.name: d.site for of in decisions.values() for d in of}
        errors, hooked, factors = {}, {}, {}
        roundings = roundings_of(model, list(sites.values()), algorithms, samples, tell)
        for scheme, of in decisions.items():
            tell(f"rounding to {scheme}")
            for decision in of:
                assert decision.spec is not None
                weight = model.get_parameter(decision.site.name)
                key = (decision.site.name, scheme)
                rounded_weight, factors[key] = roundings.of(weight.detach(), decision.site, decision.spec)
                errors[key] = (rounded_weight - weight.detach()).bfloat16()
                if _rounds_inputs(decision):
                    hooked[key] = decision.spec
        for name in sites:
            model.get_parameter(name).requires_grad_(True)
        moved: dict[Option, float] = {}
        _watch_inputs(model, sites, hooked, moved, undo)
        found = _over_samples(model, sites, errors, factors, moved, groups, samples, seed, tell)
        for name in sites:
            model.get_parameter(name).grad = None
    return Costs(found, roundings.note)


def _over_samples(model: nn.Module, sites: Mapping[str, Site], errors: Mapping[Option, Tensor],
                  factors: Mapping[Option, float], moved: dict[Option, float], groups: Sequence[Sequence[str]],
                  samples: Sequence[Sample], seed: int, tell: Callable[[str], None]) -> dict[tuple[int, str], float]:
    schemes = list(dict.fromkeys(scheme for _, scheme in errors))
    tokens = 0
    draw = torch.Generator().manual_seed(seed)
    for number, sample in enumerate(samples):
        tell(f"sample {number + 1} of {len(samples)}")
        with torch.enable_grad():
            tokens += _backward(model, sample, draw)
        for name, site in sites.items():
            parameter = model.get_parameter(name)
            for scheme in schemes:
                if parameter.grad is not None and (name, scheme) in errors:
                    rows = (parameter.grad * errors[name, scheme]).sum(-2 if site.transposed else -1)
                    square = float(rows.square().sum()) * factors[name, scheme]
                    moved[name, scheme] = moved.get((name, scheme), 0.0) + square
            parameter.grad = None
    return {(index, scheme): sum(moved.get((name, scheme), 0.0) for name in group) / 2 / tokens
            for index, group in enumerate(groups) for scheme in schemes
            if all((name, scheme) in errors for name in group)}


def _backward(model: nn.Module, sample: Sample, draw: torch.Generator) -> int:
    """Gradients of the log-likelihood of drawn tokens, summed; returns how many tokens counted.

    A model without logits is taken as a unit Gaussian about its output, relative to the output's size.
    """
    output = first_tensor(model(*sample.args, **sample.kwargs))
    rows = output.reshape(-1, output.shape[-1])
    if sample.mask is not None and sample.mask.numel() == len(rows):
        rows = rows[sample.mask.reshape(-1).to(rows.device)]
    if not bool(torch.isfinite(rows.detach().sum())):
        raise CalibrationError("a sample gives NaN or Inf at the model's output; leave it out")
    if rows.shape[-1] == getattr(getattr(model, "config", None), "vocab_size", None):
        drawn = torch.multinomial(rows.detach().cpu().softmax(-1), 1, generator=draw).to(rows.device)
        score = rows.log_softmax(-1).gather(-1, drawn).sum()
    else:
        noise = torch.randn(rows.shape, generator=draw).to(rows)
        score = (rows / rows.detach().square().sum(-1, keepdim=True).sqrt().clamp_min(1e-20) * noise).sum()
    score.backward()
    return len(rows)


def _rounds_inputs(decision: Decision) -> bool:
    args = None if decision.spec is None else decision.spec.activation
    return args is not None and decision.site.swap == "module" and decision.site.kind == "linear" and (
        (args.type, args.bits, args.granularity) == ("int", 8, "per_token"))


def _watch_inputs(model: nn.Module, sites: Mapping[str, Site], specs: Mapping[Option, LinearSpec],
                  moved: dict[Option, float], undo: ExitStack) -> None:
    """Add (g . ((round(x) - x) W))^2 of each site and token to what its rounded weight moves."""
    by_site: dict[str, list[tuple[Option, LinearSpec]]] = {}
    for key, spec in specs.items():
        by_site.setdefault(key[0], []).append((key, spec))

    def watch(name: str, options: list[tuple[Option, LinearSpec]]) -> Callable[..., None]:
        parameter = model.get_parameter(name)

        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
            x = input_of(given, named).detach()

            def back(grad: Tensor) -> None:
                weight = parameter.detach().t() if sites[name].transposed else parameter.detach()
                reach = grad @ weight  # the gradient of the input through this site alone
                for key, spec in options:
                    assert spec.activation is not None
                    tokens = (reach * (rounded(x, spec.activation) - x)).sum(-1)
                    moved[key] = moved.get(key, 0.0) + float(tokens.square().sum())

            output.register_hook(back)

        return hook

    for name, options in by_site.items():
        owner = model.get_submodule(sites[name].owner)
        undo.callback(owner.register_forward_hook(watch(name, options), with_kwargs=True).remove)
