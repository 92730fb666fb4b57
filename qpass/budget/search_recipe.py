"""Search: a float model, a budget, data and schemes in; a recipe that gives each layer its own scheme out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qpass.budget.allocation import Budget, Choice, allocate, read_budget
from qpass.budget.costs import costs
from qpass.budget.times import layer_times, step_time
from qpass.calibrate.samples import read_samples
from qpass.capture.capture_model import capture
from qpass.decide.decision import Decision
from qpass.errors import RecipeError
from qpass.plan_model import plan_captured
from qpass.quantize_model import check_model
from qpass.recipes.recipe import Recipe, Rule, as_scheme
from qpass.reports.text_table import Column, text_table
from qpass.scheme import Scheme

SCHEMES = ("w3a16", "w4a16", "w5a16", "w6a16", "w8a16")
_POINTS = 6  # of the frontier, beside the budget itself
_FRONTIER: tuple[Column, ...] = (("bits", ">"), ("bytes", ">"), ("tokens/s", ">"), ("KL estimate", ">"),
                                 ("layers", "<"), ("", "<"))


def search(model: nn.Module, budget: str | int | float, *, data: Any, schemes: Sequence[str | Scheme] = SCHEMES,
           tokenizer: Any = None, num_samples: int = 64, max_seq_length: int = 128, example_inputs: Any = None,
           ignore: Sequence[str] | None = None, algorithms: Sequence[Any] = (), seed: int = 0,
           progress: bool = True) -> Recipe:
    """The recipe with the smallest estimated loss of quality within `budget`; the model stays as it is.

    model        a float nn.Module; gradients must be able to pass through it
    budget       "4.5 bits" (a weight on average, scales included), bytes of all quantized weights (120_000_000,
                 "120 MB"), or "30 tokens per second" (decoding one sequence on this machine)
    data         as `calibration` of `quantize`: `num_samples` samples of `max_seq_length` tokens are used; many short
                 ones tell more than few long ones
    schemes      what may be chosen: preset names or Schemes; float is always allowed
    ignore       targets that stay float and do not count; by default `lm_head`
    algorithms   of the recipe that comes out; costs are of weights on the scales that `scales` or `gptq` finds, and of
                 what `gptq` leaves of the error, as the inputs' X^T X foretells it
    seed         of the tokens drawn

    Each site's cost is the second-order estimate of the KL divergence (nats a token) that its rounding adds; sites that
    read one input, and weights of one set of experts, get one scheme. The allocation is solved exactly, costs being
    taken to add up. With `progress`, the frontier is printed: the best allocation at budgets around the one asked for.
    Raises RecipeError for a budget that no allocation meets, and without scipy.
    """
    wanted = read_budget(budget)
    check_model(model)
    allowed = _named(schemes)
    samples = read_samples(data, model, tokenizer=tokenizer, num_samples=num_samples, max_seq_length=max_seq_length)
    captured = capture(model, example_inputs)
    by_scheme = {name: {d.site.name: d for d in plan_captured(model, captured, Recipe(scheme, ignore=ignore)).decisions
                        if d.status == "quantize" and d.site.kind != "embedding"}
                 for name, scheme in allowed.items()}
    groups = groups_of([d for of in by_scheme.values() for d in of.values()])
    with _bar(progress) as bar:
        found = costs(model, {name: list(of.values()) for name, of in by_scheme.items()}, groups, samples, seed,
                      lambda text: bar.set_postfix_str(text), Recipe(None, algorithms=algorithms).algorithms)
    weights = sum(_any(by_scheme, name).site.numel for group in groups for name in group)
    seconds = layer_times(by_scheme) if wanted.kind == "rate" else {}
    rest = step_time(model, samples[0], sum(seconds[name, None] for group in groups for name in group)) if (
        wanted.kind == "rate") else 0.0
    options = [_options(index, group, by_scheme, found.nats, seconds) for index, group in enumerate(groups)]
    frontier = _Frontier(options=options, kind=wanted.kind, weights=weights, rest=rest)
    limit = frontier.limit(wanted)
    chosen = allocate(options, limit)
    if progress:
        print(frontier.table(limit, chosen) + (f"\n{found.note}" if found.note else ""))
    return _recipe(groups, chosen, allowed, by_scheme, ignore, algorithms)


def groups_of(decisions: Sequence[Decision]) -> list[list[str]]:
    """Names of sites that must share a scheme: they read one tensor, or are weights of one set of experts."""
    groups: dict[object, list[str]] = {}
    for decision in decisions:
        site = decision.site
        key: object = site.experts if site.experts is not None else (
            site.name if site.shared_input is None else site.shared_input)
        names = groups.setdefault(key, [])
        if site.name not in names:
            names.append(site.name)
    return list(groups.values())


@dataclass(frozen=True, kw_only=True)
class _Frontier:
    """The choices of every group, and what their sizes mean: bytes, or seconds a token if `kind` is "rate"."""

    options: Sequence[Sequence[Choice]]
    kind: str
    weights: int
    rest: float

    def limit(self, budget: Budget) -> float:
        """The budget as a limit on the sum of sizes."""
        if budget.kind == "bits":
            return budget.value * self.weights / 8
        if budget.kind == "bytes":
            return budget.value
        if 1 / budget.value <= self.rest:
            raise RecipeError(f"{budget.value:g} tokens per second cannot be met: what is no product of these layers "
                              f"takes {self.rest * 1e3:.3g} ms a token by itself")
        return 1 / budget.value - self.rest

    def table(self, limit: float, chosen: Sequence[Choice]) -> str:
        """Allocations at sizes from the smallest to the largest that is not all float, and the chosen one."""
        quantized = [[choice for choice in group if choice.scheme is not None] or group for group in self.options]
        low = sum(min(choice.size for choice in group) for group in quantized)
        high = max(limit, sum(max(choice.size for choice in group) for group in quantized))
        points = [(low + (high - low) * step / (_POINTS - 1), False) for step in range(_POINTS)]
        points = [(size, mine) for size, mine in points if abs(size - limit) > 1e-6 * limit]
        rows = []
        for size, mine in sorted([*points, (limit, True)]):
            picked = chosen if mine else allocate(self.options, size * (1 + 1e-9))
            counts = Counter(choice.scheme or "float" for choice in picked)
            total = sum(choice.size for choice in picked)
            rate = self.kind == "rate"
            rows.append(["" if rate else f"{8 * total / self.weights:.3f}", "" if rate else f"{total:.0f}",
                         f"{1 / (total + self.rest):.1f}" if rate else "", f"{sum(c.cost for c in picked):.4g}",
                         ", ".join(f"{count} {name}" for name, count in counts.most_common()),
                         "<- chosen" if mine else ""])
        return text_table(_FRONTIER, rows, 160)


def _named(schemes: Sequence[str | Scheme]) -> dict[str, Scheme]:
    if isinstance(schemes, str) or not schemes:
        raise RecipeError(f"schemes must be a list of preset names or Schemes, got {schemes!r}")
    found: dict[str, Scheme] = {}
    for one in schemes:
        scheme = as_scheme(one)
        if scheme is None:
            raise RecipeError("schemes holds None; float is always allowed")
        name = scheme.name
        while name in found:  # one preset with another group size
            name += "'"
        found[name] = scheme
    return found


def _options(index: int, group: Sequence[str], by_scheme: Mapping[str, Mapping[str, Decision]],
             found: Mapping[tuple[int, str], float], seconds: Mapping[tuple[str, str | None], float]) -> list[Choice]:
    options = [Choice(scheme=scheme, cost=found.get((index, scheme), 0.0),
                      size=sum(seconds[name, scheme] if seconds else of[name].bytes_after for name in group))
               for scheme, of in by_scheme.items() if all(name in of for name in group)]
    plain = sum(seconds[name, None] if seconds else _any(by_scheme, name).bytes_before for name in group)
    return [*options, Choice(scheme=None, cost=0.0, size=plain)]


def _any(by_scheme: Mapping[str, Mapping[str, Decision]], name: str) -> Decision:
    return next(of[name] for of in by_scheme.values() if name in of)


def _recipe(groups: Sequence[Sequence[str]], chosen: Sequence[Choice], allowed: Mapping[str, Scheme],
            by_scheme: Mapping[str, Mapping[str, Decision]], ignore: Sequence[str] | None,
            algorithms: Sequence[Any]) -> Recipe:
    usual = Counter(choice.scheme for choice in chosen if choice.scheme is not None).most_common(1)
    default = usual[0][0] if usual else None
    rules = []
    for group, choice in zip(groups, chosen, strict=True):
        if choice.scheme != default:
            for name in group:
                site = _any(by_scheme, name).site
                target = site.owner if site.swap == "module" and site.owner else name
                rules.append(Rule(target=target, scheme=None if choice.scheme is None else allowed[choice.scheme]))
    return Recipe(None if default is None else allowed[default], ignore=ignore, overrides=rules,
                  algorithms=algorithms)


def _bar(progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(desc="searching", bar_format="{desc} {elapsed}{postfix}", disable=not progress)
