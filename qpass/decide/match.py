"""Match: sites and a recipe in, for each site the one rule that decides it out.

A target that ends in `[3]` or `[0:4]` means these experts of a weight of experts, counted from 0; it beats any rule for
the whole weight, and among such targets the same tiers hold.

How a target is read, first that fits: `re:` starts a regex, `*`, `?` or `[` makes a glob, otherwise a name. A name is
looked up as the exact path of a module or parameter, then as another name of a tied parameter, then as a class, then
as a kind, and last as the final component of a path (`lm_head` finds `model.lm_head`, `q_proj` every q_proj). Globs
and regexes see both the module's path and the parameter's name; a regex matches from the start, as compressed-tensors
has it. A class stands for those derived from it too, and the nearest of several classes decides: `Linear` finds every
subclass of nn.Linear that no rule names by a class of its own. A module's path stands for the parameters that it owns
itself, not for modules inside it.

Of the rules that match a site the lowest Tier wins; rules of that tier must agree.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from fnmatch import fnmatchcase

from qpass.errors import RuleConflict, UnmatchedRule
from qpass.recipes.recipe import DEFAULT_IGNORE, Recipe
from qpass.scheme import Scheme
from qpass.site import Site

_EXPERTS = re.compile(r"(?P<weight>.+)\[(?P<first>\d+)(?::(?P<last>\d+))?\]")


class Tier(IntEnum):
    """How exactly a target names a site; a lower number beats a higher one."""

    EXACT = 0
    LAST_COMPONENT = 1
    GLOB = 2
    REGEX = 3
    CLASS = 4
    KIND = 5
    RECIPE = 6


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One rule, override or ignore entry alike; `text` is how plans and errors quote it."""

    target: str
    scheme: Scheme | None
    text: str
    ignore: bool = False
    default: bool = False


@dataclass(frozen=True, kw_only=True)
class ExpertRule:
    """What a rule decides for one expert: its scheme, None for float, and the rule's text."""

    scheme: Scheme | None
    rule: str


@dataclass(frozen=True, kw_only=True)
class Match:
    """What decides a site; `ignored` if it is an ignore entry or a rule that says float.

    `experts` holds what rules for single experts decide.
    """

    site: Site
    scheme: Scheme | None
    rule: str
    tier: Tier
    target: str = ""
    experts: Mapping[int, ExpertRule] = field(default_factory=dict)

    @property
    def ignored(self) -> bool:
        return self.scheme is None and self.tier is not Tier.RECIPE


def entries(recipe: Recipe) -> tuple[Entry, ...]:
    """The recipe's rules in the order written: ignore entries first, then overrides."""
    default = recipe.ignore is None
    word = "default ignore" if default else "ignore"
    ignored = DEFAULT_IGNORE if recipe.ignore is None else recipe.ignore
    return (*(Entry(target=t, scheme=None, text=f"{word} {t}", ignore=True, default=default) for t in ignored),
            *(Entry(target=r.target, scheme=r.scheme, text=str(r)) for r in recipe.overrides))


def match(sites: Sequence[Site], recipe: Recipe) -> tuple[Match, ...]:
    """One Match a site, in the order of the sites.

    Raises UnmatchedRule naming every rule that matches nothing, RuleConflict where rules of one tier disagree.
    """
    written = entries(recipe)
    single = [entry for entry in written if _means_experts(entry.target, sites)]
    by_expert = _by_expert(single, sites)
    found = [(entry, *_resolve(entry.target, sites)) for entry in written if entry not in single]
    unmatched = [entry for entry, _, hits in found if not hits and not entry.default]
    if unmatched:
        raise UnmatchedRule("\n".join(_unmatched(entry, sites) for entry in unmatched))
    rest = f"recipe {recipe.scheme.name if recipe.scheme else 'float'}"
    matches = []
    for index, site in enumerate(sites):
        here = [(tier, entry) for entry, tier, hits in found if index in hits]
        named = [(tier, entry) for tier, entry in here if not entry.default]
        # A user's rule that names the head beats the default that nobody wrote; a glob over everything does not.
        if any(tier <= Tier.LAST_COMPONENT for tier, _ in named):
            here = named
        if not here:
            matches.append(Match(site=site, scheme=recipe.scheme, rule=rest, tier=Tier.RECIPE,
                                 experts=by_expert.get(index, {})))
            continue
        best = min(tier for tier, _ in here)
        winners = [entry for tier, entry in here if tier == best]
        if best is Tier.CLASS:
            classes = (site.owner_class, *site.owner_bases)
            nearest = min(classes.index(entry.target) for entry in winners)
            winners = [entry for entry in winners if entry.target == classes[nearest]]
        for other in winners[1:]:
            if other.scheme != winners[0].scheme:
                raise RuleConflict(_conflict(winners[0], other, best, site))
        matches.append(Match(site=site, scheme=winners[0].scheme, rule=winners[0].text, tier=best,
                             target=winners[0].target, experts=by_expert.get(index, {})))
    return tuple(matches)


def matching(targets: Sequence[str], sites: Sequence[Site]) -> frozenset[str]:
    """Names of the sites that one of `targets` matches. Raises UnmatchedRule for a target that matches none."""
    found: set[str] = set()
    for target in targets:
        hits = _resolve(target, sites)[1]
        if not hits:
            raise UnmatchedRule(_unmatched(Entry(target=target, scheme=None, text=f"target {target}"), sites))
        found.update(sites[index].name for index in hits)
    return frozenset(found)


def _means_experts(target: str, sites: Sequence[Site]) -> bool:
    """Whether `target` is `weight[3]` or `weight[0:4]` with a weight of experts; elsewhere brackets make a glob."""
    m = None if target.startswith("re:") else _EXPERTS.fullmatch(target)
    return m is not None and bool(_resolve(m["weight"], [site for site in sites if site.kind == "experts"])[1])


def _by_expert(single: Sequence[Entry], sites: Sequence[Site]) -> dict[int, dict[int, ExpertRule]]:
    """Index of a site -> expert -> what the lowest tier says of it."""
    chosen: dict[tuple[int, int], tuple[Tier, Entry]] = {}
    for entry in single:
        m = _EXPERTS.fullmatch(entry.target)
        assert m is not None
        tier, hits = _resolve(m["weight"], sites)
        first, last = int(m["first"]), int(m["last"] or int(m["first"]) + 1)
        for index in (i for i in hits if sites[i].kind == "experts"):
            count = sites[index].shape[0]
            if not first < last <= count:
                raise UnmatchedRule(f"rule {entry.target!r} names experts {first} to {last - 1}, and "
                                    f"{sites[index].name} has {count}, counted from 0; correct the rule, or remove it")
            for expert in range(first, last):
                before = chosen.get((index, expert))
                if before is None or tier < before[0]:
                    chosen[index, expert] = (tier, entry)
                elif tier == before[0] and before[1].scheme != entry.scheme:
                    raise RuleConflict(_conflict(before[1], entry, tier, sites[index]))
    found: dict[int, dict[int, ExpertRule]] = {}
    for (index, expert), (_, entry) in sorted(chosen.items(), key=lambda item: item[0]):
        found.setdefault(index, {})[expert] = ExpertRule(scheme=entry.scheme, rule=entry.text)
    return found


def _resolve(target: str, sites: Sequence[Site]) -> tuple[Tier, frozenset[int]]:
    """The tier at which `target` speaks for this model, and the indices of the sites that it matches there."""
    def hits(test: Callable[[Site], object]) -> frozenset[int]:
        return frozenset(i for i, site in enumerate(sites) if test(site))

    if target.startswith("re:"):
        pattern = re.compile(target[3:])
        return Tier.REGEX, hits(lambda s: pattern.match(s.owner) or pattern.match(s.name))
    if any(sign in target for sign in "*?["):
        return Tier.GLOB, hits(lambda s: fnmatchcase(s.owner, target) or fnmatchcase(s.name, target))
    readings: tuple[tuple[Tier, Callable[[Site], object]], ...] = (
        (Tier.EXACT, lambda s: target in (s.owner, s.name)),
        (Tier.EXACT, lambda s: any(target in (alias, _parent(alias)) for alias in s.aliases)),
        (Tier.CLASS, lambda s: target in (s.owner_class, *s.owner_bases)),
        (Tier.KIND, lambda s: target == s.kind),
        (Tier.LAST_COMPONENT, lambda s: target in (_last(s.owner), _last(s.name))),
        (Tier.LAST_COMPONENT, lambda s: any(target == _last(_parent(alias)) for alias in s.aliases)),
    )
    for tier, test in readings:
        if found := hits(test):
            return tier, found
    return Tier.EXACT, frozenset()


def _unmatched(entry: Entry, sites: Sequence[Site]) -> str:
    what = "ignore entry" if entry.ignore else "rule"
    inside = sum(s.owner.startswith(entry.target + ".") for s in sites)
    text = f"{what} {entry.target!r} matches no layer of this model"
    if inside:
        return (f"{text}: it is a module that holds {inside} of them, and a module's name stands only for its own "
                f"parameters; write {entry.target + '.*'!r} for all that is inside")
    known: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for s in sites
                              for name in (s.owner, _last(s.owner), s.name, s.owner_class, s.kind) if name):
        known.setdefault(name.lower(), []).append(name)
    bare = re.sub(r"[^\w.]+", "", entry.target.removeprefix("re:").lower()).strip(".")
    near = (difflib.get_close_matches(bare, known, n=3, cutoff=0.5)
            or difflib.get_close_matches(_last(bare), known, n=3, cutoff=0.5)
            or [name for name in known if "." not in name and _last(bare) in name][:3])
    names = ", ".join([name for n in near for name in known[n]] or sorted({s.owner_class for s in sites}))
    return f"{text}; closest: {names}. Correct the {what}, or remove it; qpass.plan(model, 'w8a8') lists all names"


def _conflict(one: Entry, other: Entry, tier: Tier, site: Site) -> str:
    way = tier.name.lower().replace("_", " ")
    return (f"{site.name} is matched by {one.text!r} and by {other.text!r}, both by {way}, and they want different "
            f"things; keep one of them, or add a more exact rule such as {site.owner or site.name!r}")


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _last(name: str) -> str:
    return name.rpartition(".")[2]
