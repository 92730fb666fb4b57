"""Make a model: Llama-3.2-1B's shapes with seeded random bfloat16 weights, as a Hugging Face folder and as GGUF.

usage: python tests/bench/make_model.py FOLDER [--gguf FILE]      what is there already is not made again
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

SIZES = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2}


def write_folder(folder: Path) -> None:
    """Random weights of standard deviation 0.02, so that logits are finite."""
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**SIZES, rope_theta=500000.0), dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)


def write_gguf(folder: Path, target: Path) -> None:
    """The same weights for llama.cpp, without a vocabulary."""
    import gguf
    from safetensors.torch import load_file

    layers = SIZES["num_hidden_layers"]
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(2048)
    writer.add_block_count(int(layers))
    writer.add_feed_forward_length(8192)
    writer.add_head_count(32)
    writer.add_head_count_kv(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(64)
    writer.add_vocab_size(128256)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, int(layers))
    for name, tensor in load_file(folder / "model.safetensors").items():
        known = names.get_name(name, try_suffixes=(".weight",))
        assert known is not None, name
        if tensor.ndim == 1:
            writer.add_tensor(known, tensor.float().numpy())
        else:
            writer.add_tensor(known, tensor.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path)
    options = parser.parse_args()
    if not (options.folder / "model.safetensors").exists():
        write_folder(options.folder)
    if options.gguf is not None and not options.gguf.exists():
        partial = options.gguf.with_suffix(".part")
        write_gguf(options.folder, partial)
        partial.rename(options.gguf)
    return 0


if __name__ == "__main__":
    sys.exit(main())
