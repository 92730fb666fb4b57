"""Accuracy peers: other tools that quantize the same model on the same samples, each in an environment of its own.

A peer's script gets a checkpoint's folder, a file of ids [S, T] and a folder to write a checkpoint to, which qpass then
loads: its numbers are run by the same layers as ours.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class AccuracyPeer:
    """One tool: its row's name, its environment's folder, the script that runs it there and what installs it."""

    name: str
    folder: str
    script: str
    how: str

    def missing(self, root: Path | None) -> str | None:
        """Why it cannot run; None if it can."""
        if root is not None and (root / self.folder / "venv" / "bin" / "python").exists():
            return None
        return f"not installed: {self.how}, in a virtual environment PEERS/{self.folder}/venv; then --peers PEERS"

    def run(self, root: Path, model: Path, samples: Tensor, scratch: Path) -> dict[str, Any]:
        """Writes `scratch`/quantized; returns seconds of wall clock and of processor, and the number of samples."""
        torch.save(samples, scratch / "ids.pt")
        python = root / self.folder / "venv" / "bin" / "python"
        done = subprocess.run([str(python), str(HERE / self.script), str(model), str(scratch / "ids.pt"),
                               str(scratch / "quantized")], env={**os.environ, "HF_HUB_OFFLINE": "1"},
                              capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{self.name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        told = json.loads(done.stdout.strip().splitlines()[-1])
        return {"seconds": told["seconds"], "cpu_seconds": told["cpu_seconds"], "samples": len(samples)}


PEERS = (
    AccuracyPeer(name="w4a16 g64, LLM Compressor's gptq", folder="llmcompressor", script="accuracy_llmcompressor.py",
                 how="pip install llmcompressor"),
    AccuracyPeer(name="w4a16 g64, GPTQModel's gptq", folder="gptqmodel", script="accuracy_gptqmodel.py",
                 how="pip install gptqmodel"),
    AccuracyPeer(name="w4a16 g64, AutoRound", folder="autoround", script="accuracy_autoround.py",
                 how="pip install auto-round"),
)
