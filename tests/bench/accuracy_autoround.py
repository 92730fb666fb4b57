"""AutoRound in its own environment: a checkpoint and ids in, a checkpoint with symmetric groups of 64 out.

    python accuracy_autoround.py MODEL ids.pt OUT ITERATIONS

The last line printed is JSON: bits a weight, seconds of wall clock and of processor that the quantization took.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

BITS = 4 + (16 + 4) / 64
"""Of a weight: its own, and a group's float16 scale and zero point."""


def main(model_folder: str, ids_file: str, out: str, iterations: str) -> None:
    ids = torch.load(ids_file, weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    start, cpu = time.perf_counter(), time.process_time()
    tool = AutoRound(model, AutoTokenizer.from_pretrained(model_folder), bits=4, group_size=64, sym=True,
                     iters=int(iterations), dataset=list(ids.split(1)), nsamples=len(ids), seqlen=ids.shape[1],
                     device_map="cpu", amp=False, enable_torch_compile=False)
    tool.quantize()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    tool.save_quantized(out, format="auto_gptq")
    print(json.dumps({"bits": BITS, "seconds": seconds, "cpu_seconds": cpu}))


if __name__ == "__main__":
    main(*sys.argv[1:5])
