"""A kernel of one's own, in one file: what it needs, what it refuses, its code, its registration.

By being registered it stands in the support matrix, is chosen by priority where it can run, says why where it cannot,
and is compared with the reference like every other kernel.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qpass
from qpass.kernels.registry import LinearCall
from qpass.spec import LinearSpec


def refuses(call: LinearCall) -> str | None:
    """None, or the sentence that says why not."""
    if call.spec.weight.granularity != "per_channel" or not call.spec.weight.symmetric:
        return "needs symmetric weights with a scale a channel"
    return None if call.dtype_name == "float32" else f"needs float32 activations, got {call.dtype_name}"


@qpass.register_kernel(scheme="w8a16", device="cpu", refuses=refuses, priority=90)
def linear_w8a16_mine(x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, spec: LinearSpec) -> Tensor:
    """x [..., K] -> [..., N]; one scale a row can be applied after the product."""
    qweight, scale = packed  # the canonical layout; give layout=... to register_kernel for one of your own
    y = F.linear(x, qweight.to(x.dtype)) * scale.to(x.dtype).squeeze(-1)
    return y if bias is None else y + bias


print(qpass.support_matrix())

torch.manual_seed(0)
reference = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32, bias=False)).eval()
x = torch.randn(8, 96)
per_channel = qpass.Scheme(name="w8a16_channel", weight=qpass.WeightArgs(bits=8))
model = qpass.quantize(copy.deepcopy(reference), per_channel, example_inputs=x, progress=False)
print(f"\n{qpass.explain(model)}")
assert {row.kernel for row in qpass.explain(model).rows} == {"linear_w8a16_mine"}

# The reference kernel is the definition: the same weights on it must give the same numbers.
with qpass.force_kernel("linear_reference"):
    oracle = qpass.quantize(copy.deepcopy(reference), per_channel, example_inputs=x, progress=False)
with torch.no_grad():
    got, want = model(x), oracle(x)
print(f"\ndiffers from the reference kernel by at most {float((got - want).abs().max()):.1e}")
torch.testing.assert_close(got, want)

# Forced where it cannot run, its refusal is the error.
try:
    with qpass.force_kernel("linear_w8a16_mine"):
        qpass.quantize(copy.deepcopy(reference), "w8a16", example_inputs=x, progress=False)
except qpass.errors.QPassError as error:
    print(f"\nas it should be: {error}")
