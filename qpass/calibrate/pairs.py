"""Pairs: a capture in; out, for each input that products share, the parameters that can take a factor off each channel.

A factor s on channel j of an input x changes nothing if every product that reads x multiplies its column j by s and
whatever made x divides channel j by s. What made it is followed back through the graph: a norm's weight and bias, an
elementwise product, a bias, the rows of an earlier product's weight, and through attention to the values (where several
query heads read one key-value head, its channels meet several channels of x).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qpass.capture.capture_model import Capture
from qpass.capture.find_products import Product, find_products
from qpass.capture.walk import aten, is_view
from qpass.find.graph_facts import input_of

_CASTS = (aten._to_copy.default,)
_HOMOGENEOUS = (aten.relu.default,)  # f(x / s) = f(x) / s for s > 0
_NORMS = (aten.native_layer_norm.default,)


@dataclass(frozen=True, kw_only=True)
class Taker:
    """A parameter that can be divided: (p + offset) / s - offset, at `index[j]` of dim `dim` for channel j of x."""

    parameter: str
    dim: int
    index: tuple[int, ...]
    offset: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Products that read one tensor, by the name of their weight (True: stored [K, N]), and what takes factors off."""

    readers: tuple[tuple[str, bool], ...]
    takers: tuple[Taker, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Every parameter that a factor changes."""
        return (*(name for name, _ in self.readers), *(taker.parameter for taker in self.takers))


def find_pairs(capture: Capture) -> tuple[Pair, ...]:
    """Every input of products whose channels can be rescaled by changing parameters alone, in graph order."""
    if capture.graph_module is None:
        return ()
    products = [p for p in find_products(capture.graph_module, capture.parameters) if p.kind != "embedding"]
    by_input: dict[fx.Node, list[Product]] = {}
    for product in products:
        by_input.setdefault(input_of(product), []).append(product)
    walk = _Walk(capture.parameters, {node: p for p in products for node in (p.node, p.result)})
    found = []
    for node, readers in by_input.items():
        plain = all(p.kind == "linear" and p.weight is not None and not p.weight_left and p.weight.orientation in (
            "as stored", "swapped") and len(p.weight.root.users) == 1 for p in readers)
        if not plain or not _only_read_by(node, {p.node for p in readers}):
            continue
        takers = walk.takers(node, ())
        if takers:
            names = tuple((p.weight.name, p.transposed) for p in readers if p.weight is not None)
            pair = Pair(readers=names, takers=takers)
            if len(set(pair.parameters)) == len(pair.parameters):
                found.append(pair)
    return tuple(found)


def _only_read_by(node: fx.Node, products: set[fx.Node]) -> bool:
    """Whether every user of `node`, through views, is one of these products."""
    for user in node.users:
        if user in products:
            continue
        if not is_view(user) or not _only_read_by(user, products):
            return False
    return True


@dataclass(frozen=True)
class _Walk:
    parameters: frozenset[str]
    products: Mapping[fx.Node, Product]

    def takers(self, node: fx.Node, path: tuple[fx.Node, ...]) -> tuple[Taker, ...]:
        """What can divide the channels of the tensor at the end of `path`, which begins with the reader of `node`."""
        if path and len(node.users) > 1 and not splits(node, path[0]):
            return ()
        product = self.products.get(node)
        if product is not None:
            return self._rows(product, node, path)
        if node.op != "call_function":
            return ()
        further = (node, *path)
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and node.args[0].target in _NORMS:
            return self._norm(node.args[0], further) if node.args[1] == 0 else ()
        if is_view(node) or node.target in (*_CASTS, *_HOMOGENEOUS) or node.target is operator.getitem:
            source = node.args[0]
            return self.takers(source, further) if isinstance(source, fx.Node) else ()
        if node.target is aten.mul.Tensor:
            return self._factor(node, further)
        if node.target is aten.add.Tensor and not node.kwargs:
            return self._sum(node, further)
        if "scaled_dot_product" in str(node.target):
            return self.takers(node.args[2], further)  # type: ignore[arg-type]
        if node.target is aten.bmm.default:
            return self.takers(node.args[1], further)  # type: ignore[arg-type]
        return ()

    def _rows(self, product: Product, node: fx.Node, path: tuple[fx.Node, ...]) -> tuple[Taker, ...]:
        view = product.weight
        whole = view is not None and view.orientation in ("as stored", "swapped") and len(view.root.users) == 1
        if not whole or product.kind != "linear" or product.weight_left or (
                product.bias is not None and node is not product.result):
            return ()
        assert view is not None
        index = channels_along(node, path)
        if index is None:
            return ()
        rows = Taker(parameter=view.name, dim=1 if product.transposed else 0, index=index)
        return (rows,) if product.bias is None else (rows, Taker(parameter=product.bias, dim=0, index=index))

    def _norm(self, node: fx.Node, path: tuple[fx.Node, ...]) -> tuple[Taker, ...]:
        index = channels_along(path[0], path[1:])
        given = [self._vector(value) for value in node.args[2:4] if value is not None]
        if index is None or not given or node.args[2] is None or any(vector is None for vector in given):
            return ()
        return tuple(Taker(parameter=name, dim=0, index=index) for name, _ in filter(None, given))

    def _factor(self, node: fx.Node, path: tuple[fx.Node, ...]) -> tuple[Taker, ...]:
        operands = [value for value in node.args[:2] if isinstance(value, fx.Node)]
        for value in operands:
            vector, index = self._vector(value), channels_along(node, path[1:])
            if vector is not None and index is not None:
                return (Taker(parameter=vector[0], dim=0, index=index, offset=vector[1]),)
        whole = [value for value in operands if _shape(value) == _shape(node)]
        # The operand that is nearest to a product comes first: nothing but views lies between.
        for value in sorted(whole, key=lambda v: self._computed(v) not in self.products):
            if found := self.takers(value, path):
                return found
        return ()

    def _sum(self, node: fx.Node, path: tuple[fx.Node, ...]) -> tuple[Taker, ...]:
        first, second = node.args[:2]
        for value, other in ((first, second), (second, first)):
            vector, index = self._vector(value), channels_along(node, path[1:])
            if vector is not None and index is not None and isinstance(other, fx.Node) and vector[1] == 0:
                rest = self.takers(other, path)
                return (*rest, Taker(parameter=vector[0], dim=0, index=index)) if rest else ()
        return ()

    def _vector(self, value: Any) -> tuple[str, float] | None:
        """(name, offset) if `value` is a parameter [K] plus a number, read nowhere else."""
        offset = 0.0
        while isinstance(value, fx.Node) and value.op != "get_attr":
            if len(value.users) > 1:
                return None
            if value.target is aten.add.Tensor and not value.kwargs:
                first, second = value.args[:2]
                if isinstance(first, (int, float)):
                    first, second = second, first
                if not isinstance(second, (int, float)):
                    return None
                offset, value = offset + second, first
            elif is_view(value) or value.target in _CASTS:
                value = value.args[0]
            else:
                return None
        if not isinstance(value, fx.Node) or str(value.target) not in self.parameters or len(value.users) > 1:
            return None
        return (str(value.target), offset) if value.meta["val"].ndim == 1 else None

    def _computed(self, node: fx.Node) -> fx.Node:
        while node not in self.products and is_view(node) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        return node


def channels_along(start: fx.Node, path: tuple[fx.Node, ...]) -> tuple[int, ...] | None:
    """For each last-dim entry of the tensor after `path`, the entry of `start`'s last dim that it comes from."""
    shape = _shape(start)
    seen: Any = torch.arange(shape[-1]).expand(shape)
    for node in path:
        target: Any = node.target
        out = _shape(node)
        if node.target is operator.getitem and not isinstance(seen, (tuple, list)):
            pass  # the first result of an op that is passed through whole
        elif is_view(node):
            seen = seen[node.args[1]] if node.target is operator.getitem else (
                target(seen.contiguous(), *node.args[1:], **node.kwargs))
        elif "scaled_dot_product" in str(node.target) or node.target is aten.bmm.default:
            out = out or (*seen.shape[:-2], node.args[0].meta["val"].shape[-2], seen.shape[-1])  # type: ignore[union-attr]
            seen = seen[..., :1, :].expand(out)
        elif out and seen.shape != out:
            return None
    if not isinstance(seen, Tensor):
        return None
    rows = seen.reshape(-1, seen.shape[-1])
    return tuple(rows[0].tolist()) if bool((rows == rows[0]).all()) else None


def splits(node: fx.Node, user: fx.Node) -> bool:
    """Whether each user of `node` takes a part of its own."""
    return user.target is operator.getitem and len({u.args[1] for u in node.users if u.target is operator.getitem
                                                    }) == len(node.users)


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()
