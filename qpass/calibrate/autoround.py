"""AutoRound wiring: a block's rounding and scales moved by signed gradients until its output is the float block's."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qpass.calibrate.block_work import BlockWork, SiteWork, first_tensor
from qpass.calibrate.change_inputs import rounding_hook
from qpass.calibrate.rounding_math import LearnedRounding
from qpass.calibrate.scale_search import Grid, canonical_of, find_grid, grid_ends
from qpass.recipes.algorithm import AutoRound


def calibrate(settings: AutoRound, work: BlockWork) -> None:
    """Settle the block's sites together; those that an algorithm before has settled start from its integers."""
    sites = [site for site in work.chosen(settings) if site.on_grid]
    if not sites or not len(work.calls):
        return
    step = settings.step_size or 1 / settings.iterations
    learned = {site.name: _start(site, settings.scales) for site in sites}
    draw = torch.Generator().manual_seed(work.seed)
    names = _names_in(work.module, sites)
    with ExitStack() as rounding, torch.enable_grad():
        for site in work.sites.values():
            hook = rounding_hook(site, straight_through=True)
            if hook is not None:
                rounding.callback(site.owner.register_forward_pre_hook(hook, with_kwargs=True).remove)
        start, best = _whole_loss(work, learned, names), torch.inf
        for iteration in range(settings.iterations):
            picked = torch.randperm(len(work.calls), generator=draw)[:settings.batch_size].tolist()
            total = 0.0
            weights = {name: learned[name]() for name in learned}
            held = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
            stored = _stored(work, held, names)
            for number in picked:
                loss = _loss(work, number, stored) / len(picked)
                loss.backward()
                total += float(loss.detach())
            torch.autograd.backward([weights[name] for name in weights], [_grad(held[name]) for name in weights])
            if total < best:
                best = total
                for one in learned.values():
                    one.keep()
            left = 1 - iteration / settings.iterations
            for name, one in learned.items():
                # Scales that are integers times one of the row stay so.
                free = work.sites[name].spec.weight.scales != "integer"
                one.step(step * left, step * left * settings.scale_step if free else 0.0)
            work.tell(f"iteration {iteration + 1} of {settings.iterations}, loss {total:.3g}")
        for one in learned.values():
            one.go_back()
        end = _whole_loss(work, learned, names)
        if not end < start:
            work.notes.append(f"autoround: {work.block.path} did not get better (loss {start:.3g}, then {end:.3g}); "
                              "left where it started")
            for one in learned.values():
                one.reset()
    for site in sites:
        codes, grid = learned[site.name].result()
        site.settle(canonical_of(codes, grid, site.scale_dtype))


def _start(site: SiteWork, method: str) -> LearnedRounding:
    weight, ends, dtype = site.exact.float(), grid_ends(site.spec), site.scale_dtype
    if site.canonical is None:
        return LearnedRounding(weight, find_grid(weight, site.spec, method, dtype), ends, dtype)
    zero = site.canonical.zero_point
    grid = Grid(site.canonical.scale.float(), None if zero is None else zero.float())
    return LearnedRounding(weight, grid, ends, dtype, site.canonical.qweight)


def _names_in(module: nn.Module, sites: list[SiteWork]) -> dict[str, str]:
    """Site name -> the parameter's name within the block."""
    by_identity = {id(parameter): name for name, parameter in module.named_parameters()}
    return {site.name: by_identity[id(site.parameter)] for site in sites}


def _stored(work: BlockWork, weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights [N, K] by site as the block's parameters, by the name within it."""
    return {names[name]: weight.t() if work.sites[name].site.transposed else weight
            for name, weight in weights.items()}


def _whole_loss(work: BlockWork, learned: Mapping[str, LearnedRounding], names: Mapping[str, str]) -> float:
    """The loss over all samples, of the rounding as it is."""
    with torch.no_grad():
        weights = _stored(work, {name: one() for name, one in learned.items()}, names)
        return sum(float(_loss(work, number, weights)) for number in range(len(work.calls))) / len(work.calls)


def _grad(value: Tensor) -> Tensor:
    return torch.zeros_like(value) if value.grad is None else value.grad


def _loss(work: BlockWork, number: int, weights: Mapping[str, Tensor]) -> Tensor:
    """Mean squared distance of one sample's output from the float block's, masked tokens left out, over its size."""
    assert work.targets is not None
    args, kwargs = work.calls[number]
    got: Any = first_tensor(functional_call(work.module, dict(weights), args, kwargs))
    want = first_tensor(work.targets[number])
    error, size = (got - want).square().mean(-1), want.square().mean(-1)
    mask = work.masks[number]
    if mask is not None and mask.numel() == error.numel():
        counted = mask.reshape(error.shape).to(error.device)
        error, size = error[counted], size[counted]
    loss: Tensor = error.mean() / size.mean().clamp_min(1e-20)
    return loss
