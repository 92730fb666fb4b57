"""Compiled programs: a call of a kernel on fake CUDA tensors in, what Triton makes of its launches for a GPU out.

Nothing runs: the launch is recorded, its arguments are specialized as Triton does at a call (16 divides it, it is 1),
and the program is compiled for the target to PTX, and by Triton's own ptxas to a binary.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from qpass.kernels.cuda.capability import assume

_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8",
          torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64", torch.float8_e4m3fn: "*fp8e4nv"}
_INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+\s+)?((?:mma|wgmma|ld\.global|cp\.async|lop3)[\w.:]*)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One program: how often each instruction stands in it, registers of a thread, bytes spilled, shared memory."""

    name: str
    target: int
    instructions: Counter[str]
    ptx: str
    registers: int | None
    spilled: int | None
    shared: int

    def products(self) -> set[str]:
        """The tensor-core instructions, without their shapes: `wgmma s32.s8.s8`, `mma f32.bf16.bf16.f32`."""
        found = set()
        for name in self.instructions:
            if name.startswith(("mma.sync", "wgmma.mma_async")):
                kind = name.split(".")[0]
                found.add(f"{kind} " + ".".join(re.findall(r"\b(?:f32|s32|bf16|f16|s8|e4m3|tf32)\b", name)))
        return found


@dataclass(frozen=True, kw_only=True)
class Launch:
    program: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def fake(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor on a GPU that is not there; only under recorded()."""
    return torch.empty(shape, dtype=dtype, device="cuda")


def like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same on that GPU."""
    return [fake(*t.shape, dtype=t.dtype) for t in tensors]


def recorded(run: Callable[[], Any], target: int) -> list[Launch]:
    """The launches of `run` for a GPU of this capability; it makes its tensors by `fake`."""
    from qpass.kernels.cuda.programs import launcher as module

    found: list[Launch] = []

    class Recorder:
        def __init__(self, program: Any) -> None:
            self.program = program

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **kwargs: found.append(Launch(program=self.program, args=args, kwargs=kwargs))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, "launcher", Recorder))
        stack.enter_context(assume(target))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(torch.no_grad())
        run()
    return found


def compile_launch(launch: Launch, target: int) -> Compiled:
    """Raises what Triton raises if it cannot."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    program = launch.program
    options = {name: value for name, value in launch.kwargs.items() if name in ("num_warps", "num_stages")}
    given = dict(zip(program.arg_names, launch.args, strict=False)) | {
        name: value for name, value in launch.kwargs.items() if name not in options}
    signature, constants, attributes = {}, {}, {}
    fixed = {p.name for p in program.params if p.do_not_specialize}
    for i, name in enumerate(program.arg_names):
        value = given[name]
        one = isinstance(value, int) and value == 1 and name not in fixed
        if program.params[i].is_constexpr or value is None or one:
            signature[name] = "constexpr"
            constants[(i,)] = value
            continue
        signature[name] = _TYPES[value.dtype] if isinstance(value, Tensor) else (
            "i32" if isinstance(value, int) else "fp32")
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and name not in fixed):
            attributes[(i,)] = [["tt.divisibility", 16]]
    made = triton.compile(ASTSource(program, signature, constants, attributes), target=GPUTarget("cuda", target, 32),
                          options=options)
    ptx = made.asm["ptx"]
    registers, spilled = _resources(made.asm.get("cubin"), Path(triton.__file__).parent)
    return Compiled(name=program.__name__, target=target, instructions=Counter(_INSTRUCTION.findall(ptx)), ptx=ptx,
                    registers=registers, spilled=spilled, shared=made.metadata.shared)


def _resources(binary: bytes | None, triton_folder: Path) -> tuple[int | None, int | None]:
    """Registers and bytes of stack, from the binary, where Triton's tools are at hand."""
    tool = triton_folder / "backends/nvidia/bin/cuobjdump"
    if binary is None or not tool.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        told = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=False)
    found = re.search(r"REG:(\d+) STACK:(\d+)", told.stdout + told.stderr)
    return (int(found[1]), int(found[2])) if found else (None, None)
