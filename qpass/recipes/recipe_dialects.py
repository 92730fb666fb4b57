"""Dialects: recipes as other tools write them, as plain data in, a Recipe out.

LLM Compressor   stages of modifiers, or one modifier's fields: targets, scheme, ignore, config_groups
vLLM             its online dict: linear, moe, ignore, targets
Transformers     a `quantization_config`: compressed-tensors' config_groups and ignore, or torchao's

What a Scheme cannot say is refused with the field that asks for it; nothing is dropped that would change a number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qpass.errors import RecipeError
from qpass.recipes.algorithm_table import Algorithm
from qpass.recipes.llm_compressor_modifiers import algorithm_of
from qpass.recipes.recipe import Recipe, Rule
from qpass.scheme import ALIASES, PRESETS, ActivationArgs, Granularity, Scheme, WeightArgs, preset, scheme_for

_HAVE = "integers of 2 to 8 bits per tensor, channel or group, with float or int8 activations (qpass.PRESETS)"
_NO_NUMBERS = frozenset({"bypass_divisibility_checks", "requires_calibration_data", "index", "group", "start", "end",
                         "update", "initialized_", "finalized_", "started_", "ended_"})
_SCHEME_FIELDS = frozenset({"targets", "scheme", "ignore", "config_groups"})
_PLAIN_OBSERVERS = (None, "minmax", "memoryless_minmax", "static_minmax")
_CHECKPOINT_FORMATS = ("gptq", "awq", "gguf", "bitsandbytes", "hqq", "auto-round", "modelopt", "quark", "fp8", "mxfp4")
_VLLM_WEIGHTS = {
    "int8_per_channel_static": WeightArgs(bits=8), "int8_per_channel_weight_only": WeightArgs(bits=8),
    "fp8_per_tensor_static": WeightArgs(bits=8, type="fp8", granularity="per_tensor"),
    "fp8_per_channel_static": WeightArgs(bits=8, type="fp8"),
    "fp8_per_block_static": WeightArgs(bits=8, type="fp8", granularity="per_block", group_size=128)}
_VLLM_ACTIVATIONS: dict[str | None, ActivationArgs | None] = {
    None: None, "int8_per_token": ActivationArgs(), "int8_per_token_dynamic": ActivationArgs(),
    "fp8_per_token": ActivationArgs(type="float"),
    "fp8_per_tensor_dynamic": ActivationArgs(type="float", granularity="per_tensor"),
    "fp8_per_tensor_static": ActivationArgs(type="float", granularity="per_tensor", dynamic=False),
    "fp8_per_block_dynamic": ActivationArgs(type="float", granularity="per_group", group_size=128)}


def from_llm_compressor(data: Mapping[str, Any]) -> Recipe:
    """A recipe of stages and modifiers, or the fields of one modifier; RecipeError names what cannot be expressed."""
    modifiers = list(_modifiers(data)) if _SCHEME_FIELDS.isdisjoint(data) else [("QuantizationModifier", data)]
    rules: list[Rule] = []
    ignore: list[str] = []
    algorithms: list[Algorithm] = []
    for name, fields in modifiers:
        fields = fields or {}
        if not isinstance(fields, Mapping):
            raise RecipeError(f"{name} must be a mapping of its fields, got {fields!r}")
        rules += _modifier_rules(name, fields)
        ignore += [entry for entry in _listed(fields.get("ignore")) if entry not in ignore]
        if name != "QuantizationModifier":
            algorithms.append(algorithm_of(name, fields))
    if not rules:
        raise RecipeError("this recipe quantizes nothing: no modifier has a scheme or config_groups")
    return Recipe(None, ignore=ignore, overrides=rules, algorithms=algorithms)


def from_compressed_tensors(data: Mapping[str, Any]) -> Recipe:
    """A compressed-tensors `quantization_config`: its config_groups and ignore."""
    if data.get("kv_cache_scheme"):
        raise RecipeError("quantization_config has a kv_cache_scheme; quantized caches are not available, remove it")
    if data.get("transform_config"):
        raise RecipeError("quantization_config has a transform_config; transforms are not available, remove it")
    rules = _group_rules(data.get("config_groups"))
    return Recipe(None, ignore=_listed(data.get("ignore")), overrides=rules)


def from_transformers(data: Mapping[str, Any]) -> Recipe:
    """A `quantization_config` by its quant_method."""
    method = data.get("quant_method")
    method = getattr(method, "value", method)
    if method == "compressed-tensors":
        return from_compressed_tensors(data)
    if method == "torchao":
        from qpass.recipes.torchao_config import recipe_of, recipe_of_data

        kind = data.get("quant_type")
        kind = kind.get("default") if isinstance(kind, Mapping) and "default" in kind else kind
        recipe = recipe_of_data(kind) if isinstance(kind, Mapping) else recipe_of(kind)
        skipped = data.get("modules_to_not_convert")
        return recipe if skipped is None else Recipe(recipe.scheme, ignore=_listed(skipped), overrides=recipe.overrides)
    if method in _CHECKPOINT_FORMATS:
        raise RecipeError(f"quant_method {method!r} describes a checkpoint that is quantized already, not a recipe; "
                          "qpass.load(folder) reads checkpoints, and a preset name such as 'w4a16' is a recipe")
    raise RecipeError(f"quant_method {method!r} is not one that can be read as a recipe: compressed-tensors, torchao")


def from_vllm(data: Mapping[str, Any]) -> Recipe:
    """vLLM's online dict. `linear` and `moe` become rules by kind, `targets` overrides."""
    allowed = ("linear", "moe", "ignore", "targets")
    if unknown := [key for key in data if key not in allowed]:
        raise RecipeError(f"unknown key {unknown[0]!r} in a vLLM online recipe; allowed: {', '.join(allowed)}")
    targets = data.get("targets") or {}
    if not isinstance(targets, Mapping):
        raise RecipeError(f"targets of a vLLM online recipe maps patterns to schemes, got {targets!r}")
    rules = [Rule(target=kind, scheme=_vllm_scheme(data[key], key))
             for key, kind in (("linear", "linear"), ("moe", "experts")) if data.get(key) is not None]
    rules += [Rule(target=target, scheme=None if value is None else _vllm_scheme(value, target))
              for target, value in targets.items()]
    return Recipe(None, ignore=None if data.get("ignore") is None else _listed(data["ignore"]), overrides=rules)


def group_scheme(group: Mapping[str, Any], where: str = "group_0") -> Scheme:
    """The scheme of one compressed-tensors group: `weights` and `input_activations`, as in config.json."""
    weights, activations = group.get("weights"), group.get("input_activations")
    if not weights:
        raise RecipeError(f"{where} has no weights to quantize; activation-only groups are not available")
    if group.get("output_activations"):
        raise RecipeError(f"{where} quantizes output activations, which is not available; set it to null")
    return scheme_for(_weight_args(weights, where), None if not activations else _activation_args(activations, where))


def _modifiers(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if key.endswith("Modifier"):
            yield key, value
        elif key.endswith(("stage", "stages", "modifiers")) and isinstance(value, Mapping):
            yield from _modifiers(value)
        elif key not in ("run_type", "version", "metadata", "args"):
            raise RecipeError(f"unknown key {key!r} in an LLM Compressor recipe; expected NAME_stage, NAME_modifiers, "
                              "or a modifier such as QuantizationModifier")


def _modifier_rules(name: str, fields: Mapping[str, Any]) -> list[Rule]:
    if fields.get("kv_cache_scheme"):
        raise RecipeError(f"{name} has a kv_cache_scheme; quantized caches are not available, remove it")
    if name == "QuantizationModifier":
        for key, value in fields.items():
            if key in _SCHEME_FIELDS or key in _NO_NUMBERS or value in (None, {}, []):
                continue
            if key in ("observer", "weight_observer") and value in _PLAIN_OBSERVERS:
                continue
            raise RecipeError(f"{name} has {key}={value!r}, which cannot be expressed in a recipe here; remove it")
    if fields.get("config_groups"):
        if fields.get("scheme"):
            raise RecipeError(f"{name} has both scheme and config_groups; keep one")
        return _group_rules(fields["config_groups"])
    scheme = fields.get("scheme")
    if scheme is None:
        return []
    if isinstance(scheme, Mapping):
        return [Rule(target=t, scheme=_named(key)) for key, targets in scheme.items() for t in _listed(targets)]
    return [Rule(target=t, scheme=_named(scheme)) for t in _listed(fields.get("targets", ["Linear"]))]


def _group_rules(groups: object) -> list[Rule]:
    if not isinstance(groups, Mapping) or not groups:
        raise RecipeError(f"config_groups must map group names to targets and weights, got {groups!r}")
    rules = []
    for key, group in groups.items():
        if isinstance(group, Mapping):
            targets = _listed(group.get("targets"))
            if not targets:
                raise RecipeError(f"config group {key!r} has no targets")
            scheme = group_scheme(group, f"config group {key!r}")
        else:  # the short form {PRESET: [targets]}
            targets, scheme = _listed(group), _named(key)
        rules += [Rule(target=target, scheme=scheme) for target in targets]
    return rules


def _named(name: object) -> Scheme:
    if not isinstance(name, str):
        raise RecipeError(f"a scheme is named by a string, got {name!r}")
    try:
        return preset(name)
    except RecipeError as error:
        raise RecipeError(f"scheme {name!r} cannot be expressed here: {error}") from None


def _vllm_scheme(value: object, where: str) -> Scheme:
    weight, activation = (value.get("weight"), value.get("activation")) if isinstance(value, Mapping) else (value, None)
    if isinstance(weight, str) and weight in _VLLM_WEIGHTS and activation in _VLLM_ACTIVATIONS:
        return scheme_for(_VLLM_WEIGHTS[weight], _VLLM_ACTIVATIONS[activation])
    if isinstance(weight, str) and activation is None and weight.lower() in {**PRESETS, **ALIASES}:
        return preset(weight)
    activations = ", ".join(name for name in _VLLM_ACTIVATIONS if name)
    raise RecipeError(f"{where} asks for {value!r}, which cannot be expressed here; there are "
                      f"{', '.join(_VLLM_WEIGHTS)} with activation null, {activations}, and qpass.PRESETS by name")


def _weight_args(data: Mapping[str, Any], where: str) -> WeightArgs:
    bits, size = data.get("num_bits", 8), data.get("group_size")
    strategy = data.get("strategy")
    strategy = getattr(strategy, "value", strategy)
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    kinds: dict[str, Granularity] = {"tensor": "per_tensor", "channel": "per_channel", "group": "per_group"}
    # "weight" and "static" are one: the order in which GPTQ takes columns, which changes nothing on disk.
    _refuse(where, "weights", data, {"type": ("int",), "strategy": (*kinds, None), "dynamic": (False,),
                                     "actorder": (None, "weight", "static"), "observer": _PLAIN_OBSERVERS,
                                     "scale_dtype": (None,)})
    granularity = kinds[strategy]
    if granularity == "per_group" and size == -1:
        granularity = "per_channel"
    return WeightArgs(bits=bits, granularity=granularity, symmetric=bool(data.get("symmetric", True)),
                      group_size=size if granularity == "per_group" else None)


def _activation_args(data: Mapping[str, Any], where: str) -> ActivationArgs:
    kinds: dict[object, Granularity] = {"token": "per_token", "tensor": "per_tensor", "group": "per_group",
                                        "tensor_group": "per_group"}
    size, strategy = data.get("group_size"), data.get("strategy")
    strategy = getattr(strategy, "value", strategy) or ("group" if size else "tensor")
    _refuse(where, "input_activations", {**data, "strategy": strategy},
            {"num_bits": (8, 4), "type": ("int", "float"), "strategy": tuple(kinds), "dynamic": (True, False, "local"),
             "actorder": (None,)})
    granularity = kinds[strategy]
    try:
        return ActivationArgs(bits=data.get("num_bits", 8), type=data.get("type", "int"), granularity=granularity,
                              symmetric=bool(data.get("symmetric", True)), dynamic=data.get("dynamic", False),
                              group_size=size if granularity == "per_group" else None)
    except RecipeError as error:
        raise RecipeError(f"{where} has input_activations that cannot be expressed here: {error}") from None


_DEFAULTS = {"num_bits": 8, "type": "int", "dynamic": False}


def _refuse(where: str, part: str, data: Mapping[str, Any], allowed: Mapping[str, tuple[object, ...]]) -> None:
    for key, values in allowed.items():
        value = data.get(key, _DEFAULTS.get(key))
        value = getattr(value, "value", value)
        if value not in values:
            raise RecipeError(f"{where} has {part} with {key}={value!r}, which cannot be expressed here; "
                              f"allowed: {', '.join(map(repr, values))}. There are {_HAVE}")


def _listed(value: object) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    raise RecipeError(f"expected a name or a list of names, got {value!r}")
