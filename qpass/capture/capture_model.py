"""Capture: a model and example inputs in, one FX graph of ATen calls with parameters by qualified name out.

The model is never run on data and never changed: shapes flow through it as fake tensors. The ways are tried in turn,
and the notes of a Capture say which one worked and why those before it did not:
  trace    the forward itself is run on fake tensors and every ATen call is noted
  export   `torch.export.export(strict=False)`, whose graph is then noted in the same way
  dynamo   the graphs that `torch.compile` makes, where the forward has to be broken into several
  trace    once more, with 1 (true) for every number that the forward reads off a tensor, and a note that says so
  modules  no graph: the modules are all there is to go by
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, redirect_stderr
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.utils._pytree import tree_flatten, tree_map

from qpass.capture.as_found import experts_as, in_eval_mode, left_as_found, quiet_loggers, without_hooks
from qpass.capture.example_inputs import Example, device_of, example_of
from qpass.capture.find_products import buffers_multiplied
from qpass.capture.tape import Tape, following_modules, recording
from qpass.errors import CaptureError

Method = Literal["trace", "export", "dynamo", "modules", "given"]
_GROUPED = "grouped_mm"  # one call for all experts; the loop over them depends on data and has no graph


@dataclass(frozen=True, kw_only=True)
class Capture:
    """What is known of a model's computation.

    graph_module  ATen calls; a `get_attr` node whose target is a qualified name reads that parameter or buffer;
                  None if no graph could be had. What nodes carry in `meta` is described in `qpass.capture.tape`
    parameters    names of parameters that the graph may read, by `get_attr` target
    aliases       parameter name -> its other names (tied weights, a module under two names)
    """

    graph_module: fx.GraphModule | None
    method: Method
    notes: tuple[str, ...] = ()
    parameters: frozenset[str] = frozenset()
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def capture(model: nn.Module | ExportedProgram, example_inputs: Any = None) -> Capture:
    """The graph of `model`'s forward.

    example_inputs: a tensor, a tuple of positional arguments, a dict of keywords, or None: the model's `dummy_inputs`,
    else what can be deduced. Weights may be real, fake or on the meta device. Never raises for a model that cannot be
    captured: the modules are still known then, and `notes` says what went wrong. Raises CaptureError if `model` is
    neither an nn.Module nor an ExportedProgram.
    """
    if isinstance(model, ExportedProgram):
        return _given_program(model)
    if not isinstance(model, nn.Module):
        raise CaptureError(f"capture takes an nn.Module, a torch.fx.GraphModule or an ExportedProgram, got "
                           f"{type(model).__name__}; pass the model itself")
    parameters, aliases = _names_of(model)
    notes: list[str] = []
    graph_module, method = _capture_module(model, example_inputs, notes)
    if graph_module is not None:
        notes.extend(f"{name} is a buffer that is multiplied like a weight; only parameters are quantized: make it an "
                     "nn.Parameter to have it found" for name in buffers_multiplied(graph_module, parameters))
    if isinstance(model, fx.GraphModule) and method == "trace":
        method = "given"
    return Capture(graph_module=graph_module, method=method, notes=tuple(notes), parameters=parameters,
                   aliases=aliases)


def _capture_module(model: nn.Module, example_inputs: Any, notes: list[str]) -> tuple[fx.GraphModule | None, Method]:
    example = example_of(model, example_inputs)
    if example is None:
        notes.append("no example inputs were given, and none could be deduced from the model: only its modules are "
                     "known; pass example_inputs to have products found in the graph")
        return None, "modules"
    notes.append(f"inputs: {example.origin}")
    ways: tuple[tuple[Method, Callable[[nn.Module, Example], fx.GraphModule]], ...]
    ways = (("trace", _trace), ("export", _export), ("dynamo", _dynamo), ("trace", partial(_trace, guess=True)))
    for method, way in ways:
        with ExitStack() as undo:
            undo.enter_context(left_as_found(model))
            undo.enter_context(in_eval_mode(model))
            undo.enter_context(without_hooks(model))
            undo.enter_context(quiet_loggers())
            undo.enter_context(warnings.catch_warnings(action="ignore"))
            undo.enter_context(torch.random.fork_rng(devices=[]))
            undo.enter_context(torch.inference_mode(False))
            undo.enter_context(torch.no_grad())
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):  # the caller's; the model's own stays part of it
                    undo.enter_context(torch.autocast(device, enabled=False))
            switched = undo.enter_context(experts_as(model, _GROUPED))
            try:
                graph_module = way(model, example)
            except Exception as error:  # whatever a model's forward, or the tracer, may raise
                said = f"{method} failed: {_first_line(error)}"
                notes += [said] if said not in notes else []
                continue
        notes.append(f"graph: {method}")
        if guesses := graph_module.meta.get("guesses"):
            notes.append(f"the forward asks {guesses} times for a number that depends on data; it was answered with 1 "
                         "(true), so that what lies on other branches is known by its modules only")
        if switched and any(_GROUPED in str(node.target) for node in graph_module.graph.nodes):
            notes.append(f"experts: captured as {_GROUPED}; the model's own setting is left as it was")
        return graph_module, method
    notes.append("graph: none; products inside forwards other than nn.Linear's cannot be seen")
    return None, "modules"


def _trace(model: nn.Module, example: Example, guess: bool = False) -> fx.GraphModule:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    where = device_of(model)
    tensors = _fake_state(model, mode, where)
    args, kwargs = _fake(mode, (example.args, example.kwargs), where)
    tape = Tape(tensors, guess=guess)
    _add_inputs(tape, (args, kwargs))
    from torch._export.utils import _compiling_state_context  # models ask torch.compiler.is_compiling()

    with _compiling_state_context(), following_modules(tape, model), mode, recording(tape):
        result = torch.func.functional_call(model, tensors, args, kwargs, tie_weights=False)
    tape.add_outputs(result)
    graph_module = tape.graph_module()
    graph_module.meta["guesses"] = tape.guesses or 0
    return graph_module


def _export(model: nn.Module, example: Example) -> fx.GraphModule:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = _fake(mode, (example.args, example.kwargs))
    with redirect_stderr(io.StringIO()):  # where it fails, export prints the graph that it had so far
        program = torch.export.export(model, args, kwargs, strict=False)
    return _replay_program(program)


def _dynamo(model: nn.Module, example: Example) -> fx.GraphModule:
    from qpass.capture.dynamo_graphs import record_dynamo

    return record_dynamo(model, example)


def _given_program(program: ExportedProgram) -> Capture:
    parameters = frozenset(program.graph_signature.inputs_to_parameters.values())
    by_tensor: dict[int, list[str]] = {}
    for name in program.graph_signature.parameters:
        by_tensor.setdefault(id(program.state_dict[name]), []).append(name)
    aliases = {names[0]: tuple(names[1:]) for names in by_tensor.values() if len(names) > 1}
    try:
        graph_module, notes = _replay_program(program), ("graph: the ExportedProgram given",)
    except Exception as error:
        raise CaptureError(f"the ExportedProgram given could not be followed: {_first_line(error)}; export the model "
                           "again with this version of PyTorch, or pass the nn.Module") from error
    return Capture(graph_module=graph_module, method="given", notes=notes, parameters=parameters, aliases=aliases)


def _replay_program(program: ExportedProgram) -> fx.GraphModule:
    from qpass.capture.replay import replay_program

    return replay_program(program)


def _add_inputs(tape: Tape, value: Any) -> None:
    count = 0
    for leaf in tree_flatten(value)[0]:
        if isinstance(leaf, Tensor):
            tape.add_input(f"input_{count}", leaf)
            count += 1


def _fake_state(model: nn.Module, mode: FakeTensorMode, where: torch.device) -> dict[str, Tensor]:
    """Parameters and buffers as fake tensors, under every name; one fake for one tensor. Those on meta stand for what
    will be `where` the others are: of a model to be filled, what it computed at construction is real already."""
    fakes: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        if id(tensor) not in fakes:
            fakes[id(tensor)] = _fake(mode, tensor, where)
        state[name] = fakes[id(tensor)]
    return state


def _fake(mode: FakeTensorMode, value: Any, where: torch.device | None = None) -> Any:
    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        device = where if leaf.device.type == "meta" and where is not None else leaf.device
        if isinstance(leaf, torch._subclasses.FakeTensor) or device != leaf.device:  # of another mode, or no numbers
            shape, stride = tuple(map(int, leaf.shape)), tuple(map(int, leaf.stride()))
            with mode:
                return torch.empty_strided(shape, stride, dtype=leaf.dtype, device=device)
        return mode.from_tensor(leaf, static_shapes=True)

    return tree_map(convert, value)


def _names_of(model: nn.Module) -> tuple[frozenset[str], dict[str, tuple[str, ...]]]:
    by_tensor: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(parameter), []).append(name)
    parameters = frozenset(names[0] for names in by_tensor.values())
    return parameters, {names[0]: tuple(names[1:]) for names in by_tensor.values() if len(names) > 1}


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"
