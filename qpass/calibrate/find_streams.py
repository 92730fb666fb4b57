"""Find streams: a capture in; out, tensors whose channels any rotation may mix, and the parameters to mix with them.

A stream is what products and look-ups write and later products read, with nothing between but what commutes with a
rotation of the last dim: sums, views, picked rows, a number a row, and norms, whose weight moves into the products that
follow. The residual stream of a language model is one. Every node of the graph is either a part of a stream or does
not change when the stream is rotated; a node that is neither (an activation, heads split off, an output) pins it.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from qpass.calibrate.stream import Norm, NormVector, Reader, Role, Stream, Writer
from qpass.capture.capture_model import Capture
from qpass.capture.find_products import Product, find_products
from qpass.capture.walk import GATHERS, aten, is_view, view_of_parameter

_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_REDUCTIONS = (aten.sum.dim_IntList, aten.mean.dim)


def find_streams(capture: Capture) -> tuple[Stream, ...]:
    """Every stream that something writes and something reads, pinned ones included, in graph order."""
    if capture.graph_module is None:
        return ()
    walk = _Walk(capture)
    walk.run(capture.graph_module.graph)
    return tuple(dict.fromkeys(s.root() for s in walk.streams if s.root().readers and s.root().writers))


@dataclass(frozen=True)
class _Part:
    """A tensor whose last dim runs along a stream: as it is, through a norm's weight, or squared."""

    stream: Stream
    norm: Norm | None = None
    squared: bool = False


class _Walk:
    def __init__(self, capture: Capture) -> None:
        assert capture.graph_module is not None
        self.parameters = capture.parameters
        self.products = {product.node: product for product in find_products(capture.graph_module, capture.parameters)}
        self.parts: dict[fx.Node, _Part] = {}
        self.streams: list[Stream] = []
        # parameter -> (user, stream, role) for each place that reads it
        self.uses: dict[str, list[tuple[fx.Node, Stream, Role]]] = {}

    def run(self, graph: fx.Graph) -> None:
        roots: dict[str, list[fx.Node]] = {}
        for node in graph.nodes:
            if node.op == "get_attr":
                roots.setdefault(str(node.target), []).append(node)
            elif node.op in ("call_function", "output"):
                found = self._product(self.products[node]) if node in self.products else self._other(node)
                if found is not None:
                    self.parts[node] = found
        for name, uses in self.uses.items():
            self._settle(name, uses, {user for node in roots.get(name, ()) for user in node.users})

    def _settle(self, name: str, uses: list[tuple[fx.Node, Stream, Role]], users: set[fx.Node]) -> None:
        """Pin what a parameter belongs to unless every place that reads it wants the same of each of its dims."""
        wanted = {(stream.root(), role) for _, stream, role in uses}
        along = Counter(role.dim for _, role in wanted)
        if users - {user for user, _, _ in uses}:
            why = f"{name} is read by something else too"
        elif max(along.values()) > 1 and not self._tied(wanted):
            why = f"{name} is read in several places, which want different things of it"
        else:
            return
        for stream, _ in wanted:
            stream.pin(why)

    @staticmethod
    def _tied(wanted: set[tuple[Stream, Role]]) -> bool:
        """Whether a parameter is the table that writes a stream and the head that reads it, which can be untied."""
        same = {stream for stream, role in wanted if role.dim == -1}
        roles = [role for _, role in wanted if role.dim == -1]
        return len(same) == 1 and len(roles) == 2 and {type(role) for role in roles} == {Reader, Writer} and all(
            role.table for role in roles if isinstance(role, Writer))

    def _write(self, stream: Stream, user: fx.Node, writer: Writer) -> None:
        if writer not in stream.root().writers:
            stream.root().writers.append(writer)
        self.uses.setdefault(writer.parameter, []).append((user, stream, writer))

    def _product(self, product: Product) -> _Part | None:
        view = product.weight
        whole = view is not None and (product.kind == "embedding" or view.orientation in ("as stored", "swapped"))
        read = [self.parts[node] for node in product.node.all_input_nodes if node in self.parts]
        if view is None or not whole or product.weight_left:
            self._pin(read, product.node)
            return None
        user = view.steps[0] if view.steps else product.node
        part = self.parts.get(product.activation)
        if part is not None and (product.kind == "embedding" or part.squared or len(read) > 1):
            self._pin(read, product.node)
        elif part is not None:
            reader = Reader(view.name, -2 if product.transposed else -1, part.norm or Norm(), product.bias,
                            product.scope[-1].path if product.scope else "")
            part.stream.root().readers.append(reader)
            self.uses.setdefault(view.name, []).append((user, part.stream, reader))
        else:
            self._pin(read, product.node)
        shape = product.node.meta["val"].shape
        stream = Stream(width=int(shape[-1]))
        self.streams.append(stream)
        table = product.kind == "embedding"
        self._write(stream, user, Writer(view.name, -1 if product.transposed or table else -2, table))
        if product.bias is not None and product.result is product.node:
            self._write(stream, self._bias_user(product), Writer(product.bias, -1))
        return _Part(stream)

    def _bias_user(self, product: Product) -> fx.Node:
        for source in product.node.all_input_nodes:
            found = view_of_parameter(source, self.parameters)
            if found is not None and found.name == product.bias:
                return found.steps[0] if found.steps else product.node
        return product.node

    def _other(self, node: fx.Node) -> _Part | None:
        """The part that an op makes of parts; None if what it gives does not change with the stream."""
        given = [source for source in node.all_input_nodes if source in self.parts]
        if not given or (node.op != "output" and not node.users):
            return None
        parts = [self.parts[source] for source in given]
        found = self._commutes(node, given, parts)
        if found is False:
            self._pin(parts, node)
            return None
        return found if isinstance(found, _Part) else None

    def _pin(self, parts: list[_Part], node: fx.Node) -> None:
        name = "the model's output" if node.op == "output" else getattr(
            getattr(node.target, "overloadpacket", node.target), "__name__", str(node.target))
        for part in parts:
            part.stream.pin(f"{name} takes its channels one by one" if node.op != "output" else f"it is {name}")

    def _commutes(self, node: fx.Node, given: list[fx.Node], parts: list[_Part]) -> _Part | bool:
        """The part after `node`; True for a number a row that a rotation leaves as it is; False where neither holds."""
        part, source, plain = parts[0], given[0], not any(p.norm or p.squared for p in parts)
        if node.op != "call_function":
            return False
        if is_view(node) or node.target in GATHERS or node.target is aten._to_copy.default or (
                node.target is operator.getitem):
            return self._view(node, source, part) if len(given) == 1 else False
        if node.target in _REDUCTIONS and len(given) == 1 and part.norm is None:
            dims = {dim % source.meta["val"].ndim for dim in _dims(node)}
            last = source.meta["val"].ndim - 1
            if part.squared:
                return dims == {last}
            return part if dims and last not in dims else False
        if node.target is aten.pow.Tensor_Scalar and plain:
            return replace(part, squared=True) if node.args[1] == 2 else False
        if node.target is aten.native_layer_norm.default and plain and source is node.args[0]:
            return self._layer_norm(node, part)
        if node.target is aten.mul.Tensor and plain and node.args[0] is node.args[1]:
            return replace(part, squared=True)
        if node.target in _SUMS and node.kwargs.get("alpha", 1) == 1 and not any(p.squared for p in parts):
            return self._sum(node, part)
        if node.target is aten.mul.Tensor or (node.target is aten.div.Tensor and source is node.args[0]):
            return self._scaled(node, part) if len(given) == 1 and not part.squared else False
        if node.target is aten.neg.default:
            return part if plain else False
        if node.target is aten.cat.default and plain:
            return self._cat(node)
        return False

    def _view(self, node: fx.Node, source: fx.Node, part: _Part) -> _Part | bool:
        value, before = node.meta.get("val"), source.meta.get("val")
        if node.target is operator.getitem and isinstance(before, (tuple, list)):
            return part if isinstance(value, Tensor) and value.shape[-1] == part.stream.width else False
        if node.target is aten._to_copy.default:
            return part if isinstance(value, Tensor) and value.is_floating_point() else False
        if node.target is aten.index.Tensor:
            rows = node.args[1]
            kept = isinstance(before, Tensor) and isinstance(rows, (list, tuple)) and len(rows) < before.ndim
            return part if kept else False
        if node.target is aten.index_select.default:
            return part if isinstance(before, Tensor) and node.args[1] % before.ndim < before.ndim - 1 else False  # type: ignore[operator]
        return part if _keeps_rows(node, before) else False

    def _layer_norm(self, node: fx.Node, part: _Part) -> _Part | bool:
        weight, bias = (self._vector(value, node) for value in node.args[2:4])
        if list(node.args[1]) != [part.stream.width] or weight is False or bias is False:  # type: ignore[arg-type]
            return False
        part.stream.root().keeps_mean = True
        self._use(part.stream, weight, bias)
        return replace(part, norm=Norm(weight[0] if weight else None, bias[0] if bias else None))

    def _sum(self, node: fx.Node, part: _Part) -> _Part | bool:
        operands = [value for value in node.args[:2] if isinstance(value, fx.Node)]
        both = [self.parts[value] for value in operands if value in self.parts]
        if len(operands) < 2:
            return False
        if len(both) == 2:
            if any(p.norm for p in both):
                for one in both:
                    one.stream.pin("a norm's weight stands between its parts")
            if any(p.norm for p in both) or any(_width(value) != part.stream.width for value in operands):
                return False
            both[0].stream.join(both[1].stream)
            return _Part(both[0].stream.root())
        other = next(value for value in operands if value not in self.parts)
        view = view_of_parameter(other, self.parameters)
        whole = view is not None and view.root.meta["val"].shape[-1] == _width(other) == part.stream.width
        if view is None or not whole or node.target is not aten.add.Tensor:
            return False
        if part.norm is not None:
            vector = self._vector(other, node)
            if not vector or vector[0].offset or part.norm.bias is not None:
                return False
            self._use(part.stream, vector)
            return replace(part, norm=replace(part.norm, bias=vector[0]))
        self._write(part.stream, view.steps[0] if view.steps else node, Writer(view.name, -1))
        return part

    def _scaled(self, node: fx.Node, part: _Part) -> _Part | bool:
        other = node.args[1] if node.args[0] in self.parts else node.args[0]
        if not isinstance(other, fx.Node):
            return part
        value = other.meta.get("val")
        if not isinstance(value, Tensor):
            return False
        if (value.ndim == 0 or value.shape[-1] == 1) and part.stream.width > 1:
            return part
        vector = self._vector(other, node) if node.target is aten.mul.Tensor and part.norm is None else None
        if not vector:
            return False
        self._use(part.stream, vector)
        return replace(part, norm=Norm(vector[0]))

    def _cat(self, node: fx.Node) -> _Part | bool:
        tensors: Any = node.args[0]
        parts = [self.parts[tensor] for tensor in tensors if tensor in self.parts]
        dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
        if len(parts) != len(tensors) or dim % node.meta["val"].ndim == node.meta["val"].ndim - 1:
            return False
        for one in parts[1:]:
            parts[0].stream.join(one.stream)
        return parts[0]

    def _use(self, stream: Stream, *vectors: tuple[NormVector, fx.Node] | Literal[False] | None) -> None:
        for vector in vectors:
            if isinstance(vector, tuple):
                self.uses.setdefault(vector[0].parameter, []).append((vector[1], stream, vector[0]))

    def _vector(self, value: Any, reader: fx.Node) -> tuple[NormVector, fx.Node] | Literal[False] | None:
        """A parameter [K] plus a number, and the node that reads it; None for None, False for anything else."""
        if value is None:
            return None
        offset, user = 0.0, reader
        while isinstance(value, fx.Node) and value.op != "get_attr":
            user = value
            if value.target is aten.add.Tensor and not value.kwargs:
                numbers = [v for v in value.args[:2] if isinstance(v, (int, float))]
                nodes = [v for v in value.args[:2] if isinstance(v, fx.Node)]
                if len(numbers) != 1 or len(nodes) != 1:
                    return False
                offset, value = offset + numbers[0], nodes[0]
            elif is_view(value) or value.target is aten._to_copy.default:
                value = value.args[0]
            else:
                return False
        if not isinstance(value, fx.Node) or str(value.target) not in self.parameters:
            return False
        return (NormVector(str(value.target), offset), user) if value.meta["val"].ndim == 1 else False


def _dims(node: fx.Node) -> Iterator[int]:
    dims: Any = node.args[1] if len(node.args) > 1 else ()
    yield from (dims if isinstance(dims, (list, tuple)) else ())


def _width(node: fx.Node) -> int:
    shape = node.meta["val"].shape
    return int(shape[-1]) if shape else 0


def _keeps_rows(node: fx.Node, before: Any) -> bool:
    """Whether a view leaves each row of the last dim whole and in order."""
    if not isinstance(before, Tensor):
        return False
    target: Any = node.target
    try:
        seen = target(torch.arange(before.shape[-1]).expand(before.shape).contiguous(), *node.args[1:], **node.kwargs)
    except (RuntimeError, TypeError):
        return False
    parts = seen if isinstance(seen, (tuple, list)) else (seen,)
    return all(part.ndim and part.shape[-1] == before.shape[-1] and bool((part == torch.arange(part.shape[-1])).all())
               for part in parts)
