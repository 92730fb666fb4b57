"""Correction mathematics: a real change is found whole, noise is not, and halves that disagree give nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.calibrate.correction_math import Halves, confirmed_changes

_SIZE = 24


def halves(x: Tensor, *missing: Tensor) -> tuple[Halves, list[Halves]]:
    """H of both halves of `x` [T, K], and C for each of `missing` [T, N]."""
    parts = x.chunk(2)
    products = []
    for e in missing:
        a, b = e.chunk(2)
        products.append((a.t() @ parts[0], b.t() @ parts[1]))
    return (parts[0].t() @ parts[0], parts[1].t() @ parts[1]), products


def test_a_linear_difference_is_made_up_for() -> None:
    torch.manual_seed(0)
    x, change = torch.randn(4000, _SIZE) * torch.rand(_SIZE), torch.randn(10, _SIZE)
    hessians, products = halves(x, x @ change.t())
    found, = confirmed_changes(hessians, products)
    left = (x @ (change - found).t()).square().mean() / (x @ change.t()).square().mean()
    assert float(left) < 0.01


def test_noise_is_left_alone_and_each_weight_is_judged_for_itself() -> None:
    torch.manual_seed(0)
    x, change, e = torch.randn(100, _SIZE), torch.randn(10, _SIZE), torch.randn(100, 10) * 3
    hessians, products = halves(x, e, x @ change.t())
    noise, real = confirmed_changes(hessians, products)
    plain = torch.linalg.lstsq(x, e).solution.t()
    assert float(noise.norm()) < 0.3 * float(plain.norm())
    torch.testing.assert_close(real, change, rtol=0.1, atol=0.1)


def test_halves_that_contradict_each_other_or_cannot_be_solved_give_zeros() -> None:
    torch.manual_seed(0)
    half, change = torch.randn(50, _SIZE), torch.randn(4, _SIZE)
    e = half @ change.t()
    hessians, products = halves(torch.cat([half, half]), torch.cat([e, -e]))
    assert not confirmed_changes(hessians, products)[0].any()
    broken = torch.full((_SIZE, _SIZE), torch.nan)
    assert not confirmed_changes((broken, broken), products)[0].any()
