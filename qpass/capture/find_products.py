"""Find products: a captured graph in, every product of an activation with a parameter, and every look-up, out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from qpass.capture.tape import Scope, TorchCall
from qpass.capture.walk import WeightView, aten, is_view, view_of_parameter

Kind = Literal["linear", "experts", "embedding"]

# op -> (position of the left operand, of the right one, of the bias)
_OPERANDS: dict[Any, tuple[int, int, int | None]] = {
    aten.mm.default: (0, 1, None),
    aten.bmm.default: (0, 1, None),
    aten.mv.default: (0, 1, None),
    aten.matmul.default: (0, 1, None),
    aten.addmm.default: (1, 2, 0),
    aten.baddbmm.default: (1, 2, 0),
    aten.addbmm.default: (1, 2, 0),
    aten.addmv.default: (1, 2, 0),
}
_PACKETS = frozenset(op.overloadpacket for op in _OPERANDS)
# Ops that multiply by their parameters inside themselves; an op of somebody's library may do so too.
_OPAQUE = ("rnn", "lstm", "gru", "trilinear", "attention")
_LOOK_UPS = (aten.embedding.default, aten._embedding_bag.default, aten._embedding_bag_forward_only.default)


@dataclass(frozen=True, kw_only=True)
class Product:
    """One product (or look-up) in the graph.

    node         the ATen call
    weight       the parameter, if the operand is a view of one; else None and `derived` says what it is made of
    derived      parameters (>= 2-D, more than one row and column) from which the operand is computed
    activation   the other operand's node
    weight_left  the weight is the left operand, W @ x
    bias         name of the bias parameter added by the call itself or right after it
    result       the node whose value has the bias added
    """

    node: fx.Node
    kind: Kind
    weight: WeightView | None
    derived: tuple[str, ...] = ()
    activation: fx.Node
    weight_left: bool = False
    bias: str | None = None
    bias_dtype: torch.dtype | None = None
    result: fx.Node

    @property
    def transposed(self) -> bool:
        """Whether the parameter is stored [..., K, N]."""
        if self.weight is None or self.kind == "embedding":
            return False
        return (self.weight.orientation == "swapped") if self.weight_left else (self.weight.orientation == "as stored")

    @property
    def scope(self) -> tuple[Scope, ...]:
        return scope_of(self.node)


def scope_of(node: fx.Node) -> tuple[Scope, ...]:
    scope: tuple[Scope, ...] = node.meta.get("scope") or ()
    return scope


def torch_call_of(node: fx.Node) -> TorchCall | None:
    return node.meta.get("torch_call")


def find_products(graph_module: fx.GraphModule, parameters: frozenset[str]) -> tuple[Product, ...]:
    """Products in the order of the graph. `parameters` are the names that count as weights."""
    fed = _fed_by_inputs(graph_module.graph)
    products = []
    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in _LOOK_UPS:
            product = _look_up(node, parameters)
        else:
            product = _product(node, parameters, fed)
        if product is not None:
            products.append(product)
    return tuple(products)


def opaque_readers(graph_module: fx.GraphModule, parameters: frozenset[str]) -> dict[str, str]:
    """Matrices among `parameters` -> the name of an op that takes them in and is no product itself."""
    found: dict[str, str] = {}
    for node in graph_module.graph.nodes:
        op = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
        custom = getattr(node.target, "namespace", "aten") not in ("aten", "prims", "prim")
        other_form = getattr(node.target, "overloadpacket", None) in _PACKETS and node.target not in _OPERANDS
        if other_form:
            op = f"{node.target} (a product into a tensor that is given)"
        if node.op == "call_function" and (custom or other_form or any(word in op for word in _OPAQUE)):
            for source in node.all_input_nodes:
                view = view_of_parameter(source, parameters)
                if view is not None and min(view.root.meta["val"].shape, default=0) > 1 and (
                        view.root.meta["val"].ndim >= 2):
                    found.setdefault(view.name, op)
    return found


def buffers_multiplied(graph_module: fx.GraphModule, parameters: frozenset[str]) -> tuple[str, ...]:
    """Names of buffers that stand in a product with an activation as a weight would."""
    others = frozenset(str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr") - parameters
    found = find_products(graph_module, others)
    return tuple(dict.fromkeys(product.weight.name for product in found if product.weight is not None
                               and product.kind != "embedding" and not product.weight.name.startswith("_constant")
                               and min(product.weight.root.meta["val"].shape) > 1))


def _look_up(node: fx.Node, parameters: frozenset[str]) -> Product | None:
    table, rows = node.args[0], node.args[1]
    if not isinstance(table, fx.Node) or not isinstance(rows, fx.Node):
        return None
    weight = view_of_parameter(table, parameters)
    if weight is None:
        return None
    return Product(node=node, kind="embedding", weight=weight, activation=rows, result=node)


def _product(node: fx.Node, parameters: frozenset[str], fed: frozenset[fx.Node]) -> Product | None:
    places = _OPERANDS.get(node.target)
    if places is None:
        if "grouped_mm" not in getattr(node.target, "__name__", ""):
            return None
        places = (0, 1, None)
    left, right = node.args[places[0]], node.args[places[1]]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    views = view_of_parameter(left, parameters), view_of_parameter(right, parameters)
    sides = [side for side, view in enumerate(views) if view is not None and len(view.root.meta["val"].shape) >= 2]
    if len(sides) == 2:
        sides = _the_weight(node, views)
    if len(sides) == 1:
        side = sides[0]
        weight = views[side]
        assert weight is not None
        bias, dtype, result = _bias_of(node, places[2], parameters)
        kind: Kind = "experts" if weight.per_expert else "linear"
        return Product(node=node, kind=kind, weight=weight, activation=(right, left)[side], weight_left=side == 0,
                       bias=bias, bias_dtype=dtype, result=result)
    if not sides and (left in fed) != (right in fed):
        derived = _made_of(right if left in fed else left, parameters, fed)
        if derived:
            return Product(node=node, kind="linear", weight=None, derived=derived, result=node,
                           activation=left if left in fed else right, weight_left=right in fed)
    return None


def _the_weight(node: fx.Node, views: tuple[WeightView | None, WeightView | None]) -> list[int]:
    """Of two parameters, as when learned queries meet a linear: the one that the calling module owns alone."""
    scope = scope_of(node)
    here = scope[-1].path if scope else ""
    owned = [side for side, view in enumerate(views) if view is not None and view.name.rpartition(".")[0] == here]
    if len(owned) == 1:
        return owned
    call = torch_call_of(node)
    return [1] if getattr(call.function if call else None, "__name__", "") == "linear" else []


def _bias_of(node: fx.Node, place: int | None,
             parameters: frozenset[str]) -> tuple[str | None, torch.dtype | None, fx.Node]:
    if place is not None and isinstance(node.args[place], fx.Node):
        found = _bias_name(node.args[place], parameters)
        if found:
            return *found, node
    last = node
    while True:
        users = list(last.users)
        if len(users) != 1:
            return None, None, node
        user = users[0]
        if user.target in (aten.add.Tensor, aten.add_.Tensor):
            other = next((a for a in user.args[:2] if a is not last), None)
            found = _bias_name(other, parameters) if not user.kwargs else None
            return (*found, user) if found else (None, None, node)
        if not is_view(user):
            return None, None, node
        last = user


def _bias_name(value: Any, parameters: frozenset[str]) -> tuple[str, torch.dtype] | None:
    while isinstance(value, fx.Node) and value.op != "get_attr":
        if not is_view(value) and value.target is not aten._to_copy.default:
            return None
        value = value.args[0]
    if not isinstance(value, fx.Node) or str(value.target) not in parameters:
        return None
    stored = value.meta["val"]
    return (str(value.target), stored.dtype) if stored.ndim == 1 else None


def _fed_by_inputs(graph: fx.Graph) -> frozenset[fx.Node]:
    """Nodes that depend on what the user passes in."""
    fed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(source in fed for source in node.all_input_nodes):
            fed.add(node)
    return frozenset(fed)


def _made_of(node: fx.Node, parameters: frozenset[str], fed: frozenset[fx.Node]) -> tuple[str, ...]:
    """Matrices among the parameters from which `node` is computed without any input."""
    found: list[str] = []
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current in seen or current in fed:
            continue
        seen.add(current)
        if current.op == "get_attr" and str(current.target) in parameters:
            stored: Tensor = current.meta["val"]
            if stored.ndim >= 2 and min(stored.shape[-2:]) > 1:
                found.append(str(current.target))
        if current.target not in _LOOK_UPS:
            pending.extend(reversed(current.all_input_nodes))
    return tuple(found)
