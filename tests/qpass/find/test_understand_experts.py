"""Modules of experts in the shapes that people write: understood by what they compute, or refused with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qpass
from qpass.capture.capture_model import capture
from qpass.errors import LayerRefused
from qpass.find.find_sites import find
from qpass.layers.experts_layer import QuantExperts
from qpass.site import Site

E, H, N = 5, 32, 64
Forward = Callable[..., Tensor]


class Experts(nn.Module):
    """Holds parameters by name; `forward` is what a test gives it."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], forward: Forward) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=draw) / 6))
        self.compute = forward

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return self.compute(self, x, index, weight)


class Scored(Experts):
    def forward(self, x: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        return self.compute(self, x, scores)


class Mixture(nn.Module):
    def __init__(self, experts: nn.Module, top_k: int = 2) -> None:
        super().__init__()
        self.gate, self.experts, self.top_k = nn.Linear(H, E, bias=False), experts, top_k
        self.scored = isinstance(experts, Scored)

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.gate(x).softmax(-1).topk(self.top_k, -1)
        if self.scored:
            return self.experts(x, torch.zeros(x.shape[0], E).scatter(1, index, weight))
        return self.experts(x, index, weight)


def gathered(s: Any, x: Tensor, index: Tensor, weight: Tensor, between: Callable[[Tensor], Tensor]) -> Tensor:
    """bmm with gathered weights, W x."""
    ids, rows = index.reshape(-1), x.repeat_interleave(index.shape[1], 0).unsqueeze(-1)
    y = torch.bmm(s.up[ids], rows).squeeze(-1)
    z = torch.bmm(s.down[ids], between(y).unsqueeze(-1)).squeeze(-1)
    return (z * weight.reshape(-1, 1)).view(*index.shape, -1).sum(1)


def silu_halves(y: Tensor) -> Tensor:
    g, u = y.chunk(2, -1)
    return F.silu(g) * u


def up_halves_first(y: Tensor) -> Tensor:
    u, g = y.chunk(2, -1)
    return F.gelu(g, approximate="tanh") * u


def alternating(y: Tensor) -> Tensor:
    g, u = y[..., ::2].clamp(max=3.0), y[..., 1::2].clamp(-2.0, 2.0)
    return (u + 1) * (g * torch.sigmoid(g * 1.5))


def loop(s: Any, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """A Python loop over all experts, each on all tokens."""
    y = torch.zeros_like(x)
    for e in range(E):
        share = (weight * (index == e)).sum(-1, keepdim=True)
        y = y + share * F.linear(silu_halves(F.linear(x, s.up[e])), s.down[e])
    return y


def apart(s: Any, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """gate and up in parameters of their own, all experts at once, stored [E, K, N]."""
    wide = x.expand(E, *x.shape)
    z = torch.bmm(F.silu(torch.bmm(wide, s.w1)) * torch.bmm(wide, s.w3), s.w2)
    share = torch.zeros(x.shape[0], E).scatter_add(1, index, weight)
    return (z * share.t().unsqueeze(-1)).sum(0)


def einsum_scored(s: Any, x: Tensor, scores: Tensor) -> Tensor:
    h = torch.relu(torch.bmm(x.expand(E, *x.shape), s.up.transpose(1, 2))).square()
    return (torch.bmm(h, s.down.transpose(1, 2)) * scores.t().unsqueeze(-1)).sum(0)


def biased(s: Any, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    ids, rows = index.reshape(-1), x.repeat_interleave(index.shape[1], 0).unsqueeze(1)
    y = torch.bmm(rows, s.up[ids]).squeeze(1) + s.up_bias[ids]
    z = torch.bmm(alternating(y).unsqueeze(1), s.down[ids]).squeeze(1) + s.down_bias[ids]
    return (z * weight.reshape(-1, 1)).view(*index.shape, -1).sum(1)


def indexed_loop(s: Any, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """A Python loop in which each expert takes the tokens that chose it: sizes depend on data."""
    y = torch.zeros_like(x)
    for e in range(E):
        rows, place = torch.where(index == e)
        if rows.numel() > 0:
            z = F.linear(silu_halves(F.linear(x[rows], s.up[e])), s.down[e])
            y.index_add_(0, rows, z * weight[rows, place, None])
    return y


def counted_loop(s: Any, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Sizes read off a tensor decide which rows each expert gets: no one graph says what all data would give."""
    order, start, y = index.flatten().argsort(), 0, torch.zeros_like(x)
    for e, count in enumerate(torch.bincount(index.flatten(), minlength=E).tolist()):
        at = order[start:start + count]
        start, rows = start + count, at // index.shape[1]
        z = F.linear(silu_halves(F.linear(x[rows], s.up[e])), s.down[e])
        y.index_add_(0, rows, z * weight.flatten()[at, None])
    return y


HALVES = {"up": (E, 2 * N, H), "down": (E, H, N)}
UNDERSTOOD: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "gathered": (lambda: Experts(HALVES, lambda *a: gathered(*a, silu_halves)), "silu*up", "one after the other"),
    "up first": (lambda: Experts(HALVES, lambda *a: gathered(*a, up_halves_first)), "gelu_tanh*up",
                 "one after the other"),
    "alternating": (lambda: Experts(HALVES, lambda *a: gathered(*a, alternating)),
                    "silu(alpha=1.5,limit=3.0)*up(limit=2.0,shift=1.0)", "alternating"),
    "no gate": (lambda: Experts({"up": (E, N, H), "down": (E, H, N)}, lambda *a: gathered(*a, F.gelu)), "gelu",
                "single"),
    "loop": (lambda: Experts(HALVES, loop), "silu*up", "one after the other"),
    "indexed loop": (lambda: Experts(HALVES, indexed_loop), "silu*up", "one after the other"),
    "apart": (lambda: Experts({"w1": (E, H, N), "w3": (E, H, N), "w2": (E, N, H)}, apart), "silu*up", "apart"),
    "scored": (lambda: Scored({"up": (E, N, H), "down": (E, H, N)}, einsum_scored), "relu2", "single"),
    "biased": (lambda: Experts({"up": (E, H, 2 * N), "up_bias": (E, 2 * N), "down": (E, N, H), "down_bias": (E, H)},
                               biased), "silu(alpha=1.5,limit=3.0)*up(limit=2.0,shift=1.0)", "alternating"),
}


def sites_of(model: nn.Module) -> dict[str, Site]:
    return {site.name: site for site in find(model, capture(model, torch.randn(9, H))) if site.kind == "experts"}


@pytest.mark.parametrize("shape", UNDERSTOOD)
def test_understood_and_computed(shape: str) -> None:
    made, gate, rows = UNDERSTOOD[shape]
    model = Mixture(made()).eval()
    weights = {f"experts.{name}" for name, p in model.experts.named_parameters() if p.ndim == 3}
    sites = sites_of(model)
    assert {name: site.refusal for name, site in sites.items()} == dict.fromkeys(weights)
    understood = next(iter(sites.values())).experts
    assert understood is not None and (str(understood.gate), understood.rows) == (gate, rows)
    x = torch.randn(11, H) * 3
    with torch.no_grad():
        before = model(x)
        qpass.quantize(model, qpass.Recipe(None, overrides={"experts": "w8a16"}), example_inputs=x, progress=False)
        assert isinstance(model.experts, QuantExperts)
        got = model(x)
        qpass.dequantize(model)
        want = model(x)
    assert {name for name, p in model.named_parameters() if p.ndim == 3} == weights
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    assert 0 < float((want - before).abs().max()) < 0.05 * float(before.abs().max())


REFUSED = {
    "unknown function": (lambda *a: gathered(*a, lambda y: torch.sin(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1]),
                         r"between its two products that was not understood: mul\(sin\(.*up\(x\)"),
    "scaled result": (lambda *a: gathered(*a, silu_halves) * 3.0, r"not the weighted sum .*: mul\(.*3\.0\)"),
    "counted loop": (counted_loop, r"not the weighted sum .*: index_add"),
    "weight before": (lambda s, x, i, w: gathered(s, x, i, w * w, silu_halves), "not the weighted sum"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(case: str) -> None:
    forward, told = REFUSED[case]
    model = Mixture(Experts(HALVES, forward)).eval()
    for site in sites_of(model).values():
        assert site.swap is None and site.experts is None
    with pytest.raises(LayerRefused, match=told):
        qpass.plan(model, qpass.Recipe(None, overrides={"experts": "w8a8"}), example_inputs=torch.randn(9, H))


def test_products_beside_a_router_in_one_forward_are_refused() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Parameter(torch.randn(H, E))
            self.up, self.down = nn.Parameter(torch.randn(E, 2 * N, H)), nn.Parameter(torch.randn(E, H, N))

        def forward(self, x: Tensor) -> Tensor:
            weight, index = (x @ self.router).softmax(-1).topk(2, -1)
            return gathered(self, x, index, weight, silu_halves)

    sites = sites_of(Whole().eval())
    assert set(sites) == {"up", "down"}
    assert all(site.swap is None and "its experts stay in float" in (site.refusal or "") for site in sites.values())


def test_layers_of_one_shape_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from qpass.find import understand_experts

    tried = []
    real = understand_experts._understand
    monkeypatch.setattr(understand_experts, "_understand", lambda *a: tried.append(a[0]) or real(*a))
    model = nn.Sequential(*(Mixture(Experts(HALVES, loop)) for _ in range(3))).eval()
    assert [site.swap for site in sites_of(model).values()] == ["module"] * 6
    assert tried == ["0.experts"]


def test_lists_of_linears_are_ordinary_layers() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(H, E, bias=False)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, N), nn.SiLU(), nn.Linear(N, H)) for _ in range(E))

        def forward(self, x: Tensor) -> Tensor:
            weight, index = self.gate(x).softmax(-1).topk(2, -1)
            y = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                rows, place = torch.where(index == e)
                y.index_add_(0, rows, expert(x[rows]) * weight[rows, place, None])
            return y

    model, x = Listed().eval(), torch.randn(7, H)
    plan = qpass.plan(model, "w8a8", example_inputs=x)
    assert [row.name for row in plan.rows if row.status == "quantize"] == [
        f"experts.{e}.{at}.weight" for e in range(E) for at in (0, 2)] or len(
            [row for row in plan.rows if row.status == "quantize" and row.name.startswith("experts.")]) == 2 * E
    with torch.no_grad():
        before = model(x)
        qpass.quantize(model, "w8a8", example_inputs=x, progress=False)
        assert float((model(x) - before).abs().max()) < 0.1 * float(before.abs().max())


def test_rules_for_single_experts() -> None:
    model = Mixture(Experts(HALVES, loop)).eval()
    x = torch.randn(9, H)
    recipe = qpass.Recipe("w8a8", overrides={"*.up[1]": "w4a8_channel", "experts.down[2:4]": None})
    plan = qpass.plan(model, recipe, example_inputs=x)
    up, down = (next(d for d in plan.decisions if d.site.name == f"experts.{leaf}") for leaf in ("up", "down"))
    assert [s.family if s else "float" for s in up.experts] == ["w8a8", "w4a8", "w8a8", "w8a8", "w8a8"]
    assert [s.family if s else "float" for s in down.experts] == ["w8a8", "w8a8", "float", "float", "w8a8"]
    assert "1 experts w4a8" in up.reason
    with torch.no_grad():
        before = model(x)
        qpass.quantize(model, recipe, example_inputs=x, progress=False)
        assert len(model.experts.blocks) == 3
        assert float((model(x) - before).abs().max()) < 0.2 * float(before.abs().max())
        assert torch.allclose(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x), atol=1e-5)
    torch._dynamo.reset()
    with pytest.raises(ValueError, match="has 5, counted from 0"):
        qpass.plan(Mixture(Experts(HALVES, loop)), qpass.Recipe("w8a8", overrides={"*.up[5]": None}), example_inputs=x)
