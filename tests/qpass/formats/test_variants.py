"""Variants that no tool here could write: built by the format's definition, and read back number for number."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import qpass
from qpass.errors import CheckpointError
from qpass.formats.bits import pack_rows

transformers = pytest.importorskip("transformers")
N, K = 64, 96
LAYER = "model.layers.0.mlp.gate_proj"
Tensors = dict[str, Tensor]


def small(**sizes: int) -> Any:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**{
        "hidden_size": K, "intermediate_size": N, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 64, "tie_word_embeddings": False,
        **sizes})
    return transformers.LlamaForCausalLM(config).eval()


def write(folder: Path, quantization: dict[str, Any], layer: Tensors, decoded: Tensor, *,
          metadata: dict[str, str] | None = None, **sizes: int) -> Any:
    """A float checkpoint but for `LAYER`, which has these tensors; and the model with what they decode to."""
    model = small(**sizes)
    model.get_submodule(LAYER).weight.data = decoded.float()
    tensors = {name: p.detach().clone() for name, p in model.named_parameters() if name != f"{LAYER}.weight"}
    tensors |= {f"{LAYER}.{name}": tensor.contiguous() for name, tensor in layer.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt", **(metadata or {})})
    config = json.loads(model.config.to_json_string())
    config |= {"architectures": [type(model).__name__], "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def same(loaded: Any, model: Any) -> None:
    """The layer is packed with the very numbers, and the model computes with them."""
    packed = loaded.get_submodule(LAYER)
    assert torch.equal(packed.dequantize(torch.float32), model.get_submodule(LAYER).weight)
    ids = torch.arange(2, 12)[None]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert any(row.status == "quantized" for row in qpass.explain(loaded).rows)


def gptq_layer(group: Tensor, groups: int) -> tuple[Tensors, Tensor]:
    """GPTQ version 2, 4 bits, asymmetric, whose column k is in group[k]."""
    q, zeros = torch.randint(0, 16, (N, K)), torch.randint(0, 16, (N, groups))
    scale = (torch.rand(N, groups) + 0.5).half() * 0.02
    decoded = (q - zeros[:, group]) * scale.float()[:, group]
    layer = {"qweight": pack_rows((q - 8).to(torch.int8), 4).t(), "scales": scale.t(),
             "qzeros": pack_rows((zeros.t() - 8).to(torch.int8).contiguous(), 4), "g_idx": group.to(torch.int32)}
    return layer, decoded


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "checkpoint_format": "gptq_v2"}


@pytest.mark.parametrize("order", ["as they stand", "by activation", "no g_idx"])
def test_gptq_groups_that_do_not_divide_the_inputs(tmp_path: Path, order: str) -> None:
    group = torch.arange(K) // 64
    layer, decoded = gptq_layer(group[torch.randperm(K)] if order == "by activation" else group, 2)
    if order == "no g_idx":
        del layer["g_idx"]
    model = write(tmp_path, {**GPTQ, "desc_act": order == "by activation"}, layer, decoded)
    same(qpass.load(tmp_path), model)
    qpass.save(loaded := qpass.load(tmp_path), tmp_path / "saved")
    same(qpass.load(tmp_path / "saved"), model)
    assert loaded.get_submodule(LAYER).spec.weight.type == "int_columns"


@pytest.mark.parametrize(("group", "said"), [(torch.zeros(K).long(), "96 inputs into a group"),
                                             (torch.arange(K) // 32, "0 to 2, and there are 2 groups")])
def test_gptq_groups_that_cannot_be(tmp_path: Path, group: Tensor, said: str) -> None:
    layer, decoded = gptq_layer(torch.arange(K) // 64, 2)
    write(tmp_path, GPTQ, {**layer, "g_idx": group.to(torch.int32)}, decoded)
    with pytest.raises(CheckpointError, match=said):
        qpass.load(tmp_path)


def tiles(q: Tensor) -> Tensor:
    """Codes [n, k] as the CUDA kernel of PyTorch lays them out, word by word as its source counts."""
    n, k = q.shape
    out = torch.zeros(n // 8, k // 128, 32, 4, dtype=torch.int64)
    for row in range(n // 8):
        for outer in range(k // 128):
            for lane in range(32):
                for inner in range(4):
                    base = (outer * 8 + 2 * inner) * 16
                    starts = [base + lane % 4 * 2 + extra for extra in (0, 8, 16, 24)]
                    values = [int(q[row * 8 + lane // 4, start + odd]) for odd in (0, 1) for start in starts]
                    out[row, outer, lane, inner] = sum(value << 4 * at for at, value in enumerate(values))
    return (out & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)


@pytest.mark.parametrize("k", [96, 1024])
def test_torchao_int4_in_tiles(tmp_path: Path, k: int) -> None:
    n, padded, groups = 20, 1024, 1024 // 32
    q = torch.randint(0, 16, (24, padded))
    scale, zero = (torch.rand(groups, 24) * 0.02 + 0.01).bfloat16(), (torch.randn(groups, 24) * 0.02).bfloat16()
    spread = (part.float().t().repeat_interleave(32, dim=1) for part in (scale, zero))
    first, second = spread
    decoded = ((q - 8) * first + second)[:n, :k]
    described = {"_type": "Int4TilePackedTo4dTensor", "_tensor_data_names": ["qdata", "scale_and_zero"],
                 "_data": {"block_size": [1, 32], "shape": [n, k]}}
    layer = {"_weight_qdata": tiles(q), "_weight_scale_and_zero": torch.stack([scale, zero], dim=-1)}
    model = write(tmp_path, {"quant_method": "torchao"}, layer, decoded, hidden_size=k, intermediate_size=n,
                  metadata={"tensor_names": json.dumps([f"{LAYER}.weight"]), f"{LAYER}.weight": json.dumps(described)})
    same(qpass.load(tmp_path), model)


def test_awq_gemv(tmp_path: Path) -> None:
    q, zeros = torch.randint(0, 16, (N, K)), torch.randint(0, 16, (N, 3))
    scale = (torch.rand(N, 3) + 0.5).half() * 0.02
    padded = torch.cat([zeros - 8, torch.zeros(N, 5, dtype=torch.int64)], dim=1).to(torch.int8)
    layer = {"qweight": pack_rows((q - 8).to(torch.int8), 4), "qzeros": pack_rows(padded, 4),
             "scales": torch.cat([scale, torch.zeros(N, 5).half()], dim=1)}
    spread = [part.float().repeat_interleave(32, dim=1) for part in (zeros, scale)]
    model = write(tmp_path, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemv"},
                  layer, (q - spread[0]) * spread[1])
    same(qpass.load(tmp_path), model)


def test_fbgemm_scales_by_row(tmp_path: Path) -> None:
    codes, scale = torch.randn(N, K).to(torch.float8_e4m3fn), torch.rand(N, 1) * 0.02 + 0.01
    model = write(tmp_path, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
                  {"weight": codes, "weight_scale": scale}, codes.float() * scale)
    same(qpass.load(tmp_path), model)


def hqq_layer() -> tuple[dict[str, Any], Tensor]:
    q, groups = torch.randint(0, 16, (N, K)), N * K // 32
    scale, zero = torch.rand(groups, 1) * 0.02 + 0.01, torch.rand(groups, 1) * 15
    rows = q.view(groups, 32)
    packed = (rows[:groups // 2] << 4 | rows[groups // 2:]).to(torch.uint8)
    return ({"W_q": packed, "scale": scale, "zero": zero, "nbits": 4, "group_size": 32, "axis": 1,
             "shape": torch.Size((N, K)), "packing": "4bit_u8", "unpack_view_dtype": torch.uint8},
            ((rows - zero) * scale).view(N, K))


def test_hqq_pickles_are_read_when_allowed(tmp_path: Path) -> None:
    layer, decoded = hqq_layer()
    model = write(tmp_path, {}, {}, decoded)
    (tmp_path / "model.safetensors").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    held = {path: dict(module.state_dict()) for path, module in model.named_modules() if not list(module.children())}
    torch.save({**{path: state for path, state in held.items() if state}, LAYER: layer}, tmp_path / "qmodel.pt")
    with pytest.raises(CheckpointError, match="is a pickle"):
        qpass.load(tmp_path)
    same(qpass.load(tmp_path, allow_pickle=True), model)


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


def test_hqq_pickles_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, decoded = hqq_layer()
    write(tmp_path, {"quant_method": "hqq"}, {}, decoded)
    (tmp_path / "model.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    torch.save({LAYER: {"W_q": Harm()}}, tmp_path / "qmodel.pt")
    with pytest.raises(CheckpointError, match="weights_only=True"):
        qpass.load(tmp_path, allow_pickle=True)
    assert not (tmp_path / "harm").exists()


def test_deepspeedfp_is_float_until_a_recipe_says_otherwise(tmp_path: Path) -> None:
    """Its weights on disk are plain; that tool rounds them at load, and so does a recipe here."""
    weight = torch.randn(N, K) * 0.02
    model = write(tmp_path, {"quant_method": "deepspeedfp", "bits": 6, "group_size": 512}, {"weight": weight}, weight)
    loaded = qpass.load(tmp_path)
    assert torch.equal(loaded.get_submodule(LAYER).weight, model.get_submodule(LAYER).weight)
    assert "no weight of this checkpoint is packed" in str(qpass.explain(loaded))
    other = qpass.quantize(small(), "fp8_dynamic", progress=False)
    other.load_state_dict(qpass.load(tmp_path, "fp8_dynamic").state_dict())
    assert other.get_submodule(LAYER).spec.weight.type == "fp8"
