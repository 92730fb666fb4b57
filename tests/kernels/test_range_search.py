"""Range search: the reference against every range in float64, and the native code against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qpass.integer_scales import BIAS_WEIGHT
from qpass.kernels.cpu import native, x86_ranges
from qpass.kernels.range_search import search_ranges
from qpass.kernels.reference.range_search import RangeSearch
from qpass.kernels.reference.range_search import search_ranges as reference

KINDS = {f"{'asym' if not symmetric else 'signed' if signed else 'positive'}{', compensated' if compensated else ''}":
         (symmetric, signed, compensated) for symmetric, signed in ((True, True), (True, False), (False, False))
         for compensated in (False, True)}


def errors(w: Tensor, importance: Tensor | None, search: RangeSearch, scale: Tensor, zero: Tensor | None) -> Tensor:
    """[N, G] in float64: what a search makes small."""
    near, w, s = (w / scale.unsqueeze(-1)).round(), w.double(), scale.double().unsqueeze(-1)
    z = torch.zeros_like(s) if zero is None else zero.double().unsqueeze(-1)
    weights = torch.ones_like(w) if importance is None else importance.double().expand_as(w)
    e = ((near + z).clamp(*search.ends) - z) * s - w
    squares = (e * e * weights).sum(-1)
    if search.compensated:
        return squares
    energy = (w * w * weights).sum(-1).clamp_min(1e-30)
    return squares + BIAS_WEIGHT * (e * w * weights).sum(-1).square() / energy


def groups_of(n: int, groups: int, size: int) -> Tensor:
    """Ordinary rows, then zeros, one outlier, one sign, tiny and huge ones, and equal magnitudes."""
    w = torch.randn(n, groups, size) * torch.rand(n, groups, 1)
    w[0], w[1, :, 0], w[2] = 0, 30, w[2].abs() + 0.1
    w[3], w[4] = w[3] * 1e-6, w[4] * 1e4
    w[5] = torch.where(w[5] > 0, 0.25, -0.25)
    return w


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "size", "dtype"), [(4, 64, torch.bfloat16), (3, 20, torch.float16),
                                                     (8, 7, torch.float32)])
def test_native_choices_are_as_good_as_the_references(kind: str, bits: int, size: int, dtype: torch.dtype) -> None:
    symmetric, signed, compensated = KINDS[kind]
    torch.manual_seed(bits)
    search = RangeSearch(bits=bits, symmetric=symmetric, signed=signed, compensated=compensated, dtype=dtype)
    w = groups_of(37, 3, size)
    if (why := x86_ranges.refuses(w)) is not None:
        pytest.skip(why)
    for importance in (None, torch.rand(3, size) + 0.01):
        want, got = reference(w, importance, search), search_ranges(w, importance, search)
        assert torch.equal(got[0], got[0].to(dtype).float()) and bool((got[0] != 0).all())
        assert bool(got[0].isfinite().all()) and (got[1] is None) == symmetric
        if got[1] is not None:
            assert torch.equal(got[1], got[1].round().clamp(*search.ends))
        theirs, ours = (errors(w, importance, search, *found) for found in (want, got))
        slack = 1e-5 * (w.double().square() * (1 if importance is None else importance)).sum(-1)
        assert bool((ours <= theirs + slack).all()), float((ours - theirs - slack).max())
        assert float((got[0] == want[0]).float().mean()) > 0.97


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_finds_the_best_of_the_ranges_tried(kind: str) -> None:
    symmetric, signed, compensated = KINDS[kind]
    torch.manual_seed(3)
    search = RangeSearch(bits=4, symmetric=symmetric, signed=signed, compensated=compensated, dtype=torch.float32)
    w, importance = torch.randn(40, 2, 32), torch.rand(2, 32) + 0.1
    scale, zero = reference(w, importance, search)
    found = errors(w, importance, search, scale, zero)
    low, high = w.amin(-1).clamp_max(0), w.amax(-1).clamp_min(0)
    for tried in search.tried:
        size = w.abs().amax(-1) / tried if symmetric else (high - low) * tried / 15
        middle = -0.5 - (low + high) / 2 / size
        for s, z in (((size, None), (-size, None))[:1 + signed] if symmetric else
                     ((size, middle.floor().clamp(-8, 7)), (size, middle.ceil().clamp(-8, 7)))):
            assert bool((found <= errors(w, importance, search, s, z) + 1e-5).all())


def test_rows_do_not_depend_on_threads_or_on_other_rows() -> None:
    search = RangeSearch(bits=4, symmetric=True, signed=True, compensated=False, dtype=torch.bfloat16)
    w = torch.randn(65, 2, 64)
    whole, threads = search_ranges(w, None, search)[0], torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(search_ranges(w, None, search)[0], whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(search_ranges(w[7:9], None, search)[0], whole[7:9])


def test_what_is_refused_runs_on_the_reference() -> None:
    search = RangeSearch(bits=4, symmetric=False, signed=False, compensated=True, dtype=torch.bfloat16)
    w = torch.randn(4, 2, 16, dtype=torch.float64)
    assert "float64" in (x86_ranges.refuses(w) or "")
    for got, want in zip(search_ranges(w, None, search), reference(w, None, search), strict=True):
        assert got is not None and want is not None and torch.equal(got, want)


def test_sizes_that_do_not_fit_are_refused_by_the_library() -> None:
    if (why := native.refuses("calibration")) is not None:
        pytest.skip(why)
    search = RangeSearch(bits=4, symmetric=True, signed=True, compensated=False, dtype=torch.float32)
    with pytest.raises(ValueError, match="sizes that do not fit"):
        x86_ranges.search_ranges(torch.randn(4, 2, 16), torch.ones(2, 8), search)
