"""Memory of experts, measured in a process of its own: never a second copy of a layer's float weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tests.small_experts

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")

_MEASURE = """
import ctypes, gc, json, re, threading, time
import qpass
import qpass.lowering.install

torch.set_num_threads(1)
LAYERS, E, H, N = 4, 64, 256, 256

def resident():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

def build(layers, inner):
    return nn.Sequential(*(Mixture(Experts(E, H, inner), 1) for _ in range(layers))).to(torch.bfloat16).eval()

x = torch.zeros(1, H, dtype=torch.bfloat16)
recipe = qpass.Recipe(None, overrides={"experts": "w4a8_channel"})
qpass.quantize(build(1, 64), recipe, example_inputs=(x,), progress=False)(x)  # what is loaded once
model = build(LAYERS, N)
gc.collect(); ctypes.CDLL(None).malloc_trim(0)
start, most, stop = resident(), 0, False

def watch():
    global most
    while not stop:
        most = max(most, resident())
        time.sleep(0.0005)

thread = threading.Thread(target=watch)
thread.start()
qpass.quantize(model, recipe, example_inputs=(x,), progress=False)
stop = True
thread.join()
after = resident()
packed = sum(m.nbytes for m in model.modules() if hasattr(m, "nbytes"))
print("RESULT" + json.dumps({"start": start, "during": most, "after": after, "packed": packed, "layers": LAYERS,
                             "float": 2 * LAYERS * E * 3 * H * N, "expert": 2 * 3 * H * N}))
"""


def test_peak_is_the_model_and_one_packed_layer(tmp_path: Path) -> None:
    source = Path(str(tests.small_experts.__file__)).read_text(encoding="utf-8") + _MEASURE
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=tmp_path, timeout=300,
                          check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    seen = json.loads(line.removeprefix("RESULT"))
    # One layer packed beside its float weights, and some experts in the making; a second float layer would be 4 times
    # the packed one. Finding experts runs one of them in float64, twice. 4 MiB for graphs and other objects.
    making = seen["packed"] / seen["layers"] + 24 * seen["expert"] + (4 << 20)
    assert seen["during"] - seen["start"] <= making, seen
    assert making < seen["packed"] / seen["layers"] + seen["float"] / seen["layers"]
    assert seen["start"] - seen["after"] >= seen["float"] - seen["packed"] - 8 * seen["expert"], seen
