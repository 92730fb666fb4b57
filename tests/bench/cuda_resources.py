"""Resources of the Triton programs, without a GPU: what each becomes for sm_80, sm_89 and sm_90, as a table.

    python tests/bench/cuda_resources.py           every format, at 1, 48 and 4096 rows; ptxas comes with Triton
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cuda_checkout import use_checkout


def main() -> int:
    use_checkout()
    from tests.kernels.cuda.test_compiled import SLOW, compiled, ids

    print("| program | registers | stack bytes | shared KiB | 16-byte loads | tensor cores |")
    print("|---|---|---|---|---|---|")
    failed = 0
    for name, (weight, activation, m, target, _) in zip(ids(SLOW), SLOW, strict=True):
        try:
            made = compiled(weight, activation, m, target)
        except Exception as error:
            failed += 1
            print(f"| {name} | {type(error).__name__}: {str(error).splitlines()[0][:80]} |||||", flush=True)
            continue
        wide = sum(count for op, count in made.instructions.items() if op.startswith("cp.async.cg") or ".v4." in op)
        print(f"| {name} | {made.registers} | {made.spilled} | {made.shared / 1024:.0f} | {wide} | "
              f"{', '.join(sorted(made.products()))} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
