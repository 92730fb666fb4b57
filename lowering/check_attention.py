"""Check attention: what a native op of attention got and gave in; a LoweringError if it is not the reference's."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qpass.errors import LoweringError
from qpass.kernels.reference.attention import attention
from qpass.lowering.graph_nodes import ATTENTION, add_call
from qpass.ops import LIBRARY

LIBRARY.define("check_attention(Tensor got, Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, "
               "float scale, str site) -> Tensor")

_TOLERANCE = 1e-4  # of the largest value: sums in another order, and exp; the result's own rounding comes on top


def insert_attention_checks(graph: fx.Graph) -> int:
    """Put a check after each native op of attention; what read it reads the check's copy. Returns how many."""
    nodes = [node for node in graph.nodes if ATTENTION in node.meta]
    for node in nodes:
        users = list(node.users)
        with graph.inserting_after(node):
            check = add_call(graph, torch.ops.qpass.check_attention.default,
                             (node, *node.args[:6], node.meta[ATTENTION]), like=node)
        for user in users:
            user.replace_input_with(node, check)
    return len(nodes)


@torch.library.register_fake("qpass::check_attention", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _check_attention_fake(got: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool,
                          scale: float, site: str) -> Tensor:
    return torch.empty_like(got)


def _check_attention(got: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool,
                     scale: float, site: str) -> Tensor:
    expected = attention(query, key, value, mask, causal, scale).double()
    largest = value.double().nan_to_num(0.0, 0.0, 0.0).abs().amax() if value.numel() else 0.0
    wide = got.double()
    wrong = (wide - expected).abs() > _TOLERANCE * largest + torch.finfo(got.dtype).eps * expected.abs() + 1e-30
    # 0 times NaN or Inf of a hidden place is NaN in the reference, and nothing in the kernel.
    wrong |= wide.isnan() & ~expected.isnan()
    if bool(wrong.any()):
        worst = float((wide - expected).abs().nan_to_num().max())
        raise LoweringError(f"the native op of attention differs from the reference at {site!r}: {int(wrong.sum())} of "
                            f"{wrong.numel()} values, by up to {worst:.3g}; qpass.lowering.pipeline.disable_pass("
                            "'lower_attention') leaves attention to PyTorch; report the op with this line")
    return got.clone()


LIBRARY.impl("check_attention", _check_attention, "CompositeExplicitAutograd")
