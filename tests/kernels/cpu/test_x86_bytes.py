"""Rows of many kinds times 8-bit weights: what does not fit 16 bits is exact too, alone and beside other rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qpass.kernels.dispatch  # noqa: F401
from qpass.kernels import isa
from qpass.kernels.cpu import native, x86
from qpass.kernels.registry import kernel
from qpass.scheme import ActivationArgs, WeightArgs
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight

pytestmark = pytest.mark.skipif(native.refuses() is not None, reason=native.refuses() or "")
HERE = [short for short, (name, _) in x86.ISAS.items() if name in isa.machine_has()]
SHAPES = ((2, 64, None), (3, 33, None), (5, 1100, None), (9, 192, 96), (13, 384, 128), (18, 96, 32), (33, 2111, None))


def normal(m: int, k: int, spread: float) -> Tensor:
    return (torch.randn(m, k) * spread).round().clamp(-127, 127)


def rows(kind: str, m: int, k: int) -> Tensor:
    few = torch.rand(m, k) < 0.05
    bounds = torch.tensor([64, 65, 63, -64, -65, 1, -1, 127, -128, 0])  # pairs that come to 128 and 129, and not
    return {
        "normal": normal(m, k, 36),
        "narrow": normal(m, k, 8),
        "each its own": normal(m, k, 1) * torch.tensor([1.0, 5, 10, 20, 30]).repeat(m)[:m, None],
        "uniform": torch.randint(-128, 128, (m, k)).float(),
        "spikes": torch.where(few, bounds[torch.randint(9, (m, k))].float(), normal(m, k, 10)),
        "bounds": bounds[torch.randint(10, (m, k))].float(),
        "one uniform row": torch.cat([torch.randint(-128, 128, (1, k)).float(), normal(m - 1, k, 9)]),
        "alternating": torch.where(torch.arange(k) % 2 == 0, 127.0, -128.0).expand(m, k),
        **{str(code): torch.full((m, k), float(code)) for code in (127, -127, -128, 64, 32, 31, -32, 16, 15)},
    }[kind].clamp(-128, 127).to(torch.int8)


def weights(kind: str, n: int, k: int) -> Tensor:
    one_column = normal(n, k, 36)
    one_column[:, k // 2] = -128
    return {
        "normal": normal(n, k, 36),
        "one dense column": one_column,
        "alternating": torch.where((torch.arange(n)[:, None] + torch.arange(k)) % 2 == 0, 127.0, -128.0),
        "127": torch.full((n, k), 127.0),
        "-128": torch.full((n, k), -128.0),
    }[kind].to(torch.int8)


WEIGHTS = ("normal", "one dense column", "alternating", "127", "-128")
KINDS = ("normal", "narrow", "each its own", "uniform", "spikes", "bounds", "one uniform row", "alternating", "127",
         "-127", "-128", "64", "32", "31", "-32", "16", "15")


@pytest.mark.parametrize("short", HERE)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_exact_whatever_their_codes(kind: str, short: str) -> None:
    found = kernel(f"linear_w8a8_{short}")
    for i, (m, k, group) in enumerate((*SHAPES, *SHAPES)):
        filled = WEIGHTS[(i + KINDS.index(kind)) % len(WEIGHTS)]
        asym, n = i % 2 == 1, (16, 40, 50)[i % 3]
        groups = k // group if group else 1
        granularity = "per_group" if group else "per_channel"
        weight = WeightArgs(bits=8, granularity=granularity, group_size=group, symmetric=not asym)
        spec = LinearSpec(family="w8a8", activation=ActivationArgs(), out_features=n, in_features=k, kernel=found.name,
                          weight=weight)
        q, x, scale = weights(filled, n, k), rows(kind, m, k), torch.rand(n, groups) + 0.5
        zero_point = torch.randint(-128, 128, (n, groups), dtype=torch.int8) if asym else torch.zeros(n, groups)
        tensors = {"qweight": q, "scale": scale, **({"zero_point": zero_point} if asym else {})}
        packed = found.layout.pack(CanonicalWeight(tensors), spec)
        given = [packed[name] for name in found.layout.names(spec)]
        x_scale = torch.rand(m, 1) + 0.5

        parts = [(x, x_scale), *zip(x.split(1), x_scale.split(1), strict=True)]
        y, *single = [found.forms["linear_q"](*part, None, given, None, spec, torch.float32) for part in parts]
        assert torch.equal(y, torch.cat(single))
        each = torch.einsum("mgk,ngk->mng", x.double().view(m, groups, -1),
                            q.double().view(n, groups, -1) - zero_point.double()[..., None]) * scale.double()
        error = (y.double() - each.sum(-1) * x_scale.double()).abs()
        assert (error <= 1e-6 * each.abs().sum(-1) * x_scale.double()).all(), (filled, m, k)
