"""Expression: nodes of a graph in, one line of Python-like text out, for sentences that say what was not understood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from qpass.capture.find_products import Product
from qpass.capture.walk import is_view
from qpass.find.graph_facts import aten_name

_DEPTH, _LONGEST = 8, 200


def expression_between(products: Sequence[Product], second: str, result: fx.Node | None = None) -> str:
    """The input of the product with `second` as made from the results of those before it; or `result`, from all."""
    names = {product.node: f"{product.weight.name.rpartition('.')[2]}(x)" for product in products if product.weight}
    last = next(p for p in products if p.weight is not None and p.weight.name == second)
    if result is None:
        names.pop(last.node)
        result = last.activation
    text = _text(result, names, _DEPTH)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."


def _text(value: Any, names: dict[fx.Node, str], depth: int) -> str:
    if not isinstance(value, fx.Node):
        return str(value)
    if value in names:
        return names[value]
    if value.op == "get_attr":
        return str(value.target).rpartition(".")[2]
    if value.op == "placeholder" or depth == 0:
        return value.name
    if is_view(value) and aten_name(value) not in ("slice", "split", "chunk", "select", "getitem"):
        return _text(value.args[0], names, depth)
    inner = ", ".join(_text(arg, names, depth - 1) for arg in value.args)
    return f"{aten_name(value)}({inner})"
