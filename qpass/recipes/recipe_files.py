"""Recipe files: anything a user may call a recipe in (a name, a path, a dict in one of four dialects), a Recipe out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from qpass.errors import RecipeError
from qpass.recipes.recipe import RECIPE_KEYS, Recipe
from qpass.recipes.recipe_dialects import from_compressed_tensors, from_llm_compressor, from_transformers, from_vllm
from qpass.recipes.torchao_config import is_torchao, recipe_of
from qpass.scheme import Scheme

_SUFFIXES = (".yaml", ".yml", ".json")


def as_recipe(value: Any) -> Recipe:
    """A Recipe from a preset name, a path ending in .yaml, .yml or .json, a dict, a Scheme, or a torchao config.

    Dicts may be a Recipe's own (`Recipe.to_dict`), LLM Compressor's, vLLM's online form, or Transformers'
    `quantization_config`. Raises RecipeError, naming the file if there is one.
    """
    if isinstance(value, Recipe):
        return value
    if isinstance(value, (str, Path)):
        if isinstance(value, Path) or value.lower().endswith(_SUFFIXES):
            return read_recipe(Path(value))
        if "/" in value or os.sep in value:
            raise RecipeError(f"{value} is no recipe file: a path must end in {', '.join(_SUFFIXES)}; anything else is "
                              "taken for the name of a preset")
        return Recipe(value)
    if value is None or isinstance(value, Scheme):
        return Recipe(value)
    if isinstance(value, Mapping):
        return _from_mapping(value)
    if is_torchao(value):
        return recipe_of(value)
    if hasattr(value, "quant_method") and hasattr(value, "to_dict"):
        return from_transformers(value.to_dict())
    raise RecipeError(f"not a recipe: {value!r}; give a preset name, a Scheme, a Recipe, a dict, a path to YAML or "
                      "JSON, or a torchao config")


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML or JSON file; a config.json is read for its `quantization_config`."""
    if path.suffix.lower() not in _SUFFIXES:
        raise RecipeError(f"{path} is not a recipe file: its name must end in {', '.join(_SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    data = _json(text, path) if path.suffix.lower() == ".json" else _yaml(text, path)
    if isinstance(data, str):
        return Recipe(data)
    if not isinstance(data, Mapping):
        raise RecipeError(f"{path} holds {type(data).__name__}, not a recipe; its top level must be a mapping")
    try:
        return _from_mapping(data)
    except RecipeError as error:
        raise type(error)(f"{path}: {error}") from error


def _from_mapping(data: Mapping[str, Any]) -> Recipe:
    if wrong := [key for key in data if not isinstance(key, str)]:
        raise RecipeError(f"keys of a recipe are strings, got {wrong[0]!r}")
    keys = set(data)
    if "quantization_config" in keys:
        return _from_mapping(data["quantization_config"])
    if "quant_method" in keys:
        return from_transformers(data)
    if "weight" in keys and "name" in keys:
        return Recipe(data)  # type: ignore[arg-type]
    if "linear" in keys or "moe" in keys or isinstance(data.get("targets"), Mapping):
        return from_vllm(data)
    if keys & {"config_groups", "targets"}:
        return from_llm_compressor(data) if "format" not in keys else from_compressed_tensors(data)
    if not keys & set(RECIPE_KEYS) and any(k.endswith(("stage", "stages", "modifiers", "Modifier")) for k in keys):
        return from_llm_compressor(data)
    if not keys:
        raise RecipeError(f"an empty recipe; give at least scheme (keys: {', '.join(RECIPE_KEYS)})")
    return Recipe.from_dict(data)


def _json(text: str, path: Path) -> Any:
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, str(path)))
    except json.JSONDecodeError as error:
        raise RecipeError(f"{path} is not JSON: {error}") from error


def _yaml(text: str, path: Path) -> Any:
    try:
        yaml = import_module("yaml")
    except ImportError as error:
        raise RecipeError(f"reading {path} needs PyYAML: pip install pyyaml, or write the recipe as .json") from error
    try:
        _refuse_repeats(yaml.compose(text, Loader=yaml.SafeLoader), path)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML that can be read: {error}") from error


def _refuse_repeats(node: Any, path: Path) -> None:
    """YAML keeps the last of two equal keys and says nothing; a rule would be lost."""
    for child in getattr(node, "value", None) or ():
        if isinstance(child, tuple):
            _refuse_repeats(child[1], path)
        elif not isinstance(child, str):
            _refuse_repeats(child, path)
    if getattr(node, "id", "") == "mapping":
        _unique([(key.value, None) for key, _ in node.value], f"{path}, line {node.start_mark.line + 1}")


def _unique(pairs: list[tuple[Any, Any]], where: str) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found and key != "<<":
            raise RecipeError(f"{where}: {key!r} is given twice; keep one")
        found[key] = value
    return found
