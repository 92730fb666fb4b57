"""Make MoE: mixtures of experts with random weights, in memory, quantized in a folder, and as a GGUF file of Q4_0.

usage: python tests/bench/make_moe.py SHAPE[/LAYERS] FOLDER [--gguf FILE]      what is there already is not made again
Every layer holds a copy of one layer's numbers: how fast they are multiplied does not depend on them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import qpass


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model: `top_k` of `experts` a token, each of width `ffn`; the rest is the same for all."""

    experts: int
    top_k: int
    ffn: int
    hidden: int = 2048
    layers: int = 16
    vocabulary: int = 32000
    heads: int = 16
    key_heads: int = 4

    @property
    def name(self) -> str:
        """`32x768-top4`."""
        return f"{self.experts}x{self.ffn}-top{self.top_k}"

    @property
    def float_bytes(self) -> int:
        """Of its matrices in bfloat16."""
        attention = self.hidden * self.hidden // self.heads * (self.heads + self.key_heads)
        layer = self.experts * (3 * self.ffn + 1) * self.hidden + 2 * attention
        return 2 * (self.layers * layer + 2 * self.vocabulary * self.hidden)


def shape_of(text: str) -> Shape:
    """`32x768-top4`, or `32x768-top4/4` with so many layers."""
    name, _, layers = text.partition("/")
    return replace(SHAPES[name], layers=int(layers)) if layers else SHAPES[name]


SHAPES = {shape.name: shape for shape in (Shape(experts=32, top_k=4, ffn=768), Shape(experts=8, top_k=2, ffn=4096))}


def float_model(shape: Shape) -> Any:
    """A Mixtral of these sizes in bfloat16, of standard deviation 0.02."""
    from transformers import GenerationConfig, MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=shape.hidden, intermediate_size=shape.ffn, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_heads, head_dim=shape.hidden // shape.heads,
        vocab_size=shape.vocabulary, num_local_experts=shape.experts, num_experts_per_tok=shape.top_k,
        max_position_embeddings=8192, tie_word_embeddings=False, sliding_window=None, bos_token_id=1, eos_token_id=2,
        pad_token_id=0)
    with torch.device("meta"):
        model = MixtralForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    first = dict(model.model.layers[0].named_parameters())
    for name, parameter in model.named_parameters():
        same = first[name.split(".", 3)[3]] if name.startswith("model.layers.") else parameter
        with torch.no_grad():
            if same is not parameter:
                parameter.copy_(same)
            elif parameter.ndim == 1:
                parameter.fill_(1)
            else:
                parameter.normal_(0, 0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are in no checkpoint
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return model.eval()


def tensors_of(shape: Shape) -> Iterator[tuple[str, torch.Tensor]]:
    """llama.cpp's names with tensors as it stores them; those of every layer but the first are the first's."""
    one = float_model(replace(shape, layers=1)).state_dict()
    yield "token_embd.weight", one["model.embed_tokens.weight"]
    yield "output_norm.weight", one["model.norm.weight"]
    yield "output.weight", one["lm_head.weight"]
    prefix = "model.layers.0."
    gate, up = one[prefix + "mlp.experts.gate_up_proj"].chunk(2, 1)
    layer = {
        "attn_norm": one[prefix + "input_layernorm.weight"],
        "ffn_norm": one[prefix + "post_attention_layernorm.weight"],
        **{f"attn_{short}": one[f"{prefix}self_attn.{name}_proj.weight"]
           for short, name in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o"))},
        "ffn_gate_inp": one[prefix + "mlp.gate.weight"], "ffn_gate_exps": gate, "ffn_up_exps": up,
        "ffn_down_exps": one[prefix + "mlp.experts.down_proj"]}
    for number in range(shape.layers):
        for name, tensor in layer.items():
            yield f"blk.{number}.{name}.weight", tensor


def write_gguf(shape: Shape, target: Path) -> None:
    """All matrices but the routers in Q4_0, without a vocabulary."""
    import gguf

    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_heads)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.top_k)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    made: dict[int, Any] = {}
    for name, tensor in tensors_of(shape):
        if tensor.ndim == 1 or "gate_inp" in name:
            writer.add_tensor(name, tensor.float().numpy())
            continue
        key = tensor.data_ptr()
        if key not in made:
            made[key] = gguf.quants.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType.Q4_0)
        writer.add_tensor(name, made[key], raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", type=shape_of)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path)
    options = parser.parse_args()
    shape = options.shape
    if not (options.folder / "config.json").exists():
        model = float_model(shape)
        qpass.quantize(model, qpass.Recipe("w4a8", overrides={"lm_head": "w4a8"}), progress=False)
        qpass.save(model, options.folder)
        del model
    if options.gguf is not None and not options.gguf.exists():
        partial = options.gguf.with_suffix(".part")
        write_gguf(shape, partial)
        partial.rename(options.gguf)
    return 0


if __name__ == "__main__":
    sys.exit(main())
