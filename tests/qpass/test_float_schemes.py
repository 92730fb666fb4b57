"""Float schemes: presets of fp8, MX, nvfp4 and nf4 quantize a model, run, save, and are read back by us and others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qpass
from qpass.errors import RecipeError

transformers = pytest.importorskip("transformers")
PRESETS = ("fp8", "fp8_dynamic", "fp8_block", "fp8_per_tensor", "w4afp8", "nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16",
           "mxfp4xfp8", "mxfp6a16", "mxfp6a8", "mxfp8", "mxfp8a16", "nf4", "fp4")
# nf4 and fp4 are bitsandbytes'; groups of w4afp8 differ here between layers, which Transformers takes for equal when it
# decompresses (tests/qpass/hf/test_checkpoints.py has it read one where they are equal).
OF_OTHERS = tuple(name for name in PRESETS if name not in ("nf4", "fp4", "w4afp8"))
THEIR_ERROR = {"nvfp4": 2**-7, "nvfp4a16": 2**-7, "mxfp6a16": 2**-7}  # relative, of what they unpack in bfloat16


def small() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, tie_word_embeddings=False)
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("scheme", PRESETS)
def test_quantize_save_and_load(scheme: str, tmp_path: Path) -> None:
    model = small()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = model(ids).logits
        qpass.quantize(model, qpass.Recipe(scheme, ignore=["lm_head"]), progress=False)
        after = model(ids).logits
    error = float((after - before).norm() / before.norm())
    assert 0 < error < (0.08 if qpass.PRESETS[scheme].weight.bits == 8 else 0.5), error
    report = qpass.explain(model)
    assert report.counts["quantized"] == 7
    if qpass.PRESETS[scheme].activation is not None:
        assert any("activation kept in float32" in f"{row.reason} {row.activation}" for row in report.rows)
    qpass.save(model, tmp_path)
    loaded: Any = qpass.load(tmp_path)
    for name, layer in model.named_modules():
        if hasattr(layer, "canonical"):
            assert torch.equal(layer.dequantize(), loaded.get_submodule(name).dequantize()), name
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, after)


@pytest.mark.parametrize("scheme", OF_OTHERS)
def test_compressed_tensors_reads_what_is_saved(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = small()
    qpass.quantize(model, qpass.Recipe(scheme, ignore=["lm_head"]), progress=False)
    qpass.save(model, tmp_path)
    config = transformers.CompressedTensorsConfig(run_compressed=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    for name, layer in model.named_modules():
        if hasattr(layer, "canonical"):
            weight = theirs.get_submodule(name).weight
            torch.testing.assert_close(layer.dequantize(weight.dtype), weight.detach(), atol=0, msg=name,
                                       rtol=THEIR_ERROR.get(scheme, 0))


def test_compiled_as_one_graph() -> None:
    """A scheme a layer, so that one compile shows that each is lowered and computes what it does eagerly."""
    schemes = {"*.q_proj": "nvfp4a16", "*.k_proj": "fp8_block", "*.v_proj": "nf4", "*.o_proj": "fp8_dynamic",
               "*.gate_proj": "w3a8", "*.down_proj": "mxfp8a16"}
    model: Any = qpass.quantize(small(), qpass.Recipe("mxfp4a16", ignore=["lm_head"], overrides=schemes),
                                progress=False)
    ids = torch.arange(12)[None]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        want = model(ids).logits
        torch.testing.assert_close(compiled(ids).logits, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(compiled(ids[:, :5]).logits, want[:, :5], rtol=1e-4, atol=1e-4)
    assert qpass.explain(model).counts["quantized"] == 7


def test_a_group_that_does_not_divide_stays_float() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(40, 16), torch.nn.Linear(16, 64), torch.nn.Linear(64, 8))
    plan = qpass.plan(model, "mxfp4a16", example_inputs=torch.randn(2, 40))
    assert [row.status for row in plan.rows] == ["keep", "keep", "quantize"]
    assert "microscaling groups are 32 weights" in plan.rows[0].reason


def test_types_that_are_only_read_say_so() -> None:
    scheme = qpass.Scheme(name="x", weight=qpass.WeightArgs(bits=2, type="q2_k", granularity="per_group",
                                                            group_size=256))
    with pytest.raises(RecipeError, match="q2_k is read from GGUF files"):
        qpass.quantize(torch.nn.Sequential(torch.nn.Linear(256, 8)), scheme, example_inputs=torch.randn(1, 256),
                       progress=False)
