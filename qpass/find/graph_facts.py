"""Graph facts: products of a captured graph in, who shares an input, who computes it and who reads the result out."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping

from torch import Tensor, fx

from qpass.capture.find_products import Product, scope_of, torch_call_of
from qpass.capture.walk import GATHERS, TURNS, aten, is_view

_REARRANGES = (*TURNS, aten.expand.default)
_SHOWN_CONSUMERS = 4
# What scores may go through before the largest are picked: each score still stands for the same choice.
_SCORING = (aten._softmax.default, aten._log_softmax.default, aten.sigmoid.default, aten.softplus.default,
            aten._to_copy.default, aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_SHIFTS = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)  # by a number, parameter or buffer
_MASKS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.masked_fill_.Scalar, aten.masked_fill_.Tensor)
_PICKS_VALUES = (aten.topk.default, aten.sort.default, aten.sort.stable, aten.max.dim)  # (values, indices)


def input_of(product: Product) -> fx.Node:
    """The tensor that the product reads, before reshapes that leave each row of K numbers whole."""
    node = product.activation
    while is_view(node) and node.target not in _REARRANGES:
        source = node.args[0]
        if not isinstance(source, fx.Node) or not _same_rows(source, node):
            break
        node = source
    return node


def shared_inputs(products: Mapping[str, list[Product]]) -> dict[str, int]:
    """Site name -> number, for sites whose products read the same tensors in the same order as another site's."""
    keys = {name: tuple(input_of(product) for product in found) for name, found in products.items()
            if all(product.kind != "embedding" for product in found)}
    count = Counter(keys.values())
    numbers: dict[tuple[fx.Node, ...], int] = {}
    return {name: numbers.setdefault(key, len(numbers)) for name, key in keys.items() if count[key] > 1}


def produced_by(product: Product) -> str | None:
    """`path (Class)` of the module that computed the product's input, or its op where that is the caller's own code."""
    node = input_of(product)
    # Rows may be gathered for their expert, and those of no expert cleared.
    while (is_view(node) or node.target in (*GATHERS, *_MASKS)) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if node.op == "placeholder":
        return "the model's input"
    if node.op == "get_attr":
        return str(node.target)
    scope = scope_of(node)
    around = {entry.path for entry in product.scope}
    if scope and scope[-1].path not in around:
        return f"{scope[-1].path} ({scope[-1].class_name})"
    operands = [source for source in map(_computed, node.all_input_nodes) if source is not None]
    if op_name(node) == "mul" and len(operands) == 2:
        names = [op_name(source) for source in operands if not _is_product(source)]
        if names:
            return "*".join([*names, "mul"])
    return op_name(node)


def consumers(product: Product, names: Mapping[fx.Node, str]) -> tuple[str, ...]:
    """What reads the result, through views: a site's name, or else an op's."""
    found: list[str] = []
    pending = list(product.result.users)
    while pending and len(found) < _SHOWN_CONSUMERS:
        user = pending.pop(0)
        if user in names:
            text = names[user]
        elif is_view(user) or _same_torch_call(user, product.node):
            pending.extend(user.users)
            continue
        elif user.op == "output":
            text = "output"
        else:
            text = op_name(user)
        if text not in found:
            found.append(text)
    return tuple(found)


def is_router(product: Product) -> bool:
    """Whether an op picks the largest entries of the result, and what they are decides what the graph computes next."""
    pending, seen = [product.result], set()
    while pending:
        node = pending.pop()
        for user in node.users:
            if user in seen:
                continue
            seen.add(user)
            if user.target in _PICKS_VALUES:
                indices = [part for part in user.users if part.args[1:] == (1,)]
                if any(_is_computed_with(part) for part in indices):
                    return True
            elif user.target is aten.argmax.default:
                if _is_computed_with(user):
                    return True
            elif is_view(user) or _is_scoring(user, node):
                pending.append(user)
    return False


def _is_scoring(user: fx.Node, scores: fx.Node) -> bool:
    if user.target in _SHIFTS:
        others = [source for source in user.all_input_nodes if source is not scores]
        return all(source.op == "get_attr" for source in others)
    return user.target in _SCORING and user.args[0] is scores


def _is_computed_with(node: fx.Node) -> bool:
    """Whether the graph does more with `node` than hand it out."""
    return any(_is_computed_with(user) if is_view(user) else user.op != "output" for user in node.users)


def op_name(node: fx.Node) -> str:
    """`silu` for `aten.silu.default`; the torch function's name where that call made several ATen calls of one."""
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    call = torch_call_of(node)
    if call is not None and not isinstance(call.function, str):
        name = str(getattr(call.function, "__name__", "")).split(".")[0]
        if name and not name.startswith("_"):
            return name.strip("_")
    return aten_name(node)


def aten_name(node: fx.Node) -> str:
    """`silu` for `aten.silu.default`, whatever torch function it came from."""
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet)).strip("_")


def _same_torch_call(one: fx.Node, other: fx.Node) -> bool:
    """Both are parts of one call that the model made, as the last reshape of a matmul is."""
    calls = torch_call_of(one), torch_call_of(other)
    return calls[0] is not None and calls[1] is not None and calls[0].call == calls[1].call


def _computed(node: fx.Node) -> fx.Node | None:
    while is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node if node.op == "call_function" else None


def _is_product(node: fx.Node) -> bool:
    return op_name(node) in ("linear", "matmul", "mm", "addmm", "bmm", "add") or "grouped_mm" in str(node.target)


def _same_rows(source: fx.Node, node: fx.Node) -> bool:
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.numel() != after.numel():
        return False
    return before.ndim == 0 or (after.ndim > 0 and before.shape[-1] == after.shape[-1])
