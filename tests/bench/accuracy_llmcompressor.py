"""LLM Compressor in its own environment: a checkpoint and ids in, a checkpoint of its GPTQ with groups of 64 out.

    python accuracy_llmcompressor.py MODEL ids.pt OUT

The last line printed is JSON: seconds of wall clock and of processor that the quantization took.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model_folder: str, ids_file: str, out: str) -> None:
    ids = torch.load(ids_file, weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    recipe = GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"],
                          actorder="static")
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    start, cpu = time.perf_counter(), time.process_time()
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=ids.shape[1], num_calibration_samples=len(ids),
            tokenizer=AutoTokenizer.from_pretrained(model_folder))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    model.save_pretrained(out, save_compressed=True)
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu}))


if __name__ == "__main__":
    main(*sys.argv[1:4])
