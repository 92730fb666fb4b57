"""Linear: W4A8 beside PyTorch's own int4 and bf16 at the shapes of Llama-3.2-1B; decode and prefill in one run.

usage: python tests/bench/linear.py [--seconds S] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import Candidate, Cell, Product, Timing, machine, print_table, time_cell, write_json
from torch import Tensor

from qpass.kernels.registry import LinearCall, choose
from qpass.layers import QuantLinear
from qpass.scheme import PRESETS
from qpass.spec import LinearSpec
from qpass.weight import quantize_weight

# One decoder layer of Llama-3.2-1B as it runs compiled: q, k, v in one call and gate, up in one.
LAYER = (("q, k, v", (2048, 512, 512), 2048), ("o", (2048,), 2048), ("gate, up", (8192, 8192), 2048),
         ("down", (2048,), 8192))
# The same products one by one, as they run eagerly.
SINGLE = (("k", (512,), 2048), ("q", (2048,), 2048), ("gate", (8192,), 2048))
GROUP = 128


def ours(preset: str) -> Callable[[Sequence[Tensor]], Product]:
    """Packed layers of this preset on the kernel that the registry chooses here; several weights make one call."""
    scheme = PRESETS[preset]

    def packed(weight: Tensor) -> QuantLinear:
        n, k = weight.shape
        spec = LinearSpec(family=scheme.family, weight=scheme.weight, activation=scheme.activation, out_features=n,
                          in_features=k)
        call = LinearCall(spec=spec, device=weight.device, dtype=torch.bfloat16)
        spec = spec.on(choose(call, prepare=True).kernel.name)
        return QuantLinear(quantize_weight(weight.to(torch.bfloat16), spec), None, spec, torch.bfloat16)

    def prepare(weights: Sequence[Tensor]) -> Product:
        layers = [packed(weight) for weight in weights]
        if len(layers) == 1:
            return lambda x: [layers[0](x)]
        form = layers[0].kernel.forms["linear_list"]
        tensors = [tensor for layer in layers for tensor in layer.packed]
        bias, specs = [None] * len(layers), [layer.spec for layer in layers]
        return lambda x: form(x, tensors, bias, specs)  # type: ignore[no-any-return]

    return prepare


def int4pack(weights: Sequence[Tensor]) -> Product:
    """PyTorch's weight-only int4 (group 128, asymmetric) for CPU."""
    made = [_int4pack(weight) for weight in weights]
    return lambda x: [torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, pairs) for packed, pairs in made]


def _int4pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    groups = weight.view(n, k // GROUP, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp_min(1e-8)
    q = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.int32).view(n, k)
    # w = (q - 8) * scale + zero
    pairs = torch.stack([scale, low + 8 * scale], dim=-1).transpose(0, 1).contiguous().to(torch.bfloat16)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1), pairs


def bf16(weights: Sequence[Tensor]) -> Product:
    held = [weight.to(torch.bfloat16) for weight in weights]
    return lambda x: [F.linear(x, weight) for weight in held]


W4A8 = Candidate(name="qpass w4a8", prepare=ours("w4a8"), bits=4.125, tolerance=0.15)
INT4PACK = Candidate(name="aten int4pack", prepare=int4pack, bits=4.25, tolerance=0.15)
BF16 = Candidate(name="bf16 F.linear", prepare=bf16, bits=16, tolerance=0.01)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="time spent on each cell")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "linear.json")
    options = parser.parse_args()
    print(machine())
    timings: list[Timing] = []
    for m, peers, products in ((1, [INT4PACK, BF16], LAYER + SINGLE), (256, [BF16], LAYER)):
        print(f"\n{'decode' if m == 1 else 'prefill'}, {m} token{'s' * (m > 1)}: medians, half the quartile span; "
              "x = times the peer's speed")
        part = [t for label, n, k in products
                for t in time_cell([W4A8, *peers], Cell(label=label, m=m, n=n, k=k), seconds=options.seconds,
                                   rotate_bytes=300 << 20)]
        print_table(part, subject=W4A8.name, peers=[p.name for p in peers])
        inside = {label for label, _, _ in LAYER}
        layer = {c.name: sum(t.median_us for t in part if t.candidate == c.name and t.cell.label in inside)
                 for c in (W4A8, *peers)}
        for peer in peers:
            print(f"  one decoder layer: {layer[W4A8.name]:.0f} us against {layer[peer.name]:.0f} us of {peer.name}: "
                  f"{layer[peer.name] / layer[W4A8.name]:.2f}x")
        timings += part
    write_json(options.json, timings, shapes="Llama-3.2-1B")
    print(f"\nwritten to {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
