"""Verify: the lowered graph in, the number of our ops in it out, or a LoweringError that names what is wrong.

Holds afterwards: the graph is well formed; each op of ours is a native op, or says why it is not; and gives the shape
and dtype that its users were traced with. With QPASS_CHECK=1 the numbers are checked too, while the model runs.
"""

from __future__ import annotations

import os

from torch import fx
from torch.fx.node import map_arg

from qpass.errors import LoweringError
from qpass.lowering.check_products import insert_checks
from qpass.lowering.graph_nodes import LEFT, OPS, fake_result, our_nodes, shape_text, sites_of


def verify(graph: fx.Graph) -> int:
    """Check every op of ours. Returns how many there are; raises LoweringError for the first that is wrong."""
    count = 0
    for node, _ in our_nodes(graph):
        where = f"{node.name} ({node.target}) at {', '.join(sites_of(node))}"
        if node.target in OPS and LEFT not in node.meta:
            raise LoweringError(f"{where} is left unlowered: no pass handled it; check the passes registered "
                                "with qpass.register_pass, or switch one off with pipeline.disable_pass")
        traced, now = shape_text(node.meta.get("val")), shape_text(fake_result(node.target, node.args, node.kwargs))
        if traced != now:
            raise LoweringError(f"{where} gives {now}, but its users were traced with {traced}; a pass changed its "
                                "arguments without computing meta['val'] again (use graph_nodes.add_call)")
        map_arg(node.args, lambda n, w=where: _alive(n, graph, w))  # type: ignore[misc]
        count += 1
    graph.lint()
    if os.environ.get("QPASS_CHECK", "0") not in ("", "0"):
        insert_checks(graph)
    return count


def _alive(node: fx.Node, graph: fx.Graph, where: str) -> fx.Node:
    if node.graph is not graph:
        raise LoweringError(f"{where} reads {node.name}, which belongs to another graph")
    return node
