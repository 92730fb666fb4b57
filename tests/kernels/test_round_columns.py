"""Rounding of columns: in reference and native code, each step against its formula in float64; and both agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qpass.kernels import round_columns as dispatch
from qpass.kernels.cpu import x86_columns
from qpass.kernels.reference import round_columns as reference

ENDS = (-8, 7)
WAYS: dict[str, Any] = {"reference": reference, "native": x86_columns}
SIZES = [(1, 1), (5, 7), (64, 100), (33, 32), (48, 257)]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Any:
    if request.param == "native" and (why := x86_columns.refuses(torch.ones(1, 1))) is not None:
        pytest.skip(why)
    return WAYS[request.param]


def before(factors: Tensor, left: Tensor) -> Tensor:
    """What each column takes of those before it, float64 [B, N]."""
    return factors.double().tril(-1) @ left.double()


def nearest(exact: Tensor, q: Tensor) -> bool:
    """Whether q is what `exact` rounds to within ENDS, up to the rounding of float32."""
    return bool(((exact.clamp(*ENDS) - q).abs() <= 0.5 + 1e-4).all()) and torch.equal(q, q.round().clamp(*ENDS))


@pytest.mark.parametrize("zeros", [True, False], ids=["zero points", "symmetric"])
@pytest.mark.parametrize(("count", "n"), SIZES)
def test_each_column_is_rounded_with_the_errors_of_those_before(way: Any, count: int, n: int, zeros: bool) -> None:
    torch.manual_seed(count)
    w, scale, within = torch.randn(count, n), torch.rand(count, n) * 0.2 + 0.1, torch.randn(count, count) * 0.2
    scale[:, ::3] *= -1
    zero = torch.randint(-8, 8, (count, n)).float() if zeros else None
    z = 0 if zero is None else zero
    codes, errors = way.round_columns(w.clone(), scale, zero, within, ENDS)
    exact = w.double() - before(within, errors)
    assert nearest(exact / scale + z, codes)
    assert torch.allclose(errors.double(), exact - (codes - z) * scale.double(), atol=1e-4)
    again = dispatch.round_columns(w.clone(), scale, zero, within, ENDS)[0]
    assert float((again == codes).float().mean()) > 0.99


@pytest.mark.parametrize(("count", "n"), SIZES)
def test_each_code_moves_with_the_steps_of_those_before(way: Any, count: int, n: int) -> None:
    torch.manual_seed(count)
    slope, scale, inside = torch.randn(count, n), torch.rand(count, n) * 0.2 + 0.1, torch.randn(count, count) * 0.1
    codes, rates = torch.randint(-8, 8, (count, n)).float(), -torch.rand(count)
    rates[0] = 0  # a column that stays
    moved, steps = way.descend_columns(slope.clone(), codes, scale, inside, rates, ENDS)
    exact = codes + rates[:, None].double() * (slope.double() + before(inside, steps)) / scale
    assert nearest(exact, moved) and torch.equal(moved[0], codes[0])
    assert torch.allclose(steps, (moved - codes) * scale)
    again = dispatch.descend_columns(slope.clone(), codes, scale, inside, rates, ENDS)[0]
    assert float((again == moved).float().mean()) > 0.99


def test_columns_do_not_depend_on_the_number_of_threads() -> None:
    given = (torch.randn(64, 300), torch.rand(64, 300) + 0.1, None, torch.randn(64, 64) * 0.1, ENDS)

    def found(call: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return call(given[0].clone(), *given[1:])

    whole, threads = found(dispatch.round_columns), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(torch.equal(one, other) for one, other in zip(found(dispatch.round_columns), whole, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_what_is_refused_runs_on_the_reference_and_wrong_sizes_are_errors() -> None:
    given = [torch.randn(4, 6).double(), torch.rand(4, 6).double() + 0.1, None, torch.zeros(4, 4).double()]
    assert "float64" in (x86_columns.refuses(torch.ones(2, 2, dtype=torch.float64)) or "")
    assert dispatch.round_columns(*given, ENDS)[0].dtype == torch.float64  # type: ignore[arg-type]
    if x86_columns.refuses(torch.ones(1, 1)) is None:
        with pytest.raises(ValueError, match="do not fit"):
            x86_columns.round_columns(torch.randn(4, 6), torch.rand(4, 5), None, torch.zeros(4, 4), ENDS)
