"""llama.cpp's llama-quantize: a checkpoint in, a GGUF file out whose Linears but the head are of one type.

    python accuracy_llamacpp.py MODEL ids.pt OUT KIND PROGRAM

The ids are not used: these types are rounded without data. The bf16 file that it starts from is written by qpass. The
last line printed is JSON: bits a weight, and seconds of wall clock and of processor that the quantization took.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

import qpass


def main(model_folder: str, _: str, out: str, kind: str, program: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as scratch:
        source = qpass.save(model, Path(scratch) / "model.gguf", format="gguf")
        Path(out).mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        subprocess.run([program, "--pure", "--output-tensor-type", "bf16", "--token-embedding-type", "bf16",
                        str(source), f"{out}/model.gguf", kind], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps({"bits": bits_of(f"{out}/model.gguf"), "seconds": seconds,
                      "cpu_seconds": used.ru_utime + used.ru_stime}))


def bits_of(file: str) -> float:
    """Bits a weight of all matrices but the embedding and the head."""
    found = [one for one in GGUFReader(file).tensors if len(one.shape) > 1 and one.name.startswith("blk.")]
    return 8 * sum(int(one.n_bytes) for one in found) / sum(int(one.n_elements) for one in found)


if __name__ == "__main__":
    main(*sys.argv[1:6])
