"""Lower attention: scaled-dot-product attention becomes one native op over keys and values as they lie in the cache.

before  k2, v2 = k and v expanded to the heads of the queries and copied;  add = where(seen, 0, -inf)
        y, _ = aten attention(q, k2, v2, causal, attn_mask=add, scale=s)
after   y = permute(native attention(q, k, v, seen, causal, s, isa), [0, 2, 1, 3])

A decoded token reads every key and value once then, instead of writing a copy for each head that shares them. What the
kernels refuse stays PyTorch's, and `meta["qpass_left"]` says why; so does attention whose gradient is wanted.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from qpass.kernels.attention import native_attention
from qpass.lowering import debug
from qpass.lowering.graph_nodes import ATTENTION, LEFT, add_call, module_path, named_args, replace, shape_text

_aten = torch.ops.aten
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu.default  # scaled_dot_product_attention, traced
_WHERE = (_aten.where.self, _aten.where.ScalarSelf, _aten.where.ScalarOther, _aten.where.Scalar)
_VIEWS = (_aten.reshape.default, _aten.view.default, _aten._unsafe_view.default)


def lower_attention(graph: fx.Graph) -> int:
    """Replace attention by native ops. Returns the number replaced."""
    changed = 0
    for node in [node for node in graph.nodes if node.target is _ATTENTION]:
        why = _lower(graph, node)
        if why is not None:
            node.meta[LEFT] = why
            debug.say(2, f"{module_path(node)}: attention stays PyTorch's: {why}")
        changed += why is None
    if changed:
        graph.eliminate_dead_code()
    return changed


def _lower(graph: fx.Graph, node: fx.Node) -> str | None:
    """Replace one, or say why not."""
    args = named_args(node)
    if args["dropout_p"] != 0.0:
        return f"it drops out {args['dropout_p']} of the weights"
    users = list(node.users)
    if any(user.target is not operator.getitem or (user.args[1] != 0 and user.users) for user in users):
        return "its logarithms of sums are read, as gradients need them"
    query, key, value = args["query"], _unrepeated(args["key"]), _unrepeated(args["value"])
    mask, size = args["attn_mask"], query.meta["val"].shape[-1]
    scale = args["scale"]
    if scale is None and isinstance(size, int):
        scale = 1 / math.sqrt(size)
    if not isinstance(scale, float):
        return f"its scale is {scale}, which is no number yet"
    if mask is not None:
        mask = _as_bool(mask)
        if str(mask.meta["val"].shape[-1]) != str(key.meta["val"].shape[2]):
            return f"its mask is {shape_text(mask.meta['val'])}, the keys are {shape_text(key.meta['val'])}"
    values: list[Any] = [None if one is None else one.meta["val"] for one in (query, key, value, mask)]
    if any(one is not None and not _side_by_side(one) for one in values):
        return "the numbers of a head do not lie side by side"
    found = native_attention(*values)
    if isinstance(found, str):
        return found
    target, isa = found
    with graph.inserting_before(node):
        call = add_call(graph, target, (query, key, value, mask, args["is_causal"], scale, isa), like=node,
                        name="attention")
        result = add_call(graph, _aten.permute.default, (call, [0, 2, 1, 3]), like=node)
    call.meta[ATTENTION] = module_path(node) or node.name
    for user in users:
        if user.args[1] == 0:
            replace(user, result)
        else:
            graph.erase_node(user)
    graph.erase_node(node)  # which dead code elimination may keep: an op that can drop out is random
    return None


def _unrepeated(node: fx.Node) -> fx.Node:
    """The [B, Hkv, S, D] behind a copy for all heads of queries: unsqueeze, expand, (clone,) view; else `node`."""
    if node.target not in _VIEWS:
        return node
    wide: Any = node.args[0]
    if wide.target is _aten.clone.default:
        wide = wide.args[0]
    if wide.target is not _aten.expand.default:
        return node
    one = wide.args[0]
    if one.target is not _aten.unsqueeze.default or one.args[1] not in (2, -3):
        return node
    source = one.args[0]
    batch, *rest = source.meta["val"].shape
    into = wide.meta["val"].shape
    if len(rest) != 3 or not isinstance(rest[0], int) or not isinstance(into[2], int):
        return node
    heads, tokens, size = rest
    repeated = (batch, heads * into[2], tokens, size)
    same = str((batch, heads, into[2], tokens, size)) == str(tuple(into)) and str(repeated) == str(
        tuple(node.meta["val"].shape))
    return source if same else node


def _as_bool(mask: fx.Node) -> fx.Node:
    """The `seen` of where(seen, 0, -inf), before it was expanded; the mask itself if it is another one."""
    if mask.target not in _WHERE:
        return mask
    args: list[Any] = list(mask.args)
    seen, shown, hidden = args
    if _constant(shown) != 0.0 or _constant(hidden) != -math.inf or not _same_keys(seen, mask):
        return mask
    before: fx.Node = seen.args[0] if seen.target is _aten.expand.default else seen
    return before if _same_keys(before, mask) else seen


def _same_keys(mask: fx.Node, other: fx.Node) -> bool:
    return str(mask.meta["val"].shape[-1:]) == str(other.meta["val"].shape[-1:])


def _constant(node: Any) -> float | None:
    """The number of a tensor that is one number, or of a number."""
    if isinstance(node, (int, float)):
        return float(node)
    if node.target is _aten.full.default and list(node.args[0]) == []:
        return float(node.args[1])
    return float(node.args[0]) if node.target is _aten.scalar_tensor.default else None


def _side_by_side(value: Tensor) -> bool:
    step = value.stride(-1)
    return isinstance(step, int) and (step == 1 or (isinstance(value.shape[-1], int) and value.shape[-1] == 1))
