"""Understand experts: a captured graph and a module with 3-D parameters in, an ExpertsSite out, or a sentence why not.

No implementation is recognized by its look. The part of the graph that ran inside the module is run twice on made-up
numbers: once with biases at zero, to fit the Gate to what goes in and comes out between the two products; once with
all numbers at random, to see that the whole gives what the definition of qpass::experts gives, to nine digits.
What is not the same is refused, with the expression that was not understood.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from qpass.capture.find_products import Product
from qpass.capture.tape import ModuleCall
from qpass.experts_site import Argument, ExpertsSite, Form
from qpass.find.experts_rows import define
from qpass.find.expression import expression_between
from qpass.find.fit_gate import Fit, constants_in, fit_gate
from qpass.find.run_experts import CannotRun, nodes_of_call, run_call, window_weight

_FORMS: tuple[Form, ...] = ("indexed", "scored", "sorted")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Roles:
    """Which parameter and which argument is what; `first` and `second` as leaves."""

    first: tuple[str, ...]
    second: str
    transposed: tuple[bool, bool]
    sizes: tuple[int, int, int]  # experts, hidden, intermediate
    fit: Fit


def understand_experts(owner: str, module: nn.Module, graph_module: fx.GraphModule, products: Sequence[Product],
                       known: dict[str, ExpertsSite | str]) -> ExpertsSite | str:
    """What the call of `module` at path `owner` computes, or the end of a sentence that begins with its name.

    products  those of the module's 3-D parameters, in the graph's order
    known     answers for calls of the same code and sizes, added to: equal layers are tried once
    """
    inside = [product for product in products if product.scope]
    call = next((entry.call for product in inside for entry in product.scope if entry.path == owner), None)
    given: ModuleCall | None = graph_module.meta.get("module_calls", {}).get(call)
    if given is None:
        return ("is not called as a module of its own in the graph that was captured; pass example_inputs with which "
                "the forward can be traced, and keep experts in a module apart from their router")
    nodes = nodes_of_call(graph_module.graph, call)
    key = _fingerprint(owner, type(module).__qualname__, nodes, given)
    if key not in known:
        try:
            known[key] = _understand(owner, module, given, nodes, inside)
        except CannotRun as error:
            known[key] = f"{error}, so that it cannot be tried apart from the rest"
        except Exception as error:  # whatever an op may raise on numbers that are not the model's
            known[key] = f"could not be tried on made-up numbers ({type(error).__name__}: {str(error)[:120]})"
    found = known[key]
    return found if isinstance(found, str) else replace(found, owner=owner)


def _understand(owner: str, module: nn.Module, given: ModuleCall, nodes: Sequence[fx.Node],
                products: Sequence[Product]) -> ExpertsSite | str:
    if given.output is None:
        return "gives more than one tensor, and a layer of experts gives one"
    arguments = _arguments(module, given)
    floats = {a: n for a, n in arguments.items() if n.meta["val"].is_floating_point()}
    integers = {a: n for a, n in arguments.items() if not n.meta["val"].is_floating_point()}
    shapes = _parameters(owner, nodes)
    first, second = _order(products, shapes)
    if not first or second is None:
        return "has no two products one after the other, as experts do: " + _seen(products)
    roles: _Roles | None = None
    for candidate in _assignments(floats, integers):
        fed = _feed(candidate, shapes[second].shape[0], constants_in(nodes))
        draw = torch.Generator().manual_seed(11)
        numbers = {name: window_weight(v.shape, draw) if v.ndim == 3 else torch.zeros(v.shape, dtype=torch.float64)
                   for name, v in shapes.items()}
        values = run_call(nodes, {node: fed[argument] for argument, node in arguments.items() if argument in fed},
                          numbers)
        roles = roles or _roles(products, first, second, values, nodes)
        if roles is None:
            return ("computes something between its two products that was not understood: "
                    + expression_between(products, second))
        given_by_node = {node: fed[argument] for argument, node in arguments.items() if argument in fed}
        found = _verify(owner, candidate, fed, roles, (given.output, nodes, given_by_node), shapes)
        if found is not None:
            return found
    return ("computes a result that is not the weighted sum of its experts' results: "
            + expression_between(products, second, result=given.output))


def _arguments(module: nn.Module, given: ModuleCall) -> dict[Argument, fx.Node]:
    """The tensors that the call got, by where the forward takes them."""
    names = list(inspect.signature(module.forward).parameters)
    found = {Argument(position=i, name=names[i] if i < len(names) else ""): value
             for i, value in enumerate(given.args)}
    found |= {Argument(position=names.index(name) if name in names else len(names), name=name): value
              for name, value in given.kwargs.items()}
    return {argument: value for argument, value in found.items() if isinstance(value, fx.Node)}


def _parameters(owner: str, nodes: Sequence[fx.Node]) -> dict[str, Tensor]:
    """Parameters and buffers that the call reads: name -> fake value."""
    return {str(source.target): source.meta["val"] for node in nodes for source in node.all_input_nodes
            if source.op == "get_attr"}


def _order(products: Sequence[Product], shapes: Mapping[str, Tensor]) -> tuple[tuple[str, ...], str | None]:
    """The parameters of the first products, in the graph's order, and that of the second."""
    by_name: dict[str, Product] = {}
    for product in products:
        assert product.weight is not None
        by_name.setdefault(product.weight.name, product)
    after = {name: _leads_to(product.activation, {p.node for p in by_name.values()})
             for name, product in by_name.items()}
    seconds = [name for name, reads in after.items() if reads]
    firsts = tuple(name for name in by_name if name not in seconds)
    return (firsts, seconds[0]) if len(seconds) == 1 and len(firsts) in (1, 2) else (firsts, None)


def _leads_to(node: fx.Node, wanted: set[fx.Node]) -> bool:
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current in wanted:
            return True
        if current not in seen:
            seen.add(current)
            pending.extend(current.all_input_nodes)
    return False


_Candidate = tuple[Form, Argument, "Argument | None", "Argument | None", tuple[int, ...], tuple[int, ...]]


def _assignments(floats: Mapping[Argument, fx.Node], integers: Mapping[Argument, fx.Node]) -> Iterator[_Candidate]:
    """(form, x, index, weight, shape of x, shape of the weight): every way in which the arguments can be these."""
    shape = {a: tuple(map(int, n.meta["val"].shape)) for a, n in (*floats.items(), *integers.items())}
    for x in floats:
        others = [a for a in floats if a != x]
        for weight in others:
            for index in integers:
                if shape[index] == shape[weight] and len(integers) == 1 and len(others) == 1:
                    yield "indexed", x, index, weight, shape[x], shape[weight]
            if not integers and len(others) == 1:
                yield "scored", x, None, weight, shape[x], shape[weight]
        if not others and not integers:
            yield "sorted", x, None, None, shape[x], ()


def _feed(candidate: _Candidate, experts: int, constants: Sequence[float]) -> dict[Argument, Tensor]:
    """Made-up arguments: rows of many sizes, so that limits are reached; different experts in each row of an index."""
    form, x, index, weight, x_shape, weight_shape = candidate
    draw = torch.Generator().manual_seed(5)
    tokens = torch.randn(x_shape, dtype=torch.float64, generator=draw)
    sizes = torch.linspace(-1.5, 1.0, max(x_shape[0] if x_shape else 1, 1), dtype=torch.float64).exp()
    largest = max([c for c in constants if c < 1e4], default=1.0)
    fed = {x: tokens * sizes.view(-1, *[1] * (len(x_shape) - 1)) * max(1.0, largest)}
    if weight is not None:
        fed[weight] = torch.rand(weight_shape, dtype=torch.float64, generator=draw) + 0.1
        if form == "scored":
            fed[weight] *= torch.rand(weight_shape, generator=draw) < 0.6
    if index is not None:
        places = weight_shape[-1]
        rows = [torch.randperm(experts, generator=draw)[:places] if places <= experts
                else torch.randint(experts, (places,), generator=draw)
                for _ in range(max(1, tokens.new_empty(weight_shape).numel() // max(places, 1)))]
        fed[index] = torch.stack(rows).view(weight_shape)
    return fed


def _roles(products: Sequence[Product], first: tuple[str, ...], second: str, values: Mapping[fx.Node, Any],
           nodes: Sequence[fx.Node]) -> _Roles | None:
    of = {name: [p for p in products if p.weight is not None and p.weight.name == name] for name in (*first, second)}
    fits: list[Fit] = []
    for index, last in enumerate(of[second]):
        if any(index >= len(of[name]) for name in first):
            return None
        before = [_rows(values[of[name][index].node]) for name in first]
        after = values.get(last.activation)
        if isinstance(after, Tensor) and after.numel() == 0:  # an expert that none of the made-up tokens chose
            continue
        fit = fit_gate(before, _rows(after), constants_in(nodes)) if isinstance(after, Tensor) else None
        if fit is None or (fits and fit != fits[0]):
            return None
        fits.append(fit)
    if not fits:
        return None
    turned = [{p.transposed for p in found} for found in of.values()]
    one, two = turned[:-1], turned[-1]
    if any(len(t) != 1 for t in turned) or len({t for s in one for t in s}) != 1:
        return None
    shape = of[second][0].weight.root.meta["val"].shape  # type: ignore[union-attr]
    transposed = (next(iter(one[0])), next(iter(two)))
    hidden, inner = (shape[2], shape[1]) if transposed[1] else (shape[1], shape[2])
    names = first[::-1] if fits[0].up_first and len(first) == 2 else first
    return _Roles(first=names, second=second, transposed=transposed, sizes=(int(shape[0]), int(hidden), int(inner)),
                  fit=fits[0])


def _rows(value: Tensor) -> Tensor:
    """A product's value as rows; a column left over from W @ x goes."""
    if value.shape[-1] == 1 and value.ndim > 2:
        value = value.squeeze(-1)
    return value.reshape(-1, value.shape[-1])


def _verify(owner: str, candidate: _Candidate, fed: Mapping[Argument, Tensor], roles: _Roles,
            parts: tuple[fx.Node, Sequence[fx.Node], Mapping[fx.Node, Tensor]],
            shapes: Mapping[str, Tensor]) -> ExpertsSite | None:
    """The site, if the call's result on random numbers is what the definition gives; None if it is not."""
    output, nodes, given = parts
    form, x, index, weight, _, _ = candidate
    draw = torch.Generator().manual_seed(23)
    numbers = {name: window_weight(v.shape, draw) if v.ndim == 3
               else torch.randn(v.shape, dtype=torch.float64, generator=draw) for name, v in shapes.items()}
    got = run_call(nodes, given, numbers).get(output)
    if not isinstance(got, Tensor):
        return None
    experts, hidden, inner = roles.sizes
    for first_bias, second_bias in _bias_choices(roles, shapes):
        site = ExpertsSite(
            owner=owner, experts=experts, hidden=hidden, intermediate=inner, gate=roles.fit.gate,
            first=tuple(map(_leaf, roles.first)), second=_leaf(roles.second), rows=roles.fit.rows,
            up_first=roles.fit.up_first and roles.fit.rows != "apart", transposed=roles.transposed,
            first_bias=None if first_bias is None else tuple(map(_leaf, first_bias)),
            second_bias=None if second_bias is None else _leaf(second_bias), form=form, x=x, index=index,
            weight=weight)
        stored = {_leaf(name): value for name, value in numbers.items()}
        want = define(site, stored, fed[x], None if index is None else fed[index],
                      None if weight is None else fed[weight])
        if want is not None and got.numel() == want.numel() and torch.allclose(
                got.reshape(want.shape), want, rtol=1e-9, atol=1e-9 * float(want.abs().max())):
            return site
    return None


def _bias_choices(roles: _Roles, shapes: Mapping[str, Tensor]
                  ) -> Iterator[tuple[tuple[str, ...] | None, str | None]]:
    """Parameters that can be the biases, by their shapes."""
    experts, hidden, inner = roles.sizes
    size = inner if roles.fit.rows in ("single", "apart") else 2 * inner
    one = [name for name, v in shapes.items() if tuple(v.shape) == (experts, size)]
    two = [name for name, v in shapes.items() if tuple(v.shape) == (experts, hidden)]
    firsts: list[tuple[str, ...] | None] = [None]
    firsts += [(name,) for name in one] if len(roles.first) == 1 else [(a, b) for a in one for b in one if a != b]
    for first in reversed(firsts):
        for second in [name for name in two if name not in (first or ())] or [None]:  # type: ignore[list-item]
            yield first, second
        if two:
            yield first, None


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _seen(products: Sequence[Product]) -> str:
    return ", ".join(f"{p.weight.name if p.weight else '?'} in {p.node.target}" for p in products[:4])


def _fingerprint(owner: str, class_name: str, nodes: Sequence[fx.Node], given: ModuleCall) -> str:
    """Equal for calls of the same code on the same sizes, whatever the module's path."""
    number: dict[fx.Node, str] = {}

    def name(node: fx.Node) -> str:
        if node not in number:
            value = node.meta.get("val")
            what = str(node.target).removeprefix(owner) if node.op == "get_attr" else ""
            number[node] = f"%{len(number)}{what}{list(value.shape) if isinstance(value, Tensor) else ''}"
        return number[node]

    args, kwargs = fx.node.map_arg((given.args, dict(given.kwargs)), lambda n: _Named(name(n)))
    lines = [class_name, repr(args), repr(kwargs)]
    for node in nodes:
        inner, named = fx.node.map_arg((node.args, node.kwargs), lambda n: _Named(name(n)))
        lines.append(f"{name(node)} = {node.target}{inner!r}{named!r}")
    return "\n".join([*lines, name(given.output) if given.output is not None else ""])


class _Named(str):
    """A node's number, printed bare."""

    def __repr__(self) -> str:
        return str(self)
