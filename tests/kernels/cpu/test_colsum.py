"""Column sums that asymmetric activations need: exact for more outputs than are summed at a time."""

from __future__ import annotations

import pytest
import torch

from qpass.kernels.cpu import native, x86
from qpass.kernels.registry import kernel, load_builtin
from qpass.scheme import ActivationArgs, WeightArgs
from qpass.spec import LinearSpec
from qpass.weight import dequantize_weight, quantize_weight

load_builtin()


@pytest.mark.skipif(native.refuses() is not None, reason="the native library does not run on this machine")
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "with zero points"])
def test_sums_of_many_outputs(symmetric: bool) -> None:
    n, k = 2 * x86._ROWS_AT_A_TIME + 70, 64
    spec = LinearSpec(family="w8a8", weight=WeightArgs(bits=8, granularity="per_group", group_size=32,
                                                       symmetric=symmetric),
                      activation=ActivationArgs(symmetric=False), out_features=n, in_features=k,
                      kernel="linear_w8a8_plain")
    weight = quantize_weight(torch.randn(n, k) + 0.2, spec)
    sums = kernel(spec.kernel).layout.pack(weight, spec)["colsum"]
    wanted = dequantize_weight(weight, spec).double().sum(-1)
    torch.testing.assert_close(sums[:n].double(), wanted, rtol=1e-5, atol=1e-4)
    assert not sums[n:].any()
