"""Attention over a quantized cache: reference and native kernel against float64, on odd sizes, masks and scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qpass.cache_numbers import CacheNumbers
from qpass.errors import RecipeError
from qpass.kernels.cache_attention import cache_attention
from qpass.kernels.cpu import native, x86_attention
from qpass.kernels.isa import machine_refuses
from qpass.kernels.reference.cache_attention import cache_attention as reference

NUMBERS = {
    "int8 per token": CacheNumbers(), "int8 per head": CacheNumbers(granularity="per_head"),
    "int8 per group": CacheNumbers(granularity="per_group", group_size=8),
    "fp8 per token": CacheNumbers(kind="fp8"), "fp8 per tensor": CacheNumbers(kind="fp8", granularity="per_tensor"),
    "int4 per group": CacheNumbers(kind="int4", granularity="per_group", group_size=16),
}
# batch, heads of queries, heads of keys, queries, keys, head size of keys, of values
SIZES = [(1, 1, 1, 1, 1, 16, 16), (2, 6, 2, 1, 37, 64, 64), (1, 4, 4, 5, 19, 48, 32), (2, 8, 1, 3, 130, 80, 80),
         (1, 8, 2, 1, 45, 32, 64), (1, 3, 1, 1, 50, 24, 56), (1, 5, 1, 1, 33, 112, 144)]


def use(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the native kernel have these instructions."""
    if (why := machine_refuses(isa) or native.refuses("cache")) is not None:
        pytest.skip(why)
    assert native.prepare("cache") is None  # before, so that it is built with all that the machine has
    monkeypatch.setenv("QPASS_ISA", isa)


@pytest.fixture(params=("avx2", "avx512_vnni"))
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    use(request.param, monkeypatch)


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, scaling: float,
          softcap: float) -> torch.Tensor:
    """[B, M, Hq, Dv] in float64, one row after the other."""
    b, heads, m, _ = q.shape
    s, shared = k.shape[2], heads // k.shape[1]
    out = torch.zeros(b, m, heads, v.shape[-1], dtype=torch.float64)
    wide = None if mask is None else mask.expand(b, heads, m, s)
    for i in range(b):
        for h in range(heads):
            for row in range(m):
                scores = k[i, h // shared] @ q[i, h, row] * scaling
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                if wide is not None:
                    line = wide[i, h, row]
                    scores = scores.masked_fill(~line, -torch.inf) if line.dtype == torch.bool else scores + line
                if causal:
                    scores[s - m + row + 1:] = -torch.inf
                if scores.max() > -torch.inf:
                    out[i, row, h] = torch.softmax(scores, 0) @ v[i, h // shared]
    return out


def made(numbers: CacheNumbers, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    states = torch.randn(shape) * torch.rand(shape[0], shape[1], shape[2], 1).exp()
    scale = numbers.scale_of(states)
    codes = numbers.encode(states, scale)
    return codes, scale, numbers.decode(codes, scale, torch.float64)


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS.keys())
@pytest.mark.parametrize("way", ["plain", "causal", "bool", "float and softcap"])
@pytest.mark.parametrize("level", ["reference", "avx2", "avx512_vnni"])
def test_against_float64(numbers: CacheNumbers, sizes: tuple[int, ...], way: str, level: str,
                         monkeypatch: pytest.MonkeyPatch) -> None:
    b, heads, shared, m, s, d, dv = sizes
    if way == "causal" and m > s:
        pytest.skip("more queries than keys")
    if any(size % max(16 if numbers.kind == "int4" else 8, numbers.group_size or 0) for size in (d, dv)):
        pytest.skip("groups do not divide the heads")
    if level != "reference":
        use(level, monkeypatch)
    q = torch.randn(b, heads, m, d)
    keys, values = made(numbers, (b, shared, s, d)), made(numbers, (b, shared, s, dv))
    mask: torch.Tensor | None = None
    if way == "bool":
        mask = torch.rand(b, 1, m, s) < 0.6
        mask[0, 0, 0] = False  # a row that sees nothing
    elif way == "float and softcap":
        mask = torch.randn(1, heads, m, s).masked_fill(torch.rand(1, heads, m, s) < 0.3, -torch.inf)
    softcap, scaling = (5.0 if "softcap" in way else 0.0), 0.3
    expected = exact(q.double(), keys[2], values[2], mask, way == "causal", scaling, softcap)
    given: Any = (keys[0], keys[1], values[0], values[1], mask, numbers.kind, way == "causal", scaling, softcap)
    ways = {"reference": reference}
    if level != "reference":
        assert x86_attention.refuses(q, *given[:6]) is None
        ways = {"native": x86_attention.cache_attention_x86, "op": cache_attention}
    for name, run in ways.items():
        for dtype, allowed in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
            query = q.to(dtype)
            want = expected if dtype == torch.float32 else exact(
                query.double(), keys[2], values[2], mask, way == "causal", scaling, softcap)
            out = run(query, *given)
            assert out.dtype == dtype and out.shape == want.shape
            assert (out.double() - want).abs().max() <= allowed * values[2].abs().max(), (name, dtype)


def test_a_view_of_a_longer_cache() -> None:
    numbers = CacheNumbers()
    keys, values = made(numbers, (2, 2, 40, 16)), made(numbers, (2, 2, 40, 16))
    q = torch.randn(2, 4, 2, 16)
    part = [(codes[:, :, 7:30], scale[:, :, 7:30], exactly[:, :, 7:30]) for codes, scale, exactly in (keys, values)]
    want = exact(q.double(), part[0][2], part[1][2], None, True, 0.25, 0.0)
    out = cache_attention(q, part[0][0], part[0][1], part[1][0], part[1][1], None, "int8", True, 0.25, 0.0)
    assert (out.double() - want).abs().max() < 2e-5 * part[1][2].abs().max()


@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS.keys())
def test_numbers_there_and_back(numbers: CacheNumbers) -> None:
    states = torch.randn(2, 3, 7, 32)
    states[0, 0, 0], states[1, 2, 3, 5] = 0.0, 40.0
    scale = numbers.scale_of(states)
    back = numbers.decode(numbers.encode(states, scale), scale, torch.float32)
    step = {"int8": 0.5 / 127, "fp8": 1 / 16, "int4": 0.5 / 7}[numbers.kind] * 1.01
    group = states.unflatten(-1, (numbers.scales(32), -1)).abs().amax(-1, keepdim=True)
    amax = states.abs().amax() if numbers.static else group.expand(*group.shape[:-1], 32 // group.shape[-2]).flatten(-2)
    assert ((back - states).abs() <= step * amax + 1e-6).all()
    larger = numbers.decode(numbers.encode(states * 100, scale), scale, torch.float32)
    assert larger.isfinite().all() and larger.abs().max() <= back.abs().max() * 1.01  # saturates


def test_fp8_numbers_are_all_read_rightly() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127].repeat(1, 1, 4, 1)[..., :248]
    values = torch.zeros(1, 1, 4, 248)
    scale = torch.ones(1, 1, 1, 1)
    ones = CacheNumbers(kind="fp8").encode(torch.zeros(1, 1, 4, 8), scale)
    out = cache_attention(torch.zeros(1, 1, 1, 8), ones, scale, codes, scale, None, "fp8", False, 1.0, 0.0)
    assert torch.equal(out[0, 0, 0], codes[0, 0, 0].view(torch.float8_e4m3fn).float()), values


def test_what_cannot_be_is_said() -> None:
    for wrong in ({"kind": "int3"}, {"granularity": "per_row"}, {"kind": "int4"}, {"granularity": "per_group"},
                  {"granularity": "per_group", "group_size": 12}):
        with pytest.raises(RecipeError):
            CacheNumbers(**wrong)  # type: ignore[arg-type]
    codes, scale = torch.zeros(1, 1, 4, 16, dtype=torch.int8), torch.ones(1, 1, 4, 1)
    if x86_attention.refuses(torch.zeros(1, 1, 1, 16), codes, scale, codes, scale, None, "int8") is None:
        with pytest.raises(ValueError, match="smaller than their sizes say"):  # one scale, said to be four
            x86_attention.cache_attention_x86(torch.zeros(1, 1, 1, 32), codes, scale, codes, scale, None, "int8",
                                               False, 1.0, 0.0)


def test_a_query_that_is_nan_stays_nan_in_the_reference() -> None:
    a_query_that_is_nan_stays_nan(reference)


def test_a_query_that_is_nan_stays_nan(isa: None) -> None:
    a_query_that_is_nan_stays_nan(x86_attention.cache_attention_x86)


def a_query_that_is_nan_stays_nan(run: Any) -> None:
    q, scale = torch.randn(1, 2, 2, 16), torch.rand(1, 2, 11, 1, dtype=torch.float16)
    codes = torch.randint(-127, 128, (1, 2, 11, 16), dtype=torch.int8)
    q[0, 1, 0, 3] = torch.nan
    hidden = torch.ones(1, 1, 2, 11, dtype=torch.bool)
    hidden[..., 1, :] = False
    for mask in (None, hidden):
        y = run(q, codes, scale, codes, scale, mask, "int8", False, 0.25, 0.0)
        assert y[0, 0, 1].isnan().all()
        assert y[0, 0, 0].isfinite().all() and y[0, 1].isfinite().all()
    assert (y[0, 1] == 0).all()  # a row that sees nothing


@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS.keys())
def test_what_no_query_sees_may_be_anything(numbers: CacheNumbers, isa: None) -> None:
    if numbers.static:
        pytest.skip("one scale for all tokens")
    states, q = torch.randn(1, 2, 45, 32), torch.randn(1, 8, 1, 32).half()
    scale = numbers.scale_of(states)
    codes, seen = numbers.encode(states, scale), torch.rand(1, 1, 1, 45) < 0.5
    seen[..., 16:24], seen[..., -1] = False, False
    given: Any = (codes, scale, seen, numbers.kind, False, 0.25, 0.0)
    want = x86_attention.cache_attention_x86(q, *given[:2], *given)
    scale = scale.masked_fill(~seen.view(1, 1, 45, 1), torch.nan)
    assert torch.equal(x86_attention.cache_attention_x86(q, codes, scale, codes, scale, *given[2:]), want)


@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS.keys())
def test_a_query_does_not_depend_on_the_others_of_its_keys(numbers: CacheNumbers, isa: None) -> None:
    keys, values = made(numbers, (1, 1, 70, 32)), made(numbers, (1, 1, 70, 64))
    q = torch.randn(1, 7, 1, 32)
    given: Any = (*keys[:2], *values[:2], None, numbers.kind, False, 0.25, 0.0)
    whole = x86_attention.cache_attention_x86(q, *given)
    for first, last in ((0, 1), (1, 3), (2, 5), (3, 7), (1, 6)):
        assert torch.equal(x86_attention.cache_attention_x86(q[:, first:last], *given), whole[:, :, first:last])
