"""Scheme: presets agree with compressed-tensors, bad numbers cannot exist, registration refuses duplicates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import qpass.codecs  # noqa: F401  (registers its presets)
from qpass.errors import DuplicateRegistration, RecipeError
from qpass.scheme import (
    PRESETS,
    ActivationArgs,
    Scheme,
    WeightArgs,
    check_defined,
    codec_of,
    preset,
    register_scheme,
    scheme_for,
)

BUILT_IN = sorted(name for name, scheme in PRESETS.items() if scheme.weight.type == "int")
# Recipes, no presets of compressed-tensors.
OWN = {"w4a8_channel", "w8a8_static", "w8a8_static_asym", "w4a8_static", "w4a8_int_scales", "w8a16_channel",
       "fp8_per_tensor"}
FLOATS = sorted(set(PRESETS) - {*BUILT_IN, *OWN, "nf4", "fp4"})
_STRATEGY = {"per_tensor": "tensor", "per_channel": "channel", "per_group": "group", "per_token": "token"}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registrations of one test, gone after it."""
    import qpass.scheme

    before, codecs = dict(PRESETS), dict(qpass.scheme._CODECS)
    yield
    for table, kept in ((PRESETS, before), (qpass.scheme._CODECS, codecs)):
        table.clear()
        table.update(kept)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [n for n in BUILT_IN if n not in OWN])
def test_preset_is_that_of_compressed_tensors(name: str) -> None:
    quant_scheme = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
    theirs, ours = quant_scheme.PRESET_SCHEMES[name.upper()], PRESETS[name]
    weights, activations = theirs["weights"], theirs.get("input_activations")
    assert (weights.num_bits, weights.type, weights.symmetric, weights.group_size, weights.strategy) == (
        ours.weight.bits, ours.weight.type, ours.weight.symmetric, ours.weight.group_size,
        _STRATEGY[ours.weight.granularity])
    assert weights.dynamic is False and weights.scale_dtype is None and weights.actorder is None
    if ours.activation is None:
        assert activations is None
    else:
        assert (activations.num_bits, activations.type, activations.symmetric, activations.dynamic,
                activations.strategy, activations.group_size) == (
                    ours.activation.bits, ours.activation.type, ours.activation.symmetric, True, "token", None)


@pytest.mark.parametrize("name", FLOATS)
def test_float_preset_is_that_of_compressed_tensors(name: str) -> None:
    from qpass.formats.compressed_tensors_floats import float_args

    quant_scheme = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
    theirs, ours = quant_scheme.PRESET_SCHEMES[name.upper()], PRESETS[name]
    assert float_args(theirs["weights"].model_dump(mode="json")) == ours.weight
    activations = theirs.get("input_activations")
    if ours.activation is None:
        assert activations is None
        return
    strategy = {"per_group": ("group", "tensor_group")}.get(ours.activation.granularity,
                                                            (_STRATEGY[ours.activation.granularity],))
    assert activations.strategy in strategy
    assert (activations.num_bits, activations.type, activations.symmetric, activations.dynamic, activations.group_size
            ) == (ours.activation.bits, ours.activation.type, ours.activation.symmetric, ours.activation.dynamic,
                  ours.activation.group_size)


def test_presets_of_vllms_online_quantization() -> None:
    fp8, int8 = PRESETS["fp8_per_tensor"], PRESETS["w8a16_channel"]
    assert fp8.weight == WeightArgs(bits=8, type="fp8", granularity="per_tensor")
    assert fp8.activation is not None and not fp8.activation.static
    assert (fp8.activation.type, fp8.activation.granularity) == ("float", "per_tensor")
    assert (int8.weight, int8.activation) == (WeightArgs(bits=8, granularity="per_channel"), None)


def test_every_preset_is_here() -> None:
    quant_scheme = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
    expressible = {name.lower() for name, parts in quant_scheme.PRESET_SCHEMES.items() if "weights" in parts}
    assert expressible == {*BUILT_IN, *FLOATS} - OWN


def test_w4a8_channel_is_int4_rows_and_asymmetric_tokens() -> None:
    channel = preset("W4A8_CHANNEL")
    assert channel.weight == WeightArgs(bits=4, granularity="per_channel", symmetric=True)
    assert channel.activation == ActivationArgs(symmetric=False)


def test_w4a8_int_scales_is_w4a8_but_for_the_choice_of_scales() -> None:
    assert replace(preset("w4a8_int_scales").weight, scales="amax") == preset("w4a8").weight
    assert preset("w4a8_int_scales").activation == preset("w4a8").activation


@pytest.mark.parametrize("fields", [
    {"bits": 0}, {"bits": 9}, {"bits": 1}, {"bits": 4, "granularity": "per_block"},
    {"bits": 4, "granularity": "per_group"}, {"bits": 4, "group_size": 32},
    {"bits": 4, "granularity": "per_group", "group_size": 0}, {"bits": 4, "granularity": "per_group", "group_size": -1},
    {"bits": 4, "scales": "integer"}, {"bits": 4, "scales": "mse"},
    {"bits": 8, "granularity": "per_group", "group_size": 32, "scales": "integer"},
    {"bits": 4, "granularity": "per_group", "group_size": 32, "scales": "integer", "symmetric": False},
], ids=str)
def test_impossible_weights_cannot_be_made(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        WeightArgs(**fields)


@pytest.mark.parametrize(("fields", "said"), [
    ({"bits": 16}, "4 or 8 bits"), ({"type": "complex"}, "int or float"), ({"granularity": "per_channel"}, "per_token"),
    ({"granularity": "per_group"}, "group_size"), ({"group_size": 32}, "group_size"),
    ({"granularity": "per_group", "group_size": -1}, "group_size"), ({"dynamic": False}, "one for the tensor"),
    ({"type": "float", "symmetric": False}, "no zero point"), ({"dynamic": "local"}, "'local' with"),
    ({"dynamic": "sometimes"}, "dynamic must be"),
], ids=str)
def test_impossible_activations_cannot_be_made(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        ActivationArgs(**fields)


def test_activations_of_every_kind_have_a_name_of_their_own() -> None:
    kinds = {
        "w4a8_g32_xstatic": ActivationArgs(granularity="per_tensor", dynamic=False),
        "w4a8_g32_xstatic_xasym": ActivationArgs(granularity="per_tensor", dynamic=False, symmetric=False),
        "w4a8_g32_xtensor": ActivationArgs(granularity="per_tensor"), "w4a4_g32": ActivationArgs(bits=4),
        "w4afp8_g32": ActivationArgs(type="float"),
        "w4afp8_g32_xg128": ActivationArgs(type="float", granularity="per_group", group_size=128),
        "w4afp4_g32_xg16_xlocal": ActivationArgs(bits=4, type="float", granularity="per_group", group_size=16,
                                                 dynamic="local")}
    weight = WeightArgs(bits=4, granularity="per_group", group_size=32)
    assert {scheme_for(weight, kind).name: kind for kind in kinds.values()} == kinds


def test_preset_names_have_any_case_and_errors_name_the_closest() -> None:
    assert preset("W4A8") is preset("w4a8")
    with pytest.raises(RecipeError, match=r"'w4a9'; closest: w4a8"):
        preset("w4a9")


def test_with_group_size_and_family() -> None:
    small = preset("w4a8").with_group_size(32)
    assert (small.name, small.weight.group_size, small.family) == ("w4a8_g32", 32, "w4a8")
    assert preset("w8a8").with_group_size(64).weight.granularity == "per_group"
    assert preset("w4a16_asym").family == "w4a16"


def test_scheme_for_finds_the_preset_or_names_the_numbers() -> None:
    for name in BUILT_IN:
        if name != "int8":  # another name of w8a8
            assert scheme_for(PRESETS[name].weight, PRESETS[name].activation) is PRESETS[name]
    assert scheme_for(WeightArgs(bits=4, symmetric=False), ActivationArgs(symmetric=False)).name == (
        "w4a8_channel_asym_xasym")
    integer = WeightArgs(bits=4, granularity="per_group", group_size=32, scales="integer")
    assert scheme_for(integer, ActivationArgs()).name == preset("w4a8_int_scales").with_group_size(32).name
    assert scheme_for(WeightArgs(bits=4, granularity="per_group", group_size=32), None).name == "w4a16_g32"


class _Signs:
    def quantize(self, weight: Tensor, group_size: int) -> dict[str, Tensor]:
        return {"signs": weight >= 0}

    def dequantize(self, tensors: dict[str, Tensor], group_size: int) -> Tensor:
        return tensors["signs"].float() * 2 - 1


@pytest.mark.usefixtures("registry")
def test_register_scheme_with_a_codec() -> None:
    signs = Scheme(name="signs", weight=WeightArgs(bits=1, type="signs"))
    with pytest.raises(RecipeError, match="nothing defines"):
        register_scheme(signs)
    with pytest.raises(RecipeError, match=r"nothing defines \(known: int"):
        check_defined(signs)
    codec = _Signs()
    assert register_scheme(signs, codec=codec) is preset("signs")
    assert codec_of(signs.weight) is codec and codec_of(preset("w8a8").weight) is None
    assert torch.equal(codec.dequantize(codec.quantize(torch.tensor([[-2.0, 3.0]]), 2), 2), torch.tensor([[-1.0, 1.0]]))
    with pytest.raises(DuplicateRegistration, match="'signs' is registered already"):
        register_scheme(signs)
    with pytest.raises(DuplicateRegistration, match="has a definition already"):
        register_scheme(Scheme(name="signs2", weight=signs.weight), codec=codec)


@pytest.mark.parametrize("kind", [WeightArgs, ActivationArgs])
def test_symmetric_is_true_or_false(kind: type) -> None:
    with pytest.raises(RecipeError, match="symmetric must be True or False"):
        kind(bits=8, symmetric=[])
