"""Pipeline: the passes as a tuple, and one function that runs them over a graph of Inductor's.

    expose_activation_quant -> share_activation_quant -> merge_parallel_linears -> lower_attention
        -> write_out_small_products -> lower_to_kernel -> verify

A pass is a function `Graph -> int`, the number of nodes it changed. A graph without ops of ours is left alone.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import fx

from qpass.errors import DuplicateRegistration, LoweringError, QPassError
from qpass.lowering import debug, record
from qpass.lowering.expose_activation_quant import expose_activation_quant
from qpass.lowering.graph_nodes import LEFT, MEANING, OPS, SITES, module_path, our_nodes, sites_of
from qpass.lowering.lower_attention import lower_attention
from qpass.lowering.lower_to_kernel import lower_to_kernel
from qpass.lowering.merge_parallel_linears import merge_parallel_linears
from qpass.lowering.share_activation_quant import share_activation_quant
from qpass.lowering.verify import verify
from qpass.lowering.write_out_small_products import write_out_small_products

PassFn = Callable[[fx.Graph], int]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A named step of the pipeline."""

    name: str
    fn: PassFn
    enabled: bool = True


PIPELINE: tuple[Pass, ...] = (
    Pass(name="expose_activation_quant", fn=expose_activation_quant),
    Pass(name="share_activation_quant", fn=share_activation_quant),
    Pass(name="merge_parallel_linears", fn=merge_parallel_linears),
    Pass(name="lower_attention", fn=lower_attention),
    Pass(name="write_out_small_products", fn=write_out_small_products),
    Pass(name="lower_to_kernel", fn=lower_to_kernel),
    Pass(name="verify", fn=verify),
)
_passes: list[Pass] = list(PIPELINE)


def passes() -> tuple[Pass, ...]:
    """The pipeline as it stands: the built-in passes, those registered, and which are switched off."""
    return tuple(_passes)


def register_pass(name: str, fn: PassFn | None = None, *, before: str | None = None, after: str | None = None,
                  position: int | None = None) -> Callable[[PassFn], PassFn] | PassFn:
    """Add a pass, `register_pass("my_pass", fn)` or as a decorator `@register_pass("my_pass")`.

    It runs before the pass named `before`, after that named `after`, or at index `position`; without any of them just
    before `lower_to_kernel`, where ops of ours are still `qpass.*`. Raises DuplicateRegistration for a name in use.
    """
    if fn is None:
        return lambda given: register_pass(name, given, before=before, after=after, position=position)  # type: ignore[return-value]
    if any(p.name == name for p in _passes):
        raise DuplicateRegistration(f"a pass named {name!r} is registered already; choose another name, or use "
                                    f"qpass.lowering.pipeline.replace_pass({name!r}, fn)")
    if sum(given is not None for given in (before, after, position)) > 1:
        raise QPassError(f"pass {name!r}: give one of before, after and position")
    if position is None:
        position = _index(after) + 1 if after is not None else _index(before or "lower_to_kernel")
    _passes.insert(position, Pass(name=name, fn=fn))
    return fn


def unregister_pass(name: str) -> None:
    """Take a registered pass out again; built-in passes can only be switched off."""
    if any(p.name == name for p in PIPELINE):
        raise QPassError(f"{name!r} is built in; switch it off with disable_pass({name!r})")
    del _passes[_index(name)]


def disable_pass(name: str) -> contextlib.AbstractContextManager[None]:
    """Switch a pass off: for good, or inside `with disable_pass(name):` only."""
    return _change(name, enabled=False)


def enable_pass(name: str) -> contextlib.AbstractContextManager[None]:
    """Switch a pass on again: for good, or inside `with enable_pass(name):` only."""
    return _change(name, enabled=True)


def replace_pass(name: str, fn: PassFn) -> contextlib.AbstractContextManager[None]:
    """Run `fn` in the place of the pass of this name: for good, or inside `with replace_pass(name, fn):` only."""
    return _change(name, fn=fn)


def lower_graph(graph: fx.Graph) -> dict[str, int]:
    """Run the pipeline on `graph`, in place. Returns pass name -> nodes changed; {} if the graph holds no op of ours.

    Raises LoweringError, naming the pass, if one fails.
    """
    found = list(our_nodes(graph))
    if not found:
        return {}
    for node, _ in found:
        node.meta[SITES] = (module_path(node) or node.name,)
    dumps, changed = debug.Dumps(), {}
    for number, step in enumerate((p for p in _passes if p.enabled), start=1):
        if step.name == "verify":
            _explain_what_stays(graph)
        dumps.write(number, step.name, "before", graph)
        start = time.perf_counter()
        changed[step.name] = _run(step, graph)
        debug.say(2, f"{step.name}: {changed[step.name]} changed in {(time.perf_counter() - start) * 1e3:.1f} ms")
        dumps.write(number, step.name, "after", graph)
    record.remember_graph(graph, changed)
    for node, _ in our_nodes(graph):
        node.meta.pop(MEANING, None)
    return changed


def _run(step: Pass, graph: fx.Graph) -> int:
    try:
        return step.fn(graph)
    except LoweringError as error:
        raise LoweringError(f"pass {step.name}: {error}") from error
    except Exception as error:
        sites = sorted({site for node, _ in our_nodes(graph) for site in sites_of(node)})
        raise LoweringError(f"pass {step.name} failed on a graph with {', '.join(sites[:3])}"
                            f"{' ...' if len(sites) > 3 else ''}: {type(error).__name__}: {error}\n"
                            f"with qpass.lowering.pipeline.disable_pass({step.name!r}) it does not run") from error


def _explain_what_stays(graph: fx.Graph) -> None:
    if not next(p for p in _passes if p.name == "lower_to_kernel").enabled:
        for node, _ in our_nodes(graph):
            if node.target in OPS:
                node.meta.setdefault(LEFT, "lower_to_kernel is switched off")


def _index(name: str) -> int:
    names = [p.name for p in _passes]
    if name not in names:
        raise QPassError(f"no pass is named {name!r}; the pipeline is {' -> '.join(names)}")
    return names.index(name)


class _change(contextlib.AbstractContextManager[None]):
    """A change of one pass, made at once, and undone at the end of a `with` block if there is one."""

    def __init__(self, name: str, **fields: object) -> None:
        self._name, self._before = name, _passes[_index(name)]
        _passes[_index(name)] = replace(self._before, **fields)  # type: ignore[arg-type]

    def __exit__(self, *error: object) -> None:
        _passes[_index(self._name)] = self._before


def pipeline_text() -> Iterator[str]:
    """One line a pass, as `explain` and the debug output print it."""
    for p in _passes:
        yield f"{p.name}{'' if p.enabled else ' (off)'}"
