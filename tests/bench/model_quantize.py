"""Model quantization: one library quantizes the float model in memory; its seconds out, as a line of JSON.

usage: python tests/bench/model_quantize.py qpass|torchao|llmcompressor FOLDER [--recipe R] [--head R] [--save DIR]

Neither loading nor building kernels is in the time; int4 weights in groups of 128, int8 activations per token, rounded
to nearest. The head stays float unless qpass is given a scheme for it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers


def with_qpass(model: Any, recipe: str, head: str | None, save: Path | None) -> float:
    import qpass

    wanted = qpass.Recipe(recipe) if head is None else qpass.Recipe(recipe, overrides={"lm_head": head})
    qpass.quantize(torch.nn.Sequential(torch.nn.Linear(128, 128)), recipe, progress=False)  # builds libraries
    start = time.perf_counter()
    qpass.quantize(model, wanted, progress=False)
    seconds = time.perf_counter() - start
    if save is not None:
        qpass.save(model, save)
    return seconds


def with_torchao(model: Any, recipe: str, head: str | None, save: Path | None) -> float:
    import torchao.quantization as ao

    if recipe == "w8a8":
        config: Any = ao.Int8DynamicActivationInt8WeightConfig()
    else:
        config = ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4,
                                                          weight_granularity=ao.PerGroup(128))
    start = time.perf_counter()
    ao.quantize_(model.model, config)  # the layers, as qpass does: not the head
    return time.perf_counter() - start


def with_llmcompressor(model: Any, recipe: str, head: str | None, save: Path | None) -> float:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    scheme = {"w4a8": "W4A8", "w8a8": "W8A8", "w4a16": "W4A16"}[recipe]
    start = time.perf_counter()
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"]))
    return time.perf_counter() - start


WITH = {"qpass": with_qpass, "torchao": with_torchao, "llmcompressor": with_llmcompressor}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", choices=WITH)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", default="w4a8")
    parser.add_argument("--head")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    model = transformers.AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.bfloat16).eval()
    for parameter in model.parameters():  # read from the file now, not while the clock runs
        parameter.sum()
    seconds = WITH[options.library](model, options.recipe, options.head, options.save)
    print(json.dumps({"seconds": seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
