"""Rotate heads: a float model in; the same function out, with the channels of each attention head's values mixed.

SpinQuant's R2 (Liu et al., 2024), folded: attention adds up values of one head with numbers that no rotation within the
head changes, so the rows of the product that makes the values are rotated, and the columns of the one that reads what
attention gives, as the graph shows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from qpass.calibrate.pairs import channels_along, splits
from qpass.calibrate.rotate import allowed, run_on
from qpass.calibrate.rotation_math import Orthogonal, hadamard_like
from qpass.calibrate.samples import Sample
from qpass.capture.as_found import in_eval_mode
from qpass.capture.capture_model import Capture
from qpass.capture.find_products import Product, find_products
from qpass.capture.walk import aten, is_view


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Heads of `size` channels: a parameter whose dim 0 (1 if transposed) writes them, in the blocks of that size with
    the numbers `blocks`, its bias, and one whose columns (rows if transposed) read them, in all of its blocks."""

    size: int
    blocks: tuple[int, ...]
    writer: str
    writer_transposed: bool
    bias: str | None
    reader: str
    reader_transposed: bool


def find_heads(capture: Capture) -> tuple[list[Heads], list[str]]:
    """Every attention whose values one product makes and whose result one product reads; and of the others, why not."""
    if capture.graph_module is None:
        return [], []
    products = find_products(capture.graph_module, capture.parameters)
    made = {node: product for product in products for node in (product.node, product.result)}
    found, notes = [], []
    for product in products:
        if product.weight is None:
            continue
        attention = _back(product.activation, lambda node: _values(node) is not None)
        if attention is None:
            continue
        heads = _heads(product, attention, made)
        if isinstance(heads, Heads):
            found.append(heads)
        else:
            notes.append(f"{product.weight.name}: {heads}")
    names = [name for heads in found for name in (heads.writer, heads.reader)]
    shared = {name for name in names if names.count(name) > 1}
    notes += [f"{name}: several attentions use it" for name in sorted(shared)]
    return [heads for heads in found if not shared & {heads.writer, heads.reader}], notes


def _values(node: fx.Node) -> fx.Node | None:
    """The operand that holds the values, if `node` is attention or its last product."""
    if "scaled_dot_product" in str(node.target):
        return node.args[2]  # type: ignore[return-value]
    return node.args[1] if node.target is aten.bmm.default else None  # type: ignore[return-value]


def _back(node: fx.Node, ends: object) -> fx.Node | None:
    """The first node behind views and casts for which `ends` holds."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if ends(node):  # type: ignore[operator]
            return node
        if not (is_view(node) or node.target in (aten._to_copy.default,) or "getitem" in str(node.target)):
            return None
        node = node.args[0]  # type: ignore[assignment]
    return None


def _heads(reader: Product, attention: fx.Node, made: dict[fx.Node, Product]) -> Heads | str:
    values = _values(attention)
    source = None if values is None else _back(values, lambda node: node in made)
    if values is None or source is None:
        return "something stands between its values and the product that makes them"
    writer, size = made[source], int(values.meta["val"].shape[-1])
    if size < 2 or not all(_whole(product) for product in (writer, reader)) or (
            writer.bias is not None and source is not writer.result):
        return "the products before and after the attention read more than one whole parameter each"
    path: list[fx.Node] = []
    node = reader.activation
    while node is not source:
        path.insert(0, node)
        node = values if node is attention else node.args[0]  # type: ignore[assignment]
    if any(len(node.users) > 1 and not splits(node, user) for node, user in zip((source, *path), path, strict=False)):
        return "its values are read by something else too"
    index = channels_along(source, tuple(path))
    blocks = [] if index is None else [index[start:start + size] for start in range(0, len(index), size)]
    if not blocks or any(block[0] % size or block != tuple(range(block[0], block[0] + size)) for block in blocks):
        return "the channels of its heads do not lie together"
    assert writer.weight is not None and reader.weight is not None
    return Heads(size=size, blocks=tuple(sorted({block[0] // size for block in blocks})),
                 writer=writer.weight.name, writer_transposed=writer.transposed, bias=writer.bias,
                 reader=reader.weight.name, reader_transposed=reader.transposed)


def _whole(product: Product) -> bool:
    view = product.weight
    return product.kind == "linear" and view is not None and not product.weight_left and (
        view.orientation in ("as stored", "swapped") and len(view.root.users) == 1)


def rotate_heads(model: nn.Module, capture: Capture, sample: Sample | None, seed: int) -> list[str]:
    """Rotate the values of every attention of `model` that can be, in place; returns notes for the report.

    The model runs on `sample` before and after, and has its parameters back if the outputs differ by more than
    rounding, as it has after an exception.
    """
    found, why = find_heads(capture)
    notes = [f"rotation: heads stay as they are, {reason}" for reason in why]
    if not found:
        return notes or ["rotation: the graph shows no attention whose values and result a product makes and reads; no "
                         "heads are rotated"]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    touched = [parameters[name] for heads in found for name in (heads.writer, heads.bias, heads.reader) if name]
    before = [parameter.data for parameter in touched]
    with in_eval_mode(model), torch.no_grad():
        wanted = None if sample is None else run_on(model, sample)
        try:
            for number, heads in enumerate(found):
                turn = hadamard_like(heads.size, seed + number, keeps_mean=False)
                for name, dim, blocks in ((heads.writer, 1 if heads.writer_transposed else 0, heads.blocks),
                                          (heads.bias, 0, heads.blocks),
                                          (heads.reader, 0 if heads.reader_transposed else 1, None)):
                    if name is not None:
                        parameters[name].data = _turned(parameters[name].data, dim, heads.size, turn, blocks)
            got = None if sample is None else run_on(model, sample)
        except BaseException:
            _put_back(touched, before)
            raise
    moved = 0.0 if got is None or wanted is None else float((got - wanted).norm() / wanted.norm())
    if not moved <= allowed(before[0].dtype):
        _put_back(touched, before)
        return [*notes, f"rotation: with rotated heads the model's output moved by {moved:.1%}, more than rounding "
                        "does; taken back"]
    return [*notes, f"rotation: the values of {len(found)} attentions mixed within heads of "
                    f"{', '.join(str(size) for size in sorted({heads.size for heads in found}))} channels; the model's "
                    f"output moved by {moved:.1e} of its size"]


def _put_back(parameters: Sequence[nn.Parameter], before: Sequence[Tensor]) -> None:
    for parameter, data in zip(parameters, before, strict=True):
        parameter.data = data


def _turned(weight: Tensor, dim: int, size: int, turn: Orthogonal, chosen: Sequence[int] | None) -> Tensor:
    """`weight` with the chosen blocks of `size` entries along `dim`, None for all, multiplied by the rotation."""
    last = weight.movedim(dim, -1)
    blocks = last.reshape(*last.shape[:-1], -1, size).clone()
    which = list(range(blocks.shape[-2])) if chosen is None else list(chosen)
    blocks[..., which, :] = turn.turn(blocks[..., which, :]).to(blocks.dtype)
    return blocks.reshape(last.shape).movedim(-1, dim).contiguous()
