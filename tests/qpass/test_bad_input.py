"""Bad input to quantize: a clear error that names the layer, and nothing lost; or the odd case simply works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpass
import qpass.swap.swap_site
import qpass.weight
from qpass.errors import (
    AlreadyCompiled,
    AlreadyQuantized,
    NothingQuantized,
    PackedForInference,
    QPassError,
    RecipeError,
    WeightError,
)
from qpass.layers.packed_layers import PackedWeight

X = torch.randn(5, 64)


def net(width: int = 64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval()


def quantize(model: Any, recipe: Any = "w4a8", x: Tensor = X, **options: Any) -> Any:
    return qpass.quantize(model, recipe, example_inputs=(x,), progress=False, **options)


def packed(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, PackedWeight)]


def refused(model: nn.Module, error: type[Exception], said: str, recipe: Any = "w4a8", **options: Any) -> None:
    """quantize raises `error` saying `said`, and leaves the model as it was."""
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    with pytest.raises(error, match=said):
        quantize(model, recipe, **options)
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    for name, (tensor, copy) in before.items():
        assert after[name] is tensor
        assert tensor.is_meta or torch.equal(tensor.nan_to_num(0), copy.nan_to_num(0))


def test_wrong_preset_name() -> None:
    refused(net(), RecipeError, r"no scheme is named 'w4a9'; closest: .*w4a8", "w4a9")


def test_not_a_model() -> None:
    with pytest.raises(TypeError, match=r"nn\.Module"):
        qpass.quantize({"weight": X}, "w4a8")


def test_weights_that_are_no_floats() -> None:
    class Codes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 64)
            self.codes = nn.Parameter(torch.ones(64, 64, dtype=torch.int8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) @ self.codes.to(x.dtype)

    model = quantize(Codes())
    assert packed(model) == ["first"]
    with pytest.raises(WeightError, match=r"layer\.weight has dtype torch\.int8"):
        qpass.weight.check_weight(torch.ones(4, 4, dtype=torch.int8), "layer.weight")


def test_weights_on_meta() -> None:
    with torch.device("meta"):
        model = net()
    with pytest.raises(WeightError, match=r"0\.weight is on the meta device .*qpass\.plan"):
        quantize(model)
    assert not packed(model)


def test_a_model_on_two_devices() -> None:
    model = net()
    model[2].to("meta")
    refused(model, WeightError, r"2\.weight is on the meta device")
    model = net()
    real = torch.nn.Module.get_parameter

    class Elsewhere:
        """A weight that says it is on another device; this machine may have one only."""

        def __init__(self, weight: Tensor) -> None:
            self.weight, self.device = weight, torch.device("cuda:1")

        def __getattr__(self, name: str) -> Any:
            return getattr(self.weight, name)

    model.get_parameter = lambda name: Elsewhere(real(model, name)) if name == "4.weight" else real(model, name)
    refused(model, WeightError, r"2 devices \(0\.weight is on cpu; 4\.weight is on cuda:1\).*model\.to\(device\)")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_non_finite_weights_are_named_and_quantized_only_if_told(value: float, dtype: torch.dtype) -> None:
    model = net().to(dtype)
    model[2].weight.data[3, 5] = value
    kind = r"1 NaN and 0 Inf" if value != value else r"0 NaN and 1 Inf"
    refused(model, WeightError, rf"2\.weight holds {kind}.*allow_nonfinite=True", x=X.to(dtype))
    quantize(model, x=X.to(dtype), allow_nonfinite=True)
    assert len(packed(model)) == 3
    weight = model[2].dequantize(torch.float32)
    assert torch.isfinite(weight).all() and weight[3, 5] == 0
    assert torch.isfinite(model(X.to(dtype))).all()


@pytest.mark.parametrize("scheme", ["w4a8", "w8a8", "w4a16_asym", "w8a16", "w4a8_channel"])
def test_zero_rows_and_zero_weights(scheme: str) -> None:
    model = net()
    model[0].weight.data[7] = 0
    model[2].weight.data.zero_()
    model[4].weight.data[:, :32] = 0
    quantize(model, scheme)
    assert not model[0].dequantize()[7].any() and not model[2].dequantize().any()
    y = model[2](torch.randn(3, 64))
    assert torch.equal(y, model[2].bias.expand(3, 64))
    assert torch.isfinite(model(X)).all()
    assert torch.equal(model[2](torch.zeros(2, 64)), model[2].bias.expand(2, 64))


@pytest.mark.parametrize("scheme", ["w4a8", "w8a8", "w4a16_asym", "w3a16", "w4a8_channel"])
@pytest.mark.parametrize(("k", "n"), [(1, 1), (1, 64), (64, 1), (97, 13), (3, 5), (127, 2)])
def test_small_and_prime_sizes(scheme: str, k: int, n: int) -> None:
    model = nn.Sequential(nn.Linear(k, n)).eval()
    quantize(model, scheme, torch.randn(2, k))
    assert packed(model) == ["0"]
    for batch in ((), (1,), (3,), (2, 0), (2, 3)):
        x = torch.randn(*batch, k)
        y = model(x)
        assert y.shape == (*batch, n) and torch.isfinite(y).all()
    w = model[0].dequantize(torch.float32)
    assert w.shape == (n, k)
    asked = qpass.PRESETS[scheme].weight.group_size
    assert ("does not divide" in qpass.explain(model).rows[0].reason) == (asked is not None and k % asked != 0)


def test_size_zero_stays_float_and_is_told() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 0), nn.Linear(0, 64)).eval()
    quantize(model, "w8a8")
    assert packed(model) == ["0"]
    told = {row.name: (row.status, row.reason) for row in qpass.explain(model).rows}
    assert all(told[name][0] == "refused" and "holds no numbers" in told[name][1] for name in ("1.weight", "2.weight"))
    assert model(X).shape == (5, 64)
    with pytest.raises(NothingQuantized, match="holds no numbers"):
        quantize(nn.Sequential(nn.Linear(64, 0)), "w8a8")


def test_weights_near_the_end_of_float16() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 32, bias=False)).half().eval()
    model[0].weight.data.copy_((torch.rand(32, 64) * 2 - 1) * 65504)
    model[0].weight.data[:, 0] = 65504
    x = torch.rand(4, 64).half() * 1e-3
    big = torch.full((1, 64), 1000.0).half()
    before, over = model(x), model(big)
    for scheme in ("w4a8", "w8a8", "w4a16", "w4a16_asym", "w2a16", "w8a16"):
        one = nn.Sequential(nn.Linear(64, 32, bias=False)).half().eval()
        one[0].weight.data.copy_(model[0].weight.data)
        quantize(one, scheme, x)
        state = one.state_dict()
        assert torch.isfinite(state["0.weight_scale"]).all(), scheme
        y = one(x)
        assert y.dtype == torch.float16 and torch.isfinite(y).all()
        bits = one[0].spec.weight.bits
        assert (y.float() - before.float()).norm() < {2: 0.9, 4: 0.25, 8: 0.03}[bits] * before.float().norm(), scheme
        if bits == 8:
            assert torch.equal(torch.isinf(one(big)), torch.isinf(over))


def test_compiled_models() -> None:
    model = net()
    refused(torch.compile(model, backend="eager"), AlreadyCompiled, "quantize the model first")  # type: ignore[arg-type]
    model.compile(backend="eager")
    refused(model, AlreadyCompiled, "this model is compiled already")
    model = net()
    model[2] = torch.compile(model[2], backend="eager")  # type: ignore[assignment]
    refused(model, AlreadyCompiled, "2 is compiled already")


def test_already_quantized() -> None:
    model = quantize(net())
    y = model(X)
    with pytest.raises(AlreadyQuantized, match=r"3 layers .* the first is 0; qpass\.dequantize"):
        quantize(model)
    assert torch.equal(model(X), y)


@pytest.mark.parametrize("after", range(4))
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupted_in_the_middle(monkeypatch: pytest.MonkeyPatch, after: int, error: type[BaseException]) -> None:
    model = net()
    before, real, calls = model(X), qpass.swap.swap_site.quantized, [0]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(qpass.swap.swap_site, "quantized", interrupted)
    if after == 3:
        assert len(packed(quantize(model, "w8a16"))) == 3
        return
    with pytest.raises(error) as raised:
        quantize(model, "w8a16")
    assert any(f"after {after} of 3 layers" in note for note in raised.value.__notes__)
    monkeypatch.undo()
    assert packed(model) == ["0", "2", "4"][:after]
    assert (model(X) - before).norm() < 0.02 * before.norm()
    if after == 0:
        assert torch.equal(model(X), before) and model.train().training
        with pytest.raises(QPassError, match="not quantized by qpass"):
            qpass.explain(model)
        quantize(model)
        return
    statuses = [(row.status, row.reason) for row in qpass.explain(model).rows]
    assert [status for status, _ in statuses] == ["quantized"] * after + ["kept"] * (3 - after)
    assert "interrupted" in statuses[-1][1]
    with pytest.raises(PackedForInference):
        model.train()
    quantize(qpass.dequantize(model))
    assert len(packed(model)) == 3


def test_interrupted_between_the_places_of_one_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    """However far one swap got, each product still has exactly one weight, float or packed."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    model[1].weight = model[0].weight
    before, put, calls = model(X), qpass.swap.swap_site.put_everywhere, [0]

    def interrupted(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        put(*args)

    monkeypatch.setattr(qpass.swap.swap_site, "put_everywhere", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, "w8a16")
    assert packed(model) == ["0"]
    assert (model(X) - before).norm() < 0.02 * before.norm()


@pytest.mark.parametrize("change", [lambda m: m.train(), lambda m: m.type(torch.float16)], ids=["train", "type"])
def test_what_packed_layers_refuse_leaves_the_model_usable(change: Callable[[nn.Module], Any]) -> None:
    model = quantize(net())
    y = model(X)
    with pytest.raises(PackedForInference):
        change(model)
    assert torch.equal(model.eval()(X), y)


@pytest.mark.parametrize(("device", "said"), [
    ("meta", "holds no numbers"), ("no_such", r"device='no_such' cannot be used here"),
    pytest.param("cuda", r"device='cuda' cannot be used here", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="needs a machine without CUDA")),
])
def test_a_device_that_cannot_be_used(device: str, said: str) -> None:
    refused(net(), WeightError, said, device=device)


@pytest.mark.parametrize("scheme", ["w4a8", "w8a16", "w4a16_asym"])
def test_float64_weights(scheme: str) -> None:
    model = net().double()
    before = model(X.double())
    quantize(model, scheme, X.double())
    after = model(X.double())
    assert after.dtype == torch.float64
    assert (after - before).norm() < 0.3 * before.norm()
    assert all(row.bytes_after < row.bytes_before / 4 for row in qpass.explain(model).rows)
    qpass.dequantize(model)
    assert all(p.dtype == torch.float64 for p in model.parameters())
