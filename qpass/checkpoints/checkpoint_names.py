"""Checkpoint names: a model and the names in a checkpoint in; under which of them each parameter's numbers stand, out.

Most stand under the parameter's own name. Transformers keeps experts as one parameter where checkpoints have a matrix
an expert and projection, and renames what older checkpoints called otherwise; its own table says how, and is asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from qpass.hf.model_config import is_transformers


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """The weights that one parameter is made of: parts[p][e] is the name of part p of expert e.

    Parts stand below each other, along the outputs. `stacked` says that experts are stacked in front; else each part
    has one name. `refusal` is the sentence for a rearrangement that is more than this.
    """

    parts: tuple[tuple[str, ...], ...]
    stacked: bool = False
    refusal: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part)


def find_assemblies(model: nn.Module, stored: Iterable[str]) -> dict[str, Assembly]:
    """Parameter name -> where its numbers stand, for each parameter that does not stand under its own name.

    A weight stands in a checkpoint under its own name, or, quantized, as several tensors of the layer `<path>`, which
    count as `<path>.weight` here.
    """
    if not is_transformers(model):
        return {}
    transforms = _transforms(model)
    own = set(model.state_dict(keep_vars=True))
    names = {name for full in stored for name in (full, full.rpartition(".")[0] + ".weight") if name not in own}
    sources: dict[str, dict[str, list[str]]] = {}
    operations: dict[str, list[Any]] = {}
    for name in sorted(names, key=_numeric):
        target, pattern, converter = _renamed(name, transforms, own, getattr(model, "base_model_prefix", ""))
        if target == name or target not in own:
            continue
        sources.setdefault(target, {}).setdefault(pattern or "", []).append(name)
        if converter is not None:
            operations[target] = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
            sources[target] = {p: sources[target][p] for p in converter.source_patterns if p in sources[target]}
    return {target: _assembly(target, parts, operations.get(target, [])) for target, parts in sources.items()}


def _assembly(target: str, parts: Mapping[str, list[str]], operations: list[tuple[str, int | None]]) -> Assembly:
    names = tuple(tuple(found) for found in parts.values())
    if operations == [] and len(names) == 1 and len(names[0]) == 1:
        return Assembly(parts=names)
    if operations in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        if len({len(part) for part in names}) == 1:
            return Assembly(parts=names, stacked=True)
        return Assembly(parts=names, refusal=f"{target} is made of parts of {[len(part) for part in names]} experts")
    if operations == [("Concatenate", 0)] and all(len(part) == 1 for part in names):
        return Assembly(parts=names)
    said = ", ".join(name for name, _ in operations) or "several tensors of one name"
    return Assembly(parts=names, refusal=f"{target} is made of {names[0][0]} and others by {said}, which this "
                                           "version cannot do")


def _transforms(model: nn.Module) -> tuple[list[Any], list[Any]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    every = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    return ([t for t in every if not isinstance(t, WeightConverter)],
            [t for t in every if isinstance(t, WeightConverter)])


def _renamed(name: str, transforms: tuple[list[Any], list[Any]], own: set[str], prefix: str
             ) -> tuple[str, str | None, Any]:
    """What Transformers calls the tensor `name`, and the pattern and the converter by which it does."""
    for renaming in transforms[0]:
        name, _ = renaming.rename_source_key(name)
    pattern, used = None, None
    for converter in transforms[1]:
        renamed, pattern = converter.rename_source_key(name)
        if pattern is not None:
            name, used = renamed, converter
            break
    if prefix and name not in own:
        other = name.removeprefix(prefix + ".") if name.startswith(prefix + ".") else f"{prefix}.{name}"
        name = other if other in own else name
    return name, pattern, used


def _numeric(name: str) -> list[Any]:
    """Experts in the order of their numbers, 10 after 9."""
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]
