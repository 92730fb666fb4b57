"""Activation quantization fuses on a GPU: Inductor writes one Triton kernel for it and what comes before it.

This is seen without a GPU: the device is a fake whose tensors hold nothing, what Inductor asks of it is answered with
an H100's numbers, and the code that Inductor writes is read, not run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qpass.activation_args import ActivationArgs
from qpass.kernels.reference.activation import quantize_activation

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
H100 = SimpleNamespace(multi_processor_count=132, major=9, minor=0, warp_size=32, name="H100", total_memory=1 << 36,
                       regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
                       shared_memory_per_block_optin=232448, gcnArchName="")


@pytest.fixture
def fake_gpu() -> Iterator[None]:
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import scheduler
    from torch._inductor.codegen import triton as codegen
    from torch._inductor.runtime import hints
    from torch._subclasses import FakeTensorMode

    properties = hints.DeviceProperties(type="cuda", index=0, multi_processor_count=132, cc=90, major=9,
                                        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
                                        warp_size=32)
    answers: tuple[tuple[Any, str, Any], ...] = (
        (hints.DeviceProperties, "create", staticmethod(lambda device: properties)),
        (CudaInterface.Worker, "get_device_properties", staticmethod(lambda *a: H100)),
        (CudaInterface.Worker, "current_device", staticmethod(lambda *a: 0)),
        (CudaInterface, "get_compute_capability", staticmethod(lambda *a: "90")),
        (torch.cuda, "get_device_properties", lambda *a: H100),
        (torch.cuda, "get_device_capability", lambda *a: (9, 0)),
        (torch.cuda, "is_available", lambda: True), (torch.cuda, "current_device", lambda: 0),
        (codegen, "triton_hash_with_backend", lambda *a: "none"),
        (torch.utils._triton, "triton_hash_with_backend", lambda *a: "none"),
        (torch.utils._triton, "has_triton", lambda: True), (scheduler, "has_triton", lambda: True))
    with ExitStack() as stack:
        for owner, name, answer in answers:
            stack.enter_context(mock.patch.object(owner, name, answer, create=True))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(torch.no_grad())
        yield


def generated(fn: Callable[..., Any], *args: Tensor) -> str:
    """The Python file that Inductor writes for `fn`."""
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = GraphLowering(make_fx(fn, decomposition_table=select_decomp_table())(*args), example_inputs=args)
    with V.set_graph_handler(graph), V.set_debug_handler(mock.MagicMock()):
        graph.run(*args)
        code = graph.codegen()[0]
    return str(getattr(code, "value", code))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


ACTIVATIONS = {"int8": ActivationArgs(), "int8-asym": ActivationArgs(symmetric=False),
               "fp8": ActivationArgs(type="float")}


@pytest.mark.parametrize("activation", list(ACTIVATIONS.values()), ids=list(ACTIVATIONS))
def test_norm_and_quantization_are_one_kernel(fake_gpu: None, activation: ActivationArgs) -> None:
    x, weight = (torch.empty(*size, 4096, dtype=torch.bfloat16, device="cuda") for size in ((64,), ()))
    text = generated(lambda x, weight: quantize_activation(rms_norm(x, weight), activation)[:2], x, weight)
    assert text.count("async_compile.triton(") == 1
    assert "rsqrt" in text and ("tl.int8" in text or "tl.float8e4nv" in text)


def test_gate_and_quantization_are_one_kernel(fake_gpu: None) -> None:
    """At 64 rows this wide there are three: Inductor splits the search for each row's largest, to fill the GPU."""
    gate, up = (torch.empty(1024, 14336, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    text = generated(lambda g, u: quantize_activation(F.silu(g) * u, ActivationArgs())[:2], gate, up)
    assert text.count("async_compile.triton(") == 1
    assert "tl.sigmoid" in text or "tl_math.exp" in text or "libdevice.exp" in text
    assert "tl.int8" in text
