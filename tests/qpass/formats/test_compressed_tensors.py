"""compressed-tensors: each scheme there and back, what a damaged weight says, and the package itself as oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qpass.errors import CheckpointError
from qpass.formats import compressed_tensors_config_writer
from qpass.formats.compressed_tensors import describe_weight, names_on_disk, read_weight, write_weight
from qpass.formats.compressed_tensors_config import read_config
from qpass.formats.compressed_tensors_config_writer import write_config
from qpass.layers.packed_layers import QuantLinear
from qpass.layers.quant_weight import QuantWeight
from qpass.scheme import PRESETS, Scheme
from qpass.spec import LinearSpec
from qpass.weight import dequantize_weight, quantize_weight

SCHEMES = ["w4a8", "w8a8", "w4a16", "w4a16_asym", "w8a16", "w2a16", "w3a16", "w7a8", "w4a8_channel"]


def spec_of(scheme: Scheme, n: int = 40, k: int = 96, group: int | None = 32) -> LinearSpec:
    weight = replace(scheme.weight, group_size=group) if scheme.weight.group_size else scheme.weight
    return LinearSpec(family=scheme.family, weight=weight, activation=scheme.activation, out_features=n, in_features=k)


@pytest.mark.parametrize("name", SCHEMES)
def test_round_trip(name: str) -> None:
    spec = spec_of(PRESETS[name])
    weight = quantize_weight(torch.randn(40, 96, dtype=torch.bfloat16), spec)
    written = write_weight(weight, spec)
    assert tuple(written) == names_on_disk(spec)
    assert {key: (t.dtype, tuple(t.shape)) for key, t in written.items()} == describe_weight(weight, spec)
    back = read_weight(written, spec)
    assert back.tensors.keys() == weight.tensors.keys()
    assert all(torch.equal(back.tensors[key], weight.tensors[key]) for key in weight.tensors)


def _oracle(spec: LinearSpec, layout: str) -> tuple[Any, Any]:
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationScheme

    packed = QuantLinear(quantize_weight(torch.randn(spec.out_features, spec.in_features), spec), None, spec,
                         torch.float32)
    config = write_config(nn.Sequential(packed))
    assert config is not None
    group = {**config["config_groups"]["group_0"], "format": layout}
    return compressors.BaseCompressor.get_value_from_registry(layout), QuantizationScheme(**group)


@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized"])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_package_writes_what_is_read_and_reads_what_is_written(name: str, layout: str) -> None:
    spec = spec_of(PRESETS[name])
    compressor, scheme = _oracle(spec, layout)
    weight = quantize_weight(torch.randn(40, 96, dtype=torch.float32), spec)
    plain = dequantize_weight(weight, spec)
    given: dict[str, Tensor] = {"weight": plain, "weight_scale": weight.scale}
    if weight.zero_point is not None:
        given["weight_zero_point"] = weight.zero_point
    theirs = compressor.compress(given, scheme)
    assert torch.equal(dequantize_weight(read_weight(dict(theirs), spec), spec), plain)
    mine = write_weight(weight, spec)
    if ("weight_packed" in mine) == (layout == "pack-quantized"):
        assert torch.equal(compressor.decompress(mine, scheme)["weight"].float(), plain)


@pytest.mark.parametrize(("damage", "said"), [
    (lambda t: {**t, "weight_shape": torch.tensor([40, 95])}, r"weight_shape says \[40, 95\], the layer is \[40, 96\]"),
    (lambda t: {**t, "weight_packed": t["weight_packed"][:, 1:]}, "need int32 rows of 12 words"),
    (lambda t: {**t, "weight_packed": t["weight_packed"][1:]}, "weight_packed has 39 rows"),
    (lambda t: {**t, "weight_scale": t["weight_scale"][:, :2]}, r"weight_scale is \(40, 2\), expected \(40, 3\)"),
    (lambda t: {**t, "weight_scale": t["weight_scale"].int()}, "weight_scale is torch.int32"),
    (lambda t: {**t, "weight_scale": t["weight_scale"] * float("nan")}, "weight_scale holds NaN"),
    (lambda t: {**t, "weight_zero_point": t["weight_zero_point"][:, :2]}, "weight_zero_point"),
    (lambda t: {**t, "weight_zero_point": t["weight_zero_point"][:2]}, "weight_zero_point"),
], ids=["shape", "width", "rows", "scale shape", "scale dtype", "scale nan", "zero point groups", "zero point rows"])
def test_a_damaged_weight_says_which_tensor(damage: Callable[[dict[str, Tensor]], dict[str, Tensor]],
                                            said: str) -> None:
    spec = spec_of(PRESETS["w4a16_asym"])
    written = write_weight(quantize_weight(torch.randn(40, 96), spec), spec)
    with pytest.raises(ValueError, match=said):
        read_weight(damage(written), spec)


def test_codes_out_of_range_are_refused() -> None:
    spec = spec_of(PRESETS["w4a8"])
    weight = quantize_weight(torch.randn(40, 96), spec)
    tensors = {"weight": weight.qweight.clone(), "weight_scale": weight.scale}
    assert torch.equal(read_weight(tensors, spec).qweight, weight.qweight)
    tensors["weight"][3, 3] = 100
    with pytest.raises(ValueError, match="4 bits hold -8 to 7"):
        read_weight(tensors, spec)


def layer(name: str, group: int | None = 32) -> QuantLinear:
    spec = spec_of(PRESETS[name], group=group)
    return QuantLinear(quantize_weight(torch.randn(40, 96), spec), None, spec, torch.float32)


def test_config_of_one_group_is_by_class_and_ignore() -> None:
    model = nn.Sequential(layer("w4a8"), nn.Linear(96, 96), layer("w4a8"))
    config = write_config(model, {"scheme": "w4a8"})
    assert config is not None and config["format"] == "pack-quantized"
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"] and config["ignore"] == ["1"]
    read = read_config(config, "config.json")
    assert read.recipe == {"scheme": "w4a8"}
    assert [read.group_of(name, ("Linear",)) is not None for name in "012"] == [True, False, True]
    assert read.groups[0].spec(40, 96) == spec_of(PRESETS["w4a8"])


def test_config_of_mixed_schemes_is_by_name() -> None:
    model = nn.Sequential(layer("w4a8"), layer("w8a8"), layer("w4a16_asym"), layer("w4a8", 48))
    config = write_config(model)
    assert config is not None and config["format"] == "mixed-precision"
    read = read_config(config, "config.json")
    for name, packed in model.named_children():
        group = read.group_of(name, ("Linear",))
        assert group is not None and group.spec(40, 96) == packed.spec


def test_config_of_a_parameter_tells_how_it_is_stored() -> None:
    spec = spec_of(PRESETS["w4a8"])
    holder = nn.Module()
    holder.add_module("w", QuantWeight(quantize_weight(torch.randn(40, 96), spec), spec, torch.float32,
                                       transposed=True))
    config = write_config(nn.Sequential(holder))
    assert config is not None
    read = read_config(config, "config.json")
    assert read.storage == {"0.w": {"weight": None, "bias": None, "transposed": True}}
    assert read.group_of("0.w", ()) is not None


def test_no_packed_layer_no_config() -> None:
    assert write_config(nn.Sequential(nn.Linear(4, 4))) is None


def test_targets_match_as_in_compressed_tensors() -> None:
    config = write_config(nn.Sequential(layer("w4a8")))
    assert config is not None
    group = config["config_groups"]["group_0"]
    other = {**group, "weights": {**group["weights"], "num_bits": 8}}
    read = read_config({**config, "config_groups": {"by_class": group, "by_name": {**other, "targets": ["a.b"]},
                                                    "by_regex": {**other, "targets": [r"re:a\..*"]}},
                        "ignore": ["re:.*skip$"]}, "config.json")
    found = {name: read.group_of(name, ("Linear",)) for name in ("a.b", "a.c", "b", "a.skip")}
    assert {name: group and group.name for name, group in found.items()} == {
        "a.b": "by_name", "a.c": "by_regex", "b": "by_class", "a.skip": None}
    assert read.group_of("b", ("Embedding", "Module")) is None


@pytest.mark.parametrize("fields", [
    {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True},
    {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True},
    {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True, "symmetric": True},
    {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local",
     "symmetric": True},
], ids=["static", "fp8 token", "fp8 group", "nvfp4"])
def test_activations_of_every_kind_are_read_and_written_back(fields: dict[str, Any]) -> None:
    config = write_config(nn.Sequential(layer("w4a8")))
    assert config is not None
    group = {**config["config_groups"]["group_0"], "input_activations": fields}
    (read,) = read_config({**config, "config_groups": {"group_0": group}}, "config.json").groups
    assert read.activation is not None
    written = compressed_tensors_config_writer._activations(read.activation)
    assert {key: written[key] for key in fields} == fields
    spec = read.spec(8, 128)
    assert LinearSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(("change", "said"), [
    ({"quant_method": "gptq"}, "'gptq'"),
    ({"format": "marlin-24"}, "'marlin-24'"),
    ({"config_groups": {}}, "no config_groups"),
    ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    ({"weights": {"type": "float", "num_bits": 5}}, "float5"),
    ({"weights": {"strategy": "block"}}, "'block'"),
    ({"weights": {"num_bits": 11}}, "1 to 8"),
    ({"input_activations": {"num_bits": 16, "type": "float", "strategy": "token", "dynamic": True}}, "4 or 8 bits"),
    ({"input_activations": {"num_bits": 8, "strategy": "token", "dynamic": False}}, "one for the tensor"),
], ids=["gptq", "marlin", "no groups", "sparse", "float5", "block", "bits", "16 x", "static x"])
def test_what_cannot_be_read_is_named(change: dict[str, Any], said: str) -> None:
    config = write_config(nn.Sequential(layer("w4a8")))
    assert config is not None
    group = config["config_groups"]["group_0"]
    if "weights" in change:
        change = {"config_groups": {"group_0": {**group, "weights": {**group["weights"], **change["weights"]}}}}
    elif "input_activations" in change:
        change = {"config_groups": {"group_0": {**group, **change}}}
    with pytest.raises(CheckpointError, match=r"folder/config\.json") as error:
        read_config({**config, **change}, "folder/config.json")
    assert said in str(error.value)


@pytest.mark.parametrize("targets", [1.5, "Linear", [3], {"Linear": 1}], ids=str)
def test_targets_must_be_names(targets: Any) -> None:
    config = write_config(nn.Sequential(layer("w4a8")))
    assert config is not None
    group = {**config["config_groups"]["group_0"], "targets": targets}
    with pytest.raises(CheckpointError, match="targets are"):
        read_config({**config, "config_groups": {"group_0": group}}, "config.json")


def test_activations_must_be_fields() -> None:
    config = write_config(nn.Sequential(layer("w4a8")))
    assert config is not None
    group = {**config["config_groups"]["group_0"], "input_activations": [0, 0]}
    with pytest.raises(CheckpointError, match="input_activations are"):
        read_config({**config, "config_groups": {"group_0": group}}, "config.json")
