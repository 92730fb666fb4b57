"""Attention over float keys and values: reference and native op against float64, on odd sizes, masks, strides, NaN."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qpass.kernels.attention import native_attention
from qpass.kernels.cpu import native, x86_ops
from qpass.kernels.isa import machine_has, machine_refuses
from qpass.kernels.reference.attention import attention as reference

ISAS = ("avx2", "avx512_vnni")
# batch, heads of queries, heads of keys, queries, keys, head size of keys, of values
SIZES = [(1, 1, 1, 1, 1, 8, 8), (2, 6, 2, 1, 37, 64, 64), (1, 4, 4, 5, 19, 48, 32), (3, 8, 1, 3, 530, 80, 80),
         (1, 7, 1, 1, 257, 128, 128), (1, 3, 3, 70, 70, 24, 24), (1, 14, 2, 9, 300, 64, 72), (2, 10, 5, 40, 11, 16, 16)]


def on(isa: str) -> Callable[..., Tensor]:
    """The native op with these instructions."""
    if (why := machine_refuses(isa) or native.refuses("attention")):
        pytest.skip(why)
    assert native.prepare("attention") is None
    return lambda *args: x86_ops.OPS.attention.default(*args, native.ISA_INDEX[isa])


@pytest.fixture(params=["reference", *ISAS])
def run(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    return reference if request.param == "reference" else on(request.param)


@pytest.fixture(params=ISAS)
def op(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    return on(request.param)


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """[B, M, Hq, Dv] in float64."""
    shared = q.shape[1] // k.shape[1]
    k, v = (one.double().repeat_interleave(shared, 1) for one in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    return (torch.softmax(scores, -1).masked_fill(blind, 0.0) @ v).transpose(1, 2)


def given(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    b, heads, shared, m, s, d, dv = sizes
    return (torch.randn(b, m, heads, d).to(dtype).transpose(1, 2), torch.randn(b, shared, s, d).to(dtype),
            torch.randn(b, shared, s, dv).to(dtype))


def masks(way: str, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    b, heads, _, m, s, _, _ = sizes
    if way == "bool":  # places of a static cache that are not filled, others hidden, and a row that sees nothing
        mask = torch.rand(b, 1, m, s) < 0.6
        mask[..., s // 2 + 1:] = False
        mask[0, 0, 0] = False
        return mask
    if way == "float":
        return torch.randn(1, heads, m, s).masked_fill(torch.rand(1, heads, m, s) < 0.3, -torch.inf).to(dtype)
    return (torch.rand(m, s) < 0.5) if way == "bool and causal" else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_against_float64(run: Callable[..., Tensor], sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    for way in ("plain", "causal", "bool", "bool and causal", "float"):
        q, k, v = given(sizes, dtype)
        mask, causal, scale = masks(way, sizes, dtype), "causal" in way, 0.2
        want = exact(q, k, v, mask, causal, scale)
        out = run(q, k, v, mask, causal, scale)
        assert out.dtype == dtype and out.shape == want.shape and out.is_contiguous()
        apart = (out.double() - want).abs()
        assert apart.max() <= 1e-5 + torch.finfo(dtype).eps * want.abs().max(), way


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_near_as_pytorch(op: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Means over many numbers, for single ones are luck in either."""
    ours, theirs = [], []
    for sizes in [(4, 8, 2, 1, 300, 64, 64), (2, 8, 4, 30, 40, 128, 128), (8, 8, 8, 2, 700, 32, 32)]:
        for way in ("plain", "causal", "float"):
            (q, k, v), causal, mask = given(sizes, dtype), way == "causal", masks(way, sizes, dtype)
            want = exact(q, k, v, mask, causal, 0.2)
            torchs = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal,
                                                                      scale=0.2, enable_gqa=True).transpose(1, 2)
            for out, into in ((op(q, k, v, mask, causal, 0.2), ours), (torchs, theirs)):
                into.append(((out.double() - want).abs().mean() / want.abs().mean()).item())
    assert sum(ours) <= 1.02 * sum(theirs), (ours, theirs)


def test_strides_of_a_cache_and_of_masks(run: Callable[..., Tensor]) -> None:
    """Part of a longer cache, keys as a product gives them, masks that are broadcast, transposed or short of dims."""
    whole, q = torch.randn(2, 2, 64, 16), torch.randn(2, 4, 3, 16)
    k, v = whole[:, :, 7:30], torch.randn(2, 23, 2, 16).transpose(1, 2)
    for mask in (torch.rand(3, 23) < 0.5, torch.rand(2, 1, 1, 23) < 0.5, torch.rand(23, 3).t() < 0.5,
                 torch.rand(1, 4, 3, 23), torch.rand(23) < 0.5, (torch.rand(2, 1, 3, 1) < 0.5).expand(2, 1, 3, 23)):
        out = run(q, k, v, mask, False, 0.25)
        assert (out - exact(q, k, v, mask, False, 0.25)).abs().max() < 1e-5
    out = run(q, k.transpose(-1, -2).contiguous().transpose(-1, -2), v, None, False, 0.25)
    assert (out - exact(q, k, v, None, False, 0.25)).abs().max() < 1e-5


def test_nan_stays_where_it_belongs(run: Callable[..., Tensor]) -> None:
    for bad in (torch.nan, torch.inf):
        q, k, v = given((1, 4, 2, 2, 300, 16, 16), torch.float32)
        q[0, 1, 0, 3] = bad
        hidden = torch.ones(1, 1, 2, 300, dtype=torch.bool)
        hidden[..., 1, :] = False
        for mask in (None, hidden):
            y = run(q, k, v, mask, False, 0.25)
            assert y[0, 0, 1].isnan().all()
            assert y[0, 0, (0, 2, 3),].isfinite().all() and y[0, 1].isfinite().all()
        assert (y[0, 1] == 0).all()  # a row that sees nothing
        q, k, v = given((1, 4, 2, 2, 300, 16, 16), torch.float32)
        v[0, 0, 290] = torch.nan
        y = run(q, k, v, None, False, 0.25)
        assert y[0, :, :2].isnan().all() and y[0, :, 2:].isfinite().all()


def test_what_a_mask_hides_is_not_read_into_any_sum(op: Callable[..., Tensor]) -> None:
    """Places that nothing was written to yet may hold anything."""
    q, k, v = given((1, 4, 2, 3, 300, 16, 16), torch.bfloat16)
    for mask in (torch.rand(1, 1, 3, 300) < 0.5, torch.zeros(3, 300).masked_fill(torch.rand(3, 300) < 0.5, -torch.inf)):
        seen = mask if mask.dtype == torch.bool else mask == 0
        none, some = ~seen.reshape(3, 300).any(0), seen.reshape(3, 300)[0] & ~seen.reshape(3, 300)[1]
        want = op(q, k, v, mask, False, 0.25)
        k[:, :, none], v[:, :, none] = torch.nan, torch.inf
        assert torch.equal(op(q, k, v, mask, False, 0.25), want)
        v[:, :, some] = torch.nan  # row 0 sees these, row 1 does not
        y = op(q, k, v, mask, False, 0.25)
        assert y[0, 0].isnan().all() and (y[0, 1].float() - want[0, 1].float()).abs().max() < 1e-2
        q, k, v = given((1, 4, 2, 3, 300, 16, 16), torch.bfloat16)


def test_neither_threads_nor_other_rows_change_a_row(op: Callable[..., Tensor]) -> None:
    q, k, v = given((2, 7, 1, 11, 1300, 32, 32), torch.float32)
    mask = torch.rand(2, 1, 11, 1300) < 0.4
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(op(q, k, v, mask, False, 0.2))
            one = op(q[1:, :, 4:5], k[1:], v[1:], mask[1:, :, 4:5], False, 0.2)
            assert torch.equal(one[0, 0], results[0][1, 4])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_what_is_wrong_is_refused_by_name(op: Callable[..., Tensor]) -> None:
    q, k, v = given((1, 4, 2, 3, 10, 16, 16), torch.float32)
    for wrong, message in (((q, k[:, :, :9], v, None), "as many values as keys"), ((q, k.half(), v, None), "one dtype"),
                           ((q, k[..., :8], v, None), "one head size"), ((q[:, :3], k, v, None), "do not share"),
                           ((q, k, v, torch.ones(3, 9, dtype=torch.bool)), "a place for every key"),
                           ((q, k, v, torch.ones(2, 10, dtype=torch.bool)), "mask has another size"),
                           ((q, k, v, torch.ones(3, 10, dtype=torch.int64)), "must be float32"),
                           ((q[..., :12], k[..., :12], v, None), "no multiples of 8")):
        with pytest.raises(RuntimeError, match=message):
            op(*wrong, False, 0.25)
    assert op(q[:0], k[:0], v[:0], None, False, 0.25).shape == (0, 3, 4, 16)


def test_refusals_are_sentences() -> None:
    if (why := machine_refuses("avx2") or native.refuses()):
        pytest.skip(why)
    q, k, v = given((1, 4, 2, 3, 10, 16, 16), torch.float32)
    assert native_attention(q, k, v, None) == (x86_ops.OPS.attention.default, native.attention_isa())
    for told, args in (("multiple of 8", (q[..., :12], k[..., :12], v, None)),
                       ("takes one of", (q.double(), k, v, None)),
                       ("share those of keys", (q[:, :3], k, v, None)),
                       ("masks of bool", (q, k, v, torch.ones(3, 10, dtype=torch.float64))),
                       ("runs on the CPU", (q.to("meta"), k, v, None))):
        assert told in str(native_attention(*args))
    long = torch.zeros(1, 4, 64, 16)
    assert not isinstance(native_attention(long, k, v, None), str)
    told = native_attention(long.half(), k.half(), v.half(), None)
    assert ("AVX512" in told if isinstance(told, str) else False) == ("avx512_vnni" in machine_has())
