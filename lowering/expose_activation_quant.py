"""Expose activation quantization: qpass.linear becomes quantization in plain ATen and qpass.linear_q on its integers.

before  y = qpass.linear(x, packed, bias, spec)
after   xq, x_scale, x_zero_point = the lines of kernels/reference/activation.py
        y = qpass.linear_q(xq, x_scale, x_zero_point, packed, bias, spec, x.dtype)

qpass.experts becomes qpass.experts_q likewise: what all of a token's experts read. A static scale and zero point, the
op's last arguments, are expanded to one a row. In plain ATen the compiler fuses it into whatever computed x; inside the
op it would stay opaque. Layers without an activation scheme, and kernels without the form that takes integers, are left
whole.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.node import map_arg

from qpass.kernels.reference.activation import quantize_activation, quantize_static
from qpass.kernels.registry import kernel
from qpass.lowering.graph_nodes import (
    EXPERTS,
    EXPERTS_Q,
    LINEAR,
    LINEAR_Q,
    QUANTIZES,
    SITES,
    Product,
    Quantization,
    add_call,
    our_nodes,
    replace,
    row_sizes,
    sites_of,
)
from qpass.scheme import ActivationArgs

_TAKES_INTEGERS: dict[Any, tuple[Any, str]] = {LINEAR: (LINEAR_Q, "linear_q"), EXPERTS: (EXPERTS_Q, "experts_q")}


def expose_activation_quant(graph: fx.Graph) -> int:
    """Write out the activation quantization of each qpass.linear and qpass.experts. Returns the number rewritten."""
    changed = 0
    for node, product in our_nodes(graph):
        activation, (target, form) = product.activation, _TAKES_INTEGERS.get(node.target, (None, ""))
        if target is None or activation is None or form not in kernel(product.spec.kernel).forms:
            continue
        with graph.inserting_before(node):
            codes = _write_quantization(graph, node, product, activation)
            arguments = (*codes, *(product.routing or ()), list(product.packed),
                         product.bias[0] if product.routing is None else list(product.bias), product.specs[0],
                         product.x.meta["val"].dtype)
            new = add_call(graph, target, arguments, like=node, name=form)
        new.meta[SITES] = sites_of(node)
        replace(node, new)
        changed += 1
    return changed


def _write_quantization(graph: fx.Graph, linear: fx.Node, product: Product,
                        activation: ActivationArgs) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    given = (product.input_scale, product.input_zero_point) if activation.static else ()
    inputs = [node for node in (product.x, *given) if node is not None]
    copies: dict[fx.Node, fx.Node] = {}
    results: list[fx.Node] = []
    mark = Quantization(site=sites_of(linear)[0], given=given)
    value = product.x.meta["val"]
    lines = _lines(tuple(node.meta["val"].dtype for node in inputs), value.device, activation)
    names = dict(zip(lines.output_node().all_input_nodes, ("xq", "x_scale", "x_zero_point"), strict=False))
    waiting = iter(inputs)
    for line in lines.nodes:
        if line.op == "placeholder":
            copies[line] = next(waiting)
        elif line.op == "call_function":
            args, kwargs = map_arg((line.args, line.kwargs), lambda n: copies[n])
            copies[line] = add_call(graph, line.target, args, kwargs, like=linear, name=names.get(line))
            copies[line].meta |= {QUANTIZES: mark, "original_aten": line.target}
        else:
            results = [copies[n] for n in line.all_input_nodes]
    if activation.static:  # one number for every row; the sizes stand here, for the traced lines name none
        rows = row_sizes(graph, product.x)
        results[1:] = [add_call(graph, torch.ops.aten.expand.default, (one, rows), like=linear) for one in results[1:]]
    codes, scale = results[:2]
    return codes, scale, results[2] if len(results) > 2 else None


@lru_cache(maxsize=64)
def _lines(dtypes: tuple[torch.dtype, ...], device: torch.device, activation: ActivationArgs) -> fx.Graph:
    """The reference's quantization as ATen ops that Inductor lowers; they name no size, and no dimension but -1.

    `dtypes` are those of x and of a static scale and zero point.
    """
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    def run(x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        if given:
            return quantize_static(x, *given), *(one.float() for one in given)
        codes, scale, zero_point = quantize_activation(x, activation)
        return (codes, scale) if zero_point is None else (codes, scale, zero_point)

    with torch.no_grad(), FakeTensorMode():
        examples = [torch.empty(1 if i else (2, 3), dtype=dtype, device=device) for i, dtype in enumerate(dtypes)]
        return make_fx(run, decomposition_table=select_decomp_table())(*examples).graph
