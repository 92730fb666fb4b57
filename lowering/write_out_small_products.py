"""Write out small products: a float product of few outputs, as a router's, becomes a loop that the compiler generates.

before  y = mm(x, permute(w, [1, 0]))        x [M, K], w [N, K], of 16 bits; or addmm(bias, x, permute(w, [1, 0]))
after   y = to_16_bits(sum(float32(x[:, None]) * float32(w), -1) (+ bias))

A decoded token's router has 32 to 256 outputs, and the library call that multiplies takes longer to set itself up than
the sums take. Sums are in float32 as the library's are, in another order. `kernels/small_products.py` decides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qpass.kernels.small_products import refuses_loop
from qpass.lowering import debug
from qpass.lowering.graph_nodes import add_call, module_path, named_args, replace

_aten = torch.ops.aten
_convert = torch.ops.prims.convert_element_type.default


def write_out_small_products(graph: fx.Graph) -> int:
    """Replace small products by sums. Returns the number replaced."""
    changed = 0
    for node in [node for node in graph.nodes if node.target in (_aten.mm.default, _aten.addmm.default)]:
        why = _write_out(graph, node)
        if why is not None:
            debug.say(2, f"{module_path(node)}: a float product stays one call: {why}")
        changed += why is None
    if changed:
        graph.eliminate_dead_code()
    return changed


def _write_out(graph: fx.Graph, node: fx.Node) -> str | None:
    """Replace one, or say why not."""
    args = named_args(node)
    bias = args.get("self") if node.target is _aten.addmm.default else None
    x, turned = (args["mat1"], args["mat2"]) if bias is not None else (args["self"], args["mat2"])
    if bias is not None and (args["alpha"] != 1 or args["beta"] != 1):
        return f"it is scaled by {args['alpha']} and {args['beta']}"
    weight = _behind_transpose(turned)
    if weight is None:
        return "its second factor is no transposed weight"
    if (why := refuses_loop(x.meta["val"], weight.meta["val"])) is not None:
        return why
    with graph.inserting_before(node):
        rows = add_call(graph, _aten.unsqueeze.default, (x, 1), like=node)
        factors = [add_call(graph, _convert, (one, torch.float32), like=node) for one in (rows, weight)]
        result = add_call(graph, _aten.mul.Tensor, tuple(factors), like=node)
        result = add_call(graph, _aten.sum.dim_IntList, (result, [-1]), like=node)
        if bias is not None:
            result = add_call(graph, _aten.add.Tensor, (result, bias), like=node)
        result = add_call(graph, _convert, (result, node.meta["val"].dtype), like=node)
    replace(node, result)
    return None


def _behind_transpose(node: Any) -> fx.Node | None:
    """The [N, K] tensor whose transpose `node` is, if its rows lie side by side."""
    if node.target is _aten.permute.default and list(node.args[1]) == [1, 0]:
        weight = node.args[0]
    elif node.target is _aten.t.default:
        weight = node.args[0]
    else:
        return None
    step = weight.meta["val"].stride(-1)
    return weight if isinstance(step, int) and step == 1 else None
