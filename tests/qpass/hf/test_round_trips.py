"""Round trips: models of many shapes quantized and saved; from_pretrained and qpass.load give equal outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qpass
from qpass.layers.experts_layer import QuantExperts
from qpass.layers.packed_layers import PackedLayer

transformers = pytest.importorskip("transformers", minversion="5")

_SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_SEQ2SEQ = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 128}
_IDS = torch.arange(3, 15).view(2, 6)
# class, config class, config, inputs; above each what it is here for
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, torch.Tensor]]] = {
    # a buffer of the router meets weights on meta while the model is empty
    "experts-and-a-buffer": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {
        **_SMALL, "vocab_size": 128, "moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 2, "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1}, {"input_ids": _IDS}),
    # the head's bias is tied to a parameter of another module
    "tied-bias": ("BertForMaskedLM", "BertConfig", {**_SMALL, "vocab_size": 128}, {"input_ids": _IDS}),
    # the model itself initializes a buffer of its own, by name
    "own-buffer": ("BartForConditionalGeneration", "BartConfig", _SEQ2SEQ,
                   {"input_ids": _IDS, "decoder_input_ids": _IDS}),
}


def output(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded_both_ways(name: str, tmp_path: Path) -> None:
    class_name, config_name, config, inputs = MODELS[name]
    model_class = getattr(transformers, class_name)
    model = model_class(getattr(transformers, config_name)(**config)).eval()
    if name == "tied-bias":
        torch.nn.init.normal_(model.get_parameter("cls.predictions.bias"))
    qpass.quantize(model, "w8a8", progress=False)
    expected = output(model, inputs)
    model.save_pretrained(tmp_path / "saved")
    qpass.save(model, tmp_path / "own")
    for loaded in (qpass.load(tmp_path / "saved"), qpass.load(tmp_path / "own"),
                   model_class.from_pretrained(tmp_path / "saved", quantization_config=qpass.QPassConfig())):
        assert torch.equal(output(loaded, inputs), expected)
        assert [type(m) for m in loaded.modules() if isinstance(m, PackedLayer)] == [
            type(m) for m in model.modules() if isinstance(m, PackedLayer)]
    assert any(isinstance(m, QuantExperts) for m in model.modules()) == (name == "experts-and-a-buffer")


def test_experts_beside_a_buffer_are_packed_as_they_are_read(tmp_path: Path) -> None:
    class_name, config_name, config, inputs = MODELS["experts-and-a-buffer"]
    model = getattr(transformers, class_name)(getattr(transformers, config_name)(**config)).eval()
    model.save_pretrained(tmp_path)
    loaded = qpass.load(tmp_path, "w8a8")
    assert torch.equal(output(loaded, inputs), output(qpass.quantize(model, "w8a8", progress=False), inputs))
    assert any(isinstance(module, QuantExperts) for module in loaded.modules())
