"""The x86 kernels: invariants that only native code could break, the ops that graphs get, and what they refuse."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import qpass.kernels.dispatch  # noqa: F401
from qpass.errors import NoKernel
from qpass.kernels import isa
from qpass.kernels.cpu import native, x86
from qpass.kernels.reference.activation import quantize_asymmetric, quantize_symmetric
from qpass.kernels.registry import Kernel, LinearCall, choose, force_kernel, kernel
from qpass.scheme import ActivationArgs, WeightArgs
from qpass.spec import LinearSpec
from qpass.weight import CanonicalWeight, quantize_weight

pytestmark = pytest.mark.skipif(native.refuses() is not None, reason=native.refuses() or "")
HERE = [short for short, (name, _) in x86.ISAS.items() if name in isa.machine_has()]
ISA_NAMES = [x86.ISAS[short][0] for short in HERE]
FAMILIES = [pytest.param(family, short, id=f"{family}-{short}") for family in x86.FAMILIES for short in HERE]
every_native = pytest.mark.parametrize(("family", "short"), FAMILIES)


def make(family: str, short: str, n: int, k: int, group: int | None = 64, *, asym: bool = False,
         asym_activation: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Kernel, LinearSpec, list[Tensor]]:
    weight = WeightArgs(bits=int(family[1]), granularity="per_group" if group else "per_channel", group_size=group,
                        symmetric=not asym)
    activation = ActivationArgs(symmetric=not asym_activation) if family.endswith("a8") else None
    spec = LinearSpec(family=family, weight=weight, activation=activation, out_features=n, in_features=k,
                      kernel=f"linear_{family}_{short}")
    found = kernel(spec.kernel)
    packed = found.layout.pack(quantize_weight((torch.randn(n, k) + 0.2).to(dtype), spec), spec)
    return found, spec, [packed[name] for name in found.layout.names(spec)]


@every_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_does_not_depend_on_the_others(family: str, short: str, dtype: torch.dtype) -> None:
    for group, asym, k in ((32, False, 192), (64, True, 192), (96, False, 288), (None, False, 130), (None, True, 66)):
        found, spec, packed = make(family, short, 50, k, group, asym=asym, asym_activation=asym)
        x = torch.randn(150, k).to(dtype)
        x[3], x[5, 7], x[8], x[149, 1] = 0, -0.0, x[8] * 1e-4, 6e4
        whole = found.forms["linear"](x, packed, None, spec)
        for first, last in ((0, 1), (0, 2), (5, 8), (3, 9), (17, 34), (70, 150), (149, 150)):
            assert torch.equal(found.forms["linear"](x[first:last], packed, None, spec), whole[first:last])


@every_native
def test_threads_do_not_change_the_result(family: str, short: str) -> None:
    found, spec, packed = make(family, short, 328, 256, 32)
    x = torch.randn(70, 256)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append([found.forms["linear"](x[:m], packed, None, spec) for m in (1, 70)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_python_threads_may_call_at_once() -> None:
    found, spec, packed = make("w4a8", HERE[0], 256, 256)
    xs = [torch.randn(m, 256) for m in (1, 5, 40, 90)]
    want = [found.forms["linear"](x, packed, None, spec) for x in xs]
    got: list[list[Tensor]] = [[] for _ in xs]
    workers = [threading.Thread(target=lambda i=i: got[i].extend(  # type: ignore[misc]
        found.forms["linear"](xs[i], packed, None, spec) for _ in range(20))) for i in range(len(xs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(len(g) == 20 and all(torch.equal(w, y) for y in g) for w, g in zip(want, got, strict=True))


def _in_child(queue: Any, packed: list[Tensor], spec: LinearSpec, x: Tensor) -> None:
    queue.put(kernel(spec.kernel).forms["linear"](x, packed, None, spec).sum().item())


def test_a_forked_process_computes_the_same() -> None:
    found, spec, packed = make("w4a8", HERE[0], 512, 512)
    x = torch.randn(64, 512)
    want = found.forms["linear"](x, packed, None, spec).sum().item()  # the parent's threads exist by now
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    child = fork.Process(target=_in_child, args=(queue, packed, spec, x))
    child.start()
    try:
        assert queue.get(timeout=60) == want
    finally:
        child.join(5)
        if child.is_alive():
            child.kill()


@pytest.mark.parametrize("name", ISA_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("k", [1, 7, 64, 77, 576])
def test_codes_and_scales_bit_for_bit(name: str, dtype: torch.dtype, k: int) -> None:
    x = (torch.randn(64, k) * torch.logspace(-14, 4, 64).unsqueeze(-1)).to(dtype)
    x[0] = 0
    x[1] = x[1].abs()
    x[2] = -x[2].abs()
    x[3] = torch.arange(k).to(dtype) - k // 2  # many values fall halfway between two codes
    q, scale, _ = native.quantize(x, name)
    want_q, want_scale = quantize_symmetric(x)
    assert torch.equal(q, want_q) and torch.equal(scale, want_scale)
    q, scale, zero_point = native.quantize(x, name, symmetric=False)
    want_q, want_scale, want_zero_point = quantize_asymmetric(x)
    assert torch.equal(q, want_q) and torch.equal(scale, want_scale) and torch.equal(zero_point, want_zero_point)


@pytest.mark.parametrize("short", HERE)
@pytest.mark.parametrize(("family", "low"), [("w4a8", -8), ("w8a8", -128)])
@pytest.mark.parametrize("k", [64, 4096])
def test_extreme_codes_do_not_overflow(family: str, low: int, short: str, k: int) -> None:
    weight = WeightArgs(bits=int(family[1]), symmetric=False)
    spec = LinearSpec(family=family, weight=weight, activation=ActivationArgs(symmetric=False), out_features=40,
                      in_features=k, kernel=f"linear_{family}_{short}")
    q = torch.full((40, k), low, dtype=torch.int8)
    q[20:] = -low - 1
    tensors = {"qweight": q, "scale": torch.ones(40, 1), "zero_point": torch.full((40, 1), -low - 1, dtype=torch.int8)}
    found = kernel(spec.kernel)
    packed = found.layout.pack(CanonicalWeight(tensors), spec)
    for code in (-128, -64, -32, 31, 32, 63, 64, 127):  # around what 16 bits hold the sum of 32, 64, 128 or 256 of
        for m in (1, 5, 18):
            xq = torch.full((m, k), code, dtype=torch.int8)
            zero_point = torch.full((m, 1), 127.0 if code < 0 else -128.0)
            y = found.forms["linear_q"](xq, torch.ones(m, 1), zero_point,
                                        [packed[name] for name in found.layout.names(spec)], None, spec, torch.float32)
            want = (q.double() + low + 1).sum(-1) * (code - zero_point[0].item())
            assert torch.allclose(y.double(), want.expand(m, -1), rtol=1e-6)


def node_arguments(form: str, packed: list[Tensor], spec: LinearSpec, bias: Tensor | None) -> tuple[Any, ...]:
    x = torch.randn(3, spec.in_features)
    q, scale = quantize_symmetric(x)
    several = ([*packed, *packed], [bias, None], [str(spec), str(spec)])
    return {"linear": (x, packed, bias, str(spec)), "linear_list": (x, *several),
            "linear_q": (q, scale, None, packed, bias, str(spec), torch.bfloat16),
            "linear_q_list": (q, scale, None, *several, torch.bfloat16)}[form]


@pytest.mark.parametrize("form", ["linear", "linear_q", "linear_list", "linear_q_list"])
@pytest.mark.parametrize("asym", [False, True])
def test_native_call_gives_what_the_op_gives(form: str, asym: bool) -> None:
    found, spec, packed = make("w4a8", HERE[0], 33, 96, 32, asym=asym)
    assert found.native_call is not None
    args = node_arguments(form, packed, spec, torch.randn(33))
    call = found.native_call(form, args)
    assert call is not None
    target, native_args = call
    assert target.namespace == "qpass_x86"
    want, got = getattr(torch.ops.qpass, form)(*args), target(*native_args)
    want = torch.cat(want, -1) if isinstance(want, list) else want
    assert torch.equal(got, want) and got.dtype == want.dtype
    torch.library.opcheck(target, native_args, test_utils=("test_schema", "test_faketensor"))


def test_native_call_leaves_lists_that_one_call_cannot_take() -> None:
    found, spec, packed = make("w4a8", HERE[0], 32, 64)
    _, other, more = make("w4a8", HERE[0], 32, 64, asym_activation=True)
    assert found.native_call is not None
    args = (torch.randn(1, 64), [*packed, *more], [None, None], [str(spec), str(other)])
    assert found.native_call("linear_list", args) is None


def test_compiles_whole_with_any_batch() -> None:
    found, spec, packed = make("w4a8", HERE[0], 48, 128)
    assert found.native_call is not None
    target, args = found.native_call("linear", (torch.randn(1, 128), packed, None, str(spec)))  # type: ignore[misc]

    def call(x: Tensor) -> Tensor:
        return target(x * 2, *args[1:]) + 1  # type: ignore[no-any-return]

    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=count)
    for m in (7, 3, 9):  # none of the packed tensors' sizes, which a dynamic graph would tie them to
        x = torch.randn(m, 128)
        assert torch.equal(compiled(x), call(x))
    assert graphs == 1


def wrong(**changes: Any) -> Callable[[], Any]:
    def run() -> Any:
        packed = make("w4a8", HERE[0], 40, 128, asym=True, asym_activation=True)[2]
        given = {"x": torch.randn(2, 128), "qweight": packed[0], "scale": packed[1], "zero_point": packed[2],
                 "colsum": packed[3], "bias": None, "n": 40, "k": 128, "bits": 4, "activation": 2,
                 "isa": native.ISA_INDEX[ISA_NAMES[0]]}
        given.update({name: change(given[name]) if callable(change) else change for name, change in changes.items()})
        return torch.ops.qpass_x86.linear.default(*given.values())

    return run


@pytest.mark.parametrize(("call", "says"), [
    (wrong(x=torch.randn(2, 120)), "x has 120 features, the weight takes 128"),
    (wrong(x=torch.randn(2, 120), k=120), "groups must divide K"),
    (wrong(x=torch.randn(2, 128).double()), "x must be float32"),
    (wrong(x=torch.tensor(1.0)), "x must be"),
    (wrong(qweight=lambda q: q[:-1]), "qweight has the wrong size"),
    (wrong(qweight=lambda q: q.view(torch.int8)), "qweight has the wrong dtype"),
    (wrong(scale=lambda s: s[:1].contiguous()), "scale has the wrong size"),
    (wrong(scale=lambda s: s.flatten()), "scale must be"),
    (wrong(scale=lambda s: s.double()), "scale must be float32"),
    (wrong(zero_point=lambda z: z[:1].contiguous()), "zero_point has the wrong size"),
    (wrong(colsum=None), "asymmetric activations need colsum"),
    (wrong(colsum=lambda c: c[:-1].contiguous()), "colsum has the wrong size"),
    (wrong(bias=torch.randn(39)), "bias has the wrong size"),
    (wrong(bias=torch.randn(40).double()), "bias must be float32"),
    (wrong(n=65), "qweight has the wrong size"),
    (wrong(n=0), "outputs must be positive"),
    (wrong(n=1 << 40), "qweight is too small"),  # said before an output of that size is asked for
    (wrong(x=torch.eye(128).to_sparse()), "takes dense tensors, got torch.sparse_coo"),
    (wrong(bits=8), "qweight has the wrong size"),
    (wrong(bits=3), "bits must be 4 or 8"),
    (wrong(bits=(1 << 32) + 4), "bits is out of range"),
    (wrong(isa=1 << 32), "isa is out of range"),
    (wrong(activation=7), "activation must be"),
    (wrong(isa=99), "does not have instruction set 99"),
])
def test_wrong_arguments_are_named(call: Callable[[], Any], says: str) -> None:
    with pytest.raises((RuntimeError, NoKernel), match=says):
        call()


def test_wrong_lists_are_named() -> None:
    packed = make("w4a8", HERE[0], 40, 128)[2]
    op, isa_index = torch.ops.qpass_x86.linear_list.default, native.ISA_INDEX[ISA_NAMES[0]]
    x = torch.randn(2, 128)
    for n, has, says in (([40], [4], "fewer tensors"), ([40], [8], "fewer tensors"), ([40, 40], [0], "of one length"),
                         ([], [], "more tensors"), ([40, 40], [0, 0], "fewer tensors")):
        with pytest.raises(RuntimeError, match=says):
            op(x, packed, n, has, 128, 4, 1, isa_index)


def test_codes_of_the_wrong_kind_are_named() -> None:
    found, spec, packed = make("w4a8", HERE[0], 40, 128)
    q, scale = quantize_symmetric(torch.randn(2, 128))
    form = found.forms["linear_q"]
    with pytest.raises(RuntimeError, match="xq must be int8"):
        form(q.int(), scale, None, packed, None, spec, torch.float32)
    with pytest.raises(RuntimeError, match="x_scale must be float32"):
        form(q, scale[:1], None, packed, None, spec, torch.float32)
    with pytest.raises(RuntimeError, match="asymmetric activations need colsum"):
        form(q, scale, torch.zeros(2, 1), packed, None, spec, torch.float32)


@pytest.mark.parametrize("n", [50, 64])
@pytest.mark.parametrize("groups", [1, 2])
def test_packed_scales_have_memory_of_their_own(n: int, groups: int) -> None:
    """New weights are written into packed tensors; what those were made from may be a mapped file."""
    rows = torch.rand(n, groups)
    blocks = x86.blocked(rows, 1)
    kept = rows.clone()
    blocks.zero_()
    assert torch.equal(rows, kept)


def test_every_op_gives_one_tensor() -> None:
    """What gives a list is called through Python by graphs that Inductor writes in C++."""
    for name in ("linear", "linear_q", "linear_list", "linear_q_list", "decoded", "decoded_list", "experts",
                 "experts_q"):
        (given,) = getattr(torch.ops.qpass_x86, name).default._schema.returns
        assert isinstance(given.type, torch.TensorType), name


def test_packing_checks_its_input() -> None:
    with pytest.raises(ValueError, match=r"outside -8\.\.7"):
        native.pack(CanonicalWeight({"qweight": torch.full((4, 8), 9, dtype=torch.int8)}), 4)
    with pytest.raises(ValueError, match="wrong size"):
        native.unpack(torch.zeros(100, dtype=torch.uint8), 4, 8, 4)


@pytest.fixture
def capped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    yield lambda name: monkeypatch.setenv("QPASS_ISA", name)


def test_refusals_are_sentences(capped: Callable[[str], None]) -> None:
    _, spec, _ = make("w4a8", "plain", 32, 96, 32)
    call = LinearCall(spec=spec, device=torch.device("cpu"), dtype=torch.float32)
    assert kernel("linear_w4a8_plain").why_not(call) is None
    assert kernel("linear_w8a8_plain").why_not(call) == "computes w8a8, not w4a8"
    double = LinearCall(spec=spec, device=torch.device("cpu"), dtype=torch.float64)
    assert "not float64" in str(kernel("linear_w4a8_plain").why_not(double))
    odd = LinearSpec(family="w4a8", weight=WeightArgs(bits=4, granularity="per_group", group_size=24),
                     activation=ActivationArgs(), out_features=8, in_features=96)
    refused = LinearCall(spec=odd, device=torch.device("cpu"), dtype=torch.float32)
    assert kernel("linear_w4a8_plain").why_not(refused) == "needs group_size % 32 == 0, got 24"
    capped("x86_64")
    assert kernel("linear_w4a8_avx2").why_not(call) == "needs avx2, this CPU has x86_64 (capped by QPASS_ISA)"
    choice = choose(call)
    assert choice.kernel.name == "linear_w4a8_plain" and "linear_w4a8_avx2" in choice.refusals


def test_a_forced_kernel_that_refuses_is_an_error(capped: Callable[[str], None]) -> None:
    _, spec, _ = make("w4a8", "plain", 32, 96, 32)
    call = LinearCall(spec=spec, device=torch.device("cpu"), dtype=torch.float32)
    capped("x86_64")
    with force_kernel("linear_w4a8_avx2"), pytest.raises(NoKernel, match=r"forced but refuses layers\.0.*\n?.*avx2"):
        choose(call, where="layers.0")


def test_the_registry_and_the_library_agree_on_this_machine() -> None:
    assert [name for name in isa.X86_LEVELS if native.available(name)] == list(isa.machine_has())


def test_one_pool_of_threads() -> None:
    make("w4a8", HERE[0], 32, 64)
    with open("/proc/self/maps") as maps:
        runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line or "libomp" in line}
    assert len(runtimes) <= 1, runtimes
