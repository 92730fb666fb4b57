"""cpp_wrapper: graphs whose calls Inductor writes in C++ give what those with a Python wrapper give."""

from __future__ import annotations

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import Tensor, nn

import qpass
from qpass.kernels.registry import force_kernel
from qpass.layers.packed_layers import PackedWeight


class Block(nn.Module):
    """Three products of one tensor, one of them biased, and one of their sum; a bare parameter; a norm before."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(128, 64, bias=False), nn.Linear(128, 64)
        self.v, self.o = nn.Linear(128, 64, bias=False), nn.Linear(64, 128, bias=False)
        self.last = nn.Parameter(torch.randn(128, 32) / 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return (x + self.o(self.q(x) + nn.functional.silu(self.k(x)) * self.v(x))) @ self.last


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["native", "linear_reference"])
@pytest.mark.parametrize("scheme", ["w4a8", "w4a16", "w4a8_channel", "w8a8_static_asym"])
def test_equals_eager_and_the_python_wrapper(scheme: str, kernel: str) -> None:
    x = torch.randn(5, 128)
    data = [x] if "static" in scheme else None

    def quantized() -> nn.Module:
        return qpass.quantize(Block().eval(), qpass.Recipe(scheme, ignore=[]), example_inputs=x,  # type: ignore[no-any-return]
                              calibration=data, progress=False)

    if kernel == "native":
        model = quantized()
    else:
        with force_kernel(kernel):
            model = quantized()
    assert sum(isinstance(module, PackedWeight) for module in model.modules()) == 5
    with torch.no_grad():
        eager = model(x)
        python = torch.compile(model, dynamic=True)(x)
        torch._dynamo.reset()
        with inductor_config.patch(cpp_wrapper=True):
            compiled = torch.compile(model, dynamic=True)
            assert torch.equal(compiled(x), python)
            assert compiled(x[:2]).shape == (2, 32)
    torch.testing.assert_close(python, eager, rtol=2e-2, atol=2e-2)
