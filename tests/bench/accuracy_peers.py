"""Accuracy peers: other tools that quantize the same model on the same samples, each in an environment of its own.

A peer's script gets a checkpoint's folder, a file of ids [S, T], a folder to write a checkpoint to and its settings;
qpass then loads what it wrote: a peer's numbers are run by the same layers as ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class AccuracyPeer:
    """One row of another tool: its environment's folder, the script that runs it, what the script is told.

    name      of the row
    folder    under the folder of peers
    script    run by the folder's `venv/bin/python`, or by this one's Python if `program` names what it drives instead
    how       what installs it
    program   what must be there, in the folder
    settings  the script's further arguments
    samples   how many of the calibration samples it gets, spread over all; None is all, 0 a tool without data
    recipe    what qpass.load gets: "w4a8" keeps the tool's integers and rounds activations as well
    """

    name: str
    folder: str
    script: str
    how: str
    program: str = "venv/bin/python"
    settings: tuple[str, ...] = ()
    samples: int | None = None
    recipe: str | None = None

    def missing(self, root: Path | None) -> str | None:
        """Why it cannot run; None if it can."""
        if root is not None and (root / self.folder / self.program).exists():
            return None
        return f"not installed: {self.how}; then --peers PEERS"

    def run_name(self, model: Path, samples: Tensor) -> str:
        """Of the tool's run on these samples [S, T]: rows that differ only in how qpass loads the result share it."""
        return "-".join([model.name, self.folder, *self.settings, *map(str, samples.shape)])

    def run(self, root: Path, model: Path, samples: Tensor, scratch: Path) -> dict[str, Any]:
        """Writes `scratch`/quantized unless it is there; returns what it said.

        These are seconds, cpu_seconds, and where they are not the plan's bits; `float` if the weights it wrote are.
        """
        said = scratch / "said.json"
        if not said.exists():
            scratch.mkdir(parents=True, exist_ok=True)
            torch.save(samples, scratch / "ids.pt")
            program = root / self.folder / self.program
            python = [str(program)] if program.name == "python" else [sys.executable]
            settings = [*self.settings, *([] if program.name == "python" else [str(program)])]
            done = subprocess.run([*python, str(HERE / self.script), str(model), str(scratch / "ids.pt"),
                                   str(scratch / "quantized"), *settings], env={**os.environ, "HF_HUB_OFFLINE": "1"},
                                  capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{self.name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
            said.write_text(done.stdout.strip().splitlines()[-1], encoding="utf-8")
        told: dict[str, Any] = json.loads(said.read_text())
        return {**told, "samples": len(samples)}


def _own(name: str, package: str, **rest: Any) -> AccuracyPeer:
    """A tool that is a Python package, in a virtual environment."""
    folder = rest.pop("folder")
    return AccuracyPeer(name=name, folder=folder, script=f"accuracy_{folder}.py", **rest,
                        how=f"pip install {package}, in a virtual environment PEERS/{folder}/venv")


def _llamacpp(kind: str) -> AccuracyPeer:
    return AccuracyPeer(name=f"llama.cpp {kind}", folder="llamacpp", script="accuracy_llamacpp.py", samples=0,
                        program="build/bin/llama-quantize", settings=(kind,),
                        how="llama.cpp's llama-quantize, built as PEERS/llamacpp/build/bin/llama-quantize")


PEERS = (
    _own("w4a16 g64, AutoRound", "auto-round", folder="autoround", settings=("200",)),
    _own("w4a8 g64, AutoRound", "auto-round", folder="autoround", settings=("200",), recipe="w4a8"),
    _own("w4a16 g64, AutoRound, 50 iterations on 64 samples", "auto-round", folder="autoround", settings=("50",),
         samples=64),
    _own("w4a16 g64, GPTQModel's gptq on 64 samples", "gptqmodel", folder="gptqmodel", samples=64),
    _own("w4a16 g64, LLM Compressor's gptq", "llmcompressor", folder="llmcompressor"),
    _own("w4a8 g64, LLM Compressor's gptq", "llmcompressor", folder="llmcompressor", recipe="w4a8"),
    _own("bitsandbytes nf4", "bitsandbytes transformers accelerate", folder="bitsandbytes", samples=0),
    _own("w4a16_asym g64, HQQ", "hqq transformers accelerate", folder="hqq", samples=0),
    _llamacpp("Q4_K"), _llamacpp("Q4_0"), _llamacpp("Q8_0"),
)
