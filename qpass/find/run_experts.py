"""Run experts: the part of a captured graph that one module call computes in, its values on made-up numbers out.

So that what a module computes can be tested and need not be recognized: everything runs in float64, and each expert's
weight is a window into one small buffer of random numbers, a step further along for each expert. Windows overlap, so
a parameter [E, N, K] takes hardly more memory than [N, K], and no two experts are equal.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from qpass.capture.find_products import scope_of

_STEP = 7  # numbers from one expert's window to the next one's
_LARGEST = 1 << 28  # bytes that one value may take


class CannotRun(Exception):
    """Why the graph of a call cannot be run on made-up numbers, as the end of a sentence."""


def nodes_of_call(graph: fx.Graph, call: Any) -> list[fx.Node]:
    """Every node that ran inside the module call, in the graph's order."""
    return [node for node in graph.nodes if node.op == "call_function"
            and any(entry.call == call for entry in scope_of(node))]


def window_weight(shape: Sequence[int], draw: torch.Generator) -> Tensor:
    """float64 [E, A, B] of which every expert's matrix is a window into one buffer, of size 1 over sqrt(A or B)."""
    experts, rows, columns = shape
    numbers = torch.randn(rows * columns + experts * _STEP, dtype=torch.float64, generator=draw)
    small: Tensor = numbers / max(rows, columns) ** 0.5
    return small.as_strided(tuple(shape), (_STEP, columns, 1))


def run_call(nodes: Sequence[fx.Node], given: Mapping[fx.Node, Tensor], parameters: Mapping[str, Tensor]
             ) -> dict[fx.Node, Any]:
    """The value of each of `nodes`, copied as soon as it is there. `given` holds what comes from outside.

    parameters  by `get_attr` target. Raises CannotRun for an input that is neither, and what a node raises.
    """
    inside, usual = set(nodes), torch.get_default_dtype()
    values: dict[fx.Node, Any] = {node: value.clone() for node, value in given.items()}
    seen: dict[fx.Node, Any] = {}
    try:
        torch.set_default_dtype(torch.float64)  # of tensors that the code makes itself
        for node in nodes:
            for source in node.all_input_nodes:
                if source in values or source in inside:
                    continue
                if source.op != "get_attr" or str(source.target) not in parameters:
                    raise CannotRun(f"reads {source.name}, which is computed outside of it")
                values[source] = parameters[str(source.target)]
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
            value = _call(node, tree_map(_wide, args), {k: _wide(v) for k, v in kwargs.items()})
            values[node] = value
            seen[node] = value.clone() if isinstance(value, Tensor) and _own_size(value) < _LARGEST else value
    finally:
        torch.set_default_dtype(usual)
    return seen


def _call(node: fx.Node, args: Any, kwargs: dict[str, Any]) -> Any:
    wanted = node.meta.get("val")
    if isinstance(wanted, Tensor) and wanted.numel() * 8 > _LARGEST and not _is_view_of_weight(node):
        raise CannotRun(f"makes a tensor {list(wanted.shape)}, which is too large to try; use another implementation "
                        "of the experts")
    target: Any = node.target
    if target is operator.getitem:
        return args[0][args[1]]
    if "grouped_mm" in str(target) and "backward" not in str(target):
        return _grouped(node, args, kwargs)
    if "histc" in str(target):  # counts integers on some devices, which the CPU's does not
        args = (args[0].double(), *args[1:])
    return target(*args, **kwargs)


def _grouped(node: fx.Node, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """x [S, K], weight [E, K, N], offs [E], where each group of rows ends; without offs, x is [E, T, K]."""
    x, weight = args[0], args[1]
    ends = args[2] if len(args) > 2 else kwargs.get("offs")
    if ends is None:
        y: Tensor = torch.bmm(x, weight)
        return y
    if x.ndim != 2 or weight.ndim != 3:
        raise CannotRun(f"calls {node.target} on {x.ndim}-D and {weight.ndim}-D tensors")
    out: Tensor = x.new_zeros(x.shape[0], weight.shape[2])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            out[start:end] = x[start:end] @ weight[expert]
        start = end
    return out


def _wide(value: Any) -> Any:
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value


def _own_size(value: Tensor) -> int:
    return value.untyped_storage().nbytes() if 0 in value.stride() else value.numel() * 8


def _is_view_of_weight(node: fx.Node) -> bool:
    return bool(getattr(node.target, "is_view", False))
