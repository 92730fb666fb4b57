"""Accuracy of experts: a mixture that computes what a dense model does loses as much by quantization, on real text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qpass
from tests.source_tree import ROOT

MODELS = Path(os.environ.get("QPASS_MODELS") or ROOT.parent / "shared" / "models")
DENSE, MIXTURE = MODELS / "smollm2-135m", MODELS / "smollm2-135m-moe4"
_THERE = DENSE.is_dir() and MIXTURE.is_dir()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not _THERE, reason=f"needs {DENSE.name} and {MIXTURE.name} in a "
                                                                      "folder that QPASS_MODELS names")]


def load(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def log_probabilities(model: Any, windows: Tensor) -> Tensor:
    return torch.cat([model(row[None]).logits[0, :-1].log_softmax(-1) for row in windows])


@pytest.mark.parametrize(("scheme", "allowed"), [("w8a8", 0.20), ("w4a8", 0.25)])
def test_a_mixture_loses_what_the_dense_model_loses(scheme: str, allowed: float) -> None:
    transformers = pytest.importorskip("transformers")
    text = (Path(str(qpass.__file__)).parent / "data" / "persuasion.txt").read_text(encoding="utf-8")
    ids = transformers.AutoTokenizer.from_pretrained(DENSE)(text[:40000], return_tensors="pt").input_ids[0]
    windows = ids[:8192].view(16, 512)  # fewer tokens in shorter windows give a ratio that is off by 0.05
    reference = log_probabilities(load(DENSE), windows)
    loss = {}
    for folder in (DENSE, MIXTURE):
        model = qpass.quantize(load(folder), scheme, progress=False)
        lost = log_probabilities(model, windows)
        loss[folder] = float((reference.exp() * (reference - lost)).sum(-1).double().mean())
    print(f"\n{scheme}: KL of the dense model {loss[DENSE]:.5f}, of the mixture {loss[MIXTURE]:.5f} "
          f"({loss[MIXTURE] / loss[DENSE] - 1:+.1%})")
    assert abs(loss[MIXTURE] / loss[DENSE] - 1) <= allowed, loss
