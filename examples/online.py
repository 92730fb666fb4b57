"""Quantize while loading: plan, from_pretrained with a recipe, generate, save, and load again in another process.

    python examples/online.py [FOLDER] [OUT]

FOLDER is a float model in Hugging Face's form; without it a small one with random weights is made. What is in memory at
once is the quantized model and one tensor of the float one.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import qpass

work = Path(tempfile.mkdtemp())
source = Path(sys.argv[1]) if len(sys.argv) > 1 else work / "float"
target = Path(sys.argv[2]).resolve() if len(sys.argv) > 2 else work / "w4a8"
if len(sys.argv) < 2:
    config = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=512, tie_word_embeddings=True, dtype="bfloat16")
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(source)

# Before a weight is read: what it will take, and what runs on which kernel here.
recipe = qpass.Recipe("w4a8", overrides={"*.down_proj": "w8a8"})
print(qpass.plan(source, recipe))

model = AutoModelForCausalLM.from_pretrained(source, quantization_config=qpass.QPassConfig(recipe))
print(f"is quantized: {model.is_quantized}; {qpass.explain(model).counts['quantized']} layers")

# A cache of int8 keys and values beside it: half the bytes, read as they are.
ids = torch.arange(3, 40)[None]
text = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0,
                      past_key_values=qpass.QuantizedCache(model))
print(f"generated {text.shape[1] - ids.shape[1]} tokens")

model.set_attn_implementation("sdpa")
with torch.no_grad():
    torch.save(model(ids).logits, work / "logits.pt")
model.save_pretrained(target)

again = f"""
import torch, qpass
model = qpass.load({str(target)!r})
with torch.no_grad():
    logits = model(torch.arange(3, 40)[None]).logits
print("equal logits in another process:", torch.equal(logits, torch.load({str(work / "logits.pt")!r})))
"""
subprocess.run([sys.executable, "-c", again], check=True, cwd=work)
