"""Packed layers: products by every spelling, eager and traced, and what nn.Module's methods do to them."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qpass.errors import PackedForInference
from qpass.layers.packed_layers import PackedWeight, QuantLinear
from qpass.layers.quant_weight import QuantWeight
from qpass.scheme import PRESETS
from qpass.spec import LinearSpec
from qpass.weight import dequantize_weight, quantize_weight

N, K = 24, 64


def spec_of(scheme: str = "w4a8", n: int = N, k: int = K, group: int | None = 32) -> LinearSpec:
    """A spec for the reference kernel."""
    chosen = PRESETS[scheme]
    weight = replace(chosen.weight, group_size=group) if chosen.weight.group_size else chosen.weight
    return LinearSpec(family=chosen.family, weight=weight, activation=chosen.activation, out_features=n, in_features=k)


def quant_linear(scheme: str = "w4a8", dtype: torch.dtype = torch.float32, bias: bool = True) -> QuantLinear:
    spec = spec_of(scheme)
    weight = torch.randn(N, K, dtype=dtype)
    return QuantLinear(quantize_weight(weight, spec), nn.Parameter(torch.randn(N, dtype=dtype)) if bias else None, spec,
                       dtype)


def quant_weight(*, transposed: bool, scheme: str = "w4a16") -> QuantWeight:
    spec = spec_of(scheme)
    return QuantWeight(quantize_weight(torch.randn(N, K), spec), spec, torch.float32, transposed=transposed)


PRODUCTS: dict[str, tuple[bool, Callable[[Any, Any, Any], Any]]] = {
    # stored [N, K]
    "F.linear": (False, lambda x, w, b: F.linear(x, w, b)),
    "F.linear without bias": (False, lambda x, w, b: F.linear(x, w)),
    "F.linear by keyword": (False, lambda x, w, b: F.linear(input=x, weight=w, bias=b)),
    "x @ w.T": (False, lambda x, w, b: x @ w.T),
    "x @ w.mT": (False, lambda x, w, b: x @ w.mT),
    "x @ w.t()": (False, lambda x, w, b: x @ w.t()),
    "matmul w.transpose": (False, lambda x, w, b: torch.matmul(x, w.transpose(0, 1))),
    "matmul w.transpose(-2, -1)": (False, lambda x, w, b: torch.matmul(x, w.transpose(-2, -1))),
    "matmul w.permute": (False, lambda x, w, b: torch.matmul(x, w.permute(1, 0))),
    "torch.t": (False, lambda x, w, b: x @ torch.t(w)),
    "torch.transpose": (False, lambda x, w, b: x @ torch.transpose(w, 0, 1)),
    "einsum nk": (False, lambda x, w, b: torch.einsum("...k,nk->...n", x, w)),
    "einsum bsk,nk": (False, lambda x, w, b: torch.einsum("bsk,nk->bsn", x, w)),
    "einsum weight first": (False, lambda x, w, b: torch.einsum("nk,bsk->bsn", w, x)),
    "addmm w.t()": (False, lambda x, w, b: torch.addmm(b, x.reshape(-1, K), w.t()).view(*x.shape[:-1], N)),
    # stored [K, N]
    "x @ w": (True, lambda x, w, b: x @ w),
    "matmul": (True, lambda x, w, b: torch.matmul(x, w)),
    "x.matmul": (True, lambda x, w, b: x.matmul(w)),
    "mm": (True, lambda x, w, b: torch.mm(x.reshape(-1, K), w).view(*x.shape[:-1], N)),
    "x.mm": (True, lambda x, w, b: x.reshape(-1, K).mm(w).view(*x.shape[:-1], N)),
    "addmm": (True, lambda x, w, b: torch.addmm(b, x.reshape(-1, K), w).view(*x.shape[:-1], N)),
    "addmm by keyword": (True, lambda x, w, b: torch.addmm(b, mat1=x.reshape(-1, K), mat2=w).view(*x.shape[:-1], N)),
    "b.addmm": (True, lambda x, w, b: b.addmm(x.reshape(-1, K), w).view(*x.shape[:-1], N)),
    "einsum kn": (True, lambda x, w, b: torch.einsum("bsk,kn->bsn", x, w)),
    "einsum without arrow": (True, lambda x, w, b: torch.einsum("bsk,kz", x, w)),
    "F.linear w.T": (True, lambda x, w, b: F.linear(x, w.T, b)),
    "view of a view": (True, lambda x, w, b: x @ w.T.T),
}


class Holder(nn.Module):
    def __init__(self, product: Callable[..., Tensor], weight: Any) -> None:
        super().__init__()
        self.w = weight if isinstance(weight, nn.Module) else nn.Parameter(weight)
        self.b = nn.Parameter(torch.randn(N))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.product(x, self.w, self.b))


def holders(name: str) -> tuple[Holder, Holder]:
    """The same product with a packed weight, and with the float weight that it stands for."""
    transposed, product = PRODUCTS[name]
    packed = quant_weight(transposed=transposed)
    weight = packed.dequantize()
    mine, plain = Holder(product, packed), Holder(product, weight.t().contiguous() if transposed else weight)
    plain.b = mine.b
    return mine, plain


@pytest.mark.parametrize("name", PRODUCTS)
def test_product_with_a_packed_parameter(name: str) -> None:
    packed, plain = holders(name)
    x = torch.randn(2, 5, K)
    torch.testing.assert_close(packed(x), plain(x))


@pytest.mark.parametrize("name", PRODUCTS)
def test_product_traced_in_one_graph(name: str) -> None:
    packed, plain = holders(name)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    x = torch.randn(2, 5, K)
    y = torch.compile(packed, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(y, plain(x))
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("qpass.linear" in target for target in called) == 1, called


@pytest.mark.parametrize("wrong", [
    lambda x, w: w * 2, lambda x, w: torch.cat([w, w]), lambda x, w: w.T @ torch.randn(K, 3),
    lambda x, w: F.embedding(torch.tensor([0]), w), lambda x, w: torch.einsum("bsk,kn->bs", x, w), lambda x, w: x * w,
    lambda x, w: torch.matmul(x, w.T),
], ids=["multiply", "cat", "weight on the left", "embedding", "einsum summing out", "elementwise", "wrong way round"])
def test_what_is_no_product_says_so(wrong: Callable[[Tensor, Any], Any]) -> None:
    with pytest.raises((PackedForInference, TypeError), match=r"packed by qpass|unsupported operand"):
        wrong(torch.randn(2, 5, K), quant_weight(transposed=True))


def test_weight_answers_like_the_parameter() -> None:
    layer = quant_linear(dtype=torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.shape == (N, K)
    assert layer.weight.size(0) == N
    assert layer.weight.T.shape == (K, N)
    assert layer.weight.device == torch.device("cpu")
    assert layer.weight.ndim == layer.weight.dim() == 2
    assert layer.weight.numel() == N * K
    assert not layer.weight.requires_grad
    x = torch.randn(3, K, dtype=torch.bfloat16)
    assert torch.equal(F.linear(x, layer.weight, layer.bias), layer(x))
    assert torch.equal(layer.weight.T.dequantize(), layer.dequantize().T)
    assert repr(layer.weight) == f"WeightView({layer.spec}, shape=[{N}, {K}], dtype=torch.bfloat16)"
    assert getattr(layer.weight, "quant_state", None) is None
    with pytest.raises(AttributeError, match=r"packed by qpass has no 'data_ptr'.*dequantize\(\)"):
        layer.weight.data_ptr()


def test_multiply_is_the_reference() -> None:
    layer = quant_linear("w4a16")
    x = torch.randn(2, 3, K)
    expected = x.double() @ dequantize_weight(layer.canonical(), layer.spec, torch.float64).T + layer.bias.double()
    torch.testing.assert_close(layer(x), expected.float())


def test_packed_tensors_keep_their_order_beside_buffers_of_others() -> None:
    layer = quant_linear()
    expected = layer.packed
    assert len(expected) > 1
    layer._buffers = dict(reversed(layer._buffers.items()))
    assert all(found is tensor for found, tensor in zip(layer.packed, expected, strict=True))
    layer.register_buffer("somebodys", torch.zeros(3))
    assert all(found is tensor for found, tensor in zip(layer.packed, expected, strict=True))
    x, again = torch.randn(2, K), quant_linear()
    again.register_buffer("somebodys", torch.zeros(3))
    torch.testing.assert_close(torch.compile(again, backend="eager", fullgraph=True)(x), again(x))


def test_casting_changes_the_bias_and_never_the_packed_weight() -> None:
    layer = quant_linear(dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    for cast in (lambda: layer.half(), lambda: layer.to(torch.float32), lambda: layer.double(), lambda: layer.float()):
        cast()
        for name, tensor in layer.named_buffers():
            assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype
    assert layer.bias is not None
    assert layer.bias.dtype == layer.dtype == layer.weight.dtype == torch.float32
    with pytest.raises(PackedForInference, match="dequantize"):
        layer.type(torch.float16)
    assert torch.isfinite(layer(torch.randn(2, K))).all()


def test_to_meta_and_its_state_dict() -> None:
    layer = quant_linear()
    kept = {name: (t.dtype, t.shape) for name, t in layer.state_dict().items()}
    layer.to("meta")
    assert all(t.is_meta for t in layer.buffers())
    assert {name: (t.dtype, t.shape) for name, t in layer.state_dict().items()} == kept


def test_described_tensors_are_those_written() -> None:
    for scheme in ("w4a8", "w8a8", "w4a16_asym", "w3a16", "w8a16", "w5a8"):
        layer = quant_linear(scheme, dtype=torch.bfloat16)
        written = {name: (t.dtype, tuple(t.shape)) for name, t in layer.tensors_on_disk().items()}
        assert written == layer.on_disk


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: saved(m)],
                         ids=["deepcopy", "pickle", "torch.save"])
def test_copies_are_equal_and_apart(again: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(quant_linear("w4a8"), nn.ReLU(), Holder(lambda x, w, b: x, quant_weight(transposed=True)))
    if again is not copy.deepcopy:
        model = model[:2]  # a lambda cannot be pickled
    x = torch.randn(3, K)
    copied = again(model)
    assert torch.equal(copied(x), model(x))
    first, second = next(iter(model[0].buffers())), next(iter(copied[0].buffers()))
    assert first.data_ptr() != second.data_ptr()
    assert copied[0]._kernel is model[0]._kernel


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


def test_runs_in_a_spawned_process() -> None:
    layer, x = quant_linear("w4a8", bias=False), torch.randn(2, K)
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # the layer itself is the function that is sent
        got = pool.apply(layer, (x,))
    assert torch.equal(got, layer(x))


def test_share_memory_moves_the_packed_tensors() -> None:
    layer = quant_linear()
    x = torch.randn(2, K)
    before = layer(x)
    layer.share_memory()
    assert all(tensor.is_shared() for tensor in layer.buffers())
    assert torch.equal(layer(x), before)


def test_state_dict_round_trip_and_its_errors() -> None:
    one, two = quant_linear("w4a16_asym"), quant_linear("w4a16_asym")
    x = torch.randn(2, K)
    assert not torch.equal(one(x), two(x))
    state = one.state_dict()
    assert list(state) == ["bias", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"]
    two.load_state_dict(state)
    assert torch.equal(one(x), two(x))
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_scale"):
        two.load_state_dict({name: tensor for name, tensor in state.items() if name != "weight_scale"})
    with pytest.raises(RuntimeError, match=r"weight_shape says \[1, 2\]"):
        two.load_state_dict({**state, "weight_shape": torch.tensor([1, 2])})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other"):
        two.load_state_dict({**state, "other": torch.ones(1)})
    assert torch.equal(one(x), two(x))


def test_tied_layers_hold_one_copy_through_moves_and_copies() -> None:
    first, second = quant_linear(bias=False), quant_linear(bias=False)
    second.tie(first)
    model = copy.deepcopy(nn.Sequential(first, second))
    pairs = zip(model[0].buffers(), model[1].buffers(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)
    model.half().float().share_memory()
    assert [b.data_ptr() for b in model[0].buffers()] == [b.data_ptr() for b in model[1].buffers()]
    x = torch.randn(2, K)
    assert torch.equal(model[0](x), first(x)) and torch.equal(model[1](x), first(x))
    other = quant_linear(bias=False)
    model[1].load_state_dict(other.state_dict())
    assert torch.equal(model[0](x), other(x))


def test_inference_mode_and_no_grad() -> None:
    layer, x = quant_linear(), torch.randn(2, K)
    expected = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
        assert torch.equal(quant_linear.__call__("w4a8")(x).isfinite(), torch.ones(2, N, dtype=torch.bool))
    layer.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_train_and_eval_are_the_same() -> None:
    layer = quant_linear()
    assert layer.train() is layer and not layer.training
    assert not layer.eval().training


def test_packed_weight_is_one_copy() -> None:
    layer = quant_linear("w8a8", dtype=torch.bfloat16, bias=False)
    assert isinstance(layer, PackedWeight)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in layer.buffers()}
    assert sum(held.values()) == layer.nbytes == N * K + 2 * N
    assert not list(layer.parameters())


@pytest.mark.parametrize("place", ["linear", "parameter"])
def test_what_code_asks_a_weight_for(place: str) -> None:
    w: Any = quant_linear(dtype=torch.bfloat16).weight if place == "linear" else quant_weight(transposed=False)
    dtype = torch.bfloat16 if place == "linear" else torch.float32
    assert (w.data.dtype, w.detach().shape, w.itemsize) == (dtype, (N, K), dtype.itemsize)
    assert w.is_floating_point() and w.element_size() == dtype.itemsize and w.numel() == N * K
    assert not w.data.is_cuda and not w.data.is_meta and w.data.grad is None and w.data.contiguous().shape == (N, K)
    x = torch.randn(3, K)
    same = F.linear(x, w)
    for cast in (w.to(torch.float32), w.to(x), w.to("cpu", torch.float32), w.float(), w.type(torch.float32),
                 w.type_as(x), w.data.float()):
        assert cast.dtype == torch.float32 and cast.T.dtype == torch.float32
        assert torch.equal(F.linear(x, cast), same)
        assert torch.equal(x @ cast.T, same)
    assert w.half().dtype == torch.float16 and w.bfloat16().dtype == torch.bfloat16
    assert w.dtype == dtype  # as a tensor's, a cast leaves the weight itself alone
    with pytest.raises(PackedForInference, match=r"model\.to\(device\)"):
        w.data.to("meta")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("scheme", ["w4a8", "w8a16"])
def test_jit_traces_and_says_that_it_cannot_script(scheme: str) -> None:
    layer = quant_linear(scheme)
    with torch.no_grad():
        traced = torch.jit.trace(layer, torch.randn(3, K), check_trace=False)
        x = torch.randn(5, K)
        assert torch.equal(traced(x), layer(x))
    with pytest.raises(PackedForInference, match=r"torch\.export"):
        torch.jit.script(nn.Sequential(layer))
