"""Blocks: a capture and the sites to quantize in, the modules to calibrate one after another, in graph order, out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import fx

from qpass.capture.capture_model import Capture
from qpass.capture.find_products import find_products, scope_of
from qpass.capture.tape import Scope
from qpass.site import Site


@dataclass(frozen=True, kw_only=True)
class Block:
    """One module of the model that is calibrated as a whole.

    path         of the module; "" is the model itself
    sites        names of the sites within, in order of their first use
    last_reader  number of the last block that reads this one's output, through whatever lies between blocks
    """

    path: str
    sites: tuple[str, ...]
    last_reader: int


@dataclass
class _Call:
    """One call of a module, with the calls inside it that lead to sites."""

    scope: Scope | None
    children: dict[Scope, _Call] = field(default_factory=dict)
    own: list[str] = field(default_factory=list)

    @property
    def path(self) -> str:
        return self.scope.path if self.scope else ""

    def all_sites(self) -> Iterator[str]:
        yield from self.own
        for child in self.children.values():
            yield from child.all_sites()


def find_blocks(capture: Capture, sites: Sequence[Site]) -> tuple[Block, ...]:
    """Blocks that hold every one of `sites` that the graph reaches, each exactly once.

    A block is a module with modules of its own that stands beside others of its class (the layers of a model), or a
    module that is a product and belongs to none of those. Where the graph shows no such structure (no graph; one
    layer called several times) the blocks are larger, at the most the model itself.
    """
    if capture.graph_module is None:
        return (Block(path="", sites=tuple(site.name for site in sites), last_reader=0),) if sites else ()
    graph = capture.graph_module.graph
    tree = _tree(capture, {name: site.name for site in sites for name in (site.name, *site.aliases)})
    reached = tuple(dict.fromkeys(tree.all_sites()))
    if not reached:
        return ()
    calls = Counter(scope.path for scope in {scope for node in graph.nodes for scope in scope_of(node)})
    found = _split(tree, calls)
    counted = Counter(name for call in found for name in set(call.all_sites()))
    if any(count > 1 for count in counted.values()) or len({call.path for call in found}) < len(found):
        found = [tree]
    last = _last_readers(graph, [call.path for call in found])
    return tuple(Block(path=call.path, sites=tuple(dict.fromkeys(call.all_sites())), last_reader=last[number])
                 for number, call in enumerate(found))


def _tree(capture: Capture, names: dict[str, str]) -> _Call:
    """The calls that lead to products with a parameter in `names`, as a tree."""
    assert capture.graph_module is not None
    root = _Call(scope=None)
    for product in find_products(capture.graph_module, capture.parameters):
        name = names.get(product.weight.name) if product.weight is not None else None
        if name is None or product.kind == "embedding":
            continue
        place = root
        for scope in product.scope:
            if scope.path:
                place = place.children.setdefault(scope, _Call(scope=scope))
        place.own.append(name)
    return root


def _split(call: _Call, calls: Counter[str]) -> list[_Call]:
    children = list(call.children.values())
    if call.own or not children or any(calls[child.path] > 1 for child in children):
        return [call]
    alike = Counter(child.scope.class_name for child in children if child.scope and child.children)
    if any(count > 1 for count in alike.values()):
        return children
    parts = [part for child in children for part in _split(child, calls)]
    return [call] if len(parts) > 1 and not any(part.children for part in parts) else parts


def _last_readers(graph: fx.Graph, paths: list[str]) -> list[int]:
    """For each block, the last one whose input depends on its output without passing through another block."""
    numbers = {path: number for number, path in enumerate(paths)}
    last = list(range(len(paths)))
    sources: dict[fx.Node, frozenset[int]] = {}
    for node in graph.nodes:
        here = next((numbers[scope.path] for scope in scope_of(node) if scope.path in numbers), None)
        given = frozenset[int]().union(*(sources[source] for source in node.all_input_nodes))
        if here is None:
            sources[node] = given
            continue
        for other in given - {here}:
            last[other] = max(last[other], here)
        sources[node] = frozenset({here})
    return last
