"""Replay: a torch-level or ATen FX graph in, its calls noted on a tape, with module paths and torch calls, out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from qpass.capture.tape import Scope, Tape, recording

_NAME = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]|\.([A-Za-z0-9_]+)|\[(\d+)\]|\['([^']+)'\]")


class Replay(fx.Interpreter):
    """Runs a graph on fake or meta tensors; `tape` learns where in the model each call came from."""

    def __init__(self, graph_module: fx.GraphModule, tape: Tape) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self._tape = tape

    def run_node(self, n: fx.Node) -> Any:
        self._tape.scope = scope_of(n)
        name, function = n.name, n.target
        torch_fn = n.meta.get("torch_fn")
        if torch_fn:  # (call, "kind.name"): the torch function that an ATen node of an export came from
            name, function = torch_fn[0], torch_fn[1].rpartition(".")[2]
        args, kwargs = self.fetch_args_kwargs_from_env(n) if n.op.startswith("call_") else ((), {})
        self._tape.torch_call = self._tape.torch_call_of(function, args, kwargs, name)
        try:
            return super().run_node(n)
        finally:
            self._tape.scope, self._tape.torch_call = (), None

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        inner = next((a for a in args if isinstance(a, fx.GraphModule)), None)
        if isinstance(target, torch._ops.HigherOrderOperator) and inner is not None:
            # A region under no_grad or autocast: its calls are the model's calls like any others.
            tensors = args[args.index(inner) + 1:]
            return Replay(inner, self._tape).run(*tensors)
        return super().call_function(target, args, dict(kwargs))


def scope_of(node: fx.Node) -> tuple[Scope, ...]:
    """The modules of a node's `nn_module_stack`, outermost first."""
    scopes = []
    for key, (path, kind) in (node.meta.get("nn_module_stack") or {}).items():
        class_name = kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]
        scopes.append(Scope(plain_path(path), class_name, f"{key}|{path}"))
    return tuple(scopes)


def plain_path(path: str) -> str:
    """`model.layers.0` from what export and Dynamo write: `L['self']._modules['model'].layers[0]`, `layers.0@1`."""
    path = path.split("@")[0]
    if not path.startswith("L["):
        return path
    path = re.sub(r"^L\['\w+'\]", "", path)
    return ".".join(next(part for part in match if part) for match in _NAME.findall(path))


def replay_program(program: ExportedProgram) -> fx.GraphModule:
    """The graph of an ExportedProgram, decomposed to products and elementwise calls."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    signature = program.graph_signature
    named: Mapping[str, str] = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = {**signature.inputs_to_lifted_tensor_constants}
    values: list[Any] = []
    tensors: dict[str, Tensor] = {}
    first_of: dict[int, Tensor] = {}  # one fake for one parameter, however many names it has
    inputs: list[tuple[str, Tensor]] = []
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        name = named.get(node.name) or constants.get(node.name)
        value = _like(node.meta.get("val"), mode)
        if name in program.state_dict:
            value = first_of.setdefault(id(program.state_dict[name]), value)
        values.append(value)
        if isinstance(value, Tensor):
            if name is None:
                inputs.append((node.name, value))
            else:
                tensors[name] = value
    tape = Tape(tensors)
    for name, value in inputs:
        tape.add_input(name, value)
    with torch.no_grad(), mode, recording(tape):
        result = Replay(program.graph_module, tape).run(*values)
    tape.add_outputs(result)
    return tape.graph_module()


def replay_with(tape: Tape, graph_module: fx.GraphModule, values: Sequence[Any]) -> Any:
    """Run one of Dynamo's graphs on `values`, noting its calls."""
    with torch.no_grad(), recording(tape):
        return Replay(graph_module, tape).run(*values)


def _like(value: Any, mode: FakeTensorMode) -> Any:
    """A fake tensor with the sizes of `value`; symbolic sizes get their hint."""
    if isinstance(value, torch.SymInt):
        return int(value)
    if not isinstance(value, Tensor):
        return value
    shape, stride = tuple(map(int, value.shape)), tuple(map(int, value.stride()))
    with mode:
        return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
