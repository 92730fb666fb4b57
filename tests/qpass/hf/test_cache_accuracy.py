"""A quantized cache of 4096 tokens of text: how far SmolLM2's predictions move from those over a float cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import qpass
from tests.source_tree import ROOT

FOLDER = Path(os.environ.get("QPASS_MODELS") or ROOT.parent / "shared" / "models") / "smollm2-135m"
CONTEXT, ASKED, AT_ONCE = 4096, 128, 32

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FOLDER.exists(), reason="needs smollm2-135m in the folder that "
                                                                               "QPASS_MODELS names")]


@torch.no_grad()
def test_kl_at_4096_tokens() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    text = Path(str(qpass.__file__)).parent.joinpath("data/persuasion.txt").read_text(encoding="utf-8")
    ids = transformers.AutoTokenizer.from_pretrained(FOLDER)(text, return_tensors="pt").input_ids[:, :CONTEXT]
    assert ids.shape[1] == CONTEXT
    held: Any = transformers.DynamicCache()
    for start in range(0, CONTEXT - ASKED, 512):
        model.model(ids[:, start:min(start + 512, CONTEXT - ASKED)], past_key_values=held)
    states = [(layer.keys.clone(), layer.values.clone()) for layer in held.layers]

    def predicted(cache: Any) -> torch.Tensor:
        return torch.cat([model(ids[:, at:at + AT_ONCE], past_key_values=cache).logits.log_softmax(-1)
                          for at in range(CONTEXT - ASKED, CONTEXT, AT_ONCE)], 1)

    expected, found = predicted(held), {}
    for kind in ("int8", "fp8"):
        cache = qpass.QuantizedCache(model, kind)
        for layer, (keys, values) in zip(cache.layers, states, strict=True):
            layer.update(keys, values)
        found[kind] = float((expected.exp() * (expected - predicted(cache))).sum(-1).mean())
        model.set_attn_implementation("sdpa")
    assert 0 < found["int8"] <= 0.005 and found["int8"] < found["fp8"] < 0.05
