"""Memory, measured in a process of its own: quantize peaks at model and one layer and leaves one copy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")

_MEASURE = """
import ctypes, gc, json, re, sys, threading, time
import torch
from torch import nn
import qpass
from qpass.layers.packed_layers import PackedWeight
import qpass.lowering.install

torch.set_num_threads(1)

def resident(what="RssAnon"):
    return 1024 * int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

class Peak:
    def __enter__(self):
        self.most, self.stop = 0, False
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self
    def watch(self):
        while not self.stop:
            self.most = max(self.most, resident())
            time.sleep(0.0005)
    def __exit__(self, *error):
        self.stop = True
        self.thread.join()

def build(layers, width):
    return nn.Sequential(*(nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(layers))).eval()

layers, width, scheme, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
x = torch.zeros(1, width, dtype=torch.bfloat16)
# what is loaded once
small = qpass.quantize(build(layers, 64), scheme, example_inputs=(x[:, :64],), progress=False)
small(x[:, :64])
model = build(layers, width)
gc.collect(); ctypes.CDLL(None).malloc_trim(0)
start = resident()
with Peak() as during:
    qpass.quantize(model, scheme, example_inputs=(x,), progress=False)
after = resident()
packed = sum(m.nbytes for m in model.modules() if isinstance(m, PackedWeight))
with Peak() as saving:
    qpass.save(model, folder, max_shard_size="50MB")
result = {"start": start, "during": during.most, "after": after, "packed": packed, "saving": saving.most,
          "float": 2 * layers * width * width, "layer": 2 * width * width, "parameters": len(list(model.parameters()))}
del model
gc.collect(); ctypes.CDLL(None).malloc_trim(0)
result["before_load"] = resident()
with torch.device("meta"):
    empty = build(layers, width)
with Peak() as loading:
    loaded = qpass.load(folder, model=empty)
result["loading"] = loading.most
print("RESULT" + json.dumps(result))
"""


def measure(tmp_path: Path, layers: int, width: int, scheme: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", _MEASURE, str(layers), str(width), scheme, str(tmp_path / "out")],
                          capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("layers", "width", "scheme"), [
    (10, 2048, "w8a16"),
    pytest.param(40, 2048, "w4a8", marks=pytest.mark.slow),
    pytest.param(10, 4096, "w8a8", marks=pytest.mark.slow),
], ids=["84 MB w8a16", "335 MB w4a8", "335 MB w8a8"])
def test_peak_is_the_model_and_one_layer(tmp_path: Path, layers: int, width: int, scheme: str) -> None:
    seen = measure(tmp_path, layers, width, scheme)
    # 4 MiB for graphs and other objects that do not grow with the weights; next to a real model they are nothing.
    allowed = seen["float"] + seen["layer"] + 0.05 * seen["float"] + (4 << 20)
    # `start` holds the float model already; what the process had before it is no part of the model.
    assert seen["during"] - seen["start"] + seen["float"] <= allowed, seen
    # One copy: what was float is gone, apart from what the allocator keeps back.
    assert seen["start"] - seen["after"] >= seen["float"] - seen["packed"] - seen["layer"] - 0.05 * seen["float"], seen
    assert seen["parameters"] == 0
    # Packing for the disk costs a few layers of codes, never a second copy of the model.
    assert seen["saving"] - seen["after"] <= 4 * seen["layer"] + 0.05 * seen["float"], seen
    assert seen["loading"] - seen["before_load"] <= seen["packed"] + 3 * seen["layer"] + 0.05 * seen["float"], seen
