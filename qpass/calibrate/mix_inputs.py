"""Mix inputs: a capture and decisions in; the sites whose inputs R4 mixes when the model runs, and their blocks, out.

SpinQuant's R4, QuaRot's and QuIP#'s online Hadamard: what follows an activation function cannot be mixed by anything
before it, for no rotation goes through the function, so the layer that reads it mixes its input itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from qpass.calibrate.block_work import takes_change
from qpass.capture.capture_model import Capture
from qpass.capture.find_products import find_products
from qpass.capture.walk import aten, is_view
from qpass.decide.decision import Decision
from qpass.hadamard import block_of

_LEAST = 8  # channels of a block: less mixes next to nothing
_SUMS = (aten.add.Tensor, aten.sub.Tensor)


def find_mixed(capture: Capture, decisions: Sequence[Decision], most: int | None) -> tuple[dict[str, int], list[str]]:
    """Site name -> size of the blocks, at the most `most`, for quantized sites that read an activation function or a
    product with one; and notes for the report."""
    if capture.graph_module is None:
        return {}, ["rotation: there is no graph that shows what follows an activation function; R4 mixes nothing"]
    names = {name: decision for decision in decisions if decision.status == "quantize"
             for name in (decision.site.name, *decision.site.aliases)}
    found: dict[str, int] = {}
    left: dict[str, list[str]] = {}
    for product in find_products(capture.graph_module, capture.parameters):
        decision = None if product.weight is None else names.get(product.weight.name)
        if decision is None or decision.spec is None or not _follows_function(product.activation):
            continue
        size = min(block_of(decision.spec.in_features), most or decision.spec.in_features)
        if decision.site.experts is not None:
            left.setdefault("weights of experts read it", []).append(decision.site.name)
        elif not takes_change(decision.site, decision.spec):
            left.setdefault("it is no module of its own with a weight in integers", []).append(decision.site.name)
        elif size < _LEAST:
            left.setdefault(f"no power of two from {_LEAST} on divides its channels", []).append(decision.site.name)
        else:
            found[decision.site.name] = size
    notes = [f"rotation: the input of {', '.join(dict.fromkeys(sites))} is not mixed: {why}"
             for why, sites in left.items()]
    if found:
        sizes = ", ".join(str(size) for size in sorted(set(found.values())))
        notes.append(f"rotation: the inputs of {len(found)} layers are mixed at run time, in blocks of {sizes} "
                     "channels")
    return found, notes or ["rotation: no quantized product follows an activation function; R4 mixes nothing"]


def _follows_function(node: fx.Node) -> bool:
    """Whether `node`, behind views, casts and factors, is computed element by element from activations, and no sum."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        tensors = node.all_input_nodes
        if is_view(node) or node.target is aten._to_copy.default or (
                node.target in (aten.mul.Tensor, aten.div.Tensor) and len(tensors) == 1 and node.args[0] is not (
                    node.args[1])):
            node = node.args[0] if isinstance(node.args[0], fx.Node) else tensors[0]
            continue
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        return pointwise and node.target not in _SUMS and all(
            _width(tensor) == _width(node) and not _is_parameter(tensor) for tensor in tensors)
    return False


def _is_parameter(node: fx.Node) -> bool:
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


def _width(node: fx.Node) -> int:
    value = node.meta.get("val")
    return int(value.shape[-1]) if isinstance(value, Tensor) and value.ndim else 0
