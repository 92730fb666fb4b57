"""Products of watched parameters are seen with the operand that varies, and others are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qpass.measure.watch_products import SeenProduct, WatchProducts

W, B = torch.randn(6, 4), torch.randn(6)
WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: F.linear(x, W),
    "with a bias": lambda x: F.linear(x, W, B),
    "matmul": lambda x: x @ W.mT,
    "weight first": lambda x: (W @ x.mT).mT,
    "batched": lambda x: torch.bmm(x[None], W.mT[None])[0],
    "a view of it": lambda x: F.linear(x, W.view(2, 3, 4).flatten(0, 1)),
}


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_multiply_is_seen_once(way: str) -> None:
    x, seen = torch.randn(5, 4), list[tuple[str, SeenProduct]]()
    with WatchProducts({"w": W}, lambda name, product: seen.append((name, product))):
        y = WAYS[way](x)
        F.linear(x, torch.randn(6, 4))
    assert len(seen) == 1
    name, product = seen[0]
    assert name == "w"
    assert torch.equal(product.x.reshape(5, 4), x)
    assert product.biased == (way == "with a bias")
    assert torch.allclose(y, x @ W.mT + (B if product.biased else 0), atol=1e-5)


def test_nothing_is_seen_after_it() -> None:
    seen = list[str]()
    with WatchProducts({"w": W}, lambda name, product: seen.append(name)):
        pass
    F.linear(torch.randn(5, 4), W)
    assert seen == []
