"""Shared scales: weights with one input have one scale for the tensor, however they come to be quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qpass
from qpass.scheme import PRESETS
from qpass.swap.shared_scales import SharedScales
from qpass.weight import dequantize_weight, quantize_weight


class Block(nn.Module):
    """Two products of one tensor, and one of their result."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


def made(*, seed: int = 0) -> Block:
    torch.manual_seed(seed)
    block = Block()
    block.up.weight.data *= 4  # its range is not the gate's
    return block


X = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))


def scale_of(layer: Any) -> torch.Tensor:
    return layer.canonical().tensors["global_scale"]  # type: ignore[no-any-return]


def test_one_scale_for_weights_with_one_input() -> None:
    before = made()
    model = qpass.quantize(made(), "nvfp4a16", example_inputs=(X,), progress=False)
    assert torch.equal(scale_of(model.gate), scale_of(model.up))
    largest = torch.maximum(before.gate.weight.abs().amax(), before.up.weight.abs().amax())
    assert torch.equal(scale_of(model.up), (448 * 6 / largest.detach()).reshape(1))
    alone = (448 * 6 / before.down.weight.detach().abs().amax()).reshape(1)
    assert torch.equal(scale_of(model.down), alone) and not torch.equal(scale_of(model.down), scale_of(model.up))
    difference = model.gate.dequantize(torch.float32) - before.gate.weight
    assert difference.norm() / before.gate.weight.norm() < 0.12  # as good as with a scale of its own


def test_what_is_not_finite_does_not_make_the_scale() -> None:
    broken, zero = made(), made()
    for block, value in ((broken, float("nan")), (zero, 0.0)):
        block.gate.weight.data[0, 0] = block.down.weight.data[3, 3] = value
    models = [qpass.quantize(block, "nvfp4a16", example_inputs=(X,), progress=False, allow_nonfinite=True)
              for block in (broken, zero)]
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())


def test_other_formats_have_their_scales_alone() -> None:
    from qpass.plan_model import make_plan

    for scheme in ("fp8_dynamic", "w4a16_channel" if "w4a16_channel" in PRESETS else "w8a8", "mxfp8"):
        assert not SharedScales(made(), make_plan(made(), scheme, example_inputs=(X,)).decisions).groups


def test_a_codec_encodes_within_what_it_is_given() -> None:
    spec = qpass.quantize(made(), "nvfp4a16", example_inputs=(X,), progress=False).gate.spec
    weight = torch.randn(48, 32)
    same, wider = (quantize_weight(weight, spec, largest=weight.abs().amax() * factor) for factor in (1, 8))
    assert all(torch.equal(same.tensors[name].view(torch.uint8), tensor.view(torch.uint8))
               for name, tensor in quantize_weight(weight, spec).tensors.items())
    assert torch.equal(wider.tensors["global_scale"] * 8, same.tensors["global_scale"])
    assert (dequantize_weight(wider, spec) - weight).norm() / weight.norm() < 0.12


def test_streaming_gives_the_same_numbers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
                                      num_key_value_heads=2, vocab_size=64, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    model = qpass.quantize(model, "nvfp4a16", progress=False)
    layer = model.model.layers[1]
    parts = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    assert len({float(scale_of(part)) for part in parts}) == 1 and scale_of(layer.mlp.gate_proj) == scale_of(
        layer.mlp.up_proj) != scale_of(layer.mlp.down_proj)
    online = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=qpass.QPassConfig("nvfp4a16"), dtype=torch.float32)
    for other in (qpass.load(tmp_path, "nvfp4a16"), online):
        state = other.state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor.view(torch.uint8), state[name].view(torch.uint8)), name
