"""Known results: calls of one kind give what they gave, in other tensors; what may differ is worked out again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qpass.capture import known_results
from qpass.capture.capture_model import capture
from qpass.capture.known_results import KnownResults


class _Through(TorchDispatchMode):
    """Hands every ATen call to KnownResults, and counts those that were worked out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known, self.asked, self.worked_out = KnownResults(), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.worked_out += 1
            return func(*args, **kwargs)

        if func.namespace == "prim":
            return func(*args, **(kwargs or {}))
        self.asked += 1
        return self.known.call(_Op(func, counted), args, kwargs or {})


class _Op:
    """An op that is equal to `func` and is called through `counted`."""

    def __init__(self, func: Any, counted: Callable[..., Any]) -> None:
        self.func, self._schema, self.tags, self._counted = func, func._schema, func.tags, counted

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Op) and other.func == self.func

    def __hash__(self) -> int:
        return hash(self.func)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._counted(*args, **kwargs)


def _facts(value: Any) -> Any:
    tensors = [value] if isinstance(value, Tensor) else list(value)
    return [(type(t), t.shape, t.stride(), t.storage_offset(), t.dtype, t.device, t.requires_grad, t.layout)
            for t in tensors]


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "view": lambda x: x.view(3, -1), "transpose": lambda x: x.t(), "slice": lambda x: x[1:, 2:4],
    "expand": lambda x: x[:1].expand(5, 6), "product": lambda x: x @ x.t(), "dtype": lambda x: x.to(torch.bfloat16),
    "split": lambda x: x.split(2, -1), "sum": lambda x: x.sum(-1, keepdim=True), "scalar": lambda x: x + 1,
    "float scalar": lambda x: x.long() + 1.0, "largest": lambda x: x.max(-1), "made": lambda x: torch.ones(3),
    "none": lambda x: x[:0], "channels": lambda x: x.view(1, 3, 2, 2).to(memory_format=torch.channels_last)}


@pytest.mark.parametrize("name", CALLS)
def test_second_call_gives_what_the_first_gave(name: str) -> None:
    with FakeTensorMode() as mode:
        x, again = (mode.from_tensor(torch.zeros(2, 6)) for _ in range(2))
        alone = CALLS[name](x)
        with _Through() as through:
            first = CALLS[name](x)
            worked_out, asked = through.worked_out, through.asked
            second = CALLS[name](again)
            assert through.worked_out == worked_out and through.asked > asked
    assert _facts(first) == _facts(second) == _facts(alone)
    ids = [id(t) for value in (first, second) for t in ([value] if isinstance(value, Tensor) else value)]
    assert len(set(ids)) == len(ids)


def test_other_numbers_other_types_and_other_strides_are_other_calls() -> None:
    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.zeros(4, 4, dtype=torch.long))
        with _Through():
            assert (x + 1).dtype is torch.int64 and (x + 1.0).dtype is torch.float32 and (x + True).dtype is torch.int64
            assert x.view(2, 8).shape == (2, 8) and x.view(8, 2).shape == (8, 2)
            assert (x.t() * 2).stride() == (1, 4) and (x * 2).stride() == (4, 1)
            torch.set_default_dtype(torch.float64)
            try:
                assert (x + 1.0).dtype is torch.float64
            finally:
                torch.set_default_dtype(torch.float32)


def test_ops_that_write_give_their_argument_back_each_time() -> None:
    with FakeTensorMode() as mode:
        x, y = (mode.from_tensor(torch.zeros(2, 6)) for _ in range(2))
        with _Through():
            assert x.add_(1) is x and y.add_(1) is y
            assert x.unsqueeze_(0) is x and x.shape == (1, 2, 6) and y.unsqueeze_(0).shape == (1, 2, 6)


def test_numbers_that_a_fake_tensor_knows_are_not_taken_for_others() -> None:
    with FakeTensorMode(), _Through():
        assert [torch.tensor(number).item() for number in (3, 4, 3, 5)] == [3, 4, 3, 5]


def test_a_graph_is_the_same_with_every_call_worked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Block(nn.Module):
        def __init__(self, heads: int) -> None:
            super().__init__()
            self.qkv, self.out, self.heads = nn.Linear(12, 36), nn.Linear(12, 12), heads

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return x + self.out(y.transpose(1, 2).flatten(2))

    model = nn.Sequential(Block(2), Block(2), Block(3))

    def text() -> list[tuple[str, Any]]:
        found = capture(model, torch.zeros(2, 3, 12))
        assert found.method == "trace" and found.graph_module is not None
        return [(node.format_node() or node.name, _facts(node.meta["val"]) if isinstance(node.meta.get("val"), Tensor)
                 else None) for node in found.graph_module.graph.nodes]

    with_memory = text()
    monkeypatch.setattr(known_results, "_parts", lambda result, given: None)
    assert text() == with_memory
