"""llama.cpp's own benchmarks: one quantized file and requests as in model_torch.py in, microseconds out.

Each request is a process of its own, as its users run them; loading is not in the times.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any


class LlamaBench:
    """A GGUF file of type `kind`, made from the bf16 one if it is not there."""

    def __init__(self, programs: Path, source: Path, kind: str, threads: int) -> None:
        self.programs, self.threads = programs, str(threads)
        self.file = source.with_name(source.name.replace("bf16", kind))
        if not self.file.exists():
            subprocess.run([programs / "llama-quantize", "--pure", source, self.file, kind, str(threads)], check=True,
                           capture_output=True)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Load: its peak memory with a token made. Prefill and decode: a llama-bench or llama-batched-bench."""
        try:
            return self._load() if request["do"] == "load" else self._time(request)
        except subprocess.CalledProcessError as error:
            return {"failed": f"{Path(error.cmd[0]).name} ended with exit code {error.returncode}"}
        except (KeyError, IndexError) as error:
            return {"failed": f"{type(error).__name__} in what it printed: {error}"}

    def _time(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "prefill":
            rows = self._rows("llama-bench", "-p", str(request["tokens"]), "-n", "0", "-r", "1", "-o", "jsonl")
            return {"us": [request["tokens"] / rows[0]["avg_ts"] * 1e6]}
        batch, tokens = request["batch"], request["tokens"]
        if batch == 1:
            rows = self._rows("llama-bench", "-p", "0", "-n", str(tokens), "-d", "128", "-r", "1", "-o", "jsonl")
            return {"us": [1e6 / rows[0]["avg_ts"]]}
        rows = self._rows("llama-batched-bench", "-c", "4096", "-npp", "128", "-pps", "-ntg", str(tokens), "-npl",
                          str(batch), "--output-format", "jsonl")
        return {"us": [batch / rows[-1]["speed_tg"] * 1e6]}

    def _rows(self, program: str, *arguments: str) -> list[dict[str, Any]]:
        done = subprocess.run([self.programs / program, "-m", self.file, "-t", self.threads, *arguments], text=True,
                              capture_output=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    def _load(self) -> dict[str, Any]:
        start = time.perf_counter()
        # Read, not mapped: a mapped file's pages would count beside the repacked weights.
        process = subprocess.Popen(
            [self.programs / "llama-bench", "-m", self.file, "-t", self.threads, "-p", "0", "-n", "1", "-r", "1", "-lm",
             "none"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            return {"failed": f"llama-bench ended with exit code {process.returncode}"}
        return {"seconds": time.perf_counter() - start, "peak": usage.ru_maxrss * 1024}
