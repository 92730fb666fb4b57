"""Unreached: parameters that no product in the graph reads in, the sites that walking the modules gives out."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from qpass.capture.capture_model import Capture
from qpass.site import Kind, Site, base_names

_LOOKS_UP = (nn.Embedding, nn.EmbeddingBag)


def unreached_sites(parameters: Mapping[str, Tensor], modules: Mapping[str, nn.Module], capture: Capture,
                    reached: set[str]) -> list[Site]:
    """Sites of floating-point matrices that are not in `reached`, with `uses=0` where there is a graph to count in.

    Only an nn.Linear, and not a subclass, is known to be nothing but a product without having seen it run.
    """
    sites = []
    for name, tensor in parameters.items():
        if name in reached or not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
            continue
        owner_path = name.rpartition(".")[0]
        owner = modules.get(owner_path)
        kind = _kind_of(tensor, owner)
        if kind is None:
            continue
        names = (name, *capture.aliases.get(name, ()))
        holders = [modules.get(alias.rpartition(".")[0]) for alias in names]
        wrapped = is_traceable_wrapper_subclass(tensor)
        plain = all(type(holder) is nn.Linear for holder in holders) and name.endswith("weight") and not wrapped
        bias = f"{owner_path}.bias".lstrip(".") if plain and getattr(owner, "bias", None) is not None else None
        refusal = None if plain else _refusal(name, kind, holders, capture)
        if wrapped:
            refusal = (f"{name} is a {type(tensor.data).__name__}, a tensor type of another library, which may be "
                       "quantized or spread over devices already; give it a plain tensor first, or add it to ignore")
        sites.append(Site(
            name=name, kind=kind, shape=tuple(tensor.shape), dtype=tensor.dtype, owner=owner_path,
            owner_class=type(owner).__name__ if owner is not None else "", owner_bases=base_names(owner), bias=bias,
            swap="module" if plain else None, refusal=refusal,
            uses=0 if capture.graph_module is not None else 1, aliases=names[1:]))
    return sites


def _kind_of(tensor: Tensor, owner: nn.Module | None) -> Kind | None:
    if isinstance(owner, _LOOKS_UP):
        return "embedding"
    if isinstance(owner, _ConvNd) or tensor.numel() == 0 or min(tensor.shape, default=0) < 2:
        return None
    return {2: "linear", 3: "experts"}.get(tensor.ndim)  # type: ignore[return-value]


def _refusal(name: str, kind: Kind, holders: list[nn.Module | None], capture: Capture) -> str:
    if any(isinstance(holder, _LOOKS_UP) for holder in holders) and len(holders) > 1:
        return (f"{name} is tied: an embedding shares it; to quantize the product alone, give it a parameter of its "
                "own (a clone) first, or add it to ignore")
    if ".parametrizations." in name:
        return (f"{name} goes through a parametrization before it is used; call torch.nn.utils.parametrize."
                "remove_parametrizations first, or add it to ignore")
    if capture.graph_module is None:
        return (f"no graph of the model could be had, so nothing shows how {name} is used; pass example_inputs with "
                "which the forward can be traced, or add it to ignore")
    return (f"the example inputs never reach {name}, so nothing shows how it is used; pass example_inputs that reach "
            "it, or add it to ignore")
