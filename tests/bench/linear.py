"""Linear: W4A8 beside PyTorch's own int4 and bf16 at the shapes of Llama-3.2-1B; decode and prefill in one run.

usage: python tests/bench/linear.py [--seconds S] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import Candidate, Timing, machine, print_table, time_cell, write_json
from torch import Tensor

from qpass.kernels.registry import LinearCall, choose
from qpass.layers import QuantLinear
from qpass.scheme import PRESETS
from qpass.spec import LinearSpec
from qpass.weight import quantize_weight

# One decoder layer of Llama-3.2-1B: (name, N, K, how often).
SHAPES = (("q, o", 2048, 2048, 2), ("k, v", 512, 2048, 2), ("gate, up", 8192, 2048, 2), ("down", 2048, 8192, 1))
GROUP = 128


def ours(preset: str) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
    """A packed layer of this preset on the kernel that the registry chooses here."""
    scheme = PRESETS[preset]

    def prepare(weight: Tensor) -> Callable[[Tensor], Tensor]:
        n, k = weight.shape
        spec = LinearSpec(family=scheme.family, weight=scheme.weight, activation=scheme.activation, out_features=n,
                          in_features=k)
        call = LinearCall(spec=spec, device=weight.device, dtype=torch.bfloat16)
        spec = spec.on(choose(call).kernel.name)
        return QuantLinear(quantize_weight(weight.to(torch.bfloat16), spec), None, spec, torch.bfloat16)

    return prepare


def int4pack(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """PyTorch's weight-only int4 (group 128, asymmetric) for CPU."""
    n, k = weight.shape
    groups = weight.view(n, k // GROUP, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp_min(1e-8)
    q = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.int32).view(n, k)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    # w = (q - 8) * scale + zero
    pairs = torch.stack([scale, low + 8 * scale], dim=-1).transpose(0, 1).contiguous().to(torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, pairs)  # type: ignore[no-any-return]


def bf16(weight: Tensor) -> Callable[[Tensor], Tensor]:
    held = weight.to(torch.bfloat16)
    return lambda x: F.linear(x, held)


W4A8 = Candidate(name="qpass w4a8", prepare=ours("w4a8"), bits=4.125, tolerance=0.15)
INT4PACK = Candidate(name="aten int4pack", prepare=int4pack, bits=4.25, tolerance=0.15)
BF16 = Candidate(name="bf16 F.linear", prepare=bf16, bits=16, tolerance=0.01)


def whole_layer(timings: list[Timing], m: int, name: str) -> float:
    """Microseconds for the seven products of one decoder layer."""
    times = {(t.n, t.k): t.median_us for t in timings if t.m == m and t.candidate == name}
    return sum(times[n, k] * count for _, n, k, count in SHAPES)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="time spent on each cell")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "linear.json")
    options = parser.parse_args()
    print(machine())
    timings: list[Timing] = []
    for m, peers in ((1, [INT4PACK, BF16]), (256, [BF16])):
        part = [t for _, n, k, _ in SHAPES
                for t in time_cell([W4A8, *peers], m=m, n=n, k=k, seconds=options.seconds, rotate_bytes=300 << 20)]
        print(f"\n{'decode' if m == 1 else 'prefill'}, {m} token{'s' * (m > 1)}: median of the calls, half the "
              "quartile span; x = times the peer's speed")
        print_table(part, subject=W4A8.name, peers=[p.name for p in peers])
        mine = whole_layer(part, m, W4A8.name)
        for peer in peers:
            theirs = whole_layer(part, m, peer.name)
            print(f"  one decoder layer: {mine:.0f} us against {theirs:.0f} us of {peer.name}: {theirs / mine:.2f}x")
        timings += part
    write_json(options.json, timings, shapes="Llama-3.2-1B")
    print(f"\nwritten to {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
