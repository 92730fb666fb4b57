"""Dynamo's graphs: a model whose forward breaks under tracing in, one graph joined from the pieces out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map

from qpass.capture.example_inputs import Example
from qpass.capture.replay import replay_with
from qpass.capture.tape import Tape


def record_dynamo(model: nn.Module, example: Example) -> fx.GraphModule:
    """Compile `model` with a backend that only notes what its graphs call; run on meta tensors, which hold no data.

    Tensors that pass from one graph to the next are the same objects, so the pieces join where they were broken.
    Raises whatever stops the forward, and RuntimeError if Dynamo found no graph.
    """
    metas: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        if id(tensor) not in metas:
            metas[id(tensor)] = _on_meta(tensor)
        state[name] = metas[id(tensor)]
    args, kwargs = tree_map(lambda v: _on_meta(v) if isinstance(v, Tensor) else v, (example.args, example.kwargs))
    tape = Tape(state)
    for index, leaf in enumerate(leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)):
        tape.add_input(f"input_{index}", leaf)
    graphs = 0

    def backend(graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return lambda *values: replay_with(tape, graph_module, values)

    _put_state(model, state)
    torch._dynamo.reset()
    try:
        with torch._dynamo.config.patch(suppress_errors=False, specialize_int=True):
            result = torch.compile(model, backend=backend, dynamic=False)(*args, **kwargs)
    finally:
        torch._dynamo.reset()
    if not graphs:
        raise RuntimeError("Dynamo made no graph of this forward")
    tape.add_outputs(result)
    return tape.graph_module()


def _put_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Let `model` hold `state`; the caller's left_as_found brings the real tensors back."""
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        holder = module._parameters if leaf in module._parameters else module._buffers
        holder[leaf] = tensor  # type: ignore[assignment]


def _on_meta(tensor: Tensor) -> Tensor:
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta
