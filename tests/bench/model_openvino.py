"""Model of OpenVINO: serves one stateful model, as optimum-intel wrote it, to the coordinator, a JSON line at a time.

usage: python tests/bench/model_openvino.py FOLDER                    answers requests as in model_torch.py
       python tests/bench/model_openvino.py FOLDER --from SOURCE      makes FOLDER from a Hugging Face folder
"""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from worker import answer_lines

CONTEXT, VOCABULARY = 128, 128000


def convert(source: Path, target: Path) -> None:
    """int4 in groups of 128, symmetric, the embedding and the head int8: what the converter does of itself."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    wanted = OVWeightQuantizationConfig(bits=4, sym=True, group_size=128, ratio=1.0)
    made = OVModelForCausalLM.from_pretrained(source, export=True, compile=False, quantization_config=wanted)
    made.save_pretrained(target)


class Model:
    """The compiled model and the request that holds its cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.request: Any = None
        self.held = (0, 0)
        """Sequences and tokens in the request's cache."""

    def load(self) -> dict[str, Any]:
        import openvino as ov

        start = time.perf_counter()
        settings = {"INFERENCE_NUM_THREADS": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
                    "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32",
                    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"}
        compiled = ov.Core().compile_model(self.folder / "openvino_model.xml", "CPU", settings)
        self.request = compiled.create_infer_request()
        seconds = time.perf_counter() - start
        self.step(1, 1, 0)  # it reads its weights when it needs them
        return {"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}

    def step(self, batch: int, tokens: int, past: int) -> float:
        names = {name for port in self.request.model_inputs for name in port.names}
        feed = {"input_ids": np.random.default_rng(past).integers(3, VOCABULARY, (batch, tokens)),
                "attention_mask": np.ones((batch, past + tokens), np.int64),
                "position_ids": np.tile(np.arange(past, past + tokens), (batch, 1)),
                "beam_idx": np.arange(batch, dtype=np.int32)}
        start = time.perf_counter()
        self.request.infer({name: value for name, value in feed.items() if name in names}, share_inputs=True,
                           share_outputs=True)
        return (time.perf_counter() - start) * 1e6

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["do"] == "hello":
            import openvino as ov

            return {"versions": {"OpenVINO": ov.__version__.split("-")[0]}}
        if asked["do"] == "load":
            return self.load()
        if asked["do"] == "prefill":
            self.request.reset_state()
            self.held = (0, 0)
            return {"us": [self.step(1, asked["tokens"], 0)]}
        batch, tokens = asked["batch"], asked["tokens"]
        if self.held[0] != batch or self.held[1] > 2 * CONTEXT:
            self.request.reset_state()
            self.step(batch, CONTEXT, 0)
            self.held = (batch, CONTEXT)
        past = self.held[1]
        self.held = (batch, past + tokens)
        return {"us": [self.step(batch, 1, past + i) for i in range(tokens)]}


if __name__ == "__main__":
    if "--from" in sys.argv:
        convert(Path(sys.argv[sys.argv.index("--from") + 1]), Path(sys.argv[1]))
    else:
        answer_lines(Model(Path(sys.argv[1])).answer)
