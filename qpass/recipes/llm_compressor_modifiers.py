"""LLM Compressor's modifiers: a modifier's name and fields in, the Algorithm that it stands for out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qpass.errors import RecipeError
from qpass.recipes.algorithm import AutoRound, Awq, Gptq, Rotation, SmoothQuant
from qpass.recipes.algorithm_table import Algorithm
from qpass.recipes.rotation import ROTATIONS

# Fields that say how the work is done or which layers are meant, and change no number of the algorithm itself.
_ELSEWHERE = frozenset({
    "targets", "scheme", "ignore", "config_groups", "kv_cache_scheme", "sequential_targets", "sequential_update",
    "offload_hessians", "offload_device", "num_calibration_steps", "calibration_function", "index", "group", "start",
    "end", "update", "initialized_", "finalized_", "started_", "ended_", "bypass_divisibility_checks",
    "requires_calibration_data"})
_NOTHING: tuple[Any, ...] = (None, {}, [], "")


def algorithm_of(modifier: str, fields: Mapping[str, Any]) -> Algorithm:
    """The algorithm of one modifier; RecipeError names a modifier or a field that cannot be expressed."""
    read = _MODIFIERS.get(modifier)
    if read is None:
        raise RecipeError(f"{modifier} asks for an algorithm that is not available; there are "
                          f"{', '.join(_MODIFIERS)} and QuantizationModifier")
    rest = {key: value for key, value in fields.items() if key not in _ELSEWHERE}
    found = read(rest)
    if left := [key for key, value in rest.items() if value not in _NOTHING]:
        why = (": which layers go together is read from the model's graph" if left[0] == "mappings" else
               ", which cannot be expressed in a recipe here")
        raise RecipeError(f"{modifier} has {left[0]}={rest[left[0]]!r}{why}; remove it")
    return found


def _gptq(fields: dict[str, Any]) -> Algorithm:
    # "static" is the modifier's own default; "weight" is another name of it.
    order = fields.pop("actorder", "static")
    order = getattr(order, "value", order)
    if order not in ("static", "weight", None):
        raise RecipeError(f"GPTQModifier has actorder={order!r}, which reorders groups on disk and is not available; "
                          "use static")
    return Gptq(block_size=fields.pop("block_size", 128), dampening_frac=fields.pop("dampening_frac", 0.01),
                actorder=None if order is None else "static")


def _smoothquant(fields: dict[str, Any]) -> Algorithm:
    return SmoothQuant(alpha=fields.pop("smoothing_strength", 0.5))


def _autoround(fields: dict[str, Any]) -> Algorithm:
    fields.pop("enable_torch_compile", None)  # how it runs, not what it finds
    return AutoRound(iterations=fields.pop("iters", 200), batch_size=fields.pop("batch_size", 8),
                     step_size=fields.pop("lr", None))


def _awq(fields: dict[str, Any]) -> Algorithm:
    return Awq(grid=fields.pop("n_grid", 20), duo_scaling=fields.pop("duo_scaling", True) is not False)


def _spinquant(fields: dict[str, Any]) -> Algorithm:
    rotations = tuple(str(getattr(name, "value", name)).upper() for name in fields.pop("rotations", ("R1", "R2")))
    if unknown := [name for name in rotations if name not in ROTATIONS]:
        raise RecipeError(f"SpinQuantModifier has rotations={list(rotations)}; {', '.join(ROTATIONS)} are available, "
                          f"{', '.join(unknown)} is not: queries and keys are not rotated here")
    kind = fields.pop("transform_type", "hadamard")
    if kind not in ("hadamard", "random-hadamard"):
        raise RecipeError(f"SpinQuantModifier has transform_type={kind!r}; hadamard and random-hadamard are available")
    if fields.pop("learnable", False):
        raise RecipeError("SpinQuantModifier has learnable=True; rotations are drawn here, not learned")
    fields.pop("precision", None)  # of how it is computed, float32 here
    size = fields.pop("transform_block_size", None)
    if size is not None and set(rotations) != {"R4"}:
        raise RecipeError(f"SpinQuantModifier has transform_block_size={size} for {', '.join(rotations)}; blocks are "
                          "available for R4 alone, R1 mixes all channels and R2 a whole head")
    return Rotation(rotations=rotations, block=size)


_MODIFIERS: dict[str, Callable[[dict[str, Any]], Algorithm]] = {
    "GPTQModifier": _gptq, "SmoothQuantModifier": _smoothquant, "AutoRoundModifier": _autoround,
    "AWQModifier": _awq, "SpinQuantModifier": _spinquant}
