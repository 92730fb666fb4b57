"""Walk: a node of a captured graph in, the parameter it is a view of, and how it lies in it, out."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

aten = torch.ops.aten
Orientation = Literal["as stored", "swapped", "part", "reshaped"]

_COPIES = (aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default,
           aten._unsafe_view.default)
_CASTS = (aten._to_copy.default,)
GATHERS = (aten.index.Tensor, aten.index_select.default)
TURNS = (aten.t.default, aten.transpose.int, aten.permute.default)


@dataclass(frozen=True, kw_only=True)
class WeightView:
    """An operand that is a parameter seen through views.

    root         the `get_attr` node
    steps        the nodes from the parameter (excluded) to the operand (included)
    orientation  of its last two dims: "as stored" if operand[..., i, j] is parameter[..., i, j], "swapped" if it is
                 parameter[..., j, i], "part" if it holds only some of the parameter, "reshaped" otherwise
    per_expert   the parameter has a third, leading dim from which this takes all, one, or the rows an index names
    cast         the dtype it was cast to on the way, if it was
    """

    root: fx.Node
    steps: tuple[fx.Node, ...]
    orientation: Orientation
    per_expert: bool = False
    cast: torch.dtype | None = None

    @property
    def name(self) -> str:
        return str(self.root.target)


def is_view(node: fx.Node) -> bool:
    """Whether `node` holds its first argument's numbers, all or some, in another shape."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and is_view(source)
    return node.target in _COPIES or bool(getattr(node.target, "is_view", False))


def view_of_parameter(node: fx.Node, parameters: frozenset[str]) -> WeightView | None:
    """`node` as a view of one of `parameters`, or None if it is anything else."""
    steps: list[fx.Node] = []
    cast: torch.dtype | None = None
    while node.op != "get_attr":
        is_gather = node.target in GATHERS and _first_dim_only(node)
        if not (is_view(node) or is_gather or node.target in _CASTS):
            return None
        if node.target in _CASTS:
            cast = node.meta["val"].dtype
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return None
        steps.append(node)
        node = source
    if str(node.target) not in parameters:
        return None
    stored = node.meta["val"]
    gathered = any(step.target in GATHERS for step in steps)
    if gathered and stored.ndim < 3:
        return None  # rows of a table picked by an index: what comes out is an activation
    if cast is not None and cast == stored.dtype:
        cast = None
    orientation, per_expert = _lie(stored.shape, tuple(reversed(steps)))
    return WeightView(root=node, steps=tuple(reversed(steps)), orientation=orientation, per_expert=per_expert,
                      cast=cast)


def _first_dim_only(node: fx.Node) -> bool:
    if node.target is aten.index_select.default:
        return bool(node.args[1] == 0)
    indices = node.args[1]
    return isinstance(indices, (list, tuple)) and len(indices) == 1 and indices[0] is not None


def _lie(stored: torch.Size, steps: tuple[fx.Node, ...]) -> tuple[Orientation, bool]:
    """Repeat the views on a tensor that holds nothing and read the answer off its strides."""
    try:
        seen: Any = torch.empty(stored, device="meta")
        for step in steps:
            seen = _repeat(step, seen)
    except (RuntimeError, TypeError, IndexError):  # a view that only a copy made possible
        return "reshaped", False
    if not isinstance(seen, Tensor) or seen.ndim < 2 or len(stored) < 2:
        return "reshaped", False
    rows, columns = stored[-2], stored[-1]
    sizes, strides = seen.shape[-2:], seen.stride()[-2:]
    batch = [(size, stride) for size, stride in zip(seen.shape[:-2], seen.stride()[:-2], strict=True)
             if size > 1 and stride != 0]
    if len(stored) == 2:
        whole, per_expert = not batch and int(seen.storage_offset()) == 0, False
    elif len(stored) == 3:
        per_expert = not batch or (len(batch) == 1 and batch[0][1] == rows * columns)
        whole = per_expert and int(seen.storage_offset()) % max(rows * columns, 1) == 0
    else:
        return "reshaped", False
    if whole and (rows == columns == 1 or rows * columns == 0):  # nothing to tell by: count the turns
        turns = sum(step.target in TURNS for step in steps)
        return ("swapped" if turns % 2 else "as stored"), per_expert
    if whole and _same(sizes, strides, (rows, columns), (columns, 1)):
        return "as stored", per_expert
    if whole and _same(sizes, strides, (columns, rows), (1, columns)):
        return "swapped", per_expert
    count = 1
    for size, stride in zip(seen.shape, seen.stride(), strict=True):
        count *= size if stride != 0 else 1
    return ("part" if count < stored.numel() else "reshaped"), False


def _repeat(step: fx.Node, seen: Any) -> Any:
    if step.target is operator.getitem:
        return seen[step.args[1]]
    if step.target in GATHERS or step.target in _CASTS:
        return seen
    if step.target is aten._unsafe_view.default:
        return aten.view.default(seen, *step.args[1:])
    if step.target in _COPIES:
        return seen
    target: Any = step.target
    return target(seen, *step.args[1:], **step.kwargs)


def _same(sizes: Any, strides: Any, wanted_sizes: Any, wanted_strides: Any) -> bool:
    """Equal sizes, and equal strides wherever a dim has more than one entry."""
    return tuple(sizes) == tuple(wanted_sizes) and all(
        size == 1 or stride == wanted for size, stride, wanted in zip(sizes, strides, wanted_strides, strict=True))
