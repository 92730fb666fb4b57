"""Experts on a GPU: whole layers beside float64, and decoding beside Transformers' grouped bfloat16 products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cuda_goals import Goal
from cuda_products import report
from cuda_time import Machine, interleaved
from torch import Tensor

from qpass.activation_args import ActivationArgs
from qpass.experts_spec import ExpertsSpec, Gate
from qpass.kernels.cuda.layouts import names
from qpass.kernels.experts_choice import pack_blocks
from qpass.kernels.reference.experts import apply_gate
from qpass.kernels.registry import kernel
from qpass.weight import dequantize_weight, quantize_weight
from tests.kernels.cuda.products import activation_rows, spec_for, weight_args

CASES = (("int4:g128", None), ("int4:g128", ActivationArgs()), ("int8:channel", ActivationArgs()),
         ("fp8:channel", ActivationArgs(type="float")))
GATE = Gate(function="silu")


class Layer:
    """Random experts packed for the Triton kernel of their family."""

    def __init__(self, machine: Machine, text: str, activation: Any, experts: int, hidden: int, inner: int,
                 dtype: torch.dtype, *, keep: bool = False) -> None:
        parts = [spec_for(weight_args(text), activation, n, k) for n, k in ((2 * inner, hidden), (hidden, inner))]
        self.name = f"experts_{parts[0].family}_triton"
        parts = [part.on(f"linear_{part.family}_triton") for part in parts]
        self.spec = ExpertsSpec(experts=experts, hidden=hidden, intermediate=inner, gate=GATE, up=parts[0],
                                down=parts[1], kernel=self.name)
        self.packed: list[Tensor] = []
        self.values: list[list[Tensor]] = []
        for part in parts:
            weights = [quantize_weight(torch.randn(part.shape, device=machine.device).to(dtype) / 16, part)
                       for _ in range(experts)]
            blocks = pack_blocks(weights, part, experts)
            self.packed += [blocks[name] for name in names(part)]
            self.values.append([dequantize_weight(w, part).double() for w in weights] if keep else [])

    def call(self, x: Tensor, index: Tensor, weight: Tensor) -> Callable[[], Tensor]:
        form = kernel(self.name).forms["experts"]
        return lambda: form(x, index, weight, self.packed, [None, None], self.spec)


def check(machine: Machine) -> dict[str, Any]:
    """Each family at one token and at many; an error names the first that differs."""
    experts, hidden, inner = (3, 128, 128) if machine.dry else (8, 512, 384)
    worst = {}
    for text, activation in CASES:
        layer = Layer(machine, text, activation, experts, hidden, inner, torch.float16, keep=True)
        for tokens in (1, 5) if machine.dry else (1, 200):
            x = torch.randn(tokens, hidden, device=machine.device).half()
            index = torch.rand(tokens, experts, device=machine.device).topk(2).indices
            weight = torch.rand(tokens, 2, device=machine.device)
            got = layer.call(x, index, weight)().double()
            want = torch.zeros_like(got)
            for e in range(experts):
                token, place = (index == e).nonzero(as_tuple=True)
                if len(token):
                    y = activation_rows(x[token], activation)[1] @ layer.values[0][e].t()
                    h = apply_gate(y.float(), GATE)
                    h = h if activation is not None else h.half()
                    z = activation_rows(h, activation)[1] @ layer.values[1][e].t()
                    want.index_add_(0, token, z * weight[token, place, None].double())
            error = float((got - want).abs().max() / want.abs().max())
            worst[f"{layer.name} {tokens}"] = error
            if not error <= 6e-3:
                raise AssertionError(f"{layer.name} at {tokens} tokens: relative error {error:.2e}")
    return worst


def transformers_layer(machine: Machine, experts: int, hidden: int, inner: int) -> Any:
    """Transformers' own experts in bfloat16, on its grouped products."""
    import transformers
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = transformers.Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=inner, num_experts=experts,
                                         num_experts_per_tok=8)
    config._experts_implementation = "grouped_mm"
    layer = Qwen3MoeExperts(config).to(machine.device, torch.bfloat16).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return layer


def decode(machine: Machine, found: dict[str, Any]) -> dict[str, Any]:
    """One token and eight, 64 experts of which 8 are chosen."""
    experts, hidden, inner, top = (4, 128, 128, 2) if machine.dry else (64, 2048, 1024, 8)
    dtype = torch.float16 if machine.dry else torch.bfloat16
    result = {}
    layers = 1 if machine.dry else 4  # four layers in turn are more than the L2 cache holds
    lanes: dict[str, list[Any]] = {}
    made = {name: [Layer(machine, text, act, experts, hidden, inner, dtype) for _ in range(layers)]
            for name, (text, act) in {"w4a16": CASES[0], "w4a8": CASES[1]}.items()}
    floats = [transformers_layer(machine, experts, hidden, inner) for _ in range(layers)]
    ratios = []
    for tokens in (1, 8):
        x = torch.randn(tokens, hidden, device=machine.device).to(dtype)
        index = torch.rand(tokens, experts, device=machine.device).topk(top).indices
        weight = torch.rand(tokens, top, device=machine.device).to(dtype)
        lanes = {name: [layer.call(x, index, weight) for layer in some] for name, some in made.items()}
        given = (x.bfloat16(), index, weight.bfloat16())
        lanes["Transformers grouped_mm bf16"] = [lambda layer=layer, a=given: layer(*a) for layer in floats]
        with torch.no_grad():
            times = interleaved(machine, lanes)
        result[f"{tokens} tokens"] = report(f"experts {experts} top-{top}, {tokens} tokens", times)
        ratios.append(times["Transformers grouped_mm bf16"] / times["w4a16"])
    Goal(what="MoE decode, 64 experts top-8, W4A16, 1 token", against="Transformers' grouped_mm bf16", asked=2.5,
         found=ratios[0]).put(found)
    return result
