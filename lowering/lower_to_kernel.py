"""Lower to kernels: each op of ours becomes the native op of the kernel its weight is packed for, where there is one.

before  y = qpass.linear_q(xq, s, z, packed, bias, spec, dtype)
after   y = the op overload and arguments that the registry gives for the spec's kernel

Of several weights a native op may give one tensor with all outputs side by side; its parts are slices then.

A kernel without a native op keeps the qpass op, which runs through dispatch; the node says so. No device is named
here: kernels are asked through the registry.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

from qpass.kernels.registry import kernel
from qpass.lowering.graph_nodes import LEFT, MEANING, OP, OPS, SITES, add_call, our_nodes, replace, sites_of


def lower_to_kernel(graph: fx.Graph) -> int:
    """Replace ops of ours by native ops. Returns the number replaced."""
    changed = 0
    for node, product in our_nodes(graph):
        if node.target not in OPS:
            continue
        op, chosen = OPS[node.target], kernel(product.spec.kernel)
        node.meta[OP] = op
        if product.input_scale is not None:
            node.meta[LEFT] = "its activation scale is static, and expose_activation_quant has not written it out"
            continue
        call = chosen.native_call(op, node.args) if chosen.native_call is not None else None
        if call is None:
            node.meta[LEFT] = f"{chosen.name} has no native op for {op}; it is called through torch.ops.qpass.{op}"
            continue
        target, arguments = call
        with graph.inserting_before(node):
            new = add_call(graph, target, tuple(arguments), like=node, name=op)
        new.meta |= {OP: op, SITES: sites_of(node), MEANING: product}
        if op.endswith("_list") and isinstance(new.meta["val"], Tensor):
            _take_apart(node, new)
        else:
            replace(node, new)
        changed += 1
    return changed


def _take_apart(parts: fx.Node, joined: fx.Node) -> None:
    """Let slices of `joined` take the place of what is read of `parts`, which is removed."""
    begins = [0, *accumulate(part.shape[-1] for part in parts.meta["val"])]
    for part in list(parts.users):
        i: Any = part.args[1]
        with parts.graph.inserting_before(part):
            replace(part, add_call(parts.graph, torch.ops.aten.slice.Tensor, (joined, -1, begins[i], begins[i + 1]),
                                   like=part, name="y"))
    parts.graph.erase_node(parts)
