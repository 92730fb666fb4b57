"""Update: the packed tensors of a model, filled with new weights, are those of the new model quantized; in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qpass
from qpass.errors import QPassError, WeightError
from qpass.layers.packed_layers import PackedLayer
from qpass.scheme import ActivationArgs, WeightArgs, scheme_for

Build = Callable[..., nn.Module]


def pointers(model: nn.Module) -> dict[str, int]:
    found = {name: p.data_ptr() for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, PackedLayer):
            found.update({f"{name}.{i}": t.data_ptr() for i, t in enumerate(module.packed)})
    return found


CASES = {
    "llama": ("llama", qpass.Recipe("w4a8")),
    "head tied and packed": ("tied_llama", qpass.Recipe("w4a16_asym", ignore=[], overrides={"lm_head": "w8a16"})),
    "head tied, float": ("tied_llama", qpass.Recipe("w8a8")),
    "transposed, biases": ("gpt2", qpass.Recipe("w8a16", overrides={"*c_fc": None})),
    "integer scales": ("llama", qpass.Recipe("w4a8_int_scales", on_indivisible="adjust")),
    "floats, one kind a layer": ("llama", qpass.Recipe("mxfp4a16", on_indivisible="skip", overrides={
        "*.q_proj": "nvfp4", "*.k_proj": "fp8_block", "*.v_proj": "nf4", "*.o_proj": "fp8_per_tensor",
        "*.gate_proj": "mxfp8", "*.up_proj": "mxfp6a8", "*.down_proj": "fp8_dynamic"})),
    "weights that share a scale": ("llama", qpass.Recipe("nvfp4")),
    "widths, one a layer": ("llama", qpass.Recipe("w3a16", on_indivisible="adjust", overrides={
        "*.q_proj": "w2a8", "*.k_proj": "w5a16", "*.v_proj": "w7a8", "*.o_proj": "w4a8_channel"})),
    "experts": ("mixtral", qpass.Recipe("w4a8")),
    "experts, floats": ("mixtral", qpass.Recipe("mxfp4a16")),
}


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_new_model_quantized(case: str, tiny_model: Build, token_ids: torch.Tensor) -> None:
    family, recipe = CASES[case]
    model = qpass.quantize(tiny_model(family), recipe, progress=False)
    new = tiny_model(family, seed=1)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)  # norms and biases too
    before = pointers(model)
    count = qpass.update(model, new)
    assert count == len(new.state_dict()) and pointers(model) == before
    expected = qpass.quantize(new, recipe, progress=False)
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, expected(token_ids).logits)
    first, second = model.state_dict(), expected.state_dict()
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())


@pytest.mark.parametrize("preset", ["nvfp4", "fp8_per_tensor"])
def test_a_scale_of_the_whole_tensor_is_that_of_what_is_stored(preset: str, tiny_model: Build) -> None:
    """New weights in float32 for a model in bfloat16, their largest between two numbers of it."""
    recipe = qpass.Recipe(preset, on_indivisible="skip")
    model = qpass.quantize(tiny_model("llama").bfloat16(), recipe, progress=False)
    new = tiny_model("llama", seed=1)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.view(-1)[5] = 1.0 + 2**-8 + 2**-12
    qpass.update(model, new)
    expected = qpass.quantize(new.bfloat16(), recipe, progress=False).state_dict()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())


def test_compiled_graphs_stay(tiny_llama: Build, token_ids: torch.Tensor) -> None:
    model = qpass.quantize(tiny_llama(num_hidden_layers=1), "w4a8", progress=False)
    compiled = torch.compile(model, fullgraph=True)
    new = tiny_llama(num_hidden_layers=1, initializer_range=0.1)
    with torch.no_grad():
        compiled(token_ids)
        compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        qpass.update(compiled, {name: tensor.bfloat16() for name, tensor in new.state_dict().items()})
        after = compiled(token_ids).logits
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compilations
        expected = qpass.quantize(new.bfloat16().float(), "w4a8", progress=False)(token_ids).logits
    assert (after - expected).abs().max() < 0.02 * expected.abs().max()


def test_what_does_not_fit_changes_nothing(tiny_llama: Build) -> None:
    model = qpass.quantize(tiny_llama(), "w4a8", progress=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    good = tiny_llama(initializer_range=0.1).state_dict()
    name = "model.layers.1.mlp.up_proj.weight"
    bad = good[name].clone()
    bad[0, 0] = float("inf")
    for change, said in (({name: good[name][:5]}, r"up_proj\.weight is \[5, 64\], the model has \[128, 64\]"),
                         ({"model.nothing": bad}, "model.nothing is nothing that this model has"),
                         ({"model.layers.1.self_attn.qkv_proj.weight": bad}, r"closest: .*self_attn\.q_proj\.weight"),
                         ({name: bad.nan_to_num().int()}, "no float weight")):
        with pytest.raises(WeightError, match=said):
            qpass.update(model, {**good, **change})
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[key]), key
    with pytest.raises(QPassError, match="load_state_dict"):
        qpass.update(tiny_llama(), good)
    assert qpass.update(model, {name: good[name]}) == 1


@pytest.mark.parametrize("preset", ["w4a8", "w8a16", "w4a8_asym_inputs", "mxfp8", "nf4", "fp8_block", "fp8_per_tensor",
                                    "nvfp4"])
def test_a_layer_with_nan_is_whole_and_what_changed_before_is_named(preset: str, tiny_llama: Build) -> None:
    asym = scheme_for(WeightArgs(bits=4, granularity="per_group", group_size=32), ActivationArgs(symmetric=False))
    recipe = qpass.Recipe(asym if preset == "w4a8_asym_inputs" else preset, on_indivisible="adjust")
    model = qpass.quantize(tiny_llama(), recipe, progress=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new = tiny_llama(initializer_range=0.1)
    expected = qpass.quantize(tiny_llama(initializer_range=0.1), recipe, progress=False).state_dict()
    good, bad = new.state_dict(), "model.layers.0.mlp.up_proj"
    given = {**good, f"{bad}.weight": good[f"{bad}.weight"].clone()}
    given[f"{bad}.weight"][-1, -1] = float("nan")
    with pytest.raises(WeightError, match=r"up_proj\.weight holds 1 NaN and 0 Inf") as error:
        qpass.update(model, given, check_first=False)
    nothing = preset == "nvfp4"  # one scale for the tensor is looked for before
    assert nothing == ("Nothing was changed" in str(error.value))
    assert nothing != ("The model holds it now, with 0 for these. Changed before it: " in str(error.value))
    assert nothing != ("self_attn.q_proj.weight" in str(error.value))
    state = model.state_dict()
    assert all(torch.equal(tensor, before[key]) for key, tensor in state.items() if nothing or ".layers.1." in key)
    zero = {**given, f"{bad}.weight": given[f"{bad}.weight"].nan_to_num(0)}
    there = [name for name in good if nothing or name in str(error.value) or name == f"{bad}.weight"]
    same = qpass.quantize(tiny_llama(), recipe, progress=False)
    if not nothing:
        qpass.update(same, {name: zero[name] for name in there})
    assert all(torch.equal(tensor, state[key]) for key, tensor in same.state_dict().items())
    with pytest.raises(WeightError, match=r"up_proj\.weight holds 1 NaN and 0 Inf"):
        qpass.update(model, given)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    qpass.update(model, good)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
    qpass.update(same, good)
    for updated in (model, same):
        qpass.update(updated, given if updated is model else zero, allow_nonfinite=True)
    assert all(torch.equal(tensor, same.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_experts_with_nan_stay(tiny_model: Build) -> None:
    model = qpass.quantize(tiny_model("mixtral"), "w4a8", progress=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = tiny_model("mixtral", seed=1).state_dict()
    name = next(name for name in given if name.endswith("experts.down_proj"))
    given[name][-1, -1, -1] = float("inf")
    with pytest.raises(WeightError, match=r"experts\.down_proj holds 0 NaN and 1 Inf.*Nothing was changed"):
        qpass.update(model, {key: tensor for key, tensor in given.items() if key.startswith(name.rpartition(".")[0])})
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_tied_names_with_different_numbers_change_nothing(tiny_model: Any) -> None:
    model = qpass.quantize(tiny_model("tied_llama"), qpass.Recipe("w8a8", ignore=[]), progress=False)
    given = tiny_model("tied_llama", initializer_range=0.1).state_dict()
    given["lm_head.weight"] = given["model.embed_tokens.weight"] + 1
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightError, match="are one weight in this model"):
        qpass.update(model, given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    given["lm_head.weight"] = given["model.embed_tokens.weight"].clone()
    qpass.update(model, given)
