"""Packed LoRA: peft, asked to adapt a packed layer, in; its own LoRA layer, around the packed one, out.

peft has no table for layers of others, only a list in its code and one on each config, for users to fill in. So the
two functions that ask what a layer is are ours where it is packed, and peft's everywhere else.
"""

from __future__ import annotations

from typing import Any

from peft.tuners import tuners_utils
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.model import LoraModel

from qpass.errors import PackedForInference
from qpass.layers.packed_layers import QuantLinear


class PackedLora(Linear):  # type: ignore[misc]
    """y = packed(x) + scaling * B(A(x)); A and B learn, in float, and are saved by peft as for any layer."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: the sum is no longer what the packed integers can hold."""
        raise PackedForInference(
            "an adapter cannot be merged into packed integers without rounding them again: keep it beside them, or "
            "merge it into the float model and quantize that: "
            "qpass.quantize(PeftModel.from_pretrained(float_model, adapter).merge_and_unload(), recipe)")


def register() -> None:
    """Let peft adapt packed layers, also where it is asked for "all-linear"; importing this module does."""
    make, name_all = LoraModel._create_new_module, tuners_utils._maybe_include_all_linear_layers

    def create(lora_config: Any, adapter_name: str, target: Any, **settings: Any) -> Any:
        adapted = target.get_base_layer() if isinstance(target, tuners_utils.BaseTunerLayer) else target
        if isinstance(adapted, QuantLinear) and not lora_config._custom_modules:
            return PackedLora(target, adapter_name, config=lora_config, **settings)
        return make(lora_config, adapter_name, target, **settings)

    def all_linear(config: Any, model: Any) -> Any:
        asked = str(getattr(config, "target_modules", None)).lower() == tuners_utils.INCLUDE_LINEAR_LAYERS_SHORTHAND
        named = name_all(config, model)
        if asked:
            head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
            packed = {name for name, module in model.named_modules()
                      if isinstance(module, QuantLinear) and module is not head}
            named.target_modules = packed | set(named.target_modules)
        return named

    LoraModel._create_new_module = staticmethod(create)
    tuners_utils._maybe_include_all_linear_layers = all_linear


register()
