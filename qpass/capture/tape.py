"""Tape: a forward run on fake tensors in, an FX graph of its ATen calls, each with its module and torch call, out.

Nothing is computed and no weight is copied: fake tensors hold shapes only. Each node of the graph carries
  val         its fake result
  scope       the modules it ran in, outermost first, as Scope records; a second call of a module has another `call`
  torch_call  the torch function that the model's own code called to get here (`F.linear` for a linear's `mm`)
The graph module's own `meta["returns_tensor"]` says of each module call whether it gave a tensor back, and
`meta["module_calls"]` what a module with parameters of three dims (experts, most often) was given and gave.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor
from torch.fx._lazy_graph_module import _LazyGraphModule  # its code, which nobody runs, is made when asked for
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from qpass.capture.known_results import KnownResults

_aten = torch.ops.aten
_QUERIES = (_aten.size.default, _aten.stride.default, _aten.storage_offset.default, _aten.is_contiguous.default)
_DEVICE = torch.ops.prim.device.default
_MOST_GUESSES = 1000


@dataclass(frozen=True)
class Scope:
    """One call of one module."""

    path: str
    class_name: str
    call: int | str


@dataclass(frozen=True)
class TorchCall:
    """One call of a torch function by the model's code, with its arguments as nodes where they are tensors."""

    call: int | str
    function: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModuleCall:
    """What one call of a module got and gave, tensors as nodes; `output` is None if it is not a single tensor."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: fx.Node | None = None


class Tape:
    """Collects one graph, over as many runs as there are; `graph_module()` closes it."""

    def __init__(self, tensors: Mapping[str, Tensor], *, guess: bool = False) -> None:
        """`tensors`: parameters and buffers by qualified name, as the run will see them.

        guess: where the forward asks for a number that depends on data, answer 1 (true), and count it in `guesses`;
        that of the rows that `nonzero` finds among them.
        """
        self.guesses: int | None = 0 if guess else None
        self.graph = fx.Graph()
        self.scope: tuple[Scope, ...] = ()
        self.torch_call: TorchCall | None = None
        self.attributes: dict[str, Tensor] = {}
        self.returns_tensor: dict[int | str, bool] = {}  # by module call
        self.module_calls: dict[int | str, ModuleCall] = {}
        self._tensors = {id(tensor): name for name, tensor in reversed(list(tensors.items()))}
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Any] = [tensors]  # an id means nothing once its tensor is gone
        self._calls = 0
        self.known = KnownResults()
        self._names: dict[Any, str] = {}  # op -> what its nodes are called, before their number

    def next_call(self) -> int:
        self._calls += 1
        return self._calls

    def guess(self, asked: Tensor) -> bool | int | float:
        """1 as a number of `asked`'s type. Raises RuntimeError after many, for a loop may never end on guesses."""
        self.guesses = (self.guesses or 0) + 1
        if self.guesses > _MOST_GUESSES:
            raise RuntimeError(f"more than {_MOST_GUESSES} numbers that depend on data")
        return True if asked.dtype is torch.bool else 1.0 if asked.is_floating_point() else 1

    def guess_shape(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
        """What a call gives whose size depends on data, if one number were all that it is about; None for other ops."""
        if func is _aten.nonzero.default:
            self.guess(args[0])
            return torch.empty((1, args[0].ndim), dtype=torch.int64, device=args[0].device)
        if func is _aten.bincount.default:
            self.guess(args[0])
            least = args[2] if len(args) > 2 else kwargs.get("minlength", 0)
            return torch.empty(max(1, least), dtype=torch.int64, device=args[0].device)
        return None

    def add_input(self, name: str, tensor: Tensor) -> None:
        """Make `tensor` a placeholder; only before the first run."""
        node = self.graph.placeholder(name)
        node.meta.update(val=tensor, scope=(), torch_call=None)
        self._remember(tensor, node)

    def add_outputs(self, result: Any) -> None:
        """End the graph with the tensors of `result` that it computes."""
        known = [self._nodes[id(t)] for t in _tensors_of(result) if id(t) in self._nodes]
        self.graph.output(tuple(known))

    def graph_module(self) -> fx.GraphModule:
        if not any(node.op == "output" for node in self.graph.nodes):
            self.graph.output(())
        graph_module = _LazyGraphModule(self.attributes, self.graph)
        graph_module.meta["returns_tensor"] = self.returns_tensor
        graph_module.meta["module_calls"] = self.module_calls
        return graph_module

    def record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Append one ATen call."""
        args, kwargs = self._as_nodes(args), self._as_nodes(kwargs)
        node = self.graph.create_node("call_function", func, args, kwargs, self._names.get(func))
        self._names.setdefault(func, node.name.rstrip("0123456789").rstrip("_"))
        node.meta.update(val=result, scope=self.scope, torch_call=self.torch_call)
        if isinstance(result, Tensor):
            self._remember(result, node)
        elif isinstance(result, (tuple, list)):
            for index, item in enumerate(result):
                if isinstance(item, Tensor):
                    part = self.graph.call_function(operator.getitem, (node, index))
                    part.meta.update(val=item, scope=self.scope, torch_call=self.torch_call)
                    self._remember(item, part)

    def torch_call_of(self, function: Any, args: Any, kwargs: Mapping[str, Any], call: str | None = None) -> TorchCall:
        """A TorchCall of these arguments, numbered unless `call` names it."""
        named = {key: self._as_argument(value) for key, value in kwargs.items()}
        return TorchCall(call or self.next_call(), function, tuple(map(self._as_argument, args)), named)

    def node_of(self, value: Any) -> Any:
        """The node of a tensor, or what is no tensor as it is."""
        return self._as_argument(value)

    def _as_nodes(self, value: Any) -> Any:
        """`value` with nodes for tensors, through tuples, lists and dicts: what an ATen call is given."""
        if isinstance(value, Tensor):
            return self._as_argument(value)
        if type(value) in (tuple, list):
            return type(value)([self._as_nodes(item) for item in value])
        return {key: self._as_nodes(item) for key, item in value.items()} if type(value) is dict else value

    def _remember(self, tensor: Tensor, node: fx.Node) -> None:
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)

    def _as_argument(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        node = self._nodes.get(id(value))
        if node is None:
            name = self._tensors.get(id(value)) or f"_constant{len(self.attributes)}"
            self.attributes[name] = value
            node = self.graph.get_attr(name)
            node.meta.update(val=value, scope=(), torch_call=None)
            self._remember(value, node)
        return node


@contextmanager
def recording(tape: Tape) -> Iterator[None]:
    """Within, every ATen call goes to `tape`."""
    aten_calls = _AtenCalls()  # type: ignore[no-untyped-call]
    aten_calls.tape = tape
    with _TorchCalls(tape), aten_calls:
        yield


@contextmanager
def following_modules(tape: Tape, model: nn.Module) -> Iterator[None]:
    """Within, `tape.scope` is the stack of `model`'s modules that are being called."""
    paths = {id(module): path for path, module in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        path = paths.get(id(module))
        if path is None:  # made by the forward itself
            path = tape.scope[-1].path if tape.scope else ""
        tape.scope = (*tape.scope, Scope(path, type(module).__name__, tape.next_call()))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        call = tape.scope[-1].call
        tape.returns_tensor[call] = isinstance(output, Tensor)
        if call in tape.module_calls and isinstance(output, Tensor):
            tape.module_calls[call] = replace(tape.module_calls[call], output=tape.node_of(output))
        tape.scope = tape.scope[:-1]

    def given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nodes = tree_map(tape.node_of, (args, kwargs))
        tape.module_calls[tape.scope[-1].call] = ModuleCall(*nodes)

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    handles += [module.register_forward_pre_hook(given, with_kwargs=True) for module in model.modules()
                if any(p is not None and p.ndim >= 3 for p in module._parameters.values())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        tape.scope = ()


class _AtenCalls(TorchDispatchMode):
    tape: Tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE and type(args[0]) is FakeTensor:
            return args[0].fake_device
        if func.namespace == "prim" or func in _QUERIES:  # asks for a device or a size: no computation
            return func(*args, **kwargs)
        if func is _aten._local_scalar_dense.default and self.tape.guesses is not None:
            return self.tape.guess(args[0])
        if self.tape.known.decomposes(func):  # reached whole, as under inference_mode
            with self:
                return func.decompose(*args, **kwargs)
        try:
            result = self.tape.known.call(func, args, kwargs)
        except DynamicOutputShapeException:
            result = None if self.tape.guesses is None else self.tape.guess_shape(func, args, kwargs)
            if result is None:
                raise
        self.tape.record(func, args, kwargs, result)
        return result


class _TorchCalls(TorchFunctionMode):
    """Inside a torch function the mode is off, so that only the outermost one, the model's own call, is noted."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outer = self._tape.torch_call
        kwargs = kwargs or {}
        self._tape.torch_call = self._tape.torch_call_of(func, args, kwargs)
        try:
            return func(*args, **kwargs)
        finally:
            self._tape.torch_call = outer


def _tensors_of(value: Any) -> list[Tensor]:
    """Tensors in a result, also in output classes that pytree does not know."""
    found: list[Tensor] = []
    for leaf in tree_flatten(value)[0]:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__"):
            found.extend(item for item in tree_flatten(list(vars(leaf).values()))[0] if isinstance(item, Tensor))
    return found
