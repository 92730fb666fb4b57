"""Probe: a model in; sequences of tokens drawn at random for it, as samples, out; none if its inputs are no tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qpass.calibrate.samples import Sample
from qpass.capture.example_inputs import example_of

_LENGTH = 128  # of a sequence; position tables of 128 and more hold it, shorter ones are asked for theirs


def drawn_samples(model: nn.Module, example_inputs: Any, tokens: int, seed: int) -> list[Sample]:
    """Samples of at least `tokens` tokens in all, every id of the model's vocabulary as likely as any other.

    The arguments are those of the example inputs, with ids [1, T] drawn in place of every tensor of integers [B, T]
    named as ids, the first positional one included; masks and whatever else has their shape are left out.
    """
    example = example_of(model, example_inputs)
    table = _table(model)
    if example is None or table is None or not tokens:
        return []
    named = {name: value for name, value in example.kwargs.items() if _is_ids(name, value)}
    placed = bool(example.args) and _is_ids("ids", example.args[0])
    if (not named and not placed) or any(isinstance(value, Tensor) for value in example.args[1:]):
        return []
    shapes = {value.shape for value in named.values()} | ({example.args[0].shape} if placed else set())
    length = min(_LENGTH, tokens, _positions(model))
    draw = torch.Generator().manual_seed(seed)

    def ids() -> Tensor:
        return torch.randint(len(table), (1, length), generator=draw).to(table.device)

    found = []
    for _ in range(-(-tokens // length)):
        kept = {name: ids() if name in named else value for name, value in example.kwargs.items()
                if name in named or not (isinstance(value, Tensor) and value.shape in shapes)}
        args = (ids(), *example.args[1:]) if placed else example.args
        found.append(Sample(args=args, kwargs=kept))
    return found


def _is_ids(name: str, value: Any) -> bool:
    return name.endswith("ids") and name not in ("position_ids", "token_type_ids") and isinstance(value, Tensor) and (
        value.ndim == 2 and value.dtype in (torch.int32, torch.int64))


def _table(model: nn.Module) -> Tensor | None:
    """The weight of the input embedding: the one that the model names, else its first."""
    named = getattr(model, "get_input_embeddings", None)
    try:
        module = named() if callable(named) else None
    except NotImplementedError:  # what Transformers' models without one raise
        module = None
    if module is None:
        module = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.ndim == 2 else None


def _positions(model: nn.Module) -> int:
    """How long a sequence may be, as far as the model's config says."""
    config = getattr(model, "config", None)
    said = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    # Some count positions from behind the padding's, so that two fewer fit.
    return min([max(1, value - 2) for value in said if isinstance(value, int) and value > 0], default=_LENGTH)
