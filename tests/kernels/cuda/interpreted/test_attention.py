"""Attention over 8-bit keys and values, interpreted, agrees with float64, for every length, group and step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qpass.errors import NoKernel
from qpass.kernels.cuda import attention
from qpass.kernels.cuda.attention import attend_quantized, cache_attention_triton


def exact(q: Tensor, k: Tensor, ks: Tensor, v: Tensor, vs: Tensor, lengths: Tensor, factor: float) -> Tensor:
    shared = q.shape[1] // k.shape[1]
    keys = (k.double() * ks.double()[..., None]).repeat_interleave(shared, 1)
    values = (v.double() * vs.double()[..., None]).repeat_interleave(shared, 1)
    score = q.double() @ keys.transpose(-1, -2) * factor
    position = lengths[:, None] - q.shape[2] + torch.arange(q.shape[2])
    seen = torch.arange(k.shape[2])[None, None] <= position[..., None]
    score = score.masked_fill(~seen[:, None], -torch.inf)
    return score.softmax(-1).nan_to_num(0) @ values


def random_cache(batch: int, heads: int, keys: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, heads, keys, size)
    largest = 127 if dtype == torch.int8 else 448
    scale = x.abs().amax(-1) / largest
    codes = x / scale[..., None]
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


@pytest.mark.parametrize("cache", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("heads", "shared", "queries", "size"), [(2, 3, 1, 40), (1, 4, 5, 64)])
def test_equals_float64(cache: torch.dtype, dtype: torch.dtype, heads: int, shared: int, queries: int, size: int
                        ) -> None:
    k, ks = random_cache(2, heads, 150, size, cache)
    v, vs = random_cache(2, heads, 150, size, cache)
    q = torch.randn(2, heads * shared, queries, size).to(dtype)
    lengths = torch.tensor([150, 67])
    got = attend_quantized(q, k, ks, v, vs, lengths)
    want = exact(q, k, ks, v, vs, lengths, 1 / math.sqrt(size))
    slack = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert got.dtype == dtype and got.shape == q.shape
    assert float((got.double() - want).abs().max()) <= slack * float(want.abs().max())


def test_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    k, ks = random_cache(1, 2, 400, 32, torch.int8)
    v, vs = random_cache(1, 2, 400, 32, torch.int8)
    q = torch.randn(1, 4, 2, 32)
    lengths = torch.tensor([130])  # the last parts see nothing
    want = exact(q, k, ks, v, vs, lengths, 0.3)
    for parts in (1, 4):
        monkeypatch.setattr(attention, "parts_of", lambda *sizes, parts=parts: parts)
        got = attend_quantized(q, k, ks, v, vs, lengths, scale=0.3)
        assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-5)


def test_scales_may_be_shared_and_keys_strided() -> None:
    k, _ = random_cache(1, 2, 80, 32, torch.int8)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    q, lengths = torch.randn(1, 2, 1, 32), torch.tensor([80])
    one, heads = torch.tensor(0.01), torch.tensor([[[0.01], [0.02]]])
    got = attend_quantized(q, k, one, k, heads, lengths)
    want = exact(q, k, one.expand(1, 2, 80), k, heads.expand(1, 2, 80), lengths, 1 / math.sqrt(32))
    assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-5)


def test_a_sequence_without_keys_gives_zeros() -> None:
    k, ks = random_cache(2, 1, 8, 16, torch.int8)
    got = attend_quantized(torch.randn(2, 1, 1, 16), k, ks, k, ks, torch.tensor([0, 8]))
    assert not got[0].any() and got[1].any()


@pytest.mark.parametrize("groups", [1, 2], ids=["one-scale", "two-scales"])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["", "softcap"])
def test_a_cache_with_groups_masks_and_softcap(groups: int, mask: str, softcap: float) -> None:
    batch, heads, shared, m, s, d = 2, 2, 2, 3, 70, 32
    codes = [torch.randint(-127, 128, (batch, heads, s, d), dtype=torch.int8) for _ in range(2)]
    scales = [torch.rand(batch, heads, s, groups) / 40 for _ in range(2)]
    q = torch.randn(batch, heads * shared, m, d)
    shown = None if mask == "none" else torch.rand(batch, 1, m, s) > 0.4
    if shown is not None:
        shown[0, 0, 1] = False  # a row that sees nothing
    given = torch.zeros(shown.shape).masked_fill(~shown, -torch.inf) if shown is not None and mask == "float" else shown
    got = cache_attention_triton(q, codes[0], scales[0], codes[1], scales[1], given, "int8", True, 0.2, softcap)
    k, v = ((c.double() * x.double().repeat_interleave(d // groups, -1)).repeat_interleave(shared, 1)
            for c, x in zip(codes, scales, strict=True))
    score = q.double() @ k.transpose(-1, -2) * 0.2
    score = softcap * torch.tanh(score / softcap) if softcap else score
    hidden = ~torch.ones(m, s, dtype=torch.bool).tril(s - m)[None, None]
    hidden = hidden if shown is None else hidden | ~shown
    want = score.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0) @ v
    assert got.shape == (batch, m, heads * shared, d)
    assert torch.allclose(got.double(), want.transpose(1, 2), rtol=1e-4, atol=1e-4)


def test_says_what_it_does_not_take() -> None:
    k, ks = random_cache(1, 1, 8, 16, torch.int8)
    q, lengths = torch.randn(1, 1, 1, 16), torch.tensor([8])
    with pytest.raises(NoKernel, match="reads int8 or float8_e4m3fn keys, not float32"):
        attend_quantized(q, k.float(), ks, k.float(), ks, lengths)
    assert attention.refuses(q, k, k) is None
    assert "one shape and dtype" in str(attention.refuses(q, k, k[:, :, :4]))
    assert "at most 32 tokens" in str(attention.refuses(q.expand(1, 1, 33, 16), k, k))
    with pytest.raises(ValueError, match="of one dtype; got"):
        attend_quantized(q, k, ks, k[:, :, :4], ks, lengths)
