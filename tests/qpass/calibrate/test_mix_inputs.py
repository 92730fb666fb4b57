"""Mixed inputs: what follows an activation function is mixed when the model runs, and is saved and read so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qpass
from qpass.errors import CheckpointError, RecipeError
from qpass.hadamard import multiply_blocks, sylvester
from qpass.layers.reordered_linear import ReorderedLinear
from tests.qpass.calibrate.small_models import output_error, output_of, small_model, tokens

DOWN = {"llama": "mlp.down_proj", "qwen3": "mlp.down_proj", "gemma3": "mlp.down_proj", "gpt2": "mlp.c_proj",
        "phi": "mlp.fc2", "bert": "output.dense", "mpnet": "output.dense"}


def mixed_layers(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, ReorderedLinear) and layer.hadamard]


def spiked() -> nn.Module:
    """A Llama in which one channel of SiLU times up is far larger than the others."""
    model = small_model("llama")
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.mlp.up_proj.weight.data[[7, 90]] *= 40
        layer.mlp.down_proj.weight.data[:, [7, 90]] /= 40
    return model


@pytest.mark.parametrize(("width", "size"), [(24, 8), (64, 64), (96, 32), (6, 2), (5, 1)])
def test_blocks(width: int, size: int) -> None:
    x = torch.randn(3, 2, width)
    want = x.double() @ torch.block_diag(*[sylvester(size).double() / size**0.5] * (width // size))
    torch.testing.assert_close(multiply_blocks(x, size).double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(multiply_blocks(multiply_blocks(x, size), size), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in DOWN
                                             if name != "llama")])
def test_every_architecture(name: str, tmp_path: Path) -> None:
    model, data = small_model(name), tokens(3)
    recipe = {"scheme": "w8a16", "algorithms": [{"rotation": {"rotations": ["R4"]}}]}
    qpass.quantize(model, recipe, progress=False)
    layers = mixed_layers(model)
    assert len(layers) == 2 and all(layer.endswith(DOWN[name]) for layer in layers)
    assert output_error(model, small_model(name), data) < 1e-3
    assert not any(module._forward_pre_hooks for module in model.modules())
    said = {row.name for row in qpass.explain(model).rows if "mixed in blocks of 128 by a Hadamard" in row.reason}
    assert said == {f"{layer}.weight" for layer in layers}
    qpass.save(model, tmp_path / "saved")
    back = qpass.load(tmp_path / "saved")
    assert mixed_layers(back) == layers and torch.equal(output_of(back, data[0]), output_of(model, data[0]))


@pytest.mark.parametrize("algorithms", [[], ["gptq"], ["smoothquant"]], ids=["nearest", "gptq", "smoothquant"])
def test_outliers_cost_less(algorithms: list[Any]) -> None:
    data, reference = tokens(6), spiked()
    steps = [{"rotation": {"rotations": ["R4"], "block": 64}}, *algorithms]
    plain = qpass.quantize(spiked(), {"scheme": "w8a8", "ignore": ["lm_head"]}, progress=False)
    mixed = qpass.quantize(spiked(), {"scheme": "w8a8", "ignore": ["lm_head"], "algorithms": steps},
                           calibration=data if algorithms else None, progress=False)
    sizes = {layer.hadamard for layer in mixed.modules() if isinstance(layer, ReorderedLinear)}
    assert sizes - {None} == {64}
    assert output_error(mixed, reference, data) < 0.7 * output_error(plain, reference, data)
    floats = output_of(qpass.dequantize(mixed), data[0])
    assert (floats - output_of(reference, data[0])).norm() < 0.05 * floats.norm()


def test_compressed_tensors_reads_what_is_written(tmp_path: Path) -> None:
    transform = pytest.importorskip("compressed_tensors.transform")
    model = small_model("llama")
    qpass.quantize(model, {"scheme": "w8a16", "algorithms": [{"rotation": {"rotations": ["R4"]}}]}, progress=False)
    qpass.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    read = transform.TransformConfig(**config["transform_config"])
    plain = qpass.dequantize(model)  # the weights with the mixing taken back out
    x = torch.randn(5, 128)
    layer = nn.Linear(128, 64, bias=False)
    layer.weight.data = multiply_blocks(plain.get_submodule("model.layers.0.mlp.down_proj").weight.data, 128)
    holder = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({
        "down_proj": layer})})])})})
    for scheme in read.config_groups.values():
        scheme.apply = [part for part in scheme.apply if part.is_online()]  # the others are in the file's weights
    transform.apply_transform_config(holder, read)
    want = plain.get_submodule("model.layers.0.mlp.down_proj")(x)
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("change", "why"), [
    ({"type": "random-matrix"}, "random-matrix"), ({"randomize": True}, "permuted at random"),
    ({"apply": [{"targets": ["Linear"], "location": "output"}]}, "'output'"), ({"head_dim": 48}, "no power of two")])
def test_other_transforms_are_refused(change: dict[str, Any], why: str, tmp_path: Path) -> None:
    model = small_model("llama")
    qpass.quantize(model, {"scheme": "w8a16", "algorithms": [{"rotation": {"rotations": ["R4"]}}]}, progress=False)
    qpass.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["transform_config"]["config_groups"]["R4"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=why):
        qpass.load(tmp_path)


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_formats_that_do_not_mix_refuse(format: str, tmp_path: Path) -> None:
    scheme = qpass.PRESETS["w4a16_asym" if format == "awq" else "w4a16"].with_group_size(32)
    recipe = qpass.Recipe(scheme, algorithms=[{"rotation": {"rotations": ["R4"]}}])
    model = qpass.quantize(small_model("llama"), recipe, progress=False)
    with pytest.raises(CheckpointError, match="does not mix inputs"):
        qpass.save(model, tmp_path / "saved", format=format)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_compiled_graph_mixes_and_rounds() -> None:
    torch.manual_seed(0)
    model, x = Mlp().eval(), torch.randn(1, 5, 64)
    qpass.quantize(model, {"scheme": "w8a8", "algorithms": [{"rotation": {"rotations": ["R4"]}}]}, progress=False,
                   example_inputs=x)
    assert mixed_layers(model) == ["down"]
    want = model(x)
    with torch.no_grad():
        got = torch.compile(model)(x)
    assert (got - want).norm() < 0.02 * want.norm()
    row = next(row for row in qpass.explain(model).rows if row.name == "down.weight")
    assert "in the kernel" not in row.activation, row.activation  # it stands in the graph, after the mixing


def test_settings() -> None:
    with pytest.raises(RecipeError, match="R1, R2, R4"):
        qpass.Recipe("w4a16", algorithms=[{"rotation": {"rotations": ["R3"]}}])
    with pytest.raises(RecipeError, match="power of two"):
        qpass.Recipe("w4a16", algorithms=[{"rotation": {"rotations": ["R4"], "block": 48}}])
    recipe = qpass.Recipe("w4a16", algorithms=[{"rotation": {"rotations": ["r1", "R4"]}}])
    assert qpass.Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
