"""Refuse training: a model with packed layers in, the same model whose train() says that those do not learn.

Gradients do pass through packed layers, so what is float beside them can be trained, adapters for one. Who
freezes most of them has said what is to learn; to anybody else train() says first that most of the model would not.
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
        if mode and packed and not _chosen(self.model):
            raise PackedForInference(
                f"this model cannot train: {len(packed)} of its layers are packed for inference and do not learn, the "
                f"first is {packed[0]}; qpass.dequantize(model) gives ordinary float layers back. To train what is "
                "float beside them, adapters or norms, say which parameters those are, and then call train(): "
                "model.requires_grad_(False), and requires_grad_() of each; peft does so by itself. Nothing was "
                "changed")
        return type(self.model).train(self.model, mode)


def _chosen(model: nn.Module) -> bool:
    """Whether somebody said what is to learn: most numbers are frozen. Not just some, such as a model's sinusoids."""
    numbers = {True: 0, False: 0}
    for parameter in model.parameters():
        numbers[parameter.requires_grad] += parameter.numel()
    return numbers[False] > numbers[True]


def refuse_training(model: nn.Module) -> None:
    """Let `model.train()` refuse until most parameters are frozen; `model.eval()` works as before."""
    model.__dict__["train"] = RefuseTraining(model)


def allow_training(model: nn.Module) -> None:
    """Undo refuse_training."""
    model.__dict__.pop("train", None)
