"""Decide: sites and a recipe in, one Decision a site out: what happens to it, by which rule and kernel, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from qpass.decide.decide_experts import equal_halves, keep_activations, with_experts_kernels
from qpass.decide.decision import Decision
from qpass.decide.match import Match, Tier, match
from qpass.decide.weight_bytes import packed_bytes, stored_bytes
from qpass.errors import LayerRefused, NothingQuantized
from qpass.kernels.keep_activation import computable
from qpass.kernels.registry import LinearCall, choose, kernel
from qpass.recipes.recipe import OnIndivisible, OnUnsupportedActivation, Recipe
from qpass.reports.bands import pattern, without_indices
from qpass.scheme import RowCodec, WeightArgs, codec_of
from qpass.site import Site
from qpass.spec import LinearSpec, effective_text

SMALLEST_GROUP = 32
_SHOWN = 20  # lines of a list of layers in an error; the rest is counted


def decide(sites: Sequence[Site], recipe: Recipe, *, device: torch.device) -> tuple[Decision, ...]:
    """One Decision a site, in the sites' order; reads no weight and changes nothing.

    Kernels are chosen for `device` and each site's dtype. Raises UnmatchedRule, RuleConflict, NothingQuantized,
    LayerRefused (a layer named exactly, an indivisible group under "error", a float layer under strict: all of them
    in one message) and NoKernel (a forced kernel refuses).
    """
    if not sites:
        raise NothingQuantized("the model has no product of an activation with a parameter, so there is nothing to "
                               "quantize; if it should have, pass example_inputs that reach its layers. Parameters of "
                               "integers and of 8-bit floats do not count: they are quantized already")
    matches = match(sites, recipe)
    tied = _tied_heads(sites)
    decisions = tuple(_draft_experts(found, recipe.on_indivisible, tied.get(found.site.name)) for found in matches)
    decisions = equal_halves(keep_activations(decisions) if recipe.on_unsupported_activation != "error" else decisions)
    _raise_refused(matches, decisions, recipe)
    if not any(decision.status == "quantize" for decision in decisions):
        raise NothingQuantized(_nothing(decisions))
    experts = with_experts_kernels(decisions, device)
    decided = [experts.get(d.site.name) or _with_kernel(d, device, recipe.on_unsupported_activation)
               for d in decisions]
    decided = [_in_memory(_unless_no_rows(d, tied.get(d.site.name))) for d in decided]
    heads = {tied[d.site.name]: d for d in decided if d.status == "quantize" and d.site.name in tied}
    return tuple(_reading_rows(d, heads[d.site.name]) if d.site.name in heads else d for d in decided)


def _draft(found: Match, policy: OnIndivisible, tied_to: str | None) -> Decision:
    site, scheme = found.site, found.scheme
    size = 0 if tied_to else site.numel * site.dtype.itemsize
    stored = site.numel * site.dtype.itemsize
    read = stored // max(site.shape[0], 1) if site.kind == "embedding" else stored
    kept = Decision(site=site, status="keep", rule=found.rule, bytes_before=size, bytes_after=size, bytes_a_token=read)
    if site.kind == "embedding":
        aimed = scheme is not None and found.tier in (Tier.EXACT, Tier.LAST_COMPONENT, Tier.CLASS, Tier.KIND)
        reason = "embeddings are looked up, not multiplied; kept in float"
        if found.ignored:
            return replace(kept, reason="")
        return replace(kept, status="refuse" if aimed else "keep", scheme=scheme if aimed else None, reason=reason)
    if scheme is None:
        return replace(kept, reason=f"tied to {tied_to}: one parameter, counted there" if tied_to else "")
    if site.role == "router" and not _names_router(found):
        return replace(kept, reason="a router: its result picks experts, and rounding could pick others; kept in float "
                                    "unless a rule names it")
    why = _cannot(site, tied_to)
    if why is not None:
        return replace(kept, status="refuse", scheme=scheme, reason=why)
    weight, reason = _resolve_group(scheme.weight, (site.out_features, site.in_features), policy)
    if weight is None:
        return replace(kept, status="refuse" if policy == "error" else "keep", scheme=scheme, reason=reason)
    if site.uses == 0:
        reason = "; ".join(filter(None, (reason, "the example inputs never reached it")))
    spec = LinearSpec(family=scheme.family, weight=weight, activation=scheme.activation,
                      out_features=site.out_features, in_features=site.in_features)
    count = site.numel // max(1, site.out_features * site.in_features)
    stored = stored_bytes(spec, count, min(site.dtype.itemsize, 4))
    return replace(kept, status="quantize", scheme=scheme, spec=spec, reason=reason, bytes_after=stored)


def _draft_experts(found: Match, policy: OnIndivisible, tied_to: str | None) -> Decision:
    """As `_draft`, with the rules for single experts on top."""
    whole, site, count = _draft(found, policy, tied_to), found.site, found.site.shape[0]
    if not found.experts or site.swap is None:
        return whole
    drafts = {expert: _draft(replace(found, scheme=rule.scheme, rule=rule.rule, experts={}), policy, None)
              for expert, rule in found.experts.items()}
    specs = tuple((drafts[e] if e in drafts else whole).spec for e in range(count))
    rules = ", ".join(dict.fromkeys(rule.rule for rule in found.experts.values()))
    spec = whole.spec or next((one for one in specs if one is not None), None)
    if spec is None:
        return replace(whole, reason="; ".join(filter(None, (whole.reason, f"experts by {rules}"))))
    one_float = whole.bytes_before // max(count, 1)
    stored = sum(one_float if s is None else stored_bytes(s, 1, min(site.dtype.itemsize, 4)) for s in specs)
    ways = Counter("float" if s is None else effective_text(s) for s in specs)
    told = ", ".join(f"{n} experts {text}" for text, n in ways.most_common())
    scheme = whole.scheme or next(draft.scheme for draft in drafts.values() if draft.scheme is not None)
    return replace(whole, status="quantize", scheme=scheme, spec=spec, experts=specs, bytes_after=stored,
                   rule=f"{whole.rule}; {rules}", reason="; ".join(filter(None, (whole.reason, told))))


def _names_router(found: Match) -> bool:
    """Whether a rule means this layer; the recipe's own scheme, a kind, and the class of every other layer do not."""
    return found.tier <= Tier.REGEX or (found.tier is Tier.CLASS and found.target != "Linear")


def _cannot(site: Site, tied_to: str | None) -> str | None:
    """Why no scheme can be given to this site; None if one can."""
    if tied_to and site.swap != "module":
        return (f"tied to {tied_to}, which could not read its rows from a packed head: {_told(site)}; add it to "
                "ignore, or untie the two parameters")
    if site.swap is None:
        return _told(site) or f"a product inside {site.owner_class} cannot be replaced; add it to ignore"
    if not site.dtype.is_floating_point or site.dtype.itemsize < 2:
        return (f"its weight is {site.dtype}, not a float of 16 bits or more; only those can be quantized. Load a "
                "quantized checkpoint with qpass.load, or add the layer to ignore")
    if site.numel == 0:
        return f"its weight has shape {site.shape} and holds no numbers; add it to ignore"
    return None


def _told(site: Site) -> str:
    """The site's refusal without its own name, which the row says already; so layers of one pattern share it."""
    text = site.refusal or ""
    if text.startswith(f"{site.name} "):
        return "it" + text.removeprefix(site.name)
    return text.removeprefix(f"{site.name}: ")


def _resolve_group(weight: WeightArgs, shape: tuple[int, int], policy: OnIndivisible) -> tuple[WeightArgs | None, str]:
    """The weight's numbers for this shape, and the line that names any change; None if the policy forbids one.

    A codec's groups belong to its format, and are never adjusted.
    """
    size, k = weight.group_size, shape[1]
    codec = codec_of(weight)
    if isinstance(codec, RowCodec):
        try:
            codec.stored(weight, shape)
        except ValueError as error:
            return None, f"{error}: left in float"
        return weight, ""
    if size is None or k % size == 0:
        return weight, ""
    told = f"group {size} does not divide {k}"
    if policy == "skip":
        return None, f"{told}: left in float, as on_indivisible='skip' says"
    if policy == "error":
        return None, told
    power = k & -k  # the largest power of two that divides k
    while power > size:
        power //= 2
    if power >= SMALLEST_GROUP:
        return replace(weight, group_size=power), f"{told}: adjusted to {power}"
    channel = replace(weight, granularity="per_channel", group_size=None, scales="amax")
    return channel, f"{told}, nor does any power of two from {SMALLEST_GROUP} to {size}: adjusted to one group a row"


def _with_kernel(decision: Decision, device: torch.device, policy: OnUnsupportedActivation) -> Decision:
    if decision.spec is None:
        return decision
    call = LinearCall(spec=decision.spec, device=device, dtype=decision.site.dtype)
    if policy != "error":
        spec, kept = computable(call, exact=policy == "emulate")
        call = replace(call, spec=spec)
        decision = replace(decision, reason="; ".join(filter(None, (decision.reason, kept))))
    choice = choose(call, where=decision.site.name)
    return replace(decision, spec=call.spec.on(choice.kernel.name), refusals=dict(choice.refusals))


def _in_memory(decision: Decision) -> Decision:
    """With the bytes that the kernels' layouts take."""
    if decision.status != "quantize":
        return replace(decision, bytes_packed=decision.bytes_after)
    site, count = decision.site, max(decision.site.shape[0], 1)
    one_float, scale = decision.bytes_before // count, min(site.dtype.itemsize, 4)
    if decision.experts:
        packed = sum(one_float if spec is None else packed_bytes(spec, 1, scale) for spec in decision.experts)
    else:
        assert decision.spec is not None
        count = site.numel // max(1, site.out_features * site.in_features)
        packed = packed_bytes(decision.spec, count, scale)
    return replace(decision, bytes_packed=packed, bytes_a_token=packed)


def _unless_no_rows(head: Decision, table: str | None) -> Decision:
    """A packed head, or its refusal if it is tied to a table and the kernel's layout gives no single rows."""
    if table is None or head.spec is None:
        return head
    chosen = kernel(head.spec.kernel)
    if head.spec.weight.type == "int" and chosen.layout.rows is not None:
        return head
    stored = head.site.numel * head.site.dtype.itemsize
    return replace(head, status="refuse", spec=None, bytes_after=0, bytes_a_token=stored,
                   reason=f"tied to {table}, and {chosen.name} packs it in a way that gives no single rows; add it to "
                          "ignore, choose another scheme, or untie the two parameters")


def _reading_rows(table: Decision, head: Decision) -> Decision:
    """What becomes of a table whose tied head is packed."""
    assert head.spec is not None
    rows = max(table.site.shape[0], 1)
    return replace(table, status="quantize", rule=head.rule, scheme=head.scheme, spec=head.spec, bytes_after=0,
                   bytes_packed=0, bytes_a_token=head.bytes_packed // rows,
                   reason=f"tied to {head.site.name}: its rows are read from the packed head")


def _tied_heads(sites: Sequence[Site]) -> dict[str, str]:
    """Site name of a product whose parameter is also an embedding's -> that embedding's name."""
    tables = [site for site in sites if site.kind == "embedding"]
    tied = {}
    for site in sites:
        if site.kind != "embedding":
            names = {site.name, *site.aliases}
            for table in tables:
                if names & {table.name, *table.aliases}:
                    tied[site.name] = table.name
    return tied


def _raise_refused(matches: Sequence[Match], decisions: Sequence[Decision], recipe: Recipe) -> None:
    pairs = list(zip(matches, decisions, strict=True))
    named = [d for m, d in pairs if d.status == "refuse" and m.tier is Tier.EXACT]
    if named:
        raise LayerRefused("a rule names layers that cannot be quantized:\n" + _lines(named)
                           + "\nremove the rule, or set it to None")
    if recipe.on_indivisible == "error":
        odd = [d for m, d in pairs if d.status == "refuse" and m.scheme and _indivisible(d, m.scheme.weight)]
        if odd:
            raise LayerRefused("on_indivisible='error', and the group size does not divide:\n" + _lines(odd)
                               + "\nchoose a scheme with a smaller or no group size for them (w4a8_channel has none), "
                               "on_indivisible='adjust', or add them to ignore")
    if recipe.strict:
        left = [d for m, d in pairs if d.status != "quantize" and not m.ignored and d.site.kind != "embedding"]
        if left:
            raise LayerRefused("strict=True, and these layers would stay float without being ignored:\n"
                               + _lines(left) + "\nadd them to ignore, or drop strict")


def _indivisible(decision: Decision, weight: WeightArgs) -> bool:
    return weight.group_size is not None and decision.site.in_features % weight.group_size != 0 and (
        decision.reason.startswith("group "))


def _lines(decisions: Sequence[Decision]) -> str:
    """One line for layers that differ only in indices: all are named, however many layers a model has."""
    groups: dict[tuple[str, str], list[str]] = {}
    for d in decisions:
        groups.setdefault((without_indices(d.site.name), d.reason or d.rule), []).append(d.site.name)
    lines = [f"  {pattern(names)}: {why}" for (_, why), names in groups.items()]
    return "\n".join(lines[:_SHOWN] + ([f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []))


def _nothing(decisions: Sequence[Decision]) -> str:
    groups = Counter((d.status, d.rule, d.reason) for d in decisions)
    lines = [f"  {count} {'kept' if status == 'keep' else 'refused'} by {rule!r}" + (f": {reason}" if reason else "")
             for (status, rule, reason), count in groups.most_common(_SHOWN)]
    return ("this recipe quantizes no layer of the model:\n" + "\n".join(lines)
            + "\ngive a scheme to at least one of them, for example overrides={'linear': 'w8a8'}")
