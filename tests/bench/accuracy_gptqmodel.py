"""GPTQModel in its own environment: a checkpoint and ids in, a checkpoint with symmetric groups of 64 out.

    python accuracy_gptqmodel.py MODEL ids.pt OUT

The last line printed is JSON: bits a weight, seconds of wall clock and of processor that the quantization took.
"""

from __future__ import annotations

import json
import os
import sys
import time

import gptqmodel
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

BITS = 4 + (16 + 4) / 64
"""Of a weight: its own, and a group's float16 scale and zero point."""


def main(model_folder: str, ids_file: str, out: str) -> None:
    if (os.cpu_count() or 1) < 3:
        # Version 7.7 makes one worker on two cores, then asks two of them for its loader, and ends.
        gptqmodel._default_cpu_workers = lambda: 2
    ids = torch.load(ids_file, weights_only=True)
    settings = QuantizeConfig(bits=4, group_size=64, offload_to_disk=False)
    model = GPTQModel.load(model_folder, settings, device="cpu", dtype=torch.float32)
    start, cpu = time.perf_counter(), time.process_time()
    model.quantize([{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids],
                   backend=BACKEND.TORCH)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    model.save(out)
    print(json.dumps({"bits": BITS, "seconds": seconds, "cpu_seconds": cpu}))


if __name__ == "__main__":
    main(*sys.argv[1:4])
