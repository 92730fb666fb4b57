"""Every preset saved, and read by Transformers' from_pretrained with compressed-tensors' decompressor: equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qpass
from qpass.errors import QPassError
from qpass.layers.packed_layers import PackedWeight
from qpass.scheme import PRESETS

transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
pytestmark = pytest.mark.slow
OWN = {"nf4", "fp4"}  # of bitsandbytes: no format of compressed-tensors


@pytest.mark.parametrize("scheme", sorted(PRESETS))
def test_others_decompress_the_same_weights(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=256, intermediate_size=256, num_hidden_layers=1, vocab_size=64,
                                      num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config).bfloat16().eval()
    static = PRESETS[scheme].activation is not None and PRESETS[scheme].activation.static
    try:
        qpass.quantize(model, scheme, progress=False, **(
            {"calibration": [torch.arange(2, 34)[None]]} if static else {}))
    except QPassError as error:
        pytest.skip(f"not quantized here: {str(error).splitlines()[0]}")
    qpass.save(model, tmp_path)
    if json.loads((tmp_path / "config.json").read_text())["quantization_config"]["format"] == "qpass":
        assert scheme in OWN
        return
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.CompressedTensorsConfig(run_compressed=False), dtype=torch.bfloat16)
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, PackedWeight)}
    assert len(layers) == 7
    for path, layer in layers.items():
        assert torch.equal(theirs.get_submodule(path).weight, layer.dequantize(torch.float32).bfloat16()), path
