"""Algorithm table: the settings that every step of calibration has, and the table of all steps by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from qpass.errors import DuplicateRegistration, RecipeError


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Settings that every algorithm has; each algorithm is a frozen subclass, registered under its `name`.

    targets  which quantized sites it works on, as rules name them (a name, glob, re:REGEX, class or kind);
             empty means all of them
    """

    name: ClassVar[str] = ""
    needs_data: ClassVar[bool] = True
    rounds: ClassVar[bool] = True  # makes the integers; False: prepares the weights, which are then rounded to nearest
    wiring: ClassVar[str] = ""  # the module whose `calibrate(settings, work)` runs it on one block
    whole_model: ClassVar[bool] = False  # changes the model as a whole, before any block; has no wiring
    targets: tuple[str, ...] = ()

    @property
    def propagates(self) -> bool:
        """Whether the inputs of a block should carry the errors of the blocks quantized before it."""
        return bool(getattr(self, "propagate", True))

    @property
    def matches_float(self) -> bool:
        """Whether it wants to know what the float model computes in the block."""
        return False

    @property
    def drawn_tokens(self) -> int:
        """How many tokens it would like to see if there is no calibration data."""
        return 0

    @property
    def needs_targets(self) -> bool:
        """Whether the float block's outputs, if anything wants them, must be there before this one starts."""
        return True

    def __post_init__(self) -> None:
        if isinstance(self.targets, (str, Mapping)):
            raise RecipeError(f"targets of algorithm {self.name} must be a list of targets, got {self.targets!r}")
        object.__setattr__(self, "targets", tuple(self.targets))

    def to_data(self) -> str | dict[str, Any]:
        """The name alone where every setting has its default, otherwise {name: settings that differ}."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        if "targets" in changed:
            changed["targets"] = list(self.targets)
        return {self.name: changed} if changed else self.name

    def check(self, holds: bool, field: str, allowed: str) -> None:
        """Raise RecipeError, naming what is allowed, unless `holds`."""
        if not holds:
            raise RecipeError(f"{field} of algorithm {self.name} must be {allowed}, got {getattr(self, field)!r}")

    def check_type(self, field: str, *kinds: type) -> None:
        """Raise RecipeError unless the field is exactly of one of `kinds`; True is no number here."""
        self.check(type(getattr(self, field)) in kinds, field, " or ".join(kind.__name__ for kind in kinds))


ALGORITHMS: dict[str, type[Algorithm]] = {}
_Kind = TypeVar("_Kind", bound=type[Algorithm])


def register_algorithm(kind: _Kind) -> _Kind:
    """Class decorator: make an Algorithm known by its `name`. Raises DuplicateRegistration if the name is taken."""
    if kind.name in ALGORITHMS:
        raise DuplicateRegistration(f"an algorithm named {kind.name!r} is registered already; choose another name")
    ALGORITHMS[kind.name] = kind
    return kind
