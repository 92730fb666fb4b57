"""PackedQuantizer: what Transformers asks of every quantizer, answered for models that hold packed layers."""

from __future__ import annotations

from transformers.quantizers.base import HfQuantizer


class PackedQuantizer(HfQuantizer):
    """Needs no calibration; its models can be saved and compiled, and adapters on them trained."""

    requires_calibration = False

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # asked by Trainer, of models with adapters; of others it says that they need them

    @property
    def is_compileable(self) -> bool:
        return True
