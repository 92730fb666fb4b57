"""Capture: which way gives the graph, from which inputs, and that the model is left as it was found."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qpass.capture.capture_model as capture_module
from qpass.capture.capture_model import Capture, capture
from qpass.capture.dynamo_graphs import record_dynamo
from qpass.capture.example_inputs import example_of
from qpass.errors import CaptureError
from qpass.find.find_sites import find


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


def read_parameters(captured: Capture) -> set[str]:
    assert captured.graph_module is not None, captured.notes
    return {str(n.target) for n in captured.graph_module.graph.nodes if n.op == "get_attr"} & captured.parameters


def noted(captured: Capture, text: str) -> bool:
    return any(text in note for note in captured.notes)


def test_graph_is_aten_and_reads_parameters_by_qualified_name() -> None:
    captured = capture(Mlp(), torch.randn(2, 3, 8))
    assert captured.method == "trace"
    assert read_parameters(captured) == {"up.weight", "up.bias", "down.weight", "down.bias"}
    targets = [str(n.target) for n in captured.graph_module.graph.nodes]  # type: ignore[union-attr]
    assert targets.count("aten.addmm.default") == 2 and "aten.silu.default" in targets
    assert noted(captured, "graph: trace")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_real_or_meta(device: str) -> None:
    model = Mlp().to(device)
    assert len(read_parameters(capture(model))) == 4
    assert {p.device.type for p in model.parameters()} == {device}


@pytest.mark.parametrize("given", [None, torch.zeros(2, 8)])
def test_weights_on_meta_beside_real_buffers(given: Tensor | None) -> None:
    """A model to be filled from a checkpoint: what it computed at construction is real."""
    model = nn.Sequential(Mlp().to("meta"), nn.BatchNorm1d(8, affine=False))
    captured = capture(model, given)
    assert captured.method == "trace", captured.notes
    assert len(read_parameters(captured)) == 4
    assert model[0].up.weight.is_meta and not model[1].running_mean.is_meta


def test_fake_weights() -> None:
    with torch._subclasses.FakeTensorMode():
        model = Mlp()
    assert len(read_parameters(capture(model, torch.randn(2, 8)))) == 4


@pytest.mark.parametrize("inputs", [torch.zeros(2, 8), (torch.zeros(2, 8),), {"x": torch.zeros(2, 8)}],
                         ids=["tensor", "tuple", "dict"])
def test_example_inputs_in_each_form(inputs: Any) -> None:
    captured = capture(Mlp(), inputs)
    assert captured.method == "trace" and noted(captured, "example inputs given")


def test_inputs_deduced_from_the_first_linear() -> None:
    captured = capture(Mlp())
    assert captured.method == "trace" and noted(captured, "floats of shape [2, 8]")


def test_inputs_deduced_as_token_ids() -> None:
    captured = capture(nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 4)))
    assert captured.method == "trace" and noted(captured, "token ids")


def test_dummy_inputs_of_transformers_without_cache(tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("llama")
    captured = capture(model)
    assert captured.method == "trace" and noted(captured, "dummy_inputs")
    example = example_of(model)
    assert example is not None and example.kwargs["use_cache"] is False


def test_no_inputs_can_be_deduced() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.proj(x) + y

    captured = capture(Two())
    assert captured.method == "modules" and captured.graph_module is None
    assert noted(captured, "pass example_inputs")


def test_inputs_that_do_not_fit_are_noted() -> None:
    captured = capture(Mlp(), torch.zeros(2, 7))
    assert captured.method == "modules"
    assert noted(captured, "trace failed") and noted(captured, "export failed") and noted(captured, "dynamo failed")


def test_not_a_model() -> None:
    with pytest.raises(CaptureError, match=r"takes an nn\.Module"):
        capture("llama")  # type: ignore[arg-type]


class Restless(nn.Module):
    """A forward that changes everything it can reach."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(1))
        self.seen: list[Any] = []
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        self.seen.append(x)
        self.count += 1
        self.extra = nn.Linear(2, 2)
        y = self.drop(self.norm(self.proj(x)))
        self.train()
        if self.fails:
            raise ValueError("no")
        return y


@pytest.mark.parametrize("fails", [False, True], ids=["works", "raises"])
def test_model_is_left_as_found(fails: bool) -> None:
    model = Restless(fails)
    model.drop.eval()
    calls: list[int] = []
    model.proj.register_forward_hook(lambda *_: calls.append(1))
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    values = {name: tensor.clone() for name, tensor in tensors.items()}
    flags = {name: module.training for name, module in model.named_modules()}
    attributes = set(vars(model))
    x = torch.randn(3, 4)
    rng = torch.get_rng_state()
    captured = capture(model, x)
    assert (captured.method == "modules") is fails
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert all(after[name] is tensors[name] for name in tensors) and len(after) == len(tensors)
    assert all(torch.equal(after[name], values[name]) for name in tensors)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert set(vars(model)) == attributes and model.seen == []
    assert len(model.proj._forward_hooks) == 1 and not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks and not torch.compiler.is_compiling()
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_module_under_two_names_keeps_its_parameters() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    weight = shared.weight
    assert capture(model).aliases == {"0.weight": ("2.weight",), "0.bias": ("2.bias",)}
    assert shared.weight is weight and type(shared.weight) is nn.Parameter


def test_gradients_stay_enabled_and_are_not_made() -> None:
    model = Mlp()
    capture(model)
    assert torch.is_grad_enabled() and all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("chosen", ["eager", "batched_mm", "grouped_mm"])
def test_experts_are_captured_whatever_the_setting(chosen: str, tiny_model: Callable[..., nn.Module]) -> None:
    model = tiny_model("mixtral")
    model.config._experts_implementation = chosen
    captured = capture(model)
    assert captured.method == "trace"
    assert {name for name in read_parameters(captured) if "experts" in name} == {
        f"model.layers.{layer}.mlp.experts.{leaf}" for layer in (0, 1) for leaf in ("gate_up_proj", "down_proj")}
    assert model.config._experts_implementation == chosen
    assert noted(captured, "experts: captured as") is (chosen != "grouped_mm")


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y) if y.sum() > 0 else self.c(y)


def test_data_dependent_branch_is_guessed_and_said() -> None:
    model = Branches()
    captured = capture(model, torch.randn(2, 4))
    assert noted(captured, "trace failed") and noted(captured, "export failed") and noted(captured, "dynamo failed")
    assert noted(captured, "asks 1 times for a number that depends on data")
    assert {site.name: site.uses for site in find(model, captured)} == {"a.weight": 1, "b.weight": 1, "c.weight": 0}


def test_an_endless_loop_on_data_ends() -> None:
    class Endless(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            while x.sum() > 0:
                x = x - 1
            return self.up(x)

    captured = capture(Endless(), torch.randn(2, 8))
    assert captured.method == "modules" and noted(captured, "more than 1000 numbers")


class Numpy(Mlp):
    """NumPy in the forward: fake tensors have no array to give, Dynamo turns it into torch calls."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(torch.from_numpy(y.numpy() * 2))


def test_dynamo_where_the_others_fail() -> None:
    model = Numpy()
    captured = capture(model, torch.randn(2, 8))
    assert captured.method == "dynamo", captured.notes
    assert noted(captured, "trace failed") and noted(captured, "export failed")
    assert {s.name: (s.uses, s.swap) for s in find(model, captured)} == {
        "up.weight": (1, "module"), "down.weight": (1, "module")}


class Broken(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        torch._dynamo.graph_break()
        return self.down(y)


def test_dynamo_graphs_are_joined_where_they_were_broken() -> None:
    model = Broken()
    weight = model.up.weight
    example = example_of(model, torch.randn(2, 8))
    assert example is not None
    from qpass.capture.as_found import left_as_found

    with left_as_found(model), torch.no_grad():
        graph = record_dynamo(model, example).graph
    products = [n for n in graph.nodes if n.target is torch.ops.aten.addmm.default]
    assert len(products) == 2
    assert products[0] in products[1].all_input_nodes  # the second piece reads what the first computed
    assert [n.meta["scope"][-1].path for n in products] == ["up", "down"]
    assert model.up.weight is weight


def test_export_where_the_trace_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("not today")

    monkeypatch.setattr(capture_module, "_trace", fail)
    model = Mlp()
    captured = capture(model, torch.randn(2, 8))
    assert captured.method == "export" and noted(captured, "trace failed: RuntimeError: not today")
    sites = find(model, captured)
    assert [(s.name, s.swap, s.owner_class) for s in sites] == [
        ("up.weight", "module", "Linear"), ("down.weight", "module", "Linear")]
    assert sites[1].produced_by == "silu"


def test_exported_program() -> None:
    program = torch.export.export(Mlp(), (torch.randn(2, 8),), strict=False)
    captured = capture(program)
    assert captured.method == "given"
    sites = find(program, captured)
    assert [(s.name, s.bias, s.owner_class, s.shape) for s in sites] == [
        ("up.weight", "up.bias", "Linear", (12, 8)), ("down.weight", "down.bias", "Linear", (8, 12))]


def test_exported_program_with_a_region_under_no_grad() -> None:
    class Part(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = self.up(x)
            return self.down(y)

    program = torch.export.export(Part(), (torch.randn(2, 8),), strict=False)
    assert [site.name for site in find(program, capture(program))] == ["up.weight", "down.weight"]


def test_graph_modules_of_both_levels() -> None:
    model = Mlp()
    for graph_module in (torch.fx.symbolic_trace(model),
                         torch.export.export(model, (torch.randn(2, 8),), strict=False).module()):
        captured = capture(graph_module, torch.randn(2, 8))
        assert captured.method == "given"
        assert [s.name for s in find(graph_module, captured)] == ["up.weight", "down.weight"]


def test_a_buffer_in_a_product_is_noted() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.table

    model = Frozen()
    captured = capture(model, torch.randn(2, 8))
    assert noted(captured, "table is a buffer") and find(model, captured) == ()


def test_hooks_of_the_user_do_not_see_the_capture() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    seen: list[Any] = []

    def record(module: nn.Module, args: Any, output: Any = None) -> None:
        seen.append(args[0].numpy())

    handles = [model[0].register_forward_hook(record), model.register_forward_pre_hook(record),
               model[1].register_forward_hook(partial(record), always_call=True),
               nn.modules.module.register_module_forward_hook(record)]
    try:
        assert capture(model, torch.randn(3, 4)).method == "trace"
        assert seen == []
        with torch.no_grad():
            model(torch.randn(3, 4))
        assert len(seen) == 6  # 1 before the model, 1 on each linear, 1 everywhere for the three modules
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_hook_that_computes_the_weight_is_part_of_the_model() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)))
    assert {"0.weight_g", "0.weight_v"} <= read_parameters(capture(model, torch.randn(3, 4)))


def test_ways_that_fail_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    captured = capture(nn.Linear(4, 4), torch.randn(3, 5))
    assert captured.method == "modules" and any("failed" in note for note in captured.notes)
    assert capfd.readouterr() == ("", "")
