"""Recipe files: every dialect gives the recipe that it means, and what cannot be expressed is named."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qpass.errors import RecipeError
from qpass.recipes.algorithm import Gptq, Rotation, SmoothQuant
from qpass.recipes.recipe import Recipe
from qpass.recipes.recipe_dialects import group_scheme
from qpass.recipes.recipe_files import as_recipe
from qpass.scheme import ActivationArgs, Scheme, WeightArgs, preset

STAGED = """
default_stage:
  default_modifiers:
    QuantizationModifier:
      targets: [Linear]
      ignore: [lm_head, 're:.*mlp.gate$']
      scheme: W4A16_ASYM
      bypass_divisibility_checks: false
      requires_calibration_data: false
"""
GROUPS = """
quant_stage:
  quant_modifiers:
    SmoothQuantModifier: {smoothing_strength: 0.8}
    GPTQModifier:
      ignore: ["lm_head"]
      dampening_frac: 0.01
      config_groups:
        group_0:
          targets: ["re:.*q_proj", Conv1D]
          weights: {num_bits: 4, type: int, symmetric: true, strategy: channel, dynamic: false}
          input_activations: {num_bits: 8, type: int, symmetric: false, strategy: token, dynamic: true}
        group_1:
          targets: [Linear]
          weights: {num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 32}
"""
W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False}
A8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_names_schemes_and_recipes() -> None:
    own = Scheme(name="own", weight=WeightArgs(bits=5))
    assert as_recipe("W4A8") == as_recipe(preset("w4a8")) == as_recipe(Recipe("w4a8")) == Recipe("w4a8")
    assert as_recipe(own).scheme is own and as_recipe(None) == Recipe(None)
    assert as_recipe({"name": "own", "weight": {"bits": 5}}) == Recipe(own)
    for wrong in (4, ["w4a8"], torch.nn.Linear(2, 2)):
        with pytest.raises(RecipeError, match="not a recipe"):
            as_recipe(wrong)


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json", "YAML"])
def test_own_dict_in_a_file(tmp_path: Path, suffix: str) -> None:
    recipe = Recipe("w4a8", ignore=["lm_head"], overrides={"*.down_proj": "w8a8", "*.gate": None}, strict=True)
    path = write(tmp_path, f"r.{suffix}", json.dumps(recipe.to_dict()))  # JSON is YAML too
    assert as_recipe(path) == as_recipe(str(path)) == recipe


def test_yaml_of_ones_own(tmp_path: Path) -> None:
    path = write(tmp_path, "r.yaml", "scheme: w4a8\noverrides:\n  '*.down_proj': w8a8\n  lm_head:\n")
    assert as_recipe(path) == Recipe("w4a8", overrides={"*.down_proj": "w8a8", "lm_head": None})
    assert as_recipe(write(tmp_path, "name.yaml", "w8a8\n")) == Recipe("w8a8")


def test_llm_compressor_stages(tmp_path: Path) -> None:
    assert as_recipe(write(tmp_path, "r.yaml", STAGED)) == Recipe(
        None, ignore=["lm_head", "re:.*mlp.gate$"], overrides={"Linear": "w4a16_asym"})


def test_llm_compressor_config_groups_and_algorithms(tmp_path: Path) -> None:
    recipe = as_recipe(write(tmp_path, "r.yaml", GROUPS))
    assert {rule.target: rule.scheme for rule in recipe.overrides} == {
        "re:.*q_proj": preset("w4a8_channel"), "Conv1D": preset("w4a8_channel"),
        "Linear": Scheme(name="w4a16_g32", weight=preset("w4a16").with_group_size(32).weight)}
    assert recipe.ignore == ("lm_head",) and recipe.scheme is None
    assert recipe.algorithms == (SmoothQuant(alpha=0.8), Gptq(dampening_frac=0.01))


@pytest.mark.parametrize("order", ["weight", "static", None])
def test_an_order_of_columns_that_changes_nothing_on_disk_is_read(order: str | None) -> None:
    groups = {"g": {"targets": ["Linear"], "weights": {**W4, "actorder": order}}}
    assert as_recipe({"config_groups": groups}) == as_recipe({"config_groups": {"g": {"targets": ["Linear"],
                                                                                     "weights": W4}}})


def test_llm_compressor_modifiers() -> None:
    def of(name: str, **fields: object) -> object:
        return as_recipe({name: {"targets": ["Linear"], "scheme": "W4A16", **fields}}).algorithms

    assert of("GPTQModifier", block_size=64, actorder=None, offload_hessians=True) == (
        Gptq(block_size=64, actorder=None),)
    assert of("GPTQModifier", actorder="weight") == of("GPTQModifier") == (Gptq(),)
    assert of("SpinQuantModifier") == (Rotation(rotations=("R1", "R2")),)
    assert of("SpinQuantModifier", rotations=["R4"], transform_type="hadamard", transform_block_size=128) == (
        Rotation(rotations=("R4",), block=128),)
    for name, fields, message in (("GPTQModifier", {"actorder": "group"}, "use static"),
                                  ("SpinQuantModifier", {"transform_block_size": 64}, "for R4 alone"),
                                  ("SmoothQuantModifier", {"mappings": [["a", "b"]]}, "read from the model's graph"),
                                  ("GPTQModifier", {"sparsity": 0.5}, "sparsity=0.5, which cannot be expressed"),
                                  ("SpinQuantModifier", {"rotations": ["R1", "R3"]}, "queries and keys are not"),
                                  ("SpinQuantModifier", {"rotations": ["R1"], "learnable": True}, "not learned"),
                                  ("SparseGPTModifier", {}, "SparseGPTModifier asks for an algorithm")):
        with pytest.raises(RecipeError, match=message):
            of(name, **fields)


def test_llm_compressor_rotations_come_before_the_rest() -> None:
    recipe = as_recipe({"SpinQuantModifier": {"rotations": ["R1"], "transform_type": "hadamard"},
                        "GPTQModifier": {"targets": ["Linear"], "scheme": "W4A16", "ignore": ["lm_head"]}})
    assert recipe.algorithms == (Rotation(), Gptq())


def test_llm_compressor_one_modifier_and_short_forms() -> None:
    assert as_recipe({"targets": "Linear", "scheme": "W8A8", "ignore": ["lm_head"]}) == Recipe(
        None, ignore=["lm_head"], overrides={"Linear": "w8a8"})
    assert as_recipe({"QuantizationModifier": {"scheme": {"W4A8": ["re:.*mlp"], "W8A8": "Linear"}}}) == Recipe(
        None, ignore=[], overrides={"re:.*mlp": "w4a8", "Linear": "w8a8"})
    assert as_recipe({"config_groups": {"W8A16": ["Linear"]}}) == Recipe(None, ignore=[], overrides={"Linear": "w8a16"})


def test_transformers_quantization_config(tmp_path: Path) -> None:
    hub = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
           "config_groups": {"group_0": {"targets": ["Linear"], "weights": W4, "input_activations": A8}},
           "kv_cache_scheme": None, "quantization_status": "compressed"}
    expected = Recipe(None, ignore=["lm_head"], overrides={"Linear": "w4a8"})
    assert as_recipe(hub) == expected
    config = json.dumps({"model_type": "x", "quantization_config": hub})
    assert as_recipe(write(tmp_path, "config.json", config)) == expected


def test_transformers_config_object() -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    config = transformers.CompressedTensorsConfig(config_groups={"group_0": {"targets": ["Linear"], "weights": W4}},
                                                  ignore=["lm_head"])
    assert as_recipe(config) == Recipe(None, ignore=["lm_head"], overrides={"Linear": "w4a16"})


def test_every_compressed_tensors_preset_is_read_back_or_refused_by_name() -> None:
    quant_scheme = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
    read = set()
    for name in quant_scheme.PRESET_SCHEMES:
        group = quant_scheme.preset_name_to_scheme(name, ["Linear"]).model_dump(mode="json")
        try:
            read.add((name.lower(), group_scheme(group).name))
        except RecipeError as error:
            assert "group_0" in str(error)
    assert read == {(n, n) for n in (
        "w2a8", "w3a8", "w4a8", "w5a8", "w6a8", "w7a8", "w2a16", "w3a16", "w4a16", "w5a16", "w6a16", "w7a16", "w8a16",
        "w4a16_asym", "w8a8", "w2a4", "w3a4", "w4a4", "w4afp8")} | {("int8", "w8a8")}


def test_vllm_online_dict() -> None:
    recipe = as_recipe({"linear": {"weight": "int8_per_channel_static", "activation": "int8_per_token"},
                        "moe": "int8_per_channel_weight_only", "ignore": ["re:.*gate$"],
                        "targets": {"*.down_proj": "w4a8", "*.o_proj": None}})
    assert recipe == Recipe(None, ignore=["re:.*gate$"], overrides={
        "linear": "w8a8", "experts": Scheme(name="w8a16_channel", weight=WeightArgs(bits=8)),
        "*.down_proj": "w4a8", "*.o_proj": None})
    assert as_recipe({"linear": "w4a8"}).ignore is None


@pytest.mark.parametrize(("data", "message"), [
    ({}, "empty recipe"),
    ({"shceme": "w4a8"}, "unknown recipe key 'shceme'; allowed: scheme"),
    ({1: 2}, "keys of a recipe are strings"),
    ({"quant_method": "gptq", "bits": 4}, "describes a checkpoint.*qpass.load"),
    ({"quant_method": "awq"}, "describes a checkpoint"),
    ({"quant_method": "newest"}, "'newest' is not one that can be read"),
    ({"quant_method": "compressed-tensors"}, "config_groups must map"),
    ({"quant_method": "compressed-tensors", "kv_cache_scheme": A8, "config_groups": {}}, "kv_cache_scheme"),
    ({"targets": ["Linear"], "scheme": "W9A9"}, "'W9A9' cannot be expressed here: no scheme is named 'W9A9'"),
    ({"targets": ["Linear"], "scheme": "W4A8", "config_groups": {"W4A8": ["Linear"]}}, "both scheme and config_groups"),
    ({"targets": ["Linear"], "scheme": "W4A8", "kv_cache_scheme": A8}, "kv_cache_scheme"),
    ({"targets": ["Linear"], "scheme": "W4A8", "weight_observer": "mse"}, "weight_observer='mse'"),
    ({"targets": ["Linear"]}, "quantizes nothing"),
    ({"x_stage": {"y_modifiers": {"QuantizationModifier": {"scheme": "W4A8"}, "oops": 1}}}, "unknown key 'oops'"),
    ({"x_stage": {"y_modifiers": {"QuantizationModifier": 3}}}, "must be a mapping"),
    ({"config_groups": {"g": {"weights": W4}}}, "'g' has no targets"),
    ({"config_groups": {"g": {"targets": ["L"]}}}, "no weights"),
    ({"config_groups": {"g": {"targets": ["L"], "weights": {**W4, "type": "float"}}}}, "type='float'.*allowed: 'int'"),
    ({"config_groups": {"g": {"targets": ["L"], "weights": {**W4, "strategy": "block"}}}}, "strategy='block'"),
    ({"config_groups": {"g": {"targets": ["L"], "weights": {**W4, "actorder": "group"}}}}, "actorder='group'"),
    ({"config_groups": {"g": {"targets": ["L"], "weights": {**W4, "observer": "mse"}}}}, "observer='mse'"),
    ({"config_groups": {"g": {"targets": ["L"], "weights": W4, "input_activations": {**A8, "dynamic": False}}}},
     "one for the tensor"),
    ({"config_groups": {"g": {"targets": ["L"], "weights": W4, "input_activations": {**A8, "num_bits": 6}}}},
     "num_bits=6"),
    ({"config_groups": {"g": {"targets": ["L"], "weights": W4, "output_activations": A8}}}, "output activations"),
    ({"linear": "lut_b"}, "linear asks for 'lut_b'.*int8_per_channel_static"),
    ({"linear": {"weight": "int8_per_channel_static", "activation": "fp8"}}, "cannot be expressed"),
    ({"linear": "w4a8", "lin": 3}, "unknown key 'lin' in a vLLM"),
], ids=lambda value: str(value)[:60])
def test_what_cannot_be_expressed_is_named(data: dict[Any, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        as_recipe(data)


@pytest.mark.parametrize(("name", "text", "message"), [
    ("r.json", "{", "is not JSON"),
    ("r.yaml", "a: [", "is not YAML"),
    ("r.yaml", "!!python/object/apply:os.getcwd []", "is not YAML"),
    ("r.yaml", "- w4a8", "top level must be a mapping"),
    ("r.yaml", "scheme: w4a8\noverrides: {a: w8a8, a: w4a16}\n", "line 2: 'a' is given twice"),
    ("r.json", '{"scheme": "w4a8", "scheme": "w8a8"}', "'scheme' is given twice"),
    ("r.yaml", "scheme: w4a9\n", "r.yaml: no scheme is named 'w4a9'"),
    ("r.txt", "scheme: w4a8\n", "name must end in"),
], ids=lambda value: value[:30])
def test_files_that_are_no_recipe(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        as_recipe(write(tmp_path, name, text))


def test_a_path_that_is_no_file_name_of_a_recipe(tmp_path: Path) -> None:
    for path in (str(tmp_path), write(tmp_path, "r.cfg", "scheme: w4a8")):
        with pytest.raises(RecipeError, match=r"is no recipe file|must end in \.yaml"):
            as_recipe(path)
        with pytest.raises(RecipeError, match=r"must end in \.yaml"):
            as_recipe(str(path))


def test_missing_file_is_named() -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe nowhere\.yaml"):
        as_recipe("nowhere.yaml")


def test_missing_pyyaml_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import qpass.recipes.recipe_files

    def refuse(name: str) -> Any:
        raise builtins.ImportError(name)

    monkeypatch.setattr(qpass.recipes.recipe_files, "import_module", refuse)
    with pytest.raises(RecipeError, match="pip install pyyaml"):
        as_recipe(write(tmp_path, "r.yaml", "scheme: w4a8"))


def test_group_scheme_reads_the_older_short_forms() -> None:
    assert group_scheme({"weights": {"num_bits": 8, "group_size": -1}}).weight == WeightArgs(bits=8)
    assert group_scheme({"weights": {"num_bits": 8}}).weight == WeightArgs(bits=8, granularity="per_tensor")
    group = {"weights": {**W4, "group_size": 64}, "input_activations": {**A8, "symmetric": False}}
    assert group_scheme(group) == Scheme(
        name="w4a8_g64_xasym", weight=preset("w4a8").with_group_size(64).weight,
        activation=ActivationArgs(symmetric=False))


@pytest.mark.parametrize(("name", "preset"), [
    ("fp8_per_tensor", "fp8_per_tensor"), ("fp8_per_channel", "fp8_dynamic"), ("fp8_per_block", "fp8_block"),
    ("mxfp8", "mxfp8"), ("mxfp4", "mxfp4"), ("int8_per_channel_weight_only", "w8a16_channel")])
def test_names_of_online_quantization(name: str, preset: str) -> None:
    from qpass.scheme import PRESETS

    assert as_recipe(name).scheme == PRESETS[preset]
    assert as_recipe({"linear": name}).overrides[0].scheme == PRESETS[preset]


def test_pairs_of_online_quantization() -> None:
    made = as_recipe({"linear": {"weight": "fp8_per_block_static", "activation": "fp8_per_block_dynamic"}})
    assert made.overrides[0].scheme is not None and made.overrides[0].scheme.name == "fp8_block"
