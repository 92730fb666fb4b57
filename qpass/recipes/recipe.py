"""Recipe: which sites get which scheme; ordered rules, an ignore list, overrides, and policies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import qpass.codecs  # noqa: F401  (so that every preset and weight type is known)
from qpass.errors import RecipeError
from qpass.recipes.algorithm import as_algorithm
from qpass.recipes.algorithm_table import Algorithm
from qpass.scheme import PRESETS, ActivationArgs, Scheme, WeightArgs, check_defined, preset

OnIndivisible = Literal["adjust", "skip", "error"]
OnUnsupportedActivation = Literal["keep", "emulate", "error"]
DEFAULT_IGNORE = ("lm_head",)
RECIPE_KEYS = ("scheme", "ignore", "overrides", "algorithms", "on_indivisible", "on_unsupported_activation", "strict")


def check_target(target: object) -> None:
    """Raise RecipeError unless `target` can stand in a rule or in ignore."""
    if not isinstance(target, str) or not target.strip():
        raise RecipeError(f"a rule needs a target: a name, a glob, re:REGEX, a class name or a kind; got {target!r}")
    if target.startswith("re:"):
        try:
            re.compile(target[3:])
        except re.error as error:
            raise RecipeError(f"target {target!r} is not a regular expression: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One target and what it decides. `scheme=None` keeps the layer in float.

    target: exact module or parameter name, glob (`*.mlp.*`), `re:` regex, class name (`Linear`), or kind (`linear`).
    Raises RecipeError for an empty target and for a regex that does not compile.
    """

    target: str
    scheme: Scheme | None

    def __post_init__(self) -> None:
        check_target(self.target)
        if self.scheme is not None and not isinstance(self.scheme, Scheme):
            raise RecipeError(f"rule {self.target!r} needs a Scheme or None, got {self.scheme!r}; "
                              "presets by name go into Recipe(overrides={target: name})")

    def __str__(self) -> str:
        return f"{self.target} = {self.scheme.name if self.scheme else 'float'}"


@dataclass(frozen=True, init=False)
class Recipe:
    """What to do with a model. Equal recipes have equal dicts: `Recipe.from_dict(r.to_dict()) == r`.

    scheme          for every site that nothing else decides: a preset name or a Scheme; None keeps them in float
    ignore          targets that stay float; None means the default, `lm_head` where the model has one
    overrides       target -> preset name, Scheme or None
    algorithms      what calibration does, in order: each a name (`gptq`), {name: settings} or an Algorithm
    on_indivisible  a group size that does not divide: "adjust" to the largest power of two >= 32 that does,
                    "skip" the layer (it stays float, and the report says so), or "error"
    on_unsupported_activation
                    no kernel here rounds activations so: "keep" them in float, weights quantized all the same, and
                    say so in the report; "emulate" the rounding of floats, to multiply in float32 (slower than both:
                    for the numbers of a machine that can); or "error"
    strict          refuse any layer that stays float without being ignored

    Raises RecipeError for anything that cannot mean something, naming what is allowed.
    """

    scheme: Scheme | None
    ignore: tuple[str, ...] | None
    overrides: tuple[Rule, ...]
    algorithms: tuple[Algorithm, ...]
    on_indivisible: OnIndivisible
    on_unsupported_activation: OnUnsupportedActivation
    strict: bool

    def __init__(self, scheme: str | Scheme | None, *, ignore: Sequence[str] | None = None,
                 overrides: Mapping[str, str | Scheme | None] | Sequence[Rule] | None = None,
                 algorithms: Sequence[str | Mapping[str, Any] | Algorithm] = (),
                 on_indivisible: OnIndivisible = "adjust",
                 on_unsupported_activation: OnUnsupportedActivation = "keep", strict: bool = False) -> None:
        if on_indivisible not in ("adjust", "skip", "error"):
            raise RecipeError(f"on_indivisible must be 'adjust', 'skip' or 'error', got {on_indivisible!r}")
        if on_unsupported_activation not in ("keep", "emulate", "error"):
            raise RecipeError("on_unsupported_activation must be 'keep', 'emulate' or 'error', got "
                              f"{on_unsupported_activation!r}")
        if not isinstance(strict, bool):
            raise RecipeError(f"strict must be True or False, got {strict!r}")
        put = object.__setattr__
        put(self, "scheme", as_scheme(scheme))
        put(self, "ignore", None if ignore is None else _strings(ignore, "ignore"))
        put(self, "overrides", _rules(overrides))
        put(self, "algorithms", _algorithms(algorithms))
        put(self, "on_indivisible", on_indivisible)
        put(self, "on_unsupported_activation", on_unsupported_activation)
        put(self, "strict", strict)
        for target in self.ignore or ():
            check_target(target)

    def exactly(self) -> Recipe:
        """The same, with the rounding of activations emulated where this machine cannot compute it."""
        return Recipe.from_dict({**self.to_dict(), "algorithms": self.algorithms,
                                 "on_unsupported_activation": "emulate"})

    def to_dict(self) -> dict[str, Any]:
        """Plain data: JSON and YAML can hold it."""
        return {
            "scheme": scheme_to_data(self.scheme),
            "ignore": None if self.ignore is None else list(self.ignore),
            "overrides": {rule.target: scheme_to_data(rule.scheme) for rule in self.overrides},
            "algorithms": [algorithm.to_data() for algorithm in self.algorithms],
            "on_indivisible": self.on_indivisible,
            "on_unsupported_activation": self.on_unsupported_activation,
            "strict": self.strict,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of to_dict; raises RecipeError on an unknown key, naming those allowed."""
        if unknown := [key for key in data if key not in RECIPE_KEYS]:
            raise RecipeError(f"unknown recipe key {unknown[0]!r}; allowed: {', '.join(RECIPE_KEYS)}")
        rest = {key: value for key, value in data.items() if key != "scheme"}
        if rest.get("algorithms", ()) is None:
            del rest["algorithms"]
        return cls(data.get("scheme"), **rest)


def as_scheme(value: str | Scheme | Mapping[str, Any] | None) -> Scheme | None:
    """A scheme from a preset name, a Scheme, its data, or a torchao config; None stays None."""
    if value is None:
        return None
    if isinstance(value, str):
        return preset(value)
    if isinstance(value, Mapping):
        return _scheme_from_data(value)
    if not isinstance(value, Scheme):
        from qpass.recipes.torchao_config import scheme_of

        return scheme_of(value)
    check_defined(value)
    return value


def scheme_to_data(scheme: Scheme | None) -> str | dict[str, Any] | None:
    """A preset's name where the scheme is that preset, otherwise its fields."""
    if scheme is None or PRESETS.get(scheme.name) == scheme:
        return None if scheme is None else scheme.name
    return asdict(scheme)


def _scheme_from_data(data: Mapping[str, Any]) -> Scheme:
    _check_keys(data, ("name", "weight", "activation"), "a scheme")
    if missing := [key for key in ("name", "weight") if not data.get(key)]:
        raise RecipeError(f"not a scheme: {dict(data)!r} has no {missing[0]!r}; give a preset name, or name, weight "
                          "and activation")
    weight, activation = data["weight"], data.get("activation")
    _check_keys(weight, tuple(f.name for f in fields(WeightArgs)), f"the weight of scheme {data['name']!r}")
    if "bits" not in weight:
        raise RecipeError(f"the weight of scheme {data['name']!r} has no 'bits'")
    if activation is not None:
        _check_keys(activation, tuple(f.name for f in fields(ActivationArgs)),
                    f"the activation of scheme {data['name']!r}")
    scheme = Scheme(name=data["name"], weight=WeightArgs(**weight),
                    activation=None if activation is None else ActivationArgs(**activation))
    check_defined(scheme)
    return scheme


def _check_keys(data: object, allowed: tuple[str, ...], what: str) -> None:
    if not isinstance(data, Mapping):
        raise RecipeError(f"{what} must be a mapping with {', '.join(allowed)}; got {data!r}")
    if unknown := [key for key in data if key not in allowed]:
        raise RecipeError(f"unknown key {unknown[0]!r} in {what}; allowed: {', '.join(allowed)}")


def _strings(values: object, what: str) -> tuple[str, ...]:
    if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
        raise RecipeError(f"{what} must be a list of names, got {values!r}")
    found = tuple(values)
    if wrong := [value for value in found if not isinstance(value, str)]:
        raise RecipeError(f"{what} must hold names, got {wrong[0]!r}")
    return found


def _algorithms(values: object) -> tuple[Algorithm, ...]:
    if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
        raise RecipeError(f"algorithms must be a list of names or of {{name: settings}}, got {values!r}")
    found = tuple(as_algorithm(value) for value in values)
    for algorithm in found:
        for target in algorithm.targets:
            check_target(target)
    if len(set(found)) < len(found):
        raise RecipeError(f"an algorithm is listed twice with the same settings: {', '.join(a.name for a in found)}")
    late = [algorithm.name for algorithm in found[1:] if algorithm.whole_model]
    if late:
        raise RecipeError(f"{late[0]} changes the model as a whole, before the others: list it first")
    return found


def _rules(overrides: object) -> tuple[Rule, ...]:
    if overrides is None:
        return ()
    if isinstance(overrides, Mapping):
        for target in overrides:
            check_target(target)
        return tuple(Rule(target=target, scheme=as_scheme(value)) for target, value in overrides.items())
    if isinstance(overrides, str) or not isinstance(overrides, Sequence):
        raise RecipeError(f"overrides must map targets to schemes, or be a list of Rule; got {overrides!r}")
    rules: dict[str, Rule] = {}
    for rule in overrides:
        if not isinstance(rule, Rule):
            raise RecipeError(f"overrides must hold Rule objects, got {rule!r}")
        if rules.setdefault(rule.target, rule) != rule:
            raise RecipeError(f"two overrides have the target {rule.target!r}: {rules[rule.target]} and {rule}; "
                              "keep one")
        if rule.scheme is not None:
            check_defined(rule.scheme)
    return tuple(rules.values())
