"""Variants that people's folders have and no tool here writes today: older releases, other names, other places."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qpass
from qpass.errors import CheckpointError
from tests.qpass.formats.test_variants import LAYER, K, N, same, small, write
from tests.qpass.formats.test_variants_integers import GROUPS, G, numbers, stream

transformers = pytest.importorskip("transformers")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": G, "sym": True, "desc_act": False}
IDS = torch.arange(2, 12)[None]
Layer = tuple[dict[str, Tensor], Tensor]


def gptq(*, sym: bool = True, less: int = 1) -> Layer:
    """`less` is what is taken from each zero point before it is stored."""
    q, zeros, scale = numbers(4)
    zeros = torch.full_like(zeros, 8) if sym else zeros.clamp_min(1)
    layer = {"qweight": stream(q, 4).t(), "qzeros": stream(zeros.t().contiguous() - less, 4), "scales": scale.t()}
    return layer, (q - zeros.repeat_interleave(G, 1)) * scale.float().repeat_interleave(G, 1)


def packed(*, sym: bool = True) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """compressed-tensors' pack-quantized, and its zero points counted from the middle."""
    q, zeros, scale = numbers(4)
    zeros = torch.full_like(zeros, 8) if sym else zeros
    layer = {"weight_packed": stream(q, 4), "weight_scale": scale, "weight_shape": torch.tensor([N, K])}
    decoded = (q - zeros.repeat_interleave(G, 1)) * scale.float().repeat_interleave(G, 1)
    return layer, decoded, (zeros - 8).to(torch.int8)


def group(*, sym: bool = True, targets: str = "re:.*gate_proj", **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": sym, "dynamic": False, "strategy": "group", "group_size": G}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": [targets], "weights": weights, "input_activations": None}},
            "ignore": ["lm_head"], **more}


def configure(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(config)))


def without(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "quantization_config"}


def test_layers_that_were_given_a_bias_of_zeros(tmp_path: Path) -> None:
    layer, decoded = gptq()
    model = write(tmp_path, GPTQ, {**layer, "bias": torch.zeros(N)}, decoded)
    same(loaded := qpass.load(tmp_path), model)
    assert any("a bias that the model does not have" in note for note in qpass.explain(loaded).notes)
    write(tmp_path, GPTQ, {**layer, "bias": torch.ones(N)}, decoded)
    with pytest.raises(CheckpointError, match=r"gate_proj\.bias in model\.safetensors has no place"):
        qpass.load(tmp_path)


def test_files_named_after_the_quantization(tmp_path: Path) -> None:
    layer, decoded = gptq()
    model = write(tmp_path, {}, layer, decoded)
    configure(tmp_path, without)
    said = {key: value for key, value in GPTQ.items() if key != "quant_method"}
    (tmp_path / "quantize_config.json").write_text(json.dumps(said))
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-32g.safetensors")
    same(qpass.load(tmp_path), model)
    (tmp_path / "other.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        qpass.load(tmp_path)


def test_an_index_that_says_more_than_where(tmp_path: Path) -> None:
    layer, decoded = gptq()
    model = write(tmp_path, GPTQ, layer, decoded)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {name: f"model-{1 + (at > 4):05d}-of-00002.safetensors" for at, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, tmp_path / file, {"made": "by hand"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {"total_size": "no number", "more": [1]}, "weight_map": where, "version": 3}))
    same(qpass.load(tmp_path), model)


def test_pickled_weights_are_named_and_not_opened(tmp_path: Path) -> None:
    layer, decoded = gptq()
    write(tmp_path, GPTQ, layer, decoded)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nmkdir\n(S'harm'\ntR.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle.*save it as safetensors"):
        qpass.load(tmp_path, allow_pickle=True)


@pytest.mark.parametrize("said", [{"is_marlin_format": True}, {"checkpoint_format": "marlin"}, {}])
def test_gptq_packed_for_one_kernel(tmp_path: Path, said: dict[str, Any]) -> None:
    layer = {"B": torch.zeros(K // 16, N * 2, dtype=torch.int32), "s": torch.ones(GROUPS, N).half(),
             "workspace": torch.zeros(8, dtype=torch.int32)}
    write(tmp_path, {**GPTQ, **said}, layer, torch.zeros(N, K))
    with pytest.raises(CheckpointError, match=r"(?s)arlin.*GPTQModel"):
        qpass.load(tmp_path)


@pytest.mark.parametrize(("said", "less", "sym"), [
    ({"packing_format": "auto_round:auto_gptq"}, 1, False), ({"packing_format": "auto_round:gptqmodel"}, 0, False),
    ({"packing_format": "auto_round"}, 0, False), ({"packing_format": "auto_round"}, 0, True),
    ({"packing_format": "auto_round:gptqmodel"}, 1, True), ({"backend": "auto_round:exllamav2"}, 0, False),
    ({"backend": "auto_round:gptq:exllamav2"}, 1, False)])
def test_autoround_names_its_packing_in_many_ways(tmp_path: Path, said: dict[str, Any], less: int, sym: bool) -> None:
    layer, decoded = gptq(sym=sym, less=less)
    model = write(tmp_path, {"quant_method": "auto-round", "bits": 4, "group_size": G, "sym": sym, **said}, layer,
                  decoded)
    same(qpass.load(tmp_path), model)


@pytest.mark.parametrize("kind", ["zero points not packed", "zero points of a symmetric weight", "shape in int32"])
def test_compressed_tensors_of_older_versions(tmp_path: Path, kind: str) -> None:
    layer, decoded, zeros = packed(sym="not" not in kind)
    layer |= {"weight_zero_point": zeros} if "zero" in kind else {"weight_shape": layer["weight_shape"].int()}
    model = write(tmp_path, group(sym="not" not in kind), layer, decoded)
    same(qpass.load(tmp_path), model)
    if "symmetric" in kind:
        write(tmp_path, group(), {**layer, "weight_zero_point": zeros + 1}, decoded)
        with pytest.raises(CheckpointError, match="weight_zero_point is not 0 everywhere"):
            qpass.load(tmp_path)


@pytest.mark.parametrize("place", [
    lambda said: {"compression_config": said},
    lambda said: {"compression_config": {"quantization_config": said, "sparsity_config": {"format": "dense"}}}])
def test_compressed_tensors_config_under_other_names(tmp_path: Path, place: Callable[[Any], dict[str, Any]]) -> None:
    layer, decoded, _ = packed()
    model = write(tmp_path, {}, layer, decoded)
    configure(tmp_path, lambda config: {**without(config), **place(group())})
    same(qpass.load(tmp_path), model)


@pytest.mark.parametrize("said", [{"format": "marlin-24"}, {"sparsity_config": {"format": "sparse-24-bitmask"}},
                                  {"transform_config": {"config_groups": {"u": 1}}}])
def test_compressed_tensors_that_needs_its_own_tool(tmp_path: Path, said: dict[str, Any]) -> None:
    layer, decoded, _ = packed()
    write(tmp_path, group(**said), layer, decoded)
    with pytest.raises(CheckpointError, match="decompress it with the compressed-tensors package"):
        qpass.load(tmp_path)


@pytest.mark.parametrize("names", [("k_scale", "v_scale"), ("kv_scale",)])
def test_scales_of_the_cache_beside_any_format(tmp_path: Path, names: tuple[str, ...]) -> None:
    codes, scale = torch.randn(N, K).to(torch.float8_e4m3fn), torch.tensor(0.02)
    model = write(tmp_path, {"quant_method": "fp8", "activation_scheme": "dynamic"},
                  {"weight": codes, "weight_scale": scale}, codes.float() * scale)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, **{f"model.layers.0.self_attn.{name}": torch.ones(()) for name in names}},
              tmp_path / "model.safetensors")
    same(loaded := qpass.load(tmp_path), model)
    assert any("scale of the KV cache" in note for note in qpass.explain(loaded).notes)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_block_scales_of_every_dtype(tmp_path: Path, kind: torch.dtype) -> None:
    codes, scale = torch.randn(N, K).to(torch.float8_e4m3fn), torch.exp2(torch.randint(-8, -4, (2, 3))).to(kind)
    spread = scale.float().repeat_interleave(32, 0).repeat_interleave(32, 1)
    model = write(tmp_path, {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"},
                  {"weight": codes, "weight_scale_inv": scale}, codes.float() * spread)
    same(qpass.load(tmp_path), model)


@pytest.mark.parametrize(("algorithm", "activation"), [("NVFP4_AWQ", "nvfp4"), ("W4A8_NVFP4_FP8", "fp8")])
def test_modelopt_nvfp4_with_a_scaled_input(tmp_path: Path, algorithm: str, activation: str) -> None:
    from qpass.codecs.elements import E2M1, unpack_nibbles, values
    from qpass.formats.codec_reads import FP4_LOCAL, FP8_STATIC
    from qpass.formats.format_registry import open_checkpoint
    from qpass.formats.reader import Place, WeightRead

    raw, scale = torch.randint(0, 256, (N, K // 2)).to(torch.uint8), torch.rand(N, K // 16).to(torch.float8_e4m3fn)
    weight = values(E2M1, torch.device("cpu"))[unpack_nibbles(raw).int()] * (
        scale.float() * 0.013).repeat_interleave(16, 1)
    layer = {"weight": raw, "weight_scale": scale, "weight_scale_2": torch.tensor(0.013),
             "input_scale": torch.tensor(0.01)}
    inputs = torch.rand(K) + 0.5 if "AWQ" in algorithm else torch.ones(K)
    if "AWQ" in algorithm:
        layer["pre_quant_scale"] = inputs
    model = write(tmp_path, {"quant_method": "modelopt", "quant_algo": algorithm}, layer, weight * inputs)
    same(qpass.load(tmp_path), model)
    chosen, checkpoint = open_checkpoint(tmp_path)
    assert chosen is not None
    read = chosen.reader(checkpoint).weight(Place(path=LAYER, name=f"{LAYER}.weight", shape=(N, K)))
    assert isinstance(read, WeightRead)
    assert read.spec.activation == (FP4_LOCAL if activation == "nvfp4" else FP8_STATIC)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_bitsandbytes_dtypes(tmp_path: Path, kind: torch.dtype, storage: torch.dtype) -> None:
    q, blocks = torch.randint(0, 16, (N * K,)), N * K // 64
    code, second = torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 256)
    codes, nested = torch.randint(1, 255, (blocks,)).to(torch.uint8), (torch.rand(1) + 0.1).to(kind)
    state = {"quant_type": "nf4", "blocksize": 64, "shape": [N, K], "nested_blocksize": 256, "nested_offset": 0.5}
    layer = {"weight": (q[0::2] << 4 | q[1::2]).to(torch.uint8).view(storage).reshape(-1, 1),
             "weight.quant_map": code, "weight.absmax": codes, "weight.nested_absmax": nested,
             "weight.nested_quant_map": second,
             "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}
    absmax = second[codes.int()] * nested.float() + 0.5
    model = write(tmp_path, {"quant_method": "bitsandbytes", "load_in_4bit": True}, layer,
                  (code[q].view(-1, 64) * absmax[:, None]).view(N, K))
    same(qpass.load(tmp_path), model)


@pytest.mark.parametrize(("said", "words"), [
    ({"quantization_config": {"quant_method": "exl3"}}, "'exl3'.*load it with the tool that made it"),
    ({"quantization": {"group_size": 64, "bits": 4}}, "group_size, bits .as MLX does."),
    ({"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemv_fast"}}, "'gemv_fast' is packed for")])
def test_formats_that_are_not_read_are_named(tmp_path: Path, said: dict[str, Any], words: str) -> None:
    write(tmp_path, {}, {"weight": torch.zeros(N, K)}, torch.zeros(N, K))
    configure(tmp_path, lambda config: {**without(config), **said})
    with pytest.raises(CheckpointError, match=words):
        qpass.load(tmp_path)


def rounded(weight: Tensor, order: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes from 0 on, scales, the group of each input, and what they decode to."""
    where = torch.arange(weight.shape[1]) // G
    where = where if order is None else where[order]
    scale = torch.stack([weight[:, where == at].abs().amax(1) / 7 for at in range(weight.shape[1] // G)], 1).half()
    q = (weight / scale.float()[:, where]).round().clamp(-8, 7)
    return (q + 8).to(torch.uint8), scale, where.int(), q * scale.float()[:, where]


SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2,
                         "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64}
VISION = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
# class -> (config, which weights are quantized, how many layers that are packed then, format)
FAMILIES: dict[str, tuple[dict[str, Any], str, int, str]] = {
    "Mixtral": ({**SIZES, "num_local_experts": 2}, r"experts\.\d+\.w\d", 2, "gptq"),
    "Mixtral by activation": ({**SIZES, "num_local_experts": 2}, r"experts\.\d+\.w\d|[qkvo]_proj", 4, "gptq desc_act"),
    "GPT2": ({"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 64, "bos_token_id": 0,
              "eos_token_id": 0}, r"c_attn|c_proj|c_fc", 4, "gptq"),
    "Phi3": ({**SIZES, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}, r"qkv_proj|o_proj|gate_up_proj", 3,
             "gptq"),
    "Qwen2": (SIZES, r"[a-z]_proj", 7, "gptq"),
    "Llama with its head": ({**SIZES, "tie_word_embeddings": False}, "_proj|lm_head", 8, "gptq"),
    "Llava": ({"text_config": {**SIZES, "model_type": "llama"}, "vision_config": VISION, "image_token_index": 63},
              r"language_model\..*_proj", 7, "text_config"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_shapes_of_families(tmp_path: Path, name: str) -> None:
    """Experts under older names, weights stored [K, N], fused projections, heads, models within models."""
    said, which, count, kind = FAMILIES[name]
    family = name.split()[0]
    cls = getattr(transformers, {"GPT2": "GPT2LMHeadModel", "Llava": "LlavaForConditionalGeneration"}.get(
        family, f"{family}ForCausalLM"))
    torch.manual_seed(0)
    made = cls(getattr(transformers, f"{family}Config")(**said)).eval()
    made.save_pretrained(tmp_path)
    tensors, floats = load_file(tmp_path / "model.safetensors"), {}
    for full in [full for full in tensors if re.search(rf"({which})\.weight$", full)]:
        weight = tensors.pop(full)
        weight = weight.t() if family == "GPT2" else weight
        order = torch.randperm(weight.shape[1]) if "desc_act" in kind else None
        q, scale, where, decoded = rounded(weight, order)
        floats[full] = (decoded.t() if family == "GPT2" else decoded).contiguous()
        layer = {"qweight": stream(q, 4).t(), "scales": scale.t(), "g_idx": where,
                 "qzeros": stream(torch.full((scale.shape[1], len(q)), 7), 4)}
        if kind == "text_config":
            layer = {"weight_packed": stream(q, 4), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
        tensors |= {full.removesuffix("weight") + key: tensor.contiguous() for key, tensor in layer.items()}
    rest = {key: tensor for key, tensor in load_file(tmp_path / "model.safetensors").items() if key not in floats}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    if kind == "text_config":  # whose `ignore` knows the head under another name than the files
        quantization = group(targets="Linear", ignore=["lm_head", "re:.*vision_tower.*", "re:.*projector.*"])
        configure(tmp_path, lambda config: {**config, "text_config": {
            **config["text_config"], "quantization_config": quantization}})
    else:
        configure(tmp_path, lambda config: {**config, "quantization_config": {**GPTQ, "desc_act": "desc" in kind}})
    loaded = qpass.load(tmp_path, dtype=torch.float32)
    configure(tmp_path, lambda config: {**without(config), **(
        {"text_config": without(config["text_config"])} if "text_config" in config else {})})
    save_file({**rest, **floats}, tmp_path / "model.safetensors", {"format": "pt"})
    reference = cls.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        torch.testing.assert_close(loaded(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-5)
    assert qpass.explain(loaded).counts["quantized"] == count


def split_file(folder: Path, parts: int, *, empty_first: bool) -> Any:
    """A GGUF model in parts, as llama.cpp's gguf-split leaves it; the model itself."""
    from qpass.formats import gguf_save

    model = small(hidden_size=64, intermediate_size=64).half()
    qpass.quantize(model, qpass.PRESETS["w4a16"].with_group_size(32), progress=False)
    whole = gguf_save.write_gguf

    def write_parts(path: Path, metadata: dict[str, Any], entries: list[Any]) -> None:
        cut = -(-len(entries) // (parts - empty_first))
        each = [entries[:0]] * empty_first + [entries[at:at + cut] for at in range(0, len(entries), cut)]
        for number, some in enumerate(each):
            whole(folder / f"m-{number + 1:05d}-of-{len(each):05d}.gguf", {
                **(metadata if number == 0 else {}), "split.no": number, "split.count": len(each),
                "split.tensors.count": len(entries)}, some)
        whole(path, metadata, entries)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_save, "write_gguf", write_parts)
        qpass.save(model, folder / "x.gguf", format="gguf")
    (folder / "x.gguf").unlink()
    return model


@pytest.mark.parametrize("empty_first", [False, True])
def test_gguf_in_parts(tmp_path: Path, empty_first: bool) -> None:
    pytest.importorskip("gguf")
    model = split_file(tmp_path, 3, empty_first=empty_first)
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) == 3
    for where in (tmp_path, files[0], files[2]):
        loaded: Any = qpass.load(where)
        for path, layer in model.named_modules():
            if hasattr(layer, "canonical"):
                found = loaded.get_submodule(path).dequantize(torch.float32)
                assert torch.equal(found, layer.dequantize(torch.float32))
    assert len(qpass.inspect(tmp_path).layers) == 7
    (tmp_path / "other.gguf").write_bytes(files[0].read_bytes())
    with pytest.raises(CheckpointError, match="holds 4 GGUF files; name the one"):
        qpass.load(tmp_path)
    with pytest.raises(CheckpointError, match="its name does not say which"):
        qpass.load(tmp_path / "other.gguf")
    kept = files[1].read_bytes()
    files[1].unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf is missing"):
        qpass.load(files[0])
    files[1].write_bytes(files[2].read_bytes())
    with pytest.raises(CheckpointError, match="says that it is part 2 of 3"):
        qpass.load(files[0])
    outside = tmp_path.parent / f"{tmp_path.name}.gguf"
    outside.write_bytes(kept)
    files[1].unlink()
    files[1].symlink_to(outside)
    with pytest.raises(CheckpointError, match="out of its folder"):
        qpass.load(files[0])
