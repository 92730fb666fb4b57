"""Checkpoints of the real tools: each decodes to what its tool decodes, the rest of it is untouched, and it runs.

Format, variant, modules compared and the largest difference are listed at the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import qpass
from qpass.codecs.affine import unpack_unsigned
from qpass.find.experts_rows import as_stored
from qpass.layers.experts_layer import QuantExperts
from qpass.layers.packed_layers import PackedWeight
from tests.qpass.formats.fixture_folders import digest, every_fixture

pytest.importorskip("transformers", reason="Transformers is not installed")

FIXTURES = every_fixture()


def in_float16(layer: PackedWeight) -> Tensor:
    """AutoRound's 8 bits: (q - zero) and the scale are float16, their product is rounded to it."""
    return layer.dequantize(torch.float32).half().float()


def shifted_in_bfloat16(layer: PackedWeight) -> Tensor:
    """quanto's qint4: q * scale is rounded to bfloat16 before the shift is taken away, and the difference again."""
    found = layer.canonical().tensors
    codes = unpack_unsigned(found["packed"], layer.spec.weight.bits, layer.spec.in_features)
    q = codes.bfloat16().unflatten(1, (layer.spec.groups, -1))
    return (q * found["scale"].bfloat16()[..., None] + found["offset"].bfloat16()[..., None]).flatten(1).float()


# Variants whose tool rounds on the way: what it computes, step by step, from the numbers that were read.
AS_THE_TOOL: dict[str, Callable[[PackedWeight], Tensor]] = {
    "autoround/ar_w8_g32": in_float16, "quanto/int4": shifted_in_bfloat16}
# The tool gives bfloat16: what is decoded here must be that, once rounded.
ROUNDED = ("torchao/", "quanto/", "quark/", "autoround/fp8_static")
# Logits of the tool with activations rounded as no kernel here does, or of a random model whose weights AWQ scaled.
LOOSE = ("/mxfp4", "/mxfp6", "/nvfp4", "/fp8", "moe_fp8", "awq", "quark/int8")


def decoded(model: nn.Module, name: str) -> Tensor:
    """float32 [N, K] of the weight that a reference calls `name`; an expert's stands in a fused parameter."""
    path, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        return expert(model, path)
    if isinstance(owner, QuantExperts):
        return fused(owner, leaf)
    return owner.dequantize(torch.float32) if isinstance(owner, PackedWeight) else getattr(owner, leaf).float()


def fused(owner: QuantExperts, leaf: str) -> Tensor:
    """A parameter of packed experts as the module stored it."""
    site, which = owner.site, int(not owner.site.is_first(leaf))
    each = [owner.dequantize(which, expert, torch.float32) for expert in range(site.experts)]
    each = each if which else [as_stored(site, rows)[site.first.index(leaf)] for rows in each]
    return torch.stack([weight.t() if site.transposed[which] else weight for weight in each])


def expert(model: nn.Module, path: str) -> Tensor:
    """`...experts.3.up_proj` of a model whose experts are gate_up_proj [E, 2I, H] and down_proj [E, H, I]."""
    experts, number, projection = path.rsplit(".", 2)
    owner, which = model.get_submodule(experts), int(projection == "down_proj")
    if isinstance(owner, QuantExperts):
        whole = owner.dequantize(which, int(number), torch.float32)
    else:
        whole = getattr(owner, ("gate_up_proj", "down_proj")[which])[int(number)].detach().float()
    return whole if which else whole.chunk(2)[("gate_proj", "up_proj").index(projection)]


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Lines that are printed when all is done, also where pytest keeps what tests print."""
    lines: list[str] = []
    yield lines
    capture: Any = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n" + "\n".join(sorted(lines)))


@pytest.mark.parametrize("name", [name for name in FIXTURES if name.endswith("(small)")])
def test_decodes_to_the_digests_of_the_tool(name: str, table: list[str]) -> None:
    digests = json.loads((FIXTURES[name] / "reference.json").read_text())
    model = qpass.load(FIXTURES[name])
    dtype = getattr(torch, digests.pop("__rounded__", "float32"))
    assert {key: digest(decoded(model, key).to(dtype)) for key in digests} == digests
    untouched(model, FIXTURES[name], set(digests))
    table.append(f"{name:44} {len(digests):3} modules  largest difference 0 (equal digests)")


@pytest.mark.parametrize("name", [name for name in FIXTURES if "(small)" not in name])
def test_decodes_as_the_tool_does(name: str, table: list[str]) -> None:
    folder = FIXTURES[name]
    reference = load_file(folder / "reference.safetensors")
    model = qpass.load(folder)
    report = qpass.explain(model)
    compared, largest = 0, 0.0
    for key, weight in reference.items():
        if not key.startswith(("__", "gguf:")):
            found = decoded(model, key)
            if name in AS_THE_TOOL:
                layer: Any = model.get_submodule(key.removesuffix(".weight"))
                found = AS_THE_TOOL[name](layer)
            found = found.bfloat16().float() if name.startswith(ROUNDED) else found
            difference = float((found - weight.float()).abs().max())
            assert difference == 0, f"{key} differs by {difference}"
            compared, largest = compared + 1, max(largest, difference)
        elif key.startswith("__prequant__."):
            compared += within_half_a_step(model, key.removeprefix("__prequant__."), weight)
    assert compared
    untouched(model, folder, set(reference))
    assert report.counts["quantized"], str(report)
    if "__logits__" in reference:
        logits, wanted = model.float()(reference["__input_ids__"]).logits, reference["__logits__"].float()
        assert (logits - wanted).abs().max() < (0.45 if any(w in name for w in LOOSE) else 0.1) * wanted.abs().max()
    table.append(f"{name:44} {compared:3} modules  largest difference {largest:.3g}")


def within_half_a_step(model: nn.Module, name: str, weight: Tensor) -> int:
    """The tool has no decoder for its packing: the integers are the float weight handed to the packer, rounded."""
    layer: Any = model.get_submodule(name.removesuffix(".weight"))
    canonical = layer.canonical()
    scale = canonical.scale.float().repeat_interleave(layer.spec.group_size, dim=1)
    steps = (canonical.qweight.float() - weight.float() / scale).abs()
    assert steps[canonical.qweight < 7].max() < 0.51
    return 1


def untouched(model: nn.Module, folder: Path, quantized: set[str]) -> None:
    """What the checkpoint holds in float is in the model, bit for bit."""
    if not (folder / "model.safetensors").is_file():
        return
    state = {name: p for name, p in model.named_parameters(remove_duplicate=False)}
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():
            if name in state and name not in quantized and file.get_slice(name).get_dtype() in ("F32", "F16", "BF16"):
                assert torch.equal(state[name].detach(), file.get_tensor(name).to(state[name].dtype)), name


def test_every_format_of_the_repository_is_there() -> None:
    if not FIXTURES:
        pytest.skip("no fixtures in the repository nor beside it; QPASS_FIXTURES names their folder")
    assert {name.split("/")[0] for name in FIXTURES} >= {"compressed-tensors", "gptq", "awq", "autoround"}
