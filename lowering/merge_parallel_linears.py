"""Merge parallel linears: products of one tensor, on one kernel, become one call with several weights.

before  q = linear_q(xq, s, z, wq, ...);  k = linear_q(xq, s, z, wk, ...);  v = linear_q(xq, s, z, wv, ...)
after   q, k, v = linear_q_list(xq, s, z, [*wq, *wk, *wv], ...)

No weight is copied: the kernel takes the list. Whole qpass.linear ops of one tensor merge into linear_list likewise,
unless they hold a static scale, which the list has no place for.
Invariant: a product joins only if its weights and bias stand before the first product of its group.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from qpass.lowering.graph_nodes import (
    LINEAR,
    LINEAR_LIST,
    LINEAR_Q,
    LINEAR_Q_LIST,
    SITES,
    Product,
    add_call,
    our_nodes,
    replace,
    sites_of,
)


def merge_parallel_linears(graph: fx.Graph) -> int:
    """Merge products that share their input. Returns the number of products that became part of a merged call."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    groups: dict[tuple[Any, ...], list[tuple[fx.Node, Product]]] = {}
    for node, product in our_nodes(graph):
        if node.target not in (LINEAR, LINEAR_Q) or product.input_scale is not None:
            continue
        key = (node.target, product.x, product.x_scale, product.x_zero_point, product.dtype, product.spec.kernel,
               product.activation)
        group = groups.setdefault(key, [])
        if group and not _stands_before(product, group[0][0], place):
            continue
        group.append((node, product))
    merged = [group for group in groups.values() if len(group) > 1]
    for group in merged:
        _merge(graph, group)
    return sum(len(group) for group in merged)


def _stands_before(product: Product, first: fx.Node, place: dict[fx.Node, int]) -> bool:
    needed = [*product.packed, *(b for b in product.bias if b is not None)]
    return all(place[node] < place[first] for node in needed)


def _merge(graph: fx.Graph, group: list[tuple[fx.Node, Product]]) -> None:
    first, one = group[0]
    packed = [tensor for _, product in group for tensor in product.packed]
    bias = [b for _, product in group for b in product.bias]
    specs = [text for _, product in group for text in product.specs]
    with graph.inserting_before(first):
        if first.target is LINEAR:
            call = add_call(graph, LINEAR_LIST, (one.x, packed, bias, specs), like=first, name="linear_list")
        else:
            arguments = (one.x, one.x_scale, one.x_zero_point, packed, bias, specs, one.dtype)
            call = add_call(graph, LINEAR_Q_LIST, arguments, like=first, name="linear_q_list")
        call.meta[SITES] = tuple(site for node, _ in group for site in sites_of(node))
        parts = [add_call(graph, operator.getitem, (call, i), like=node, name="y") for i, (node, _) in enumerate(group)]
    for (node, _), part in zip(group, parts, strict=True):
        replace(node, part)
