"""Layer writer: what a format must say to write a model: each linear layer's tensors, and the config over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qpass.errors import CheckpointError
from qpass.formats.expert_matrices import ExpertMatrix, expert_matrices
from qpass.layers.experts_layer import QuantExperts
from qpass.layers.packed_layers import PackedWeight, QuantLinear

Writable = QuantLinear | ExpertMatrix


class LayerWriter(Protocol):
    """A format that writes nn.Linear layers, and matrices of experts as such, one by one. `describe` packs nothing and
    equals what `tensors` gives."""

    name: str

    def refuses(self, layer: Writable) -> str | None: ...

    def describe(self, layer: Writable) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]: ...

    def tensors(self, layer: Writable) -> dict[str, Tensor]: ...

    def config(self, model: nn.Module, layers: Mapping[str, Writable]) -> dict[str, Any]: ...


def writable_layers(model: nn.Module, writer: LayerWriter) -> dict[str, Writable]:
    """Every packed layer by path. Raises CheckpointError that lists those that the format cannot hold, and why."""
    found: dict[str, Writable] = {}
    wrong: list[str] = []
    for path, layer in model.named_modules():
        for name, matrix in expert_matrices(path, layer) if isinstance(layer, QuantExperts) else ():
            why = "it is not integers of its own" if matrix is None else writer.refuses(matrix)
            if matrix is None or why is not None:
                wrong.append(f"{name}: {why}")
            else:
                found[name] = matrix
        if not isinstance(layer, PackedWeight):
            continue
        plain = isinstance(layer, QuantLinear) and isinstance(layer.origin.module, nn.Linear)
        why = writer.refuses(layer) if plain else "it is no nn.Linear, and the format knows no others"  # type: ignore[arg-type]
        if why is not None:
            wrong.append(f"{path}: {why}")
        elif isinstance(layer, QuantLinear):
            found[path] = layer
    if wrong or not found:
        lines = wrong[:10] + ([f"and {len(wrong) - 10} more"] if len(wrong) > 10 else [])
        raise CheckpointError(f"the model cannot be saved as {writer.name}:\n  " + "\n  ".join(
            lines or ["nothing in it is quantized"]) + "\ncompressed-tensors, the default, holds every layer")
    return found


def float_linears(model: nn.Module, layers: Mapping[str, Writable]) -> Iterator[str]:
    """Paths of nn.Linear layers that stay float; the head is not named, for no reader expects it quantized."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return (path for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and path not in layers and module is not head)

