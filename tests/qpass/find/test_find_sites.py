"""Find: each way to write a product is found, with its orientation, its swap or a refusal, and the facts around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qpass.capture.capture_model import capture
from qpass.find.find_sites import find
from qpass.site import Site

K, N = 8, 12


def sites_of(model: nn.Module, inputs: Any = None) -> dict[str, Site]:
    captured = capture(model, inputs)
    sites = find(model, captured)
    assert captured.method in ("trace", "given"), captured.notes
    assert len({site.name for site in sites}) == len(sites)
    for site in sites:
        assert (site.swap is None) == (site.refusal is not None)
        assert site.refusal is None or (site.name in site.refusal and len(site.refusal) > 60)
    return {site.name: site for site in sites}


def module_of(forward: Callable[[Any, Tensor], Tensor], *shape: int) -> nn.Module:
    """A module with a weight `w` and a bias `b` and this forward, which is more than one product."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(*shape))
            self.b = nn.Parameter(torch.randn(N))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(forward(self, x))

    return Written()


# text -> forward, shape of w, stored [K, N]?, bias found
PRODUCTS: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, int], bool, bool]] = {
    "F.linear": (lambda s, x: F.linear(x, s.w), (N, K), False, False),
    "F.linear with bias": (lambda s, x: F.linear(x, s.w, s.b), (N, K), False, True),
    "F.linear, weight by keyword": (lambda s, x: F.linear(x, weight=s.w), (N, K), False, False),
    "x @ w": (lambda s, x: x @ s.w, (K, N), True, False),
    "x @ w.T": (lambda s, x: x @ s.w.T, (N, K), False, False),
    "x @ w.T + b": (lambda s, x: x @ s.w.T + s.b, (N, K), False, True),
    "x @ w.t()": (lambda s, x: x @ s.w.t(), (N, K), False, False),
    "x @ w.transpose": (lambda s, x: x @ s.w.transpose(0, 1), (N, K), False, False),
    "x @ w.permute": (lambda s, x: x @ s.w.permute(1, 0), (N, K), False, False),
    "x @ w.mT": (lambda s, x: x @ s.w.mT, (N, K), False, False),
    "matmul": (lambda s, x: torch.matmul(x, s.w), (K, N), True, False),
    "mm": (lambda s, x: torch.mm(x[0], s.w), (K, N), True, False),
    "addmm": (lambda s, x: torch.addmm(s.b, x.reshape(-1, K), s.w), (K, N), True, True),
    "einsum bsk,kn": (lambda s, x: torch.einsum("bsk,kn->bsn", x, s.w), (K, N), True, False),
    "einsum bsk,nk": (lambda s, x: torch.einsum("bsk,nk->bsn", x, s.w), (N, K), False, False),
    "einsum nk,bsk": (lambda s, x: torch.einsum("nk,bsk->bsn", s.w, x), (N, K), False, False),
    "one row": (lambda s, x: x[0, 0] @ s.w, (K, N), True, False),
    "in inference_mode": (lambda s, x: torch.inference_mode()(F.linear)(x, s.w), (N, K), False, False),
}


@pytest.mark.parametrize("written", PRODUCTS)
def test_products_in_a_bigger_forward(written: str) -> None:
    forward, shape, transposed, has_bias = PRODUCTS[written]
    site = sites_of(module_of(forward, *shape), torch.randn(2, 3, K))["w"]
    assert (site.kind, site.swap, site.transposed, site.uses) == ("linear", "parameter", transposed, 1)
    assert (site.out_features, site.in_features) == (N, K)
    assert site.bias == ("b" if has_bias else None)
    assert site.produced_by == "the model's input" and "tanh" in site.consumers


# text -> forward, shape of w, word in the sentence
REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...], str]] = {
    "W @ x": (lambda s, x: (s.w @ x.transpose(1, 2)), (N, K), "left operand"),
    "a slice": (lambda s, x: x @ s.w[:, :4], (K, N), "slice"),
    "a chunk": (lambda s, x: x @ s.w.chunk(2, 1)[1], (K, N), "slice"),
    "reshaped": (lambda s, x: x @ s.w.view(K, N), (K, 3, 4), "reshaped"),
    "einsum over heads": (lambda s, x: torch.einsum("bsk,khd->bshd", x, s.w), (K, 3, 4), "reshaped"),
    "einsum out of order": (lambda s, x: torch.einsum("bsk,nk->nbs", x, s.w), (N, K), "einsum"),
    "cast": (lambda s, x: x.double() @ s.w.double(), (K, N), "cast to float64"),
    "scaled": (lambda s, x: x @ (s.w * 2), (K, N), "mul"),
    "merged": (lambda s, x: F.linear(x, s.w + s.w[:, :2] @ s.w[:2, :K]), (N, K), "add"),
    "read elsewhere": (lambda s, x: x @ s.w * s.w.sum(), (K, N), "also read by sum"),
    "both ways": (lambda s, x: (x @ s.w) @ s.w.T, (K, N), "both as stored and transposed"),
    "bmm": (lambda s, x: torch.bmm(x, s.w.expand(2, K, N)), (K, N), "bmm"),
    "addmm with alpha": (lambda s, x: torch.addmm(s.b, x[0], s.w, alpha=2), (K, N), "alpha"),
    "matmul, weight by keyword": (lambda s, x: torch.matmul(input=x, other=s.w), (K, N), "right"),
}


@pytest.mark.parametrize("written", REFUSED)
def test_products_that_cannot_be_swapped_say_why(written: str) -> None:
    forward, shape, word = REFUSED[written]
    site = sites_of(module_of(forward, *shape), torch.randn(2, 3, K))["w"]
    assert site.kind == "linear" and site.swap is None
    assert word in (site.refusal or "") and ("ignore" in (site.refusal or ""))


@pytest.mark.parametrize(("forward", "shape", "transposed"), [
    (lambda s, x: torch.bmm(x, s.w), (2, K, N), True),
    (lambda s, x: torch.matmul(x, s.w.transpose(1, 2)), (2, N, K), False),
    (lambda s, x: sum(F.linear(x, s.w[e]) for e in range(3)), (3, N, K), False),
    (lambda s, x: torch.bmm(s.w[torch.arange(4) % 3], x.reshape(-1, K)[:4].unsqueeze(-1)), (3, N, K), False),
    (lambda s, x: torch.bmm(x.reshape(-1, 1, K)[:4], s.w[x.argmax(-1).view(-1)[:4] % 3]), (3, K, N), True),
], ids=["bmm", "batched matmul", "loop", "gathered, W x", "gathered, x W"])
def test_products_with_a_parameter_per_expert(forward: Any, shape: tuple[int, ...], transposed: bool) -> None:
    site = sites_of(module_of(forward, *shape), torch.randn(2, 3, K))["w"]
    assert (site.kind, site.transposed, site.swap) == ("experts", transposed, None)
    assert (site.out_features, site.in_features) == (N, K)
    assert "stay in float" in (site.refusal or "")  # one product alone is no layer of experts


class TransposedLinear(nn.Module):
    """y = x @ w + b with w [K, N], flattening what it is given, as the oldest Transformers models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(K, N)), nn.Parameter(torch.randn(N))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b, x.view(-1, x.size(-1)), self.w).view((*x.shape[:-1], N))


class SubclassedLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class PairLinear(nn.Linear):
    def forward(self, input: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(input), None


class LastLinear(nn.Linear):
    def forward(self, input: Tensor, flip: bool = False) -> Tensor:
        return super().forward(input)


class TurningLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize(("owner", "swap"), [
    (lambda: nn.Linear(K, N), "module"), (lambda: nn.Linear(K, N, bias=False), "module"),
    (TransposedLinear, "module"), (lambda: SubclassedLinear(K, N), "module"),
    (lambda: LastLinear(K, N), "parameter"), (lambda: TurningLinear(K, N), "parameter"),
], ids=["Linear", "no bias", "transposed", "subclass", "more arguments", "turns its input"])
def test_an_owner_that_is_nothing_but_the_product(owner: Callable[[], nn.Module], swap: str) -> None:
    model = nn.Sequential(nn.LayerNorm(K), owner(), nn.GELU())
    (site,) = sites_of(model, torch.randn(2, 2, K)).values()
    assert site.swap == swap and site.owner == "1" and site.owner_class == type(model[1]).__name__
    assert site.produced_by == "0 (LayerNorm)" and site.consumers == ("gelu",)
    assert site.transposed is isinstance(model[1], TransposedLinear)
    assert site.bias == (None if getattr(model[1], "bias", 0) is None else
                         "1.b" if isinstance(model[1], TransposedLinear) else "1.bias")


def test_an_owner_that_returns_a_tuple_keeps_its_forward() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = PairLinear(K, N)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x)[0]

    assert sites_of(Outer(), torch.randn(2, K))["proj.weight"].swap == "parameter"


def test_the_parents_of_a_linear_may_read_its_weight() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.other = nn.Linear(K, N), nn.Linear(K, N)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.proj.weight) + self.other(x.to(self.other.weight.dtype))

    sites = sites_of(Outer(), torch.randn(2, K))
    assert (sites["proj.weight"].swap, sites["proj.weight"].bias) == ("parameter", None)
    assert sites["other.weight"].swap == "module"  # reading the dtype is no use of its numbers


def test_one_parameter_used_twice() -> None:
    model = module_of(lambda s, x: F.linear(x, s.w) + F.linear(x + 1, s.w), N, K)
    site = sites_of(model, torch.randn(2, K))["w"]
    assert (site.uses, site.swap, site.shared_input) == (2, "parameter", None)


def test_one_module_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(K, K)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(torch.relu(self.proj(x)))

    site = sites_of(Twice())["proj.weight"]
    assert (site.uses, site.swap, site.bias) == (2, "module", "proj.bias")


def test_one_module_under_two_names() -> None:
    shared = nn.Linear(K, K)
    (site,) = sites_of(nn.Sequential(shared, nn.ReLU(), shared)).values()
    assert (site.name, site.aliases, site.uses, site.swap) == ("0.weight", ("2.weight",), 2, "module")


def test_two_linears_with_one_parameter() -> None:
    model = nn.Sequential(nn.Linear(K, K), nn.ReLU(), nn.Linear(K, K))
    model[2].weight = model[0].weight
    (site,) = sites_of(model).values()
    assert (site.name, site.aliases, site.uses, site.swap) == ("0.weight", ("2.weight",), 2, "module")
    assert site.bias is None  # each adds its own


def test_tied_head_and_embedding() -> None:
    model = nn.Sequential(nn.Embedding(11, K), nn.Linear(K, 11, bias=False))
    model[1].weight = model[0].weight
    sites = sites_of(model)
    assert [(s.name, s.kind, s.aliases, s.uses) for s in sites.values()] == [
        ("0.weight", "embedding", ("1.weight",), 1), ("1.weight", "linear", ("0.weight",), 1)]
    assert sites["1.weight"].owner_class == "Linear"
    assert sites["0.weight"].swap is None and "tied" in (sites["0.weight"].refusal or "")
    assert sites["1.weight"].swap == "module"  # it can be packed, and the embedding reads its rows
    model[0].max_norm = 1.0
    assert all(site.swap is None and "tied" in (site.refusal or "") for site in sites_of(model).values())


def test_modules_never_called() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(K, K), nn.Linear(K, N)
            self.odd = SubclassedLinear(K, N)
            self.table, self.conv, self.norm = nn.Embedding(5, K), nn.Conv1d(K, N, 3), nn.LayerNorm(K)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    sites = sites_of(Idle())
    assert list(sites) == ["used.weight", "idle.weight", "odd.weight", "table.weight"]
    assert [(site.uses, site.swap, site.kind) for site in sites.values()] == [
        (1, "module", "linear"), (0, "module", "linear"), (0, None, "linear"), (0, None, "embedding")]
    assert sites["idle.weight"].bias == "idle.bias"
    assert "never reach odd.weight" in (sites["odd.weight"].refusal or "")


def test_weights_that_are_views_of_one_storage() -> None:
    model = nn.Sequential(nn.Linear(K, K), nn.ReLU(), nn.Linear(K, K))
    whole = torch.randn(2 * K, K)
    model[0].weight, model[2].weight = nn.Parameter(whole[:K]), nn.Parameter(whole[K:])
    sites = sites_of(model)
    assert [(s.name, s.shape, s.swap, s.aliases) for s in sites.values()] == [
        ("0.weight", (K, K), "module", ()), ("2.weight", (K, K), "module", ())]


def test_a_weight_that_is_a_transposed_view() -> None:
    model = nn.Sequential(nn.Linear(K, N), nn.ReLU())
    model[0].weight = nn.Parameter(torch.randn(K, N).t())
    site = sites_of(model)["0.weight"]
    assert (site.transposed, site.shape, site.swap) == (False, (N, K), "module")


def test_a_bias_of_another_dtype() -> None:
    class Wide(nn.Module):
        def __init__(self, cast: bool) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(N, K, dtype=torch.bfloat16))
            self.bias = nn.Parameter(torch.randn(N))
            self.cast = cast

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T + (self.bias.to(x.dtype) if self.cast else self.bias)

    for cast in (False, True):
        site = sites_of(nn.Sequential(Wide(cast)), torch.randn(2, K, dtype=torch.bfloat16))["0.weight"]
        assert (site.bias, site.swap) == ("0.bias", "parameter")  # its own forward goes on adding the bias


def test_a_linear_whose_output_feeds_a_view() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(K, N)

        def forward(self, x: Tensor) -> Tensor:
            return torch.exp(self.proj(x).view(*x.shape[:-1], 3, 4).transpose(1, 2))

    site = sites_of(Heads(), torch.randn(2, 3, K))["proj.weight"]
    assert (site.swap, site.consumers) == ("module", ("exp",))


def test_parametrized_weight() -> None:
    model = nn.Sequential(nn.Linear(K, K), nn.ReLU(), nn.Linear(K, K))
    nn.utils.parametrizations.weight_norm(model[0])
    sites = sites_of(model)
    refusal = sites["0.parametrizations.weight.original1"].refusal or ""
    assert "remove_parametrizations on '0' for 'weight'" in refusal
    assert sites["2.weight"].swap == "module" and len(sites) == 2


def test_low_rank_merge_names_every_matrix() -> None:
    class Lora(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(N, K))
            self.a, self.b = nn.Parameter(torch.randn(2, K)), nn.Parameter(torch.randn(N, 2))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w + self.b @ self.a)

    sites = sites_of(Lora(), torch.randn(2, K))
    assert set(sites) == {"w", "a", "b"} and all(site.swap is None for site in sites.values())


@pytest.mark.parametrize(("model", "inputs", "names"), [
    (nn.MultiheadAttention(K, 2, batch_first=True), (torch.zeros(2, 3, K),) * 3, {"in_proj_weight", "out_proj.weight"}),
    (nn.LSTM(K, 4), torch.zeros(2, 3, K), {"weight_ih_l0", "weight_hh_l0"}),
    (nn.GRU(K, 4), torch.zeros(2, 3, K), {"weight_ih_l0", "weight_hh_l0"}),
    (nn.Bilinear(K, K, 4), (torch.zeros(2, K),) * 2, {"weight"}),
], ids=["attention", "LSTM", "GRU", "bilinear"])
def test_products_inside_one_fused_function(model: nn.Module, inputs: Any, names: set[str]) -> None:
    sites = sites_of(model.eval(), inputs)
    assert set(sites) == names
    assert all(site.swap is None and "inside" in (site.refusal or "") for site in sites.values())


def test_convolutions_norms_and_quantized_parameters_are_no_sites() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.proj = nn.Conv1d(K, K, 1), nn.LayerNorm(K), nn.Linear(K, K)
            self.codes = nn.Parameter(torch.ones(K, K, dtype=torch.int8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(self.norm(self.conv(x.mT).mT)) @ self.codes.float()

    assert list(sites_of(Other(), torch.randn(2, 3, K))) == ["proj.weight"]


def test_rows_gathered_and_cleared_are_still_the_norms() -> None:
    class Cleared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.proj = nn.LayerNorm(K), nn.Linear(K, N)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.norm(x)[torch.tensor([1, 0, 1])]
            return self.proj(rows.masked_fill_((rows.sum(-1) > 0)[:, None], 0.0)).tanh()

    (site,) = sites_of(Cleared(), torch.randn(2, K)).values()
    assert site.produced_by == "norm (LayerNorm)"


def test_learned_queries_are_the_input_of_a_linear() -> None:
    class Latents(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latents, self.proj = nn.Parameter(torch.randn(5, K)), nn.Linear(K, N)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(self.latents).sum() + x

    sites = sites_of(Latents(), torch.randn(2, K))
    assert list(sites) == ["proj.weight"]
    assert (sites["proj.weight"].swap, sites["proj.weight"].produced_by) == ("module", "latents")


def test_weights_of_size_one() -> None:
    sites = sites_of(nn.Sequential(nn.Linear(K, 1), nn.Linear(1, 1), nn.Linear(1, K)), torch.randn(2, K))
    assert [(s.shape, s.transposed, s.swap) for s in sites.values()] == [
        ((1, K), False, "module"), ((1, 1), False, "module"), ((K, 1), False, "module")]


def test_weights_of_size_zero() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(K, 0), nn.Linear(0, N))
    assert [(s.shape, s.transposed, s.swap) for s in sites_of(model, torch.randn(2, K)).values()] == [
        ((0, K), False, "module"), ((N, 0), False, "module")]


def test_a_weight_that_another_library_wraps() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = nn.Sequential(nn.Linear(K, K), nn.ReLU(), nn.Linear(K, K))
    model[0].weight = nn.Parameter(TwoTensor(torch.randn(K, K), torch.randn(K, K)))
    sites = sites_of(model)
    assert "TwoTensor" in (sites["0.weight"].refusal or "") and sites["2.weight"].swap == "module"


def test_autocast_around_the_capture_changes_nothing() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sites_of(nn.Sequential(nn.Linear(K, K)))["0.weight"].swap == "module"


def test_embedding_alone_and_in_a_bigger_forward() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    for table, swap in ((nn.Embedding(11, K), "module"), (Scaled(11, K), None)):
        site = sites_of(nn.Sequential(table, nn.Linear(K, K)))["0.weight"]
        assert (site.kind, site.swap, site.uses) == ("embedding", swap, 1)


def test_shared_inputs_producers_and_consumers(tiny_model: Callable[..., nn.Module]) -> None:
    sites = sites_of(tiny_model("llama"))
    layer = "model.layers.1."
    q, k, v, o = (sites[f"{layer}self_attn.{name}_proj.weight"] for name in "qkvo")
    gate, up, down = (sites[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    assert q.shared_input is not None and q.shared_input == k.shared_input == v.shared_input
    assert gate.shared_input is not None and gate.shared_input == up.shared_input != q.shared_input
    assert o.shared_input is None and down.shared_input is None
    assert q.shared_input != sites["model.layers.0.self_attn.q_proj.weight"].shared_input
    assert q.produced_by == f"{layer}input_layernorm (LlamaRMSNorm)"
    assert up.produced_by == f"{layer}post_attention_layernorm (LlamaRMSNorm)"
    assert down.produced_by == "silu*mul" and o.produced_by == "scaled_dot_product_attention"
    assert gate.consumers == ("silu",) and up.consumers == ("mul",) and o.consumers == ("add",)
    assert sites["lm_head.weight"].produced_by == "model.norm (LlamaRMSNorm)"
    assert sites["lm_head.weight"].consumers == ("output",)


def test_a_site_that_feeds_a_site_is_its_producer_and_consumer() -> None:
    sites = sites_of(nn.Sequential(nn.Linear(K, N), nn.Linear(N, K)))
    assert sites["0.weight"].consumers == ("1.weight",) and sites["1.weight"].produced_by == "0 (Linear)"


def test_sites_stand_in_the_order_of_use() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(K, K), nn.Linear(K, K), nn.Linear(K, K)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(self.third(x))

    assert list(sites_of(Reversed())) == ["third.weight", "first.weight", "second.weight"]


def test_without_a_graph_only_plain_linears_are_trusted() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.odd = nn.Linear(K, N), SubclassedLinear(K, N)
            self.w = nn.Parameter(torch.randn(3, N, K))

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("never")

    model = Opaque()
    captured = capture(model, torch.randn(2, K))
    assert captured.method == "modules"
    sites = {site.name: site for site in find(model, captured)}
    assert {name: (s.kind, s.swap, s.uses) for name, s in sites.items()} == {
        "w": ("experts", None, 1), "plain.weight": ("linear", "module", 1), "odd.weight": ("linear", None, 1)}
    assert "no graph of the model could be had" in (sites["odd.weight"].refusal or "")


class Chooser(nn.Module):
    """Experts behind `pick`, which gives from logits [T, E] what the experts are chosen by."""

    def __init__(self, pick: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.pick = pick
        self.router, self.out = nn.Linear(K, 4), nn.Linear(K, N)
        self.correction = nn.Parameter(torch.zeros(4))
        self.scales = nn.Parameter(torch.randn(4, K))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x * self.scales[self.pick(self, self.router(x))])  # type: ignore[no-any-return]


@pytest.mark.parametrize("pick", [
    lambda s, y: y.softmax(-1).topk(1).indices[:, 0],
    lambda s, y: y.topk(1)[1].squeeze(-1),
    lambda s, y: torch.topk(y.float().sigmoid() + s.correction, 2, sorted=False)[1][:, 0],
    lambda s, y: (y / 2.0).softmax(-1).argmax(-1),
    lambda s, y: y.log_softmax(-1).max(-1).indices,
    lambda s, y: y.sort(-1, descending=True)[1][:, 0],
    lambda s, y: y.view(-1, 2, 2).masked_fill(torch.zeros(2, 2).bool(), 0.0).view(-1, 4).topk(2)[1][:, 0],
], ids=["softmax topk", "topk", "sigmoid corrected topk", "argmax", "max", "sort", "groups"])
def test_a_router_is_known_by_what_its_result_picks(pick: Callable[[Any, Tensor], Tensor]) -> None:
    sites = sites_of(Chooser(pick), torch.randn(3, K))
    assert {name: site.role for name, site in sites.items()} == {"router.weight": "router", "out.weight": None}


def test_scores_that_are_only_handed_out_make_no_router() -> None:
    class Sampler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(K, K), nn.Linear(K, N)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.inner(x)).softmax(-1).topk(2)

    assert {site.role for site in sites_of(Sampler(), torch.randn(3, K)).values()} == {None}


def test_a_product_into_a_given_tensor_is_not_passed_over() -> None:
    class Into(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.out = nn.Parameter(torch.randn(K, K)), nn.Linear(K, N)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.empty_like(x)
            torch.mm(x, self.w, out=y)
            return self.out(y)  # type: ignore[no-any-return]

    sites = sites_of(Into(), torch.randn(3, K))
    assert set(sites) == {"w", "out.weight"}
    assert sites["w"].swap is None and "mm.out" in str(sites["w"].refusal)


def test_the_classes_of_an_owner_are_told() -> None:
    class Own(nn.Linear):
        pass

    sites = sites_of(nn.Sequential(Own(K, K), nn.Linear(K, N)), torch.randn(2, K))
    assert [(site.owner_class, site.owner_bases) for site in sites.values()] == [("Own", ("Linear",)), ("Linear", ())]
