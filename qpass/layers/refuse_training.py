"""Refuse training: a model with packed layers in, the same model whose train() says why not before any flag changes.

Every packed layer refuses as well, but nn.Module.train reaches it after the modules before it have switched.
"""

from __future__ import annotations

from torch import nn

from qpass.errors import PackedForInference
from qpass.layers.packed_layers import PackedLayer


class RefuseTraining:
    """Stands as `model.train`; copies and pickles with its model, which it calls for train(False)."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, mode: bool = True) -> nn.Module:
        packed = [name for name, module in self.model.named_modules() if isinstance(module, PackedLayer)]
        if mode and packed:
            raise PackedForInference(
                f"this model cannot train: {len(packed)} of its layers are packed for inference, the first is "
                f"{packed[0]}; "
                "qpass.dequantize(model) gives ordinary float layers back. Nothing was changed")
        return type(self.model).train(self.model, mode)


def refuse_training(model: nn.Module) -> None:
    """Let `model.train()` refuse as a whole; `model.eval()` works as before."""
    model.__dict__["train"] = RefuseTraining(model)


def allow_training(model: nn.Module) -> None:
    """Undo refuse_training."""
    model.__dict__.pop("train", None)
