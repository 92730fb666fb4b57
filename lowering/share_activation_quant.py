"""Share activation quantization: products that read one tensor quantize it once.

before  a = linear_q(quantize(x), ...);  b = linear_q(quantize(x), ...)
after   xq = quantize(x);  a = linear_q(xq, ...);  b = linear_q(xq, ...)

A layer of experts shares with the shared expert beside it.

Invariant: two quantizations are one only if they have the same symmetry, the same static scale if any, and read the
same rows, that is the same tensor up to views that keep its last dimension, or one product of the same two tensors, as
of layers that scale one input by one vector. The first in the graph stays, so it comes before every use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qpass.lowering.graph_nodes import (
    EXPERTS_Q,
    LEADING_ONLY,
    LINEAR_Q,
    QUANTIZES,
    Product,
    add_call,
    our_nodes,
    quantized_input,
    row_sizes,
    same_rows,
    shape_text,
)

_COMPUTED_TWICE = (torch.ops.aten.mul.Tensor, torch.ops.prims.convert_element_type.default,
                   torch.ops.aten._to_copy.default)


def share_activation_quant(graph: fx.Graph) -> int:
    """Let later quantizations of one tensor use the first. Returns the number of quantizations that went away."""
    first: dict[tuple[Any, ...], Product] = {}
    changed = 0
    for node, product in our_nodes(graph):
        if node.target not in (LINEAR_Q, EXPERTS_Q) or (x := quantized_input(product.x)) is None:
            continue
        given = same_rows(product.x).meta[QUANTIZES].given
        kept = first.setdefault((_same_value(x), product.x_zero_point is None, *given), product)
        if kept.x is product.x:
            continue
        for mine, theirs in ((product.x, kept.x), (product.x_scale, kept.x_scale),
                             (product.x_zero_point, kept.x_zero_point)):
            if mine is not None and theirs is not None:
                mine.replace_all_uses_with(_in_shape_of(graph, mine, theirs, x))
        changed += 1
    if changed:
        graph.eliminate_dead_code()
    return changed


def _same_value(node: Any) -> Any:
    """What is equal for nodes that compute one and the same: the node, or, of a product or a cast, what goes in."""
    node = same_rows(node) if isinstance(node, fx.Node) else node
    if isinstance(node, fx.Node) and node.target in _COMPUTED_TWICE:
        return node.target, *(_same_value(argument) for argument in node.args), str(node.kwargs)
    return node


def _in_shape_of(graph: fx.Graph, mine: fx.Node, theirs: fx.Node, x: fx.Node) -> fx.Node:
    """`theirs` with the sizes of `mine`, which is a view or has the rows of `x`; symbolic ones are nodes."""
    if shape_text(mine.meta["val"]) == shape_text(theirs.meta["val"]):
        return theirs
    with graph.inserting_before(mine):
        sizes = mine.args[1] if mine.target in LEADING_ONLY else [*row_sizes(graph, x)[:-1], mine.meta["val"].shape[-1]]
        return add_call(graph, torch.ops.aten.reshape.default, (theirs, sizes), like=mine)
