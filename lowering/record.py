"""Record: what lowering did to each site, kept for `explain`, and kept on disk for compiles that a cache answered.

A site is named as the compiler names its module. A regional compile (`layer.compile()`) sees `self_attn.q_proj`
where the model says `model.layers.3.self_attn.q_proj`; so names match from the end, and one record may speak for
many layers. Nothing here may break a compile: the disk is written and read as far as it lets us.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from torch import fx

from qpass.experts_spec import ExpertsSpec
from qpass.kernels.registry import KERNELS, Call, ExpertsCall, LinearCall, kernel
from qpass.lowering import debug, record_store
from qpass.lowering.graph_nodes import (
    LEFT,
    OP,
    OPS,
    QUANTIZES,
    Product,
    Quantization,
    our_nodes,
    same_rows,
    sites_of,
)
from qpass.spec import LinearSpec

AT = "{at}"  # in texts: what the asked name has before the recorded one, such as `model.layers.3.`
_PENDING = "alone: nothing is known of how it was scheduled"


@dataclass(frozen=True, kw_only=True)
class SiteRecord:
    """One site of a compiled graph.

    activation  `fused into ...`, `shared with ...` or `alone: why`
    merged_with the sites that the same call multiplies
    refusals    better kernel -> why it does not run this site
    passes      pass -> nodes it changed in the site's graph
    """

    site: str
    spec: str
    kernel: str
    op: str
    activation: str
    refusals: dict[str, str] = field(default_factory=dict)
    merged_with: tuple[str, ...] = ()
    passes: dict[str, int] = field(default_factory=dict)
    left: str = ""


_Records = dict[str, dict[str, SiteRecord]]  # site -> spec -> record, the newest last; models share names, not specs
_records: _Records = {}
_seen: dict[str, float] = {}  # module names of graphs that a compile cache was asked for
_stored: _Records = {}  # what the disk holds, read when first asked for
_waiting: dict[Quantization, list[tuple[str, str]]] = {}  # site and spec


def for_site(path: str, spec: str | None = None) -> SiteRecord | None:
    """What the last compile of a graph with this module did to it; None if there was none.

    `path` is the module's name in the model, or a parameter's. If `spec` is given, a record of another spec does not
    count. A record that was read back, because the compiler answered from its cache, ends with that remark.
    """
    found = _longest(path, _records, spec)
    remark = ""
    if found is None and _longest_name(path, _seen) is not None:
        if not _stored:
            for one in sorted(record_store.read(SiteRecord), key=lambda one: one.activation != _PENDING):
                _put(_stored, one)
        found, remark = _longest(path, _stored, spec), " (from the compile cache)"
    if found is None:
        return None
    at = path[:len(path) - len(found.site)] if path.endswith(found.site) else ""
    return replace(found, activation=found.activation.replace(AT, at) + remark,
                   merged_with=tuple(at + site for site in found.merged_with))


def remember_graph(graph: fx.Graph, passes: dict[str, int]) -> None:
    """Note every site of a graph that the pipeline has just been over."""
    marks: set[Quantization] = set()
    made: list[SiteRecord] = []
    for node, product in our_nodes(graph):
        sites, op = sites_of(node), node.meta.get(OP, OPS.get(node.target, ""))
        for site, text in zip(sites, product.specs, strict=True):
            made.append(SiteRecord(
                site=site, spec=text, kernel=product.spec.kernel, op=op, left=node.meta.get(LEFT, ""), passes=passes,
                activation=_activation(node, product, site, text, marks), refusals=_refusals(node, product, text),
                merged_with=tuple(other for other in sites if other != site)))
    for one in made:
        debug.say(1, f"{one.site}: {one.spec.partition(' @')[0]}, {one.kernel}"
                     + (f", in one call with {', '.join(one.merged_with)}" if one.merged_with else ""))
        for name, why in one.refusals.items():
            debug.say(2, f"  {name}: {why}")
        _put(_records, one)
    record_store.write(made)


def settle(outcomes: dict[Quantization, str]) -> None:
    """Say of exposed quantizations where the scheduler put them."""
    changed = []
    for mark, text in outcomes.items():
        for site, spec in _waiting.pop(mark, []):
            if (one := _records.get(site, {}).get(spec)) is not None:
                changed.append(replace(one, activation=text))
                _put(_records, changed[-1])
                debug.say(2, f"{site}: activation {text.replace(AT, '')}")
    if changed:
        record_store.write(changed)


def note_lookup(names: set[str]) -> None:
    """Note the modules of a graph for which a compile cache is being asked, which may be all that is heard of it."""
    now = time.time()
    _seen.update(dict.fromkeys(names, now))
    _stored.clear()


def forget() -> None:
    """Drop what this process knows of earlier compiles."""
    _records.clear()
    _seen.clear()
    _stored.clear()
    _waiting.clear()


def _activation(node: fx.Node, product: Product, site: str, text: str, marks: set[Quantization]) -> str:
    if product.activation is None:
        return "alone: the scheme leaves the activation in float"
    if product.x_scale is None:
        form = "linear_q" if product.routing is None else "experts_q"
        if form not in kernel(product.spec.kernel).forms:
            return f"alone: {product.spec.kernel} takes only float activations and quantizes them itself"
        return "alone: expose_activation_quant did not run, so the kernel quantizes"
    mark = same_rows(product.x).meta.get(QUANTIZES)
    if not isinstance(mark, Quantization):
        return "alone: a pass wrote its quantization in a form that is not recognised"
    if mark in marks or mark.site != site:
        return f"shared with {AT}{mark.site}"
    marks.add(mark)
    _waiting.setdefault(mark, []).append((site, text))
    return _PENDING


def _refusals(node: fx.Node, product: Product, text: str) -> dict[str, str]:
    value = node.meta["val"]
    value = value[0] if isinstance(value, (list, tuple)) else value
    call: Call
    if product.routing is None:
        call = LinearCall(spec=LinearSpec.parse(text), device=value.device, dtype=value.dtype)
    else:
        call = ExpertsCall(spec=ExpertsSpec.parse(text), device=value.device, dtype=value.dtype,
                           bias=product.bias[0] is not None)
    chosen = kernel(call.spec.kernel)
    better = [k for k in KERNELS.values() if k.priority > chosen.priority and k.op == call.op
              and k.scheme in ("*", call.spec.family) and k.device in ("*", call.device_type)]
    return {k.name: why for k in better if (why := k.why_not(call)) is not None}


def _put(records: _Records, one: SiteRecord) -> None:
    of_site = records.setdefault(one.site, {})
    of_site.pop(one.spec, None)
    of_site[one.spec] = one


def _longest(path: str, records: _Records, spec: str | None) -> SiteRecord | None:
    fitting = {name: ones[spec or next(reversed(ones))] for name, ones in records.items() if spec in (None, *ones)}
    name = _longest_name(path, fitting)
    return None if name is None else fitting[name]


def _longest_name(path: str, names: dict[str, SiteRecord] | dict[str, float]) -> str | None:
    """The name that is `path`, ends it, or is ended by it; the longest if several do."""
    if path in names:
        return path
    ends = [name for name in names if name and (path.endswith("." + name) or name.endswith("." + path))]
    return max(ends, key=len, default=None)
