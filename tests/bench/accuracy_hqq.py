"""HQQ in its own environment: a checkpoint in; out, in float, the weights that its asymmetric groups of 64 stand for.

    python accuracy_hqq.py MODEL ids.pt OUT

The ids are not used. qpass has no reader of HQQ's files, which hold scales and zero points in float16, 4.5 bits a
weight. The last line printed is JSON: these bits, and seconds of wall clock and of processor that it took.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from hqq.core.quantize import BaseQuantizeConfig, Quantizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

BITS, GROUP = 4, 64


def main(model_folder: str, _: str, out: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    settings = BaseQuantizeConfig(nbits=BITS, group_size=GROUP, axis=1)["weight_quant_params"]
    start, cpu = time.perf_counter(), time.process_time()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            codes, how = Quantizer.quantize(module.weight.data, device="cpu", compute_dtype=torch.float32, **settings)
            module.weight.data = Quantizer.dequantize(codes, how).float()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(out)
    print(json.dumps({"float": True, "bits": BITS + 2 * 16 / GROUP, "seconds": seconds, "cpu_seconds": cpu}))


if __name__ == "__main__":
    main(*sys.argv[1:4])
