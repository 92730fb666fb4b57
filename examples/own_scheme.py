"""A number format of one's own, in one file: ternary weights, -1, 0 or +1 times a scale for each group.

A codec says how a weight is stored and how it comes back; the reference kernel multiplies with what comes back, so the
format works everywhere at once: recipes, explain, compare, state_dict. A faster kernel can follow (own_kernel.py).
"""

import copy

import torch
from torch import Tensor, nn

import qpass


class Ternary:
    """w = code * scale, scale = mean |w| of the group, as BitNet b1.58 has it."""

    names = ("codes", "scale")

    def quantize(self, weight: Tensor, group_size: int) -> dict[str, Tensor]:
        groups = weight.view(weight.shape[0], -1, group_size)
        scale = groups.abs().mean(-1, keepdim=True).clamp_min(1e-8)
        codes = (groups / scale).round().clamp(-1, 1).to(torch.int8)
        return {"codes": codes.view_as(weight), "scale": scale.squeeze(-1)}

    def dequantize(self, tensors: dict[str, Tensor], group_size: int) -> Tensor:
        codes, scale = tensors["codes"], tensors["scale"]
        groups = codes.view(codes.shape[0], -1, group_size).float()
        return (groups * scale.unsqueeze(-1)).view(codes.shape)


ternary = qpass.register_scheme(
    qpass.Scheme(name="ternary",
                 weight=qpass.WeightArgs(bits=2, type="ternary", granularity="per_group", group_size=64),
                 activation=qpass.ActivationArgs()),
    codec=Ternary(),
)

torch.manual_seed(0)
reference = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 128)).eval()
x = torch.randn(16, 256)
model = qpass.quantize(copy.deepcopy(reference), "ternary", example_inputs=x, progress=False)
print(qpass.explain(model))
print("\nerror, layer by layer (a third of the numbers are zero, so it is large):")
print(qpass.compare(reference, model, x, threshold_db=3))

assert model(x).isfinite().all()
finer = qpass.quantize(copy.deepcopy(reference), "w4a8", example_inputs=x, progress=False)
print(f"\nint4 in its place: {qpass.compare(reference, finer, x).output.sqnr_db:.1f} dB at the output")
