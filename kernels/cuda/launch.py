"""Launch: activations, packed weights and their specs in, products out: the arguments and grid of a Triton program."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qpass.kernels.cuda.capability import capability_of
from qpass.kernels.cuda.configs import Config, Problem, rows_of
from qpass.kernels.cuda.layouts import INTEGER_ROWS, channels_of, names, padded_inputs
from qpass.kernels.cuda.program_numbers import ProgramNumbers, numbers_of
from qpass.kernels.cuda.tuning import chosen_config
from qpass.spec import LinearSpec

WEIGHTS_IN_A_LAUNCH = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """The activation. x contiguous [R, K]: floats, or codes with `scale` float32 [R, 1] (or [R, K / group]) and
    `zero_point` float32 [R, 1] or None."""

    x: Tensor
    scale: Tensor | None = None
    zero_point: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Grouping:
    """Sorted rows of a layer of experts (routing.py): row `slots[i] // places` of x meets expert `owners[i // block]`
    and gives row `slots[i]` of the result."""

    slots: Tensor
    owners: Tensor
    places: int
    block: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Operand:
    """One packed weight with its bias. Of experts, each tensor has a leading dimension."""

    spec: LinearSpec
    tensors: dict[str, Tensor]
    bias: Tensor | None

    def alike(self) -> tuple[Any, ...]:
        """What weights of one launch share."""
        bias = None if self.bias is None else self.bias.dtype
        return (replace(self.spec, out_features=0), self.scale.dtype, bias)

    @property
    def weight(self) -> Tensor:
        for name in ("qweight", "packed", "weight"):
            if name in self.tensors:
                return self.tensors[name]
        raise KeyError(f"{self.spec} has no weight among {', '.join(self.tensors)}")

    @property
    def scale(self) -> Tensor:
        return self.tensors["absmax"] if "absmax" in self.tensors else self.tensors["scale"]


def operands(packed: Sequence[Tensor], bias: Sequence[Tensor | None], specs: Sequence[LinearSpec]) -> list[Operand]:
    """The weights of a list of packed tensors, in order."""
    made, start = [], 0
    for spec, one in zip(specs, bias, strict=True):
        known = names(spec)
        made.append(Operand(spec=spec, tensors=dict(zip(known, packed[start:start + len(known)], strict=True)),
                            bias=one))
        start += len(known)
    return made


def multiply(rows: Rows, weights: Sequence[Operand], dtype: torch.dtype, grouping: Grouping | None = None,
             config: Config | None = None) -> list[Tensor]:
    """rows @ weight.T + bias of each weight, [R, N] in `dtype`; [places * R, N] with a grouping, unknown rows unset."""
    results: dict[int, Tensor] = {}
    waiting = list(enumerate(weights))
    while waiting:
        key = waiting[0][1].alike()
        together = [one for one in waiting if one[1].alike() == key][:1 if grouping else WEIGHTS_IN_A_LAUNCH]
        made = _launch(rows, [one for _, one in together], dtype, grouping, config)
        results.update(zip((i for i, _ in together), made, strict=True))
        waiting = [one for one in waiting if one[0] not in results]
    return [results[i] for i in range(len(weights))]


def _launch(rows: Rows, weights: Sequence[Operand], dtype: torch.dtype, grouping: Grouping | None,
            config: Config | None) -> list[Tensor]:
    x, spec = rows.x, weights[0].spec
    numbers = numbers_of(spec)
    m = x.shape[0] * (grouping.places if grouping else 1)
    outputs = [x.new_empty((m, one.spec.out_features), dtype=dtype) for one in weights]
    if isinstance(m, int) and m == 0:
        return outputs
    if config is None:
        problem = problem_of(spec, numbers, x, [one.spec.out_features for one in weights], grouping)
        config = chosen_config(problem, lambda tried: _run(rows, weights, numbers, outputs, grouping, tried), x)
    return _run(rows, weights, numbers, outputs, grouping, config)


def problem_of(spec: LinearSpec, numbers: ProgramNumbers, x: Tensor, n: Sequence[int], grouping: Grouping | None
               ) -> Problem:
    """What the choice of block sizes depends on."""
    kind = {torch.int8: "int8", torch.float8_e4m3fn: "fp8", torch.float32: "float"}.get(x.dtype, "half")
    m = rows_of(x.shape[0]) if grouping is None else grouping.block
    return Problem(kind=kind, m=m, n=sum(n), k=spec.in_features, step=numbers.step, halves=numbers.halves,
                   capability=capability_of(x.device) or 90, grouped=grouping is not None)


def _run(rows: Rows, weights: Sequence[Operand], numbers: ProgramNumbers, outputs: list[Tensor],
         grouping: Grouping | None, config: Config) -> list[Tensor]:
    from qpass.kernels.cuda.programs.launcher import language, launcher
    from qpass.kernels.cuda.programs.product import product

    x, first = rows.x, weights[0]
    spec, k_padded = first.spec, padded_inputs(first.spec)
    # The interpreter cuts a float32 to bfloat16 instead of rounding it: there, torch does that.
    split = config.splits > 1 or (x.device.type == "cpu" and outputs[0].dtype == torch.bfloat16)
    m = outputs[0].shape[0]
    written = outputs
    if split:
        written = [x.new_empty((config.splits, m, one.spec.out_features), dtype=torch.float32) for one in weights]
    integer = first.tensors.get("scale") is not None and first.tensors["scale"].dtype == torch.int8
    given: list[Any] = []
    for one, out in zip(weights, written, strict=True):
        given += _pointers(one, out, bias=not split, expert=grouping is not None)
    given += [None] * (6 * (WEIGHTS_IN_A_LAUNCH - len(weights)))
    n = [one.spec.out_features for one in weights]
    sizes = n + [0] * (WEIGHTS_IN_A_LAUNCH - len(n))
    scale_rows = [one.scale.shape[-1] for one in weights] + [0] * (WEIGHTS_IN_A_LAUNCH - len(n))
    steps = -(-k_padded // config.block_k)
    scale = rows.scale
    tensors = first.tensors
    factor = tensors.get("global_scale", tensors.get("scale_2"))
    block_m = config.block_m if grouping is None else grouping.block
    strides = [_expert_stride(t, grouping) for t in (
        first.weight, first.scale, tensors.get("zero_point"), tensors.get("colsum"), first.bias)]
    blocks_m = -(-m // block_m) if grouping is None else grouping.owners.shape[0]
    grid = (blocks_m * sum(-(-size // config.block_n) for size in n), config.splits)
    with on_device(x):
        launcher(product)[grid](
            x, scale, rows.zero_point, factor, tensors.get("code"),
            None if grouping is None else grouping.slots, None if grouping is None else grouping.owners, *given,
            m, spec.in_features, *sizes, k_padded, *scale_rows, -(-steps // config.splits),
            0 if scale is None else scale.stride(0), 0 if scale is None else scale.shape[1], *strides,
            1 if grouping is None else grouping.places,
            COUNT=len(weights), FORMAT=_format(first, numbers), HALVES=numbers.halves,
            DTYPE=language(x.dtype, x.device), GROUP=numbers.group,
            SCALES="integer" if integer else _scales(first, numbers), SCALE_ROWS=numbers.scale_rows,
            FACTOR=numbers.factor, X_GROUP=numbers.x_group, GROUPED=grouping is not None, SPLIT=split,
            EXACT=x.dtype == torch.float32, FAST=_fast(x) and not integer, BLOCK_M=block_m, BLOCK_N=config.block_n,
            BLOCK_K=config.block_k, num_warps=config.warps, num_stages=config.stages)
    if not split:
        return outputs
    return [_added(parts, one.bias, out.dtype) for parts, one, out in zip(written, weights, outputs, strict=True)]


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Makes x's GPU the current one, on which Triton launches; a compiler that traces sees to that itself."""
    real = x.device.type == "cuda" and type(x) is Tensor and not torch.compiler.is_compiling()
    return torch.cuda.device(x.device) if real else nullcontext()


def _added(parts: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    # In plain torch, so that a compiler fuses it into whatever reads the result.
    y = parts.sum(0)
    return (y if bias is None else y + bias.float()).to(dtype)


def _pointers(one: Operand, out: Tensor, *, bias: bool, expert: bool) -> list[Any]:
    """w, s, z, c, b, o of one weight."""
    tensors, scale = one.tensors, _as_bytes(one.scale)
    colsum = tensors.get("colsum")
    if scale.dtype == torch.int8:  # integer scales: multipliers, and a channel scale in the place of column sums
        channels = channels_of(scale)
        scale, colsum = scale.narrow(0, INTEGER_ROWS, scale.shape[0] - INTEGER_ROWS), channels
    return [_as_bytes(one.weight), scale, tensors.get("zero_point"), colsum, one.bias if bias else None, out]


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype.is_floating_point and tensor.element_size() == 1 else tensor


def _format(one: Operand, numbers: ProgramNumbers) -> str:
    return "e5m2" if one.weight.dtype == torch.float8_e5m2 else numbers.format


def _scales(one: Operand, numbers: ProgramNumbers) -> str:
    return "e8m0" if one.scale.dtype == torch.float8_e8m0fnu else numbers.scales


def _expert_stride(tensor: Tensor | None, grouping: Grouping | None) -> int:
    return 0 if tensor is None or grouping is None else tensor.stride(0)


def _fast(x: Tensor) -> bool:
    """Whether the program may hold instructions of a GPU: not where it is interpreted."""
    return x.device.type == "cuda"
