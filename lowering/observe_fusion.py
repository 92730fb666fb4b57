"""Observe fusion: Inductor's scheduled kernels in, where each exposed quantization ended out; changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from qpass.lowering import record
from qpass.lowering.graph_nodes import OPS, QUANTIZES, SITES, Quantization, module_class, module_path

_log = logging.getLogger("qpass")
_LAYOUT = ("reshape", "_unsafe_view", "clone", "getitem", "convert_element_type")
_Origins = dict[fx.Node, None]


def observe_fusion(scheduled: Sequence[Any]) -> None:
    """Tell the records, for each exposed quantization, what else the function that writes its integers computes."""
    try:
        _warn_of_bypass(scheduled)
        record.settle(dict(_outcomes(scheduled)))
    except Exception as error:  # Inductor's scheduler is no public interface; a report is not worth a failed compile
        _log.warning("qpass: explain cannot tell what was fused: %s: %s", type(error).__name__, error)


def _warn_of_bypass(scheduled: Sequence[Any]) -> None:
    """Ops that the pipeline never saw: somebody put another pass into its slot after `install`."""
    if any(node.target in OPS and SITES not in node.meta for loops in scheduled for node in _origins(loops)):
        _log.warning("qpass: a graph with quantized layers was compiled without the lowering passes, so nothing is "
                     "fused; torch._inductor.config.post_grad_custom_pre_pass was set after them: call "
                     "qpass.lowering.install.install() again, or compile with backend='qpass'")


def _outcomes(scheduled: Sequence[Any]) -> Iterable[tuple[Quantization, str]]:
    for function in _functions(scheduled):
        together: _Origins = {node: None for loops in function for node in loops}
        for loops in function:
            for node in loops:
                mark = node.meta.get(QUANTIZES)
                if isinstance(mark, Quantization) and node.meta["val"].dtype == torch.int8:
                    yield mark, _outcome(node, mark, loops, together)


def _functions(scheduled: Sequence[Any]) -> Iterable[list[_Origins]]:
    """Scheduled loops, those together that become one generated function: a device's backend may write neighbours
    into one function until a call of something else comes between."""
    function: list[_Origins] = []
    for loops in scheduled:
        if loops.is_extern() or not hasattr(loops.scheduler.get_backend(loops.get_device()), "kernel_group"):
            if function:
                yield function
            function = []
        if not loops.is_extern():
            function.append(_origins(loops))
    if function:
        yield function


def _origins(loops: Any) -> _Origins:
    """The graph nodes that scheduled loops compute, each once."""
    found: _Origins = {}
    for part in loops.get_nodes():
        if part.node is not None:
            found.update(dict.fromkeys(part.node.get_origins()))
    return found


def _outcome(codes: fx.Node, mark: Quantization, loops: _Origins, together: _Origins) -> str:
    x = codes
    while QUANTIZES in x.meta:
        x = x.all_input_nodes[0]
    source = _computed(x)
    if source.op == "placeholder":
        return "alone: it reads an input of the compiled graph"
    # One generated function is what counts: Inductor keeps some loops apart in it, over a row that is still in cache.
    for inside in (loops, together):
        if source in inside:
            return f"fused into {_producer_text(source, mark, inside)}"
    where = module_path(source)
    return f"alone: it reads the result of {_op_name(source)}{f' in {record.AT}{where}' if where else ''}, " \
           "which is written elsewhere"


def _computed(x: fx.Node) -> fx.Node:
    """The node that computes the numbers of `x`, behind what only moves them or changes their dtype."""
    while x.op == "call_function" and (getattr(x.target, "is_view", False) or _op_name(x) in _LAYOUT):
        if not x.all_input_nodes:
            break
        x = x.all_input_nodes[0]
    return x


def _producer_text(source: fx.Node, mark: Quantization, inside: _Origins) -> str:
    """`layers.0.norm (RMSNorm)` where a module beside the layer computes its input; otherwise the ops that do, as
    `silu*mul in layers.0.mlp (MLP)`."""
    path = module_path(source)
    whole = f"{record.AT}{path} ({module_class(source)})" if path else ""
    if path and not mark.site.startswith(path + "."):
        return whole
    place = {node: i for i, node in enumerate(source.graph.nodes)}
    chain = _leading_to(source, {n for n in inside if QUANTIZES not in n.meta and module_path(n).startswith(path)})
    names: list[str] = []
    for node in sorted(chain, key=place.__getitem__):
        name = _op_name(node, as_written=True)
        if name not in names and name not in _LAYOUT and not getattr(node.target, "is_view", False):
            names.append(name)
    return "*".join(names[-3:]) + (f" in {whole}" if whole else "")


def _leading_to(source: fx.Node, allowed: set[fx.Node]) -> set[fx.Node]:
    """`source` and those of `allowed` from which it is computed."""
    found, todo = {source}, [source]
    while todo:
        for before in todo.pop().all_input_nodes:
            if before in allowed and before not in found:
                found.add(before)
                todo.append(before)
    return found


def _op_name(node: fx.Node, *, as_written: bool = False) -> str:
    """`mul` of aten.mul.Tensor; `as_written` gives `silu` for each line of a decomposed silu."""
    target = (node.meta.get("original_aten") if as_written else None) or node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2]
    return getattr(target, "__name__", str(target))
