"""Checkpoints with quantized experts, in layers or in stacks: they stay packed, with the numbers of the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import qpass
from qpass.formats.gguf_save import _metadata
from qpass.layers.experts_layer import QuantExperts
from qpass.scheme import WeightArgs, codec_of
from qpass.spec import LinearSpec
from tests.qpass.formats.fixture_folders import SMALL

transformers = pytest.importorskip("transformers")
E, H, I = 3, 64, 96  # noqa: E741
EXPERTS = "model.layers.0.mlp.experts"
Tensors = dict[str, Tensor]


def small() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        hidden_size=H, intermediate_size=H, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=2,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=32, vocab_size=64,
        max_position_embeddings=64, tie_word_embeddings=False, mlp_only_layers=[], decoder_sparse_step=1,
        norm_topk_prob=True)
    return transformers.Qwen3MoeForCausalLM(config).eval()


def write(folder: Path, quantization: dict[str, Any], layer: Callable[[str, Tensor], tuple[Tensors, Tensor]]) -> Any:
    """A checkpoint of a layer per expert made by `layer`, and the float model with what that decodes to."""
    model = small()
    tensors = {name: p.detach().clone() for name, p in model.named_parameters() if ".experts." not in name}
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        for expert in range(E):
            parts = dict(zip(("gate_proj", "up_proj"), experts.gate_up_proj[expert].chunk(2), strict=True))
            parts["down_proj"] = experts.down_proj[expert]
            for name, weight in parts.items():
                path = f"{EXPERTS}.{expert}.{name}"
                made, decoded = layer(path, weight.detach().clone())
                tensors |= {f"{path}.{key}": tensor.contiguous() for key, tensor in made.items()}
                weight.copy_(decoded)
    finish(folder, model, tensors, quantization)
    return model


def finish(folder: Path, model: Any, tensors: Tensors, quantization: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads(model.config.to_json_string())
    config |= {"architectures": [type(model).__name__], "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))


def same(loaded: Any, model: Any, kind: str, *, exact: bool = True) -> QuantExperts:
    """The experts, once they are packed as `kind`, hold the model's numbers, compute the same and are reported."""
    packed = loaded.model.layers[0].mlp.experts
    assert isinstance(packed, QuantExperts)
    first, second = packed.blocks[0].spec.parts
    assert first is not None and second is not None and kind in f"{first.weight.type} {first.weight.grouping}"
    experts = model.model.layers[0].mlp.experts
    for expert in range(E):
        assert torch.equal(packed.dequantize(0, expert, torch.float32), experts.gate_up_proj[expert])
        assert torch.equal(packed.dequantize(1, expert, torch.float32), experts.down_proj[expert])
    rows = [row for row in qpass.explain(loaded).rows if row.kind == "experts"]
    assert len(rows) == 2 and {row.status for row in rows} == {"quantized"}
    if exact:
        ids = torch.arange(3, 19)[None]
        with torch.inference_mode():
            torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    return packed


def by_codec(args: WeightArgs, names: dict[str, str]) -> Callable[[str, Tensor], tuple[Tensors, Tensor]]:
    """Layers in a codec's tensors, under the checkpoint's names."""
    codec: Any = codec_of(args)

    def layer(path: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        shape = (weight.shape[0], weight.shape[1])
        made = codec.encode(weight, args, torch.float32)
        return ({names[key]: tensor for key, tensor in made.items()},
                codec.decode(made, args, shape, slice(0, shape[0])))

    return layer


FP8 = {"weight": "weight", "scale": "weight_scale_inv"}
NVFP4 = WeightArgs(bits=4, type="nvfp4_mul", granularity="per_group", group_size=16)


@pytest.mark.parametrize(("block", "kind"), [(32, "fp8 b32"), (64, "fp8 g64")])
def test_fp8_blocks_that_end_within_the_gate_become_groups(tmp_path: Path, block: int, kind: str) -> None:
    args = WeightArgs(bits=8, type="fp8", granularity="per_block", group_size=block)
    model = write(tmp_path, {"quant_method": "fp8", "weight_block_size": [block, block]}, by_codec(args, FP8))
    same(loaded := qpass.load(tmp_path), model, kind)
    qpass.save(loaded, tmp_path / "saved")
    same(qpass.load(tmp_path / "saved"), model, kind)


def test_alternating_rows_survive_saving(tmp_path: Path) -> None:
    """gpt-oss: gate and up row by row in the file and in the model, biases in float."""
    loaded: Any = qpass.load(SMALL / "mxfp4_gptoss" / "gptoss")
    qpass.save(loaded, tmp_path / "saved")
    again: Any = qpass.load(tmp_path / "saved")
    one, other = (model.model.layers[0].mlp.experts for model in (loaded, again))
    assert isinstance(one, QuantExperts) and isinstance(other, QuantExperts) and one.nbytes == other.nbytes
    for expert in range(one.site.experts):
        for which in (0, 1):
            assert torch.equal(one.dequantize(which, expert), other.dequantize(which, expert))
    ids = torch.arange(1, 9)[None]
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, again(ids).logits)


def test_fp8_with_a_scale_for_each_projection_gets_one_a_row(tmp_path: Path) -> None:
    args = WeightArgs(bits=8, type="fp8", granularity="per_tensor")
    model = write(tmp_path, {"quant_method": "fp8"}, by_codec(args, FP8))
    same(qpass.load(tmp_path), model, "fp8 channel")


@pytest.mark.parametrize("shared", [True, False])
def test_nvfp4_shares_its_scale_where_gate_and_up_do(tmp_path: Path, shared: bool) -> None:
    codec: Any = codec_of(NVFP4)

    def layer(path: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        made = codec.encode(weight, NVFP4, torch.float32)
        made["scale_2"] = torch.full((1,), 0.002 if shared or "up" in path else 0.003)
        shape = (weight.shape[0], weight.shape[1])
        return ({"weight": made["packed"], "weight_scale": made["scale"], "weight_scale_2": made["scale_2"][0]},
                codec.decode(made, NVFP4, shape, slice(0, shape[0])))

    model = write(tmp_path, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, layer)
    kind = "nvfp4_mul g16" if shared else "nvfp4_mul_rows g16"
    same(loaded := qpass.load(tmp_path), model, kind)
    qpass.save(loaded, tmp_path / "saved")
    same(qpass.load(tmp_path / "saved"), model, kind)


def test_nf4_blocks_stand_below_each_other(tmp_path: Path) -> None:
    args = WeightArgs(bits=4, type="nf4", granularity="per_group", group_size=64)
    codec: Any = codec_of(args)

    def layer(path: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        made = codec.encode(weight, args, torch.float32)
        state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)})
        shape = (weight.shape[0], weight.shape[1])
        return {"weight": made["packed"].view(-1, 1), "weight.absmax": made["absmax"],
                "weight.quant_map": made["code"], "weight.quant_state.bitsandbytes__nf4":
                    torch.tensor(list(state.encode()), dtype=torch.uint8)}, codec.decode(
                        made, args, shape, slice(0, shape[0]))

    model = write(tmp_path, {"quant_method": "bitsandbytes", "load_in_4bit": True}, layer)
    same(qpass.load(tmp_path), model, "nf4 g64")


def gptq(zero: Callable[[str], int], *, uneven: bool = False) -> Callable[[str, Tensor], tuple[Tensors, Tensor]]:
    """Layers of GPTQ version 2, 4 bits in groups of 32, whose zero points are what `zero` says of a path; one less in
    the last group if uneven, for layers of that path that are up."""
    def layer(path: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        n, k = weight.shape
        groups = weight.view(n, -1, 32)
        scale = (groups.abs().amax(-1) / 7).half()
        at = torch.full((k // 32,), zero(path))
        at[-1] -= int(uneven and "up" in path)
        q = ((groups / scale[..., None]).round() + at[:, None]).clamp(0, 15)
        decoded = ((q - at[:, None]) * scale[..., None].float()).view(n, k)
        words = q.view(n, k).to(torch.int64).t().reshape(k // 8, 8, n)
        packed = sum(words[:, i] << 4 * i for i in range(8))
        zeros = sum(at.long() << 4 * i for i in range(8))
        as_int = lambda t: (t & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)  # noqa: E731
        return {"qweight": as_int(packed), "scales": scale.t(),
                "qzeros": as_int(zeros[:, None].expand(-1, n // 8))}, decoded

    return layer


CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "checkpoint_format": "gptq_v2"}


@pytest.mark.parametrize(("zero", "symmetric", "uneven"), [
    (lambda path: 8, True, False), (lambda path: 8, True, True),
    (lambda path: 8 if ".0." in path or "gate" in path else 7, False, False)])
def test_integers_keep_the_zero_points_of_every_projection(tmp_path: Path, zero: Callable[[str], int], symmetric: bool,
                                                           uneven: bool) -> None:
    """Where a zero point is the middle everywhere it is no zero point, in one expert or projection and not the next."""
    model = write(tmp_path, {**CONFIG, "sym": symmetric}, gptq(zero, uneven=uneven))
    packed = same(qpass.load(tmp_path), model, "int g32")
    first = packed.blocks[0].spec.up
    assert first is not None and first.weight.symmetric is (symmetric and not uneven)


def test_a_recipe_changes_what_experts_round(tmp_path: Path) -> None:
    model = write(tmp_path, {**CONFIG, "sym": True}, gptq(lambda path: 8))
    packed = same(qpass.load(tmp_path, "w4a8"), model, "int g32", exact=False)
    assert packed.blocks[0].spec.family == "w4a8"
    with pytest.raises(qpass.errors.CheckpointError, match="wants int8 weights, the checkpoint has int4"):
        qpass.load(tmp_path, "w8a8")


def test_fused_fp8_is_read_one_expert_at_a_time(tmp_path: Path) -> None:
    """[E, N, K] with scales by block, as DeepSeek's are fused."""
    args = WeightArgs(bits=8, type="fp8", granularity="per_block", group_size=32)
    codec: Any = codec_of(args)
    model = small()
    tensors = {name: p.detach().clone() for name, p in model.named_parameters() if ".experts." not in name}
    for leaf, fused in model.model.layers[0].mlp.experts.named_parameters():
        made = [codec.encode(weight.detach(), args, torch.float32) for weight in fused]
        for expert, one in enumerate(made):
            shape = (fused.shape[1], fused.shape[2])
            fused.data[expert] = codec.decode(one, args, shape, slice(0, shape[0]))
        tensors[f"{EXPERTS}.{leaf}"] = torch.stack([one["weight"] for one in made])
        tensors[f"{EXPERTS}.{leaf}_scale_inv"] = torch.stack([one["scale"] for one in made])
    finish(tmp_path, model, tensors, {"quant_method": "fp8", "weight_block_size": [32, 32]})
    same(qpass.load(tmp_path), model, "fp8 b32")


@pytest.mark.parametrize(("first", "second", "kind"), [("Q4_0", "Q8_0", "int g32"), ("Q4_1", "Q5_1", "affine g32"),
                                                       ("MXFP4", "Q5_0", "mxfp4 g32")])
def test_stacks_of_gguf_stay_packed(tmp_path: Path, first: str, second: str, kind: str) -> None:
    gguf: Any = pytest.importorskip("gguf")
    from qpass.formats.gguf_names import GgufNames

    model = small()
    architecture, metadata = _metadata(model.config)
    names = GgufNames(architecture, 1, model.config.to_dict(), "the model")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture)
    for key, value in metadata.items():
        if key != "general.architecture":
            writer.add_key_value(key, value, {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.UINT32,
                                              float: gguf.GGUFValueType.FLOAT32, bool: gguf.GGUFValueType.BOOL,
                                              list: gguf.GGUFValueType.ARRAY}[type(value)])
    for name, p in model.named_parameters():
        if ".experts." not in name:
            writer.add_tensor(names.tensors_of(name)[0], p.detach().numpy())
    experts = model.model.layers[0].mlp.experts
    for index, (part, rows) in enumerate({"gate": experts.gate_up_proj[:, :I], "up": experts.gate_up_proj[:, I:],
                                          "down": experts.down_proj}.items()):
        number = getattr(gguf.GGMLQuantizationType, second if index == 2 else first)
        blocks = gguf.quantize(rows.detach().numpy(), number)
        writer.add_tensor(f"blk.0.ffn_{part}_exps.weight", blocks, raw_dtype=number)
        rows.data.copy_(torch.from_numpy(gguf.dequantize(blocks, number)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    same(qpass.load(tmp_path / "m.gguf"), model, kind)


def test_what_a_spec_calls_shared_is_checked() -> None:
    from qpass.layers.weight_rows import rows_spec

    columns = LinearSpec(family="hqq", weight=WeightArgs(bits=4, type="hqq_columns", granularity="per_group",
                                                         group_size=64), activation=None, out_features=4,
                         in_features=64)
    with pytest.raises(ValueError, match="share"):
        rows_spec([columns, columns])
