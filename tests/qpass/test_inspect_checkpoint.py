"""Inspect: what is told of a checkpoint without its weights, of layers, of stacks of experts and of GGUF files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import qpass
from tests.qpass.formats.fixture_folders import SMALL

EVERY = sorted(str(folder.relative_to(SMALL)) for folder in SMALL.glob("*/*") if folder.is_dir())


def where(name: str) -> Path:
    return next(iter((SMALL / name).glob("*.gguf")), SMALL / name)


@pytest.mark.parametrize("name", EVERY)
def test_every_format_lists_its_quantized_weights(name: str) -> None:
    found = qpass.inspect(where(name))
    assert found.format is not None and found.layers and "no architecture named" not in found.model
    assert 0 < sum(layer.nbytes for layer in found.layers) <= found.nbytes
    assert all(layer.kernel and layer.numbers for layer in found.layers)


def test_stacks_and_gguf_are_told_by_their_own_names() -> None:
    layers = qpass.inspect(SMALL / "mxfp4_gptoss" / "gptoss").layers
    experts = {layer.path.rpartition(".")[2]: layer for layer in layers}
    assert experts["gate_up_proj"].shape == (4, 128, 128) and experts["down_proj"].shape == (4, 128, 64)
    assert "mxfp4" in experts["down_proj"].numbers
    found = qpass.inspect(where("gguf/q4_0"))
    assert found.model == "llama" and any(layer.path == "blk.0.attn_q" and layer.numbers == "w4a16 g32"
                                          for layer in found.layers)


def test_headers_of_every_format_are_read_without_torch_and_numpy() -> None:
    code = """
import sys
from types import ModuleType
class Kept(ModuleType):
    def __getattr__(self, name):
        raise RuntimeError(f"{self.__name__}.{name} is used")
for package in ("torch", "numpy"):
    sys.modules[package] = Kept(package)
from qpass.inspect_checkpoint import inspect
for where in sys.argv[1:]:
    print(inspect(where))
"""
    folders = [str(where(name)) for name in EVERY]
    said = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert said.stdout == "".join(f"{qpass.inspect(folder)}\n" for folder in folders)


def test_the_command_says_the_same_and_imports_no_torch_which_a_format_from_elsewhere_still_can() -> None:
    code = """
import sys
from qpass.cli import main
assert main() == 0
assert "torch" in sys.modules and not {"torch._C", "numpy._core", "numpy.core"} & set(sys.modules)
import torch.nn.functional
from torch import nn
assert nn.Linear(2, 3)(torch.ones(1, 2)).shape == (1, 3) and torch.nn.functional.relu(torch.ones(1)) == 1
"""
    folder = str(SMALL / "compressed-tensors" / "w4a16_asym")
    said = subprocess.run([sys.executable, "-c", code, "inspect", folder], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout, said.stderr) == (0, f"{qpass.inspect(folder)}\n", "")


def test_nothing_heavy_is_imported() -> None:
    code = ("import qpass, sys; qpass.inspect(sys.argv[1]); "
            "print([m for m in ('transformers', 'torchao', 'safetensors.torch', 'gguf', 'numba') if m in sys.modules])")
    said = subprocess.run([sys.executable, "-c", code, str(SMALL / "gptq" / "w3_g32")], capture_output=True, text=True,
                          check=True)
    assert said.stdout.strip() == "[]"
