"""Install: put the pipeline into Inductor's configuration, behind what a user put there; `torch.compile` then uses it.

Nothing is installed by importing qpass; `qpass.quantize` and `qpass.load` call `install`. A user who sets
`torch._inductor.config.post_grad_custom_pre_pass` afterwards takes the pipeline's place: call `install` again, which
chains behind the new pass, or compile with `backend="qpass"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch._inductor.config as inductor_config
from torch import fx
from torch._inductor import custom_graph_pass as slots

import qpass.kernels.dispatch  # noqa: F401  (what stays a qpass op runs through dispatch)
from qpass.lowering import debug, record
from qpass.lowering.fingerprint import pipeline_fingerprint
from qpass.lowering.graph_nodes import clean_path
from qpass.lowering.observe_fusion import observe_fusion
from qpass.lowering.pipeline import lower_graph

_GraphPass: Any = getattr(slots, "CustomInferenceAwareGraphPass", slots.CustomGraphPass)
_SchedulerPass: Any = getattr(slots, "CustomSchedulerPass", object)  # 2.11's slot takes any function


class LoweringPass(_GraphPass):  # type: ignore[misc]
    """What stands in `post_grad_custom_pre_pass`: the user's passes, then the pipeline.

    Invariant: `uuid()` changes whenever the pipeline or a user's pass would do something else to a graph; it is None,
    which keeps the compiled graph out of the cache, if a user's pass has no uuid or QPASS_DEBUG asks to see the passes.
    """

    def __init__(self, previous: Any = None) -> None:
        self.previous = previous

    def __call__(self, graph: fx.Graph, is_inference: bool = True) -> None:
        for user in _as_tuple(self.previous):
            if isinstance(user, _GraphPass) and _GraphPass is not slots.CustomGraphPass:
                user(graph, is_inference)
            else:
                user(graph)
        lower_graph(graph)

    def uuid(self) -> Any:
        _note_lookup()
        users = [user.uuid() if hasattr(user, "uuid") else None for user in _as_tuple(self.previous)]
        if debug.level() or not all(users):
            return None
        return (pipeline_fingerprint(), *users)


class FusionObserver(_SchedulerPass):  # type: ignore[misc]
    """What stands in `_post_fusion_custom_pass`: the user's pass, then a look at what was fused."""

    def __init__(self, previous: Any = None) -> None:
        self.previous = previous

    def __call__(self, nodes: list[Any]) -> list[Any]:
        if self.previous is not None:
            nodes = self.previous(nodes)
        observe_fusion(nodes)
        return nodes

    def uuid(self) -> Any:
        return ("qpass observes", None if self.previous is None else self.previous.uuid())

    def __reduce__(self) -> Any:  # the slot is part of a cache key that is pickled
        return FusionObserver, (self.previous,)


def install() -> None:
    """Make `torch.compile` run the pipeline on graphs that hold ops of qpass. Calling it again changes nothing."""
    for slot, value in chained().items():
        setattr(inductor_config, slot, value)
    _register_backend()


def uninstall() -> None:
    """Put back what stood in the slots before `install`, if the pipeline still stands there."""
    for slot, kind in _slots().items():
        current = getattr(inductor_config, slot)
        if isinstance(current, kind):
            setattr(inductor_config, slot, current.previous)


def is_installed() -> bool:
    """Whether a plain `torch.compile` would run the pipeline."""
    return any(isinstance(one, LoweringPass) for one in _as_tuple(inductor_config.post_grad_custom_pre_pass))


def chained() -> dict[str, Any]:
    """Inductor's settings with the pipeline behind what stands there now; {} if it stands there already."""
    wanted = {}
    for slot, kind in _slots().items():
        current = getattr(inductor_config, slot)
        if any(isinstance(one, kind) for one in _as_tuple(current)):
            continue
        if kind is FusionObserver and current is not None and not hasattr(current, "uuid"):
            continue  # a bare function there keeps graphs out of the cache; wrapping it would let them in
        wanted[slot] = kind(current)
    return wanted


def _slots() -> dict[str, Any]:
    found: dict[str, Any] = {"post_grad_custom_pre_pass": LoweringPass}
    if hasattr(inductor_config, "_post_fusion_custom_pass"):
        found["_post_fusion_custom_pass"] = FusionObserver
    return found


def _as_tuple(value: Any) -> Sequence[Any]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _note_lookup() -> None:
    """Tell the records which modules the graph reads whose cache key is being computed, from Dynamo's guards."""
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    if context is not None:
        names = (guard.name for guard in context.guards_context.dynamo_guards)
        record.note_lookup({clean_path(name).rpartition(".packed_")[0] for name in names if "packed_" in name} - {""})


def _register_backend() -> None:
    from torch._dynamo.backends import registry

    from qpass.lowering.backend import qpass_backend

    if "qpass" not in registry._BACKENDS:
        registry.register_backend(qpass_backend, name="qpass")
