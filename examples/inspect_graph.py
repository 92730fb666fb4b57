"""Looking inside: the plan's facts, every pass's graph as Python, and the code that the compiler made of it."""

import os
import tempfile
from pathlib import Path

dumps = Path(tempfile.mkdtemp())
os.environ["QPASS_DEBUG"] = "3"  # 1: a line a layer; 2: refusals, counts and times of passes; 3: dumps as well
os.environ["QPASS_DEBUG_DIR"] = str(dumps)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(dumps / "compiled")  # fresh: a cached graph runs no pass and shows nothing

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch._inductor.utils import run_and_get_code  # noqa: E402

import qpass  # noqa: E402


class Block(nn.Module):
    """A norm, and two products that read it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up = nn.RMSNorm(128), nn.Linear(128, 256), nn.Linear(128, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return nn.functional.silu(self.gate(h)) * self.up(h)


torch.manual_seed(0)
model, x = Block().eval(), torch.randn(8, 128)
for row in qpass.plan(model, "w4a8", example_inputs=x).rows:
    print(f"{row.name}: {row.status} as {row.effective} on {row.kernel}, input from {row.produced_by}, "
          f"shared with number {row.shared_input}")

qpass.quantize(model, "w4a8", example_inputs=x, progress=False)
with torch.no_grad():
    _, (code, *_) = run_and_get_code(torch.compile(model), x)

files = sorted(dumps.glob("graph_*/*.py"))
print("\ndumps:", *[str(file.relative_to(dumps)) for file in files], sep="\n  ")
print(f"\n{files[-1].name}:\n{files[-1].read_text()}")
kernels = [line.strip() for line in code.splitlines() if "cpp_fused" in line and "(" in line and "=" not in line]
print("calls of fused kernels in the generated code:", *kernels, sep="\n  ")
print("\n" + "\n".join(f"{row.name}: activation {row.activation}" for row in qpass.explain(model).rows))
