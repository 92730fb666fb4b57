"""Generated code: norm and quantization are one function, q, k and v share it, SiLU*mul and quantization are one.

The blocks are built from the models' own norm and MLP classes, without attention, which is no part of the statement.
They run in bfloat16 under `emulate_precision_casts`, where a compiled layer equals eager bit for bit.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

from qpass.lowering import record

transformers = pytest.importorskip("transformers", reason="the blocks use Transformers' norm and MLP classes")

FAMILIES = {
    "llama": ("llama", "LlamaRMSNorm", "LlamaMLP", "LlamaConfig", "silu"),
    "qwen3": ("qwen3", "Qwen3RMSNorm", "Qwen3MLP", "Qwen3Config", "silu"),
    "gemma": ("gemma", "GemmaRMSNorm", "GemmaMLP", "GemmaConfig", "gelu"),
}


class Block(nn.Module):
    """A decoder layer with a product of q, k and v in the place of attention."""

    def __init__(self, family):
        super().__init__()
        module, norm, mlp, config, _ = FAMILIES[family]
        classes = __import__(f"transformers.models.{module}.modeling_{module}", fromlist=[norm, mlp])
        sizes = getattr(transformers, config)(hidden_size=64, intermediate_size=96)
        self.input_layernorm = getattr(classes, norm)(64)
        self.post_attention_layernorm = getattr(classes, norm)(64)
        self.q, self.k, self.v = (nn.Linear(64, 64, bias=False) for _ in range(3))
        self.mlp = getattr(classes, mlp)(sizes)

    def forward(self, x):
        h = self.input_layernorm(x)
        x = x + self.q(h) * self.k(h) + self.v(h)
        return x + self.mlp(self.post_attention_layernorm(x))


def functions(code):
    """Generated C++ functions by name, each with its text."""
    return dict(re.findall(r"^(cpp_fused_\w+) = async_compile.cpp_pybinding\((.*?)^''\)'", code.replace("''')", "'')'"),
                           re.S | re.M))


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3", marks=pytest.mark.slow), "gemma"])  # as llama
def test_quantization_is_part_of_the_producers_function(quantize_layers, installed, family, rounds_as_eager):
    block = quantize_layers(Block(family)).bfloat16()
    # Quarters: their squares add up exactly, so the mean does not depend on the order in which it is summed.
    x = (torch.randint(-8, 9, (2, 3, 64)) / 4).bfloat16()
    with torch.no_grad(), torch._inductor.config.patch(emulate_precision_casts=True, force_disable_caches=True):
        result, (code,) = run_and_get_code(torch.compile(block, fullgraph=True), x)
        assert torch.equal(result, block(x)) or not rounds_as_eager

    writing = {name: text for name, text in functions(code).items() if re.search(r"[ (]int8_t\* ", text)}
    activation = FAMILIES[family][-1]
    norms = [name for name in writing if "rsqrt" in name and "mean" in name and "amax" in name and "round" in name]
    gates = [name for name in writing if activation in name and "mul" in name and "amax" in name and "round" in name]
    assert (len(writing), len(norms), len(gates)) == (3, 2, 1)
    assert not any("isnan" in text for text in writing.values())  # Inductor takes it one number at a time
    # 3 functions write integers for 6 layers: q, k and v read those of one, gate and up those of another.
    assert len(re.findall(r"= torch\.ops\.qpass\.linear_q_list\.default\(", code)) == 2
    assert len(re.findall(r"= torch\.ops\.qpass\.linear_q\.default\(", code)) == 1
    assert "qpass.linear.default(" not in code

    norm, mlp = FAMILIES[family][1:3]
    told = {name: record.for_site(f"model.layers.7.{name}").activation
            for name in ("q", "k", "v", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}
    at = "model.layers.7."
    assert told["q"] == f"fused into {at}input_layernorm ({norm})"
    assert told["k"] == told["v"] == f"shared with {at}q"
    assert told["mlp.gate_proj"] == f"fused into {at}post_attention_layernorm ({norm})"
    assert told["mlp.up_proj"] == f"shared with {at}mlp.gate_proj"
    assert told["mlp.down_proj"].startswith(f"fused into {activation}*mul in {at}mlp ({mlp})")
