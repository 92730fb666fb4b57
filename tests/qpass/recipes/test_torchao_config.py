"""Torchao configs: each becomes the scheme with its numbers, or an error that names the field in the way."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from qpass.errors import RecipeError
from qpass.recipes.recipe import Recipe, as_scheme
from qpass.recipes.recipe_files import as_recipe
from qpass.recipes.torchao_config import is_torchao, recipe_of_data
from qpass.scheme import ActivationArgs, WeightArgs, preset


@pytest.fixture(scope="module")
def ao() -> Any:
    return pytest.importorskip("torchao.quantization")


def group(bits: int, size: int, *, symmetric: bool = True) -> WeightArgs:
    return WeightArgs(bits=bits, granularity="per_group", group_size=size, symmetric=symmetric)


CASES = {
    "int4": (lambda ao: ao.Int4WeightOnlyConfig(), group(4, 128, symmetric=False), None),
    "int4-g32": (lambda ao: ao.Int4WeightOnlyConfig(group_size=32), group(4, 32, symmetric=False), None),
    "int8": (lambda ao: ao.Int8WeightOnlyConfig(), WeightArgs(bits=8), None),
    "int8-tensor": (lambda ao: ao.Int8WeightOnlyConfig(granularity=ao.PerTensor()),
                    WeightArgs(bits=8, granularity="per_tensor"), None),
    "int8-g64": (lambda ao: ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(64)), group(8, 64), None),
    "int8-int8": (lambda ao: ao.Int8DynamicActivationInt8WeightConfig(), WeightArgs(bits=8), ActivationArgs()),
    "int8-int8-asym": (lambda ao: ao.Int8DynamicActivationInt8WeightConfig(act_mapping_type=ao.MappingType.ASYMMETRIC),
                       WeightArgs(bits=8), ActivationArgs(symmetric=False)),
    "intx": (lambda ao: ao.IntxWeightOnlyConfig(weight_dtype=torch.int3), WeightArgs(bits=3), None),
    "intx-asym-g32": (lambda ao: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32),
                                                         mapping_type=ao.MappingType.ASYMMETRIC),
                      group(4, 32, symmetric=False), None),
    "int8-intx": (lambda ao: ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4), group(4, 32),
                  ActivationArgs(symmetric=False)),
}


@pytest.mark.parametrize("name", CASES)
def test_config_becomes_the_scheme_with_its_numbers(ao: Any, name: str) -> None:
    make, weight, activation = CASES[name]
    scheme = as_scheme(make(ao))
    assert scheme is not None
    assert (scheme.weight, scheme.activation) == (weight, activation)
    assert as_recipe(make(ao)) == Recipe(scheme) == Recipe(make(ao))
    assert Recipe.from_dict(Recipe(scheme).to_dict()).scheme == scheme


def test_a_preset_is_recognised(ao: Any) -> None:
    assert as_scheme(ao.Int8DynamicActivationInt8WeightConfig()) is preset("w8a8")
    assert as_scheme(ao.Int4WeightOnlyConfig()) is preset("w4a16_asym")


@pytest.mark.parametrize(("make", "message"), [
    (lambda ao: ao.Float8WeightOnlyConfig(), "Float8WeightOnlyConfig has no scheme here"),
    (lambda ao: ao.Int8DynamicActivationInt8WeightConfig(reduce_range=True), "reduce_range=True"),
    (lambda ao: ao.Int8DynamicActivationInt8WeightConfig(granularity=ao.PerTensor()), "activation granularity"),
    (lambda ao: ao.Int4WeightOnlyConfig(int4_choose_qparams_algorithm="hqq"), "int4_choose_qparams_algorithm"),
    (lambda ao: ao.IntxWeightOnlyConfig(scale_dtype=torch.float32), "scales"),
    (lambda ao: ao.IntxWeightOnlyConfig(mapping_type=ao.MappingType.SYMMETRIC_NO_CLIPPING_ERR), "NO_CLIPPING"),
], ids=["float8", "seven-bits", "per-tensor-activation", "hqq", "scale-dtype", "no-clipping"])
def test_what_a_scheme_cannot_say_is_refused(ao: Any, make: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        as_scheme(make(ao))


def test_configs_by_name(ao: Any) -> None:
    config = ao.FqnToConfig({"a.b": ao.Int8WeightOnlyConfig(), r"re:.*\.q": None,
                             "_default": ao.Int8DynamicActivationInt8WeightConfig()})
    recipe = as_recipe(config)
    assert recipe.scheme is preset("w8a8")
    assert [rule.target for rule in recipe.overrides] == ["a.b", r"re:(?:.*\.q)$"]
    assert recipe.overrides[0].scheme == as_scheme(ao.Int8WeightOnlyConfig()) and recipe.overrides[1].scheme is None


def test_configs_as_data_in_a_quantization_config(ao: Any, capfd: pytest.CaptureFixture[str]) -> None:
    from torchao.core.config import config_to_dict

    data = config_to_dict(ao.Int8DynamicActivationInt8WeightConfig())
    assert recipe_of_data(data) == Recipe("w8a8")
    hub = {"quant_method": "torchao", "quant_type": {"default": data}, "modules_to_not_convert": ["lm_head", "gate"]}
    assert as_recipe(hub) == Recipe("w8a8", ignore=["lm_head", "gate"])
    with pytest.raises(RecipeError, match="torchao cannot read its config"):
        recipe_of_data({"_type": "NoSuchConfig", "_data": {}})
    assert capfd.readouterr() == ("", "")


def test_torchao_is_known_by_its_class_and_not_imported() -> None:
    assert not is_torchao(preset("w4a8"))
    code = ("import sys; from qpass.recipes.recipe_files import as_recipe; as_recipe({'scheme': 'w4a8'}); "
            "assert not any(name.startswith(('torchao', 'yaml')) for name in sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)
