"""Graph nodes: named access to the arguments of qpass ops, and the few ways in which passes add and replace nodes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx.node import map_arg

import qpass.ops  # noqa: F401  (defines the ops named below)
from qpass.activation_args import ActivationArgs
from qpass.errors import LoweringError
from qpass.experts_spec import ExpertsSpec
from qpass.spec import LinearSpec

LINEAR = torch.ops.qpass.linear.default
LINEAR_Q = torch.ops.qpass.linear_q.default
LINEAR_LIST = torch.ops.qpass.linear_list.default
LINEAR_Q_LIST = torch.ops.qpass.linear_q_list.default
EXPERTS = torch.ops.qpass.experts.default
EXPERTS_Q = torch.ops.qpass.experts_q.default
OPS: dict[Any, str] = {
    LINEAR: "linear", LINEAR_Q: "linear_q", LINEAR_LIST: "linear_list", LINEAR_Q_LIST: "linear_q_list",
    EXPERTS: "experts", EXPERTS_Q: "experts_q"}

# Keys of node.meta that passes write and later passes read.
SITES = "qpass_sites"  # tuple of str, on every op of ours: the modules it computes, as the compiler names them
OP = "qpass_op"  # str, on every op of ours and on the native op that took its place: `linear`, `linear_q`, ...
MEANING = "qpass_meaning"  # Product, on a native op: what it computes, in terms of the op it took the place of
LEFT = "qpass_left"  # str, on an op that stays as it is, PyTorch's attention too: why no native op took its place
ATTENTION = "qpass_attention"  # str, on a native op of attention: the module it computes
QUANTIZES = "qpass_quantizes"  # Quantization, on each of the lines of an exposed activation quantization

_PLUMBING = ("_modules", "_parameters", "_buffers", "__self__")
LEADING_ONLY = (torch.ops.aten.reshape.default, torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
"""Views that can keep the last dimension; their second argument is their sizes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantization:
    """One exposed activation quantization: `site` is the product it was written for; one object marks all its lines.

    `given` are the nodes of a static scale and zero point; () if both are computed.
    """

    site: str
    given: tuple[fx.Node | None, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Product:
    """The arguments of one of the ops, by name.

    `specs` and `bias` have one entry a weight, `packed` the tensors of all of them. `x_scale` and `dtype` are set for
    the forms that take integers, `x` is then int8. `input_scale` and `input_zero_point` are a static activation's.
    A layer of experts has one spec, two biases, and `routing`: the experts that each token chose and their weights.
    """

    x: fx.Node
    packed: tuple[fx.Node, ...]
    bias: tuple[fx.Node | None, ...]
    specs: tuple[str, ...]
    x_scale: fx.Node | None = None
    x_zero_point: fx.Node | None = None
    dtype: torch.dtype | None = None
    input_scale: fx.Node | None = None
    input_zero_point: fx.Node | None = None
    routing: tuple[fx.Node, fx.Node] | None = None

    @property
    def spec(self) -> LinearSpec | ExpertsSpec:
        """The first weight's spec, or that of the experts; all weights of one product have its kernel."""
        return LinearSpec.parse(self.specs[0]) if self.routing is None else ExpertsSpec.parse(self.specs[0])

    @property
    def activation(self) -> ActivationArgs | None:
        """What `x` is rounded to, the same for all weights of one product; None if it stays in float."""
        spec = self.spec
        if isinstance(spec, ExpertsSpec):
            return None if spec.up is None else spec.up.activation
        return spec.activation


def product_of(node: fx.Node) -> Product | None:
    """The named arguments of a node of ours; None for any other node. A native op answers as what it replaced."""
    if (meaning := node.meta.get(MEANING)) is not None:
        return meaning  # type: ignore[no-any-return]
    op = OPS.get(node.target) if node.op == "call_function" else None
    if op is None:
        return None
    args = named_args(node)
    many, routed = op.endswith("_list"), op.startswith("experts")
    return Product(
        x=args["xq"] if "_q" in op else args["x"], packed=tuple(args["packed"]),
        bias=tuple(args["bias"]) if many or routed else (args["bias"],),
        specs=tuple(args["specs"]) if many else (args["spec"],),
        x_scale=args.get("x_scale"), x_zero_point=args.get("x_zero_point"), dtype=args.get("dtype"),
        input_scale=args.get("input_scale"), input_zero_point=args.get("input_zero_point"),
        routing=(args["index"], args["weight"]) if routed else None,
    )


def named_args(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of an op overload, positional, keyword and default alike, by their schema names."""
    assert isinstance(node.target, torch._ops.OpOverload)
    found = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            found[argument.name] = node.args[position]
        else:
            found[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return found


def our_nodes(graph: fx.Graph) -> Iterator[tuple[fx.Node, Product]]:
    """Every node of ours with its named arguments, in graph order; the graph may be changed on the way."""
    for node in list(graph.nodes):
        if (product := product_of(node)) is not None:
            yield node, product


def add_call(graph: fx.Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *,
             like: fx.Node, name: str | None = None) -> fx.Node:
    """A call at the graph's insert point, with its fake value computed and `like`'s place in the source."""
    node = graph.create_node("call_function", target, args, kwargs, name=name)
    node.meta = {key: like.meta[key] for key in ("stack_trace", "nn_module_stack", "original_aten") if key in like.meta}
    node.meta["val"] = fake_result(target, args, kwargs)
    return node


def fake_result(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    """What `target` gives for the fake values of its arguments."""
    values, named = map_arg((args, kwargs or {}), lambda node: node.meta["val"])
    mode = detect_fake_mode((values, named))
    with mode or nullcontext():
        return target(*values, **named)


def row_sizes(graph: fx.Graph, x: fx.Node) -> list[Any]:
    """[..., 1], the sizes of one number a row of `x`, symbolic ones as nodes at the graph's insert point."""
    leading = [size if isinstance(size, int) else add_call(graph, torch.ops.aten.sym_size.int, (x, i), like=x)
               for i, size in enumerate(x.meta["val"].shape[:-1])]
    return [*leading, 1]


def replace(old: fx.Node, new: fx.Node) -> None:
    """Let `new` take the place of `old`, which is removed. Raises LoweringError unless shape and dtype are the same."""
    if shape_text(old.meta.get("val")) != shape_text(new.meta.get("val")):
        raise LoweringError(f"replacing {old.name} at {', '.join(sites_of(old))} would change its result from "
                            f"{shape_text(old.meta.get('val'))} to {shape_text(new.meta.get('val'))}")
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def shape_text(value: Any) -> str:
    """Dtype and shape of a fake tensor, or of several, symbols by name: comparing texts adds no guard."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(str(size) for size in value.shape)}]"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(shape_text(part) for part in value) + ")"
    return str(value)


def same_rows(node: Any) -> fx.Node:
    """The tensor behind views of `node` that keep its last dimension, so that each row stays a row."""
    while node.target in LEADING_ONLY:
        before = node.args[0]
        if str(before.meta["val"].shape[-1:]) != str(node.meta["val"].shape[-1:]):
            break
        node = before
    return node  # type: ignore[no-any-return]


def quantized_input(xq: fx.Node) -> fx.Node | None:
    """The tensor whose quantization `xq` is; None unless the lines of an exposed quantization lie before it."""
    node = same_rows(xq)
    if QUANTIZES not in node.meta:
        return None
    while QUANTIZES in node.meta:
        node = node.all_input_nodes[0]  # of every line of a quantization, the first input leads back to x
    return node


def sites_of(node: fx.Node) -> tuple[str, ...]:
    """The modules that a node of ours computes, as the compiler names them."""
    return node.meta.get(SITES) or (module_path(node),)


def module_path(node: fx.Node) -> str:
    """The innermost module that `node` was traced in: `model.layers.0.mlp.down_proj`; "" if it is not known."""
    stack = node.meta.get("nn_module_stack")
    return clean_path(next(reversed(stack.values()))[0]) if stack else ""


def module_class(node: fx.Node) -> str:
    """The class name of the innermost module that `node` was traced in; "" if it is not known."""
    stack = node.meta.get("nn_module_stack")
    kind = next(reversed(stack.values()))[1] if stack else ""
    return kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]


def clean_path(source: str) -> str:
    """`L['self']._modules['model'].layers[0]` as `model.layers.0`; paths that are clean stay as they are."""
    source = re.sub(r"^[LG]\['[^']*'\]", "", source).replace("._orig_mod", "")
    parts = re.findall(r"[A-Za-z_0-9]+", source)
    return ".".join(part for part in parts if part not in _PLUMBING)
