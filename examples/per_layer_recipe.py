"""A recipe by layer: most layers W4A8, the sensitive ones W8A8, some in float; planned first, then checked by layer."""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qpass

torch.manual_seed(0)
config = LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
                     num_key_value_heads=2)
recipe = qpass.Recipe(
    "w4a8",
    ignore=["lm_head", "model.layers.0.self_attn.o_proj"],  # names, globs, re:REGEX, class names or kinds
    overrides={
        "*.down_proj": "w8a8",  # a glob
        "model.layers.2.mlp.down_proj": "w8a16",  # an exact name beats a glob
    },
    on_indivisible="error",  # a group size that does not divide is an error, not an adjustment
)

# A plan needs no weights: on the meta device this takes no memory, whatever the size of the model.
with torch.device("meta"):
    empty = LlamaForCausalLM(config)
print(qpass.plan(empty, recipe))

# A rule that matches nothing is an error with the closest names, not a silent no-op.
try:
    qpass.plan(empty, qpass.Recipe("w4a8", overrides={"*.down_prj": "w8a8"}))
except qpass.errors.UnmatchedRule as error:
    print(f"\nas it should be: {error}")

reference = LlamaForCausalLM(config).eval()
model = qpass.quantize(copy.deepcopy(reference), recipe, progress=False)
print("\nerror of each layer:")
print(qpass.compare(reference, model, torch.randint(3, 512, (1, 32))))
