"""Check products: with QPASS_CHECK=1, an op after each op of ours that computes it again with the reference.

`qpass::check_linear` gets what a product got and what it gave, on the real values of the run, and raises LoweringError
naming the layer if the two differ by more than rounding. It also compares the exposed quantization of the activation.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from qpass.errors import LoweringError
from qpass.kernels.dispatch import split_packed
from qpass.kernels.layout import CANONICAL
from qpass.kernels.reference.activation import quantize_static, static_rows
from qpass.kernels.reference.linear import linear_q_reference, linear_reference
from qpass.kernels.registry import kernel
from qpass.lowering.check_attention import insert_attention_checks
from qpass.lowering.check_experts import add_experts_check
from qpass.lowering.check_quantization import check_quantization
from qpass.lowering.graph_nodes import Product, add_call, our_nodes, quantized_input, same_rows, sites_of
from qpass.ops import LIBRARY
from qpass.spec import LinearSpec

LIBRARY.define("check_linear(Tensor[] got, Tensor x, Tensor? x_scale, Tensor? x_zero_point, Tensor? source, "
               "Tensor[] packed, Tensor?[] bias, str[] specs, str[] sites, Tensor? input_scale, "
               "Tensor? input_zero_point) -> Tensor[]")

# Integers accumulate exactly, so only the order of float sums over groups differs; float activations may be rounded
# to 8 bits of mantissa on the way into a kernel's product.
_TOLERANCE_INTEGER, _TOLERANCE_FLOAT = 1e-3, 2e-2


def insert_checks(graph: fx.Graph) -> int:
    """Put a check after each product, and after each native op of attention; what read it reads the check's copy.

    Returns the number of checks.
    """
    count = insert_attention_checks(graph)
    for node, product in our_nodes(graph):
        many = isinstance(node.meta["val"], (list, tuple))
        users = list(node.users)
        with graph.inserting_after(node):
            check = (_add_linear_check if product.routing is None else add_experts_check)(graph, node, product)
        copy = check
        if not many and product.routing is None:
            with graph.inserting_after(check):
                copy = add_call(graph, operator.getitem, (check, 0), like=node)
        for user in users:
            user.replace_input_with(node, copy)
        count += 1
    return count


def _add_linear_check(graph: fx.Graph, node: fx.Node, product: Product) -> fx.Node:
    many, source = isinstance(node.meta["val"], (list, tuple)), quantized_input(product.x)
    return add_call(graph, torch.ops.qpass.check_linear.default, (
        node if many else [node], product.x, product.x_scale, product.x_zero_point,
        None if source is None else same_rows(source), list(product.packed), list(product.bias), list(product.specs),
        list(sites_of(node)), product.input_scale, product.input_zero_point), like=node)


@torch.library.register_fake("qpass::check_linear", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _check_linear_fake(got: list[Tensor], x: Tensor, x_scale: Tensor | None, x_zero_point: Tensor | None,
                       source: Tensor | None, packed: list[Tensor], bias: list[Tensor | None], specs: list[str],
                       sites: list[str], input_scale: Tensor | None, input_zero_point: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(y) for y in got]


def _check_linear(got: list[Tensor], x: Tensor, x_scale: Tensor | None, x_zero_point: Tensor | None,
                  source: Tensor | None, packed: list[Tensor], bias: list[Tensor | None], specs: list[str],
                  sites: list[str], input_scale: Tensor | None, input_zero_point: Tensor | None) -> list[Tensor]:
    parsed = [LinearSpec.parse(text) for text in specs]
    chosen = kernel(parsed[0].kernel)
    if source is not None and x_scale is not None and source.numel():
        check_quantization(x, x_scale, source, x_zero_point, parsed[0], sites[0])
    if input_scale is not None:
        x = quantize_static(x, input_scale, input_zero_point)
        x_scale, x_zero_point = static_rows(x, input_scale, input_zero_point)
    joined = len(got) < len(parsed)
    parts = got[0].split([spec.out_features for spec in parsed], -1) if joined else got
    for y, part, b, spec, site in zip(parts, split_packed(packed, parsed, chosen), bias, parsed, sites, strict=True):
        weight = chosen.layout.unpack(dict(zip(chosen.layout.names(spec), part, strict=True)), spec)
        canonical = [weight.tensors[name] for name in CANONICAL.names(spec)] if spec.weight.type == "int" \
            else list(weight.tensors.values())
        if x_scale is None:
            expected = linear_reference.forms["linear"](x, canonical, b, spec)
        else:
            expected = linear_q_reference(x, x_scale, x_zero_point, canonical, b, spec, y.dtype)
        _compare(y, expected, spec, site)
    return [y.clone() for y in got]


def _compare(got: Tensor, expected: Tensor, spec: LinearSpec, site: str) -> None:
    wide = expected.double()
    tolerance = _TOLERANCE_FLOAT if spec.activation is None else _TOLERANCE_INTEGER
    largest = wide.nan_to_num(0.0, 0.0, 0.0).abs().amax(-1, keepdim=True) if wide.numel() else wide
    allowed = tolerance * largest + 2 * torch.finfo(got.dtype).eps * wide.abs() + 1e-30
    wrong = ((got.double() - wide).abs() > allowed) | (got.isnan() != expected.isnan())
    if bool(wrong.any()):
        worst = float((got.double() - wide).abs().nan_to_num().max())
        raise LoweringError(f"kernel {spec.kernel} differs from the reference at {site!r} ({spec}): {int(wrong.sum())} "
                            f"of {wrong.numel()} values, by up to {worst:.3g}; quantize with "
                            "QPASS_KERNEL=linear_reference, and report the kernel with this line")


LIBRARY.impl("check_linear", _check_linear, "CompositeExplicitAutograd")
