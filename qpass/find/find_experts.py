"""Find experts: the products of a graph with 3-D parameters in, for each parameter its ExpertsSite or a refusal out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx, nn

from qpass.capture.find_products import Product, scope_of
from qpass.experts_site import ExpertsSite
from qpass.find.understand_experts import understand_experts


class FindExperts:
    """Answers for one graph; a module is looked at once, and modules of equal code and sizes are tried once."""

    def __init__(self, graph_module: fx.GraphModule, products: Sequence[Product],
                 modules: Mapping[str, nn.Module]) -> None:
        self._graph_module, self._modules = graph_module, modules
        self._products: dict[str, list[Product]] = {}
        for product in products:
            if product.weight is not None and product.weight.root.meta["val"].ndim >= 3:
                self._products.setdefault(_owner(product.weight.name), []).append(product)
        self._answers: dict[str, ExpertsSite | str] = {}
        self._known: dict[str, ExpertsSite | str] = {}

    def site_of(self, name: str, owners: Mapping[str, nn.Module | None]) -> tuple[ExpertsSite | None, str | None]:
        """(site, None) or (None, the sentence that says why experts stay float) for the parameter `name`.

        owners: path -> module, for every module that holds the parameter under one of its names.
        """
        owner = _owner(name)
        if owner not in self._answers:
            self._answers[owner] = self._answer(owner, owners)
        found = self._answers[owner]
        if isinstance(found, str):
            return None, f"{owner or 'the model'} {found}; its experts stay in float: add {name!r} to ignore"
        if name.rpartition(".")[2] not in found.parameters:
            return None, f"{name} is no weight of the experts of {owner}; add it to ignore"
        return found, None

    def _answer(self, owner: str, owners: Mapping[str, nn.Module | None]) -> ExpertsSite | str:
        module = self._modules.get(owner)
        if module is None:
            return "is part of a graph without modules, where experts cannot be replaced; quantize the nn.Module"
        if len({id(other) for other in owners.values()}) > 1:
            return "shares a weight with another module"
        products = self._products.get(owner, [])
        for product in products:
            assert product.weight is not None
            if product.weight.cast is not None:
                return f"casts {product.weight.name.rpartition('.')[2]} at each call before it is multiplied"
            for user in product.weight.root.users:
                if not any(entry.path == owner for entry in scope_of(user)):
                    return f"has a weight, {product.weight.name.rpartition('.')[2]}, that is read outside of it too"
        return understand_experts(owner, module, self._graph_module, products, self._known)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
