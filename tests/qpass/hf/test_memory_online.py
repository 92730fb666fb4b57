"""Memory of quantizing while loading: a 2.5 GB checkpoint becomes W4A8 in a process that is ended if it takes more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qpass.formats.safetensors_file import Entry, write_file

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/status").exists(),
                                                   reason="resident memory is read from /proc")]
LIMIT = 2_000_000_000  # bytes of everything: the interpreter, torch and Transformers too
ALLOWED_BESIDE = 400_000_000  # beyond the packed model and the largest tensor

_LOAD = """
import json, os, re, resource, sys, threading, time

how, folder, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])

def most():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

def watch():
    while True:
        if most() > limit:
            os.write(2, b"over the limit\\n")
            os._exit(9)
        time.sleep(0.002)

# Mapped files count as data for the system; what the process takes of its own is what is left.
mapped = os.path.getsize(os.path.join(folder, "model.safetensors"))
resource.setrlimit(resource.RLIMIT_DATA, (limit + mapped, limit + mapped))
threading.Thread(target=watch, daemon=True).start()
import qpass
if how == "load":
    model = qpass.load(folder, "w4a8")
else:
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=qpass.QPassConfig("w4a8"))
plan = qpass.plan(model.config.__class__.from_pretrained(folder), "w4a8")
print("RESULT" + json.dumps({"most": most(), "memory": plan.footprint.memory, "peak": plan.footprint.peak,
                             "packed": qpass.explain(model).counts["quantized"]}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the shapes of Llama-3.2-1B: 16 layers of 2048, intermediate 8192, a tied table of 128256."""
    folder = tmp_path_factory.mktemp("big")
    shapes = {"model.embed_tokens.weight": (128256, 2048), "model.norm.weight": (2048,)}
    for layer in range(16):
        own = {"self_attn.q_proj": (2048, 2048), "self_attn.k_proj": (512, 2048), "self_attn.v_proj": (512, 2048),
               "self_attn.o_proj": (2048, 2048), "mlp.gate_proj": (8192, 2048), "mlp.up_proj": (8192, 2048),
               "mlp.down_proj": (2048, 8192), "input_layernorm": (2048,), "post_attention_layernorm": (2048,)}
        shapes.update({f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()})
    numbers = (torch.randn(1 << 20) * 0.02).bfloat16()

    def make(shape: tuple[int, ...]) -> torch.Tensor:
        count = int(torch.tensor(shape).prod())
        return numbers.repeat(-(-count // len(numbers)))[:count].view(shape)

    write_file(folder / "model.safetensors", [
        Entry(name=name, dtype=torch.bfloat16, shape=shape, make=lambda shape=shape: make(shape))  # type: ignore[misc]
        for name, shape in shapes.items()])
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "dtype": "bfloat16",
              "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
              "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True, "max_position_embeddings": 8192}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("how", ["load", "from_pretrained"])
def test_peak_is_the_packed_model_and_the_largest_tensor(checkpoint: Path, how: str) -> None:
    assert (checkpoint / "model.safetensors").stat().st_size > 2.4e9
    done = subprocess.run([sys.executable, "-c", _LOAD, how, str(checkpoint), str(LIMIT)], capture_output=True,
                          text=True, cwd=checkpoint, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    seen = json.loads(line.removeprefix("RESULT"))
    assert seen["packed"] == 16 * 7
    assert seen["most"] <= seen["peak"] + ALLOWED_BESIDE, seen
