"""A model on a GPU: decoding with the shapes of an 8-billion Llama, compiled and in CUDA graphs, beside bfloat16."""

from __future__ import annotations

import gc
import statistics
from typing import Any

import torch
from cuda_goals import Goal
from cuda_time import Machine

LAYERS = 8
"""Of the 32, so that compiling each kind fits the time; a layer is the same work in both."""


def build(machine: Machine) -> Any:
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
                             "num_key_value_heads": 8, "vocab_size": 32000, "num_hidden_layers": LAYERS}
    if machine.dry:
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
                 "vocab_size": 64, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, max_position_embeddings=512)
    torch.manual_seed(0)
    with torch.device(machine.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def step_time(machine: Machine, model: Any) -> float:
    """Median microseconds of one decoding step of one sequence that holds 64 tokens."""
    import transformers

    cache = transformers.StaticCache(config=model.config, max_cache_len=128)
    config = model.config
    cache.early_initialization(1, config.num_key_value_heads, config.hidden_size // config.num_attention_heads,
                               model.dtype, torch.device(machine.device))
    step = model if machine.dry else torch.compile(model, mode="reduce-overhead", dynamic=False)
    times = []
    with torch.no_grad():
        for i in range(2 if machine.dry else 40):
            ids = torch.full((1, 1), 3 + i, device=machine.device)
            place = torch.tensor([[64]], device=machine.device)
            if machine.dry:
                step(input_ids=ids, past_key_values=cache, position_ids=place)
                times.append(1.0)
                continue
            torch.compiler.cudagraph_mark_step_begin()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step(input_ids=ids, past_key_values=cache, position_ids=place)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000)
    return statistics.median(times[len(times) // 2:])


def _free(machine: Machine) -> None:
    torch._dynamo.reset()
    gc.collect()
    if not machine.dry:
        torch.cuda.empty_cache()


def peers() -> dict[str, Any]:
    """torchao's ways, where it is installed."""
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Int4WeightOnlyConfig, quantize_
    except ImportError:
        return {}
    return {"torchao int4": lambda model: quantize_(model, Int4WeightOnlyConfig(group_size=128)),
            "torchao fp8": lambda model: quantize_(model, Float8DynamicActivationFloat8WeightConfig())}


def decode(machine: Machine, found: dict[str, Any]) -> dict[str, Any]:
    import qpass

    lanes = {"bf16": lambda model: None, "w4a16": lambda model: qpass.quantize(model, "w4a16", progress=False),
             "fp8_dynamic": lambda model: qpass.quantize(model, "fp8_dynamic", progress=False),
             "w4a8": lambda model: qpass.quantize(model, "w4a8", progress=False), **({} if machine.dry else peers())}
    times: dict[str, float] = {}
    failures: dict[str, str] = {}
    for name, change in lanes.items():
        try:
            model = build(machine)
            change(model)
            times[name] = step_time(machine, model)
            print(f"    {name}: {times[name]:.1f} us a token", flush=True)
            del model
        except Exception as error:  # one way failing must not lose the others
            failures[name] = f"{type(error).__name__}: {str(error)[:300]}"
            print(f"    {name}: FAILED {failures[name]}", flush=True)
        _free(machine)
    what = f"Llama-8B shapes, {LAYERS} layers, decode batch 1"
    if {"bf16", "w4a16"} <= times.keys():
        Goal(what=f"{what}, W4A16", against="bf16 compiled the same way", asked=2.6,
             found=times["bf16"] / times["w4a16"]).put(found)
    for peer, mine in (("torchao int4", "w4a16"), ("torchao fp8", "fp8_dynamic")):
        if {peer, mine} <= times.keys():
            Goal(what=f"{what}, {mine}", against=peer, asked=1.05, found=times[peer] / times[mine]).put(found)
    if failures and "bf16" not in times:
        raise RuntimeError(f"nothing to compare with: {failures}")
    return {"us": times, "failed": failures}
