"""Fixtures for lowering: quantized layers without a model around them, graphs to run a pass on, small real blocks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
import torch._inductor.codegen.cpp
import torch._inductor.config as inductor_config
from torch import Tensor, fx, nn
from torch._inductor.utils import fresh_cache
from torch.export import default_decompositions

from qpass.kernels.reference.linear import linear_q_reference, linear_reference
from qpass.kernels.registry import KERNELS, Kernel, kernel, register_kernel
from qpass.layers.packed_layers import QuantLinear
from qpass.lowering import pipeline, record
from qpass.lowering.install import install, uninstall
from qpass.scheme import preset
from qpass.spec import LinearSpec
from qpass.weight import quantize_weight


def quantized(linear: nn.Linear, scheme: str = "w4a8", kernel_name: str = "linear_reference") -> QuantLinear:
    """`linear` as a QuantLinear on a kernel of choice, groups of 16."""
    chosen = preset(scheme)
    chosen = chosen.with_group_size(16) if chosen.weight.group_size else chosen
    spec = LinearSpec(family=chosen.family, weight=chosen.weight, activation=chosen.activation, kernel=kernel_name,
                      out_features=linear.out_features, in_features=linear.in_features)
    kernel(kernel_name)
    return QuantLinear(quantize_weight(linear.weight, spec), linear.bias, spec, linear.weight.dtype)


def quantize_all(model: nn.Module, scheme: str = "w4a8", kernel_name: str = "linear_reference") -> nn.Module:
    """Every nn.Linear of `model` replaced; nothing else is touched."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Linear):
            setattr(model, name, quantized(child, scheme, kernel_name))
        else:
            quantize_all(child, scheme, kernel_name)
    return model.eval()


@cache
def attention_decomposed() -> dict[Any, Callable[..., Any]]:
    """Attention as smaller ops: export keeps it whole, Inductor does not. Looking it up takes 0.2 s."""
    attention = torch.ops.aten.scaled_dot_product_attention.default
    return {attention: default_decompositions()[attention]}


class Traced:
    """A model as a graph of ATen ops like the one Inductor gives to the pipeline, which can be changed and run."""

    def __init__(self, model: nn.Module, *inputs: Tensor, dynamic: Any = None) -> None:
        with torch.no_grad():
            program = torch.export.export(model.eval(), inputs, dynamic_shapes=dynamic).run_decompositions(
                attention_decomposed())
        self.module, signature = program.graph_module, program.graph_signature
        buffers = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.values = [buffers[spec.target] for spec in signature.input_specs if spec.target is not None]
        self.inputs = inputs

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def run(self, *inputs: Tensor) -> Any:
        self.graph.lint()
        with torch.no_grad():
            result = fx.Interpreter(fx.GraphModule(self.module, self.graph)).run(*self.values, *(inputs or self.inputs))
        return result[0] if len(result) == 1 else result

    def count(self, name: str) -> int:
        """How many calls of an op, named as in `aten.amax` or `qpass.linear_q`."""
        return sum(str(node.target).startswith(name + ".") for node in self.graph.nodes if node.op == "call_function")


class Attention(nn.Module):
    """Three products of one tensor, one of them biased, and one of their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(32, 32, bias=False), nn.Linear(32, 32)
        self.v, self.o = nn.Linear(32, 32, bias=False), nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x) + self.k(x) * self.v(x))  # type: ignore[no-any-return]


@pytest.fixture
def rounds_as_eager() -> bool:
    """Whether `emulate_precision_casts` reaches Inductor's C++, so that compiled bits equal eager's; not in 2.11."""
    return "emulate_precision_casts" in inspect.getsource(torch._inductor.codegen.cpp)


@pytest.fixture
def make_quantized() -> Callable[..., QuantLinear]:
    """`make_quantized(linear, scheme, kernel_name)`."""
    return quantized


@pytest.fixture
def quantize_layers() -> Callable[..., Any]:
    """`quantize_layers(model, scheme, kernel_name)`."""
    return quantize_all


@pytest.fixture
def empty_compile_cache() -> Iterator[None]:
    """Compiled graphs are cached, in a cache of the test's own."""
    with fresh_cache(), inductor_config.patch(fx_graph_cache=True), functorch_config.patch(enable_autograd_cache=True):
        yield


@pytest.fixture
def trace() -> type[Traced]:
    return Traced


@pytest.fixture
def attention() -> nn.Module:
    """Attention, W4A8, on the reference kernel."""
    return quantize_all(Attention())


@pytest.fixture(autouse=True)
def own_pipeline() -> Iterator[None]:
    """Each test begins with the built-in pipeline, nothing installed and nothing recorded, and leaves it so.

    Graphs that an earlier run compiled are not taken from the cache, so that every run compiles what it asserts about.
    """
    before = list(pipeline._passes)
    record.forget()
    uninstall()
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        yield
    uninstall()
    pipeline._passes[:] = before


@pytest.fixture
def installed() -> None:
    install()


NATIVE = torch.library.Library("qpass_lowering_test", "DEF")
NATIVE.define("linear_q(Tensor xq, Tensor x_scale, Tensor? x_zero_point, Tensor[] packed, Tensor? bias, str spec, "
              "ScalarType dtype, float times) -> Tensor")


@torch.library.impl(NATIVE, "linear_q", "CompositeExplicitAutograd")
def _linear_q(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, packed: list[Tensor], bias: Tensor | None,
              spec: str, dtype: torch.dtype, times: float) -> Tensor:
    return linear_q_reference(xq, x_scale, x_zero_point, packed, bias, LinearSpec.parse(spec), dtype) * times


@torch.library.register_fake("qpass_lowering_test::linear_q", lib=NATIVE)
def _linear_q_fake(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, packed: list[Tensor], bias: Tensor | None,
                   spec: str, dtype: torch.dtype, times: float) -> Tensor:
    return xq.new_empty((*xq.shape[:-1], LinearSpec.parse(spec).out_features), dtype=dtype)


NATIVE.define("linear_q_list(Tensor xq, Tensor x_scale, Tensor? x_zero_point, Tensor[] packed, Tensor?[] bias, "
              "str[] specs, ScalarType dtype, float times) -> Tensor")


@torch.library.impl(NATIVE, "linear_q_list", "CompositeExplicitAutograd")
def _linear_q_list(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, packed: list[Tensor],
                   bias: list[Tensor | None], specs: list[str], dtype: torch.dtype, times: float) -> Tensor:
    return torch.cat(torch.ops.qpass.linear_q_list(xq, x_scale, x_zero_point, packed, bias, specs, dtype), -1) * times


@torch.library.register_fake("qpass_lowering_test::linear_q_list", lib=NATIVE)
def _linear_q_list_fake(xq: Tensor, x_scale: Tensor, x_zero_point: Tensor | None, packed: list[Tensor],
                        bias: list[Tensor | None], specs: list[str], dtype: torch.dtype, times: float) -> Tensor:
    return xq.new_empty((*xq.shape[:-1], sum(LinearSpec.parse(text).out_features for text in specs)), dtype=dtype)


@pytest.fixture
def add_kernel() -> Iterator[Callable[..., Kernel]]:
    """`add_kernel(name, times=1.0)`: a kernel with a native op for linear_q, whose result is `times` the right one;
    `linear_q=False` makes one that only takes float activations, `joined=True` one with a native op for lists too, that
    gives one tensor."""
    added: list[str] = []

    def add(name: str, times: float = 1.0, *, linear_q: bool = True, joined: bool = False) -> Kernel:
        def native_call(op: str, args: Any) -> Any:
            if joined and op == "linear_q_list":
                return torch.ops.qpass_lowering_test.linear_q_list.default, (*args, times)
            return (torch.ops.qpass_lowering_test.linear_q.default, (*args, times)) if op == "linear_q" else None

        def linear(x: Tensor, packed: Any, bias: Any, spec: Any) -> Tensor:
            return linear_reference.forms["linear"](x, packed, bias, spec)  # type: ignore[no-any-return]

        made = register_kernel(scheme="*", device="*", name=name, priority=-1,
                               native_call=native_call if linear_q else None)(linear)
        added.append(name)
        if linear_q:
            made.form("linear_q")(linear_q_reference)
        return made

    yield add
    for name in added:
        del KERNELS[name]
