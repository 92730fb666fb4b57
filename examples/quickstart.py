"""Quickstart: a small language model is quantized, explained, compiled, saved, loaded and measured."""

import copy
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qpass

# Any model does; this one has random weights, so that the script needs no download.
# Yours: model = AutoModelForCausalLM.from_pretrained(folder)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
                                     num_attention_heads=4, num_key_value_heads=2)).eval()
reference = copy.deepcopy(model)  # quantize works in place; keep the float model to compare with

qpass.quantize(model, "w4a8", progress=False)  # the same object, the same class
print(qpass.explain(model))

ids = torch.randint(3, 512, (1, 256))
print("\nwhat it cost, on random tokens:")
print(qpass.evaluate(model, ids, reference, window=64))

compiled = torch.compile(model)  # plain torch.compile; the lowering passes are in place
with torch.no_grad():
    eager, fused = model(ids).logits, compiled(ids).logits
print(f"\neager and compiled differ by at most {float((eager - fused).abs().max()):.1e}")
print(f"generate() still works: {model.generate(ids[:, :8], max_new_tokens=4, do_sample=False)[0, 8:].tolist()}")

with tempfile.TemporaryDirectory() as folder:
    qpass.save(model, folder)  # safetensors in compressed-tensors' layout
    again = qpass.load(folder)
with torch.no_grad():
    print(f"saved and loaded: the same logits, {torch.equal(again(ids).logits, eager)}")
