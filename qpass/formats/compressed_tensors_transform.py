"""compressed-tensors transforms: the `transform_config` of a config in, the layers that mix their inputs out.

Source: compressed-tensors 0.20, `transform/transform_config.py`, `transform_scheme.py` and `transform_args.py`. Of all
transforms those on weights have been folded in by whoever wrote the file; of those at run time Sylvester's Hadamard
matrix on a layer's input, in blocks of `head_dim` channels, is what a layer here does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qpass.errors import CheckpointError
from qpass.formats.patterns import matches

DECOMPRESS = ("decompress it with the compressed-tensors package (from_pretrained, then save_pretrained), and "
              "quantize the float model")
_FOLDED = ("weight_input", "weight_output")


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Layers, by name, `re:` or class, and not in `ignore`, whose input is mixed in blocks of `size`; None: as a
    whole."""

    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    size: int | None

    def holds(self, name: str, classes: Sequence[str]) -> bool:
        """Whether it is of this layer."""
        return _any(self.targets, name, classes) and not _any(self.ignore, name, classes)


def _any(targets: Sequence[str], name: str, classes: Sequence[str]) -> bool:
    return any(matches(target[3:], name) if target.startswith("re:") else target == name or target in classes
               for target in targets)


def read_transforms(config: Any, where: str) -> tuple[Mixing, ...]:
    """The inverse of write_transforms, for configs of any tool.

    Raises CheckpointError, saying which it is, for any other transform that is to be applied when the model runs.
    """
    if not config:
        return ()
    groups = config.get("config_groups") if isinstance(config, Mapping) else None
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) and isinstance(group.get("apply"), list)
                                                  and all(isinstance(part, Mapping) for part in group["apply"])
                                                  for group in groups.values()):
        raise CheckpointError(f"{where}: transform_config is {config!r}, and must have config_groups, each with a list "
                              f"of what it is applied to; {DECOMPRESS}")
    found = []
    for name, group in groups.items():
        for part in group["apply"]:
            if part.get("location") in _FOLDED:
                continue
            if part.get("location") != "input" or group.get("type") != "hadamard" or group.get("randomize"):
                order = ", permuted at random," if group.get("randomize") else ""
                raise CheckpointError(
                    f"{where}: transform_config has {name!r}, a transform of type {group.get('type')!r} on "
                    f"{part.get('location')!r}{order} when the model runs, and of these this version reads Hadamard "
                    f"matrices on a layer's input; {DECOMPRESS}")
            size = group.get("head_dim")
            if size is not None and (type(size) is not int or size < 1 or size & (size - 1)):
                raise CheckpointError(f"{where}: transform_config has {name!r} in blocks of {size!r}, which is no "
                                      "power of two")
            found.append(Mixing(targets=_listed(part.get("targets")), ignore=_listed(part.get("ignore")), size=size))
    return tuple(found)


def _listed(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())
