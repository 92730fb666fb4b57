"""Adopt: a live model whose weights torchao quantized in; the same model on packed layers, the same numbers, out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qpass.checkpoints.checkpoint_layers import Contents, Layer
from qpass.checkpoints.fill_model import fill_layers
from qpass.dtype import dtype_name
from qpass.errors import CheckpointError
from qpass.formats.checkpoint import Checkpoint, Stored
from qpass.formats.reader import Place, WeightRead

_WHERE = Path("the model")


class LiveTensors:
    """The Source of weights that are in memory, described as torchao describes them when it saves them."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        self._held: dict[str, Tensor]
        self.metadata: Mapping[str, Any]
        self._held, self.metadata = flatten_tensor_state_dict(dict(weights))
        self.tensors: Mapping[str, Stored] = {
            name: Stored(file=_WHERE, dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape))
            for name, tensor in self._held.items()}

    def read(self, names: Iterable[str], at: int | None = None) -> dict[str, Tensor]:
        """The tensors, which are then held here no longer; with `at`, a part of each, which stays."""
        return {name: self._held.pop(name) if at is None else self._held[name][at] for name in names}


def adopt(model: nn.Module) -> nn.Module:
    """Replace each nn.Linear whose weight is a quantized tensor of torchao; returns the model, changed in place.

    Integers, scales and zero points are taken over as they are. Raises CheckpointError, naming the layer, for a type of
    torchao that cannot be read, and if the model holds none at all.
    """
    from qpass.formats.torchao_format import TorchAoReader
    from qpass.load_model import plan_of
    from qpass.quantize_model import finish, remember

    paths: dict[int, list[str]] = {}
    weights: dict[int, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
        if weight is not None and type(weight.data).__module__.startswith("torchao."):
            paths.setdefault(id(weight), []).append(path)
            weights[id(weight)] = weight.data
    if not paths:
        raise CheckpointError("the model holds no linear layer that torchao quantized; qpass.quantize rounds a float "
                              "model")
    try:
        source = LiveTensors({f"{found[0]}.weight": weights[key] for key, found in paths.items()})
    except ValueError as error:
        raise CheckpointError(f"the model holds a weight that torchao itself cannot describe: {error}") from error
    reader = TorchAoReader(Checkpoint(path=_WHERE, config={}, quantization={}, source=source))
    layers = []
    for key, found in paths.items():
        given = weights.pop(key)
        shape, dtype, device = tuple(given.shape), given.dtype, given.device
        del given
        read = reader.weight(Place(path=found[0], name=f"{found[0]}.weight", shape=shape))
        assert isinstance(read, WeightRead)
        layers.append(Layer(paths=tuple(found), leaf="weight", bias="bias", transposed=False, module=True, read=read))
        plain = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
        for path in found:
            model.get_submodule(path)._parameters["weight"] = plain
    plan = plan_of(model, reader, {}, Contents(layers=tuple(layers), floats=(), notes=()))
    fill_layers(model, layers, reader.checkpoint, device)
    model.eval()
    if plan is not None:
        remember(model, plan)
    finish(model, plan)
    return model
