"""bitsandbytes in its own environment: a checkpoint in, one of its nf4 (blocks of 64, float32 scales) out.

    python accuracy_bitsandbytes.py MODEL ids.pt OUT

The ids are not used. The last line printed is JSON: bits a weight, and seconds of wall clock and of processor that
loading and rounding took.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def main(model_folder: str, _: str, out: str) -> None:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    start, cpu = time.perf_counter(), time.process_time()
    model = AutoModelForCausalLM.from_pretrained(model_folder, quantization_config=settings, device_map="cpu",
                                                 dtype=torch.bfloat16)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    model.save_pretrained(out)
    print(json.dumps({"bits": 4 + 32 / 64, "seconds": seconds, "cpu_seconds": cpu}))


if __name__ == "__main__":
    main(*sys.argv[1:4])
