"""A model with integer scales: saved as an ordinary checkpoint, found in it when loaded, the same logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import qpass
from qpass.kernels.cpu import native


@pytest.mark.skipif(native.refuses() is not None, reason=native.refuses() or "")
def test_saved_and_loaded(tiny_llama: Callable[..., torch.nn.Module], token_ids: torch.Tensor, tmp_path: Path) -> None:
    scheme = qpass.PRESETS["w4a8_int_scales"].with_group_size(32)
    model = qpass.quantize(tiny_llama(dtype=torch.bfloat16), scheme, progress=False)
    wanted = model(token_ids).logits
    assert "w4a8 g32 integer scales" in str(qpass.explain(model))
    qpass.save(model, tmp_path)
    loaded = qpass.load(tmp_path)
    for found in (model, loaded):
        scales = found.get_submodule("model.layers.0.mlp.up_proj").packed[1]  # type: ignore[operator, index]
        assert scales.dtype == torch.int8
    assert torch.equal(loaded(token_ids).logits, wanted)
    state = model.state_dict()
    assert state["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.bfloat16
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.state_dict().items())
