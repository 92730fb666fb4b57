"""Torchao configs in, schemes and recipes out; read by their class and field names, so torchao is not imported here.

Only what a Scheme can say exactly is taken. Anything else (float8, static activations, HQQ, a 7-bit range) is refused
with the field that stands in the way. Packing formats and Inductor settings choose no numbers and are not looked at.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Mapping
from typing import Any

from qpass.errors import RecipeError
from qpass.recipes.recipe import Recipe
from qpass.scheme import ActivationArgs, Granularity, Scheme, WeightArgs, scheme_for


def is_torchao(value: object) -> bool:
    """True for an object of a torchao class; imports nothing."""
    return type(value).__module__.partition(".")[0] == "torchao"


def scheme_of(config: object) -> Scheme:
    """The scheme that a torchao config describes, a preset where one has its numbers; RecipeError if none can."""
    name = type(config).__name__
    if not is_torchao(config):
        raise RecipeError(f"not a scheme: {config!r}; give a preset name, a qpass.Scheme or a torchao config")
    read = _READERS.get(name)
    if read is None:
        raise RecipeError(f"torchao's {name} has no scheme here; those that have: {', '.join(sorted(_READERS))}")
    return read(config)


def recipe_of(config: object) -> Recipe:
    """A recipe from any torchao config; FqnToConfig gives one override a name, `_default` its scheme."""
    by_name = getattr(config, "fqn_to_config", None) or getattr(config, "module_fqn_to_config", None)
    if by_name is None:
        return Recipe(scheme_of(config))
    schemes = {key: None if value is None else scheme_of(value) for key, value in by_name.items()}
    default = schemes.pop("_default", None)
    return Recipe(default, overrides={_target(key): scheme for key, scheme in schemes.items()})


def recipe_of_data(data: Mapping[str, Any]) -> Recipe:
    """A recipe from `config_to_dict`'s form, as in Transformers' torchao `quantization_config`; imports torchao."""
    with _quiet():
        try:
            from torchao.core.config import config_from_dict
        except ImportError as error:
            raise RecipeError("this quantization_config is torchao's, and torchao is not installed: "
                              "pip install torchao") from error
    try:
        return recipe_of(config_from_dict(dict(data)))
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"torchao cannot read its config {dict(data)!r}: {error}") from error


def _target(key: str) -> str:
    # torchao's regexes match the whole name, ours from its start.
    return f"re:(?:{key[3:]})$" if key.startswith("re:") else key


def _int4_weight_only(config: Any) -> Scheme:
    _only(config, "int4_choose_qparams_algorithm", "TINYGEMM")
    return scheme_for(_weight(4, config.group_size, symmetric=False), None)


def _int8_weight_only(config: Any) -> Scheme:
    size = config.group_size if config.group_size is not None else config.granularity
    return scheme_for(_weight(8, size), None)


def _int8_dynamic(config: Any) -> Scheme:
    _only(config, "weight_only_decode", False)
    _only(config, "reduce_range", False)
    both = config.granularity if isinstance(config.granularity, (tuple, list)) else (config.granularity,) * 2
    if type(both[0]).__name__ not in ("PerRow", "PerToken"):
        raise RecipeError(f"Int8DynamicActivationInt8WeightConfig has activation granularity {both[0]}; activations "
                          "are rounded per token here, torchao's PerRow()")
    return scheme_for(_weight(8, both[1]), _activation(config))


def _intx_weight_only(config: Any) -> Scheme:
    return _intx(config, config.granularity, config.mapping_type, config.scale_dtype, None)


def _intx_dynamic(config: Any) -> Scheme:
    return _intx(config, config.weight_granularity, config.weight_mapping_type, config.weight_scale_dtype,
                 _activation(config))


def _int4_dynamic(config: Any) -> Scheme:
    return scheme_for(_weight(4, config.group_size, symmetric=False), _activation(config))


def _intx(config: Any, granularity: object, mapping: Any, scale_dtype: object, act: ActivationArgs | None) -> Scheme:
    _only(config, "intx_choose_qparams_algorithm", "AFFINE")
    if scale_dtype is not None:
        raise RecipeError(f"{type(config).__name__} asks for scales in {scale_dtype}; scales here have the weight's "
                          "dtype, leave it None")
    bits = int(str(config.weight_dtype).removeprefix("torch.int"))
    return scheme_for(_weight(bits, granularity, symmetric=_symmetric(mapping)), act)


def _weight(bits: int, granularity: object, *, symmetric: bool = True) -> WeightArgs:
    size = granularity if isinstance(granularity, int) else getattr(granularity, "group_size", None)
    if size is not None:
        return WeightArgs(bits=bits, granularity="per_group", group_size=size, symmetric=symmetric)
    kinds: dict[str, Granularity] = {"PerRow": "per_channel", "PerAxis": "per_channel", "PerTensor": "per_tensor"}
    kind = kinds.get(type(granularity).__name__)
    if kind is None or getattr(granularity, "axis", 0) != 0 or getattr(granularity, "dim", -1) not in (-1, 1):
        raise RecipeError(f"torchao granularity {granularity} is not one of PerRow(), PerAxis(0), PerTensor() and "
                          "PerGroup(n), which weights can have here")
    return WeightArgs(bits=bits, granularity=kind, symmetric=symmetric)


def _activation(config: Any) -> ActivationArgs:
    return ActivationArgs(symmetric=_symmetric(config.act_mapping_type))


def _symmetric(mapping: Any) -> bool:
    if mapping.name not in ("SYMMETRIC", "ASYMMETRIC"):
        raise RecipeError(f"torchao mapping {mapping.name} has no scheme here; SYMMETRIC and ASYMMETRIC have")
    return bool(mapping.name == "SYMMETRIC")


def _only(config: Any, field: str, wanted: object) -> None:
    value = getattr(config, field, wanted)
    if getattr(value, "name", value) != wanted and value != wanted:
        raise RecipeError(f"{type(config).__name__} has {field}={value}; only {wanted} can be expressed as a scheme")


@contextlib.contextmanager
def _quiet() -> Any:
    """Importing torchao logs and prints about extensions that this machine does not need."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


_READERS: dict[str, Callable[[Any], Scheme]] = {
    "Int4WeightOnlyConfig": _int4_weight_only,
    "Int8WeightOnlyConfig": _int8_weight_only,
    "Int8DynamicActivationInt8WeightConfig": _int8_dynamic,
    "IntxWeightOnlyConfig": _intx_weight_only,
    "Int8DynamicActivationIntxWeightConfig": _intx_dynamic,
    "Int8DynamicActivationInt4WeightConfig": _int4_dynamic,
}
