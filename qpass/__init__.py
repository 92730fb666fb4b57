"""qpass: graph-rewriting quantization passes for torch.compile.

    model = qpass.quantize(model, "w4a8")   # same object, same class
    print(qpass.explain(model))             # one row a layer
    model = torch.compile(model)            # activation quantization fuses into the layer before it

Names load when first used: importing qpass is quick, compiles nothing and touches no device.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qpass.hf.after_import import after_import

if TYPE_CHECKING:
    from qpass.adopt_model import adopt as adopt
    from qpass.budget.search_recipe import search as search
    from qpass.compare_models import compare as compare
    from qpass.evaluate_model import evaluate as evaluate
    from qpass.hf.cache import QuantizedCache as QuantizedCache
    from qpass.hf.qpass_config import QPassConfig as QPassConfig
    from qpass.inspect_checkpoint import inspect as inspect
    from qpass.kernels.registry import force_kernel as force_kernel
    from qpass.kernels.registry import register_kernel as register_kernel
    from qpass.kernels.support import support_matrix as support_matrix
    from qpass.load_model import load as load
    from qpass.lowering.pipeline import register_pass as register_pass
    from qpass.plan_model import make_plan
    from qpass.quantize_model import dequantize as dequantize
    from qpass.quantize_model import quantize as quantize
    from qpass.recipes.recipe import Recipe as Recipe
    from qpass.recipes.recipe import Rule as Rule
    from qpass.report import explain as explain
    from qpass.save_model import save as save
    from qpass.scheme import PRESETS as PRESETS
    from qpass.scheme import ActivationArgs as ActivationArgs
    from qpass.scheme import Scheme as Scheme
    from qpass.scheme import WeightArgs as WeightArgs
    from qpass.scheme import register_scheme as register_scheme
    from qpass.update_model import update as update

    plan = make_plan

# No module may have the name of a function here: importing it would hide the function.
_WHERE = {
    "quantize": "quantize_model", "dequantize": "quantize_model", "plan": "plan_model", "explain": "report",
    "save": "save_model", "load": "load_model", "inspect": "inspect_checkpoint", "adopt": "adopt_model",
    "QPassConfig": "hf.registration", "update": "update_model", "QuantizedCache": "hf.cache",
    "compare": "compare_models", "evaluate": "evaluate_model", "search": "budget.search_recipe",
    "support_matrix": "kernels.support", "force_kernel": "kernels.registry", "register_kernel": "kernels.registry",
    "Scheme": "scheme", "WeightArgs": "scheme", "ActivationArgs": "scheme", "PRESETS": "recipes.recipe",
    "register_scheme": "scheme", "Rule": "recipes.recipe", "Recipe": "recipes.recipe",
    "register_pass": "lowering.pipeline",
}
_ALIASES = {"plan": "make_plan"}
__all__ = sorted([*_WHERE, "__version__"])
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'qpass' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"qpass.{_WHERE[name]}"), _ALIASES.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


def _register(module: str) -> None:
    """Make our configs known to Transformers' loader, or our layers to peft. One of a version without what the module
    needs goes on as it was; `qpass.QPassConfig` raises what is missing when it is asked for."""
    try:
        import_module(module)
    except (ImportError, AttributeError):
        pass


# Whichever of the two is imported first, Transformers' loader knows our configs as soon as it is there, and peft our
# layers. The modules register as they are imported; if that is what imports Transformers, it is on its way already.
after_import("transformers.quantizers.auto", partial(_register, "qpass.hf.registration"))
after_import("peft.tuners.lora.model", partial(_register, "qpass.hf.packed_lora"))
