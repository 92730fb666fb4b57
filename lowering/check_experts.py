"""Check experts: what a layer of experts got and gave in; a LoweringError if the reference gives something else.

The chosen experts are unpacked, run through `kernels/reference/experts.py` and compared row by row, the exposed
quantization of their activation too.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qpass.errors import LoweringError
from qpass.experts_spec import ExpertsSpec
from qpass.kernels.experts_choice import unpack_block
from qpass.kernels.layout import CANONICAL
from qpass.kernels.reference.experts import experts_q_reference, experts_reference, part_names
from qpass.lowering.check_quantization import check_quantization
from qpass.lowering.graph_nodes import Product, add_call, quantized_input, same_rows, sites_of
from qpass.ops import LIBRARY

LIBRARY.define("check_experts(Tensor got, Tensor x, Tensor? x_scale, Tensor? x_zero_point, Tensor? source, "
               "Tensor index, Tensor weight, Tensor[] packed, Tensor?[] bias, str spec, str site) -> Tensor")

# A code of the second quantization may differ by one where exp or a float sum is computed in another order; float
# activations may be rounded to 8 bits of mantissa on the way into a product.
_TOLERANCE = 2e-2


def add_experts_check(graph: fx.Graph, node: fx.Node, product: Product) -> fx.Node:
    """A check at the graph's insert point; its result is a copy of the node's."""
    assert product.routing is not None
    source = quantized_input(product.x)
    return add_call(graph, torch.ops.qpass.check_experts.default, (
        node, product.x, product.x_scale, product.x_zero_point, None if source is None else same_rows(source),
        *product.routing, list(product.packed), list(product.bias), product.specs[0], sites_of(node)[0]), like=node)


@torch.library.register_fake("qpass::check_experts", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _check_experts_fake(got: Tensor, x: Tensor, x_scale: Tensor | None, x_zero_point: Tensor | None,
                        source: Tensor | None, index: Tensor, weight: Tensor, packed: list[Tensor],
                        bias: list[Tensor | None], spec: str, site: str) -> Tensor:
    return torch.empty_like(got)


def _check_experts(got: Tensor, x: Tensor, x_scale: Tensor | None, x_zero_point: Tensor | None,
                   source: Tensor | None, index: Tensor, weight: Tensor, packed: list[Tensor],
                   bias: list[Tensor | None], spec: str, site: str) -> Tensor:
    parsed = ExpertsSpec.parse(spec)
    if source is not None and x_scale is not None and source.numel():
        assert parsed.up is not None
        check_quantization(x, x_scale, source, x_zero_point, parsed.up, site)
    known = (index >= 0) & (index < parsed.experts)
    chosen = index[known].unique()
    local = torch.full((parsed.experts + 1,), len(chosen), device=index.device)
    local[chosen.long()] = torch.arange(len(chosen), device=index.device)
    plain = _plain_blocks(packed, parsed, chosen.tolist())
    few = parsed.holding(max(1, len(chosen))).on("experts_reference", "linear_reference", "linear_reference")
    biases = [None if b is None else b[chosen.long()] for b in bias]
    routing = local[torch.where(known, index, parsed.experts).long()], weight
    if len(chosen) == 0:
        expected = torch.zeros_like(got)
    elif x_scale is None:
        expected = experts_reference.forms["experts"](x, *routing, plain, biases, few)
    else:
        expected = experts_q_reference(x, x_scale, x_zero_point, *routing, plain, biases, few, got.dtype)
    _compare(got, expected, parsed, site)
    return got.clone()


def _plain_blocks(packed: list[Tensor], spec: ExpertsSpec, chosen: list[int]) -> list[Tensor]:
    """Both weights of the chosen experts, stacked as the reference reads them."""
    count = len(part_names(spec)[0])
    plain: list[Tensor] = []
    for part, tensors in zip(spec.parts, (packed[:count], packed[count:]), strict=True):
        if part is None:
            plain.append(tensors[0][chosen])
            continue
        weights = [unpack_block(tensors, part, expert).tensors for expert in chosen]
        plain += [torch.stack([one[name] for one in weights]) for name in CANONICAL.names(part)] if weights else []
    return plain


def _compare(got: Tensor, expected: Tensor, spec: ExpertsSpec, site: str) -> None:
    wide = expected.double()
    largest = wide.nan_to_num(0.0, 0.0, 0.0).abs().amax(-1, keepdim=True) if wide.numel() else wide
    allowed = _TOLERANCE * largest + 2 * torch.finfo(got.dtype).eps * wide.abs() + 1e-30
    wrong = ((got.double() - wide).abs() > allowed) | (got.isnan() != expected.isnan())
    if bool(wrong.any()):
        worst = float((got.double() - wide).abs().nan_to_num().max())
        raise LoweringError(f"kernel {spec.kernel} differs from the reference at {site!r} ({spec}): {int(wrong.sum())} "
                            f"of {wrong.numel()} values, by up to {worst:.3g}; quantize with "
                            "QPASS_KERNEL=experts_reference, and report the kernel with this line")


LIBRARY.impl("check_experts", _check_experts, "CompositeExplicitAutograd")
