"""Find: a model and its capture in, one Site per parameter that meets an activation out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from qpass.capture.capture_model import Capture
from qpass.capture.find_products import Product, find_products, opaque_readers
from qpass.find.find_experts import FindExperts
from qpass.find.graph_facts import consumers, is_router, produced_by, shared_inputs
from qpass.find.swap_choice import Calls, choose_swap
from qpass.find.unreached import unreached_sites
from qpass.site import Site, base_names


def find(model: nn.Module | ExportedProgram, capture: Capture) -> tuple[Site, ...]:
    """Sites in order of first use in the graph, then those that no example input reached.

    A parameter with several names is one site under its first name, except where one name is looked up as an embedding
    and another multiplied: a tied head is a site of its own, with the embedding among its aliases. Parameters that
    hold integers or 8-bit floats are skipped: they are quantized already. Those that another library wraps in a tensor
    type of its own are sites that it refuses to swap.
    """
    parameters, modules = _parameters_of(model), _modules_of(model)
    sites: list[Site] = []
    reached: set[str] = set()
    if capture.graph_module is not None:
        weights = frozenset(name for name, tensor in parameters.items() if _is_float(tensor))
        sites = _graph_sites(capture, capture.graph_module, parameters, modules, weights)
        wrapped = {name for name, tensor in parameters.items() if is_traceable_wrapper_subclass(tensor)}
        reached = _read_names(capture.graph_module) - wrapped
    reached.update(name for site in sites for name in (site.name, *site.aliases))
    return (*sites, *unreached_sites(parameters, modules, capture, reached))


def _graph_sites(capture: Capture, graph_module: fx.GraphModule, parameters: Mapping[str, Tensor],
                 modules: Mapping[str, nn.Module], weights: frozenset[str]) -> list[Site]:
    products = find_products(graph_module, weights)
    readings = _by_parameter(products)
    calls, experts = Calls(graph_module), FindExperts(graph_module, products, modules)
    parts = [part for name, found in readings.items() for part in _parts(name, found, capture.aliases.get(name, ()))]
    shared = shared_inputs({name: found for name, found in parts if all(p.weight is not None for p in found)})
    names = {product.node: name for name, found in parts for product in found}
    sites = []
    for name, found in parts:
        weight = found[0].weight
        stored = name if weight is None else weight.name
        known = (stored, *capture.aliases.get(stored, ()))
        owners = {path.rpartition(".")[0]: modules.get(path.rpartition(".")[0]) for path in known}
        swap, refusal = choose_swap(name, readings[stored], owners, calls)
        understood = None
        if weight is not None and any(product.kind == "experts" for product in found):
            understood, refusal = experts.site_of(name, owners)
            swap = None if understood is None else "module"
        biases = {product.bias for product in found}
        sites.append(Site(
            name=name, kind=found[0].kind, shape=tuple(parameters[stored].shape), dtype=parameters[stored].dtype,
            transposed=found[0].transposed, owner=name.rpartition(".")[0],
            owner_class=_class_name(name, modules, found[0]),
            owner_bases=base_names(modules.get(name.rpartition(".")[0])),
            bias=biases.pop() if len(biases) == 1 else None,
            swap=swap, refusal=refusal, uses=len(found), aliases=tuple(other for other in known if other != name),
            experts=understood, shared_input=shared.get(name), produced_by=produced_by(found[0]),
            consumers=consumers(found[0], names),
            role="router" if found[0].kind == "linear" and any(map(is_router, found)) else None))
    return sites + _inside_opaque(graph_module, parameters, modules, weights, {site.name for site in sites})


def _by_parameter(products: Sequence[Product]) -> dict[str, list[Product]]:
    """Parameter name -> the products that read it, in the order of their first use."""
    readings: dict[str, list[Product]] = {}
    for product in products:
        for name in product.derived or (product.weight.name if product.weight else "",):
            readings.setdefault(name, []).append(product)
    return readings


def _parts(name: str, found: list[Product], aliases: tuple[str, ...]) -> list[tuple[str, list[Product]]]:
    """One part; or, where a look-up and a product read one parameter under two names, one for each."""
    looked_up = [product for product in found if product.kind == "embedding"]
    multiplied = [product for product in found if product.kind != "embedding"]
    if not looked_up or not multiplied:
        return [(name, found)]
    names = (name, *aliases)
    here = {entry.path for product in multiplied for entry in product.scope[-1:]}
    head = next((alias for alias in names if alias.rpartition(".")[0] in here), names[-1])
    table = next((alias for alias in names if alias != head), None)
    return [(name, multiplied + looked_up)] if table is None else [(table, looked_up), (head, multiplied)]


def _inside_opaque(graph_module: fx.GraphModule, parameters: Mapping[str, Tensor], modules: Mapping[str, nn.Module],
                   weights: frozenset[str], found: set[str]) -> list[Site]:
    """Sites of matrices that an op multiplies within itself, such as a recurrent layer's."""
    sites = []
    for name, reader in opaque_readers(graph_module, weights).items():
        if name not in found:
            owner = name.rpartition(".")[0]
            sites.append(Site(
                name=name, kind="linear", shape=tuple(parameters[name].shape), dtype=parameters[name].dtype,
                owner=owner, owner_class=type(modules[owner]).__name__ if owner in modules else "",
                owner_bases=base_names(modules.get(owner)), swap=None,
                refusal=f"{name} is multiplied inside {reader}, which runs as one piece and cannot be opened; write "
                        "the product with torch.nn.functional.linear, or add it to ignore"))
    return sites


def _class_name(name: str, modules: Mapping[str, nn.Module], product: Product) -> str:
    owner = name.rpartition(".")[0]
    if owner in modules:
        return type(modules[owner]).__name__
    return next((entry.class_name for entry in product.scope if entry.path == owner), "")


def _read_names(graph_module: fx.GraphModule) -> set[str]:
    return {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr" and node.users}


def _parameters_of(model: nn.Module | ExportedProgram) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.named_parameters()
            if not isinstance(tensor, nn.UninitializedParameter)}


def _modules_of(model: Any) -> dict[str, nn.Module]:
    """Every module under every name it has; none are left in an ExportedProgram."""
    return dict(model.named_modules(remove_duplicate=False)) if isinstance(model, nn.Module) else {}


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not is_traceable_wrapper_subclass(tensor)
