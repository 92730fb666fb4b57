"""Time and peak memory of finding every site of large models on the meta device, each in a fresh process.

    python tests/bench/capture.py            all models, one line each
    python tests/bench/capture.py llama-8b   one model, in this process
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections import Counter

LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256}
QWEN3_30B_MOE = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 151936, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768}
MODELS = {"llama-8b": ("LlamaConfig", LLAMA_8B), "qwen3-30b-moe": ("Qwen3MoeConfig", QWEN3_30B_MOE)}


def measure(name: str) -> str:
    """One line for one model; the first call of everything in this process is part of the time."""
    import torch
    import transformers

    from qpass.capture.capture_model import capture
    from qpass.find.find_sites import find

    config_class, sizes = MODELS[name]
    config = getattr(transformers, config_class)(**sizes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    start, cpu = time.perf_counter(), time.process_time()
    captured = capture(model)
    after_capture = time.perf_counter()
    sites = find(model, captured)
    end = time.perf_counter()
    assert captured.graph_module is not None, captured.notes
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(site.kind for site in sites).items())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    return (f"{name:14} capture {after_capture - start:5.2f} s  find {end - after_capture:5.2f} s  "
            f"(cpu {time.process_time() - cpu:5.2f} s)  peak {peak:.2f} GB  by {captured.method}, "
            f"{len(captured.graph_module.graph.nodes)} nodes, sites: {kinds}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(measure(sys.argv[1]))
    else:
        for model_name in MODELS:
            subprocess.run([sys.executable, __file__, model_name], check=True)
