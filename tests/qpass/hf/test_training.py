"""Training beside packed layers: what is float learns, by hand, by Trainer and by peft; what is packed stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.errors import PackedForInference
from qpass.layers.experts_layer import QuantExperts
from qpass.layers.packed_layers import PackedLayer, QuantLinear

transformers = pytest.importorskip("transformers", reason="Transformers is not installed")

Build = Callable[..., Any]


class Adapted(nn.Module):
    """y = layer(x) + B(A(x)); B starts at zero."""

    def __init__(self, layer: QuantLinear, rank: int = 4) -> None:
        super().__init__()
        self.layer = layer
        self.a = nn.Linear(layer.in_features, rank, bias=False)
        self.b = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.b(self.a(x))  # type: ignore[no-any-return]


def only_norms(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    return model


def packed_tensors(model: nn.Module) -> list[Tensor]:
    return [t.clone() for module in model.modules() if isinstance(module, PackedLayer) for t in module.packed]


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
def test_adapters_learn_and_packed_layers_stay(tiny_llama: Build, token_ids: Tensor, checkpointed: bool) -> None:
    model = qpass.quantize(tiny_llama(attention_dropout=0.1), "w4a8", progress=False)
    expected = model(token_ids).logits
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.down_proj = Adapted(layer.mlp.down_proj)
    if checkpointed:
        model.gradient_checkpointing_enable()
    assert model.train().model.layers[0].self_attn.training
    before, learns = packed_tensors(model), [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(learns, lr=0.02), []
    for _ in range(12):
        loss = model(token_ids, labels=token_ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert len(learns) == 4 and losses[-1] < losses[0] - 0.2
    assert all(torch.equal(a, b) for a, b in zip(before, packed_tensors(model), strict=True))
    for layer in model.eval().model.layers:
        layer.mlp.down_proj = layer.mlp.down_proj.layer
    assert torch.equal(model(token_ids).logits, expected)


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_norms_learn_in_every_kind_of_model(tiny_model: Build, token_ids: Tensor, family: str) -> None:
    model = only_norms(qpass.quantize(tiny_model(family), "w4a8", progress=False)).train()
    assert family == "llama" or any(isinstance(module, QuantExperts) for module in model.modules())
    model(token_ids, labels=token_ids).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients and all(g is not None and g.isfinite().all() and g.any() for g in gradients)


def test_a_few_frozen_numbers_are_no_choice(tiny_llama: Build) -> None:
    model = qpass.quantize(tiny_llama(), "w4a8", progress=False)
    model.model.norm.weight.requires_grad_(False)
    with pytest.raises(PackedForInference, match=r"do not learn.*model\.requires_grad_\(False\)"):
        model.train()
    assert model.requires_grad_(False).train().training  # nothing learns, or what stands around the model does


@pytest.mark.parametrize("loaded", [False, True], ids=["quantized", "loaded"])
def test_trainer(tiny_llama: Build, token_ids: Tensor, tmp_path: Path, loaded: bool) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    model = qpass.quantize(tiny_llama(), "w4a8", progress=False)
    if loaded:
        qpass.save(model, tmp_path / "model")
        model = qpass.load(tmp_path / "model")
    only_norms(model)
    before = model.model.norm.weight.clone()
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, learning_rate=0.01, per_device_train_batch_size=1, report_to=[],
        use_cpu=True, disable_tqdm=True, gradient_checkpointing=True)
    rows = [{"input_ids": row, "labels": row} for row in token_ids]
    transformers.Trainer(model=model, args=settings, train_dataset=rows).train()
    assert not torch.equal(model.model.norm.weight, before)
    again = qpass.load(tmp_path / "run" / "checkpoint-2")
    assert torch.equal(again(token_ids).logits, model.eval()(token_ids).logits)


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft", reason="peft is not installed")


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear"], ids=["named", "all-linear"])
def test_peft_adapts_packed_layers_and_saves_the_adapter(peft: Any, tiny_llama: Build, token_ids: Tensor,
                                                         tmp_path: Path, targets: Any) -> None:
    model = qpass.quantize(tiny_llama(), "w4a8", progress=False)
    expected = model(token_ids).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")).train()
    learns = [p for p in adapted.parameters() if p.requires_grad]
    assert len(learns) == (2 * 14 if targets == "all-linear" else 2 * 4)
    optimizer = torch.optim.AdamW(learns, lr=0.02)
    for _ in range(2):
        adapted(token_ids, labels=token_ids).loss.backward()
        optimizer.step()
    learnt = adapted.eval()(token_ids).logits
    assert not torch.allclose(learnt, expected)
    with adapted.disable_adapter():
        assert torch.equal(adapted(token_ids).logits, expected)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(qpass.quantize(tiny_llama(), "w4a8", progress=False), tmp_path)
    assert torch.equal(again(token_ids).logits, learnt)
    assert torch.equal(adapted.unload()(token_ids).logits, expected)


def test_peft_refuses_to_merge_into_packed_integers(peft: Any, tiny_llama: Build, token_ids: Tensor) -> None:
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    over = peft.get_peft_model(qpass.quantize(tiny_llama(), "w4a8", progress=False), lora)
    recipe = qpass.Recipe("w4a8", ignore=["*lora_*", "*lm_head"])
    under = qpass.quantize(peft.get_peft_model(tiny_llama(), lora), recipe, example_inputs={"input_ids": token_ids},
                           progress=False)
    for adapted in (over, under):
        before = adapted(token_ids).logits
        with pytest.raises(PackedForInference):
            adapted.merge_adapter()
        assert torch.equal(adapted(token_ids).logits, before)


def test_peft_is_as_it_was_for_float_layers(peft: Any, tiny_llama: Build) -> None:
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(tiny_llama(), lora)
    assert type(adapted.base_model.model.model.layers[0].mlp.up_proj) is peft.tuners.lora.Linear
    adapted.merge_adapter()
