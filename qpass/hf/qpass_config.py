"""QPassConfig: a recipe in the form that Transformers' `from_pretrained(quantization_config=...)` takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from qpass.errors import RecipeError
from qpass.recipes.recipe import RECIPE_KEYS, Recipe
from qpass.recipes.recipe_files import as_recipe

METHOD = "qpass"


class QPassConfig(QuantizationConfigMixin):
    """Quantize while loading: `AutoModelForCausalLM.from_pretrained(path, quantization_config=QPassConfig("w4a8"))`.

    recipe    anything that `qpass.quantize` takes: a preset name, Scheme, Recipe, dict, or path to a YAML or JSON file;
              None, without settings, loads a quantized checkpoint as it is, as qpass.load does
    settings  of `qpass.Recipe`: ignore, overrides, on_indivisible, on_unsupported_activation, strict; only beside a
              preset name or a Scheme
    exact     as of qpass.quantize: emulate the rounding of activations that this machine cannot compute with

    Raises RecipeError for what is no recipe, and for algorithms that need data: weights that are only passing by cannot
    be calibrated.
    """

    def __init__(self, recipe: Any = None, *, exact: bool = False, **settings: Any) -> None:
        settings.pop("quant_method", None)
        if "scheme" in settings and recipe is None:
            recipe = settings.pop("scheme")
        self.quant_method = METHOD  # type: ignore[assignment]  # theirs is an enumeration of the methods they have
        self.recipe: Recipe | None = None
        self.exact = exact
        if recipe is not None or settings:
            self.recipe = _with_settings(recipe, settings)
            self.recipe = self.recipe.exactly() if exact else self.recipe
            check_online(self.recipe)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `from_dict` takes it."""
        exact = {"exact": True} if self.exact else {}
        return {"quant_method": METHOD, **({} if self.recipe is None else self.recipe.to_dict()), **exact}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The inverse of to_dict."""
        made = cls(**config_dict)
        return (made, kwargs) if return_unused_kwargs else made

    def __repr__(self) -> str:
        if self.recipe is None:
            return f"QPassConfig({'exact=True' if self.exact else ''})"
        default = Recipe(None).to_dict()
        said = {key: value for key, value in self.recipe.to_dict().items()
                if key != "scheme" and value != default[key]}
        scheme = self.recipe.scheme
        first = repr(scheme.name if scheme is not None else None)
        return f"QPassConfig({', '.join([first, *(f'{key}={value!r}' for key, value in said.items())])})"


def check_online(recipe: Recipe) -> None:
    """Raise RecipeError if the recipe cannot be followed while a checkpoint is read: its algorithms need data."""
    asked = ", ".join(algorithm.name for algorithm in recipe.algorithms)
    if asked:
        needs = "needs data" if any(algorithm.needs_data for algorithm in recipe.algorithms) else "needs a whole model"
        raise RecipeError(f"the recipe's {asked} {needs}, and weights are only passing by while a checkpoint is read; "
                          "load the float model and call qpass.quantize(model, recipe, calibration=...), or leave "
                          "`algorithms` out to round to nearest")


def _with_settings(recipe: Any, settings: Mapping[str, Any]) -> Recipe:
    if unknown := [key for key in settings if key not in RECIPE_KEYS]:
        raise RecipeError(f"QPassConfig knows no setting {unknown[0]!r}; it takes a recipe and "
                          f"{', '.join(key for key in RECIPE_KEYS if key != 'scheme')}")
    if not settings:
        return as_recipe(recipe)
    made = as_recipe(recipe)
    if made != Recipe(made.scheme):
        raise RecipeError(f"{', '.join(settings)} stands beside a whole recipe, which has its own; put it in there")
    return Recipe.from_dict({"scheme": made.scheme, **settings})
