"""Update: a quantized model and new float weights in; the same packed tensors, filled anew in place, out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qpass.errors import QPassError, WeightError
from qpass.layers.experts_layer import QuantExperts
from qpass.layers.packed_layers import PackedLayer
from qpass.swap.shared_scales import magnitude
from qpass.update_places import Linear, Place, places

_SHOWN = 10


@torch.no_grad()
def update(model: Any, weights: Mapping[str, Tensor] | nn.Module, *, allow_nonfinite: bool = False,
           check_first: bool = True) -> int:
    """Put new float weights into a quantized model, compiled or not, and return how many tensors were taken.

    model    what `qpass.quantize` or `qpass.load` gave, or torch.compile of it
    weights  a float module, or a state dict with its names, in any float dtypes and on any device; it may hold a part
             of the weights. Of experts that are computed together both matrices' parts must be whole
    allow_nonfinite  NaN and Inf count as 0
    check_first      look for them in all weights before the first layer changes; False saves that read of them

    Each weight is rounded to nearest as its layer's scheme says and written into the tensors that the layer holds:
    compiled graphs stay as they are, nothing is compiled again. Calibrated static activation scales stay. A layer is
    written in one go, by native code that packs as it rounds or once its new tensors are whole: what reads between two
    layers sees some new and some old, never half a layer. A tied head and its table are one weight.

    Raises WeightError, naming the tensors, before anything changes for names that the model does not have, other
    shapes, other types and tied names with different numbers, and for NaN and Inf. With `check_first=False` these
    are found as a weight is rounded, in the one read that this takes: that layer is whole and new then, with 0 for
    them, and those after it stay as they were. A packed form that cannot hold another weight is found when its turn
    comes, always. Both errors name what had changed before.
    """
    model = getattr(model, "_orig_mod", model)
    if not any(isinstance(module, PackedLayer) for module in model.modules()):
        raise QPassError("nothing in this model is quantized by qpass; load_state_dict updates float models")
    given = dict(weights.state_dict() if isinstance(weights, nn.Module) else weights)
    given = {name.removeprefix("_orig_mod."): tensor for name, tensor in given.items()}
    found = list(places(model))
    known = {name for place in found for name in place.names}
    unknown = [name for name in given if name not in known]
    wrong = [f"{name} is nothing that this model has{_near(name, known) if i < _SHOWN else ''}"
             for i, name in enumerate(unknown)]
    wrong += [said for place in found for said in place.wrong(given)]
    if wrong:
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        raise WeightError("the weights do not fit the model, and nothing was changed:\n  "
                          + "\n  ".join(wrong[:_SHOWN] + more))
    done: list[str] = []
    try:
        for place in found:
            if not allow_nonfinite and (check_first or (isinstance(place, Linear) and place.one_scale() is not None)):
                for name in place.found(given):
                    place.check(name, given[name])
        _share_scales(found, given)
        for place in found:
            if place.found(given):
                place.write(given, allow_nonfinite)
                done += place.found(given)
    except WeightError as why:
        raise WeightError(f"{why}. {_changed(done)}") from why
    finally:
        for module in model.modules():
            if isinstance(module, QuantExperts):
                _renew_biases(module)
    return len(given)


def _share_scales(places: Iterable[Place], given: Mapping[str, Tensor]) -> None:
    """Let weights that had one scale for the tensor together, as qpass/swap/shared_scales.py gives them, have it again:
    those of one parent module whose scales are equal."""
    groups: dict[tuple[str, float], list[Linear]] = {}
    for place in places:
        if isinstance(place, Linear) and place.found(given) and (scale := place.one_scale()) is not None:
            parent = place.names[0].rpartition(".")[0].rpartition(".")[0]
            groups.setdefault((parent, float(scale)), []).append(place)
    for group in groups.values():
        if len(group) > 1:
            known = [place.largest if place.largest is not None else place.stored(
                magnitude(given[place.found(given)[0]].detach())) for place in group]
            largest = torch.stack([found.cpu() for found in known]).amax()
            for place in group:
                place.largest = largest.to(place.layer.device)


def _changed(names: Sequence[str]) -> str:
    """What an update that stopped has changed."""
    if not names:
        return "Nothing was changed"
    more = f"{len(names) - _SHOWN} others, " if len(names) > _SHOWN else ""
    return f"Changed before it: {more}{', '.join(names[-_SHOWN:])}; update again with all of these and finite weights"


def _near(name: str, known: Iterable[str]) -> str:
    """Names of the same layer to type instead: other tools fuse q, k and v, or take experts apart."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"; closest: {', '.join(near)}" if near else ""


def _renew_biases(experts: QuantExperts) -> None:
    """Let the biases as kernels take them follow the parameters, in the tensors that compiled graphs hold."""
    held = {name: getattr(experts, name) for name in ("first_bias_rows", "second_bias_rows")}
    experts.renew()
    for name, tensor in held.items():
        if tensor is not None:
            experts._buffers[name] = tensor.copy_(getattr(experts, name))
