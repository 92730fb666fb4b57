"""Small products: which float products a compiler's loop should compute, and what is said of the others."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from qpass.kernels.small_products import DTYPES, MOST_WORK, refuses_loop


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_router_for_a_few_tokens_is_a_loop(dtype: torch.dtype) -> None:
    weight = torch.empty(32, 2048, dtype=dtype)
    most = MOST_WORK // weight.numel()
    assert refuses_loop(torch.empty(1, 2048, dtype=dtype), weight) is None
    assert refuses_loop(torch.empty(most, 2048, dtype=dtype), weight) is None
    assert "more than" in (refuses_loop(torch.empty(most + 1, 2048, dtype=dtype), weight) or "")


@pytest.mark.parametrize(("dtype", "other", "device", "told"), [
    (torch.float32, torch.float32, "cpu", "float32"), (torch.bfloat16, torch.float16, "cpu", "float16"),
    (torch.bfloat16, torch.bfloat16, "meta", "meta")])
def test_what_is_left_to_the_library(dtype: torch.dtype, other: torch.dtype, device: str, told: str) -> None:
    x, weight = torch.empty(1, 64, dtype=dtype, device=device), torch.empty(8, 64, dtype=other, device=device)
    assert told in (refuses_loop(x, weight) or "")


def test_a_symbolic_size_is_not_asked() -> None:
    environment = ShapeEnv()
    with torch._subclasses.FakeTensorMode(shape_env=environment) as mode:
        tokens = environment.create_unbacked_symint()
        x, weight = (torch.empty(size, 64, dtype=torch.bfloat16) for size in (tokens, 8))
        assert mode and "not known" in (refuses_loop(x, weight) or "")
    assert not environment.guards
