"""Run: every benchmark of this folder that `make bench` shows, one after the other, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = ("linear.py", "capture.py")


def main() -> int:
    failed = []
    for name in BENCHMARKS:
        script = Path(__file__).parent / name
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, str(script), *sys.argv[1:]], check=False).returncode != 0:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
